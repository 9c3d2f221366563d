"""What a leg does when its worker drains, and how one that lingers goes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from django.db import connection

from runs import agents, engine
from runs.agents import Agent
from runs.models import Run
from runs.providers.port import ModelEvent, ModelRequest, TextDelta
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call
from tests.protocol.rows import wait_until
from tests.runs.scenes import Voice, agents_process, speaking
from tools import tasks as tool_tasks
from tools import tool

pytestmark = pytest.mark.django_db(transaction=True)

SOON = 5.0  # seconds: far less than what would be waited for otherwise


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def clerk() -> Agent:
    return agents.registry.add(Agent(name="clerk", model="scripted:x", tools=[add]))


def test_a_stream_that_is_cut_when_the_grace_is_over_is_handed_on() -> None:
    with agents_process() as process:

        def script(request: ModelRequest) -> Iterator[ModelEvent]:
            yield TextDelta("half ")
            process.drain()
            process.cut()
            yield TextDelta("a sentence")

        with speaking(script), mock.patch("runs.tasks.publish") as publish:
            run = clerk().start("hello")
            publish.reset_mock()
            engine.advance(run.pk, 1, process)
    run.refresh_from_db()
    assert (run.status, run.steps, run.lost, run.model_tries) == ("queued", 0, 0, 0)
    assert [leg.reason for leg in run.leg_set.all()] == ["drained"]
    publish.assert_called_once_with(run.pk, 2, "clerk")
    assert_invariants(run)


def test_an_answer_that_is_whole_is_committed_though_its_worker_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Voice.stream

    def script(request: ModelRequest) -> Iterator[ModelEvent]:
        yield TextDelta("all of it")

    with agents_process() as process:

        def whole(voice: Voice, request: ModelRequest) -> Iterator[ModelEvent]:
            yield from stream(voice, request)
            process.drain()
            process.cut()

        monkeypatch.setattr(Voice, "stream", whole)
        with speaking(script):
            run = clerk().start("hello")
            engine.advance(run.pk, 1, process)
    run.refresh_from_db()
    assert (run.status, run.output, run.steps) == ("completed", "all of it", 1)
    assert_invariants(run)


def test_a_leg_at_a_boundary_of_a_draining_worker_hands_over(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("nobody"))  # a bad call: answered at once, and the leg would take another step
    with agents_process() as process, mock.patch("runs.tasks.publish"):
        real = scripted_model.stream

        def stream(request: ModelRequest) -> Any:
            process.drain()
            return real(request)

        with mock.patch.object(scripted_model, "stream", stream):
            run = clerk().start("hello")
            engine.advance(run.pk, 1, process)
    run.refresh_from_db()
    assert (run.status, run.steps) == ("queued", 1)
    assert len(scripted_model.requests) == 1
    assert_invariants(run)


def test_a_leg_that_lingers_ends_at_once_when_its_worker_drains(
    scripted_model: ScriptedModel, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.LONGHAUL = {"LINGER_SECONDS": 60}
    monkeypatch.setattr(engine, "LOOK_SECONDS", 60.0)
    scripted_model.say(call("add", a=1, b=2))
    with agents_process() as process, mock.patch.object(tool_tasks, "publish"):
        run = clerk().start("hello")
        leg = threading.Thread(target=_advance, args=(run, process))
        leg.start()
        wait_until(lambda: Run.objects.get(pk=run.pk).status == "waiting")
        process.drain()
        leg.join(SOON)
        assert not leg.is_alive()
    run.refresh_from_db()
    assert (run.status, run.linger_until) == ("waiting", None)
    assert [each.reason for each in run.leg_set.all()] == ["drained"]
    assert_invariants(run)


def test_a_leg_that_lingered_in_vain_gives_up(scripted_model: ScriptedModel, settings: Any) -> None:
    settings.LONGHAUL = {"LINGER_SECONDS": 0.1}
    scripted_model.say(call("add", a=1, b=2))
    with agents_process() as process, mock.patch.object(tool_tasks, "publish"):
        run = clerk().start("hello")
        engine.advance(run.pk, 1, process)
    run.refresh_from_db()
    assert (run.status, run.linger_until) == ("waiting", None)
    assert [each.reason for each in run.leg_set.all()] == ["tools"]
    assert_invariants(run)


def _advance(run: Run, process: engine.Process) -> None:
    try:
        engine.advance(run.pk, 1, process)
    finally:
        connection.close()
