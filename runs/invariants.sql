-- The rules behind the invariants of a run, each one query that selects (run, what) of its violations, with the rule in the
-- sentence above it and the number of its invariant before that. runs/invariants.py counts their rows.
-- :run is one run, or NULL for all. A query may read what is defined here; unused, it costs nothing.

-- picked
WITH picked AS (
    SELECT * FROM longhaul_runs_run WHERE :run::uuid IS NULL OR id = :run::uuid),
-- Those whose log is whole: a retention setting has removed nothing of it, so what has been must be told in it.
logged AS (SELECT * FROM picked WHERE events_removed_through = 0),
picked_threads AS (
    SELECT id FROM longhaul_threads_thread
    WHERE :run::uuid IS NULL OR id = (SELECT thread_id FROM longhaul_runs_run WHERE id = :run::uuid)),
-- What is said in those threads, part by part. Content that is no list has its own rule.
parts AS (
    SELECT m.*, part, part->>'type' AS part_type, part->>'tool_call' AS call, part_place
    FROM longhaul_threads_message m
    CROSS JOIN LATERAL jsonb_array_elements(CASE jsonb_typeof(m.content) WHEN 'array' THEN m.content ELSE '[]' END)
        WITH ORDINALITY AS pieces(part, part_place)
    WHERE m.thread_id IN (SELECT id FROM picked_threads));

-- ---- 1. A run ends in exactly one terminal event, and it is the last.

-- 1: An ended run has exactly one terminal event, a live run has none.
SELECT r.id, r.status || ' with ' || count(e.id) || ' terminal events'
FROM picked r LEFT JOIN longhaul_runs_event e
  ON e.run_id = r.id AND e.type IN ('run.completed', 'run.failed', 'run.cancelled')
GROUP BY r.id, r.status
HAVING count(e.id) <> CASE WHEN r.status IN ('completed', 'failed', 'cancelled') THEN 1 ELSE 0 END;

-- 1: The terminal event is the last one.
SELECT r.id, max(later.type) || ' at seq ' || max(later.seq) || ' after ' || e.type || ' at seq ' || e.seq
FROM picked r
JOIN longhaul_runs_event e ON e.run_id = r.id AND e.type IN ('run.completed', 'run.failed', 'run.cancelled')
JOIN longhaul_runs_event later ON later.run_id = r.id AND later.seq > e.seq
 AND later.type NOT IN ('run.completed', 'run.failed', 'run.cancelled')  -- a second one was counted above
GROUP BY r.id, e.type, e.seq;

-- 1: The terminal event tells the status and the stop reason of the row.
SELECT r.id, e.type || ' (' || coalesce(e.payload->>'stop_reason', 'no reason') || '), the row says '
             || r.status || ' (' || r.stop_reason || ')'
FROM picked r
JOIN longhaul_runs_event e ON e.run_id = r.id AND e.type IN ('run.completed', 'run.failed', 'run.cancelled')
WHERE r.status IN ('completed', 'failed', 'cancelled')
  AND (e.type <> 'run.' || r.status OR e.payload->>'stop_reason' IS DISTINCT FROM r.stop_reason);

-- 1: A run has an end in time exactly when it has ended, and a stop reason that fits its status.
SELECT r.id, r.status || ' (' || r.stop_reason || '), finished at ' || coalesce(r.finished_at::text, 'no time')
FROM picked r
WHERE (r.finished_at IS NOT NULL) <> (r.status IN ('completed', 'failed', 'cancelled'))
   OR NOT CASE r.status
        WHEN 'completed' THEN r.stop_reason IN ('end_turn', 'max_steps')
        WHEN 'failed' THEN r.stop_reason IN (
            'token_budget', 'cost_budget', 'deadline', 'model_error', 'poison', 'tool_unknown', 'configuration')
        WHEN 'cancelled' THEN r.stop_reason IN (
            'cancelled', 'interrupted', 'rolled_back', 'thread_deleted', 'parent_ended')
        ELSE r.stop_reason = '' END;


-- ---- 2. seq is contiguous from 1; two readers of one run see the same; no text is there twice.

-- 2: seq is contiguous from 1, or from where events were removed; a compacted event stands for its range.
SELECT run_id, 'seq ' || first || ' follows ' || before
FROM (
    SELECT e.run_id, coalesce((e.payload->>'from_seq')::bigint, e.seq) AS first,
           lag(e.seq, 1, r.events_removed_through) OVER (PARTITION BY e.run_id ORDER BY e.seq) AS before
    FROM picked r JOIN longhaul_runs_event e ON e.run_id = r.id) AS spans
WHERE first <> before + 1;

-- 2: A log is compacted of an ended run only, and a compacted event knows how many characters each seq of its range had.
SELECT r.id, e.type || ' at seq ' || e.seq || ' from seq ' || (e.payload->>'from_seq') || ' stands for ' || pieces.many || ' pieces of '
             || coalesce(pieces.characters, 0) || ' characters, and has ' || coalesce(char_length(e.payload->>'text'), 0)
FROM picked r JOIN longhaul_runs_event e ON e.run_id = r.id AND e.payload ? 'from_seq'
CROSS JOIN LATERAL (
    SELECT count(*) AS many, sum(had::bigint) AS characters FROM string_to_table(e.payload->>'pieces', ',') AS had) AS pieces
WHERE pieces.many <> e.seq - (e.payload->>'from_seq')::bigint + 1
   OR pieces.characters IS DISTINCT FROM char_length(e.payload->>'text')
UNION ALL
SELECT r.id, r.status || ', compacted at ' || r.compacted_at FROM picked r
WHERE r.compacted_at IS NOT NULL AND r.status NOT IN ('completed', 'failed', 'cancelled');

-- 2: Events are removed of an ended run only, and never its last one.
SELECT r.id, r.status || ' with ' || r.last_seq || ' events, removed up to ' || r.events_removed_through
FROM picked r
WHERE r.events_removed_through <> 0
  AND (r.status NOT IN ('completed', 'failed', 'cancelled') OR r.events_removed_through NOT BETWEEN 0 AND r.last_seq - 1);

-- 2: The row's last_seq is that of its last event.
SELECT r.id, 'last_seq is ' || r.last_seq || ', the last event has ' || coalesce(max(e.seq), 0)
FROM picked r LEFT JOIN longhaul_runs_event e ON e.run_id = r.id
GROUP BY r.id, r.last_seq HAVING coalesce(max(e.seq), 0) <> r.last_seq;

-- 2: The log tells the status of the row. Each change of status is an event, but for claims after the first.
SELECT r.id, r.status || ', and the last change that the log tells is ' || coalesce(told.type, 'none')
FROM picked r LEFT JOIN LATERAL (
    SELECT e.type FROM longhaul_runs_event e WHERE e.run_id = r.id AND e.type LIKE 'run.%'
    ORDER BY e.seq DESC LIMIT 1) AS told ON true
WHERE r.status NOT IN ('completed', 'failed', 'cancelled')  -- those are invariant 1
  AND CASE r.status WHEN 'running' THEN coalesce(told.type, '') NOT IN ('run.started', 'run.queued')
      ELSE told.type IS DISTINCT FROM 'run.' || r.status END;

-- 2: run.started is told once, at the first claim.
SELECT r.id, count(e.id) || ' run.started after ' || r.legs || ' legs'
FROM logged r LEFT JOIN longhaul_runs_event e ON e.run_id = r.id AND e.type = 'run.started'
GROUP BY r.id, r.legs HAVING count(e.id) <> least(r.legs, 1);

-- 2: The ordinals of a message's deltas rise strictly with seq, so no chunk is there twice.
SELECT run_id, 'chunk ' || coalesce(ordinal::text, 'without number') || ' after ' || before || ' at seq ' || seq
FROM (
    SELECT e.run_id, e.seq, e.ordinal,
           lag(e.ordinal, 1, -1) OVER (PARTITION BY e.run_id, e.message_id ORDER BY e.seq) AS before
    FROM picked r JOIN longhaul_runs_event e ON e.run_id = r.id
    WHERE e.type IN ('text.delta', 'reasoning.delta', 'tool_call.arguments_delta')) AS chunks
WHERE ordinal IS NULL OR ordinal <= before;

-- 2: A delta stands between the beginning and the end of its message.
WITH ends AS (
    SELECT e.run_id, (e.payload->>'message')::uuid AS message,
           min(e.seq) FILTER (WHERE e.type = 'message.created') AS created,
           min(e.seq) FILTER (WHERE e.type IN ('message.completed', 'message.discarded')) AS ended
    FROM picked r JOIN longhaul_runs_event e ON e.run_id = r.id
    WHERE e.type IN ('message.created', 'message.completed', 'message.discarded') GROUP BY 1, 2)
SELECT e.run_id, e.type || ' at seq ' || e.seq || ' outside of message ' || coalesce(e.message_id::text, 'none')
FROM logged r JOIN longhaul_runs_event e ON e.run_id = r.id
LEFT JOIN ends ON ends.run_id = e.run_id AND ends.message = e.message_id
WHERE e.type IN ('text.delta', 'reasoning.delta', 'tool_call.arguments_delta')
  AND (ends.created IS NULL OR e.seq < ends.created OR e.seq > ends.ended);

-- 2: A message of a step begins once in the log, and ends once as soon as it has ended.
SELECT r.id, m.status || ' ' || m.role || ' message ' || m.id || ' began ' || coalesce(log.created, 0)
             || ' times, ended ' || coalesce(log.completed, 0) + coalesce(log.discarded, 0) || ' times'
FROM logged r
JOIN longhaul_threads_message m ON m.run_id = r.id AND m.step IS NOT NULL
LEFT JOIN (
    SELECT e.run_id, (e.payload->>'message')::uuid AS message,
           count(*) FILTER (WHERE e.type = 'message.created') AS created,
           count(*) FILTER (WHERE e.type = 'message.completed') AS completed,
           count(*) FILTER (WHERE e.type = 'message.discarded') AS discarded
    FROM picked r JOIN longhaul_runs_event e ON e.run_id = r.id
    WHERE e.type IN ('message.created', 'message.completed', 'message.discarded') GROUP BY 1, 2
) AS log ON log.run_id = r.id AND log.message = m.id
WHERE coalesce(log.created, 0) <> CASE m.role WHEN 'assistant' THEN 1 ELSE 0 END
   OR coalesce(log.completed, 0) <> CASE WHEN m.status IN ('pending', 'discarded') THEN 0 ELSE 1 END
   OR coalesce(log.discarded, 0) <> CASE WHEN m.status IN ('discarded', 'rolled_back') THEN 1 ELSE 0 END;

-- 2: The text that was streamed is the text that was kept.
SELECT r.id, kind || ' of message ' || m.id || ': ' || length(coalesce(streamed.text, '')) || ' characters streamed, '
             || length(kept.text) || ' kept'
FROM logged r
JOIN longhaul_threads_message m ON m.run_id = r.id AND m.step IS NOT NULL AND m.role = 'assistant'
 AND m.status NOT IN ('pending', 'discarded', 'waiting')
CROSS JOIN (VALUES ('text'), ('reasoning')) AS kinds(kind)
CROSS JOIN LATERAL (
    SELECT coalesce(string_agg(part->>'text', '' ORDER BY place), '') AS text
    FROM jsonb_array_elements(CASE jsonb_typeof(m.content) WHEN 'array' THEN m.content ELSE '[]' END)
         WITH ORDINALITY AS pieces(part, place)
    WHERE part->>'type' = kind) AS kept
LEFT JOIN (
    SELECT e.run_id, e.message_id, e.type, string_agg(e.payload->>'text', '' ORDER BY e.seq) AS text
    FROM picked r JOIN longhaul_runs_event e ON e.run_id = r.id
    WHERE e.type IN ('text.delta', 'reasoning.delta') GROUP BY 1, 2, 3
) AS streamed ON streamed.run_id = r.id AND streamed.message_id = m.id AND streamed.type = kind || '.delta'
WHERE coalesce(streamed.text, '') <> kept.text;

-- 2: The content that message.completed tells is the content of the message.
SELECT r.id, m.role || ' message ' || m.id || ' at seq ' || e.seq
FROM picked r
JOIN longhaul_runs_event e ON e.run_id = r.id AND e.type = 'message.completed'
JOIN longhaul_threads_message m ON m.id = (e.payload->>'message')::uuid
WHERE m.step IS NOT NULL AND e.payload->'content' IS DISTINCT FROM m.content;


-- ---- 3. At most one live claim a run; a stale epoch writes nothing.

-- 3: The epoch of what legs write never falls with seq.
SELECT run_id, type || ' of epoch ' || epoch || ' at seq ' || seq || ', after epoch ' || before
FROM (
    SELECT e.run_id, e.seq, e.type, e.epoch,
           max(e.epoch) OVER (PARTITION BY e.run_id ORDER BY e.seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
               AS before
    FROM picked r JOIN longhaul_runs_event e ON e.run_id = r.id WHERE e.epoch IS NOT NULL) AS written
WHERE epoch < before;

-- 3: Nothing carries an epoch that no claim has raised.
SELECT r.id, rows.what || ' of epoch ' || rows.epoch || ', the run is at ' || r.epoch
FROM picked r JOIN (
    SELECT run_id, 'an event' AS what, max(epoch) AS epoch FROM longhaul_runs_event
    WHERE run_id IN (SELECT id FROM picked) GROUP BY 1
    UNION ALL SELECT run_id, 'a step', max(epoch) FROM longhaul_runs_step GROUP BY 1
    UNION ALL SELECT run_id, 'a leg', max(epoch) FROM longhaul_runs_leg GROUP BY 1
    UNION ALL SELECT run_id, 'usage', max(epoch) FROM longhaul_runs_usage GROUP BY 1
) AS rows ON rows.run_id = r.id
WHERE rows.epoch > r.epoch;

-- 3: After the end of a leg its epoch writes nothing more, but for the change of status that ended it.
SELECT e.run_id, e.type || ' of epoch ' || e.epoch || ' at seq ' || e.seq || ', its leg ended at seq ' || ended.seq
FROM picked r
JOIN LATERAL (
    SELECT (l.payload->>'epoch')::integer AS epoch, min(l.seq) AS seq FROM longhaul_runs_event l
    WHERE l.run_id = r.id AND l.type = 'leg.ended' GROUP BY 1) AS ended ON true
JOIN longhaul_runs_event e
  ON e.run_id = r.id AND e.epoch = ended.epoch AND e.seq > ended.seq AND e.type NOT LIKE 'run.%';

-- 3: At most one leg of a run is open.
SELECT r.id, count(*) || ' open legs'
FROM picked r JOIN longhaul_runs_leg l ON l.run_id = r.id AND l.ended_at IS NULL
GROUP BY r.id HAVING count(*) > 1;

-- 3: A running run has an open leg of its epoch; between two claims only a lingering leg is open, and then linger_until is set.
SELECT r.id, CASE
    WHEN r.status = 'running' THEN 'running under epoch ' || r.epoch || ', its open leg has ' || coalesce(l.epoch::text, 'none')
    WHEN l.id IS NULL THEN r.status || ' with linger_until, without an open leg'
    ELSE r.status || ' with leg ' || l.number || ' open, without linger_until' END
FROM picked r
LEFT JOIN (SELECT DISTINCT ON (run_id) * FROM longhaul_runs_leg
           WHERE ended_at IS NULL AND run_id IN (SELECT id FROM picked)
           ORDER BY run_id, number DESC) AS l ON l.run_id = r.id
WHERE r.status NOT IN ('completed', 'failed', 'cancelled')  -- those are invariant 8
  AND CASE r.status WHEN 'running' THEN l.epoch IS DISTINCT FROM r.epoch
      ELSE (l.id IS NULL) <> (r.linger_until IS NULL) END;

-- 3: The legs of a run are numbered 1 to its count, and their epochs rise.
SELECT r.id, coalesce('leg ' || l.number || ' of epoch ' || l.epoch || ' stands at place ' || l.place
             || ' after epoch ' || l.before, 'no legs') || ', the run counts ' || r.legs
FROM picked r LEFT JOIN (
    SELECT run_id, number, epoch, row_number() OVER chain AS place, count(*) OVER (PARTITION BY run_id) AS count,
           lag(epoch, 1, 0) OVER chain AS before
    FROM longhaul_runs_leg WHERE run_id IN (SELECT id FROM picked)
    WINDOW chain AS (PARTITION BY run_id ORDER BY number)) AS l ON l.run_id = r.id
WHERE l.number <> l.place OR l.epoch <= l.before
   OR coalesce(l.count, 0) <> r.legs AND coalesce(l.place, 1) = 1  -- once a run;

-- 3: Each leg begins once in the log, and ends there as soon as it has ended.
SELECT r.id, 'leg ' || l.number || ' began ' || coalesce(log.started, 0) || ' times, ended ' || coalesce(log.ended, 0)
             || ' times' || CASE WHEN l.ended_at IS NULL THEN ' and is open' ELSE '' END
FROM logged r JOIN longhaul_runs_leg l ON l.run_id = r.id
LEFT JOIN (
    SELECT e.run_id, (e.payload->>'leg')::integer AS number,
           count(*) FILTER (WHERE e.type = 'leg.started') AS started,
           count(*) FILTER (WHERE e.type = 'leg.ended') AS ended
    FROM picked r JOIN longhaul_runs_event e ON e.run_id = r.id
    WHERE e.type IN ('leg.started', 'leg.ended') GROUP BY 1, 2) AS log ON log.run_id = r.id AND log.number = l.number
WHERE coalesce(log.started, 0) <> 1 OR coalesce(log.ended, 0) <> CASE WHEN l.ended_at IS NULL THEN 0 ELSE 1 END;

-- 3: A step is committed under an epoch of its own leg, and epochs never fall from step to step.
SELECT r.id, 'step ' || s.number || ' of epoch ' || s.epoch || ' after ' || s.before || ', its leg has '
             || coalesce(l.epoch::text, 'no row')
FROM picked r
JOIN (SELECT *, lag(epoch, 1, 0) OVER (PARTITION BY run_id ORDER BY number) AS before
      FROM longhaul_runs_step WHERE run_id IN (SELECT id FROM picked)) AS s ON s.run_id = r.id
LEFT JOIN longhaul_runs_leg l ON l.id = s.leg_id AND l.run_id = r.id
WHERE l.epoch IS NULL OR s.epoch > l.epoch OR s.epoch < s.before;


-- ---- 4. One committed result a (run, step) and a tool call; every tool call is answered before the next model turn.

-- 4: The steps of a run are numbered 1 to its count, each once.
SELECT r.id, count(s.id) || ' steps, numbered ' || coalesce(min(s.number) || ' to ' || max(s.number), 'nothing')
             || ', the run counts ' || r.steps
FROM picked r LEFT JOIN longhaul_runs_step s ON s.run_id = r.id
GROUP BY r.id, r.steps
HAVING count(s.id) <> r.steps OR count(DISTINCT s.number) <> r.steps
    OR coalesce(min(s.number), 1) <> 1 OR coalesce(max(s.number), 0) <> r.steps;

-- 4: A step has one message: the model's, of this run and this step, and completed.
SELECT r.id, 'step ' || s.number || ': ' || m.status || ' ' || m.role || ' message ' || m.id || ' of step '
             || coalesce(m.step::text, 'none')
FROM picked r JOIN longhaul_runs_step s ON s.run_id = r.id
JOIN longhaul_threads_message m ON m.id = s.message_id
WHERE m.role <> 'assistant' OR m.run_id IS DISTINCT FROM r.id OR m.step IS DISTINCT FROM s.number
   OR m.status NOT IN ('completed', 'superseded', 'rolled_back')
UNION ALL
SELECT r.id, 'step ' || m.step || ' has ' || count(*) || ' messages of the model that were kept'
FROM picked r JOIN longhaul_threads_message m ON m.run_id = r.id
WHERE m.role = 'assistant' AND m.step IS NOT NULL AND m.status <> 'discarded'
GROUP BY r.id, m.step HAVING count(*) > 1
UNION ALL
SELECT r.id, m.status || ' message ' || m.id || ' of step ' || m.step || ', the run has ' || r.steps
FROM picked r JOIN longhaul_threads_message m ON m.run_id = r.id
WHERE m.role = 'assistant' AND m.step IS NOT NULL
  -- what a cancel left of a message may have been superseded, or rolled back, since
  AND CASE WHEN m.status IN ('pending', 'partial', 'discarded', 'superseded', 'rolled_back') THEN m.step > r.steps + 1
      ELSE m.step > r.steps END;

-- 4: What the run counts of tokens and cost is the sum of its usage, each model call once.
SELECT r.id, 'the run counts ' || r.input_tokens || ' + ' || r.output_tokens || ' tokens, its usage '
             || coalesce(sum(u.input_tokens), 0) || ' + ' || coalesce(sum(u.output_tokens), 0)
FROM picked r LEFT JOIN longhaul_runs_usage u ON u.run_id = r.id
GROUP BY r.id, r.input_tokens, r.output_tokens, r.cost
HAVING coalesce(sum(u.input_tokens), 0) <> r.input_tokens OR coalesce(sum(u.output_tokens), 0) <> r.output_tokens
    OR coalesce(sum(u.cost), 0) <> r.cost OR count(*) <> count(DISTINCT u.message_id) AND count(u.id) > 0;

-- 4: A settled call is told to be settled once, an open one not at all.
SELECT r.id, c.status || ' call ' || c.name || ' ' || c.id || ' with ' || coalesce(log.settled, 0) || ' tool_call.settled'
FROM logged r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
LEFT JOIN (
    SELECT e.run_id, (e.payload->>'tool_call')::uuid AS call, count(*) AS settled
    FROM picked r JOIN longhaul_runs_event e ON e.run_id = r.id WHERE e.type = 'tool_call.settled' GROUP BY 1, 2
) AS log ON log.run_id = r.id AND log.call = c.id
WHERE coalesce(log.settled, 0) <> CASE c.status WHEN 'settled' THEN 1 ELSE 0 END;

-- 4: The outcome that tool_call.settled tells is that of the call, and a settled call has its time.
SELECT r.id, 'call ' || c.name || ' ' || c.id || ' is ' || c.outcome || ', told as ' || coalesce(e.payload->>'outcome', 'nothing')
FROM picked r JOIN longhaul_tools_toolcall c ON c.run_id = r.id AND c.status = 'settled'
JOIN longhaul_runs_event e
  ON e.run_id = r.id AND e.type = 'tool_call.settled' AND (e.payload->>'tool_call')::uuid = c.id
WHERE e.payload->>'outcome' IS DISTINCT FROM c.outcome
UNION ALL
SELECT r.id, c.status || ' call ' || c.name || ' ' || c.id || ', settled at ' || coalesce(c.settled_at::text, 'no time')
FROM picked r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
WHERE (c.settled_at IS NOT NULL) <> (c.status = 'settled');

-- 4: A call is a part of the message of its step, and every call that a committed message makes has its row.
WITH asked AS (
    SELECT r.id AS run, s.number AS step, p.id AS message, p.call
    FROM picked r JOIN longhaul_runs_step s ON s.run_id = r.id
    JOIN parts p ON p.id = s.message_id AND p.part_type = 'tool_call'),
taken AS (
    SELECT c.run_id AS run, c.step, c.message_id AS message, c.id::text AS call
    FROM picked r JOIN longhaul_tools_toolcall c ON c.run_id = r.id)
SELECT coalesce(taken.run, asked.run), 'call ' || call || ' of step ' || step
       || CASE WHEN taken.run IS NULL THEN ' has no row' ELSE ' stands in no message of that step' END
FROM taken FULL JOIN asked USING (call, step, message) WHERE taken.run IS NULL OR asked.run IS NULL;

-- 4: Once a step is joined each of its calls has exactly one tool message; while it is open there is none.
SELECT r.id, 'call ' || c.name || ' ' || c.id || ' of step ' || c.step || ' has ' || count(m.id) || ' answers in a run that is '
             || r.status || ' at step ' || r.steps
FROM picked r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
LEFT JOIN longhaul_threads_message m
  ON m.run_id = r.id AND m.step = c.step AND m.role = 'tool' AND m.status <> 'discarded'
 AND m.content @> jsonb_build_array(jsonb_build_object('type', 'tool_result', 'tool_call', c.id::text))
GROUP BY r.id, r.status, r.steps, c.id, c.name, c.step
HAVING count(m.id) <> CASE WHEN c.step = r.steps AND r.status IN ('waiting', 'requires_action') THEN 0 ELSE 1 END;

-- 4: A tool message gives the outcome of a settled call of its own step.
SELECT r.id, 'message ' || m.id || ' answers ' || coalesce(m.call, 'no call') || ' with '
             || coalesce(m.part->>'outcome', 'nothing') || ', the call is '
             || coalesce(nullif(c.outcome, ''), c.status, 'not there')
FROM picked r JOIN parts m ON m.run_id = r.id AND m.role = 'tool' AND m.step IS NOT NULL AND m.part_type = 'tool_result'
LEFT JOIN longhaul_tools_toolcall c ON c.id::text = m.call AND c.run_id = r.id AND c.step = m.step
WHERE c.id IS NULL OR c.outcome IS DISTINCT FROM m.part->>'outcome'
   OR coalesce(c.result, 'null') IS DISTINCT FROM coalesce(m.part->'result', 'null');

-- 4: The tool messages of a step stand in call order, after the message that asks and before the next one of the model.
SELECT id, 'answer ' || index || ' of step ' || step || ' stands at ' || position
FROM (SELECT r.id, m.step, m.position, c.index,
             lag(c.index) OVER (PARTITION BY r.id, m.step ORDER BY m.position) AS before,
             (SELECT max(asking.position) FROM longhaul_threads_message asking
              WHERE asking.run_id = r.id AND asking.role = 'assistant' AND asking.step <= m.step) AS asked,
             (SELECT min(asking.position) FROM longhaul_threads_message asking
              WHERE asking.run_id = r.id AND asking.role = 'assistant' AND asking.step > m.step) AS asks_next
      FROM picked r JOIN longhaul_threads_message m ON m.run_id = r.id AND m.role = 'tool'
      JOIN longhaul_tools_toolcall c ON c.run_id = r.id AND c.step = m.step AND c.id::text = m.content->0->>'tool_call') AS answers
WHERE before > index OR asked > position OR asks_next < position;

-- 4: A call is open only while its run waits for it: none is when the model is asked again.
SELECT r.id, c.status || ' call ' || c.name || ' ' || c.id || ' of a run that is ' || r.status
FROM picked r JOIN longhaul_tools_toolcall c ON c.run_id = r.id AND c.status <> 'settled'
WHERE r.status IN ('held', 'queued', 'running')
   OR r.status IN ('waiting', 'requires_action') AND c.step <> r.steps;


-- ---- 5. A settled call is never claimed again; an idempotent=False call starts at most once.

-- 5: The log tells nothing of a call after its settlement.
SELECT r.id, e.type || ' at seq ' || e.seq || ' of call ' || settled.call || ', settled at ' || settled.seq
FROM picked r
JOIN (SELECT e.run_id, e.payload->>'tool_call' AS call, min(e.seq) AS seq
      FROM picked r JOIN longhaul_runs_event e ON e.run_id = r.id
      WHERE e.type = 'tool_call.settled' GROUP BY 1, 2) AS settled ON settled.run_id = r.id
JOIN longhaul_runs_event e ON e.run_id = r.id AND e.seq > settled.seq AND e.payload->>'tool_call' = settled.call
 AND e.type LIKE 'tool_call.%' AND e.type <> 'tool_call.settled'  -- a second settlement is invariant 4;

-- 5: A running call has its one attempt open, under its holder; any other call has no holder and no open attempt.
SELECT r.id, c.status || ' call ' || c.name || ' ' || c.id || ' (attempt ' || c.attempt || ', '
             || CASE WHEN c.holder IS NULL THEN 'no holder' ELSE 'held' END || ') with '
             || count(a.id) || ' open attempts'
FROM picked r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
LEFT JOIN longhaul_tools_toolattempt a ON a.call_id = c.id AND a.ended_at IS NULL
GROUP BY r.id, c.id, c.name, c.status, c.attempt, c.holder
HAVING CASE c.status WHEN 'running' THEN count(a.id) <> 1 OR c.holder IS NULL
            OR NOT coalesce(bool_and(a.number = c.attempt AND a.worker_id = c.holder), false)
       ELSE count(a.id) <> 0 OR c.holder IS NOT NULL END;

-- 5: The attempts of a call are numbered from 1, each once, up to the one that it is at or is about to make.
SELECT r.id, c.status || ' call ' || c.name || ' ' || c.id || ' at attempt ' || c.attempt || ' made ' || count(a.id)
             || ', the last is ' || coalesce(max(a.number), 0)
FROM picked r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
LEFT JOIN longhaul_tools_toolattempt a ON a.call_id = c.id
GROUP BY r.id, c.id, c.name, c.status, c.attempt
HAVING count(a.id) <> coalesce(max(a.number), 0) OR coalesce(min(a.number), 1) <> 1 OR count(a.id) <> count(DISTINCT a.number)
    OR CASE WHEN c.status IN ('requested', 'retrying') THEN count(a.id) <> c.attempt - 1
            WHEN c.status IN ('running', 'unknown') THEN count(a.id) <> c.attempt
            ELSE count(a.id) NOT IN (c.attempt - 1, c.attempt) END;

-- 5: Each attempt is told to have started, once.
SELECT r.id, 'call ' || c.name || ' ' || c.id || ' with ' || count(DISTINCT a.id) || ' attempts and '
             || coalesce(max(log.started), 0) || ' tool_call.started'
FROM logged r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
LEFT JOIN longhaul_tools_toolattempt a ON a.call_id = c.id
LEFT JOIN (
    SELECT e.run_id, (e.payload->>'tool_call')::uuid AS call, count(*) AS started
    FROM picked r JOIN longhaul_runs_event e ON e.run_id = r.id WHERE e.type = 'tool_call.started' GROUP BY 1, 2
) AS log ON log.run_id = r.id AND log.call = c.id
GROUP BY r.id, c.id, c.name HAVING count(DISTINCT a.id) <> coalesce(max(log.started), 0);

-- 5: A call that must not run twice was started at most once; one whose code never began, or that a person released, does not count.
SELECT r.id, 'call ' || c.name || ' ' || c.id || ' was started ' || count(*) || ' times'
FROM picked r JOIN longhaul_tools_toolcall c ON c.run_id = r.id AND c.idempotent IS FALSE
JOIN longhaul_tools_toolattempt a ON a.call_id = c.id AND a.outcome NOT IN ('given_back', 'released')
GROUP BY r.id, c.id, c.name HAVING count(*) > 1;

-- 5: Nobody claims after it was gone. A claim that was under way when its worker was found dead has 6 s, as long as a beat is good for.
SELECT r.id, 'attempt ' || a.number || ' of ' || c.name || ' ' || c.id || ' by ' || w.name || ', which had gone'
FROM picked r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
JOIN longhaul_tools_toolattempt a ON a.call_id = c.id
JOIN longhaul_tools_worker w ON w.id = a.worker_id
WHERE a.started_at > w.gone_at + interval '6 seconds'
UNION ALL
SELECT r.id, 'leg ' || l.number || ' by ' || w.name || ', which had gone'
FROM picked r JOIN longhaul_runs_leg l ON l.run_id = r.id
JOIN longhaul_tools_worker w ON w.id = l.worker_id
WHERE l.started_at > w.gone_at + interval '6 seconds';


-- ---- 6. A pending message exists only while its run is running under its epoch; the transcript is valid for a provider.

-- 6: A pending message is the one that its running run names, at the step that it works on, begun under its epoch.
SELECT r.id, 'message ' || m.id || ' of step ' || coalesce(m.step::text, 'none') || ' is pending, the run is '
             || coalesce(r.status, 'not there') || ' at step ' || coalesce(r.steps, 0) || ', epoch ' || coalesce(r.epoch, 0)
FROM longhaul_threads_message m
LEFT JOIN longhaul_runs_run r ON r.id = m.run_id
LEFT JOIN longhaul_runs_event e ON e.run_id = r.id AND e.type = 'message.created' AND e.message_id = m.id
WHERE m.status = 'pending' AND m.thread_id IN (SELECT id FROM picked_threads)
  AND (r.status IS DISTINCT FROM 'running' OR r.pending_message_id IS DISTINCT FROM m.id OR m.role <> 'assistant'
       OR m.step IS DISTINCT FROM r.steps + 1 OR e.epoch IS DISTINCT FROM r.epoch)
UNION ALL
SELECT r.id, r.status || ', and names ' || r.pending_message_id || ', which is ' || coalesce(m.status, 'not there')
FROM picked r LEFT JOIN longhaul_threads_message m ON m.id = r.pending_message_id
WHERE r.pending_message_id IS NOT NULL AND m.status IS DISTINCT FROM 'pending';

-- 6: Every call in a thread is answered before the next message that is no answer; only the last step of a waiting run is open.
WITH told AS (
    SELECT m.id, m.role, count(*) FILTER (WHERE m.role <> 'tool') OVER (PARTITION BY m.thread_id ORDER BY m.position) AS turn
    FROM longhaul_threads_message m
    WHERE m.status IN ('completed', 'partial') AND m.position IS NOT NULL
      AND m.thread_id IN (SELECT id FROM picked_threads)),
asked AS (SELECT told.turn, parts.* FROM told JOIN parts USING (id) WHERE told.role = 'assistant' AND part_type = 'tool_call'),
answered AS (SELECT told.turn, parts.* FROM told JOIN parts USING (id) WHERE told.role = 'tool' AND part_type = 'tool_result')
SELECT coalesce(asked.run_id, answered.run_id), 'call ' || coalesce(call, 'without id') || ' in thread ' || coalesce(asked.thread_id, answered.thread_id)
       || CASE WHEN answered.turn IS NULL THEN ' is not answered in its turn'
               ELSE ' is answered where it was not asked' END
FROM asked FULL JOIN answered USING (thread_id, turn, call)
LEFT JOIN longhaul_runs_run r ON r.id = asked.run_id
WHERE asked.turn IS NULL
   OR answered.turn IS NULL
      AND NOT coalesce(r.status IN ('waiting', 'requires_action') AND asked.step = r.steps AND asked.status = 'completed', false);

-- 6: While a step is open, nothing stands behind its message.
SELECT r.id, later.role || ' message ' || later.id || ' behind the open step ' || s.number
FROM picked r JOIN longhaul_runs_step s ON s.run_id = r.id AND s.number = r.steps
JOIN longhaul_threads_message m ON m.id = s.message_id
JOIN longhaul_threads_message later ON later.thread_id = r.thread_id AND later.position > m.position
 AND later.role <> 'tool'  -- an answer that came too early is invariant 4
WHERE r.status IN ('waiting', 'requires_action');

-- 6: No call is answered twice in a thread.
SELECT (array_agg(m.run_id))[1], count(*) || ' answers to call ' || m.call || ' in thread ' || m.thread_id
FROM parts m
WHERE m.role = 'tool' AND m.status IN ('completed', 'partial') AND m.part_type = 'tool_result'
GROUP BY m.thread_id, m.call HAVING count(*) > 1;

-- 6: What has been said has a place in its thread, and is a list of parts; a step stands behind the step before it.
SELECT m.run_id, m.status || ' ' || m.role || ' message ' || m.id
       || CASE WHEN m.position IS NULL THEN ' has no place' ELSE ' is no list of parts' END
FROM longhaul_threads_message m
WHERE m.thread_id IN (SELECT id FROM picked_threads)
  AND (m.status IN ('pending', 'completed', 'partial') AND m.position IS NULL OR jsonb_typeof(m.content) <> 'array')
UNION ALL
SELECT run_id, 'step ' || step || ' stands at ' || position || ', the step before it at ' || before
FROM (SELECT m.run_id, m.step, m.position,
             lag(m.position) OVER (PARTITION BY m.run_id ORDER BY m.step, m.position) AS before
      FROM picked r JOIN longhaul_threads_message m ON m.run_id = r.id
      WHERE m.role = 'assistant' AND m.step IS NOT NULL) AS chain
WHERE position < before;


-- ---- 7. A run never sticks; accepted input is never stranded. From rows: every state has what leads out of it. Admission, when

-- 7: A queued run is due to be published, now or when it may be claimed, or waits for its turn.
SELECT r.id, 'queued, next published at ' || coalesce(r.next_publish_at::text, 'no time')
FROM picked r
WHERE r.status = 'queued' AND r.turn IS NULL AND (r.next_publish_at IS NULL
      OR r.next_publish_at > greatest(longhaul_now(), r.not_before, r.linger_until) + interval '1 minute');

-- 7: Only a queued run waits for its turn, and no message of it is out.
SELECT r.id, r.status || ' in turn ' || r.turn || ', published ' || r.publishes || ' times, next at ' || coalesce(r.next_publish_at::text, 'no time')
FROM picked r
WHERE r.turn IS NOT NULL AND (r.status <> 'queued' OR r.next_publish_at IS NOT NULL OR r.publishes <> 0);

-- 7: Of the runs of one gate no more are at work than the gate lets.
SELECT min(r.id::text)::uuid, count(*) || ' runs of ' || g.key || ' at work, ' || max((g.value->>'most')::bigint) || ' are allowed'
FROM picked r CROSS JOIN LATERAL jsonb_each(r.gates) AS g
WHERE g.value ? 'most' AND r.turn IS NULL
  AND (r.status = 'running' OR r.status = 'queued' AND r.publishes > 0
       OR r.status IN ('waiting', 'requires_action') AND r.linger_until IS NOT NULL)
GROUP BY g.key HAVING count(*) > max((g.value->>'most')::bigint);

-- 7: A call that is to be run is due to be published, now or when it may be claimed, or waits for its turn.
SELECT r.id, c.status || ' call ' || c.name || ' ' || c.id || ', next published at ' || coalesce(c.next_publish_at::text, 'no time')
FROM picked r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
WHERE c.status IN ('requested', 'retrying') AND ((c.next_publish_at IS NULL) <> (c.turn IS NOT NULL)
      OR c.next_publish_at > greatest(longhaul_now(), c.not_before) + interval '1 minute');

-- 7: What waits for its turn is to be run, stands in a lane and was not sent.
SELECT r.id, c.status || ' call ' || c.name || ' ' || c.id || ' has turn ' || c.turn || ' in lane ' || quote_literal(c.lane)
             || ', published ' || c.publishes || ' times'
FROM picked r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
WHERE c.turn IS NOT NULL
  AND (c.status NOT IN ('requested', 'retrying') OR c.lane <> longhaul_lane(c.queue, c.gates) OR c.publishes > 0);

-- 7: A waiting run has an open call that is not a person's; one that requires action has open calls, and all are.
SELECT r.id, r.status || ' with ' || count(c.id) || ' open calls, '
             || count(c.id) FILTER (WHERE c.status IN ('awaiting_approval', 'awaiting_result', 'unknown')) || ' of them for people'
FROM picked r LEFT JOIN longhaul_tools_toolcall c ON c.run_id = r.id AND c.status <> 'settled'
WHERE r.status IN ('waiting', 'requires_action')
GROUP BY r.id, r.status
HAVING count(c.id) = 0
    OR (r.status = 'requires_action')
       <> coalesce(bool_and(c.status IN ('awaiting_approval', 'awaiting_result', 'unknown')), false);

-- 7: A running run, and a running call, have a holder and a time after which they are taken from it.
SELECT r.id, 'running without ' || CASE WHEN r.holder IS NULL THEN 'a holder' ELSE 'leg_deadline' END
FROM picked r WHERE r.status = 'running' AND (r.holder IS NULL OR r.leg_deadline IS NULL)
UNION ALL
SELECT r.id, 'call ' || c.name || ' ' || c.id || ' runs without timeout_at'
FROM picked r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
WHERE c.status = 'running' AND c.timeout_at IS NULL;

-- 7: A run is held only while another one occupies its thread.
SELECT r.id, 'held on thread ' || r.thread_id || ', which is free'
FROM picked r
WHERE r.status = 'held' AND NOT EXISTS (
    SELECT 1 FROM longhaul_runs_run o
    WHERE o.thread_id = r.thread_id AND o.status IN ('queued', 'running', 'waiting', 'requires_action'));

-- 7: A message waits for its place only while its run lives or, saved by hand, while a run occupies its thread.
SELECT m.run_id, m.role || ' message ' || m.id || ' waits in thread ' || m.thread_id || CASE
    WHEN m.run_id IS NULL THEN ', which is free' ELSE ', its run is ' || coalesce(r.status, 'not there') END
FROM longhaul_threads_message m LEFT JOIN longhaul_runs_run r ON r.id = m.run_id
WHERE m.status = 'waiting' AND m.thread_id IN (SELECT id FROM picked_threads)
  AND CASE WHEN m.run_id IS NOT NULL THEN coalesce(r.status IN ('completed', 'failed', 'cancelled'), true)
      ELSE NOT EXISTS (
        SELECT 1 FROM longhaul_runs_run o
        WHERE o.thread_id = m.thread_id AND o.status IN ('queued', 'running', 'waiting', 'requires_action')) END;

-- 7: A call that waits for a child has one that lives.
SELECT r.id, 'call ' || c.name || ' ' || c.id || ' waits for a child that is ' || coalesce(child.status, 'not there')
FROM picked r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
LEFT JOIN longhaul_runs_run child ON child.parent_call_id = c.id
WHERE c.status = 'awaiting_child' AND coalesce(child.status IN ('completed', 'failed', 'cancelled'), true);


-- ---- 8. A cancelled run does nothing more; a finished one never changes.

-- 8: An ended run leaves no call, no leg and no child open.
WITH ended AS (SELECT * FROM picked WHERE status IN ('completed', 'failed', 'cancelled'))
SELECT r.id, r.status || ' with call ' || c.name || ' ' || c.id || ' ' || c.status
FROM ended r JOIN longhaul_tools_toolcall c ON c.run_id = r.id WHERE c.status <> 'settled'
UNION ALL
SELECT r.id, r.status || ' with leg ' || l.number || ' open'
FROM ended r JOIN longhaul_runs_leg l ON l.run_id = r.id WHERE l.ended_at IS NULL
UNION ALL
SELECT r.id, r.status || ' with child ' || child.id || ' ' || child.status
FROM ended r JOIN longhaul_runs_run child ON child.parent_id = r.id AND child.origin = 'child'
WHERE child.status NOT IN ('completed', 'failed', 'cancelled');

-- 8: Nothing would wake an ended run.
SELECT r.id, r.status || ' with ' || concat_ws(', ',
    CASE WHEN r.holder IS NOT NULL THEN 'a holder' END,
    CASE WHEN r.leg_deadline IS NOT NULL THEN 'leg_deadline' END,
    CASE WHEN r.linger_until IS NOT NULL THEN 'linger_until' END,
    CASE WHEN r.not_before IS NOT NULL THEN 'not_before' END,
    CASE WHEN r.next_publish_at IS NOT NULL THEN 'next_publish_at' END)
FROM picked r
WHERE r.status IN ('completed', 'failed', 'cancelled')
  AND num_nonnulls(r.holder, r.leg_deadline, r.linger_until, r.not_before, r.next_publish_at) > 0;

-- 8: A cancel raises the epoch above that of every leg.
SELECT r.id, 'cancelled at epoch ' || r.epoch || ', leg ' || l.number || ' has ' || l.epoch
FROM picked r JOIN longhaul_runs_leg l ON l.run_id = r.id
WHERE r.status = 'cancelled' AND l.epoch >= r.epoch;

-- 8: Nothing of a run is later than its end.
WITH ended AS (
    SELECT r.id, greatest(r.finished_at, max(e.at)) AS at FROM picked r
    JOIN longhaul_runs_event e ON e.run_id = r.id AND e.type IN ('run.completed', 'run.failed', 'run.cancelled')
    WHERE r.status IN ('completed', 'failed', 'cancelled') GROUP BY r.id, r.finished_at)
SELECT r.id, e.type || ' at seq ' || e.seq || ' is later than the end'
FROM ended r JOIN longhaul_runs_event e ON e.run_id = r.id WHERE e.at > r.at
UNION ALL
SELECT r.id, 'step ' || s.number FROM ended r JOIN longhaul_runs_step s ON s.run_id = r.id WHERE s.created_at > r.at
UNION ALL
SELECT r.id, 'leg ' || l.number FROM ended r JOIN longhaul_runs_leg l ON l.run_id = r.id
WHERE l.started_at > r.at OR l.ended_at > r.at
UNION ALL
SELECT r.id, 'usage of step ' || u.step FROM ended r JOIN longhaul_runs_usage u ON u.run_id = r.id WHERE u.created_at > r.at
UNION ALL
SELECT r.id, 'call ' || c.name || ' ' || c.id FROM ended r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
WHERE c.created_at > r.at OR c.settled_at > r.at
UNION ALL
SELECT r.id, 'attempt ' || a.number || ' of call ' || c.name || ' ' || c.id
FROM ended r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
JOIN longhaul_tools_toolattempt a ON a.call_id = c.id WHERE a.started_at > r.at OR a.ended_at > r.at
UNION ALL
SELECT r.id, m.role || ' message ' || m.id FROM ended r JOIN longhaul_threads_message m ON m.run_id = r.id
WHERE m.created_at > r.at;
