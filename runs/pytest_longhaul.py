"""A pytest plugin for tests of one's own agents: no worker, no broker, no model service.

    def test_refund(scripted_model, ...):            # or, in a plain TestCase: with scripted_model(...) as model:
        scripted_model.say(call("look_up_order", number=1042), "It is on its way.")
        run = support.start("Where is order 1042?", owner=user)
        run_to_end(run)
        assert run.output == "It is on its way."
        assert_invariants(run)

`run_to_end` takes a run through the real engine, its real SQL and its real tools inside the test's own transaction, so a
plain `TestCase` works. `move_clock` moves the database's time, on which every timer of Longhaul rests.

This module is loaded when pytest starts, so it imports Django's models only when they are needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest import mock

import orjson
import pytest

if TYPE_CHECKING:
    from runs.models import Run
    from runs.providers.port import ModelEvent, ModelRequest, ProviderError, ToolSpec

MAX_TURNS = 1000


@dataclass(frozen=True)
class CallTool:
    """A call in a scripted answer. `arguments` is an object, or a text that need not be JSON."""

    name: str
    arguments: Mapping[str, Any] | str


def call(name: str, /, **arguments: Any) -> CallTool:
    """Let the model call a tool."""
    return CallTool(name, arguments)


Reply: TypeAlias = "str | CallTool | Sequence[str | CallTool] | ProviderError"


@dataclass
class ScriptedModel:
    """Stands in for every model service. It says the replies in order, one a call, and records what it was asked.

    A reply is a text, a call, several of them (parallel calls), or a ProviderError to raise. `answer` may be set to
    a function of the request's messages instead.
    """

    name: str = "scripted"
    replies: list[Reply] = field(default_factory=list)
    answer: Callable[[list[dict[str, Any]]], Reply] | None = None
    requests: list[ModelRequest] = field(default_factory=list)

    def say(self, *replies: Reply) -> None:
        self.replies.extend(replies)

    # -- the provider port --

    def render(self, message: Mapping[str, Any]) -> bytes:
        return orjson.dumps(message)

    def render_tools(self, tools: Sequence[ToolSpec]) -> bytes:
        return orjson.dumps([tool.name for tool in tools]) if tools else b""

    def warm(self) -> None:
        """Nothing to do."""

    def stream(self, request: ModelRequest) -> Iterator[ModelEvent]:
        from runs.providers.port import Finished, ProviderError, TextDelta, ToolCallDelta, UsageReported

        self.requests.append(request)
        if self.answer is not None:
            reply = self.answer([orjson.loads(message) for message in request.messages])
        elif self.replies:
            reply = self.replies.pop(0)
        else:
            raise AssertionError("The scripted model was asked once more than it has replies. Give it more by say().")
        if isinstance(reply, ProviderError):
            raise reply
        parts = [reply] if isinstance(reply, str | CallTool) else list(reply)
        index = 0
        for part in parts:
            if isinstance(part, str):
                yield TextDelta(part)
                continue
            text = (
                part.arguments
                if isinstance(part.arguments, str)
                else orjson.dumps(part.arguments, default=str).decode()
            )
            yield ToolCallDelta(index, f"call_{index}", part.name, text)
            index += 1
        yield UsageReported(input_tokens=len(request.messages), output_tokens=1)
        yield Finished("tool_calls" if index else "stop")


@contextlib.contextmanager
def scripted(*replies: Reply) -> Iterator[ScriptedModel]:
    """Put a ScriptedModel in the place of every provider."""
    from runs.providers import port

    model = ScriptedModel(replies=list(replies))
    prefixes = {*port._factories, "scripted"}
    with (
        mock.patch.dict(port._factories, {"scripted": lambda: model}),
        mock.patch.dict(port._providers, dict.fromkeys(prefixes, model)),
    ):
        yield model


@pytest.fixture
def scripted_model() -> Iterator[ScriptedModel]:
    """A ScriptedModel in the place of every provider, for one test."""
    with scripted() as model:
        yield model


def run_to_end(run: Run, *, moves_clock: bool = True) -> Run:
    """Take the run to its end, or to where it waits for a person, in this process; returns it as it is then.

    Legs and tools run one after another, in the test's own transaction. Timers (a retry of the model, of a tool) are
    waited out by moving the clock. Other runs of its thread that it was held behind are taken to their end first.
    """
    from runs import engine
    from runs.models import OCCUPYING, Run, Status
    from threads import clock
    from tools import execution
    from tools.models import CallStatus, ToolCall

    with _worker() as present:
        process = engine.Process(present)
        for _ in range(MAX_TURNS):
            run.refresh_from_db()
            if run.finished or run.status == Status.REQUIRES_ACTION:
                return run
            current: Run = run
            if run.status == Status.HELD:
                current = Run.objects.get(thread=run.thread_id, status__in=OCCUPYING)
            present.beat()
            if current.status == Status.QUEUED:
                if moves_clock and current.not_before is not None:
                    _move_to(current.not_before - clock.now(), present)
                engine.advance(current.pk, current.dispatch_seq, process)
                continue
            calls = ToolCall.objects.filter(run_id=current.pk).exclude(status=CallStatus.SETTLED).order_by("index")
            waiting = [each for each in calls if each.status in (CallStatus.REQUESTED, CallStatus.RETRYING)]
            if not waiting:
                raise AssertionError(f"Nothing can be done for this run here: {current.why()}")
            for each in waiting:
                if moves_clock and each.not_before is not None:
                    _move_to(each.not_before - clock.now(), present)
                execution.execute(each.pk, each.attempt, presence=present)
    raise AssertionError(f"The run did not end in {MAX_TURNS} legs and calls: {run.why()}")


def _move_to(ahead: timedelta, present: Any) -> None:
    if ahead > timedelta(0):
        move_clock(ahead + timedelta(milliseconds=1))
        present.beat()


@contextlib.contextmanager
def _worker() -> Iterator[Any]:
    """Be a worker for the block: present by its row, publishing and ringing nothing."""
    from runs import bells
    from runs import tasks as run_tasks
    from threads.clock import Now
    from tools import presence
    from tools import tasks as tool_tasks
    from tools.models import Worker

    class InlineWorker(presence.Presence):
        def beat(self) -> None:
            Worker.objects.filter(pk=self.id).update(beat_at=Now())

    present = InlineWorker(name="test@localhost", kind="agents")
    Worker.objects.create(
        id=present.id, name=present.name, kind="agents", host="localhost", pid=0, lock_key=present.life.lock_key
    )
    try:
        with (
            mock.patch.object(run_tasks, "publish"),
            mock.patch.object(tool_tasks, "publish"),
            mock.patch.object(bells, "ring"),
        ):
            yield present
    finally:
        Worker.objects.filter(pk=present.id).delete()


def move_clock(ahead: timedelta) -> None:
    """Move the database's time, `longhaul_now()`, ahead. In a TestCase it goes back with the test's transaction."""
    from django.db.models import F

    from threads.models import Clock

    if not Clock.objects.update(ahead=F("ahead") + ahead):
        Clock.objects.create(ahead=ahead)


@pytest.fixture
def longhaul_clock(db: None) -> Iterator[Callable[[timedelta], None]]:
    """`move_clock`, undone after the test also where the test commits."""
    yield move_clock
    from threads.models import Clock

    Clock.objects.all().delete()


def assert_invariants(run: Run | None = None) -> None:
    """Fail when a row breaks an invariant: of one run, or of the whole database."""
    from runs import invariants

    report = invariants.check(None if run is None else run.pk)
    assert not any(report.violations.values()), str(report)
