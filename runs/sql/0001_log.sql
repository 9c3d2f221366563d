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

-- Locks the live run by appending an event to it: lock and seq in one UPDATE. All NULL when it has ended or is gone. `at` is
-- the event's time: that of the lock, for who held it before may have written later ones than the time at which we asked.
CREATE OR REPLACE FUNCTION longhaul_run_append(
    p_run uuid, p_type text, p_payload jsonb,
    OUT thread_id uuid, OUT owner text, OUT agent text, OUT deadline timestamptz, OUT overrides jsonb, OUT at timestamptz)
LANGUAGE plpgsql AS $$
DECLARE
    v_seq bigint;
BEGIN
    UPDATE longhaul_runs_run r SET last_seq = last_seq + 1
    WHERE r.id = p_run AND r.status IN ('held', 'queued', 'running', 'waiting', 'requires_action')
    RETURNING r.thread_id, r.owner_id::text, r.agent, r.deadline, r.overrides, r.last_seq
    INTO longhaul_run_append.thread_id, owner, longhaul_run_append.agent, longhaul_run_append.deadline,
         longhaul_run_append.overrides, v_seq;
    IF NOT FOUND THEN RETURN; END IF;
    longhaul_run_append.at := longhaul_now();
    INSERT INTO longhaul_runs_event (run_id, seq, type, at, payload)
    VALUES (p_run, v_seq, p_type, longhaul_run_append.at, p_payload);
END $$;

-- Takes back what this very transaction appended last, for its guard found no row: the log stays gap-free.
CREATE OR REPLACE FUNCTION longhaul_run_retract(p_run uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM longhaul_runs_event e USING longhaul_runs_run r WHERE r.id = p_run AND e.run_id = p_run AND e.seq = r.last_seq;
    UPDATE longhaul_runs_run SET last_seq = last_seq - 1 WHERE id = p_run;
END $$;

-- What the event of a message says beside the message: `shown` is false when the thread does not show it to its readers and to
-- later runs.
CREATE OR REPLACE FUNCTION longhaul_message_mark(p_shown boolean) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_shown THEN '{}'::jsonb ELSE '{"shown": false}' END
$$;

-- One tool message a call of the run's last step, in call order, unless they are there already, with their events after p_seq.
-- Returns the last seq. The caller holds the run, every call is settled, and the caller writes last_seq.
CREATE OR REPLACE FUNCTION longhaul_calls_say(p_run longhaul_runs_run, p_seq bigint, p_now timestamptz)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v_place bigint;
    v_count integer;
BEGIN
    IF p_run.steps = 0
       OR EXISTS (SELECT 1 FROM longhaul_threads_message WHERE run_id = p_run.id AND step = p_run.steps AND role = 'tool')
    THEN RETURN p_seq; END IF;
    SELECT coalesce(max(position), 0) INTO v_place FROM longhaul_threads_message WHERE thread_id = p_run.thread_id;
    WITH said AS (
        INSERT INTO longhaul_threads_message (
            id, thread_id, run_id, step, role, status, position, content, metadata, client_id, shown, created_at)
        SELECT longhaul_uuid7(), p_run.thread_id, p_run.id, p_run.steps, 'tool', 'completed',
               v_place + row_number() OVER (ORDER BY c.index),
               jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
                   'type', 'tool_result', 'tool_call', c.id, 'name', c.name, 'outcome', c.outcome, 'error', c.error,
                   'stored', c.stored))
                   || jsonb_build_object('result', c.result)),
               '{}', '', p_run.save_mode <> 'none', p_now
        FROM longhaul_tools_toolcall c WHERE c.run_id = p_run.id AND c.step = p_run.steps
        RETURNING id, position, content)
    INSERT INTO longhaul_runs_event (run_id, seq, type, at, message_id, payload)
    SELECT p_run.id, p_seq + row_number() OVER (ORDER BY position), 'message.completed', p_now, id,
           jsonb_build_object('message', id, 'role', 'tool', 'step', p_run.steps, 'content', content)
               || longhaul_message_mark(p_run.save_mode <> 'none')
    FROM said;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    RETURN p_seq + v_count;
END $$;

-- The join of whatever closes a step otherwise (cancel, deadline, failure), so that the transcript stays valid.
CREATE OR REPLACE FUNCTION longhaul_calls_join(p_run uuid) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
    v_seq bigint;
BEGIN
    SELECT * INTO v_run FROM longhaul_runs_run WHERE id = p_run;
    v_seq := longhaul_calls_say(v_run, v_run.last_seq, longhaul_now());
    IF v_seq > v_run.last_seq THEN UPDATE longhaul_runs_run SET last_seq = v_seq WHERE id = p_run; END IF;
END $$;

-- After every change of a call's status, under the run's lock: tells of it (p_type, p_payload), then, while calls are open, the
-- run's status is a function of them; when none is, join and queue the run. Inside `linger_until` the lingering leg is
-- rung and nothing is published: next_publish_at covers a lingerer that died; elsewhere the run may have to wait for its turn.
-- One UPDATE of the run in all.
-- Returns {"status", "run", "agent"} and, when queued, {"dispatch_seq" (none for a run that waits for its turn), "lingering"}.
CREATE OR REPLACE FUNCTION longhaul_calls_changed(p_run uuid, p_type text DEFAULT NULL, p_payload jsonb DEFAULT NULL)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
    v_works boolean;
    v_status text;
    v_now timestamptz := longhaul_now();
    v_seq bigint;
    v_lingering boolean;
    v_turn bigint;
    v_first boolean;
BEGIN
    SELECT * INTO v_run FROM longhaul_runs_run WHERE id = p_run;
    v_seq := v_run.last_seq;
    v_status := v_run.status;
    IF p_type IS NOT NULL THEN
        v_seq := v_seq + 1;
        INSERT INTO longhaul_runs_event (run_id, seq, type, at, payload) VALUES (p_run, v_seq, p_type, v_now, p_payload);
    END IF;
    IF v_run.status IN ('waiting', 'requires_action') THEN  -- else the run is being ended: nothing to queue
        -- Only the last step of a run has open calls. Two probes, for a count would read all calls of the step at each
        -- settlement: is one at work, and if none is, does one wait for a person or an outside system? From the step's end, for
        -- its calls are claimed from the begin.
        PERFORM 1 FROM longhaul_tools_toolcall
        WHERE run_id = p_run AND step = v_run.steps AND status IN ('requested', 'retrying', 'running', 'awaiting_child')
        ORDER BY index DESC LIMIT 1;
        v_works := FOUND;
        IF NOT v_works AND NOT EXISTS (
            SELECT 1 FROM longhaul_tools_toolcall WHERE run_id = p_run AND step = v_run.steps AND status <> 'settled') THEN
            v_seq := longhaul_calls_say(v_run, v_seq, v_now) + 1;
            INSERT INTO longhaul_runs_event (run_id, seq, type, at, payload)
            VALUES (p_run, v_seq, 'run.queued', v_now, '{"reason": "tools"}');
            v_lingering := coalesce(v_run.linger_until > v_now, false);
            IF NOT v_lingering THEN
                SELECT t.turn, t.first INTO v_turn, v_first FROM longhaul_run_turn(v_run) AS t;
            END IF;
            UPDATE longhaul_runs_run
            SET status = 'queued', dispatch_seq = dispatch_seq + 1, queued_at = v_now, not_before = NULL, last_seq = v_seq,
                turn = v_turn, publishes = CASE WHEN v_turn IS NULL THEN 1 ELSE 0 END,
                next_publish_at = CASE WHEN v_turn IS NULL THEN
                    CASE WHEN v_lingering THEN linger_until ELSE v_now END + interval '1 second' END
            WHERE id = p_run;
            RETURN jsonb_build_object('run', p_run, 'status', 'queued', 'lingering', v_lingering, 'agent', v_run.agent,
                                      'dispatch_seq', CASE WHEN v_turn IS NULL THEN v_run.dispatch_seq + 1 END)
                || CASE WHEN v_first THEN '{"release": true}'::jsonb ELSE '{}' END;
        END IF;
        v_status := CASE WHEN v_works THEN 'waiting' ELSE 'requires_action' END;
        IF v_status <> v_run.status THEN
            v_seq := v_seq + 1;
            INSERT INTO longhaul_runs_event (run_id, seq, type, at, payload)
            VALUES (p_run, v_seq, 'run.' || v_status, v_now, jsonb_build_object('tool_calls', (
                SELECT jsonb_agg(id ORDER BY index) FROM longhaul_tools_toolcall
                WHERE run_id = p_run AND step = v_run.steps AND status <> 'settled')));
        END IF;
    END IF;
    IF v_seq > v_run.last_seq THEN
        UPDATE longhaul_runs_run SET status = v_status, last_seq = v_seq WHERE id = p_run;
    END IF;
    RETURN jsonb_build_object('run', p_run, 'status', v_status, 'agent', v_run.agent);
END $$;
