"""A crowd: the runs that a busy year leaves behind, with all that hangs on them, written by SQL in half a minute.

    crowd.fill(runs=100_000)

Most runs have completed, some failed or were cancelled, some hundred live: queued, held, running, waiting for a call or for
a person. One run in five called a tool, one in two thousand streamed a thousand deltas. The threads have many runs each; every
tenth is of one owner, `MANY`, the others are shared out among `crowd-1`, `crowd-2`, ... The rows say what such runs would
have left (`check_runs` finds nothing to complain of), but nobody works on the live ones. All ids are UUIDv7 of the time that
a row pretends to be made at, so tables and indexes lie as they would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.contrib.auth import get_user_model
from django.db import connection, transaction

MANY = "crowd-0"  # owns a tenth of everything
EVERY_LONG = 2000
TABLES = (
    "longhaul_threads_thread",
    "longhaul_threads_message",
    "longhaul_tools_toolcall",
    "longhaul_tools_toolattempt",
    "longhaul_runs_run",
    "longhaul_runs_leg",
    "longhaul_runs_step",
    "longhaul_runs_usage",
    "longhaul_runs_event",
)

_BEGUN = ["message.completed user", "run.queued start", "run.started", "leg.started", "message.created 1"]
_SPOKEN = ["text.delta 1", "message.completed 1", "leg.ended finished", "run.completed end_turn"]
_CALLED = [*_BEGUN, "text.delta 1", "tool_call.created", "message.completed 1", "leg.ended tools"]
# The log of a run of each kind: a type, and which message or reason it is about.
LOGS: dict[str, Sequence[str]] = {
    "short": [*_BEGUN, *_SPOKEN],
    "tool": [
        *_CALLED, "run.waiting", "tool_call.started", "tool_call.settled success", "message.completed tool", "run.queued tools",
        "leg.started", "message.created 2", "text.delta 2", "message.completed 2", "leg.ended finished", "run.completed end_turn",
    ],
    "long": [*_BEGUN, *["text.delta 1"] * 1000, *_SPOKEN],
    "failed": [*_BEGUN, "text.delta 1", "message.discarded", "leg.ended failed", "run.failed model_error"],
    "cancelled": [*_BEGUN, "message.discarded", "leg.ended cancelled", "run.cancelled cancelled"],
    "queued": ["message.completed user", "run.queued start"],
    "held": ["run.held"],
    "running": [*_BEGUN, "text.delta 1", "text.delta 1"],
    "waiting": [*_CALLED, "run.waiting"],
    "requires_action": [*_CALLED, "run.requires_action"],
}  # fmt: skip
LIVE = ("queued", "queued", "running", "running", "running", "waiting", "waiting", "requires_action")  # in turn


@dataclass(frozen=True)
class Crowd:
    """How many rows there are of what."""

    runs: int
    events: int
    messages: int
    threads: int
    owners: int
    live: int


_ID = """
CREATE OR REPLACE FUNCTION pg_temp.crowd_id(kind integer, n bigint, at timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE AS $$
    SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || lpad(to_hex(kind), 3, '0') || '8'
            || lpad(to_hex(n), 15, '0'))::uuid
$$
"""
_TABLES = """
CREATE TEMPORARY TABLE crowd (
    n integer PRIMARY KEY, id uuid, thread integer, thread_id uuid, turn bigint, owner_id integer, agent text, kind text,
    status text, at timestamptz, ended timestamptz, said uuid, first uuid, told uuid, last uuid, leg uuid, leg2 uuid, call uuid,
    asked jsonb, calling jsonb, answered jsonb, result jsonb);
CREATE TEMPORARY TABLE crowd_log (kind text, seq integer, leg integer, type text, about text);
"""
# `n` counts runs from 0, the oldest first. A thread's runs lie as far apart as there are threads, so the live ones, the last,
# have a thread each; the held ones, after them, wait on the threads of these.
_PLAN = """
INSERT INTO crowd
SELECT p.n, pg_temp.crowd_id(1, p.n, p.at), p.thread,
       pg_temp.crowd_id(0, p.thread, %(from)s::timestamptz + p.thread * %(gap)s::interval), p.n / %(threads)s::int,
       (%(owners)s::int[])[CASE WHEN p.thread %% 10 = 0 THEN 1 ELSE 2 + p.thread %% (cardinality(%(owners)s::int[]) - 1) END],
       (%(agents)s::text[])[1 + p.n %% 7 %% cardinality(%(agents)s::text[])],
       p.kind, CASE WHEN p.kind IN ('short', 'tool', 'long') THEN 'completed' ELSE p.kind END, p.at,
       CASE WHEN p.n < %(finished)s::int THEN p.at + interval '20 s' END,
       pg_temp.crowd_id(2, p.n, p.at), pg_temp.crowd_id(3, p.n, p.at), pg_temp.crowd_id(4, p.n, p.at),
       pg_temp.crowd_id(5, p.n, p.at), pg_temp.crowd_id(6, p.n, p.at), pg_temp.crowd_id(7, p.n, p.at),
       pg_temp.crowd_id(8, p.n, p.at)
FROM (SELECT n, (CASE WHEN n >= %(unheld)s::int THEN n - %(held)s::int ELSE n END) %% %(threads)s::int AS thread,
             %(from)s::timestamptz + n * %(gap)s::interval AS at,
             CASE WHEN n >= %(unheld)s::int THEN 'held'
                  WHEN n >= %(finished)s::int THEN (%(live)s::text[])[1 + n %% cardinality(%(live)s::text[])]
                  WHEN chance %% %(long)s::int = 0 THEN 'long'
                  WHEN chance %% 23 = 5 THEN 'failed' WHEN chance %% 29 = 7 THEN 'cancelled'
                  WHEN chance %% 5 = 1 THEN 'tool' ELSE 'short' END AS kind
      FROM (SELECT n, (n::bigint * 7919 + 12345) %% 1000003 AS chance FROM generate_series(0, %(runs)s::int - 1) AS n) AS s) AS p
"""
# What was said: the question, the message that calls, the answer (as many words as a long run streamed), the call's result.
_SAID = """
UPDATE crowd SET
    asked = jsonb_build_array(jsonb_build_object('type', 'text', 'text', 'Question ' || n || ', and what it is about.')),
    calling = jsonb_build_array(
        jsonb_build_object('type', 'text', 'text', 'Let me look.'),
        jsonb_build_object('type', 'tool_call', 'tool_call', call, 'name', 'take', 'arguments', '{"number": 1}'::jsonb)),
    answered = jsonb_build_array(jsonb_build_object('type', 'text', 'text',
        CASE kind WHEN 'long' THEN repeat('word after ', 1001) ELSE 'The answer to question ' || n || '.' END)),
    result = jsonb_build_array(jsonb_build_object(
        'type', 'tool_result', 'tool_call', call, 'name', 'take', 'outcome', 'success', 'result', 1))
"""
_THREADS = """
INSERT INTO longhaul_threads_thread (id, owner_id, agent, title, summary, metadata, overrides, created_at)
SELECT DISTINCT ON (thread) thread_id, owner_id, agent, 'Conversation ' || thread, '', '{}', '{}', at FROM crowd ORDER BY thread, n
"""
_WORKER = """
INSERT INTO longhaul_tools_worker (id, name, kind, host, pid, lock_key, started_at, beat_at, draining)
VALUES (pg_temp.crowd_id(9, 0, longhaul_now()), 'agents@crowd', 'agents', 'crowd', 1, hashtextextended(gen_random_uuid()::text, 0),
        longhaul_now(), longhaul_now(), false)
RETURNING id
"""
_RUNS = """
INSERT INTO longhaul_runs_run (
    id, thread_id, owner_id, agent, status, stop_reason, origin, depth, busy, priority, overrides, save_mode, metadata,
    input_message_id, fingerprint, epoch, holder, dispatch_seq, pending_message_id, pending_ordinal, leg_deadline, publishes,
    next_publish_at, last_seq, steps, legs, lost, bad_calls, model_tries, input_tokens, output_tokens, cost, output, error,
    created_at, queued_at, started_at, finished_at)
SELECT id, thread_id, owner_id, agent, status,
       CASE status WHEN 'completed' THEN 'end_turn' WHEN 'failed' THEN 'model_error' WHEN 'cancelled' THEN 'cancelled' ELSE '' END,
       'start', 0, 'enqueue', 0, '{}', 'prompt_and_output', jsonb_build_object('customer', n % 1000), said, '',
       CASE WHEN kind IN ('tool', 'cancelled') THEN 2 WHEN kind IN ('queued', 'held') THEN 0 ELSE 1 END,
       CASE WHEN kind = 'running' THEN %s::uuid END,
       CASE kind WHEN 'tool' THEN 2 WHEN 'held' THEN 0 ELSE 1 END,
       CASE WHEN kind = 'running' THEN first END, CASE WHEN kind = 'running' THEN 2 ELSE 0 END,
       CASE WHEN kind = 'running' THEN longhaul_now() + interval '1 day' END,
       CASE WHEN kind = 'queued' THEN 1 ELSE 0 END, CASE WHEN kind = 'queued' THEN longhaul_now() + interval '10 s' END,
       l.length, CASE WHEN kind = 'tool' THEN 2 WHEN kind IN ('short', 'long', 'waiting', 'requires_action') THEN 1 ELSE 0 END,
       CASE WHEN kind = 'tool' THEN 2 WHEN kind IN ('queued', 'held') THEN 0 ELSE 1 END,
       0, 0, 0, CASE WHEN kind IN ('queued', 'held', 'running') THEN 0 ELSE 900 END,
       CASE WHEN kind IN ('queued', 'held', 'running') THEN 0 ELSE 60 END, 0,
       CASE WHEN status = 'completed' THEN to_jsonb('The answer to question ' || n || '.') END,
       CASE WHEN status = 'failed' THEN '{"code": "server", "message": "The model service failed.", "retryable": true}'::jsonb END,
       at, at, CASE WHEN kind NOT IN ('queued', 'held') THEN at + interval '1 s' END, ended
FROM crowd JOIN (SELECT kind, count(*) AS length FROM crowd_log GROUP BY kind) AS l USING (kind) ORDER BY n
"""
_MESSAGES = """
INSERT INTO longhaul_threads_message (
    id, thread_id, run_id, step, role, status, position, content, metadata, client_id, shown, created_at)
SELECT m.id, c.thread_id, c.id, m.step, m.role, m.status, CASE WHEN m.status <> 'waiting' THEN c.turn * 4 + m.place END, m.content,
       '{}', '', true, c.at
FROM crowd c CROSS JOIN LATERAL (VALUES
    (said, NULL::integer, 'user', CASE kind WHEN 'held' THEN 'waiting' ELSE 'completed' END, 1, asked, true),
    (first, 1, 'assistant',
     CASE WHEN kind = 'running' THEN 'pending' WHEN kind IN ('failed', 'cancelled') THEN 'discarded' ELSE 'completed' END, 2,
     CASE WHEN kind IN ('running', 'failed', 'cancelled') THEN '[]'
          WHEN kind IN ('tool', 'waiting', 'requires_action') THEN calling ELSE answered END, kind NOT IN ('queued', 'held')),
    (told, 1, 'tool', 'completed', 3, result, kind = 'tool'),
    (last, 2, 'assistant', 'completed', 4, answered, kind = 'tool')
    ) AS m(id, step, role, status, place, content, there)
WHERE m.there ORDER BY c.n, m.place
"""
_CALLS = """
INSERT INTO longhaul_tools_toolcall (
    id, run_id, message_id, step, index, name, arguments, status, outcome, result, attempt, max_attempts, idempotency_key,
    idempotent, atomic, deferred, timeout, queue, next_publish_at, publishes, created_at, settled_at)
SELECT call, id, first, 1, 0, 'take', '{"number": 1}',
       CASE kind WHEN 'tool' THEN 'settled' WHEN 'waiting' THEN 'requested' ELSE 'awaiting_approval' END,
       CASE kind WHEN 'tool' THEN 'success' ELSE '' END, CASE kind WHEN 'tool' THEN '1'::jsonb END, 1, 3, call::text, true, false,
       false, interval '60 s', '', CASE kind WHEN 'waiting' THEN longhaul_now() + interval '10 s' END, 1, at,
       CASE kind WHEN 'tool' THEN ended END
FROM crowd WHERE kind IN ('tool', 'waiting', 'requires_action') ORDER BY n
"""
_ATTEMPTS = """
INSERT INTO longhaul_tools_toolattempt (id, call_id, number, worker_id, task_id, started_at, ended_at, outcome)
SELECT pg_temp.crowd_id(10, n, at), call, 1, %s::uuid, '', at, ended, 'success' FROM crowd WHERE kind = 'tool' ORDER BY n
"""
_LEGS = """
INSERT INTO longhaul_runs_leg (id, run_id, number, epoch, worker_id, worker, task_id, started_at, ended_at, reason)
SELECT l.id, c.id, l.number, l.number, %s::uuid, 'agents@crowd', '', c.at, CASE WHEN c.kind <> 'running' THEN c.at + interval '9 s' END,
       l.reason
FROM crowd c CROSS JOIN LATERAL (VALUES
    (leg, 1, CASE WHEN kind IN ('tool', 'waiting', 'requires_action') THEN 'tools' WHEN kind = 'running' THEN ''
                  WHEN status = 'completed' THEN 'finished' ELSE kind END, kind NOT IN ('queued', 'held')),
    (leg2, 2, 'finished', kind = 'tool')) AS l(id, number, reason, there)
WHERE l.there ORDER BY c.n, l.number
"""
_STEPS = """
INSERT INTO longhaul_runs_step (
    id, run_id, number, leg_id, epoch, message_id, model, instructions, tool_names, schema_digest, options, context, created_at)
SELECT pg_temp.crowd_id(10 + s.number, c.n, c.at), c.id, s.number, s.leg, s.number, s.message, 'openai:crowd', 'Do as told.',
       '["take"]', '', '{"tool_choice": "auto"}',
       jsonb_build_object('pinned', '[]'::jsonb, 'first', 1, 'last', c.turn * 4 + s.place, 'skipped', '[]'::jsonb), c.at
FROM crowd c CROSS JOIN LATERAL (VALUES
    (1, leg, first, 1, kind IN ('short', 'long', 'tool', 'waiting', 'requires_action')), (2, leg2, last, 3, kind = 'tool')
    ) AS s(number, leg, message, place, there)
WHERE s.there ORDER BY c.n, s.number
"""
_USAGE = """
INSERT INTO longhaul_runs_usage (
    id, run_id, step, epoch, message_id, model, input_tokens, output_tokens, cached_tokens, reasoning_tokens, discarded, created_at)
SELECT pg_temp.crowd_id(13, n, at), id, 1, 1, first, 'openai:crowd', 900, 60, 0, 0, status IN ('failed', 'cancelled'), at
FROM crowd WHERE kind NOT IN ('queued', 'held', 'running') ORDER BY n
"""
_EVENTS = """
INSERT INTO longhaul_runs_event (run_id, seq, type, at, epoch, message_id, ordinal, payload)
SELECT c.id, l.seq, l.type, c.at + l.seq * interval '10 ms',
       CASE WHEN l.type ~ '^(leg|text|message.cr)' THEN l.leg END,
       CASE l.about WHEN '1' THEN first WHEN '2' THEN last END, CASE WHEN l.type = 'text.delta' THEN l.seq - 5 END,
       CASE WHEN l.type = 'text.delta' THEN jsonb_build_object('message', CASE l.about WHEN '1' THEN first ELSE last END, 'text',
                CASE WHEN kind = 'long' THEN 'word after ' WHEN l.about = '2' OR kind = 'short' THEN answered->0->>'text'
                     ELSE 'Let me look.' END)
            WHEN l.about = 'user' THEN jsonb_build_object('message', said, 'role', 'user', 'client_id', '', 'content', asked)
            WHEN l.about = 'tool' THEN jsonb_build_object('message', told, 'role', 'tool', 'step', 1, 'content', result)
            WHEN l.type = 'message.discarded' THEN jsonb_build_object('message', first, 'reason', kind)
            WHEN l.type LIKE 'message.%' THEN jsonb_build_object(
                'message', CASE l.about WHEN '2' THEN last ELSE first END, 'role', 'assistant', 'step', l.about::integer)
                || CASE WHEN l.type = 'message.created' THEN '{}' ELSE jsonb_build_object(
                    'content', CASE WHEN l.about = '1' AND kind <> 'short' AND kind <> 'long' THEN calling ELSE answered END) END
            WHEN l.type LIKE 'leg.%' THEN jsonb_strip_nulls(jsonb_build_object(
                'leg', l.leg, 'epoch', l.leg, 'worker', 'agents@crowd', 'reason', nullif(l.about, '')))
            WHEN l.type LIKE 'tool_call.%' THEN jsonb_strip_nulls(jsonb_build_object(
                'tool_call', call, 'name', 'take', 'message', first, 'outcome', nullif(l.about, ''),
                'result', CASE WHEN l.about <> '' THEN 1 END))
            WHEN l.type IN ('run.completed', 'run.failed', 'run.cancelled') THEN jsonb_build_object('stop_reason', l.about)
            WHEN l.type IN ('run.waiting', 'run.requires_action') THEN jsonb_build_object('tool_calls', jsonb_build_array(call))
            WHEN l.about <> '' THEN jsonb_build_object('reason', l.about) ELSE '{}' END
FROM crowd c JOIN crowd_log l USING (kind) ORDER BY c.n, l.seq
"""


def fill(
    runs: int = 100_000,
    *,
    threads: int | None = None,
    owners: int = 500,
    agents: Sequence[str] = ("bench", "counter", "speaker"),
    over: timedelta = timedelta(days=365),
) -> Crowd:
    """Write a crowd, in one transaction, and ANALYZE it. The database has none yet.

    runs: at least 200; some hundred of them live. threads: a twentieth of that unless said. agents: their names in turn. over:
    the time in which they were started, until now.
    """
    threads = threads or runs // 20
    live = min(400, threads // 2)
    held = live // 8
    users = get_user_model()
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT longhaul_now(), rolsuper FROM pg_roles WHERE rolname = current_user")
        now, is_superuser = cursor.fetchone()
        if is_superuser:  # nothing refers to what is not there, and each look costs as much as the row
            cursor.execute("SET LOCAL session_replication_role = replica")
        made = users.objects.bulk_create(users(username=f"crowd-{n}", password="!") for n in range(owners))
        for statement in (_ID, *_TABLES.split(";\n")):
            if statement.strip():
                cursor.execute(statement)
        cursor.executemany(
            "INSERT INTO crowd_log VALUES (%s, %s, %s, %s, %s)",
            [
                (kind, seq, 1 + log[: seq - 1].count("run.queued tools"), *said.partition(" ")[::2])
                for kind, log in LOGS.items()
                for seq, said in enumerate(log, start=1)
            ],
        )
        values: dict[str, Any] = {
            "runs": runs,
            "threads": threads,
            "owners": [user.pk for user in made],
            "agents": list(agents),
            "from": now - over,
            "gap": over / runs,
            "finished": runs - live,
            "unheld": runs - held,
            "held": held,
            "live": list(LIVE),
            "long": EVERY_LONG,
        }
        cursor.execute(_PLAN, values)
        cursor.execute(_SAID)
        cursor.execute("ANALYZE crowd")
        cursor.execute(_THREADS)
        cursor.execute(_WORKER)
        worker = cursor.fetchone()
        for statement in (_RUNS, _MESSAGES, _CALLS, _ATTEMPTS, _LEGS, _STEPS, _USAGE, _EVENTS):
            named = "%s" in statement
            cursor.execute(
                statement.replace("%", "%%").replace("%%s", "%s") if named else statement, worker if named else None
            )
        cursor.execute("DROP TABLE crowd, crowd_log")
        if is_superuser:
            cursor.execute("SET LOCAL session_replication_role = origin")
        for table in TABLES:
            cursor.execute(f"ANALYZE {table}")
        cursor.execute(
            "SELECT (SELECT count(*) FROM longhaul_runs_event), (SELECT count(*) FROM longhaul_threads_message)"
        )
        events, messages = cursor.fetchone()
    return Crowd(runs, events, messages, threads, owners, live)
