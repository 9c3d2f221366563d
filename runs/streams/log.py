"""The log as streams read it: on a connection of its own, the frames built by Postgres, many runs a statement.

`live` asks for what came since a tail's end, event by event; `pages` for history, each page as one piece of bytes. Neither
goes through Django's pool, of which a thousand readers would want a thousand.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
from django.db import connection
from psycopg import sql

MOST_A_TAIL = 500  # events of one run that a round reads
MOST_BYTES = 256 * 1024  # of a page, but for an event that is larger alone
QUERY_SECONDS = 20.0  # after so long the connection counts as lost

# A server-sent event. Its JSON says the same as `RunEvent.as_dict`; a jsonb column's text has no line breaks. A payload that
# names a run of its own (a child's) is the last word on it there, too. Of a compacted event it has what follows the cursor.
_FRAME = """
'id: ' || {prefix} || e.seq || E'\\nevent: ' || e.type || E'\\ndata: {{"seq":' || e.seq || ',"type":"' || e.type
|| CASE WHEN e.payload ? 'run' THEN '"' ELSE '","run":"' || e.run_id || '"' END
|| ',"at":"' || to_char(e.at AT TIME ZONE 'UTC',
       CASE WHEN e.at = date_trunc('second', e.at) THEN 'YYYY-MM-DD"T"HH24:MI:SS"Z"' ELSE 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"' END)
|| CASE WHEN e.payload = '{{}}' THEN '"}}' ELSE '",' || substr((
       CASE WHEN e.payload ? 'from_seq' THEN longhaul_event_rest(e.payload, w.after) ELSE e.payload END)::text, 2) END || E'\\n\\n'
"""
_LIVE = f"""
SELECT w.n::int - 1, e.seq, e.type IN ('run.completed', 'run.failed', 'run.cancelled'), convert_to({_FRAME.format(prefix="''")}, 'UTF8'),
       CASE WHEN e.payload ? 'from_seq' THEN greatest((e.payload->>'from_seq')::bigint, w.after + 1) ELSE e.seq END
FROM unnest(%s::uuid[], %s::bigint[]) WITH ORDINALITY AS w(run, after, n)
CROSS JOIN LATERAL (
    SELECT * FROM longhaul_runs_event WHERE run_id = w.run AND seq > w.after ORDER BY seq LIMIT {MOST_A_TAIL}
) AS e
ORDER BY w.n, e.seq
"""  # noqa: S608 (of constants)
# One snapshot: what the run's row says of its end holds for the events beside it.
_PAGES = f"""
SELECT w.n::int - 1, r.id IS NOT NULL, coalesce(p.last, w.after), coalesce(p.many, 0), convert_to(p.body, 'UTF8'),
       coalesce(r.status IN ('completed', 'failed', 'cancelled') AND coalesce(p.last, w.after) >= r.last_seq, false),
       coalesce(r.last_seq, 0), p.first, coalesce(r.events_removed_through, 0)
FROM unnest(%s::uuid[], %s::bigint[], %s::int[], %s::text[]) WITH ORDINALITY AS w(run, after, most, prefix, n)
LEFT JOIN longhaul_runs_run r ON r.id = w.run
LEFT JOIN LATERAL (
    SELECT min(first) AS first, max(seq) AS last, count(*)::int AS many, string_agg(frame, '' ORDER BY seq) AS body
    FROM (
        SELECT seq, first, frame, sum(octet_length(frame)) OVER (ORDER BY seq) - octet_length(frame) AS before
        FROM (
            SELECT e.seq, coalesce((e.payload->>'from_seq')::bigint, e.seq) AS first, {_FRAME.format(prefix="w.prefix")} AS frame
            FROM (
                -- By what is stored, which is known unread: of a thousand large events a page is but a few.
                SELECT *, sum(pg_column_size(payload)) OVER (ORDER BY seq) - pg_column_size(payload) AS stored
                FROM (SELECT * FROM longhaul_runs_event
                      WHERE run_id = w.run AND seq > w.after ORDER BY seq LIMIT w.most) AS most
            ) AS e
            WHERE stored < {MOST_BYTES}
        ) AS framed
    ) AS sized
    WHERE before < {MOST_BYTES}
) AS p ON true
ORDER BY w.n
"""  # noqa: S608
# The run of the thread that comes after this one: as they came to stand in it, by the database's clock. A held one does not yet,
# and may be overtaken. When the run is gone its id says when it was made, nearly.
_NEXT = """
SELECT w.n::int - 1, t.id IS NOT NULL, r.id
FROM unnest(%s::uuid[], %s::uuid[]) WITH ORDINALITY AS w(thread, run, n)
LEFT JOIN longhaul_threads_thread t ON t.id = w.thread
LEFT JOIN longhaul_runs_run b ON b.id = w.run
LEFT JOIN LATERAL (
    SELECT n.id FROM longhaul_runs_run AS n
    WHERE n.thread_id = w.thread AND n.entered_at >= coalesce(b.entered_at, '-infinity'::timestamptz)
      AND (w.run IS NULL OR CASE WHEN b.entered_at IS NULL THEN n.id > w.run ELSE (n.entered_at, n.id) > (b.entered_at, b.id) END)
    ORDER BY n.entered_at, n.id LIMIT 1
) AS r ON true
ORDER BY w.n
"""
_THERE = "SELECT id FROM longhaul_runs_run WHERE id = ANY(%s::uuid[])"


@dataclass(frozen=True, slots=True)
class Fresh:
    """One event as its readers get it."""

    seq: int
    terminal: bool
    frame: bytes
    first: int  # before `seq` where it is a compacted one, which stands for several


@dataclass(frozen=True, slots=True)
class Page:
    """Some history of one run. `last` is the cursor after it; `over` says that nothing can follow."""

    there: bool
    last: int
    many: int
    body: bytes
    over: bool
    last_seq: int

    @classmethod
    def read(cls, after: int, row: Sequence[Any]) -> Page:
        """Return what a row says. Where events were removed, a `resume_gap` stands for them: it has no id."""
        _, there, last, many, body, over, last_seq, first, removed_through = row
        body = body or b""
        upto = removed_through if first is None else first - 1
        if upto > after:
            body = b'event: resume_gap\ndata: {"type":"resume_gap","from":%d,"to":%d}\n\n' % (after + 1, upto) + body
            if first is None:  # nothing is left, of a run that has ended
                last, over = upto, upto >= last_seq
        return cls(there, last, many, body, over, last_seq)


class Log:
    """One connection, that one question after another is asked on. Who asks while Postgres is away gets psycopg.Error, OSError or TimeoutError."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._turn = asyncio.Lock()

    async def live(self, after: Sequence[tuple[UUID, int]]) -> dict[int, list[Fresh]]:
        """Return what follows each cursor, in order, by its place in `after`; nothing for those without."""
        rows = await self._ask(_LIVE, [run for run, _ in after], [seq for _, seq in after])
        found: dict[int, list[Fresh]] = {}
        for place, *event in rows:
            found.setdefault(place, []).append(Fresh(*event))
        return found

    async def pages(self, wanted: Sequence[tuple[UUID, int, int, str]]) -> list[Page]:
        """Return a page for each (run, cursor, most events, what stands before the seq in an id)."""
        rows = await self._ask(_PAGES, *([each[column] for each in wanted] for column in range(4)))
        return [Page.read(wanted[row[0]][1], row) for row in rows]

    async def next_runs(self, of: Sequence[tuple[UUID, UUID | None]]) -> list[tuple[bool, UUID | None]]:
        """Return for each (thread, run before) whether the thread is there, and its next run."""
        if not of:
            return []
        rows = await self._ask(_NEXT, [thread for thread, _ in of], [run for _, run in of])
        return [(there, run) for _, there, run in rows]

    async def there(self, runs: Sequence[UUID]) -> set[UUID]:
        """Return those of the runs that have a row still."""
        return {run for (run,) in await self._ask(_THERE, list(runs))}

    async def _ask(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        try:
            async with self._turn, asyncio.timeout(QUERY_SECONDS):
                if self._connection is None:
                    self._connection = await self._connect()
                cursor = self._connection.cursor(binary=True)
                await cursor.execute(statement, parameters, prepare=True)
                return await cursor.fetchall()
        except BaseException:
            await self.close()  # also when cancelled: an answer that nobody took is still to come
            raise

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        given = connection.get_connection_params()
        for name in ("cursor_factory", "context", "autocommit"):
            given.pop(name, None)
        bounds = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 10_000}
        made = await psycopg.AsyncConnection.connect(
            **{"connect_timeout": 10, **bounds, **given, "application_name": self._name, "autocommit": True}
        )
        # Django's own, and no parameter of a connection.
        if role := connection.settings_dict["OPTIONS"].get("assume_role"):
            try:
                await made.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
            except BaseException:
                await made.close()
                raise
        return made

    async def close(self) -> None:
        made, self._connection = self._connection, None
        if made is not None:
            with contextlib.suppress(psycopg.Error, OSError):
                await made.close()
