"""What a leg does with its time and its claims, and what the deletion of its run leaves."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
from django.db import OperationalError

from runs import agents, engine, lifecycle, worker
from runs.agents import Agent
from runs.exceptions import UnknownAgent
from runs.models import Leg, Run
from runs.pytest_longhaul import CallTool, ScriptedModel, assert_invariants, call, run_to_end
from tests.engine.tool_runs import clerk
from tests.runs.scenes import agents_process, payloads
from threads.models import Message, Thread
from tools.models import ToolCall

pytestmark = pytest.mark.django_db


def test_a_leg_whose_preparation_takes_its_whole_time_still_takes_a_step(scripted_model: ScriptedModel) -> None:
    def slow(run: Run) -> str:
        time.sleep(0.11)  # longer than the budget
        return "Be quick."

    scripted_model.say(call("add", a=1, b=2), call("add", a=3, b=4), "done")
    run = run_to_end(clerk(instructions=slow, leg_budget_seconds=0.1).start("hello"))
    assert (run.status, run.steps, run.legs) == ("completed", 3, 3)
    assert_invariants(run)


@pytest.mark.django_db(transaction=True)
def test_a_leg_hands_over_when_its_time_is_used(scripted_model: ScriptedModel) -> None:
    def answer(messages: list[dict[str, Any]]) -> Any:
        time.sleep(0.11)  # longer than the budget
        return call("add", a=1, b=2) if len(messages) < 3 else "ok"

    scripted_model.answer = answer
    run = clerk(leg_budget_seconds=0.1).start("hello")
    with agents_process() as process:
        engine.advance(run.pk, 1, process)
        run.refresh_from_db()
        assert (run.status, run.legs, run.steps) == ("queued", 1, 1)
        assert run.leg_set.get().reason == "budget"
        engine.advance(run.pk, run.dispatch_seq, process)
    run.refresh_from_db()
    assert (run.status, run.legs, run.output) == ("completed", 2, "ok")
    assert_invariants(run)


@pytest.mark.django_db(transaction=True)
def test_a_draining_worker_claims_nothing_and_passes_the_message_on(scripted_model: ScriptedModel) -> None:
    run = clerk().start("hello")
    with agents_process() as process:
        process.drain()
        with mock.patch("runs.tasks.publish") as publish:
            engine.advance(run.pk, 1, process)
    run.refresh_from_db()
    assert (run.status, run.legs) == ("queued", 0)
    publish.assert_called_once_with(run.pk, 1, "clerk")


@pytest.mark.django_db(transaction=True)
def test_presence_does_not_give_back_what_a_lingering_leg_is_just_claiming(scripted_model: ScriptedModel) -> None:
    """The claim has committed, its answer is on its way, and the presence thread looks for what nobody here knows."""
    scripted_model.say(call("add", a=1, b=2), "done")
    run = clerk().start("hello")
    real = lifecycle.claim_lingering
    ticks = 0

    with agents_process() as process:
        process.presence.holdings = worker._holdings()

        def claim(*arguments: Any, **options: Any) -> Any:
            nonlocal ticks
            answer = real(*arguments, **options)
            if answer["status"] == "running":
                process.presence.tick()
                ticks += 1
            return answer

        with mock.patch.object(lifecycle, "claim_lingering", claim):
            engine.advance(run.pk, 1, process)
    run.refresh_from_db()
    assert ticks
    assert (run.status, run.legs, run.lost) == ("completed", 1, 0), run.why()
    assert_invariants(run)


@pytest.mark.parametrize(
    "bad",
    [
        CallTool("x" * 3_000, {}),
        CallTool("add", '{"a":' * 300 + "1" + "}" * 300),
        CallTool("add", "[" * 300 + "]" * 300),
    ],
    ids=["name", "objects", "lists"],
)
def test_a_call_that_no_row_could_hold_is_answered_to_the_model(scripted_model: ScriptedModel, bad: CallTool) -> None:
    scripted_model.say(bad, "I see.")
    run = run_to_end(clerk().start("hello"))
    assert (run.status, run.output, run.lost) == ("completed", "I see.", 0)
    made = ToolCall.objects.get(run_id=run.pk)
    assert made.outcome == "failed"
    [told] = payloads(run, "tool_call.settled")
    assert told["message"] == str(made.message_id)
    assert_invariants(run)


def test_a_passing_failure_of_the_database_in_instructions_does_not_fail_the_run(scripted_model: ScriptedModel) -> None:
    asked = []

    def instructions(run: Run) -> str:
        asked.append(run.pk)
        if len(asked) == 1:
            raise OperationalError("deadlock detected")
        return "Be kind."

    scripted_model.say("done")
    run = clerk(instructions=instructions).start("hello")
    run_to_end(run)  # its first leg ended without an answer: the run was taken back
    assert (run.status, run.output, len(asked)) == ("completed", "done", 2)
    assert list(Leg.objects.filter(run=run).order_by("number").values_list("reason", flat=True)) == ["lost", "finished"]
    assert_invariants(run)


def test_an_agent_that_the_tools_worker_does_not_know_is_no_fault_of_the_models(scripted_model: ScriptedModel) -> None:
    clerk()

    def answer(messages: list[dict[str, Any]]) -> Any:
        if len(messages) > 1:
            return "I see."
        return call("add", a=1, b=2)

    scripted_model.answer = answer
    run = agents.get("clerk").start("hello")
    real = agents.get

    def missing(name: str) -> Agent:
        if ToolCall.objects.filter(run_id=run.pk, status="running").exists():
            raise UnknownAgent("There is no agent 'clerk'.")
        return real(name)

    with mock.patch.object(agents, "get", missing):
        run_to_end(run)
    made = ToolCall.objects.get(run_id=run.pk)
    assert made.error is not None
    assert (made.outcome, made.error["code"]) == ("failed", "not_available")
    assert run.output == "I see."
    assert_invariants(run)


def test_deleting_the_run_that_occupies_a_thread_frees_it(scripted_model: ScriptedModel) -> None:
    thread = Thread.objects.create()
    agent = clerk()
    first, second = agent.start("one", thread=thread), agent.start("two", thread=thread)
    saved = thread.save(role="user", content="by hand")
    assert second.status == "held"
    first.delete()
    assert_invariants()
    scripted_model.say("done")
    assert run_to_end(second).output == "done"
    assert Message.objects.get(pk=saved.pk).status == "completed"
    assert_invariants()
