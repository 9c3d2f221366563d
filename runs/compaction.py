"""The log of a run that ended long ago takes less room: many deltas become one that says the same.

A run of neighbours in the log that differ in nothing but their text (one message, one type, one tool call) becomes one event.
It has the seq, the time and the ordinal of the last of them, the text of all, `from_seq`: the seq of the first, and `pieces`:
how many characters each of them had, joined by commas. So a reader whose cursor lies within gets what follows it, to the
character. `pieces` are for us: `told` here, and `longhaul_event_rest` in SQL, give readers the event without.

Nothing else of the log changes: not one seq, and no text. What is lost is when each piece came, and where one ended.

A batch is one transaction: it holds the run, folds, and the last one of a log writes `Run.compacted_at`. What it has folded
says so itself, so whoever comes after a kill passes over it and goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from django.db import OperationalError, transaction
from psycopg.errors import LockNotAvailable

from threads import database

BATCH = 20_000  # seqs of the events that one transaction reads
MOST_BYTES = 16 * 1024  # of text: an event is folded of less than twice as much, and a larger delta stays as it is
MOST_PIECES = 4096  # less than BATCH: what the end of a batch cuts is folded by the next one, as a whole

# Its words are those of the index longhaul_run_to_compact.
_DUE = "FROM longhaul_runs_run WHERE finished_at < %s AND compacted_at IS NULL"
_RUN = f"""
SELECT id, last_seq, events_removed_through {_DUE} AND NOT id = ANY (%s::uuid[])
ORDER BY finished_at LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
"""
_COUNT = f"SELECT count(*) {_DUE}"
# What is folded already is like no other, for its `from_seq`. A fold ends where its texts pass a multiple of MOST_BYTES. One that
# the end of the batch may have cut is left to the next.
_FOLD = """
WITH held AS MATERIALIZED (
    SELECT seq, type, message_id, epoch, payload FROM longhaul_runs_event
    WHERE run_id = %(run)s AND seq > %(after)s AND seq <= %(upto)s FOR UPDATE NOWAIT
), deltas AS (
    SELECT seq, type, message_id, epoch, payload->>'text' AS text, payload - 'text' AS rest FROM held
    WHERE type IN ('text.delta', 'reasoning.delta', 'tool_call.arguments_delta')
      AND octet_length(payload->>'text') <= {bytes}
), begun AS (
    SELECT *, (lag(seq) OVER w = seq - 1 AND lag(type) OVER w = type AND lag(rest) OVER w = rest
               AND lag(message_id) OVER w IS NOT DISTINCT FROM message_id AND lag(epoch) OVER w IS NOT DISTINCT FROM epoch
              ) IS NOT TRUE AS begins
    FROM deltas WINDOW w AS (ORDER BY seq)
), stretches AS (
    SELECT *, count(*) FILTER (WHERE begins) OVER (ORDER BY seq) AS stretch FROM begun
), sized AS (
    SELECT *, sum(octet_length(text)) OVER w / {bytes} AS many_bytes, (row_number() OVER w - 1) / {pieces} AS many
    FROM stretches WINDOW w AS (PARTITION BY stretch ORDER BY seq)
), folds AS (
    SELECT min(seq) AS first, max(seq) AS last, string_agg(text, '' ORDER BY seq) AS text,
           string_agg(char_length(text)::text, ',' ORDER BY seq) AS pieces
    FROM sized GROUP BY stretch, many_bytes, many
), cut AS (
    SELECT first FROM folds WHERE %(more)s AND last = %(upto)s AND first > %(after)s + 1
), chosen AS (
    SELECT * FROM folds WHERE first < last AND first NOT IN (SELECT first FROM cut)
), kept AS (
    UPDATE longhaul_runs_event e
    SET payload = e.payload || jsonb_build_object('from_seq', chosen.first, 'text', chosen.text, 'pieces', chosen.pieces)
    FROM chosen WHERE e.run_id = %(run)s AND e.seq = chosen.last RETURNING 1
), folded AS (
    DELETE FROM longhaul_runs_event e USING chosen
    WHERE e.run_id = %(run)s AND e.seq >= chosen.first AND e.seq < chosen.last RETURNING 1
)
SELECT (SELECT count(*) FROM kept) + (SELECT count(*) FROM folded), (SELECT first - 1 FROM cut)
"""
_MARK = "UPDATE longhaul_runs_run SET compacted_at = longhaul_now() WHERE id = %s RETURNING 1"


@dataclass(frozen=True, slots=True)
class Batch:
    """What a transaction did: deltas that stand as fewer now, and whether that was the end of a log."""

    folded: int
    done: bool


class Compaction:
    """Compacts logs, the oldest first. What somebody else holds is left to the next one."""

    def __init__(self, before: datetime) -> None:
        self._before = before  # runs that ended before
        self._within: tuple[UUID, int] | None = None  # a log that is being compacted, and up to where it is
        self._held: list[UUID] = []

    def batch(self) -> Batch | None:
        """Compact a part of a log, in one transaction. None: nothing is due that nobody holds."""
        while True:
            run_id = None
            try:
                with transaction.atomic():
                    due = database.rows_of(_RUN, (self._before, self._held))
                    if not due:
                        return None
                    run_id, last, removed = due[0]
                    return self._compact(run_id, last, removed)
            except OperationalError as error:
                if run_id is None or not isinstance(error.__cause__, LockNotAvailable):
                    raise
                self._held.append(run_id)  # its thread is being deleted

    def _compact(self, run_id: UUID, last: int, removed: int) -> Batch:
        after = self._within[1] if self._within is not None and self._within[0] == run_id else removed
        folded, upto = fold(run_id, after, last)
        self._within = None if upto is None else (run_id, upto)
        if upto is None:
            database.rows_of(_MARK, (run_id,))
        return Batch(folded, upto is None)


def fold(run_id: UUID, after: int, last: int) -> tuple[int, int | None]:
    """Fold what follows a seq, one batch. In a transaction that holds the run, which has ended, and whose last seq this is.

    Returns how many deltas were folded, and after which seq to go on, None at the end of the log.
    Raises OperationalError (LockNotAvailable) where somebody holds a row of it.
    """
    upto = after + BATCH
    statement = _FOLD.format(pieces=MOST_PIECES, bytes=MOST_BYTES)
    given = {"run": run_id, "after": after, "upto": upto, "more": upto < last}
    folded, cut = database.rows_of(statement, given)[0]
    return folded, None if upto >= last else upto if cut is None else cut


def due(before: datetime) -> int:
    """Count the runs whose log is to be compacted."""
    return int(database.rows_of(_COUNT, (before,))[0][0])


def told(payload: Mapping[str, Any], after: int) -> Mapping[str, Any]:
    """Return an event's payload as a reader at this cursor gets it. See `longhaul_event_rest`, which does the same."""
    if "from_seq" not in payload:
        return payload
    rest = {name: value for name, value in payload.items() if name != "pieces"}
    if after >= (first := int(payload["from_seq"])):
        had = sum(int(each) for each in payload["pieces"].split(",")[: after - first + 1])
        rest |= {"from_seq": after + 1, "text": payload["text"][had:]}
    return rest
