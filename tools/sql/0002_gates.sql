-- Gates: what bounds how many like it run at once ("most"), or start in any stretch of time ("count", "seconds").
-- A row carries what the code said when it was requested: {key: {"most", "count", "seconds"}}. Who waits stands in a lane
-- with its turn. Calls (below) and runs share what follows.

-- The lane: the queue, and the keys of the gates. All rows of a lane meet the same bounds, so one that is shut is skipped
-- whole. The lanes of a queue are those from queue || E'\n' to below queue || E'\x0b' (the column is ordered by its bytes).
CREATE OR REPLACE FUNCTION longhaul_lane(p_queue text, p_gates jsonb) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF p_gates IS NULL THEN RETURN p_queue || E'\n'; END IF;
    RETURN p_queue || E'\n' || (SELECT coalesce(string_agg(key, E'\n' ORDER BY key COLLATE "C"), '') FROM jsonb_object_keys(p_gates) AS key);
END $$;

-- How many more a gate lets through now. p_busy: how many of its key are out or running; p_unclaimed: those that are out and
-- not begun. The caller counts these two first, in one statement: what is claimed after that is then counted twice, never
-- not at all.
CREATE OR REPLACE FUNCTION longhaul_gate_room(p_key text, p_gate jsonb, p_busy bigint, p_unclaimed bigint, p_now timestamptz)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v_room bigint := 1000000;
BEGIN
    IF EXISTS (SELECT 1 FROM longhaul_tools_pause WHERE key = p_key AND until > p_now) THEN RETURN 0; END IF;
    IF p_gate ? 'most' THEN v_room := (p_gate->>'most')::bigint - p_busy; END IF;
    IF p_gate ? 'count' THEN
        -- A start counts against the rate as long as it is not begun: it may begin at the very end of the stretch.
        v_room := least(v_room, longhaul_rate_left(
            p_key, (p_gate->>'count')::bigint, (p_gate->>'seconds')::double precision, p_now) - p_unclaimed);
    END IF;
    RETURN greatest(v_room, 0);
END $$;

-- Rates: at most so many starts, or tokens, in any stretch of so many seconds. What was used is a row, so the bound is exact.

-- How much of the rate is left now.
CREATE OR REPLACE FUNCTION longhaul_rate_left(p_key text, p_count bigint, p_seconds double precision, p_now timestamptz)
RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    RETURN p_count - (SELECT coalesce(sum(amount), 0) FROM longhaul_tools_rateuse
                      WHERE key = p_key AND at > p_now - make_interval(secs => p_seconds));
END $$;

-- Uses one of each rate among the gates (or p_amount), and removes what no longer counts.
CREATE OR REPLACE FUNCTION longhaul_rate_use(p_gates jsonb, p_now timestamptz, p_amount bigint DEFAULT 1)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO longhaul_tools_rateuse (key, at, amount)
    SELECT g.key, p_now, p_amount FROM jsonb_each(p_gates) AS g WHERE g.value ? 'count';
    DELETE FROM longhaul_tools_rateuse WHERE id IN (
        SELECT u.id FROM jsonb_each(p_gates) AS g JOIN longhaul_tools_rateuse u
          ON u.key = g.key AND u.at <= p_now - make_interval(secs => (g.value->>'seconds')::double precision)
        WHERE g.value ? 'count' LIMIT 100 FOR UPDATE OF u SKIP LOCKED);
END $$;

-- Calls. At most p_window calls of a queue are out: requested or retrying, without a turn, sent and not claimed. The others are
-- parked: they have a lane and a turn, and no next_publish_at. While nobody is parked, all that it costs is a probe of an empty index.

-- How many calls of a queue are out, counted no further than p_most.
CREATE OR REPLACE FUNCTION longhaul_calls_out(p_queue text, p_most integer, p_now timestamptz) RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    RETURN (SELECT count(*) FROM (
        SELECT 1 FROM longhaul_tools_toolcall
        WHERE status IN ('requested', 'retrying') AND next_publish_at <= p_now + interval '15 seconds'
          AND publishes > 0 AND queue = p_queue LIMIT greatest(p_most, 0)) AS those);
END $$;

-- How many calls hold a place at a gate: those that are out or run, and of them those that have not begun. Who waits out the time to
-- another attempt was not sent yet, and holds none.
CREATE OR REPLACE FUNCTION longhaul_calls_at_gate(p_key text, OUT busy bigint, OUT unclaimed bigint) LANGUAGE plpgsql AS $$
BEGIN
    SELECT count(*), count(*) FILTER (WHERE status <> 'running') INTO busy, unclaimed FROM longhaul_tools_toolcall
    WHERE gates ? p_key AND turn IS NULL AND status IN ('requested', 'retrying', 'running')
      AND (status = 'running' OR publishes > 0);
END $$;

-- How many calls without gates may be sent to a queue at once: none while others without gates are parked for it, for they
-- were there before. p_window NULL: it has no bound.
CREATE OR REPLACE FUNCTION longhaul_calls_room(p_queue text, p_window integer, p_now timestamptz) RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM longhaul_tools_toolcall WHERE turn IS NOT NULL AND lane = p_queue || E'\n') THEN RETURN 0; END IF;
    IF p_window IS NULL THEN RETURN 1000000; END IF;
    RETURN p_window - longhaul_calls_out(p_queue, p_window, p_now);
END $$;

-- After which turn an owner's next call of a lane stands: behind its own last one there, and not before the one whose turn it
-- is now (else who comes late would overtake all that wait). In a lane where nobody waits that is where the lanes of its queue
-- stand: the furthest, for one that is shut stays behind. (Start-time fair queuing; Goyal, Vin and Cheng 1996.)
CREATE OR REPLACE FUNCTION longhaul_call_turn(p_queue text, p_lane text, p_priority smallint, p_owner text)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v_first bigint;
    v_last bigint;
BEGIN
    SELECT turn INTO v_first FROM longhaul_tools_toolcall
    WHERE turn IS NOT NULL AND lane = p_lane AND priority = p_priority ORDER BY turn LIMIT 1;
    IF v_first IS NULL THEN
        WITH RECURSIVE lanes(lane, place) AS (
            SELECT (SELECT min(c.lane) FROM longhaul_tools_toolcall c
                    WHERE c.turn IS NOT NULL AND c.lane >= p_queue || E'\n' AND c.lane < p_queue || E'\x0b'), 1
            UNION ALL
            SELECT (SELECT min(c.lane) FROM longhaul_tools_toolcall c
                    WHERE c.turn IS NOT NULL AND c.lane > l.lane AND c.lane < p_queue || E'\x0b'), l.place + 1
            FROM lanes l WHERE l.lane IS NOT NULL AND l.place < 100)
        SELECT max(head.turn) INTO v_first FROM lanes l CROSS JOIN LATERAL (
            SELECT c.turn FROM longhaul_tools_toolcall c
            WHERE c.turn IS NOT NULL AND c.lane = l.lane AND c.priority = p_priority ORDER BY c.turn LIMIT 1) AS head;
    ELSE
        SELECT turn INTO v_last FROM longhaul_tools_toolcall
        WHERE turn IS NOT NULL AND turn_of = p_owner AND lane = p_lane AND priority = p_priority ORDER BY turn DESC LIMIT 1;
    END IF;
    RETURN greatest(v_first, v_last, 0);
END $$;

-- Lets out whose turn it is: in each queue, while there is room, the highest priority first, then the lowest turn, of those lanes
-- whose gates are all open. Called in autocommit, and never inside a transition; the caller sends the messages of what it
-- returns. One at a time over the whole database, so what it counts is not spent twice: who finds another one at it leaves
-- it to that one, and to the watcher. It locks no run, and waits for no call: what a transition holds has no turn now.
CREATE OR REPLACE FUNCTION longhaul_calls_release(p_window integer) RETURNS TABLE (
    call_id uuid, attempt integer, timeout interval, queue text, name text, run_id uuid, agent text)
LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz;
    v_head record;
    v_gate record;
    v_room bigint;
    v_busy bigint;
    v_unclaimed bigint;
    v_queues jsonb := '{}';
    v_keys jsonb := '{}';
    v_lanes text[] := '{}';
    v_most bigint[] := '{}';
    v_next record;
    v_call longhaul_tools_toolcall;
BEGIN
    IF NOT EXISTS (SELECT 1 FROM longhaul_tools_toolcall c WHERE c.turn IS NOT NULL) THEN RETURN; END IF;
    IF NOT pg_try_advisory_xact_lock(7813585268839115884) THEN RETURN; END IF;
    v_now := longhaul_now();
    FOR v_head IN
        WITH RECURSIVE lanes(lane) AS (
            SELECT (SELECT min(c.lane) FROM longhaul_tools_toolcall c WHERE c.turn IS NOT NULL)
            UNION ALL
            SELECT (SELECT min(c.lane) FROM longhaul_tools_toolcall c WHERE c.turn IS NOT NULL AND c.lane > l.lane)
            FROM lanes l WHERE l.lane IS NOT NULL)
        SELECT l.lane, head.queue AS of_queue, head.gates FROM lanes l CROSS JOIN LATERAL (
            SELECT c.queue, c.gates FROM longhaul_tools_toolcall c WHERE c.turn IS NOT NULL AND c.lane = l.lane
            ORDER BY c.priority DESC, c.turn, c.id LIMIT 1) AS head
        WHERE l.lane IS NOT NULL
    LOOP
        IF NOT v_queues ? v_head.of_queue THEN
            v_queues := v_queues || jsonb_build_object(
                v_head.of_queue, p_window - longhaul_calls_out(v_head.of_queue, p_window, v_now));
        END IF;
        v_room := (v_queues->>v_head.of_queue)::bigint;
        FOR v_gate IN SELECT g.key, g.value FROM jsonb_each(v_head.gates) AS g LOOP
            EXIT WHEN v_room <= 0;
            IF NOT v_keys ? v_gate.key THEN
                SELECT h.busy, h.unclaimed INTO v_busy, v_unclaimed FROM longhaul_calls_at_gate(v_gate.key) AS h;
                v_keys := v_keys || jsonb_build_object(
                    v_gate.key, longhaul_gate_room(v_gate.key, v_gate.value, v_busy, v_unclaimed, v_now));
            END IF;
            v_room := least(v_room, (v_keys->>v_gate.key)::bigint);
        END LOOP;
        IF v_room > 0 THEN
            v_lanes := v_lanes || v_head.lane;
            v_most := v_most || v_room;
        END IF;
    END LOOP;
    FOR v_next IN
        SELECT first.* FROM unnest(v_lanes, v_most) AS l(lane, most) CROSS JOIN LATERAL (
            SELECT c.id, c.queue AS of_queue, c.gates, c.priority, c.turn FROM longhaul_tools_toolcall c
            WHERE c.turn IS NOT NULL AND c.lane = l.lane
            ORDER BY c.priority DESC, c.turn, c.id LIMIT l.most) AS first
        ORDER BY first.priority DESC, first.turn, first.id
    LOOP
        CONTINUE WHEN (v_queues->>v_next.of_queue)::bigint <= 0
            OR EXISTS (SELECT 1 FROM jsonb_object_keys(v_next.gates) AS key WHERE (v_keys->>key)::bigint <= 0);
        UPDATE longhaul_tools_toolcall c
        SET turn = NULL, publishes = 1, next_publish_at = v_now + interval '1 second'
        WHERE c.id = (SELECT p.id FROM longhaul_tools_toolcall p
                      WHERE p.id = v_next.id AND p.turn IS NOT NULL FOR NO KEY UPDATE SKIP LOCKED)
        RETURNING c.* INTO v_call;
        CONTINUE WHEN NOT FOUND;  -- it is being cancelled
        v_queues := jsonb_set(v_queues, ARRAY[v_next.of_queue], to_jsonb((v_queues->>v_next.of_queue)::bigint - 1));
        IF v_next.gates IS NOT NULL THEN
            SELECT jsonb_object_agg(k.key, k.value::bigint - CASE WHEN v_next.gates ? k.key THEN 1 ELSE 0 END)
            INTO v_keys FROM jsonb_each_text(v_keys) AS k;
        END IF;
        call_id := v_call.id; attempt := v_call.attempt; timeout := v_call.timeout; queue := v_call.queue;
        name := v_call.name; run_id := v_call.run_id;
        SELECT r.agent INTO agent FROM longhaul_runs_run r WHERE r.id = v_call.run_id;
        RETURN NEXT;
    END LOOP;
END $$;

-- What each of these parked calls waits for, for people: the first of its gates that is shut ("most": `used` of `bound` are out or
-- run; "rate": `bound` starts in `seconds`; "pause": until `until`), else "room": `used` of its queue are out (less than p_window:
-- it goes out at the next release). `ahead`: how many of its lane go before it, counted up to 1,000.
CREATE OR REPLACE FUNCTION longhaul_calls_waits(p_calls uuid[], p_window integer) RETURNS TABLE (
    call_id uuid, kind text, key text, used bigint, bound bigint, seconds double precision, until timestamptz, ahead bigint)
LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := longhaul_now();
    v_call longhaul_tools_toolcall;
    v_gate record;
    v_busy bigint;
    v_unclaimed bigint;
BEGIN
    FOR v_call IN SELECT c.* FROM longhaul_tools_toolcall c WHERE c.id = ANY (p_calls) AND c.turn IS NOT NULL ORDER BY c.id LOOP
        call_id := v_call.id; kind := 'room'; key := NULL; bound := p_window; seconds := NULL; until := NULL;
        used := longhaul_calls_out(v_call.queue, p_window, v_now);
        SELECT count(*) INTO ahead FROM (
            SELECT 1 FROM longhaul_tools_toolcall c WHERE c.turn IS NOT NULL AND c.lane = v_call.lane
              AND (-c.priority, c.turn, c.id) < (-v_call.priority, v_call.turn, v_call.id) LIMIT 1000) AS those;
        FOR v_gate IN SELECT g.key, g.value FROM jsonb_each(v_call.gates) AS g ORDER BY g.key LOOP
            SELECT h.busy, h.unclaimed INTO v_busy, v_unclaimed FROM longhaul_calls_at_gate(v_gate.key) AS h;
            CONTINUE WHEN longhaul_gate_room(v_gate.key, v_gate.value, v_busy, v_unclaimed, v_now) > 0;
            key := v_gate.key;
            SELECT p.until INTO until FROM longhaul_tools_pause p WHERE p.key = v_gate.key AND p.until > v_now;
            IF FOUND THEN kind := 'pause'; EXIT; END IF;
            IF v_busy >= (v_gate.value->>'most')::bigint THEN
                kind := 'most'; used := v_busy; bound := (v_gate.value->>'most')::bigint;
            ELSE
                kind := 'rate'; bound := (v_gate.value->>'count')::bigint; seconds := (v_gate.value->>'seconds')::double precision;
            END IF;
            EXIT;
        END LOOP;
        RETURN NEXT;
    END LOOP;
END $$;
