-- The port that `tools` calls by name (tools.run_log.RunLog), in SQL.

-- Locks the live run. All NULL when it has ended or is gone. The lock is a statement of its own, so that what its caller
-- reads next is newer than the lock.
CREATE OR REPLACE FUNCTION longhaul_run_lock(
    p_run uuid, OUT thread_id uuid, OUT owner text, OUT agent text, OUT deadline timestamptz, OUT overrides jsonb)
LANGUAGE plpgsql AS $$
BEGIN
    SELECT r.thread_id, r.owner_id::text, r.agent, r.deadline, r.overrides
    INTO longhaul_run_lock.thread_id, owner, longhaul_run_lock.agent, longhaul_run_lock.deadline, longhaul_run_lock.overrides
    FROM longhaul_runs_run r
    WHERE r.id = p_run AND r.status IN ('held', 'queued', 'running', 'waiting', 'requires_action')
    FOR NO KEY UPDATE;
END $$;

-- Appends an event. The caller holds the run, so seq order is commit order.
CREATE OR REPLACE FUNCTION longhaul_run_record(p_run uuid, p_type text, p_payload jsonb, p_epoch integer DEFAULT NULL)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v_seq bigint;
BEGIN
    UPDATE longhaul_runs_run SET last_seq = last_seq + 1 WHERE id = p_run RETURNING last_seq INTO v_seq;
    INSERT INTO longhaul_runs_event (run_id, seq, type, at, epoch, payload)
    VALUES (p_run, v_seq, p_type, longhaul_now(), p_epoch, p_payload);
    RETURN v_seq;
END $$;

-- The join: one tool message a call of the run's last step, in call order, unless they are there already. The caller
-- holds the run, and every call is settled. Whatever closes a step does this, so the transcript stays valid.
CREATE OR REPLACE FUNCTION longhaul_calls_join(p_run uuid) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
    v_place bigint;
    v_now timestamptz := longhaul_now();
    v_count integer;
BEGIN
    SELECT * INTO v_run FROM longhaul_runs_run WHERE id = p_run;
    IF v_run.steps = 0
       OR EXISTS (SELECT 1 FROM longhaul_threads_message WHERE run_id = p_run AND step = v_run.steps AND role = 'tool')
    THEN RETURN; END IF;
    SELECT coalesce(max(position), 0) INTO v_place FROM longhaul_threads_message WHERE thread_id = v_run.thread_id;
    WITH said AS (
        INSERT INTO longhaul_threads_message (
            id, thread_id, run_id, step, role, status, position, content, metadata, client_id, shown, created_at)
        SELECT longhaul_uuid7(), v_run.thread_id, p_run, v_run.steps, 'tool', 'completed',
               v_place + row_number() OVER (ORDER BY c.index),
               jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
                   'type', 'tool_result', 'tool_call', c.id, 'name', c.name, 'outcome', c.outcome, 'error', c.error))
                   || jsonb_build_object('result', c.result)),
               '{}', '', v_run.save_mode <> 'none', v_now
        FROM longhaul_tools_toolcall c WHERE c.run_id = p_run AND c.step = v_run.steps
        RETURNING id, position, content)
    INSERT INTO longhaul_runs_event (run_id, seq, type, at, message_id, payload)
    SELECT p_run, v_run.last_seq + row_number() OVER (ORDER BY position), 'message.completed', v_now, id,
           jsonb_build_object('message', id, 'role', 'tool', 'step', v_run.steps, 'content', content)
    FROM said;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    UPDATE longhaul_runs_run SET last_seq = last_seq + v_count WHERE id = p_run;
END $$;

-- After every change of a call's status, under the run's lock: while calls are open the run's status is a function of
-- them; when none is, join and queue the run. Inside `linger_until` the lingering leg is rung and nothing is published:
-- next_publish_at covers a lingerer that died.
-- Returns {"status", "run"} and, when queued, {"dispatch_seq", "lingering"}.
CREATE OR REPLACE FUNCTION longhaul_calls_changed(p_run uuid) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
    v_open integer;
    v_people integer;
    v_status text;
    v_now timestamptz;
    v_lingering boolean;
BEGIN
    SELECT count(*), count(*) FILTER (WHERE status IN ('awaiting_approval', 'awaiting_result', 'unknown'))
    INTO v_open, v_people FROM longhaul_tools_toolcall WHERE run_id = p_run AND status <> 'settled';
    IF v_open = 0 THEN
        PERFORM longhaul_calls_join(p_run);
        v_now := longhaul_now();
        UPDATE longhaul_runs_run
        SET status = 'queued', dispatch_seq = dispatch_seq + 1, queued_at = v_now, not_before = NULL, last_seq = last_seq + 1,
            publishes = 1,
            next_publish_at = CASE WHEN linger_until > v_now THEN linger_until ELSE v_now END + interval '1 second'
        WHERE id = p_run AND status IN ('waiting', 'requires_action')
        RETURNING * INTO v_run;
        IF NOT FOUND THEN RETURN jsonb_build_object('run', p_run); END IF;  -- the run is being ended: nothing to queue
        INSERT INTO longhaul_runs_event (run_id, seq, type, at, payload)
        VALUES (p_run, v_run.last_seq, 'run.queued', v_now, '{"reason": "tools"}');
        v_lingering := coalesce(v_run.linger_until > v_now, false);
        RETURN jsonb_build_object('run', p_run, 'status', 'queued', 'dispatch_seq', v_run.dispatch_seq, 'lingering', v_lingering);
    END IF;
    v_status := CASE WHEN v_open = v_people THEN 'requires_action' ELSE 'waiting' END;
    UPDATE longhaul_runs_run SET status = v_status
    WHERE id = p_run AND status <> v_status AND status IN ('waiting', 'requires_action');
    IF FOUND THEN
        PERFORM longhaul_run_record(p_run, 'run.' || v_status, jsonb_build_object('tool_calls', (
            SELECT jsonb_agg(id ORDER BY index) FROM longhaul_tools_toolcall WHERE run_id = p_run AND status <> 'settled')));
    END IF;
    RETURN jsonb_build_object('run', p_run, 'status', v_status);
END $$;
