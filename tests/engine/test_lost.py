"""What a leg and a tool's process do when an answer is lost, or their claim is."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock
from uuid import UUID

import pytest
from django.db import OperationalError, connection

from runs import agents, engine
from runs import lifecycle as runs_lifecycle
from runs.agents import Agent
from runs.models import Run
from runs.providers.port import ModelEvent, ModelRequest, ProviderError, TextDelta
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from tests.engine.tool_runs import attempts, only_call
from tests.runs.scenes import agents_process, speaking
from threads import clock
from tools import ToolContext, lifecycle, tool
from tools.models import ToolAttempt

pytestmark = pytest.mark.django_db


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def clerk(**options: Any) -> Agent:
    return agents.registry.add(Agent(name="clerk", **{"model": "scripted:x", "tools": [add], **options}))


@pytest.mark.django_db(transaction=True)
def test_a_leg_that_was_lost_ends_and_writes_nothing_more() -> None:
    """Its run is taken back in the middle of its text, and nobody tells it but its fence."""
    asked = []

    def script(request: ModelRequest) -> Iterator[ModelEvent]:
        asked.append(request)
        assert len(asked) == 1, "a leg without a claim goes on"
        yield TextDelta("half ")
        row = Run.objects.get()
        assert row.holder is not None
        assert runs_lifecycle.reclaim(row.pk, row.epoch, row.holder)
        yield TextDelta("a sentence")

    with speaking(script), agents_process(flushes=False) as process:
        run = clerk().start("hello")
        engine.advance(run.pk, 1, process)
    run.refresh_from_db()
    assert (run.status, run.epoch, run.steps, run.lost) == ("queued", 2, 0, 1)
    assert [leg.reason for leg in run.leg_set.all()] == ["lost"]
    assert_invariants(run)


@pytest.mark.django_db(transaction=True)
def test_a_stream_whose_fence_is_gone_is_torn_down_at_the_next_look() -> None:
    heard: list[str] = []

    with agents_process(flushes=False) as process:

        def script(request: ModelRequest) -> Iterator[ModelEvent]:
            process.look()
            yield TextDelta("While it stands the look stops nothing. ")
            heard.append("the first")
            Run.objects.get().cancel()
            process.look()
            yield TextDelta("Too late.")
            heard.append("the second")

        with speaking(script):
            run = clerk().start("hello")
            engine.advance(run.pk, 1, process)
    assert heard == ["the first"]
    run.refresh_from_db()
    assert run.status == "cancelled"
    assert_invariants(run)


@pytest.mark.django_db(transaction=True)
def test_a_leg_holds_no_connection_while_its_model_speaks() -> None:
    held: list[bool] = []

    def script(request: ModelRequest) -> Iterator[ModelEvent]:
        held.append(connection.connection is not None)
        yield TextDelta("done")

    with speaking(script), agents_process() as process:
        run = clerk().start("hello")
        engine.advance(run.pk, 1, process)
    run.refresh_from_db()
    assert (held, run.status) == ([False], "completed")


@pytest.mark.django_db(transaction=True)
def test_a_settlement_that_is_not_answered_is_repeated(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("add", a=1, b=2))
    run = clerk().start("hello")
    real, tries = lifecycle.settle, []

    def settle(*arguments: Any, **options: Any) -> Any:
        tries.append(arguments)
        answer = real(*arguments, **options) if len(tries) != 1 else None
        if len(tries) < 3:
            raise OperationalError("server closed the connection unexpectedly")  # before the commit, then after it
        return answer

    with agents_process(flushes=False) as process, mock.patch.object(lifecycle, "settle", settle):
        engine.advance(run.pk, 1, process)
    made = only_call(run)
    assert (len(tries), made.status, made.result, attempts(made)) == (3, "settled", 3, ["success"])
    assert_invariants(run)


@pytest.mark.django_db(transaction=True)
def test_a_call_is_known_to_its_process_from_before_its_claim_to_its_settlement(scripted_model: ScriptedModel) -> None:
    known: dict[str, bool] = {}

    with agents_process(flushes=False) as process:

        def knows(call_id: UUID, moment: str) -> None:
            known[moment] = process.presence.register.knows("call", call_id, 1)

        @tool
        def look(ctx: ToolContext) -> None:
            """Look."""
            knows(ctx.tool_call.pk, "in the tool")

        def told(what: str) -> Any:
            real = getattr(lifecycle, what)

            def ask(call_id: UUID, *arguments: Any, **options: Any) -> Any:
                knows(call_id, what)
                return real(call_id, *arguments, **options)

            return mock.patch.object(lifecycle, what, ask)

        scripted_model.say(call("look"))
        run = clerk(tools=[look]).start("hello")
        with told("claim"), told("settle"):
            engine.advance(run.pk, 1, process)
    assert known == {"claim": True, "in the tool": True, "settle": True}
    assert only_call(run).status == "settled"


def test_an_atomic_attempt_is_known_to_postgres_by_its_name(scripted_model: ScriptedModel) -> None:
    """By it a later attempt ends its backend, and after its transaction the name is gone."""
    names: list[str] = []

    def name() -> str:
        with connection.cursor() as cursor:
            cursor.execute("SHOW application_name")
            return str(cursor.fetchone()[0])

    @tool(atomic=True)
    def look() -> None:
        """Look."""
        names.append(name())

    scripted_model.say(call("look"), "done")
    run = run_to_end(clerk(tools=[look]).start("hello"))
    assert names == [f"longhaul {ToolAttempt.objects.get(call=only_call(run)).pk}"]


def test_the_time_of_all_tries_of_the_model_is_limited(scripted_model: ScriptedModel, settings: Any) -> None:
    settings.LONGHAUL = {"MODEL_TRIES": 100, "MODEL_RETRY_TOTAL_SECONDS": 30}
    scripted_model.say(*[ProviderError("overloaded", "later", retry_after=timedelta(seconds=20))] * 3)
    run: Any = run_to_end(clerk().start("hello"))
    assert (run.status, run.stop_reason, run.error["code"]) == ("failed", "model_error", "overloaded")
    assert len(scripted_model.requests) == 3  # at 0, 20 and 40 s
    assert_invariants(run)


def test_the_wait_that_the_model_service_asks_for_is_capped(scripted_model: ScriptedModel) -> None:
    scripted_model.say(ProviderError("rate_limited", "next week", retry_after=timedelta(days=7)), "done")
    run = clerk().start("hello")
    began = clock.now()
    run_to_end(run)
    assert timedelta(hours=1) <= clock.now() - began < timedelta(minutes=61)
    assert run.output == "done"
