"""Rows that nobody reads any more, removed by the hour. Beat asks for it, or `manage.py keep_house`; else they only take room.

    idempotency keys   after IDEMPOTENCY_KEY_SECONDS
    workers            so long after their end            WORKER_RETENTION_DAYS
    event logs         so long after their run's end      EVENT_RETENTION_DAYS     all but the terminal event
    threads            so long after their last word      THREAD_RETENTION_DAYS    with all that hangs on them

A log that stays is compacted (`runs.compaction`) COMPACT_AFTER_DAYS after the end of its run. That comes last in a pass.

What people made is kept for ever unless a setting says otherwise. Work is done in short transactions, oldest first, so a pass
may be killed at any moment and the next one goes on: with each batch of a log goes, in the same transaction, the mark up to
which it was removed (`Run.events_removed_through`). What somebody holds is left to the next pass, and so is what is more than
a pass has time for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.db import IntegrityError, connection, transaction
from django.db.models import Model, Q

from runs import compaction
from runs.compaction import Compaction
from runs.conf import settings
from runs.models import LIVE, REMOVED_AT_ONCE, Run
from threads import clock, database
from threads.models import IdempotencyKey, Message, Thread
from tools.models import Worker

logger = logging.getLogger("longhaul.runs")

PASS = timedelta(minutes=5)  # the longest that one pass begins new batches
BATCH = 1000  # rows a statement, so that none holds its locks for long
BATCHES = 100  # of keys and of workers a pass; the rest waits for the next one
RUNS = 200  # whose logs are removed in one transaction, if they are short
LOOKED_AT = 1000  # threads a query

# Ids rise with time: the oldest rows are the first of the primary key, so a batch is found without an index of its own.
_KEYS = "SELECT id FROM longhaul_threads_idempotencykey WHERE created_at < longhaul_now() - %s ORDER BY id LIMIT %s"
# A life that was never closed has nobody who sweeps; one that still beats keeps its row whatever its age, and so its children's
# first parent, whose own row may be older than theirs.
_WORKERS = """
SELECT w.id FROM longhaul_tools_worker w WHERE greatest(w.beat_at, w.gone_at) < longhaul_now() - %s
AND NOT EXISTS (SELECT 1 FROM longhaul_tools_worker c WHERE c.parent_id = w.id AND c.gone_at IS NULL) ORDER BY w.id LIMIT %s
"""
# An array, for it is made once: a plan may ask `IN (... LIMIT n FOR UPDATE SKIP LOCKED)` again for each row, and take more than n.
_DELETE = "DELETE FROM {} WHERE id = ANY (ARRAY({} FOR UPDATE SKIP LOCKED)) RETURNING 1"
_COUNT = "SELECT count(*) FROM ({}) AS due"
# Its words are those of the index longhaul_run_with_log, which names the runs whose log may be there, and few others.
_WITH_LOG = f"""
FROM longhaul_runs_run WHERE finished_at < %s
AND (events_removed_through = 0 OR events_removed_through >= {REMOVED_AT_ONCE}) AND events_removed_through < last_seq - 1
"""
_LOGS = f"SELECT id, last_seq, events_removed_through {_WITH_LOG} ORDER BY finished_at LIMIT %s FOR NO KEY UPDATE SKIP LOCKED"
_LOG = """
SELECT id, last_seq, events_removed_through FROM longhaul_runs_run
WHERE thread_id = %s AND events_removed_through < last_seq - 1 ORDER BY id LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
"""
_EVENTS = "DELETE FROM longhaul_runs_event WHERE run_id = %s AND seq <= %s"
_NEXT = "SELECT seq, payload->>'from_seq' FROM longhaul_runs_event WHERE run_id = %s AND seq > %s ORDER BY seq LIMIT 1"
_MARK = "UPDATE longhaul_runs_run SET events_removed_through = %s WHERE id = %s"
# What was said last stands last in both indexes. `old` is a first look; it is looked again under the lock of the thread.
_THREADS = """
SELECT t.id, t.created_at < %(before)s, coalesce(greatest(t.created_at, r.finished_at, m.created_at) < %(before)s, false)
    AND (r.id IS NULL OR r.finished_at IS NOT NULL) AS old
FROM (SELECT id, created_at FROM longhaul_threads_thread WHERE %(after)s::uuid IS NULL OR id > %(after)s::uuid
      ORDER BY id LIMIT %(limit)s) AS t
LEFT JOIN LATERAL (SELECT id, finished_at FROM longhaul_runs_run
                   WHERE thread_id = t.id ORDER BY id DESC LIMIT 1) AS r ON true
LEFT JOIN LATERAL (SELECT created_at FROM longhaul_threads_message
                   WHERE thread_id = t.id ORDER BY position DESC LIMIT 1) AS m ON true
ORDER BY t.id
"""


@dataclass(frozen=True, slots=True)
class Removed:
    """How many rows a pass has removed. `logs` are runs whose log is gone, `events` all rows of logs; `more`: it ran out of time.

    `compacted` are runs whose log stands in fewer rows now, `deltas` the rows that were folded, into few others.
    """

    idempotency_keys: int = 0
    workers: int = 0
    logs: int = 0
    events: int = 0
    threads: int = 0
    compacted: int = 0
    deltas: int = 0
    more: bool = False


class Pass:
    """One pass. `told` is called now and then with what was removed so far."""

    def __init__(self, patience: timedelta | None = PASS, told: Callable[[Removed], None] | None = None) -> None:
        self._until = None if patience is None else time.monotonic() + patience.total_seconds()
        self._told = told
        self.removed = Removed()

    def run(self) -> Removed:
        """Remove what is due. Returns what was removed since the first call. Safe beside others that do the same."""
        now = settings()
        self.removed = replace(self.removed, more=False)
        self._rows("idempotency_keys", IdempotencyKey, _KEYS, now.idempotency_key)
        if now.worker_retention is not None:
            self._rows("workers", Worker, _WORKERS, now.worker_retention)
        if now.event_retention is not None:
            self._logs(clock.now() - now.event_retention)
        if now.thread_retention is not None:
            self._threads(clock.now() - now.thread_retention)
        if now.compact_after is not None:
            self._compact(clock.now() - now.compact_after)
        return self.removed

    def _rows(self, kind: str, model: type[Model], which: str, age: timedelta) -> None:
        statement = _DELETE.format(model._meta.db_table, which)
        for _ in range(BATCHES):
            count = len(database.rows_of(statement, (age, BATCH)))
            self._count(**{kind: count})
            if count < BATCH:
                return
        self.removed = replace(self.removed, more=True)

    def _logs(self, before: datetime) -> None:
        while self._has_time():
            with transaction.atomic():
                ended = database.rows_of(_LOGS, (before, RUNS))
                room = REMOVED_AT_ONCE
                logs = events = 0
                for run_id, last, removed in ended:
                    if room < min(last - 1 - removed, REMOVED_AT_ONCE):
                        break  # for the next batch
                    through, count = _shorten(run_id, last, removed)
                    room -= through - removed
                    events += count
                    logs += int(through == last - 1)
            self._count(logs=logs, events=events)
            if not ended:
                return

    def _threads(self, before: datetime) -> None:
        for thread_id in due_threads(before):
            if not self._has_time():
                return
            if self._shorten_thread(thread_id, before) and _delete(thread_id, before):
                self._count(threads=1)

    def _shorten_thread(self, thread_id: UUID, before: datetime) -> bool:
        """Remove the thread's events, where they are too many for the transaction that removes the rest."""
        while self._has_time():
            with transaction.atomic():
                if not _idle(thread_id, before):
                    return False
                runs = Run.objects.filter(thread=thread_id).values_list("last_seq", "events_removed_through")
                if sum(last - removed for last, removed in runs) <= REMOVED_AT_ONCE:
                    return True
                ended = database.rows_of(_LOG, (thread_id,))
                if not ended:
                    return False  # another one is at it
                run_id, last, removed = ended[0]
                through, count = _shorten(run_id, last, removed)
            self._count(logs=int(through == last - 1), events=count)
        return False

    def _compact(self, before: datetime) -> None:
        doing = Compaction(before)
        while self._has_time() and (batch := doing.batch()) is not None:
            self._count(compacted=int(batch.done), deltas=batch.folded)

    def _has_time(self) -> bool:
        if self._until is None or time.monotonic() < self._until:
            return True
        self.removed = replace(self.removed, more=True)
        return False

    def _count(self, **more: int) -> None:
        self.removed = replace(
            self.removed, **{kind: getattr(self.removed, kind) + count for kind, count in more.items()}
        )
        if self._told is not None:
            self._told(self.removed)


def keep_house() -> Removed:
    """Make one pass."""
    said = time.monotonic()

    def tell(removed: Removed) -> None:
        nonlocal said
        if time.monotonic() - said > 60:  # seconds
            said = time.monotonic()
            logger.info("Housekeeping goes on: %s", removed, extra={"action": "housekeeping"})

    return Pass(told=tell).run()


def due() -> Removed:
    """Count what a pass without an end would remove now."""
    now, moment = settings(), clock.now()

    def rows(which: str, age: timedelta) -> int:
        return int(database.rows_of(_COUNT.format(which), (age, None))[0][0])

    logs = events = threads = 0
    if now.event_retention is not None:
        asked = f"SELECT count(*), coalesce(sum(last_seq - 1 - events_removed_through), 0)::bigint {_WITH_LOG}"
        logs, events = database.rows_of(asked, (moment - now.event_retention,))[0]
    if now.thread_retention is not None:
        threads = sum(1 for _ in due_threads(moment - now.thread_retention))
    return Removed(
        idempotency_keys=rows(_KEYS, now.idempotency_key),
        workers=0 if now.worker_retention is None else rows(_WORKERS, now.worker_retention),
        logs=logs,
        events=events,
        threads=threads,
        compacted=0 if now.compact_after is None else compaction.due(moment - now.compact_after),
    )


def due_threads(before: datetime) -> Iterator[UUID]:
    """Yield the threads that seem to have said nothing since, the oldest first.

    Walks the primary key, whose ids rise with time, to where threads are younger than that: those that are old and alive are
    looked at each time, by one entry of two indexes.
    """
    after: UUID | None = None
    while True:
        some = database.rows_of(_THREADS, {"before": before, "after": after, "limit": LOOKED_AT})
        for id, _, old in some:
            if old:
                yield id
        if len(some) < LOOKED_AT or not any(created for _, created, _ in some):
            return
        after = some[-1][0]


def _shorten(run_id: UUID, last: int, removed: int) -> tuple[int, int]:
    """Remove the next REMOVED_AT_ONCE events of an ended run, never the last one. In a transaction that holds the run.

    Returns up to which seq they are removed now, and how many rows that were.
    """
    through = min(last - 1, removed + REMOVED_AT_ONCE)
    if through < last - 1 and (following := database.rows_of(_NEXT, (run_id, through))):
        seq, begins = following[0]
        if begins is not None and int(begins) <= through:
            through = seq  # a compacted event stands for a range, which goes as a whole
    with connection.cursor() as cursor:
        cursor.execute(_EVENTS, (run_id, through))
        count = cursor.rowcount
        cursor.execute(_MARK, (through, run_id))
    return through, count


def _idle(thread_id: UUID, before: datetime) -> bool:
    """Return whether the thread is still there, silent and without a live run, and keep it so for this transaction.

    Whoever starts a run or saves a message locks the thread before, and waits for us; where they were first, we do not wait.
    """
    threads = Thread.objects.select_for_update(no_key=True, skip_locked=True).filter(
        pk=thread_id, created_at__lt=before
    )
    if not threads.exists():
        return False
    lately = Q(finished_at__gte=before) | Q(finished_at__isnull=True) | Q(status__in=LIVE)
    return not (
        Run.objects.filter(lately, thread=thread_id).exists()
        or Message.objects.filter(thread=thread_id, created_at__gte=before).exists()
    )


def _delete(thread_id: UUID, before: datetime) -> bool:
    try:
        with transaction.atomic():
            if not _idle(thread_id, before):
                return False
            Thread.objects.get(pk=thread_id).delete()
    except IntegrityError as error:  # Django's ProtectedError is one
        # A row of the host's names it, and is to stay: the threads after this one would wait for it at every pass.
        told = {"action": "thread.kept", "error": type(error).__name__}
        logger.warning("Thread %s is kept, for a row of the project's names it", thread_id, extra=told)
        return False
    return True


def told(removed: Removed) -> dict[str, Any]:
    """Return it as JSON has it."""
    return {name: getattr(removed, name) for name in Removed.__slots__}
