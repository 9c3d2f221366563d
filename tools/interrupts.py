"""What ends a call's code before it ends by itself: its time is up, its worker leaves, nobody wants its result any more.

The code hears of it by an exception, once, so that it can clean up; what it does not heed is ended from outside:

| where | told | ended |
|---|---|---|
| a prefork child | by a signal, in its main thread: an alarm of its own at the attempt's `timeout_at`, and Celery's soft limit | by its parent |
| the solo pool | by the alarm | by nobody: the sweep settles the call |
| a pool of threads | an async tool by its loop; a sync one not at all | as above |

An async tool is cancelled instead, as asyncio does it; one whose loop stands still gets the exception after all.

The exception is raised while the user's code runs and at no other time: a settlement is not interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Coroutine, Generator, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from types import FrameType
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from celery.exceptions import SoftTimeLimitExceeded

from tools.exceptions import WorkerLeaving

logger = logging.getLogger("longhaul.tools")

T = TypeVar("T")

# After the exception, so long for cleaning up; then the process is killed.
GRACE = timedelta(seconds=5)
LOOP_SECONDS = 1.0  # a loop that does not cancel its task for so long stands still


class Reason(Enum):
    TIME = "its time is up"
    UNWANTED = "nobody wants its result any more"
    LEAVING = "its worker leaves"


@dataclass
class Body:
    """The user's code of one attempt, while it runs."""

    call_id: UUID
    attempt: int
    seconds: float | None
    gives_back: bool = False
    reason: Reason | None = None  # why it was interrupted: once, for what it does then is cleaning up
    _loop: asyncio.AbstractEventLoop | None = None
    _task: asyncio.Task[Any] | None = None
    _cancelled: bool = False

    def error(self) -> Exception:
        return WorkerLeaving() if self.reason is Reason.LEAVING else SoftTimeLimitExceeded()

    def interrupt(self, reason: Reason) -> None:
        """Called in the thread that runs the code, by a signal. Raises there, or cancels the task of an async tool."""
        if self.reason is None:
            self.reason = reason
            if self._loop is None:
                raise self.error()
            self._loop.call_soon_threadsafe(self._cancel)
            signal.setitimer(signal.ITIMER_REAL, LOOP_SECONDS)
        elif self._loop is not None and not self._cancelled:
            raise self.error()

    def _cancel(self) -> None:
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()

    def _out_of_time(self) -> None:
        if self.reason is None:
            self.reason = Reason.TIME
            self._cancel()

    async def bounded(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await an async tool's coroutine, and cancel it when its time is up. Raises the error of an interruption."""
        loop = asyncio.get_running_loop()
        self._task = task = asyncio.current_task()
        assert task is not None
        timer = None if self.seconds is None else loop.call_later(self.seconds, self._out_of_time)
        self._loop = loop
        try:
            return await coroutine
        except asyncio.CancelledError:
            if not self._cancelled:
                raise
            task.uncancel()
            raise self.error() from None
        finally:
            self._loop = None
            if timer is not None:
                timer.cancel()


# Of this process, where it runs one call at a time in its main thread: what runs, and whom its own thread means.
_current: Body | None = None
_meant: tuple[UUID, int, Reason] | None = None
_delivers = False
# Held to send a signal: it must not come when nobody hears it any more, for then it ends the process.
_sending = threading.Lock()


def current() -> Body | None:
    """Return the code that runs in this process's main thread, where it can be interrupted."""
    return _current


def _heard(number: int, frame: FrameType | None) -> None:
    global _meant
    meant, _meant = _meant, None
    body = _current
    if body is None:
        return  # the code has ended: what follows is the settlement, which is not to be broken off
    if meant is None:
        body.interrupt(Reason.TIME)
    elif meant[:2] == (body.call_id, body.attempt):
        body.interrupt(meant[2])


def interrupt(call_id: UUID, attempt: int, reason: Reason) -> None:
    """Interrupt this attempt, if it is the one that runs here. From any thread."""
    global _meant
    with _sending:
        if _delivers:
            _meant = (call_id, attempt, reason)
            # To the main thread itself, for it may wait in a system call. SIGALRM: nobody else is asked to deal with it.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)


@contextlib.contextmanager
def delivered(*, prefork: bool) -> Generator[None]:
    """Let signals interrupt what `body` holds, for the block. In the main thread only.

    In a prefork child Celery's soft limit is taken as well: its own handler would raise in the middle of a settlement.
    """
    global _current, _delivers, _meant
    before = {each: signal.getsignal(each) for each in (signal.SIGALRM, *([signal.SIGUSR1] if prefork else []))}
    _current = _meant = None
    try:
        for each in before:
            signal.signal(each, _heard)
        _delivers = True
        yield
    finally:
        _current = None
        with _sending:
            _delivers = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def body(call_id: UUID, attempt: int, seconds: float | None, *, gives_back: bool = False) -> Generator[Body]:
    """Hold the user's code of an attempt that has so many seconds, for the block."""
    global _current
    held = Body(call_id, attempt, None if seconds is None else max(seconds, 0.001), gives_back)
    if not _delivers or threading.current_thread() is not threading.main_thread():
        yield held
        return
    _current = held
    try:
        if held.seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, held.seconds)
        yield held
    finally:
        _current = None
        signal.setitimer(signal.ITIMER_REAL, 0)


@dataclass
class Minder:
    """Looks after the call that a process runs, once a second and from its native thread: is its result still wanted?

    `grace`: after a cancel a tool has so long to see it by itself; then it is interrupted, and `GRACE` later its process is
    killed, where that runs nothing else (`kills`). The broker has no part in it.
    """

    grace: timedelta
    kills: bool
    _since: dict[tuple[UUID, int], float] = field(default_factory=dict)

    def look(
        self, to: psycopg.Connection[tuple[Any, ...]], taken: Iterable[tuple[UUID, int]], *, leaving: bool
    ) -> None:
        """`taken`: attempts that are known here, and whose rows do not name this life (any more)."""
        running = _current
        if running is not None and leaving and running.gives_back and running.reason is None:
            interrupt(running.call_id, running.attempt, Reason.LEAVING)
        now = time.monotonic()
        unwanted = {each for each in taken if each in self._since or not _wanted(to, *each)}
        self._since = {each: self._since.get(each, now) for each in unwanted}
        for each, since in self._since.items():
            late = now - since - self.grace.total_seconds()
            if self.kills and late > GRACE.total_seconds():
                logger.warning("Call %s does not heed that it is over: its process is killed", each[0])
                os.kill(os.getpid(), signal.SIGKILL)
            if late > 0 and running is not None and running.reason is None:
                interrupt(*each, Reason.UNWANTED)


def _wanted(to: psycopg.Connection[tuple[Any, ...]], call_id: UUID, attempt: int) -> bool:
    """Return whether the attempt may settle the call: also one whose worker was taken for dead, while nobody knows of it."""
    row = to.execute(
        "SELECT 1 FROM longhaul_tools_toolcall WHERE id = %s AND attempt = %s AND status IN ('running', 'unknown')",
        (call_id, attempt),
    ).fetchone()
    return row is not None
