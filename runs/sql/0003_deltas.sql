-- One batch of deltas of many runs. Locks the run rows that still carry their fence in (depth, id) order and leaves those that are
-- locked to the next round, so that it neither deadlocks nor waits. The pending message is part of the fence: a delta of
-- a step that was committed under the same claim comes too late. So is the ordinal: a batch that is sent again, for its answer was
-- lost, writes what is not there yet. Says for each claim and message: written, busy (try again), lost.
CREATE OR REPLACE FUNCTION longhaul_deltas_write(
    p_worker uuid, p_runs uuid[], p_epochs integer[], p_messages uuid[], p_types text[], p_ordinals integer[], p_payloads jsonb[])
RETURNS TABLE (run_id uuid, epoch integer, state text) LANGUAGE plpgsql AS $$
DECLARE
    v_locked uuid[];
    v_now timestamptz;
BEGIN
    SELECT array_agg(l.id) INTO v_locked FROM (
        SELECT r.id FROM longhaul_runs_run r
        JOIN (SELECT DISTINCT b.run, b.epoch, b.message FROM unnest(p_runs, p_epochs, p_messages) AS b(run, epoch, message)) AS c
          ON r.id = c.run AND r.epoch = c.epoch AND r.status = 'running' AND r.holder = p_worker AND r.pending_message_id = c.message
        ORDER BY r.depth, r.id FOR NO KEY UPDATE OF r SKIP LOCKED) AS l;
    v_now := longhaul_now();
    INSERT INTO longhaul_runs_event (run_id, seq, type, at, epoch, message_id, ordinal, payload)
    SELECT b.run, r.last_seq + row_number() OVER (PARTITION BY b.run ORDER BY b.place), b.type, v_now, b.epoch, b.message, b.ordinal, b.payload
    FROM unnest(p_runs, p_epochs, p_messages, p_types, p_ordinals, p_payloads) WITH ORDINALITY
         AS b(run, epoch, message, type, ordinal, payload, place)
    JOIN longhaul_runs_run r ON r.id = b.run AND r.epoch = b.epoch AND r.pending_message_id = b.message
         AND b.ordinal > r.pending_ordinal
    WHERE b.run = ANY (v_locked);
    UPDATE longhaul_runs_run r SET last_seq = last_seq + n.count, pending_ordinal = n.last
    FROM (SELECT k.id, count(*) AS count, max(b.ordinal) AS last
          FROM unnest(p_runs, p_epochs, p_messages, p_ordinals) AS b(run, epoch, message, ordinal)
          JOIN longhaul_runs_run k ON k.id = b.run AND k.epoch = b.epoch AND k.pending_message_id = b.message
               AND b.ordinal > k.pending_ordinal
          WHERE b.run = ANY (v_locked) GROUP BY 1) AS n
    WHERE r.id = n.id;
    RETURN QUERY
    SELECT c.run, c.epoch, CASE
        WHEN c.run = ANY (v_locked) AND r.epoch = c.epoch AND r.pending_message_id = c.message THEN 'written'
        WHEN r.epoch = c.epoch AND r.status = 'running' AND r.holder = p_worker AND r.pending_message_id = c.message THEN 'busy'
        ELSE 'lost' END
    FROM (SELECT DISTINCT b.run, b.epoch, b.message FROM unnest(p_runs, p_epochs, p_messages) AS b(run, epoch, message)) AS c
    LEFT JOIN longhaul_runs_run r ON r.id = c.run;
END $$;
