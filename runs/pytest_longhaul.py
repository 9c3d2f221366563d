"""A pytest plugin for tests of one's own agents: no worker, no broker, no model service.

    def test_refund(scripted_model, ...):            # or, in a plain TestCase: with scripted(...) as model:
        scripted_model.say(call("look_up_order", number=1042), "It is on its way.")
        run = support.start("Where is order 1042?", owner=user)
        run_to_end(run)
        assert run.output == "It is on its way."
        assert_invariants(run)

`run_to_end` takes a run through the real engine, its real SQL and its real tools inside the test's own transaction, so a
plain `TestCase` works. `move_clock` moves the database's time, on which every timer of Longhaul rests.

The functions need no pytest: tests of Django's own runner import them from here. This module is loaded when pytest
starts, so it imports Django's models only when they are needed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest import mock

import orjson

try:
    import pytest
except ImportError:  # the tests of this project are run by Django's own runner
    pytest = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from runs.engine import Process
    from runs.models import Run
    from runs.providers.port import ModelEvent, ModelRequest, ProviderError, ReasoningDelta, ToolSpec, UsageReported

MAX_TURNS = 1000
NAME = "test@localhost"  # of the worker that run_to_end is


class WorkerKilled(BaseException):
    """Raised in a tool, its worker dies there: what it committed stays, and nobody settles the call.

    `run_to_end` lets it through. Called again, it is the next worker, and takes over as the sweep would.
    """


@dataclass(frozen=True)
class CallTool:
    """A call in a scripted answer. `arguments` is an object, or a text that need not be JSON."""

    name: str
    arguments: Mapping[str, Any] | str

    @property
    def text(self) -> str:
        """The arguments as the model would write them."""
        given = self.arguments
        return given if isinstance(given, str) else orjson.dumps(given, default=str).decode()


def call(name: str, /, **arguments: Any) -> CallTool:
    """Let the model call a tool."""
    return CallTool(name, arguments)


Part: TypeAlias = "str | CallTool | ReasoningDelta | UsageReported | ProviderError"
Reply: TypeAlias = "Part | Sequence[Part]"


@dataclass
class ScriptedModel:
    """Stands in for every model service. It says the replies in order, one a call, and records what it was asked.

    A reply is a text, a call, a ProviderError to raise, or a list of them: several calls are parallel ones, and an error
    at the end cuts off what was said before it. In a list may also stand `UsageReported` (what the call cost; else 1
    token a message and 1 for the answer) and `ReasoningDelta`. `answer` may be set to a function of the request's
    messages instead, which returns a reply.
    """

    name: str = "scripted"
    replies: list[Reply] = field(default_factory=list)
    answer: Callable[[list[dict[str, Any]]], Reply] | None = None
    requests: list[ModelRequest] = field(default_factory=list)

    def say(self, *replies: Reply) -> None:
        """Give it more replies. Raises TypeError for what is none, ValueError for one that says nothing."""
        for reply in replies:
            _parts(reply)
        self.replies.extend(replies)

    def shown(self, number: int = -1) -> list[dict[str, Any]]:
        """Return the messages that a model call was shown, the last call's if no number (from 0) is given.

        Each is `{"role", "content": [parts]}`; a part is `{"type": "text", "text"}`, or a `tool_call` or `tool_result`.
        Raises AssertionError when there was no such call.
        """
        try:
            request = self.requests[number]
        except IndexError:
            raise AssertionError(f"The scripted model was asked {len(self.requests)} times, not more.") from None
        return [orjson.loads(message) for message in request.messages]

    # -- the provider port --

    def render(self, message: Mapping[str, Any]) -> bytes:
        return orjson.dumps(message)

    def render_tools(self, tools: Sequence[ToolSpec]) -> bytes:
        return orjson.dumps([tool.name for tool in tools]) if tools else b""

    def warm(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing is open."""

    def stream(self, request: ModelRequest) -> Iterator[ModelEvent]:
        from runs.providers.port import Finished, ProviderError, TextDelta, ToolCallDelta, UsageReported

        self.requests.append(request)
        if self.answer is not None:
            reply = self.answer([orjson.loads(message) for message in request.messages])
        elif self.replies:
            reply = self.replies.pop(0)
        else:
            raise AssertionError(
                "The scripted model was asked once more than it has replies. Give it more by say()."
                f" It was shown last: {self.shown()[-1:]}"
            )
        index = 0
        usage = UsageReported(input_tokens=len(request.messages), output_tokens=1)
        for part in _parts(reply):
            if isinstance(part, ProviderError):
                raise part
            if isinstance(part, UsageReported):
                usage = part
            elif isinstance(part, CallTool):
                yield ToolCallDelta(index, f"call_{index}", part.name, part.text)
                index += 1
            elif isinstance(part, str):
                yield TextDelta(part)
            else:
                yield part
        yield usage
        yield Finished("tool_calls" if index else "stop")


def _parts(reply: Reply) -> list[Part]:
    """Return the parts of a reply. Raises TypeError for what is none, ValueError for one that says nothing."""
    from runs.providers.port import ProviderError, ReasoningDelta, UsageReported

    known = (str, CallTool, ProviderError, ReasoningDelta, UsageReported)
    several = isinstance(reply, Sequence) and not isinstance(reply, str | bytes)
    parts: list[Any] = list(reply) if several else [reply]  # type: ignore[arg-type]
    for part in parts:
        if not isinstance(part, known):
            raise TypeError(f"A reply is a text, call(...), a ProviderError, or a list of them; got {part!r}.")
    if not any(isinstance(part, CallTool | ProviderError) or (isinstance(part, str) and part) for part in parts):
        raise ValueError(
            f"The reply {reply!r} says nothing. What a service answers with nothing is ProviderError('server', ...)."
        )
    return [part for part in parts if part != ""]


@contextlib.contextmanager
def scripted(*replies: Reply) -> Iterator[ScriptedModel]:
    """Put a ScriptedModel in the place of every provider, for the block; an inner block's comes before an outer one's.

    Raises AssertionError at its end when replies are left that nobody asked for (`model.replies.clear()` if that is
    meant), unless the block itself raises.
    """
    from runs.providers import port

    model = ScriptedModel()
    model.say(*replies)
    prefixes = {*port._factories, "scripted"}
    with (
        mock.patch.dict(port._factories, {"scripted": lambda: model}),
        mock.patch.dict(port._providers, dict.fromkeys(prefixes, model)),
    ):
        yield model
    if model.replies:
        raise AssertionError(f"The model was never asked for {len(model.replies)} of its replies: {model.replies!r}")


def run_to_end(run: Run, *, moves_clock: bool = True, real_model: bool = False) -> Run:
    """Take the run to its end, or to where it waits for a person, in this process; returns it as it is then.

    Legs and tools run one after another, in the test's own transaction. Timers (a retry of the model, of a tool) are
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

    with _worker() as present, contextlib.nullcontext() if real_model else _scripts_only():
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
    from runs import engine
    from runs.models import Status
    from tools import execution
    from tools.models import CallStatus, ToolCall

    if run.status == Status.QUEUED:
        return [(run.not_before, partial(engine.advance, run.pk, run.dispatch_seq, process))]
    ready = ToolCall.objects.filter(run_id=run.pk, status__in=[CallStatus.REQUESTED, CallStatus.RETRYING])
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
def _scripts_only() -> Iterator[None]:
    """Let no model service be asked: a test that forgot its script would spend money, or fail by the network."""
    from runs.providers import port

    def is_real(prefix: str) -> bool:
        provider = port._providers.get(prefix)
        home = port._factories[prefix] if provider is None else type(provider).__module__
        return isinstance(home, str) and home.startswith("runs.providers.")

    with mock.patch.dict(port._providers, {prefix: _NoScript() for prefix in port._factories if is_real(prefix)}):
        yield


class _NoScript(ScriptedModel):
    def stream(self, request: ModelRequest) -> Iterator[ModelEvent]:
        raise AssertionError(
            f"The run asks the model {request.model!r}, and no script is in place. Call run_to_end inside of"
            " `with scripted(...)`, or with the fixture scripted_model; real_model=True asks the service itself."
        )


@contextlib.contextmanager
def _worker() -> Iterator[Any]:
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
            mock.patch.object(bells, "ring"),
            mock.patch.object(execution, "_call", partial(_call_tool, execution._call)),
            mock.patch.object(engine.Leg, "_instruct", _whole()(engine.Leg._instruct)),
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


def assert_invariants(run: Run | None = None) -> None:
    """Fail when a row breaks an invariant: of one run, or of the whole database."""
    from runs import invariants

    report = invariants.check(None if run is None else run.pk)
    if not report.clean:
        raise AssertionError(str(report))
    if run is not None and not report.runs:
        raise AssertionError(f"There is no run {run.pk} (any more) that this thread can see.")


if pytest is not None:

    @pytest.fixture
    def scripted_model() -> Iterator[ScriptedModel]:
        """A ScriptedModel in the place of every provider, for one test; replies that are left fail it."""
        with scripted() as model:
            yield model

    @pytest.fixture
    def longhaul_clock(db: None) -> Iterator[Callable[[timedelta], None]]:
        """`move_clock`, undone after the test also where the test commits."""
        yield move_clock
        from threads.models import Clock

        Clock.objects.all().delete()
