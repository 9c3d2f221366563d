"""Find what is overdue in Postgres and move it on: the watcher looks 4 times a second, the sweep once.

They run in a thread of every control process, one of them at a time (an advisory lock), and not by way of the broker
that they must survive. Each pass is bounded, skips what is locked, and repeats safely.

A worker is dead by its lock when the watcher, in its present unbroken session, has seen that lock held and now sees it
free in two looks 30 ms apart; dead by time when it was silent for the TTL, counted only while it was watched: an outage of
Postgres, or of a pooler before it, kills nobody. A watcher without a session, and a life without a lock, know only time.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal, TypeVar
from uuid import UUID

import psycopg
import psycopg.errors
from celery import current_app
from django.db import DatabaseError, InterfaceError, OperationalError, connection, transaction

from runs import admission, lifecycle, quotas
from runs.conf import settings
from runs.models import Run, StopReason
from tools import lifecycle as calls
from tools import messages, presence
from tools import tasks as tool_tasks

T = TypeVar("T")

logger = logging.getLogger("longhaul.sweep")

LOOK_SECONDS = 0.25
SWEEP_SECONDS = 1.0
SECOND_LOOK_SECONDS = 0.03
# A look adds no more than this to what a life was silent: what answered late may have kept the beats back as well.
STEP_SECONDS = 1.0
# Without sessions the sweep is elected for so long at a time: a pooler can be paused only between two transactions.
TURN_SECONDS = 2.0
# And Postgres ends a turn whose process says nothing more: its machine vanished, or it was stopped, or it waits for a pooler
# that waits for the end of its turn.
TURN_SILENCE = timedelta(seconds=5)
OVERDUE_GRACE = timedelta(
    seconds=5
)  # for what passed its time while nobody watched, and for a tool that ends at its limit
SWEEP_LOCK = 0x6C6F6E676861756C  # "longhaul": whoever holds it sweeps
SWEPT_WITHIN = timedelta(seconds=10)  # the watcher asks Postgres four times a second
# A worker of several queues goes by the first of its kinds; who holds the sweep's lock is a control worker too, while it asks
# Postgres something every now and then: a process that was stopped keeps its locks. (Of another role's session we see no times.)
SOMEBODY_SWEEPS = """
SELECT EXISTS (SELECT 1 FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
               WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
                 AND (l.classid::bigint << 32) | l.objid::bigint = %s
                 AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                 AND coalesce(a.state_change, clock_timestamp()) > clock_timestamp() - %s)
"""
BATCH = 200
# How long a pass waits for a row that another transaction holds, until it leaves it to the next pass; and for each further
# one, for many may be held by the same transaction.
PATIENCE = timedelta(milliseconds=500)
PATIENCE_SPENT = timedelta(milliseconds=20)

_WORKERS = """
SELECT w.id, w.lock_key, l.key IS NOT NULL, extract(epoch FROM longhaul_now() - w.beat_at)::float, w.beat_at
FROM longhaul_tools_worker w
LEFT JOIN (SELECT (classid::bigint << 32) | objid::bigint AS key FROM pg_locks
           WHERE locktype = 'advisory' AND objsubid = 1 AND granted
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())) AS l ON l.key = w.lock_key
WHERE w.gone_at IS NULL
"""


# Rows that wait out a backoff of more than a second, for their messages are out.
_WAITING = {
    "run": "longhaul_runs_run WHERE status = 'queued' AND publishes > 1 AND linger_until IS NULL AND",
    "call": "longhaul_tools_toolcall WHERE status IN ('requested', 'retrying') AND publishes > 1 AND",
}
_SOON = " next_publish_at > longhaul_now() + interval '1 second'"


class Held(Exception):
    """Another transaction holds this row: it is left to the next pass."""


@dataclass
class Done:
    """What one pass has moved, for the log and for `sweep_runs`."""

    published_runs: int = 0
    published_calls: int = 0
    reclaimed_runs: list[UUID] = field(default_factory=list)
    reclaimed_calls: list[UUID] = field(default_factory=list)
    expired_runs: list[UUID] = field(default_factory=list)
    dead_workers: list[UUID] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())


class Watcher:
    """Judges who is dead. Its memory lives as long as its connection: with a new one it has seen nothing."""

    def __init__(self, *, patient: bool = True) -> None:
        self.patient = patient  # False: for a pass by hand, that has watched nothing and takes the rows' word
        self._connection: presence.NativeConnection | None = None
        self._seen: set[tuple[UUID, int]] = set()
        self._silent: dict[
            UUID, tuple[datetime, float]
        ] = {}  # the last beat, and the seconds that we have seen no other
        self._since = 0.0
        self._looked = 0.0
        self._sweeping = False
        self._election: presence.NativeConnection | None = None  # without sessions, for nothing else
        self._turn_ends = 0.0

    def session(self) -> presence.NativeConnection:
        if self._connection is None or self._connection.closed:
            self.drop()
            self._connection = presence.connect("longhaul watcher")
            self._seen.clear()
            self._silent.clear()
            self._since = self._looked = time.monotonic()
        return self._connection

    def drop(self) -> None:
        dropped = self._connection, self._election
        self._connection = self._election = None
        self._sweeping = False
        for each in dropped:
            if each is not None:
                each.close()

    def elected(self) -> bool:
        """Return whether this process is the one that sweeps."""
        session = self.session()
        if not session.sessions:
            return self._has_turn()
        if not self._sweeping:
            row = session.execute("SELECT pg_try_advisory_lock(%s)", (SWEEP_LOCK,)).fetchone()
            self._sweeping = bool(row and row[0])
        return self._sweeping

    def _has_turn(self) -> bool:
        """Hold the same lock in a transaction, for as long as that a pooler's connection is ours. A turn follows a turn.

        That transaction reads no table: whoever alters one, or empties it, would wait for the turn's end, and the sweep,
        on its other connection, for them.
        """
        if self._sweeping and time.monotonic() < self._turn_ends:
            return True
        swept, self._sweeping = self._sweeping, False
        if self._election is None:
            self._election = presence.connect("longhaul election")
        session = self._election
        try:
            if swept:
                session.execute("COMMIT")
            session.execute("BEGIN")
            row = session.execute("SELECT pg_try_advisory_xact_lock(%s)", (SWEEP_LOCK,)).fetchone()
            if not (row and row[0]):
                session.execute("ROLLBACK")
                return False
            limit = f"{int(TURN_SILENCE.total_seconds())}s"
            session.execute("SELECT set_config('idle_in_transaction_session_timeout', %s, true)", (limit,))
        except psycopg.Error:
            session.close()  # the turn was lost, and no more than that: what was watched is kept
            self._election = None
            return False
        self._sweeping, self._turn_ends = True, time.monotonic() + TURN_SECONDS
        return True

    @property
    def watched_seconds(self) -> float:
        """For how long this session has watched without a break."""
        return time.monotonic() - self._since if self.patient else math.inf

    def dead(self) -> dict[UUID, bool]:
        """Return the lives that are dead: True when a beat is missed too (or by time), False by the lock alone."""
        session = self.session()
        asked = time.monotonic()
        rows = session.execute(_WORKERS).fetchall()
        if time.monotonic() - asked > STEP_SECONDS:
            self._since = time.monotonic()  # an outage that broke nothing
        free = {(id, key): silent for id, key, held, silent, _ in rows if not held and (id, key) in self._seen}
        if session.sessions:  # elsewhere all locks may have been lost, and this connection not
            self._seen |= {(id, key) for id, key, held, *_ in rows if held}
        watched = self._watch(rows)
        silence = {id: min(silent, watched[id]) for id, _, _, silent, _ in rows}
        late = {id for id, seconds in silence.items() if seconds > settings().presence_ttl.total_seconds()}
        if not free and not late:
            return {}
        if free:
            time.sleep(SECOND_LOOK_SECONDS)
            again = {(id, key) for id, key, held, *_ in session.execute(_WORKERS).fetchall() if not held}
            free = {life: silent for life, silent in free.items() if life in again}
        missed = presence.MISSED.total_seconds()
        by_lock = {id: silent > missed for (id, _), silent in free.items()}
        return {id: id in late or by_lock[id] for id in {*by_lock, *late}}

    def _watch(self, rows: Sequence[tuple[Any, ...]]) -> Mapping[UUID, float]:
        """Return for how many seconds each life was watched since its last beat, by us and look by look.

        A pooler, or a server that was frozen, may answer after minutes as if nothing had been. Whoever beats was as cut off
        as we were.
        """
        if not self.patient:
            return dict.fromkeys([id for id, *_ in rows], math.inf)
        now = time.monotonic()
        step, self._looked = min(now - self._looked, STEP_SECONDS), now
        before, self._silent = self._silent, {}
        for id, *_, beat_at in rows:
            seen, seconds = before.get(id, (None, 0.0))
            self._silent[id] = (beat_at, seconds + step if seen == beat_at else 0.0)
        return {id: seconds for id, (_, seconds) in self._silent.items()}


class Sweep:
    """One pass after another over what is overdue. `look` is the watcher's, `sweep` the slower rest."""

    def __init__(self, *, patient: bool = True, publishes: bool = True) -> None:
        self.watcher = Watcher(patient=patient)
        self._publishes = publishes  # False: a rehearsal, whose transaction is rolled back
        self._patience = PATIENCE
        # Of lives that are dead by their lock alone: what an earlier look could not take, for somebody held the row.
        self._owed: dict[UUID, set[tuple[UUID, int]]] = {}

    def _announce(self, answer: Mapping[str, Any]) -> None:
        if self._publishes:
            admission.announce(answer)

    def look(self) -> Done:
        """Reclaim from the dead, and publish what is due."""
        done = Done()
        self._patience = PATIENCE
        with messages.until_refused():
            dead = self.watcher.dead()
            self._owed = {life: rows for life, rows in self._owed.items() if life in dead}
            for life, missed in dead.items():
                self._bury(life, missed, done)
            self._publish(done)
        return done

    def sweep(self) -> Done:
        """End what passed its time, and take what names a life that is no longer there."""
        done = Done()
        self._patience = PATIENCE
        with messages.until_refused():
            for life, missed in self._gone():
                self._bury(life, missed, done)
            self._overdue(done)
            self._hurry()
        return done

    # -- the dead --

    def _bury(self, life: UUID, missed: bool, done: Done) -> None:
        """Take everything from a dead life: runs at once, calls as they declare themselves; then close it.

        From one that is dead by its lock alone once: what it claims after that shows that it lives and has only lost its
        connection, which it mends within two seconds. If not, a beat is missed, and all is taken.
        """
        owed = None if missed else self._owed.get(life)
        kept: set[tuple[UUID, int]] = set()
        left = False
        for run_id, epoch in self._rows(
            "SELECT id, epoch FROM longhaul_runs_run WHERE holder = %s AND status = 'running'", life
        ):
            if owed is not None and (run_id, epoch) not in owed:
                left = True
            elif not self._reclaim_run(run_id, epoch, life, done):
                kept.add((run_id, epoch))
        for call_id, attempt, safe in self._rows(
            "SELECT id, attempt, atomic OR coalesce(idempotent, false) FROM longhaul_tools_toolcall"
            " WHERE holder = %s AND status = 'running'",
            life,
        ):
            if owed is not None and (call_id, attempt) not in owed:
                left = True
                continue
            if safe or missed:
                if not self._reclaim_call(call_id, attempt, life, done):
                    kept.add((call_id, attempt))
            else:
                left = True  # its effect may be half done: only when a beat is missed too
        self._owed[life] = kept
        left |= bool(kept)
        if left:
            return
        try:
            closed = self._patiently(lambda: self._close(life))
        except Held:
            return
        if closed:
            done.dead_workers.append(life)
            logger.warning("Worker %s is gone", life, extra={"action": "worker.gone", "life": life})

    def _close(self, life: UUID) -> bool:
        """Close a dead life, unless it has locked or beaten again since it was seen: then it goes on as it is."""
        closed = self._rows(
            "UPDATE longhaul_tools_worker SET gone_at = longhaul_now() WHERE id = %s AND gone_at IS NULL"
            " AND (NOT longhaul_worker_locked(id) OR beat_at < longhaul_now() - %s) RETURNING id",
            life,
            settings().presence_ttl,
        )
        return bool(closed)

    def _moved(self, what: str, work: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | Literal[False] | None:
        """Make a transition of one row, and return its answer; False when somebody else holds the row."""
        try:
            return self._patiently(work)
        except Held:
            logger.warning("%s is held by another transaction; the next pass tries again", what)
            return False

    def _patiently(self, work: Callable[[], T]) -> T:
        """Do work that locks a row, in a transaction of its own. Raises Held when somebody holds that row for too long.

        For the transaction only: behind a pool a setting of the session would be somebody else's in the end.
        """
        try:
            with transaction.atomic():
                with connection.cursor() as cursor:
                    milliseconds = int(self._patience.total_seconds() * 1000)
                    cursor.execute("SELECT set_config('lock_timeout', %s, true)", (f"{milliseconds}ms",))
                return work()
        except OperationalError as error:
            if not isinstance(error.__cause__, psycopg.errors.LockNotAvailable):
                raise
            self._patience = PATIENCE_SPENT
            raise Held from error

    def _gone(self) -> list[tuple[UUID, bool]]:
        """Return the lives that still hold something and have no row, or a closed one; and whether a beat is missed too.

        A claim that was under way when its life was closed is of a process that may well be alive.
        """
        rows = self._rows(
            "SELECT h.holder, coalesce(w.beat_at < longhaul_now() - %s, true)"
            " FROM (SELECT DISTINCT holder FROM longhaul_runs_run WHERE status = 'running'"
            " UNION SELECT DISTINCT holder FROM longhaul_tools_toolcall WHERE status = 'running') AS h"
            " LEFT JOIN longhaul_tools_worker w ON w.id = h.holder WHERE w.id IS NULL OR w.gone_at IS NOT NULL",
            presence.MISSED,
        )
        return [(life, missed) for life, missed in rows]

    def _reclaim_run(self, run_id: UUID, epoch: int, holder: UUID, done: Done) -> bool:
        """Return whether nothing is left to do: False when somebody else has the run locked."""
        answer = self._moved(f"Run {run_id}", lambda: lifecycle.reclaim(run_id, epoch, holder))
        if answer:
            done.reclaimed_runs.append(run_id)
            told = {
                "action": "run.reclaimed",
                "run": run_id,
                "epoch": epoch,
                "life": holder,
                "status": answer["status"],
            }
            logger.warning("Run %s reclaimed from a worker that is gone or late", run_id, extra=told)
            self._announce(answer)
        return answer is not False

    def _reclaim_call(self, call_id: UUID, attempt: int, holder: UUID, done: Done) -> bool:
        """Return whether nothing is left to do, as for a run."""
        answer = self._moved(f"Call {call_id}", lambda: calls.reclaim(call_id, attempt, holder=holder))
        if answer:
            done.reclaimed_calls.append(call_id)
            told = {"run": answer.get("run"), "tool_call": call_id, "attempt": attempt, "life": holder}
            told |= {"action": "call.reclaimed", "code": answer.get("code")}
            logger.warning("Call %s reclaimed: %s", call_id, answer.get("code"), extra=told)
            self._announce(answer)
        return answer is not False

    # -- the overdue --

    def _publish(self, done: Done) -> None:
        quotas.release()
        for run_id, dispatch_seq, agent in lifecycle.due(BATCH):
            done.published_runs += 1
            if self._publishes:
                admission.publish(run_id, dispatch_seq, agent)
        for run_id, dispatch_seq, agent in lifecycle.release():
            done.published_runs += 1
            if self._publishes:
                admission.publish(run_id, dispatch_seq, agent)
        due = calls.due(BATCH)
        done.published_calls += len(due)
        if due and self._publishes:
            runs = {call.run_id for call in due}
            agents: dict[UUID, str] = dict(Run.objects.filter(pk__in=runs).values_list("pk", "agent"))
            for call in due:
                agent = agents.get(call.run_id, "")
                tool_tasks.publish(call.call_id, call.attempt, call.timeout, call.queue, call.name, call.run_id, agent)
        # Whoever leaves room lets out who waits for it; this is for what dies in between, and for rates: time passes.
        if self._publishes:
            done.published_calls += tool_tasks.let_out()
        else:
            done.published_calls += len(calls.let_out())

    def _hurry(self) -> None:
        """Messages that the broker lost need not wait out their backoff: with fewer there than rows wait, all are due in a second."""
        default = {"run": settings().agents_queue, "call": settings().tools_queue}
        for kind, waiting in _WAITING.items():
            # a tool, and an agent, may name a queue for itself
            own = "queue" if kind == "call" else "split_part(lane, E'\\n', 1)"
            counts: Counter[str] = Counter()
            rows = self._rows(f"SELECT {own}, count(*) FROM {waiting}{_SOON} GROUP BY 1")  # noqa: S608 (constants)
            for queue, count in rows:
                counts[queue or default[kind]] += count
            for queue, count in counts.items():
                there = messages.depth(current_app, queue)
                if there is None or there >= count:
                    continue
                table, _, condition = waiting.partition(" WHERE ")
                names = [queue, ""] if queue == default[kind] else [queue]
                with connection.cursor() as cursor:
                    cursor.execute(
                        f"UPDATE {table} SET next_publish_at = longhaul_now() + interval '1 second' WHERE id IN"  # noqa: S608
                        f" (SELECT id FROM {table} WHERE {condition}{_SOON} AND {own} = ANY (%s)"
                        " FOR NO KEY UPDATE SKIP LOCKED)",
                        [names],
                    )

    def _overdue(self, done: Done) -> None:
        for run_id, epoch, holder in self._rows(
            "SELECT id, epoch, holder FROM longhaul_runs_run WHERE status = 'running' AND leg_deadline < longhaul_now() LIMIT %s",
            BATCH,
        ):
            self._reclaim_run(run_id, epoch, holder, done)
        for call_id, attempt, holder in self._rows(
            "SELECT id, attempt, holder FROM longhaul_tools_toolcall"
            " WHERE status = 'running' AND timeout_at + %s < longhaul_now() LIMIT %s",
            OVERDUE_GRACE,
            BATCH,
        ):
            self._reclaim_call(call_id, attempt, holder, done)
        if self.watcher.watched_seconds < OVERDUE_GRACE.total_seconds():
            return  # what passed its deadline during an outage gets a grace
        for (run_id,) in self._rows(
            "SELECT id FROM longhaul_runs_run WHERE deadline < longhaul_now()"
            " AND status IN ('held', 'queued', 'running', 'waiting', 'requires_action') LIMIT %s",
            BATCH,
        ):
            error = {"code": "deadline", "message": "The run did not end before its deadline.", "retryable": False}
            expire = partial(lifecycle.cancel, run_id, StopReason.DEADLINE, status=lifecycle.FAILED, error=error)
            answer = self._moved(f"Run {run_id}", expire)
            if answer:
                done.expired_runs.append(run_id)
                logger.warning("Run %s passed its deadline", run_id, extra={"action": "run.failed", "run": run_id})
                self._announce(answer)

    def _rows(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return list(cursor.fetchall())


class SweepThread:
    """Keeps one Sweep going in a control process, through outages of Postgres and of the broker."""

    def __init__(self) -> None:
        self._sweep = Sweep()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="longhaul-sweep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join(5)

    def _keep(self) -> None:
        next_sweep = 0.0
        pid = os.getpid()
        while not self._ended.wait(LOOK_SECONDS) and os.getpid() == pid:
            try:
                if not self._sweep.watcher.elected():
                    continue
                self._sweep.look()
                if time.monotonic() >= next_sweep:
                    self._sweep.sweep()
                    next_sweep = time.monotonic() + SWEEP_SECONDS
            except (DatabaseError, InterfaceError, psycopg.Error, OSError) as error:
                logger.warning("The sweep goes on when Postgres is back: %s", type(error).__name__)
                self._sweep.watcher.drop()
                connection.close()
                self._ended.wait(1.0)
            except Exception:
                logger.exception("The sweep goes on after an error")
                connection.close()
                self._ended.wait(1.0)
        self._sweep.watcher.drop()
        connection.close()


def total(*passes: Done) -> Done:
    """Return what several passes have moved together."""
    done = Done()
    for each in passes:
        for key, value in vars(each).items():
            setattr(done, key, getattr(done, key) + value)
    return done


def report(done: Done) -> Mapping[str, Any]:
    """What a pass has moved, as JSON knows it."""
    return {key: [str(id) for id in value] if isinstance(value, list) else value for key, value in vars(done).items()}
