-- The only writers of a call's status, beside tools/lifecycle.py. Each locks the run first (longhaul_run_lock), then the call.
-- longhaul_run_lock, longhaul_run_record and longhaul_calls_changed are installed by `runs`: plpgsql binds them at run time.

-- Is this life of a worker present? User code starts and claims are made only while it is: its row stands and its own
-- beat is fresh, so that a process that was stopped and woke cannot claim before it has beaten again.
CREATE OR REPLACE FUNCTION longhaul_worker_present(p_worker uuid, p_now timestamptz) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    RETURN EXISTS (
        SELECT 1 FROM longhaul_tools_worker
        WHERE id = p_worker AND gone_at IS NULL AND beat_at > p_now - interval '6 seconds');
END $$;

-- Is the session lock of this life held? One look; the word of a broker that redelivered its message is the other.
-- NULL: it cannot be told, for this life has no lock (it reaches Postgres by way of a pooler): nothing is taken from it
-- for that, only when it has missed its beats for the TTL. False for a life that has no row.
CREATE OR REPLACE FUNCTION longhaul_worker_locked(p_worker uuid) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM longhaul_tools_worker WHERE id = p_worker AND lock_key IS NULL) THEN RETURN NULL; END IF;
    RETURN EXISTS (
        SELECT 1 FROM longhaul_tools_worker w JOIN pg_locks l ON (l.classid::bigint << 32) | l.objid::bigint = w.lock_key
        WHERE w.id = p_worker AND l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
          AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()));
END $$;

-- Inserts the calls of a step. Called by the step's commit, which holds the run. A bad call comes settled already.
-- A requested one counts as published once: its publisher follows the commit, the sweep follows the publisher. What has gates,
-- and what has no room in its queue (p_window: how many calls of it may be out; NULL: no bound), is parked instead: then returns
-- {"parked": true, "out": [those that are not]}, else NULL.
CREATE OR REPLACE FUNCTION longhaul_calls_request(
    p_run uuid, p_message uuid, p_step integer, p_calls jsonb, p_now timestamptz, p_window integer, p_priority smallint, p_owner text)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_rooms jsonb;
    v_answer jsonb;
BEGIN
    SELECT jsonb_object_agg(q.queue, longhaul_calls_room(q.queue, p_window, p_now)) INTO v_rooms
    FROM (SELECT DISTINCT coalesce(c->>'queue', '') AS queue FROM jsonb_array_elements(p_calls) AS c WHERE c->>'outcome' IS NULL) AS q;
    WITH asked AS MATERIALIZED (
        SELECT c.*, coalesce(c.queue, '') AS to_queue, c.outcome IS NULL AS open,
               row_number() OVER (PARTITION BY c.outcome IS NULL AND c.gates IS NULL, c.queue ORDER BY c.index) AS place
        FROM jsonb_to_recordset(p_calls) AS c (
            id uuid, index integer, name text, arguments jsonb, outcome text, error jsonb, max_attempts integer,
            idempotent boolean, on_unknown text, atomic boolean, deferred boolean, timeout_seconds double precision, queue text,
            gates jsonb)),
    placed AS MATERIALIZED (
        SELECT a.*, CASE WHEN a.open AND (a.gates IS NOT NULL OR a.place > (v_rooms->>a.to_queue)::bigint)
                    THEN longhaul_lane(a.to_queue, a.gates) END AS lane FROM asked a),
    lanes AS MATERIALIZED (
        SELECT l.lane, longhaul_call_turn(l.to_queue, l.lane, p_priority, p_owner) AS turn
        FROM (SELECT DISTINCT p.to_queue, p.lane FROM placed p WHERE p.lane IS NOT NULL) AS l),
    made AS (
        INSERT INTO longhaul_tools_toolcall (
            id, run_id, message_id, step, index, name, arguments, status, outcome, error, attempt, max_attempts,
            idempotency_key, idempotent, on_unknown, atomic, deferred, timeout, queue, publishes, next_publish_at, settled_at, created_at,
            gates, priority, turn_of, lane, turn)
        SELECT c.id, p_run, p_message, p_step, c.index, c.name, coalesce(c.arguments, '{}'::jsonb),
               CASE WHEN c.open THEN 'requested' ELSE 'settled' END, coalesce(c.outcome, ''), c.error, 1,
               coalesce(c.max_attempts, 1), c.id::text, c.idempotent, coalesce(c.on_unknown, 'ask'), coalesce(c.atomic, false), coalesce(c.deferred, false),
               make_interval(secs => coalesce(c.timeout_seconds, 60)), c.to_queue,
               CASE WHEN c.open AND c.lane IS NULL THEN 1 ELSE 0 END,
               CASE WHEN c.open AND c.lane IS NULL THEN p_now + interval '1 second' END,
               CASE WHEN NOT c.open THEN p_now END, p_now,
               c.gates, p_priority, p_owner, coalesce(c.lane, ''),
               l.turn + row_number() OVER (PARTITION BY c.lane ORDER BY c.index)
        FROM placed c LEFT JOIN lanes l ON l.lane = c.lane
        RETURNING id, index, status, turn)
    SELECT jsonb_build_object('parked', true, 'out', coalesce(
               jsonb_agg(id ORDER BY index) FILTER (WHERE status = 'requested' AND turn IS NULL), '[]'))
    INTO v_answer FROM made HAVING count(turn) > 0;
    RETURN v_answer;
END $$;

-- What a call with gates says when it leaves room behind: {"parked": true} when anybody waits who might have it.
CREATE OR REPLACE FUNCTION longhaul_call_leaves(p_gates jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
BEGIN
    IF p_gates IS NULL OR NOT EXISTS (SELECT 1 FROM longhaul_tools_toolcall WHERE turn IS NOT NULL) THEN RETURN '{}'; END IF;
    RETURN '{"parked": true}';
END $$;

-- Parks a call that is to be sent again, unless it has no gates and there is room for it (p_room): with gates it begins only when the
-- release says so, another attempt like a first one. Returns whether it waits. The caller holds the call.
CREATE OR REPLACE FUNCTION longhaul_call_park(p_call uuid, p_room boolean DEFAULT true) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_call longhaul_tools_toolcall;
    v_lane text;
BEGIN
    SELECT * INTO v_call FROM longhaul_tools_toolcall WHERE id = p_call;
    IF v_call.gates IS NULL AND p_room THEN RETURN false; END IF;
    v_lane := longhaul_lane(v_call.queue, v_call.gates);
    UPDATE longhaul_tools_toolcall
    SET lane = v_lane, turn = longhaul_call_turn(v_call.queue, v_lane, v_call.priority, v_call.turn_of) + 1,
        next_publish_at = NULL, publishes = 0
    WHERE id = p_call;
    RETURN true;
END $$;

-- requested, retrying -> running, by attempt: a doubled or late message matches no row. Returns NULL then, and when the
-- run has ended; {"absent": true} when this worker must beat first; {"orphans": [[id, attempt], ...]} when running calls
-- name this worker though it is about to claim (it runs one at a time): it gives them back and claims again. The answer has
-- {"parked": true} when others wait in its lane, or in that of its queue without gates, and no more than half of p_window is out: so one
-- release lets out half a window. A call that waits for its turn is not claimed: its message is of another time.
CREATE OR REPLACE FUNCTION longhaul_call_claim(
    p_call uuid, p_attempt integer, p_worker uuid, p_worker_name text, p_task text, p_alone boolean, p_window integer DEFAULT NULL)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_seen longhaul_tools_toolcall;
    v_run_id uuid;
    v_run record;
    v_call longhaul_tools_toolcall;
    v_now timestamptz;
    v_orphans jsonb;
    v_attempt_id uuid;
    v_more jsonb := '{}';
BEGIN
    SELECT * INTO v_seen FROM longhaul_tools_toolcall WHERE id = p_call;
    IF NOT FOUND THEN RETURN NULL; END IF;  -- its run was deleted
    IF v_seen.attempt <> p_attempt OR v_seen.status NOT IN ('requested', 'retrying') THEN RETURN NULL; END IF;  -- a doubled message
    IF p_alone THEN
        SELECT jsonb_agg(jsonb_build_array(id, attempt)) INTO v_orphans
        FROM longhaul_tools_toolcall WHERE holder = p_worker AND status = 'running';
        IF v_orphans IS NOT NULL THEN RETURN jsonb_build_object('orphans', v_orphans); END IF;
    END IF;
    v_run_id := v_seen.run_id;
    -- The lock: the event comes with it, and goes again should the guard below find that somebody was faster.
    SELECT * INTO v_run FROM longhaul_run_append(v_run_id, 'tool_call.started', jsonb_build_object(
        'tool_call', p_call, 'name', v_seen.name, 'message', v_seen.message_id, 'attempt', p_attempt, 'worker', p_worker_name));
    IF v_run.thread_id IS NULL THEN RETURN NULL; END IF;  -- the run has ended, and closed its calls
    v_now := v_run.at;
    IF NOT longhaul_worker_present(p_worker, v_now) THEN  -- looked at under the lock: the wait for it may have been long
        PERFORM longhaul_run_retract(v_run_id);
        RETURN '{"absent": true}';
    END IF;
    UPDATE longhaul_tools_toolcall
    SET status = 'running', holder = p_worker, claimed_at = v_now, next_publish_at = NULL, not_before = NULL,
        timeout_at = least(v_now + timeout, v_run.deadline)
    -- || '': not to be found by the index of what is due, all of which the planner would read where it was short once
    WHERE id = p_call AND attempt = p_attempt AND status || '' IN ('requested', 'retrying')
      AND (not_before IS NULL OR not_before <= v_now)
      AND turn IS NULL
    RETURNING * INTO v_call;
    IF NOT FOUND THEN
        PERFORM longhaul_run_retract(v_run_id);
        RETURN NULL;  -- another worker got there first
    END IF;
    v_attempt_id := longhaul_uuid7();
    INSERT INTO longhaul_tools_toolattempt (id, call_id, number, worker_id, worker, task_id, started_at, outcome, backend_pid)
    VALUES (v_attempt_id, p_call, p_attempt, p_worker, p_worker_name, p_task, v_now, '', pg_backend_pid());
    IF v_call.gates IS NOT NULL THEN PERFORM longhaul_rate_use(v_call.gates, v_now); END IF;
    IF EXISTS (SELECT 1 FROM longhaul_tools_toolcall
               WHERE turn IS NOT NULL AND lane IN (v_call.queue || E'\n', longhaul_lane(v_call.queue, v_call.gates)))
       AND (p_window IS NULL OR longhaul_calls_out(v_call.queue, p_window, v_now) <= p_window / 2)
    THEN v_more := '{"parked": true}'; END IF;
    RETURN v_more || jsonb_build_object(
        'call', p_call, 'run', v_run_id, 'thread', v_run.thread_id, 'owner', v_run.owner, 'agent', v_run.agent,
        'overrides', v_run.overrides, 'message', v_call.message_id,
        'name', v_call.name, 'arguments', v_call.arguments, 'attempt', p_attempt, 'attempt_id', v_attempt_id,
        'max_attempts', v_call.max_attempts, 'idempotency_key', v_call.idempotency_key, 'atomic', v_call.atomic,
        'step', v_call.step, 'timeout_at', v_call.timeout_at, 'seconds', extract(epoch FROM v_call.timeout_at - v_now));
END $$;

-- Keeps what of a result stands apart: a row a content, in the order in which p_stored describes them. The caller has just
-- settled the call, under the run's lock.
CREATE OR REPLACE FUNCTION longhaul_call_store(p_call uuid, p_stored jsonb, p_contents bytea[], p_now timestamptz)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO longhaul_tools_storedcontent (id, call_id, number, name, content_type, size, content, created_at)
    SELECT longhaul_uuid7(), p_call, (s.told->>'number')::integer, s.told->>'name', s.told->>'content_type',
           octet_length(p_contents[s.place]), p_contents[s.place], p_now
    FROM jsonb_array_elements(p_stored) WITH ORDINALITY AS s (told, place);
END $$;

-- running -> settled, exactly once: guarded by attempt, holder and status, under the run's lock. The late result of an
-- `unknown` call settles it too. Returns NULL when somebody else settled it (or its run ended): nothing changed then.
-- {"already": true}: this very attempt settled it before, and the answer was lost. Else what longhaul_calls_changed says.
-- p_stored and p_contents are what of the result stands apart; of most results nothing does.
CREATE OR REPLACE FUNCTION longhaul_call_settle(
    p_call uuid, p_attempt integer, p_worker uuid, p_outcome text, p_result jsonb, p_error jsonb,
    p_stored jsonb DEFAULT NULL, p_contents bytea[] DEFAULT NULL)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run_id uuid;
    v_call longhaul_tools_toolcall;
    v_now timestamptz;
BEGIN
    SELECT run_id INTO v_run_id FROM longhaul_tools_toolcall WHERE id = p_call;
    IF NOT FOUND THEN RETURN NULL; END IF;
    IF (longhaul_run_lock(v_run_id)).thread_id IS NOT NULL THEN
        v_now := longhaul_now();
        UPDATE longhaul_tools_toolcall
        SET status = 'settled', outcome = p_outcome, result = p_result, stored = p_stored, error = p_error, holder = NULL,
            settled_at = v_now
        WHERE id = p_call AND attempt = p_attempt
          AND (status = 'running' AND holder = p_worker OR status = 'unknown')
        RETURNING * INTO v_call;
        IF FOUND THEN
            UPDATE longhaul_tools_toolattempt SET ended_at = v_now, outcome = p_outcome, error = p_error
            WHERE call_id = p_call AND number = p_attempt AND (ended_at IS NULL OR outcome = 'lost');
            IF p_stored IS NOT NULL THEN PERFORM longhaul_call_store(p_call, p_stored, p_contents, v_now); END IF;
            RETURN longhaul_calls_changed(v_run_id, 'tool_call.settled', jsonb_strip_nulls(jsonb_build_object(
                'tool_call', p_call, 'name', v_call.name, 'message', v_call.message_id, 'outcome', p_outcome,
                'error', p_error, 'stored', p_stored)) || jsonb_build_object('result', p_result)) || longhaul_call_leaves(v_call.gates);
        END IF;
    END IF;
    PERFORM 1 FROM longhaul_tools_toolattempt
    WHERE call_id = p_call AND number = p_attempt AND worker_id = p_worker AND outcome = p_outcome;
    IF FOUND THEN RETURN '{"already": true}'; END IF;
    RETURN NULL;  -- another attempt, a person or a cancel was first
END $$;

-- running -> retrying: the attempt failed and its policy grants another one after p_delay. Same guard as settle.
CREATE OR REPLACE FUNCTION longhaul_call_retry(
    p_call uuid, p_attempt integer, p_worker uuid, p_error jsonb, p_delay interval)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run_id uuid;
    v_call longhaul_tools_toolcall;
    v_now timestamptz;
BEGIN
    SELECT run_id INTO v_run_id FROM longhaul_tools_toolcall WHERE id = p_call;
    IF NOT FOUND THEN RETURN NULL; END IF;
    IF (longhaul_run_lock(v_run_id)).thread_id IS NULL THEN RETURN NULL; END IF;
    v_now := longhaul_now();
    UPDATE longhaul_tools_toolcall
    SET status = 'retrying', attempt = attempt + 1, holder = NULL, timeout_at = NULL, error = p_error,
        not_before = v_now + p_delay, next_publish_at = v_now + coalesce(p_delay, interval '0'), publishes = 0
    WHERE id = p_call AND attempt = p_attempt AND status = 'running' AND holder = p_worker
    RETURNING * INTO v_call;
    IF NOT FOUND THEN RETURN NULL; END IF;
    UPDATE longhaul_tools_toolattempt SET ended_at = v_now, outcome = 'retrying', error = p_error, retry_at = v_call.not_before
    WHERE call_id = p_call AND number = p_attempt AND ended_at IS NULL;
    PERFORM longhaul_run_record(v_run_id, 'tool_call.retrying', jsonb_build_object(
        'tool_call', p_call, 'name', v_call.name, 'message', v_call.message_id, 'attempt', v_call.attempt,
        'error', p_error, 'delay_seconds', extract(epoch FROM p_delay)));
    RETURN longhaul_calls_changed(v_run_id) || jsonb_build_object('call', p_call, 'attempt', v_call.attempt)
        || longhaul_call_leaves(v_call.gates);
END $$;

-- Takes a running call from a holder that is not present, is past its time, or does not know it holds it. Names holder and
-- attempt, so that a stale look takes nothing from a new holder. Past its timeout_at: settled failed/timed_out. Else
-- idempotent=False (unless its user code never began) goes the way its tool chose: to unknown; settled
-- failed/unknown_outcome, which the model is told; or that, and its run fails with it. A call without attempts left is settled
-- failed/worker_lost, any other is requested again. The backend of an atomic attempt is ended first, before any lock is
-- waited for: its open transaction keeps rows of the application locked, and from its settlement on the run too. It is
-- known by its name alone, which lasts as long as the transaction: behind a pool its pid is not that of the claim.
CREATE OR REPLACE FUNCTION longhaul_call_reclaim(p_call uuid, p_attempt integer, p_holder uuid, p_began boolean)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run_id uuid;
    v_call longhaul_tools_toolcall;
    v_now timestamptz;
    v_error jsonb;
    v_code text;
    v_more jsonb := '{}';
BEGIN
    SELECT run_id INTO v_run_id FROM longhaul_tools_toolcall WHERE id = p_call;
    IF NOT FOUND THEN RETURN NULL; END IF;
    PERFORM pg_terminate_backend(s.pid)
    FROM longhaul_tools_toolcall c
    JOIN longhaul_tools_toolattempt a ON a.call_id = c.id AND a.number = c.attempt AND a.ended_at IS NULL
    JOIN pg_stat_activity s ON s.application_name = 'longhaul ' || a.id::text AND s.pid <> pg_backend_pid()
    WHERE c.id = p_call AND c.attempt = p_attempt AND c.status = 'running' AND c.holder = p_holder AND c.atomic;
    IF (longhaul_run_lock(v_run_id)).thread_id IS NULL THEN RETURN NULL; END IF;
    v_now := longhaul_now();
    SELECT * INTO v_call FROM longhaul_tools_toolcall
    WHERE id = p_call AND attempt = p_attempt AND status = 'running' AND holder = p_holder FOR NO KEY UPDATE;
    IF NOT FOUND THEN RETURN NULL; END IF;  -- it ended, or somebody else took it
    UPDATE longhaul_tools_toolattempt SET ended_at = v_now, outcome = CASE WHEN p_began THEN 'lost' ELSE 'given_back' END
    WHERE call_id = p_call AND number = p_attempt AND ended_at IS NULL;
    v_code := CASE WHEN v_call.timeout_at <= v_now THEN 'timed_out'
                   WHEN v_call.idempotent IS FALSE AND p_began THEN CASE v_call.on_unknown WHEN 'ask' THEN 'unknown' ELSE 'unknown_outcome' END
                   WHEN v_call.attempt >= v_call.max_attempts AND p_began THEN 'worker_lost'
                   ELSE 'again' END;
    IF v_code IN ('timed_out', 'worker_lost', 'unknown_outcome') THEN
        v_error := jsonb_build_object('code', v_code, 'message', CASE v_code
            WHEN 'timed_out' THEN 'The tool did not finish in time.' || CASE WHEN v_call.idempotent IS FALSE AND p_began THEN
                ' Whether it has taken effect is not known. Do not call it again for the same purpose unless you have made sure'
                ' that it has not.' ELSE '' END
            WHEN 'worker_lost' THEN 'The worker that ran this tool died, and no attempt is left.'
            ELSE 'The worker that ran this tool died. Whether the tool has taken effect is not known. Do not call it again'
                 ' for the same purpose unless you have made sure that it has not.' END);
        UPDATE longhaul_tools_toolcall
        SET status = 'settled', outcome = 'failed', error = v_error, holder = NULL, settled_at = v_now WHERE id = p_call;
        UPDATE longhaul_tools_toolattempt SET error = v_error WHERE call_id = p_call AND number = p_attempt;
        PERFORM longhaul_run_record(v_run_id, 'tool_call.settled', jsonb_build_object(
            'tool_call', p_call, 'name', v_call.name, 'message', v_call.message_id, 'outcome', 'failed',
            'result', NULL, 'error', v_error));
        IF v_code = 'unknown_outcome' AND v_call.on_unknown = 'fail' THEN
            RETURN longhaul_run_cancel(v_run_id, 'failed', 'tool_unknown', jsonb_build_object(
                'code', v_code, 'retryable', false, 'message', format(
                'The worker that ran %s (call %s) died. Whether the tool has taken effect is not known.', v_call.name, p_call)))
                || jsonb_build_object('code', v_code) || longhaul_call_leaves(v_call.gates);
        END IF;
    ELSIF v_code = 'unknown' THEN
        UPDATE longhaul_tools_toolcall SET status = 'unknown', holder = NULL, timeout_at = NULL WHERE id = p_call;
        PERFORM longhaul_run_record(v_run_id, 'tool_call.unknown', jsonb_build_object(
            'tool_call', p_call, 'name', v_call.name, 'message', v_call.message_id, 'attempt', p_attempt));
    ELSE
        UPDATE longhaul_tools_toolcall
        SET status = 'retrying', attempt = attempt + 1, holder = NULL, timeout_at = NULL,
            max_attempts = max_attempts + CASE WHEN p_began THEN 0 ELSE 1 END,
            not_before = NULL, next_publish_at = v_now + interval '1 second', publishes = 1
        WHERE id = p_call;
        PERFORM longhaul_call_park(p_call);
        PERFORM longhaul_run_record(v_run_id, 'tool_call.retrying', jsonb_build_object(
            'tool_call', p_call, 'name', v_call.name, 'message', v_call.message_id, 'attempt', p_attempt + 1,
            'error', jsonb_build_object('code', CASE WHEN p_began THEN 'worker_lost' ELSE 'given_back' END), 'delay_seconds', 0));
        IF v_call.gates IS NULL THEN
            v_more := jsonb_build_object('publish_call', jsonb_build_array(p_call, p_attempt + 1, extract(epoch FROM v_call.timeout), v_call.queue, v_call.name));
        END IF;
    END IF;
    RETURN longhaul_calls_changed(v_run_id) || v_more || jsonb_build_object('code', v_code) || longhaul_call_leaves(v_call.gates);
END $$;

-- p_from -> settled, by somebody who is no worker: a person who answers an `unknown` call (p_by: who), or cancels any open
-- one. An attempt that runs is closed with it: its result is refused from now on. The run goes on. NULL: it is settled
-- already, or its run has ended; {"refused": status}: it is open, and waits for no such answer. Nothing changed then.
CREATE OR REPLACE FUNCTION longhaul_call_answer(
    p_call uuid, p_from text[], p_outcome text, p_result jsonb, p_error jsonb, p_by text,
    p_stored jsonb DEFAULT NULL, p_contents bytea[] DEFAULT NULL)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run_id uuid;
    v_call longhaul_tools_toolcall;
    v_now timestamptz;
BEGIN
    SELECT run_id INTO v_run_id FROM longhaul_tools_toolcall WHERE id = p_call;
    IF NOT FOUND THEN RETURN NULL; END IF;
    IF (longhaul_run_lock(v_run_id)).thread_id IS NULL THEN RETURN NULL; END IF;  -- it has ended, and closed its calls
    v_now := longhaul_now();
    SELECT * INTO v_call FROM longhaul_tools_toolcall WHERE id = p_call FOR NO KEY UPDATE;
    IF v_call.status = 'settled' THEN RETURN NULL; END IF;  -- somebody was first
    IF v_call.status <> ALL (p_from) THEN RETURN jsonb_build_object('refused', v_call.status); END IF;
    UPDATE longhaul_tools_toolcall
    SET status = 'settled', outcome = p_outcome, result = p_result, stored = p_stored, error = p_error, holder = NULL,
        settled_at = v_now, next_publish_at = NULL, turn = NULL
    WHERE id = p_call;
    UPDATE longhaul_tools_toolattempt SET ended_at = v_now, outcome = p_outcome, error = p_error
    WHERE call_id = p_call AND ended_at IS NULL;
    IF p_stored IS NOT NULL THEN PERFORM longhaul_call_store(p_call, p_stored, p_contents, v_now); END IF;
    RETURN longhaul_calls_changed(v_run_id, 'tool_call.settled', jsonb_strip_nulls(jsonb_build_object(
        'tool_call', p_call, 'name', v_call.name, 'message', v_call.message_id, 'outcome', p_outcome, 'error', p_error,
        'stored', p_stored))
        || jsonb_build_object('result', p_result, 'by', p_by)) || longhaul_call_leaves(v_call.gates);
END $$;

-- unknown -> retrying, on the word of a person (p_by) who has seen that the effect is not there: its lost attempt is released,
-- with p_error, what the person said. Answers as longhaul_call_answer does.
CREATE OR REPLACE FUNCTION longhaul_call_release(p_call uuid, p_error jsonb, p_by text) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run_id uuid;
    v_call longhaul_tools_toolcall;
    v_now timestamptz;
BEGIN
    SELECT run_id INTO v_run_id FROM longhaul_tools_toolcall WHERE id = p_call;
    IF NOT FOUND THEN RETURN NULL; END IF;
    IF (longhaul_run_lock(v_run_id)).thread_id IS NULL THEN RETURN NULL; END IF;  -- its run has ended, and closed it
    v_now := longhaul_now();
    SELECT * INTO v_call FROM longhaul_tools_toolcall WHERE id = p_call FOR NO KEY UPDATE;
    IF v_call.status = 'settled' THEN RETURN NULL; END IF;  -- somebody was first
    IF v_call.status <> 'unknown' THEN RETURN jsonb_build_object('refused', v_call.status); END IF;
    UPDATE longhaul_tools_toolcall
    SET status = 'retrying', attempt = attempt + 1, max_attempts = greatest(max_attempts, attempt + 1), error = p_error,
        not_before = NULL, next_publish_at = v_now + interval '1 second', publishes = 1
    WHERE id = p_call;
    PERFORM longhaul_call_park(p_call);
    UPDATE longhaul_tools_toolattempt SET outcome = 'released', error = p_error
    WHERE call_id = p_call AND number = v_call.attempt AND outcome = 'lost';
    PERFORM longhaul_run_record(v_run_id, 'tool_call.retrying', jsonb_build_object(
        'tool_call', p_call, 'name', v_call.name, 'message', v_call.message_id, 'attempt', v_call.attempt + 1,
        'error', p_error, 'delay_seconds', 0, 'by', p_by));
    IF v_call.gates IS NOT NULL THEN RETURN longhaul_calls_changed(v_run_id) || '{"parked": true}'; END IF;
    RETURN longhaul_calls_changed(v_run_id) || jsonb_build_object('publish_call', jsonb_build_array(
        p_call, v_call.attempt + 1, extract(epoch FROM v_call.timeout), v_call.queue, v_call.name));
END $$;

-- Settles every open call of a run that ends: only its last step p_step has any. The caller holds the run.
CREATE OR REPLACE FUNCTION longhaul_calls_close(p_run uuid, p_step integer) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_call longhaul_tools_toolcall;
    v_now timestamptz := longhaul_now();
BEGIN
    FOR v_call IN
        SELECT * FROM longhaul_tools_toolcall WHERE run_id = p_run AND step = p_step AND status <> 'settled'
        ORDER BY index FOR NO KEY UPDATE
    LOOP
        UPDATE longhaul_tools_toolcall
        SET status = 'settled', outcome = 'cancelled', error = NULL, holder = NULL, settled_at = v_now, next_publish_at = NULL,
            turn = NULL
        WHERE id = v_call.id;
        UPDATE longhaul_tools_toolattempt SET ended_at = v_now, outcome = 'cancelled'
        WHERE call_id = v_call.id AND ended_at IS NULL;
        PERFORM longhaul_run_record(p_run, 'tool_call.settled', jsonb_build_object(
            'tool_call', v_call.id, 'name', v_call.name, 'message', v_call.message_id, 'outcome', 'cancelled', 'result', NULL));
    END LOOP;
END $$;

-- Calls whose message must be sent (again): requested or retrying and due. Raises next_publish_at, doubling from 1 s to 15 s.
-- Who has waited out the time to another attempt goes out as others do: when it has gates, or its queue no room (p_window; NULL: no
-- bound), it is parked.
CREATE OR REPLACE FUNCTION longhaul_calls_due(p_limit integer, p_window integer DEFAULT NULL) RETURNS TABLE (
    call_id uuid, attempt integer, timeout interval, queue text, name text, run_id uuid)
LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := longhaul_now();
    v_call record;
    v_rooms jsonb := '{}';
    v_first uuid[] := '{}';
BEGIN
    FOR v_call IN
        SELECT c.id, c.queue AS to_queue FROM longhaul_tools_toolcall c
        WHERE c.status IN ('requested', 'retrying') AND c.next_publish_at <= v_now AND c.publishes = 0
        ORDER BY c.next_publish_at LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        IF NOT v_rooms ? v_call.to_queue THEN
            v_rooms := v_rooms || jsonb_build_object(v_call.to_queue, longhaul_calls_room(v_call.to_queue, p_window, v_now));
        END IF;
        IF NOT longhaul_call_park(v_call.id, (v_rooms->>v_call.to_queue)::bigint > 0) THEN
            v_rooms := jsonb_set(v_rooms, ARRAY[v_call.to_queue], to_jsonb((v_rooms->>v_call.to_queue)::bigint - 1));
            v_first := v_first || v_call.id;
        END IF;
    END LOOP;
    RETURN QUERY
    WITH due AS (
        SELECT c.id FROM longhaul_tools_toolcall c
        WHERE c.status IN ('requested', 'retrying') AND c.next_publish_at <= v_now
          AND (c.publishes > 0 OR c.id = ANY (v_first))  -- another one was not looked at above
        ORDER BY c.next_publish_at LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED)
    UPDATE longhaul_tools_toolcall c
    SET publishes = c.publishes + 1, next_publish_at = v_now + least(interval '15 seconds', interval '1 second' * 2 ^ least(c.publishes, 4))
    FROM due WHERE c.id = due.id
    RETURNING c.id, c.attempt, c.timeout, c.queue::text, c.name::text, c.run_id;
END $$;
