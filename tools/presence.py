"""What shows that a worker process is alive, and what it knows that it holds.

A process that runs legs or calls lives under an id of its own (a `Worker` row) and, from a native thread with a
connection of its own, holds a session advisory lock and beats every 2 s. A killed process loses the lock at once, for the
kernel closes its socket. Once a second the thread compares the rows that name this life with the `Register`: what the
process does not know it holds (a lost greenlet, a lost answer to a COMMIT) is given back.

Behind a pooler that hands a connection to another client after each transaction there is no session to hold a lock in: it
would stay with the pooler's connection, for the living and the dead. There a life has no `lock_key`, and shows itself by
its beats alone. `LONGHAUL["DIRECT_DATABASE"]` names a way past the pooler.

In a prefork worker each child has a life of its own, and the parent beats for those of its children that are there, for a tool
that keeps the interpreter busy would miss its beats.

The thread is a native one under gevent too, so it touches nothing that a greenlet may hold: no logging, no lazy import,
no patched lock; all it uses is imported before it starts.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

import psycopg
import psycopg.errors
from django.conf import settings
from django.db import DEFAULT_DB_ALIAS, connections
from psycopg import waiting

from threads.ids import new_id
from tools.interrupts import GRACE, Minder

logger = logging.getLogger("longhaul.tools")

T = TypeVar("T")

BEAT = timedelta(seconds=2)
# A process with a beat older than this claims nothing (longhaul_worker_present): it must beat first.
FRESH = timedelta(seconds=6)
# A beat is missed when none came for this long.
MISSED = timedelta(seconds=3)
_TICK_SECONDS = 1.0
# Milliseconds that a tick waits for a row to give back, and for each further one: two ticks and what they wait for must not
# make a missed beat.
_PATIENCE = 250
_PATIENCE_SPENT = 10


class Register:
    """What this process holds or is about to claim: (kind, id) -> epoch or attempt, None until the claim is answered.

    A claim is entered before it is sent, so that no look at the rows can find it missing. Plain dict operations: safe from any thread.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, UUID, object], int | None] = {}
        self._unanswered: set[tuple[str, UUID]] = set()  # claims that were sent and got no answer
        self._broken_off: set[tuple[str, UUID, int]] = set()  # work that was begun and did not reach its end

    @contextlib.contextmanager
    def entry(self, kind: str, id: UUID) -> Generator[Callable[[int | None], None]]:
        """Hold an entry for the block; call what it yields with the epoch (or attempt) whenever a claim is answered.

        None, and until the first call: any number is known, for a claim is being asked for.
        """
        key = (kind, id, object())
        self._entries[key] = None

        def claimed(number: int | None) -> None:
            self._entries[key] = number

        try:
            yield claimed
        except BaseException:
            # Before the entry goes: the thread may look in between.
            if (number := self._entries[key]) is None:
                self._unanswered.add((kind, id))
            else:
                self._broken_off.add((kind, id, number))
            raise
        finally:
            self._entries.pop(key, None)

    def unbegun(self, kind: str, id: UUID, number: int) -> bool:
        """Return whether a row that this process holds, and does not know, is of a claim whose answer was lost.

        Its work was never begun then. In doubt False: a claim of that number was answered here.
        """
        return (kind, id) in self._unanswered and (kind, id, number) not in self._broken_off

    def forget(self, kind: str, id: UUID, number: int) -> None:
        """Keep nothing more of what was given back."""
        self._unanswered.discard((kind, id))
        self._broken_off.discard((kind, id, number))

    def claimed(self, kind: str) -> set[tuple[UUID, int]]:
        """Return (id, number) of what was claimed and answered, and has not ended."""
        return {(k[1], held) for k, held in list(self._entries.items()) if k[0] == kind and held is not None}

    def knows(self, kind: str, id: UUID, number: int) -> bool:
        return any(k[0] == kind and k[1] == id and held in (None, number) for k, held in list(self._entries.items()))


@dataclass(frozen=True, slots=True)
class Holding:
    """A kind of row that a life can hold: how to find those that name it, and how to give one back."""

    kind: str
    select: str  # one parameter, the life; returns (id, number)
    give_back: str  # parameters: id, number, life
    give_back_unbegun: str = ""  # the same, for what the process knows that it never began; "": there is no difference


CALLS = Holding(
    "call",
    "SELECT id, attempt FROM longhaul_tools_toolcall WHERE holder = %s AND status = 'running'",
    "SELECT longhaul_call_reclaim(%s::uuid, %s::int, %s::uuid, true)",
    "SELECT longhaul_call_reclaim(%s::uuid, %s::int, %s::uuid, false)",
)


def _patched() -> bool:
    return "gevent.monkey" in sys.modules and bool(sys.modules["gevent.monkey"].is_module_patched("threading"))


def _native() -> tuple[Callable[..., Any], Callable[[float], None]]:
    """Return the real start_new_thread and sleep, whatever gevent has patched."""
    import _thread
    import time

    if not _patched():
        return _thread.start_new_thread, time.sleep
    from gevent import get_hub, monkey

    get_hub()  # first in the main greenlet: two first hubs at once deadlock in importlib's patched locks
    return monkey.get_original("_thread", "start_new_thread"), monkey.get_original("time", "sleep")


class NativeConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection for a native thread: it waits in C, never in gevent's hub."""

    forgotten = False  # it is another process's, and open at this one's end
    sessions = True  # a lock that is taken here stays until this connection ends, and no longer

    def __del__(self, *warn: Any) -> None:
        if not self.forgotten:
            super().__del__(*warn)

    def wait(self, gen: Generator[Any, Any, T], interval: float = 0.1, timeout: float | None = None) -> T:
        wait_c = getattr(waiting, "wait_c", None)
        if wait_c is None or timeout is not None:
            return super().wait(gen, interval, timeout)
        try:
            answer: T = wait_c(gen, self.pgconn.socket, interval)
        except KeyboardInterrupt:
            self.cancel_safe()
            raise
        return answer


def direct_database() -> str:
    """Name the database, of Django's DATABASES, by which presence and the watcher reach Postgres."""
    return getattr(settings, "LONGHAUL", {}).get("DIRECT_DATABASE") or DEFAULT_DB_ALIAS


def has_session(connection: psycopg.Connection[Any]) -> bool:
    """Return whether an open connection, in autocommit, is one session of Postgres from its begin to its end.

    A pooler cannot tell its client which server process will serve it, for that changes: it makes up a number.
    """
    with psycopg.Cursor(connection) as cursor:
        return cursor.execute("SELECT pg_backend_pid()").fetchone() == (connection.info.backend_pid,)


def connect(application_name: str) -> NativeConnection:
    """A connection of its own to Longhaul's database, in autocommit, with keep-alives that bound a half-open socket.

    `sessions` says whether what is set and locked there stays: what `LONGHAUL["SESSION_LOCKS"]` says, or what is seen.
    """
    parameters = connections[direct_database()].get_connection_params()
    for name in ("cursor_factory", "context", "prepare_threshold", "autocommit"):
        parameters.pop(name, None)
    # connect() itself waits by its module's function, which gevent's patched poll serves in a native thread too.
    made = NativeConnection.connect(
        **parameters, autocommit=True, application_name=application_name, prepare_threshold=None
    )
    try:
        told = getattr(settings, "LONGHAUL", {}).get("SESSION_LOCKS")
        made.sessions = told if isinstance(told, bool) else has_session(made)
        if made.sessions:
            with contextlib.suppress(psycopg.Error):  # a unix socket has none
                made.execute(
                    "SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3;"
                )
                made.execute("SET tcp_user_timeout = 10000")
    except BaseException:
        made.close()
        raise
    return made


@dataclass
class Life:
    """One life of this process. Where there are no sessions it has no lock."""

    id: UUID = field(default_factory=new_id)
    lock_key: int | None = field(default_factory=lambda: secrets.randbits(62))


class Presence:
    """Keeps this process present. `beats` is False in a prefork child, whose parent beats for it."""

    def __init__(
        self,
        *,
        name: str,
        kind: str,
        holdings: Sequence[Holding] = (CALLS,),
        parent: UUID | None = None,
        beats: bool = True,
        minder: Minder | None = None,
        leaves: mmap.mmap | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.holdings = tuple(holdings)
        self.parent = parent
        self.beats = beats
        # Where a call runs in the main thread, and nothing beside it: it is looked after, and can be interrupted.
        self.minder = minder
        self.life = Life()
        self._lives = [self.life.id]  # all that this process has had: its children name the first of them
        self.register = Register()
        self._leaves = leaves or mmap.mmap(-1, 1)  # shared with all who are forked from here
        self._has_children = False
        self._connection: NativeConnection | None = None
        self._ended = False
        self._host = socket.gethostname()
        self._pid = os.getpid()
        self._ticks = 0

    @property
    def id(self) -> UUID:
        return self.life.id

    @property
    def interrupts(self) -> bool:
        return self.minder is not None

    @property
    def draining(self) -> bool:
        """Whether this worker was asked to shut down. A prefork child sees it at once, for it is told only to its parent."""
        return bool(self._leaves[0])

    @draining.setter
    def draining(self, yes: bool) -> None:
        self._leaves[0] = yes

    def child(self, minder: Minder) -> Presence:
        """In a process that was forked from this one: what keeps it present, while this one beats for it."""
        return Presence(
            name=self.name,
            kind=self.kind,
            holdings=self.holdings,
            parent=self.first_life,
            beats=False,
            minder=minder,
            leaves=self._leaves,
        )

    @property
    def first_life(self) -> UUID:
        """What the children of this process name as their parent, whenever they were forked."""
        return self._lives[0]

    # -- the thread --

    def start(self) -> None:
        """Be present (in this thread), then keep it so from a native one. Without Postgres, be present when it is there."""
        start_thread, self._sleep = _native()
        self.try_tick()
        start_thread(self._keep, ())

    def try_tick(self) -> None:
        """Tick; where that cannot be yet, say why in a line. A worker that starts before its database waits for it.

        Raises nothing: Celery would swallow it, and the thread that tries again would not be started.
        """
        try:
            self.tick()
        except psycopg.errors.UndefinedTable:
            logger.error(
                "%s waits for Longhaul's tables, which are not in its database: run manage.py migrate", self.name
            )
        except (psycopg.Error, OSError) as error:
            logger.error("%s waits for Postgres: %s", self.name, str(error).partition("\n")[0])
        except Exception as error:  # a wrong setting, as a DIRECT_DATABASE that DATABASES does not have
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            logger.error("%s cannot be present, claims nothing and tries again: %s", self.name, said)

    def _keep(self) -> None:
        while not self._ended:
            self._sleep(_TICK_SECONDS)
            if self._ended or os.getpid() != self._pid:
                return
            # Postgres is away: the lock is lost with the session; the next tick takes it again. And whatever else it was:
            # a thread that ends here would leave a worker that looks alive and is never present again.
            with contextlib.suppress(Exception):
                self.tick()

    def tick(self) -> None:
        """Hold the lock, beat, give back. Begins anew after whatever it raises: psycopg.Error when Postgres is away."""
        try:
            if self._connection is None:
                self._connection = connect(f"longhaul presence {self.name}"[:63])
                self._live(self._connection)
            elif not self._beat(self._connection):
                self._begin_anew()  # found dead meanwhile: what it held was taken
                if self._connection.sessions:
                    self._connection.execute("SELECT pg_advisory_unlock_all()")
                self._live(self._connection)
            self._give_back(self._connection)
            if self._has_children:
                self._cut(self._connection)
        except Exception:
            self._drop()
            raise
        self._ticks += 1

    def _live(self, to: NativeConnection) -> None:
        # A new key each time: the old session may still hold the old one, on a server that has not noticed its end.
        life = self.life = Life(id=self.life.id)
        known = to.execute("SELECT gone_at IS NULL FROM longhaul_tools_worker WHERE id = %s", (life.id,)).fetchone()
        if known == (False,):
            life = self._begin_anew()
        if to.sessions:
            to.execute("SELECT pg_advisory_lock(%s)", (life.lock_key,))
        else:
            life.lock_key = None
        to.execute(
            "INSERT INTO longhaul_tools_worker"
            " (id, name, kind, host, pid, parent_id, lock_key, started_at, beat_at, draining)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, longhaul_now(), longhaul_now(), false)"
            " ON CONFLICT (id) DO UPDATE SET beat_at = excluded.beat_at, lock_key = excluded.lock_key",
            (life.id, self.name, self.kind, self._host, self._pid, self.parent, life.lock_key),
        )

    def _begin_anew(self) -> Life:
        self.life = Life()
        self._lives.append(self.life.id)
        return self.life

    def _beat(self, to: NativeConnection) -> bool:
        """Beat every second tick, for the children too. False when this life was found dead."""
        if not self.beats:
            return to.execute(
                "SELECT 1 FROM longhaul_tools_worker WHERE id = %s AND gone_at IS NULL", (self.life.id,)
            ).fetchone() == (1,)
        if self._ticks % 2:
            return True
        lost = (
            to.execute(
                "UPDATE longhaul_tools_worker SET beat_at = longhaul_now(), draining = %s WHERE id = %s AND gone_at IS NULL",
                (self.draining, self.life.id),
            ).rowcount
            == 0
        )
        children = to.execute(
            "SELECT id, pid FROM longhaul_tools_worker WHERE parent_id = ANY (%s) AND gone_at IS NULL", (self._lives,)
        ).fetchall()
        self._has_children = bool(children)
        present = [id for id, pid in children if _runs(pid)]
        if present:
            to.execute(
                "UPDATE longhaul_tools_worker SET beat_at = longhaul_now() WHERE id = ANY (%s) AND gone_at IS NULL",
                (present,),
            )
        return not lost

    def _give_back(self, to: NativeConnection) -> None:
        """Give back what the register does not know. What another transaction holds is left to the next tick."""
        known = self.register.claimed("call")  # before the rows are read: what is claimed meanwhile is not missed there
        held = [
            (holding, id, number)
            for holding in self.holdings
            for id, number in to.execute(holding.select, (self.life.id,)).fetchall()
        ]
        if self.minder is not None:
            taken = known - {(id, number) for holding, id, number in held if holding.kind == "call"}
            self.minder.look(to, taken, leaving=self.draining)
        lost = [each for each in held if not self.register.knows(each[0].kind, *each[1:])]
        if not lost:
            return
        patience = _PATIENCE
        for holding, id, number in lost:
            unbegun = bool(holding.give_back_unbegun) and self.register.unbegun(holding.kind, id, number)
            try:
                _give_back(
                    to,
                    holding.give_back_unbegun if unbegun else holding.give_back,
                    (id, number, self.life.id),
                    patience,
                )
                self.register.forget(holding.kind, id, number)
            except psycopg.errors.LockNotAvailable:
                patience = _PATIENCE_SPENT  # many may be held by the same transaction

    def _cut(self, to: NativeConnection) -> None:
        """In a prefork parent: take what a child that is gone held, and what one holds past its limit; then end that child.

        Nobody knows so surely, and so soon, that a child is gone. The limit is that of the row, which the run's deadline
        cuts too; Celery's own, of the message, stands beside it.
        """
        rows = to.execute(_CHILDRENS_CALLS, {"lives": self._lives}).fetchall()
        for id, number, life, pid, late in rows:
            here = _is_child(pid)
            if here and (late is None or late < GRACE.total_seconds()):
                continue
            try:
                answer = _give_back(to, CALLS.give_back, (id, number, life), _PATIENCE)
            except psycopg.errors.LockNotAvailable:
                continue
            # Not one that has gone on to another call meanwhile.
            if here and answer is not None and not to.execute(CALLS.select, (life,)).fetchall():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def _drop(self) -> None:
        dropped, self._connection = self._connection, None
        if dropped is not None:
            with contextlib.suppress(psycopg.Error, OSError):
                dropped.close()

    def forget(self) -> None:
        """In a forked child: close this process's copy of the parent's socket, which would hide the parent's death."""
        self._ended = True
        if self._connection is not None:
            with contextlib.suppress(OSError):
                os.close(self._connection.pgconn.socket)
            # The object must never close that file number again: it may be somebody else's by then.
            self._connection.forgotten = True
            _undead.append(self._connection)
            self._connection = None

    def end(self) -> None:
        """Leave cleanly, last of all: the life is closed, then the lock goes. The row stays for who asks what ran where."""
        self._ended = True
        with contextlib.suppress(Exception):  # who cannot say that it leaves is found gone
            to = connect("longhaul leaves")
            to.execute(
                "UPDATE longhaul_tools_worker SET gone_at = longhaul_now()"
                " WHERE (id = ANY (%(lives)s) OR parent_id = ANY (%(lives)s)) AND gone_at IS NULL",
                {"lives": self._lives},
            )
            to.close()
        self._drop()


# Also of a child that has said that it leaves: it was asked to end in the middle of a call.
_CHILDRENS_CALLS = """
SELECT c.id, c.attempt, w.id, w.pid, extract(epoch FROM longhaul_now() - c.timeout_at)::float
FROM longhaul_tools_worker w JOIN longhaul_tools_toolcall c ON c.holder = w.id AND c.status = 'running'
WHERE w.parent_id = ANY (%(lives)s)
"""

_undead: list[NativeConnection] = []


def _give_back(to: NativeConnection, statement: str, parameters: Sequence[Any], patience: int) -> Any:
    """Give a row back, and return the answer: None when it was not ours (any more). Raises LockNotAvailable after `patience` ms.

    For the transaction only: a beat, or the lock that shows this life, must not be given up for a moment's wait, and behind
    a pooler a setting of the session would be somebody else's.
    """
    with to.transaction():
        to.execute("SELECT set_config('lock_timeout', %s, true)", (f"{patience}ms",))
        row = to.execute(statement, parameters).fetchone()
    return row and row[0]


def _runs(pid: int) -> bool:
    """Return whether a child process of this one still runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _is_child(pid: int) -> bool:
    """Return whether this number is a running child of this process: another may have it by now."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
    except OSError:
        return False
    return state != "Z" and int(parent) == os.getpid()


# The presence of this process; None where nothing claims (a web process, a shell).
current: Presence | None = None
