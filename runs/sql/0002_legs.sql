-- The transitions of a run. Locks first, in a statement of their own; the fence of a leg is
-- id, epoch, status = 'running', holder: no row means that the leg was lost, and it writes nothing more.

-- What every exit from `running` leaves behind: nothing. Ends the pending message (for a cancel its text is kept) and the
-- open leg, with their events. The caller holds the run and sets its status.
CREATE OR REPLACE FUNCTION longhaul_leg_end(p_run uuid, p_reason text, p_keep_text boolean, p_epoch integer DEFAULT NULL)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_message uuid;
    v_step integer;
    v_content jsonb;
    v_leg longhaul_runs_leg;
    v_seq bigint;
    v_type text;
    v_said uuid;
BEGIN
    SELECT pending_message_id, last_seq INTO v_message, v_seq FROM longhaul_runs_run WHERE id = p_run;
    IF v_message IS NOT NULL THEN
        IF p_keep_text THEN
            -- Where the message begins, found row by row from the end: the planner would read all of the run's events.
            LOOP
                SELECT type, message_id INTO v_type, v_said FROM longhaul_runs_event WHERE run_id = p_run AND seq = v_seq;
                EXIT WHEN NOT FOUND OR v_type = 'message.created' AND v_said = v_message;
                v_seq := v_seq - 1;
            END LOOP;
            SELECT jsonb_agg(jsonb_build_object('type', d.kind, 'text', d.text) ORDER BY d.first) INTO v_content
            FROM (SELECT split_part(type, '.', 1) AS kind, string_agg(payload->>'text', '' ORDER BY seq) AS text, min(seq) AS first
                  FROM longhaul_runs_event
                  WHERE run_id = p_run AND seq > v_seq AND message_id = v_message AND type IN ('text.delta', 'reasoning.delta')
                  GROUP BY 1) AS d;
        END IF;
        UPDATE longhaul_threads_message
        SET status = CASE WHEN v_content IS NULL THEN 'discarded' ELSE 'partial' END, content = coalesce(v_content, '[]')
        WHERE id = v_message AND status = 'pending' RETURNING step INTO v_step;
        UPDATE longhaul_runs_run SET pending_message_id = NULL WHERE id = p_run;
        IF v_content IS NULL THEN
            PERFORM longhaul_run_record(p_run, 'message.discarded', jsonb_build_object(
                'message', v_message, 'role', 'assistant', 'step', v_step, 'reason', p_reason), p_epoch);
        ELSE
            PERFORM longhaul_run_record(p_run, 'message.completed', jsonb_build_object(
                'message', v_message, 'role', 'assistant', 'step', v_step, 'content', v_content, 'partial', true), p_epoch);
        END IF;
    END IF;
    UPDATE longhaul_runs_leg SET ended_at = longhaul_now(), reason = p_reason WHERE run_id = p_run AND ended_at IS NULL
    RETURNING * INTO v_leg;
    IF FOUND THEN
        PERFORM longhaul_run_record(p_run, 'leg.ended', jsonb_build_object(
            'leg', v_leg.number, 'epoch', v_leg.epoch, 'worker', v_leg.worker, 'reason', p_reason), p_epoch);
    END IF;
END $$;

-- Gives the waiting messages of a thread their places, in the order in which they were accepted: those saved by hand
-- (p_by_hand) at a boundary or an end, and those of the run (p_own): its input when it is released, at a boundary what steers it.
-- The caller holds the run p_run that occupies (or will occupy) the thread; each shows as an event of that run.
CREATE OR REPLACE FUNCTION longhaul_messages_admit(p_thread uuid, p_run uuid, p_by_hand boolean, p_own boolean)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_message longhaul_threads_message;
BEGIN
    FOR v_message IN
        SELECT * FROM longhaul_threads_message
        WHERE thread_id = p_thread AND position IS NULL AND status = 'waiting'
          AND (p_by_hand AND run_id IS NULL OR p_own AND run_id = p_run)
        ORDER BY created_at, id
    LOOP
        UPDATE longhaul_threads_message
        SET status = 'completed',
            position = (SELECT coalesce(max(position), 0) + 1 FROM longhaul_threads_message WHERE thread_id = p_thread)
        WHERE id = v_message.id;
        PERFORM longhaul_run_record(p_run, 'message.completed', jsonb_build_object(
            'message', v_message.id, 'role', v_message.role, 'content', v_message.content, 'client_id', v_message.client_id)
            || longhaul_message_mark(v_message.shown));
    END LOOP;
END $$;

-- What the end of a run does about what steered it and was not taken in: it becomes the input of the run that goes on. That is
-- p_next, whose caller inserts it in this transaction; or a run of its own, of the same agent with the same settings,
-- queued by longhaul_steered_start. Where nobody is to answer (a rollback, a deleted thread) it is discarded. Returns the run
-- that goes on, or NULL. The caller holds the run and ends it in this transaction.
CREATE OR REPLACE FUNCTION longhaul_steered(p_run longhaul_runs_run, p_stop_reason text, p_next uuid)
RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    v_message longhaul_threads_message;
BEGIN
    IF NOT EXISTS (SELECT 1 FROM longhaul_threads_message
                   WHERE thread_id = p_run.thread_id AND position IS NULL AND status = 'waiting' AND run_id = p_run.id) THEN
        RETURN p_next;
    END IF;
    IF p_stop_reason IN ('rolled_back', 'thread_deleted', 'parent_ended') THEN
        FOR v_message IN
            UPDATE longhaul_threads_message SET status = 'discarded' WHERE run_id = p_run.id AND status = 'waiting' RETURNING *
        LOOP
            PERFORM longhaul_run_record(p_run.id, 'message.discarded', jsonb_build_object(
                'message', v_message.id, 'role', v_message.role, 'client_id', v_message.client_id, 'reason', p_stop_reason));
        END LOOP;
        RETURN p_next;
    END IF;
    p_next := coalesce(p_next, longhaul_uuid7());
    UPDATE longhaul_threads_message SET run_id = p_next WHERE run_id = p_run.id AND status = 'waiting';
    RETURN p_next;
END $$;

-- Queues the run p_next that goes on with what steered p_run, which has just ended, and was not taken in: of the same agent,
-- with the same settings and as much time. Its input has run_id p_next already. The caller holds p_run, as the row was.
-- Returns what longhaul_run_park says of it.
CREATE OR REPLACE FUNCTION longhaul_steered_start(p_run longhaul_runs_run, p_next uuid) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := longhaul_now();
BEGIN
    INSERT INTO longhaul_runs_run (
        id, thread_id, owner_id, agent, status, stop_reason, origin, parent_id, depth, busy, priority, overrides, save_mode,
        metadata, input_message_id, fingerprint, epoch, dispatch_seq, publishes, next_publish_at, last_seq, steps, legs, lost,
        bad_calls, model_tries, input_tokens, output_tokens, cost, deadline, created_at, entered_at, queued_at,
        gates, lane, max_dispatched)
    SELECT p_next, p_run.thread_id, p_run.owner_id, p_run.agent, 'queued', '', 'steer', p_run.id, p_run.depth, 'steer', p_run.priority,
           p_run.overrides, p_run.save_mode, p_run.metadata, (
               SELECT id FROM longhaul_threads_message WHERE run_id = p_next ORDER BY created_at, id LIMIT 1),
           '', 0, 1, 1, v_now + interval '1 second', 0, 0, 0, 0, 0, 0, 0, 0, 0, v_now + (p_run.deadline - p_run.created_at),
           v_now, v_now, v_now, p_run.gates, longhaul_run_lane(split_part(p_run.lane, E'\n', 1), p_run.gates, false), p_run.max_dispatched;
    PERFORM longhaul_messages_admit(p_run.thread_id, p_next, false, true);
    PERFORM longhaul_run_record(p_next, 'run.queued', jsonb_build_object('reason', 'start', 'after', p_run.id));
    RETURN longhaul_run_park(p_next);
END $$;

-- The end of a run, of whatever cause: nothing pending, nothing open, the transcript joined, the terminal event last, the
-- next run of the thread queued, all in the caller's transaction: the one that goes on with what steered this one, else the
-- oldest held one. p_next: the run that its caller inserts in this place (interrupt, rollback), so none is queued here. The
-- caller holds the run and has checked that it is live. Cancel raises the epoch: the leg learns of it by its fence.
-- Returns {"status", "released": [run, dispatch_seq, agent]} (none for one that has to wait for its turn) and {"release": true}
-- when somebody may be let out now.
CREATE OR REPLACE FUNCTION longhaul_run_end(
    p_run uuid, p_status text, p_stop_reason text, p_error jsonb, p_output jsonb, p_leg_reason text, p_epoch integer DEFAULT NULL,
    p_next uuid DEFAULT NULL)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
    v_held uuid;
    v_on uuid;
    v_next longhaul_runs_run;
    v_turn bigint;
    v_first boolean;
    v_begun jsonb;
    v_message longhaul_threads_message;
BEGIN
    SELECT * INTO v_run FROM longhaul_runs_run WHERE id = p_run;
    PERFORM longhaul_leg_end(p_run, p_leg_reason, p_status = 'cancelled', p_epoch);
    PERFORM longhaul_calls_close(p_run, v_run.steps);
    PERFORM longhaul_calls_join(p_run);
    IF v_run.status = 'held' THEN
        FOR v_message IN
            UPDATE longhaul_threads_message SET status = 'discarded' WHERE run_id = p_run AND status = 'waiting' RETURNING *
        LOOP
            PERFORM longhaul_run_record(p_run, 'message.discarded', jsonb_build_object(
                'message', v_message.id, 'role', v_message.role, 'client_id', v_message.client_id, 'reason', p_leg_reason));
        END LOOP;
    ELSE
        PERFORM longhaul_messages_admit(v_run.thread_id, p_run, true, false);
        v_on := longhaul_steered(v_run, p_stop_reason, p_next);
        IF p_stop_reason = 'rolled_back' THEN PERFORM longhaul_messages_roll_back(p_run); END IF;
    END IF;
    UPDATE longhaul_runs_run
    SET status = p_status, stop_reason = p_stop_reason, error = p_error, output = p_output, finished_at = longhaul_now(),
        entered_at = coalesce(entered_at, longhaul_now()),
        holder = NULL, leg_deadline = NULL, linger_until = NULL, not_before = NULL, next_publish_at = NULL,
        turn = NULL,
        epoch = epoch + CASE WHEN p_status = 'cancelled' THEN 1 ELSE 0 END
    WHERE id = p_run;
    PERFORM longhaul_run_record(p_run, 'run.' || p_status, jsonb_build_object(
        'stop_reason', p_stop_reason, 'output', p_output, 'error', p_error,
        'usage', jsonb_build_object('input_tokens', v_run.input_tokens, 'output_tokens', v_run.output_tokens, 'cost', v_run.cost))
        || CASE WHEN v_on IS NULL THEN '{}'::jsonb ELSE jsonb_build_object('next', v_on) END,
        p_epoch);
    IF p_next IS NOT NULL THEN RETURN jsonb_build_object('run', p_run, 'status', p_status) || longhaul_run_freed(v_run); END IF;
    IF v_on IS NOT NULL THEN
        v_begun := longhaul_steered_start(v_run, v_on);
        RETURN jsonb_build_object('run', p_run, 'status', p_status) || CASE
            WHEN (v_begun->>'out')::boolean THEN jsonb_build_object('released', jsonb_build_array(v_on, 1, v_run.agent))
            ELSE v_begun - 'out' END || longhaul_run_freed(v_run);  -- last: its slot is free, whatever the next one needs
    END IF;
    IF v_run.status <> 'held' THEN
        SELECT id INTO v_held FROM longhaul_runs_run
        WHERE thread_id = v_run.thread_id AND status = 'held' ORDER BY created_at, id LIMIT 1 FOR NO KEY UPDATE;
    END IF;
    IF v_held IS NULL THEN RETURN jsonb_build_object('run', p_run, 'status', p_status) || longhaul_run_freed(v_run); END IF;
    SELECT * INTO v_next FROM longhaul_runs_run WHERE id = v_held;
    SELECT t.turn, t.first INTO v_turn, v_first FROM longhaul_run_turn(v_next) AS t;
    UPDATE longhaul_runs_run
    SET status = 'queued', dispatch_seq = dispatch_seq + 1, entered_at = longhaul_now(), queued_at = longhaul_now(), turn = v_turn,
        publishes = CASE WHEN v_turn IS NULL THEN 1 ELSE 0 END,
        next_publish_at = CASE WHEN v_turn IS NULL THEN longhaul_now() + interval '1 second' END
    WHERE id = v_held RETURNING * INTO v_next;
    PERFORM longhaul_messages_admit(v_run.thread_id, v_held, false, true);
    PERFORM longhaul_run_record(v_held, 'run.queued', '{"reason": "released"}');
    RETURN jsonb_build_object('run', p_run, 'status', p_status) || longhaul_run_freed(v_run) || CASE
        WHEN v_turn IS NULL THEN jsonb_build_object('released', jsonb_build_array(v_held, v_next.dispatch_seq, v_next.agent))
        WHEN v_first THEN '{"release": true}' ELSE '{}' END;
END $$;

-- Takes all that a run was given, has said and has asked for out of later context: its messages stay where they stand, and the
-- log says of each that it is taken away. What was saved by hand meanwhile stays. The caller holds the run and ends it.
CREATE OR REPLACE FUNCTION longhaul_messages_roll_back(p_run uuid) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_seq bigint;
    v_now timestamptz := longhaul_now();
    v_count integer;
BEGIN
    SELECT last_seq INTO v_seq FROM longhaul_runs_run WHERE id = p_run;
    WITH gone AS (
        UPDATE longhaul_threads_message SET status = 'rolled_back'
        WHERE run_id = p_run AND status IN ('completed', 'partial') AND position IS NOT NULL
        RETURNING id, role, step, client_id, position)
    INSERT INTO longhaul_runs_event (run_id, seq, type, at, payload)
    SELECT p_run, v_seq + row_number() OVER (ORDER BY position), 'message.discarded', v_now, jsonb_build_object(
               'message', id, 'role', role, 'step', step, 'client_id', client_id, 'reason', 'rolled_back')
    FROM gone;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    UPDATE longhaul_runs_run SET last_seq = last_seq + v_count WHERE id = p_run;
END $$;

-- queued -> running, by dispatch_seq: a doubled or late message matches no row (NULL). {"absent": true}: the worker must beat
-- first. A run that waits for its turn is claimed by nobody. A leg that still lingers is ended here, by the claim of another task.
-- Returns what a leg needs to begin, and {"release": true} when this made room for half of those that may be out.
CREATE OR REPLACE FUNCTION longhaul_run_claim(
    p_run uuid, p_dispatch integer, p_worker uuid, p_worker_name text, p_task text, p_leg uuid, p_prepare interval)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
    v_now timestamptz;
    v_overrides jsonb;
BEGIN
    v_now := longhaul_now();
    IF NOT longhaul_worker_present(p_worker, v_now) THEN RETURN '{"absent": true}'; END IF;
    UPDATE longhaul_runs_run
    SET status = 'running', epoch = epoch + 1, holder = p_worker, leg_deadline = v_now + p_prepare, linger_until = NULL,
        not_before = NULL, next_publish_at = NULL, publishes = 0, legs = legs + 1, started_at = coalesce(started_at, v_now)
    WHERE id = p_run AND status = 'queued' AND dispatch_seq = p_dispatch AND turn IS NULL AND (not_before IS NULL OR not_before <= v_now)
    RETURNING * INTO v_run;
    IF NOT FOUND THEN RETURN NULL; END IF;  -- another worker got there first, or it is no longer due
    IF v_run.gates IS NOT NULL AND v_run.legs = 1 THEN PERFORM longhaul_run_begun(v_run); END IF;
    PERFORM longhaul_leg_end(p_run, 'tools', false, v_run.epoch);
    INSERT INTO longhaul_runs_leg (id, run_id, number, epoch, worker_id, worker, task_id, started_at, reason)
    VALUES (p_leg, p_run, v_run.legs, v_run.epoch, p_worker, p_worker_name, p_task, v_now, '');
    IF v_run.legs = 1 THEN PERFORM longhaul_run_record(p_run, 'run.started', '{}', v_run.epoch); END IF;
    PERFORM longhaul_run_record(p_run, 'leg.started', jsonb_build_object(
        'leg', v_run.legs, 'epoch', v_run.epoch, 'worker', p_worker_name), v_run.epoch);
    SELECT overrides INTO v_overrides FROM longhaul_threads_thread WHERE id = v_run.thread_id;
    RETURN jsonb_build_object(
        'run', p_run, 'epoch', v_run.epoch, 'thread', v_run.thread_id, 'owner', v_run.owner_id::text, 'agent', v_run.agent,
        'leg', v_run.legs, 'steps', v_run.steps, 'overrides', v_run.overrides, 'thread_overrides', v_overrides,
        'model_tries', v_run.model_tries, 'bad_calls', v_run.bad_calls,
        'retry_seconds', extract(epoch FROM v_now - v_run.retry_since))
        || CASE WHEN longhaul_run_makes_room(v_run) THEN '{"release": true}'::jsonb ELSE '{}' END;
END $$;

-- The messages that the model is shown: the last p_limit of the thread after p_after, by place; a run sees its own
-- always. [[id, position, role, content, run], ...]. Its cost does not grow with the thread: without enable_sort, for statistics of
-- when the threads were short would have the whole thread read and sorted where its index is in order.
CREATE OR REPLACE FUNCTION longhaul_context_read(p_thread uuid, p_run uuid, p_after bigint, p_limit integer)
RETURNS jsonb LANGUAGE plpgsql STABLE SET enable_sort = off AS $$
BEGIN
    RETURN (
        SELECT coalesce(jsonb_agg(jsonb_build_array(m.id, m.position, m.role, m.content, m.run_id) ORDER BY m.position), '[]')
        FROM (SELECT id, position, role, content, run_id FROM longhaul_threads_message
              WHERE thread_id = p_thread AND position > p_after AND status IN ('completed', 'partial')
                AND (shown OR run_id = p_run)
              ORDER BY position DESC LIMIT p_limit) AS m);
END $$;

-- What a turn begins with, for a caller that holds the run and is about to write it: limits, messages saved by hand meanwhile, the
-- context after p_after, the pending message and its event. The caller then raises last_seq by one and writes
-- pending_message_id and leg_deadline. {"limit": name}: a limit is reached, nothing was changed. p_ask: what longhaul_model_ask is
-- asked; {"limit": "model", "reason", "delay"}: the run waits in its model's line (and what was saved by hand has its place).
CREATE OR REPLACE FUNCTION longhaul_turn_begin(
    p_run longhaul_runs_run, p_epoch integer, p_now timestamptz, p_message uuid, p_after bigint, p_limit integer,
    p_max_steps integer, p_max_tokens bigint, p_max_cost numeric, p_ask jsonb)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_seq bigint := p_run.last_seq;
    v_place bigint;
    v_context jsonb;
    v_pinned jsonb;
    v_refused jsonb;
BEGIN
    IF p_run.deadline <= p_now THEN RETURN '{"limit": "deadline"}'; END IF;
    IF p_run.steps >= p_max_steps THEN RETURN '{"limit": "max_steps"}'; END IF;
    IF p_run.input_tokens + p_run.output_tokens >= p_max_tokens THEN RETURN '{"limit": "token_budget"}'; END IF;
    IF p_run.cost >= p_max_cost THEN RETURN '{"limit": "cost_budget"}'; END IF;
    IF EXISTS (SELECT 1 FROM longhaul_threads_message
               WHERE thread_id = p_run.thread_id AND position IS NULL AND status = 'waiting'
                 AND (run_id IS NULL OR run_id = p_run.id)) THEN
        PERFORM longhaul_messages_admit(p_run.thread_id, p_run.id, true, true);
        SELECT last_seq INTO v_seq FROM longhaul_runs_run WHERE id = p_run.id;
    END IF;
    v_context := longhaul_context_read(p_run.thread_id, p_run.id, p_after, p_limit);
    IF v_context->0->>2 = 'tool' AND jsonb_array_length(v_context) >= p_limit THEN
        -- The last step has more results than the window has places: it is shown whole.
        v_context := longhaul_context_read(p_run.thread_id, p_run.id, p_after, p_limit + 1 + (
            SELECT count(*)::integer FROM longhaul_tools_toolcall WHERE run_id = p_run.id AND step = p_run.steps));
    END IF;
    IF p_after = 0 THEN  -- the run's own input is shown even when it is further back
        SELECT jsonb_agg(jsonb_build_array(id, position, role, content, run_id) ORDER BY position) INTO v_pinned
        FROM longhaul_threads_message
        WHERE run_id = p_run.id AND step IS NULL AND role IN ('user', 'system') AND status IN ('completed', 'partial')
          -- the + 0 keeps the planner from walking (thread, position) for it, which Postgres 18 does where threads are few
          AND position + 0 < coalesce((v_context->0->>1)::bigint, 0);
    END IF;
    v_refused := longhaul_model_ask(p_run, p_ask, p_message, v_context);
    IF v_refused IS NOT NULL THEN RETURN v_refused; END IF;
    SELECT coalesce(max(position), 0) + 1 INTO v_place FROM longhaul_threads_message WHERE thread_id = p_run.thread_id;
    INSERT INTO longhaul_threads_message (
        id, thread_id, run_id, step, role, status, position, content, metadata, client_id, shown, created_at)
    VALUES (p_message, p_run.thread_id, p_run.id, p_run.steps + 1, 'assistant', 'pending', v_place, '[]', '{}', '',
            p_run.save_mode <> 'none', p_now);
    INSERT INTO longhaul_runs_event (run_id, seq, type, at, epoch, message_id, payload)
    VALUES (p_run.id, v_seq + 1, 'message.created', p_now, p_epoch, p_message,
            jsonb_build_object('message', p_message, 'role', 'assistant', 'step', p_run.steps + 1)
                || longhaul_message_mark(p_run.save_mode <> 'none'));
    RETURN jsonb_build_object('epoch', p_epoch, 'steps', p_run.steps, 'bad_calls', p_run.bad_calls,
                              'context', v_context, 'pinned', v_pinned);
END $$;

-- A step boundary, fenced: opens a turn with its leg_deadline. NULL: the fence was lost, or a message is pending already (a turn
-- that was opened twice would leave the first one pending for ever). {"limit": name}: a limit is reached, nothing was changed.
CREATE OR REPLACE FUNCTION longhaul_turn_open(
    p_run uuid, p_epoch integer, p_worker uuid, p_message uuid, p_model_time interval, p_after bigint, p_limit integer,
    p_max_steps integer, p_max_tokens bigint, p_max_cost numeric, p_ask jsonb DEFAULT NULL)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
    v_now timestamptz;
    v_turn jsonb;
BEGIN
    SELECT * INTO v_run FROM longhaul_runs_run
    WHERE id = p_run AND epoch = p_epoch AND status = 'running' AND holder = p_worker AND pending_message_id IS NULL
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN RETURN NULL; END IF;  -- the fence
    v_now := longhaul_now();
    v_turn := longhaul_turn_begin(
        v_run, p_epoch, v_now, p_message, p_after, p_limit, p_max_steps, p_max_tokens, p_max_cost, p_ask);
    IF NOT v_turn ? 'limit' THEN
        UPDATE longhaul_runs_run
        SET pending_message_id = p_message, pending_ordinal = 0, leg_deadline = v_now + p_model_time, last_seq = last_seq + 1
        WHERE id = p_run;
    END IF;
    RETURN v_turn;
END $$;

-- The leg that lingered claims again: when the join has queued the run and its leg is still the open one, it takes the
-- dispatch_seq that it finds, and (p_open) opens its turn in the same write. {"status": ...} when there is nothing to claim
-- (yet); "lost" when the run is somebody else's now, or has ended; "absent" when this worker must beat first.
CREATE OR REPLACE FUNCTION longhaul_linger_claim(
    p_run uuid, p_leg uuid, p_worker uuid, p_prepare interval, p_open boolean, p_message uuid, p_model_time interval,
    p_after bigint, p_limit integer, p_max_steps integer, p_max_tokens bigint, p_max_cost numeric, p_ask jsonb DEFAULT NULL)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
    v_now timestamptz;
    v_turn jsonb;
    v_opened boolean;
BEGIN
    SELECT * INTO v_run FROM longhaul_runs_run WHERE id = p_run FOR NO KEY UPDATE;
    IF NOT FOUND OR v_run.status NOT IN ('queued', 'waiting', 'requires_action') THEN RETURN '{"status": "lost"}'; END IF;
    PERFORM 1 FROM longhaul_runs_leg WHERE id = p_leg AND ended_at IS NULL;
    IF NOT FOUND THEN RETURN '{"status": "lost"}'; END IF;  -- a claim by another task, or the run's end, closed this leg
    IF v_run.status <> 'queued' THEN RETURN jsonb_build_object('status', v_run.status); END IF;
    IF v_run.turn IS NOT NULL THEN RETURN '{"status": "waiting"}'; END IF;  -- joined too late for this leg: it waits for its turn
    v_now := longhaul_now();
    IF NOT longhaul_worker_present(p_worker, v_now) THEN RETURN '{"status": "absent"}'; END IF;
    IF p_open THEN
        v_turn := longhaul_turn_begin(
            v_run, v_run.epoch + 1, v_now, p_message, p_after, p_limit, p_max_steps, p_max_tokens, p_max_cost, p_ask);
    END IF;
    v_opened := p_open AND NOT v_turn ? 'limit';
    UPDATE longhaul_runs_run
    SET status = 'running', epoch = epoch + 1, holder = p_worker, linger_until = NULL,
        leg_deadline = v_now + CASE WHEN v_opened THEN p_model_time ELSE p_prepare END,
        pending_message_id = CASE WHEN v_opened THEN p_message END, pending_ordinal = 0, last_seq = last_seq + CASE WHEN v_opened THEN 1 ELSE 0 END,
        not_before = NULL, next_publish_at = NULL, publishes = 0
    WHERE id = p_run;
    UPDATE longhaul_runs_leg SET epoch = v_run.epoch + 1 WHERE id = p_leg;
    RETURN jsonb_build_object('status', 'running', 'epoch', v_run.epoch + 1, 'steps', v_run.steps, 'turn', v_turn);
END $$;

-- The lingerer gives up: it locks the run and, if its leg is still the open one and the run waits, ends it. linger_until is
-- cleared with it, for a join from now on must publish. A run that the join had already queued for this leg is published, unless
-- it waits for its turn. {"release": true}: what the leg held may go to somebody else.
CREATE OR REPLACE FUNCTION longhaul_linger_end(p_run uuid, p_leg uuid, p_reason text) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
BEGIN
    SELECT * INTO v_run FROM longhaul_runs_run WHERE id = p_run FOR NO KEY UPDATE;
    IF NOT FOUND OR v_run.status NOT IN ('waiting', 'requires_action', 'queued') THEN RETURN '{}'; END IF;
    PERFORM 1 FROM longhaul_runs_leg WHERE id = p_leg AND ended_at IS NULL;
    IF NOT FOUND THEN RETURN '{}'; END IF;
    PERFORM longhaul_leg_end(p_run, p_reason, false);
    UPDATE longhaul_runs_run
    SET linger_until = NULL,
        next_publish_at = CASE WHEN status = 'queued' AND turn IS NULL THEN longhaul_now() + interval '1 second' END
    WHERE id = p_run;
    IF v_run.status = 'queued' AND v_run.turn IS NULL THEN
        RETURN jsonb_build_object('run', p_run, 'status', 'queued', 'dispatch_seq', v_run.dispatch_seq, 'lingering', false, 'agent', v_run.agent);
    END IF;
    RETURN longhaul_run_freed(v_run);
END $$;

-- The commit of a step, fenced, one transaction: the deltas that the flusher still held and the other events (p_events, in
-- order), the message complete, the step, its usage, its calls, and the run's next state: waiting for its calls, or
-- ended (p_end: {"status", "stop_reason", "output", "error", "room"?}), or, with neither calls nor an end (input to take in, an
-- answer to correct), still running: the leg opens its next turn. "room": [steps, tokens, cost] says up to where input that
-- steers the run, and came while the model spoke, makes it go on in place of ending. What the model is told of its answer comes with the
-- step's row ("correction": {"id", "content"}) and is a message of the user's in this run and step. Returns NULL when the
-- fence was lost. With calls: what longhaul_calls_changed says when all came settled already, else {"status": "waiting"} and what
-- longhaul_calls_request says of those that wait for their turn (p_window: how many of a queue may be out).
CREATE OR REPLACE FUNCTION longhaul_step_commit(
    p_run uuid, p_epoch integer, p_worker uuid, p_message uuid, p_leg uuid, p_content jsonb, p_events jsonb, p_step_row jsonb,
    p_usage jsonb, p_calls jsonb, p_bad boolean, p_end jsonb, p_linger interval, p_window integer DEFAULT NULL)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
    v_now timestamptz;
    v_step integer;
    v_count integer;
    v_open jsonb;
    v_parked jsonb;
    v_waits boolean := coalesce(jsonb_array_length(p_calls), 0) > 0 AND p_end IS NULL;
    v_leg_ends boolean := v_waits AND coalesce(p_linger, interval '0') <= interval '0';
    v_end jsonb := p_end;
BEGIN
    SELECT * INTO v_run FROM longhaul_runs_run
    WHERE id = p_run AND epoch = p_epoch AND status = 'running' AND holder = p_worker AND pending_message_id = p_message
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN RETURN NULL; END IF;  -- the fence
    v_now := longhaul_now();
    v_step := v_run.steps + 1;
    -- Somebody steers: the run goes on, unless it has reached a limit. Then its end sees to what was not taken in.
    IF p_end ? 'room' AND coalesce(v_run.deadline > v_now, true)
       AND v_step < (p_end->'room'->>0)::integer
       AND v_run.input_tokens + v_run.output_tokens + coalesce((p_usage->>'input_tokens')::bigint, 0)
           + coalesce((p_usage->>'output_tokens')::bigint, 0) < (p_end->'room'->>1)::bigint
       AND v_run.cost + coalesce((p_usage->>'cost')::numeric, 0) < (p_end->'room'->>2)::numeric
       AND EXISTS (SELECT 1 FROM longhaul_threads_message
                   WHERE thread_id = v_run.thread_id AND position IS NULL AND status = 'waiting' AND run_id = p_run) THEN
        v_end := NULL;
    END IF;
    SELECT coalesce(jsonb_agg(c->'id' ORDER BY (c->>'index')::integer), '[]') INTO v_open
    FROM jsonb_array_elements(CASE WHEN v_waits THEN p_calls ELSE '[]' END) AS c WHERE c->>'outcome' IS NULL;
    INSERT INTO longhaul_runs_event (run_id, seq, type, at, epoch, message_id, ordinal, payload)
    SELECT p_run, v_run.last_seq + row_number() OVER (ORDER BY e.place), e.value->>0, v_now, p_epoch, p_message,
           (e.value->>1)::integer, e.value->2
    FROM jsonb_array_elements(CASE WHEN v_waits
        THEN p_events || jsonb_build_array(jsonb_build_array('run.waiting', NULL, jsonb_build_object('tool_calls', v_open)))
        ELSE p_events END) WITH ORDINALITY AS e(value, place)
    WHERE e.value->>1 IS NULL OR (e.value->>1)::integer > v_run.pending_ordinal;  -- a batch without an answer may have written it
    GET DIAGNOSTICS v_count = ROW_COUNT;
    UPDATE longhaul_threads_message SET status = 'completed', content = p_content WHERE id = p_message;
    INSERT INTO longhaul_runs_step (
        id, run_id, number, leg_id, epoch, message_id, model, instructions, tool_names, schema_digest, options, context, created_at)
    VALUES (longhaul_uuid7(), p_run, v_step, p_leg, p_epoch, p_message, p_step_row->>'model', p_step_row->>'instructions',
            p_step_row->'tool_names', p_step_row->>'schema_digest', p_step_row->>'options', p_step_row->'context', v_now);
    IF p_usage IS NOT NULL THEN
        PERFORM longhaul_usage_record(p_run, v_step, p_epoch, p_message, p_usage, false, v_now);
    END IF;
    UPDATE longhaul_runs_run
    SET steps = v_step, lost = 0, model_tries = 0, retry_since = NULL, pending_message_id = NULL,
        bad_calls = CASE WHEN p_bad THEN bad_calls + 1 ELSE 0 END,
        input_tokens = input_tokens + coalesce((p_usage->>'input_tokens')::bigint, 0),
        output_tokens = output_tokens + coalesce((p_usage->>'output_tokens')::bigint, 0),
        cost = cost + coalesce((p_usage->>'cost')::numeric, 0),
        last_seq = last_seq + v_count,
        status = CASE WHEN v_waits THEN 'waiting' ELSE status END,
        holder = CASE WHEN v_waits THEN NULL ELSE holder END,
        leg_deadline = CASE WHEN v_waits THEN NULL ELSE leg_deadline END,
        linger_until = CASE WHEN v_waits AND NOT v_leg_ends THEN v_now + p_linger END
    WHERE id = p_run;
    IF p_calls IS NOT NULL THEN
        v_parked := longhaul_calls_request(
            p_run, p_message, v_step, p_calls, v_now, p_window, v_run.priority, coalesce(v_run.owner_id::text, ''));
    END IF;
    IF p_step_row ? 'correction' THEN
        INSERT INTO longhaul_threads_message (
            id, thread_id, run_id, step, role, status, position, content, metadata, client_id, shown, created_at)
        SELECT (p_step_row->'correction'->>'id')::uuid, v_run.thread_id, p_run, v_step, 'user', 'completed', max(position) + 1,
               p_step_row->'correction'->'content', '{}', '', v_run.save_mode <> 'none', v_now
        FROM longhaul_threads_message WHERE thread_id = v_run.thread_id;
        PERFORM longhaul_run_record(p_run, 'message.completed', jsonb_build_object(
            'message', p_step_row->'correction'->'id', 'role', 'user', 'step', v_step,
            'content', p_step_row->'correction'->'content') || longhaul_message_mark(v_run.save_mode <> 'none'), p_epoch);
    END IF;
    IF v_end IS NOT NULL THEN
        RETURN longhaul_run_end(p_run, p_end->>'status', p_end->>'stop_reason', nullif(p_end->'error', 'null'::jsonb), p_end->'output',
                                CASE p_end->>'status' WHEN 'completed' THEN 'finished' ELSE 'failed' END, p_epoch);
    END IF;
    IF NOT v_waits THEN RETURN jsonb_build_object('run', p_run, 'status', 'running'); END IF;
    IF v_leg_ends THEN PERFORM longhaul_leg_end(p_run, 'tools', false, p_epoch); END IF;
    IF v_open = '[]' THEN RETURN longhaul_calls_changed(p_run); END IF;  -- every call came settled: join at once
    RETURN jsonb_build_object('run', p_run, 'status', 'waiting') || coalesce(v_parked, '{}')
        || CASE WHEN v_leg_ends THEN longhaul_run_freed(v_run) ELSE '{}' END;
END $$;

CREATE OR REPLACE FUNCTION longhaul_usage_record(
    p_run uuid, p_step integer, p_epoch integer, p_message uuid, p_usage jsonb, p_discarded boolean, p_now timestamptz)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO longhaul_runs_usage (id, run_id, step, epoch, message_id, model, input_tokens, output_tokens, cached_tokens,
                                     reasoning_tokens, cost, discarded, created_at)
    VALUES (longhaul_uuid7(), p_run, p_step, p_epoch, p_message, p_usage->>'model', coalesce((p_usage->>'input_tokens')::bigint, 0),
            coalesce((p_usage->>'output_tokens')::bigint, 0), coalesce((p_usage->>'cached_tokens')::bigint, 0),
            coalesce((p_usage->>'reasoning_tokens')::bigint, 0), (p_usage->>'cost')::numeric, p_discarded, p_now);
    PERFORM longhaul_model_used(p_run, p_message, coalesce((p_usage->>'input_tokens')::bigint, 0)
                                + coalesce((p_usage->>'output_tokens')::bigint, 0));
END $$;

-- Usage of a message that is about to be discarded: it was paid, so the log tells it too. The caller holds the run.
CREATE OR REPLACE FUNCTION longhaul_usage_discard(p_run longhaul_runs_run, p_usage jsonb, p_now timestamptz)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM longhaul_usage_record(p_run.id, p_run.steps + 1, p_run.epoch, p_run.pending_message_id, p_usage, true, p_now);
    PERFORM longhaul_run_record(p_run.id, 'usage', jsonb_build_object('message', p_run.pending_message_id) || p_usage
                                || '{"discarded": true}', p_run.epoch);
END $$;

-- A leg hands over, fenced: its time budget is used, its worker drains, its model's limits leave no room (`limited`), or the model's
-- error grants another try after p_delay. One transaction: nothing pending, the leg ended, the run queued. Returns NULL when the fence was lost, else what to publish.
-- Only `retry` counts a try of the model; nothing here counts toward poison. Who goes on at once keeps its place among those that
-- are out, and its slot; who is put off gives both up, and waits for its turn again when it is due.
CREATE OR REPLACE FUNCTION longhaul_run_requeue(
    p_run uuid, p_epoch integer, p_worker uuid, p_reason text, p_delay interval, p_error jsonb, p_usage jsonb)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
    v_now timestamptz;
    v_due timestamptz;
BEGIN
    SELECT * INTO v_run FROM longhaul_runs_run
    WHERE id = p_run AND epoch = p_epoch AND status = 'running' AND holder = p_worker FOR NO KEY UPDATE;
    IF NOT FOUND THEN RETURN NULL; END IF;  -- the fence
    v_now := longhaul_now();
    IF p_usage IS NOT NULL AND v_run.pending_message_id IS NOT NULL THEN
        PERFORM longhaul_usage_discard(v_run, p_usage, v_now);
    END IF;
    IF p_error IS NOT NULL THEN PERFORM longhaul_run_record(p_run, 'error', p_error, p_epoch); END IF;
    PERFORM longhaul_leg_end(p_run, p_reason, false, p_epoch);
    v_due := CASE WHEN p_delay > interval '0' THEN v_now + p_delay END;
    UPDATE longhaul_runs_run
    SET status = 'queued', dispatch_seq = dispatch_seq + 1, queued_at = v_now, holder = NULL, leg_deadline = NULL, linger_until = NULL,
        not_before = v_due, next_publish_at = coalesce(v_due, v_now + interval '1 second') + CASE
            -- Who waits in the line of its model is let go there, at about that time; this is for who was forgotten.
            WHEN v_due IS NOT NULL AND EXISTS (SELECT 1 FROM longhaul_runs_leave WHERE run_id = p_run AND message_id IS NULL)
            THEN interval '60 seconds' ELSE interval '0' END,
        publishes = CASE WHEN v_due IS NULL THEN 1 ELSE 0 END,
        model_tries = model_tries + CASE p_reason WHEN 'retry' THEN 1 ELSE 0 END,
        retry_since = CASE p_reason WHEN 'retry' THEN coalesce(retry_since, v_now) ELSE retry_since END,
        input_tokens = input_tokens + coalesce((p_usage->>'input_tokens')::bigint, 0),
        output_tokens = output_tokens + coalesce((p_usage->>'output_tokens')::bigint, 0),
        cost = cost + coalesce((p_usage->>'cost')::numeric, 0)
    WHERE id = p_run RETURNING * INTO v_run;
    PERFORM longhaul_run_record(p_run, 'run.queued', jsonb_strip_nulls(jsonb_build_object('reason', p_reason, 'not_before', v_due)), p_epoch);
    RETURN jsonb_build_object('run', p_run, 'status', 'queued', 'dispatch_seq', CASE WHEN v_due IS NULL THEN v_run.dispatch_seq END,
                              'lingering', false, 'agent', v_run.agent)
        || CASE WHEN v_due IS NOT NULL THEN longhaul_run_freed(v_run) ELSE '{}' END;
END $$;

-- A leg ends its run outside of a step's commit, fenced: a limit at the boundary, an error of the model or of the configuration.
CREATE OR REPLACE FUNCTION longhaul_run_finish(
    p_run uuid, p_epoch integer, p_worker uuid, p_status text, p_stop_reason text, p_error jsonb, p_output jsonb,
    p_usage jsonb DEFAULT NULL)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
BEGIN
    SELECT * INTO v_run FROM longhaul_runs_run
    WHERE id = p_run AND epoch = p_epoch AND status = 'running' AND holder = p_worker FOR NO KEY UPDATE;
    IF NOT FOUND THEN RETURN NULL; END IF;  -- the fence
    IF p_usage IS NOT NULL AND v_run.pending_message_id IS NOT NULL THEN
        PERFORM longhaul_usage_discard(v_run, p_usage, longhaul_now());
        UPDATE longhaul_runs_run
        SET input_tokens = input_tokens + coalesce((p_usage->>'input_tokens')::bigint, 0),
            output_tokens = output_tokens + coalesce((p_usage->>'output_tokens')::bigint, 0),
            cost = cost + coalesce((p_usage->>'cost')::numeric, 0)
        WHERE id = p_run;
    END IF;
    RETURN longhaul_run_end(p_run, p_status, p_stop_reason, p_error, p_output,
                            CASE p_status WHEN 'completed' THEN 'finished' ELSE 'failed' END, p_epoch);
END $$;

-- Any live run -> cancelled, or failed (a deadline that nobody holds): a transition, not a flag. NULL: it had ended, nothing changed.
-- p_next: the run that takes its place in the thread, which the caller inserts in this transaction.
CREATE OR REPLACE FUNCTION longhaul_run_cancel(p_run uuid, p_status text, p_stop_reason text, p_error jsonb, p_next uuid DEFAULT NULL)
RETURNS jsonb LANGUAGE plpgsql AS $$
BEGIN
    IF (longhaul_run_lock(p_run)).thread_id IS NULL THEN RETURN NULL; END IF;
    RETURN longhaul_run_end(p_run, p_status, p_stop_reason, p_error, NULL, p_status, NULL, p_next);
END $$;

-- running -> queued, without its leg: the holder is dead, past its leg_deadline, or does not know the claim. Names holder and
-- epoch. The only thing that counts toward poison.
CREATE OR REPLACE FUNCTION longhaul_run_reclaim(p_run uuid, p_epoch integer, p_holder uuid, p_poison integer)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
BEGIN
    SELECT * INTO v_run FROM longhaul_runs_run
    WHERE id = p_run AND epoch = p_epoch AND status = 'running' AND holder = p_holder FOR NO KEY UPDATE;
    IF NOT FOUND THEN RETURN NULL; END IF;  -- it ended itself, or somebody else took it
    IF v_run.lost + 1 >= p_poison THEN
        UPDATE longhaul_runs_run SET lost = lost + 1 WHERE id = p_run;
        RETURN longhaul_run_end(p_run, 'failed', 'poison', jsonb_build_object('code', 'poison', 'retryable', false, 'message',
            format('The worker of this run died %s times without a committed step.', v_run.lost + 1)), NULL, 'lost');
    END IF;
    PERFORM longhaul_leg_end(p_run, 'lost', false);
    UPDATE longhaul_runs_run
    SET status = 'queued', epoch = epoch + 1, dispatch_seq = dispatch_seq + 1, lost = lost + 1, queued_at = longhaul_now(), holder = NULL,
        leg_deadline = NULL, linger_until = NULL, publishes = 1, next_publish_at = longhaul_now() + interval '1 second'
    WHERE id = p_run RETURNING * INTO v_run;
    PERFORM longhaul_run_record(p_run, 'run.queued', '{"reason": "lost"}');
    RETURN jsonb_build_object('run', p_run, 'status', 'queued', 'dispatch_seq', v_run.dispatch_seq, 'lingering', false, 'agent', v_run.agent);
END $$;

-- Queued runs whose message must be sent (again), those of the highest priority first, then the longest overdue. What is
-- overdue by more than 30 s comes before all, by age alone, so that no priority starves. Read are at most ten times as many as
-- are asked for, by index. Raises next_publish_at, doubling from 1 s to 15 s. A run that was put off and is due goes the way of
-- any that becomes queued: it may have to wait for its turn.
CREATE OR REPLACE FUNCTION longhaul_runs_due(p_limit integer) RETURNS TABLE (run_id uuid, dispatch_seq integer, priority smallint, agent text)
LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := longhaul_now();
    v_run longhaul_runs_run;
    v_turn bigint;
    v_more jsonb := '{}';  -- of each queue, the runs that go out below for the first time
    v_queue text;
    v_again uuid[] := '{}';
BEGIN
    FOR v_run IN
        SELECT * FROM longhaul_runs_run r WHERE r.id IN (
            SELECT o.id FROM longhaul_runs_run o WHERE o.status = 'queued' AND o.next_publish_at <= v_now
            ORDER BY o.next_publish_at LIMIT p_limit::bigint * 10)
          AND r.publishes = 0 AND r.status = 'queued' AND r.next_publish_at <= v_now
        ORDER BY r.priority DESC, r.next_publish_at LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        v_queue := split_part(v_run.lane, E'\n', 1);
        SELECT t.turn INTO v_turn FROM longhaul_run_turn(v_run, coalesce((v_more->>v_queue)::integer, 0)) AS t;
        IF v_turn IS NULL THEN
            v_more := v_more || jsonb_build_object(v_queue, coalesce((v_more->>v_queue)::integer, 0) + 1);
            v_again := v_again || v_run.id;
        ELSE
            UPDATE longhaul_runs_run r SET turn = v_turn, next_publish_at = NULL WHERE r.id = v_run.id;
        END IF;
    END LOOP;
    RETURN QUERY
    WITH overdue AS (
        SELECT r.id FROM longhaul_runs_run r
        WHERE r.status = 'queued' AND r.next_publish_at <= v_now AND (r.publishes > 0 OR r.id = ANY (v_again))
        ORDER BY r.next_publish_at LIMIT p_limit::bigint * 10),
    due AS (
        SELECT r.id, r.priority AS rank, r.next_publish_at AS since FROM longhaul_runs_run r
        WHERE r.id IN (SELECT id FROM overdue) AND r.status = 'queued' AND r.next_publish_at <= v_now
        ORDER BY CASE WHEN r.next_publish_at > v_now - interval '30 seconds' THEN r.priority ELSE 32767 END DESC, r.next_publish_at
        LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED),
    raised AS (
        UPDATE longhaul_runs_run r
        SET publishes = r.publishes + 1, next_publish_at = v_now + least(interval '15 seconds', interval '1 second' * 2 ^ least(r.publishes, 4))
        FROM due WHERE r.id = due.id
        RETURNING r.id, r.dispatch_seq AS dispatch, r.agent::text AS name, due.rank, due.since)
    SELECT raised.id, raised.dispatch, raised.rank, raised.name FROM raised ORDER BY raised.rank DESC, raised.since, raised.id;
END $$;
