"""A worker within the test: it takes a run through the real engine, its SQL and its tools, in the test's own transaction.

No broker, no process, no other connection. Timers are waited out by moving the database's clock.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

from runs.testing.scripted_model import scripts_only

if TYPE_CHECKING:
    from runs.engine import Process
    from runs.models import Run

MAX_TURNS = 1000
NAME = "test@localhost"  # of the worker that run_to_end is


class WorkerKilled(BaseException):
    """Raised in a tool, its worker dies there: what it committed stays, and nobody settles the call.

    `run_to_end` lets it through. Called again, it is the next worker, and takes over as the sweep would.
    """


def run_to_end(run: Run, *, moves_clock: bool = True, real_model: bool = False) -> Run:
    """Take the run to its end, or to where it waits for a person, in this process; returns it as it is then.

    Legs and tools run one after another, in the test's own transaction, so what bounds calls (`max_concurrency`, rates) makes
    none of them wait. Timers (a retry of the model, of a tool) are
    waited out by moving the clock, and a deadline that comes first ends the run. Other runs of its thread that it was
    held behind are taken to their end first. What an earlier call of it left, for a tool raised `WorkerKilled`, is taken
    over as the sweep would.

    real_model: ask the model's own service where no script is in place.

    Raises AssertionError when the run cannot go on here: nothing is due and `moves_clock` is False, it is held behind a
    run that waits for a person, a worker that is present holds it, no script is in place, it does not end in MAX_TURNS turns.
    """
    from runs import engine
    from runs.models import Run, Status
    from threads import clock

    with working() as present, contextlib.nullcontext() if real_model else scripts_only():
        process = engine.Process(present)
        for _ in range(MAX_TURNS):
            try:
                run.refresh_from_db()
            except Run.DoesNotExist:
                raise AssertionError(
                    f"There is no run {run.pk} (any more) that this thread can see. Its transaction was rolled back, it"
                    " was deleted, or it stands in the open transaction of another thread's connection."
                ) from None
            if run.finished or run.status == Status.REQUIRES_ACTION:
                return run
            current = _occupant(run) if run.status == Status.HELD else run
            present.beat()
            now = clock.now()
            if _expire(now, current, run):
                continue
            work = _work(current, process)
            if not work and _take_over(current):
                continue
            if not work:
                raise AssertionError(f"Nothing can be done for this run here: {run.why()}{_behind(run, current)}")
            due = [do for at, do in work if at is None or at <= now]
            for do in due:
                do()
            if due:
                continue
            first = min(at for at, _ in work if at is not None)
            if not moves_clock:
                wait = (first - now).total_seconds()
                raise AssertionError(f"Nothing is due for {wait:.1f} s, and the clock is not moved: {run.why()}")
            ends = [each.deadline for each in (current, run) if each.deadline is not None]
            move_clock(min([first, *ends]) - now + timedelta(milliseconds=1))
    raise AssertionError(f"The run did not end in {MAX_TURNS} legs and calls: {run.why()}")


def _occupant(run: Run) -> Run:
    from runs.models import OCCUPYING, Run

    found = Run.objects.filter(thread=run.thread_id, status__in=OCCUPYING).first()
    if found is None:
        raise AssertionError(f"Nothing can be done for this run here: {run.why()}")
    return found


def _behind(run: Run, current: Run) -> str:
    return "" if run.pk == current.pk else f". That one: {current.why()}"


def _expire(now: datetime, *runs: Run) -> bool:
    """End what has passed its deadline, as the sweep does. Returns whether there was one."""
    from runs import lifecycle
    from runs.models import Status, StopReason

    late = [run for run in runs if run.deadline is not None and run.deadline < now]
    for run in late:
        error = {"code": "deadline", "message": "The run did not end before its deadline.", "retryable": False}
        lifecycle.cancel(run.pk, StopReason.DEADLINE, status=Status.FAILED, error=error)
    return bool(late)


def _work(run: Run, process: Process) -> list[tuple[datetime | None, Callable[[], None]]]:
    """Return what a worker could do for a run, and from when: its next leg, or its calls."""
    from runs import engine, lifecycle
    from runs.models import Status
    from threads import clock
    from tools import execution
    from tools.models import CallStatus, ToolCall

    if run.status == Status.QUEUED and run.turn is not None:
        lifecycle.release()
        run.refresh_from_db()
        if run.turn is not None:
            return []  # what it waits for, `why` says
    if run.status == Status.QUEUED:
        return [(run.not_before, partial(engine.advance, run.pk, run.dispatch_seq, process))]
    ready = ToolCall.objects.filter(run_id=run.pk, status__in=[CallStatus.REQUESTED, CallStatus.RETRYING])
    ready.filter(turn__isnull=False).update(turn=None, publishes=1, next_publish_at=clock.now())
    return [
        (call.not_before, partial(execution.execute, call.pk, call.attempt, presence=process.presence))
        for call in ready.order_by("index")
    ]


def _take_over(run: Run) -> bool:
    """Take what a worker of these tests holds and will not end, as sweep and presence do. Returns whether there was something.

    They run one after another in one process, so what names one of them between two turns is lost.
    """
    from runs import lifecycle
    from runs.models import Status
    from tools import lifecycle as calls
    from tools.models import CallStatus, ToolCall, Worker

    others = set(Worker.objects.exclude(name=NAME).values_list("pk", flat=True))
    if run.status == Status.RUNNING and run.holder is not None and run.holder not in others:
        return lifecycle.reclaim(run.pk, run.epoch, run.holder) is not None
    lost = ToolCall.objects.filter(run_id=run.pk, status=CallStatus.RUNNING).exclude(holder__in=others)
    taken = [calls.reclaim(call.pk, call.attempt, holder=call.holder) for call in lost if call.holder is not None]
    return any(answer is not None for answer in taken)


@contextlib.contextmanager
def working() -> Iterator[Any]:
    """Be a worker for the block: present by its row, publishing and ringing nothing."""
    from django.db import DatabaseError

    from runs import bells, engine
    from runs import tasks as run_tasks
    from threads.clock import Now
    from tools import execution, presence
    from tools import tasks as tool_tasks
    from tools.models import Worker

    class InlineWorker(presence.Presence):
        def beat(self) -> None:
            Worker.objects.filter(pk=self.id).update(beat_at=Now())

    present = InlineWorker(name=NAME, kind="agents")
    Worker.objects.create(
        id=present.id, name=present.name, kind="agents", host="localhost", pid=0, lock_key=present.life.lock_key
    )
    try:
        with (
            mock.patch.object(run_tasks, "publish"),
            mock.patch.object(tool_tasks, "publish"),
            mock.patch.object(tool_tasks, "let_out"),
            mock.patch.object(bells, "ring"),
            mock.patch.object(execution, "_call", partial(_call_tool, execution._call)),
            mock.patch.object(engine.Leg, "_instruct", _whole()(engine.Leg._instruct)),
            mock.patch.object(engine.Leg, "_tools_of", _whole()(engine.Leg._tools_of)),
        ):
            yield present
    finally:
        try:
            Worker.objects.filter(pk=present.id).delete()
        except DatabaseError:
            pass  # the test's transaction is broken, and takes the row along; why is told by what broke it


def _call_tool(original: Callable[..., Any], claimed: Any, tool: Any, arguments: Any, told: Any = None) -> Any:
    """Run a tool's body so that a test's open transaction makes as little difference as can be."""
    with _on_this_connection(), contextlib.nullcontext() if tool.atomic else _whole():
        return original(claimed, tool, arguments, told)


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Keep the test's transaction usable after a statement of the block that failed.

    A worker has no transaction open: there a failed statement breaks nothing. Here it would break all that follows, so the
    block is taken back to its begin; only then, for what it wrote before stays where it fails otherwise.
    """
    from django.db import connection, transaction
    from psycopg.pq import TransactionStatus

    if not connection.in_atomic_block:
        yield
        return
    begin = transaction.savepoint()
    try:
        yield
    finally:
        aborted = connection.connection.info.transaction_status == TransactionStatus.INERROR
        if aborted or connection.needs_rollback:
            connection.needs_rollback = False
            transaction.savepoint_rollback(begin)
        else:
            transaction.savepoint_commit(begin)


class _Here(Executor):
    """Runs at once, in the calling thread, as if no loop ran there."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        loop = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        finally:
            asyncio._set_running_loop(loop)
        return done


@contextlib.contextmanager
def _on_this_connection() -> Iterator[None]:
    """Let an async tool's `aget`, `sync_to_async` and their kind use the test's own connection, and see its rows."""
    from asgiref.sync import AsyncToSync

    before = getattr(AsyncToSync.executors, "current", None)
    AsyncToSync.executors.current = _Here()
    try:
        yield
    finally:
        AsyncToSync.executors.current = before


def move_clock(ahead: timedelta) -> None:
    """Move the database's time, `longhaul_now()`, ahead. In a TestCase it goes back with the test's transaction."""
    from django.db.models import F

    from threads.models import Clock

    if not Clock.objects.update(ahead=F("ahead") + ahead):
        Clock.objects.create(ahead=ahead)
