-- Limits of model calls, over all workers. A leg asks for leave where it opens a turn, in the same transaction; who is
-- refused waits in the line of its model, in Postgres. All decisions about one model are taken one after another, under an advisory lock
-- of its key that is always the last lock of a transaction; who holds it waits for no row, so it closes no circle.

CREATE OR REPLACE FUNCTION longhaul_model_lock(p_key text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(p_key, 7021));
END $$;

-- How many calls of the model are out: by the pending messages, so that whatever ends a turn, a death too, gives its place back.
CREATE OR REPLACE FUNCTION longhaul_model_calls(p_key text) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    RETURN (SELECT count(*) FROM longhaul_runs_leave l JOIN longhaul_runs_run r ON r.id = l.run_id AND r.pending_message_id = l.message_id
            WHERE l.key = p_key AND l.message_id IS NOT NULL);
END $$;

-- When so much of a rate will be left: the oldest uses go first, each after p_seconds.
CREATE OR REPLACE FUNCTION longhaul_rate_due(p_key text, p_missing bigint, p_count bigint, p_seconds double precision, p_now timestamptz)
RETURNS timestamptz LANGUAGE plpgsql AS $$
DECLARE
    v_rounds bigint := greatest(p_missing - 1, 0) / p_count;  -- whole windows that those before it use up
    v_missing bigint := p_missing - v_rounds * p_count;
    v_at timestamptz;
BEGIN
    SELECT u.at INTO v_at FROM (
        SELECT at, sum(amount) OVER (ORDER BY at, id) AS freed FROM longhaul_tools_rateuse
        WHERE key = p_key AND at > p_now - make_interval(secs => p_seconds)) AS u
    WHERE u.freed >= v_missing ORDER BY u.freed LIMIT 1;
    RETURN coalesce(v_at, p_now) + make_interval(secs => p_seconds * (v_rounds + 1));
END $$;

-- The run takes its place in the line, or keeps it. Owners take turns, within one it is by age, as for all that is gated. The caller
-- holds the run and the lock of the key.
CREATE OR REPLACE FUNCTION longhaul_model_wait(
    p_run longhaul_runs_run, p_key text, p_limits jsonb, p_tokens bigint, p_reason text, p_now timestamptz)
RETURNS longhaul_runs_leave LANGUAGE plpgsql AS $$
DECLARE
    v_owner text := coalesce(p_run.owner_id::text, '');
    v_turn bigint;
    v_leave longhaul_runs_leave;
BEGIN
    UPDATE longhaul_runs_leave
    SET released_at = NULL, since = CASE WHEN released_at IS NULL THEN since ELSE p_now END,
        limits = p_limits, tokens = p_tokens, reason = p_reason
    WHERE run_id = p_run.id AND key = p_key AND message_id IS NULL RETURNING * INTO v_leave;
    IF FOUND THEN RETURN v_leave; END IF;
    SELECT greatest(coalesce(min(turn), 0), coalesce(max(turn) FILTER (WHERE turn_of = v_owner), 0)) + 1 INTO v_turn
    FROM longhaul_runs_leave WHERE key = p_key AND message_id IS NULL AND priority = p_run.priority;
    DELETE FROM longhaul_runs_leave WHERE run_id = p_run.id;
    INSERT INTO longhaul_runs_leave (run_id, key, priority, turn_of, turn, since, limits, tokens, reason)
    VALUES (p_run.id, p_key, p_run.priority, v_owner, v_turn, p_now, p_limits, p_tokens, p_reason) RETURNING * INTO v_leave;
    RETURN v_leave;
END $$;

-- A leg asks for leave to ask its model, for a caller that holds the run and is about to write p_message as pending. p_ask: {"key",
-- "limits": {"requests", "tokens", "concurrency", "seconds"}, "bytes": what it knows of the request, "answer": tokens of one}; limits is
-- absent where there are none: then two probes find neither a pause nor a line, and that is all. NULL: leave is given. Else
-- {"limit": "model", "reason", "delay": seconds until it may have its turn}, and the run has its place in the line.
CREATE OR REPLACE FUNCTION longhaul_model_ask(p_run longhaul_runs_run, p_ask jsonb, p_message uuid, p_context jsonb)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_key text := p_ask->>'key';
    v_limits jsonb := p_ask->'limits';
    v_seconds double precision := (v_limits->>'seconds')::double precision;
    v_requests bigint := (v_limits->>'requests')::bigint;
    v_most bigint := (v_limits->>'tokens')::bigint;
    v_calls bigint := (v_limits->>'concurrency')::bigint;
    v_now timestamptz;
    v_own longhaul_runs_leave;
    v_tokens bigint := 0;
    v_left bigint;
    v_before bigint;
    v_between bigint := 0;  -- tokens of those before it
    v_use bigint;
    v_until timestamptz;
    v_due timestamptz;
    v_reason text;
BEGIN
    IF v_key IS NULL THEN RETURN NULL; END IF;
    IF v_limits IS NULL AND NOT EXISTS (SELECT 1 FROM longhaul_tools_pause WHERE key = v_key AND until > longhaul_now())
        AND NOT EXISTS (SELECT 1 FROM longhaul_runs_leave WHERE key = v_key AND message_id IS NULL) THEN
        RETURN NULL;
    END IF;
    PERFORM longhaul_model_lock(v_key);
    v_now := longhaul_now();  -- after the lock: uses are written in the order of their times
    IF v_most IS NOT NULL THEN
        -- One that is larger than all that a minute allows goes when nothing else is used.
        v_tokens := least(v_most, (coalesce((p_ask->>'bytes')::bigint, 0) + length(p_context::text)) / 4 + coalesce((p_ask->>'answer')::bigint, 0));
    END IF;
    SELECT * INTO v_own FROM longhaul_runs_leave WHERE run_id = p_run.id AND key = v_key AND message_id IS NULL;
    -- Who comes before it: of those that were not let go yet, the ones in front; for one that is new, all.
    -- Who waits for its turn as a run is before nobody: it cannot ask now, and nobody knows when it can.
    SELECT count(*), coalesce(sum(l.tokens), 0) INTO v_before, v_between FROM longhaul_runs_leave l
    WHERE l.key = v_key AND l.message_id IS NULL AND l.run_id <> p_run.id AND v_own.released_at IS NULL
      AND (v_own.run_id IS NULL OR l.released_at IS NOT NULL
           OR (-l.priority, l.turn, l.run_id) < (-v_own.priority, v_own.turn, v_own.run_id))
      AND EXISTS (SELECT 1 FROM longhaul_runs_run r WHERE r.id = l.run_id
                  AND (r.status = 'queued' AND r.turn IS NULL OR r.status = 'running' AND r.pending_message_id IS NULL));
    IF v_before > 0 THEN
        v_reason := format('%s before it', v_before);
        v_due := v_now + make_interval(secs => v_before * 0.1);
    END IF;
    IF v_requests IS NOT NULL THEN
        v_left := longhaul_rate_left(v_key, v_requests, v_seconds, v_now) - v_before;
        IF v_left < 1 THEN
            v_reason := format('%s requests a minute are used', v_requests);
            v_due := greatest(v_due, longhaul_rate_due(v_key, 1 - v_left, v_requests, v_seconds, v_now));
        END IF;
    END IF;
    IF v_most IS NOT NULL THEN
        v_left := longhaul_rate_left('tokens:' || v_key, v_most, v_seconds, v_now) - v_between;
        IF v_left < v_tokens THEN
            v_reason := format('%s tokens a minute are used', v_most);
            v_due := greatest(v_due, longhaul_rate_due('tokens:' || v_key, v_tokens - v_left, v_most, v_seconds, v_now));
        END IF;
    END IF;
    IF v_calls IS NOT NULL AND longhaul_model_calls(v_key) + v_before >= v_calls THEN
        v_reason := format('%s of %s calls are out', least(longhaul_model_calls(v_key), v_calls), v_calls);
        v_due := greatest(v_due, v_now + interval '1 second');
    END IF;
    SELECT until INTO v_until FROM longhaul_tools_pause WHERE key = v_key AND until > v_now;
    IF FOUND THEN
        v_reason := 'its service asked for a pause';
        v_due := greatest(v_due, v_until + make_interval(secs => v_before * 0.1));
    END IF;
    IF v_due IS NOT NULL THEN
        PERFORM longhaul_model_wait(p_run, v_key, v_limits, v_tokens, v_reason, v_now);
        RETURN jsonb_build_object('limit', 'model', 'reason', v_reason, 'delay', extract(epoch FROM v_due - v_now));
    END IF;
    IF v_own.run_id IS NOT NULL OR v_limits IS NOT NULL THEN
        DELETE FROM longhaul_runs_leave WHERE run_id = p_run.id;
    END IF;
    IF v_limits IS NULL THEN RETURN NULL; END IF;
    IF v_requests IS NOT NULL THEN
        PERFORM longhaul_rate_use(jsonb_build_object(v_key, jsonb_build_object('count', v_requests, 'seconds', v_seconds)), v_now);
    END IF;
    IF v_most IS NOT NULL THEN
        DELETE FROM longhaul_tools_rateuse WHERE id IN (
            SELECT id FROM longhaul_tools_rateuse WHERE key = 'tokens:' || v_key AND at <= v_now - make_interval(secs => v_seconds)
            LIMIT 100 FOR UPDATE SKIP LOCKED);
        INSERT INTO longhaul_tools_rateuse (key, at, amount) VALUES ('tokens:' || v_key, v_now, v_tokens) RETURNING id INTO v_use;
    END IF;
    INSERT INTO longhaul_runs_leave (run_id, key, priority, turn_of, turn, since, limits, tokens, reason, message_id, use_id)
    VALUES (p_run.id, v_key, p_run.priority, coalesce(p_run.owner_id::text, ''), 0, v_now, v_limits, v_tokens, '', p_message, v_use);
    RETURN NULL;
END $$;

-- What a call took in fact, in place of what it was thought to take, at the time at which it was asked.
CREATE OR REPLACE FUNCTION longhaul_model_used(p_run uuid, p_message uuid, p_tokens bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_use bigint;
BEGIN
    DELETE FROM longhaul_runs_leave WHERE run_id = p_run AND message_id = p_message RETURNING use_id INTO v_use;
    IF v_use IS NOT NULL THEN
        UPDATE longhaul_tools_rateuse SET amount = p_tokens WHERE id = v_use;
    END IF;
END $$;

-- Nobody asks this model before the time that its service has said; a shorter pause ends none that is longer. The run that was
-- told so, if it is named, takes its place in the line before those that come meanwhile.
CREATE OR REPLACE FUNCTION longhaul_model_pause(p_key text, p_pause interval, p_reason text, p_run uuid, p_limits jsonb)
RETURNS timestamptz LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
    v_until timestamptz;
BEGIN
    IF p_run IS NOT NULL THEN
        SELECT * INTO v_run FROM longhaul_runs_run WHERE id = p_run AND status = 'running' FOR NO KEY UPDATE;
    END IF;
    PERFORM longhaul_model_lock(p_key);
    INSERT INTO longhaul_tools_pause AS p (key, until, reason) VALUES (p_key, longhaul_now() + p_pause, p_reason)
    ON CONFLICT (key) DO UPDATE SET until = excluded.until, reason = excluded.reason WHERE p.until < excluded.until;
    IF v_run.id IS NOT NULL THEN
        PERFORM longhaul_model_wait(v_run, p_key, p_limits, 0, 'its service asked for a pause', longhaul_now() + p_pause);
    END IF;
    SELECT until INTO v_until FROM longhaul_tools_pause WHERE key = p_key;
    RETURN v_until;
END $$;

-- Lets go whose turn it is, model by model: by priority, owners in turn, age. Where those of several priorities wait, one look in ten
-- goes by age alone, so that none starves. At most twice the rate's pace at a time (four looks a second), so that a window that opens, or a pause that
-- ends, is no burst. Who was let go has a place kept for 10 s, by when its leg has asked, and is published by longhaul_runs_due.
-- Locks runs with SKIP LOCKED only. Returns how many.
CREATE OR REPLACE FUNCTION longhaul_models_release() RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    v_key text;
    v_now timestamptz;
    v_limits jsonb;
    v_seconds double precision;
    v_room bigint;
    v_tokens bigint;
    v_out bigint;
    v_taken bigint;
    v_calls bigint;
    v_by_age boolean;
    v_next longhaul_runs_leave;
    v_run longhaul_runs_run;
    v_count integer := 0;
BEGIN
    FOR v_key IN
        WITH RECURSIVE waiting AS (
            (SELECT key FROM longhaul_runs_leave WHERE message_id IS NULL ORDER BY key LIMIT 1)
            UNION ALL
            SELECT (SELECT l.key FROM longhaul_runs_leave l WHERE l.message_id IS NULL AND l.key > w.key ORDER BY l.key LIMIT 1)
            FROM waiting w WHERE w.key IS NOT NULL)
        SELECT key FROM waiting WHERE key IS NOT NULL
    LOOP
        PERFORM longhaul_model_lock(v_key);
        v_now := longhaul_now();
        CONTINUE WHEN EXISTS (SELECT 1 FROM longhaul_tools_pause WHERE key = v_key AND until > v_now);
        SELECT limits INTO v_limits FROM longhaul_runs_leave WHERE key = v_key AND message_id IS NULL
        ORDER BY priority DESC, turn, run_id LIMIT 1;
        v_seconds := (v_limits->>'seconds')::double precision;
        -- Those that were let go and have ended since.
        DELETE FROM longhaul_runs_leave l WHERE l.key = v_key AND l.message_id IS NULL AND l.released_at <= v_now - interval '10 seconds'
          AND NOT EXISTS (SELECT 1 FROM longhaul_runs_run r WHERE r.id = l.run_id AND r.status IN ('queued', 'running'));
        -- No place is kept for one that waits for its turn as a run.
        SELECT count(*), coalesce(sum(l.tokens), 0) INTO v_out, v_taken FROM longhaul_runs_leave l
        WHERE l.key = v_key AND l.message_id IS NULL AND l.released_at > v_now - interval '10 seconds'
          AND NOT EXISTS (SELECT 1 FROM longhaul_runs_run r WHERE r.id = l.run_id AND r.turn IS NOT NULL);
        SELECT min(priority) < max(priority) AND random() < 0.1 INTO v_by_age
        FROM longhaul_runs_leave WHERE key = v_key AND message_id IS NULL;
        v_room := 10;
        IF v_limits ? 'concurrency' THEN
            v_calls := (v_limits->>'concurrency')::bigint;
            v_room := least(v_calls - longhaul_model_calls(v_key) - v_out, greatest(10, v_calls / 10));
        END IF;
        IF v_limits ? 'requests' THEN
            v_room := least(
                CASE WHEN v_limits ? 'concurrency' THEN v_room END,
                longhaul_rate_left(v_key, (v_limits->>'requests')::bigint, v_seconds, v_now) - v_out,
                ceil((v_limits->>'requests')::bigint / v_seconds / 2)::bigint);
        END IF;
        CONTINUE WHEN v_room < 1;
        v_tokens := NULL;
        IF v_limits ? 'tokens' THEN
            v_tokens := longhaul_rate_left('tokens:' || v_key, (v_limits->>'tokens')::bigint, v_seconds, v_now) - v_taken;
        END IF;
        FOR v_next IN
            SELECT * FROM longhaul_runs_leave WHERE key = v_key AND message_id IS NULL AND released_at IS NULL
            ORDER BY CASE WHEN v_by_age THEN since END, priority DESC, turn, run_id
        LOOP
            SELECT * INTO v_run FROM longhaul_runs_run WHERE id = v_next.run_id FOR NO KEY UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                -- Somebody is at it: another time. Or it was deleted.
                DELETE FROM longhaul_runs_leave WHERE run_id = v_next.run_id
                  AND NOT EXISTS (SELECT 1 FROM longhaul_runs_run WHERE id = v_next.run_id);
                CONTINUE;
            END IF;
            CONTINUE WHEN v_run.status = 'running' AND v_run.pending_message_id IS NULL;  -- it is about to be handed over
            CONTINUE WHEN v_run.turn IS NOT NULL;  -- it waits for its turn as a run first, and asks then
            IF v_run.status <> 'queued' THEN
                DELETE FROM longhaul_runs_leave WHERE run_id = v_next.run_id AND message_id IS NULL;
                CONTINUE;
            END IF;
            EXIT WHEN v_tokens < v_next.tokens;
            -- What it waited for others is no part of the time in which its model may be tried.
            UPDATE longhaul_runs_run
            SET not_before = NULL, next_publish_at = v_now, retry_since = retry_since + greatest(v_now - v_next.since, interval '0')
            WHERE id = v_run.id;
            UPDATE longhaul_runs_leave SET released_at = v_now WHERE run_id = v_run.id;
            v_count := v_count + 1;
            v_tokens := v_tokens - v_next.tokens;
            v_room := v_room - 1;
            EXIT WHEN v_room < 1;
        END LOOP;
    END LOOP;
    -- What was asked a long time ago, and whose turn did not end with its usage. Last of all: who
    -- holds one of these rows must not wait for the lock of a key, whose holder may want that row.
    DELETE FROM longhaul_runs_leave WHERE run_id IN (
        SELECT l.run_id FROM longhaul_runs_leave l
        WHERE l.message_id IS NOT NULL AND l.since < longhaul_now() - interval '15 minutes'
          AND NOT EXISTS (SELECT 1 FROM longhaul_runs_run r WHERE r.id = l.run_id AND r.pending_message_id = l.message_id)
        ORDER BY l.since LIMIT 200 FOR UPDATE SKIP LOCKED);
    RETURN v_count;
END $$;
