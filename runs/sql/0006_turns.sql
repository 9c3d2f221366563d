-- How runs wait for their turn. A run that may not be sent yet is parked: `queued`, with a `turn` in its lane and no time to be
-- published. Nothing is counted but rows, so nothing can drift: no count outlives who held it.
--
-- *Out* is a queued run whose message is sent (publishes > 0) and not claimed. Of each queue at most `max_dispatched` are.
-- A *slot* of a gate with `most` is held by a run that is out, that is running, or whose leg lingers (until linger_until is cleared).

-- The lane of a run: its queue ("" is the agents queue), then what bounds it, a line each. All rows of a
-- lane meet the same bounds: where one may not go, none may.
-- A rate bounds starts: a run that has started stands in another lane than one that has not.
CREATE OR REPLACE FUNCTION longhaul_run_lane(p_queue text, p_gates jsonb, p_started boolean) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN p_queue || coalesce((
        SELECT string_agg(E'\n' || g.key || CASE WHEN g.value ? 'count' AND NOT p_started THEN '/rate' ELSE '' END, ''
                          ORDER BY g.key COLLATE "C")
        FROM jsonb_each(p_gates) AS g WHERE g.value ? 'most' OR NOT p_started), '');
END $$;

-- How many of the queue's runs are out, but for p_but; counted to p_most and no further.
CREATE OR REPLACE FUNCTION longhaul_runs_out(p_queue text, p_most integer, p_but uuid DEFAULT NULL)
RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    v_soon timestamptz := longhaul_now() + interval '16 seconds';  -- the longest time between two publishes is 15 s
BEGIN
    RETURN (SELECT count(*) FROM (
        SELECT 1 FROM longhaul_runs_run r
        WHERE r.status = 'queued' AND r.next_publish_at <= v_soon AND r.publishes > 0 AND split_part(r.lane, E'\n', 1) = p_queue
          AND r.id IS DISTINCT FROM p_but
        LIMIT p_most) AS sent);
END $$;

-- The lanes in which somebody is parked, by a loose scan of the index: a lane costs a probe, however many wait in it.
CREATE OR REPLACE FUNCTION longhaul_run_lanes() RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    v_lane text;
BEGIN
    SELECT lane INTO v_lane FROM longhaul_runs_run WHERE turn IS NOT NULL ORDER BY lane LIMIT 1;
    WHILE v_lane IS NOT NULL LOOP
        RETURN NEXT v_lane;
        SELECT lane INTO v_lane FROM longhaul_runs_run WHERE turn IS NOT NULL AND lane > v_lane ORDER BY lane LIMIT 1;
    END LOOP;
END $$;

-- Whether a run that becomes queued goes out (turn NULL), or which turn it gets. p_more: so many more are as good as out.
-- A run with gates is always parked first, but for one that lingered and holds its slot yet: only the release, one at a time,
-- lets out what has gates. A run without goes out when none is parked in its lane and there is room for it. The caller holds the run.
-- Turns are given as in start-time fair queuing: after the first that waits (all of the same priority), and after the last of
-- the same owner, so owners take turns whoever came first, and the runs of one owner go in the order in which they came.
-- `first`: nobody waits in its lane, so nobody else is to see to its release.
CREATE OR REPLACE FUNCTION longhaul_run_turn(
    p_run longhaul_runs_run, p_more integer DEFAULT 0, OUT turn bigint, OUT first boolean)
LANGUAGE plpgsql AS $$
DECLARE
    v_queue text := split_part(p_run.lane, E'\n', 1);
    v_now bigint;
    v_own bigint;
BEGIN
    first := NOT EXISTS (SELECT 1 FROM longhaul_runs_run r WHERE r.lane = p_run.lane AND r.turn IS NOT NULL);
    IF p_run.lane = v_queue THEN
        IF first AND longhaul_runs_out(v_queue, p_run.max_dispatched, p_run.id) + p_more < p_run.max_dispatched THEN
            first := false;
            RETURN;
        END IF;
        first := false;  -- a claim makes room, and releases
    ELSIF p_run.linger_until IS NOT NULL THEN
        first := false;
        RETURN;
    END IF;
    SELECT r.turn INTO v_now FROM longhaul_runs_run r
    WHERE r.lane = p_run.lane AND r.priority = p_run.priority AND r.turn IS NOT NULL ORDER BY r.turn LIMIT 1;
    IF NOT FOUND THEN
        -- The lane begins where the others of its queue are: nobody goes before those that wait by coming to an empty lane.
        -- The greatest of their first turns, for a lane whose gate is shut stays behind.
        SELECT max(head.turn) INTO v_now
        FROM (SELECT l.lane FROM longhaul_run_lanes() AS l(lane) WHERE split_part(l.lane, E'\n', 1) = v_queue LIMIT 50) AS o
        CROSS JOIN LATERAL (
            SELECT r.turn FROM longhaul_runs_run r
            WHERE r.lane = o.lane AND r.priority = p_run.priority AND r.turn IS NOT NULL ORDER BY r.turn LIMIT 1) AS head;
    ELSIF p_run.owner_id IS NULL THEN
        SELECT max(r.turn) INTO v_own FROM longhaul_runs_run r
        WHERE r.lane = p_run.lane AND r.owner_id IS NULL AND r.priority = p_run.priority AND r.turn IS NOT NULL;
    ELSE
        SELECT max(r.turn) INTO v_own FROM longhaul_runs_run r
        WHERE r.lane = p_run.lane AND r.owner_id = p_run.owner_id AND r.priority = p_run.priority AND r.turn IS NOT NULL;
    END IF;
    turn := greatest(coalesce(v_now, 0), coalesce(v_own, 0)) + 1;
END $$;

-- The first events of a run, from seq 1 on, in the transaction that inserted it with so many in last_seq, as one that goes out;
-- and its turn, when it has to wait. Returns what longhaul_run_park says.
CREATE OR REPLACE FUNCTION longhaul_run_enter(p_run uuid, p_at timestamptz, p_events jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO longhaul_runs_event (run_id, seq, type, at, payload)
    SELECT p_run, e.place, e.value->>0, p_at, e.value->1 FROM jsonb_array_elements(p_events) WITH ORDINALITY AS e(value, place);
    RETURN longhaul_run_park(p_run);
END $$;

-- Gives a run that was inserted as one that goes out its turn, when it has to wait. The caller inserted it in this transaction.
-- Returns {"out": whether it goes out} and {"release": true} when somebody must see to it.
CREATE OR REPLACE FUNCTION longhaul_run_park(p_run uuid) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_run longhaul_runs_run;
    v_turn bigint;
    v_first boolean;
BEGIN
    SELECT * INTO v_run FROM longhaul_runs_run WHERE id = p_run;
    IF v_run.status <> 'queued' THEN RETURN '{"out": false}'; END IF;
    SELECT t.turn, t.first INTO v_turn, v_first FROM longhaul_run_turn(v_run) AS t;
    IF v_turn IS NULL THEN RETURN '{"out": true}'; END IF;
    UPDATE longhaul_runs_run SET turn = v_turn, publishes = 0, next_publish_at = NULL WHERE id = p_run;
    RETURN jsonb_build_object('out', false, 'release', v_first);
END $$;

-- At the first claim of a run that has gates: its start is a use of each rate, and from now on only what bounds those at work
-- bounds it. The time is that of the claim, after it holds the row: the release counted by one that was no later.
CREATE OR REPLACE FUNCTION longhaul_run_begun(p_run longhaul_runs_run) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT 1 FROM jsonb_each(p_run.gates) AS g WHERE g.value ? 'count') THEN RETURN; END IF;
    PERFORM longhaul_rate_use(p_run.gates, longhaul_now());
    UPDATE longhaul_runs_run SET lane = longhaul_run_lane(split_part(lane, E'\n', 1), gates, true) WHERE id = p_run.id;
END $$;

-- What is left when a run has given up a slot, for the answer of what it did: {"release": true} when somebody is parked.
CREATE OR REPLACE FUNCTION longhaul_run_freed(p_run longhaul_runs_run) RETURNS jsonb LANGUAGE plpgsql AS $$
BEGIN
    IF p_run.gates IS NOT NULL AND EXISTS (SELECT 1 FROM longhaul_runs_run r WHERE r.turn IS NOT NULL) THEN
        RETURN '{"release": true}';
    END IF;
    RETURN '{}';
END $$;

-- Whether the claim of this run has left no more than half of those that may be out, and somebody waits for that: one release for
-- many claims. A run without gates asks for those like it alone; where only gates are shut nobody asks for more than a probe.
CREATE OR REPLACE FUNCTION longhaul_run_makes_room(p_run longhaul_runs_run) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    RETURN EXISTS (SELECT 1 FROM longhaul_runs_run r WHERE r.lane = p_run.lane AND r.turn IS NOT NULL)
       AND longhaul_runs_out(split_part(p_run.lane, E'\n', 1), p_run.max_dispatched / 2 + 1) <= p_run.max_dispatched / 2;
END $$;

-- What bounds a run, one row a bound: a gate may have two. `name` is what lanes call it.
CREATE OR REPLACE FUNCTION longhaul_run_bounds(p_gates jsonb, p_started boolean) RETURNS TABLE (name text, key text, gate jsonb)
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN QUERY
    SELECT g.key, g.key, g.value FROM jsonb_each(p_gates) AS g WHERE g.value ? 'most'
    UNION ALL SELECT g.key || '/rate', g.key, g.value FROM jsonb_each(p_gates) AS g WHERE g.value ? 'count' AND NOT p_started;
END $$;

-- How many more runs may go through this bound now. The caller is the release, or a look that decides nothing.
-- Of a rate: what is used, and what is out and will use it, are counted in one statement, so a claim between is not missed.
CREATE OR REPLACE FUNCTION longhaul_run_bound_left(p_name text, p_key text, p_gate jsonb, p_now timestamptz)
RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM longhaul_tools_pause WHERE key = p_key AND until > p_now) THEN RETURN 0; END IF;
    IF p_name <> p_key THEN
        RETURN (SELECT longhaul_rate_left(p_key, (p_gate->>'count')::bigint, (p_gate->>'seconds')::double precision, p_now) - (
            SELECT count(*) FROM longhaul_runs_run r
            WHERE r.gates ? p_key AND r.status IN ('queued', 'running', 'waiting', 'requires_action')
              AND r.status = 'queued' AND r.legs = 0 AND r.turn IS NULL AND r.publishes > 0));
    END IF;
    RETURN (p_gate->>'most')::bigint - (
        SELECT count(*) FROM longhaul_runs_run r
        WHERE r.gates ? p_key AND r.status IN ('queued', 'running', 'waiting', 'requires_action')
          AND CASE r.status WHEN 'running' THEN true WHEN 'queued' THEN r.turn IS NULL AND r.publishes > 0
              ELSE r.linger_until IS NOT NULL END);
END $$;

-- Sends those whose turn it is: of each queue while fewer than p_window are out, each through its gates; in fair order: priority,
-- then owners in turn, then age. One at a time (an advisory lock), which makes the bounds exact; who finds somebody at it goes
-- on, for the watcher looks again. Called in autocommit and never inside a transition: it waits for no lock, and locks but
-- the rows that it changes. Returns what the caller publishes.
CREATE OR REPLACE FUNCTION longhaul_runs_release(p_window integer)
RETURNS TABLE (run_id uuid, dispatch_seq integer, agent text) LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz;
    v_lane text;
    v_queue text;
    v_run longhaul_runs_run;
    v_bound record;
    v_most bigint;
    v_room jsonb := '{}';  -- of each queue
    v_left jsonb := '{}';  -- of each bound that was asked for
    v_lanes text[] := '{}';
    v_caps bigint[] := '{}';
BEGIN
    IF NOT EXISTS (SELECT 1 FROM longhaul_runs_run r WHERE r.turn IS NOT NULL) THEN RETURN; END IF;
    IF NOT pg_try_advisory_xact_lock(7811619402363922292) THEN RETURN; END IF;  -- "lhrunsgt"
    v_now := longhaul_now();
    -- Which lanes are open, by the first that waits in each. A lane that is shut is passed by whole.
    FOR v_lane IN SELECT * FROM longhaul_run_lanes() LOOP
        v_queue := split_part(v_lane, E'\n', 1);
        IF NOT v_room ? v_queue THEN
            v_room := v_room || jsonb_build_object(v_queue, p_window - longhaul_runs_out(v_queue, p_window));
        END IF;
        v_most := (v_room->>v_queue)::bigint;
        CONTINUE WHEN v_most <= 0;
        SELECT r.* INTO v_run FROM longhaul_runs_run r WHERE r.lane = v_lane AND r.turn IS NOT NULL
        ORDER BY r.priority DESC, r.turn, r.id LIMIT 1;
        FOR v_bound IN SELECT * FROM longhaul_run_bounds(v_run.gates, v_run.legs > 0) LOOP
            IF NOT v_left ? v_bound.name THEN
                PERFORM longhaul_linger_over(v_bound.key, v_now);
                v_left := v_left || jsonb_build_object(
                    v_bound.name, longhaul_run_bound_left(v_bound.name, v_bound.key, v_bound.gate, v_now));
            END IF;
            v_most := least(v_most, (v_left->>v_bound.name)::bigint);
            EXIT WHEN v_most <= 0;
        END LOOP;
        CONTINUE WHEN v_most <= 0;
        v_lanes := v_lanes || v_lane;
        v_caps := v_caps || v_most;
    END LOOP;
    FOR v_run IN
        SELECT w.* FROM unnest(v_lanes, v_caps) AS o(lane, cap) CROSS JOIN LATERAL (
            SELECT * FROM longhaul_runs_run r WHERE r.lane = o.lane AND r.turn IS NOT NULL
            ORDER BY r.priority DESC, r.turn, r.id LIMIT o.cap) AS w
        ORDER BY w.priority DESC, w.turn, w.id
    LOOP
        v_queue := split_part(v_run.lane, E'\n', 1);
        CONTINUE WHEN (v_room->>v_queue)::bigint <= 0;
        CONTINUE WHEN EXISTS (  -- another lane may have used up what they share
            SELECT 1 FROM longhaul_run_bounds(v_run.gates, v_run.legs > 0) AS b WHERE coalesce((v_left->>b.name)::bigint, 0) <= 0);
        PERFORM 1 FROM longhaul_runs_run r WHERE r.id = v_run.id AND r.turn IS NOT NULL FOR NO KEY UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;  -- it is being cancelled
        UPDATE longhaul_runs_run r
        SET turn = NULL, publishes = 1, next_publish_at = v_now + interval '1 second' WHERE r.id = v_run.id;
        v_room := v_room || jsonb_build_object(v_queue, (v_room->>v_queue)::bigint - 1);
        IF v_run.gates IS NOT NULL THEN
            SELECT v_left || coalesce(jsonb_object_agg(b.name, (v_left->>b.name)::bigint - 1), '{}') INTO v_left
            FROM longhaul_run_bounds(v_run.gates, v_run.legs > 0) AS b;
        END IF;
        run_id := v_run.id;
        dispatch_seq := v_run.dispatch_seq;
        agent := v_run.agent;
        RETURN NEXT;
    END LOOP;
END $$;

-- A leg that lingers holds its slot until linger_until is cleared, by itself or, when it is dead or late, here. A join that is
-- under way holds the run and is passed by: it keeps the slot.
CREATE OR REPLACE FUNCTION longhaul_linger_over(p_key text, p_now timestamptz) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE longhaul_runs_run SET linger_until = NULL WHERE id IN (
        SELECT r.id FROM longhaul_runs_run r
        WHERE r.gates ? p_key AND r.status IN ('queued', 'running', 'waiting', 'requires_action')
          AND r.status IN ('waiting', 'requires_action') AND r.linger_until <= p_now
        FOR NO KEY UPDATE SKIP LOCKED);
END $$;

-- What each of these parked runs waits for, for people, as longhaul_calls_waits tells of calls: the first of its bounds that is
-- shut ("most": `used` of `bound` are at work; "rate": `bound` starts in `seconds`; "pause": until `until`), else "room": `used` of
-- its queue are out (less than p_window: it goes out at the next release). `ahead`: how many of its lane go before it, counted to 1,000.
CREATE OR REPLACE FUNCTION longhaul_runs_waits(p_runs uuid[], p_window integer) RETURNS TABLE (
    run_id uuid, kind text, key text, used bigint, bound bigint, seconds double precision, until timestamptz, ahead bigint)
LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := longhaul_now();
    v_run longhaul_runs_run;
    v_bound record;
    v_left bigint;
BEGIN
    FOR v_run IN SELECT r.* FROM longhaul_runs_run r WHERE r.id = ANY (p_runs) AND r.turn IS NOT NULL ORDER BY r.id LOOP
        run_id := v_run.id; kind := 'room'; key := NULL; bound := p_window; seconds := NULL; until := NULL;
        used := longhaul_runs_out(split_part(v_run.lane, E'\n', 1), p_window);
        SELECT count(*) INTO ahead FROM (
            SELECT 1 FROM longhaul_runs_run r WHERE r.turn IS NOT NULL AND r.lane = v_run.lane
              AND (-r.priority, r.turn, r.id) < (-v_run.priority, v_run.turn, v_run.id) LIMIT 1000) AS those;
        FOR v_bound IN SELECT * FROM longhaul_run_bounds(v_run.gates, v_run.legs > 0) AS b ORDER BY b.name LOOP
            v_left := longhaul_run_bound_left(v_bound.name, v_bound.key, v_bound.gate, v_now);
            CONTINUE WHEN v_left > 0;
            key := v_bound.key;
            SELECT p.until INTO until FROM longhaul_tools_pause p WHERE p.key = v_bound.key AND p.until > v_now;
            IF FOUND THEN
                kind := 'pause';
            ELSIF v_bound.name = v_bound.key THEN
                kind := 'most'; bound := (v_bound.gate->>'most')::bigint; used := bound - v_left;
            ELSE
                kind := 'rate'; bound := (v_bound.gate->>'count')::bigint; seconds := (v_bound.gate->>'seconds')::double precision;
            END IF;
            EXIT;
        END LOOP;
        RETURN NEXT;
    END LOOP;
END $$;
