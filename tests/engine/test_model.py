"""What a failing, misspeaking or costly model does to a run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, get_args

import pytest

from runs import agents
from runs.agents import Agent
from runs.models import Run, Usage
from runs.providers.port import ErrorCode, ProviderError
from runs.pytest_longhaul import CallTool, ScriptedModel, assert_invariants, call, run_to_end
from threads import clock
from threads.models import Message
from tools import tool
from tools.models import ToolCall

pytestmark = pytest.mark.django_db

RETRYABLE: list[ErrorCode] = ["network", "rate_limited", "overloaded", "server"]
ran: list[int] = []


@tool
def look_up(number: int) -> str:
    """Look up a number."""
    ran.append(number)
    return f"found {number}"


def clerk(**options: Any) -> Agent:
    ran.clear()
    return agents.registry.add(Agent(name="clerk", model="scripted:x", tools=[look_up], **options))


@pytest.mark.parametrize("code", RETRYABLE)
def test_a_passing_failure_is_tried_again_at_its_time(scripted_model: ScriptedModel, code: ErrorCode) -> None:
    scripted_model.say(ProviderError(code, "not now"), ProviderError(code, "not now"), "done")
    run: Any = run_to_end(clerk().start("hello"))
    assert (run.status, run.output, run.model_tries) == ("completed", "done", 0)
    reasons = [event.payload["reason"] for event in run.event_set.filter(type="run.queued").order_by("seq")]
    assert reasons == ["start", "retry", "retry"]
    assert Message.objects.filter(run_id=run.pk, role="assistant", status="discarded").count() == 2
    assert run.steps == 1
    assert_invariants(run)


def test_the_wait_that_the_service_asks_for_is_kept(scripted_model: ScriptedModel) -> None:
    scripted_model.say(ProviderError("rate_limited", "wait", retry_after=timedelta(seconds=40)), "done")
    run = clerk().start("hello")
    began = clock.now()
    run_to_end(run)
    assert timedelta(seconds=40) <= clock.now() - began < timedelta(seconds=50)
    assert_invariants(run)


@pytest.mark.parametrize("code", sorted(set(get_args(ErrorCode)) - set(RETRYABLE)))
def test_a_lasting_failure_fails_the_run_at_once(scripted_model: ScriptedModel, code: ErrorCode) -> None:
    scripted_model.say(ProviderError(code, "no"))
    run: Any = run_to_end(clerk().start("hello"))
    assert (run.status, run.stop_reason) == ("failed", "model_error")
    assert run.error == {"code": code, "message": "no", "retryable": False}
    assert len(scripted_model.requests) == 1
    assert_invariants(run)


def test_the_tries_are_limited(scripted_model: ScriptedModel, settings: Any) -> None:
    settings.LONGHAUL = {"MODEL_TRIES": 3}
    scripted_model.say(*[ProviderError("server", "down")] * 3)
    run: Any = run_to_end(clerk().start("hello"))
    assert (run.status, run.stop_reason) == ("failed", "model_error")
    assert run.error == {"code": "server", "message": "down", "retryable": True}
    assert len(scripted_model.requests) == 3
    assert_invariants(run)


def test_a_failure_after_usage_was_reported_is_paid_for(scripted_model: ScriptedModel) -> None:
    stream = scripted_model.stream
    failed: list[bool] = []

    def breaks(request: Any) -> Any:
        for event in stream(request):
            if type(event).__name__ == "Finished" and not failed:
                failed.append(True)
                raise ProviderError("network", "cut")
            yield event

    scripted_model.stream = breaks  # type: ignore[method-assign]
    scripted_model.say("lost", "done")
    run: Any = run_to_end(clerk().start("hello"))
    assert run.output == "done"
    assert sorted(Usage.objects.filter(run=run).values_list("discarded", flat=True)) == [False, True]
    assert (run.input_tokens, run.output_tokens) == (2, 2)
    assert_invariants(run)


@pytest.mark.parametrize(
    ("bad", "code", "words"),
    [
        (call("look_down", number=1), "unknown_tool", "look_up"),
        (CallTool("look_up", "{number"), "invalid_arguments", "look_up"),
        (call("look_up", number="many"), "invalid_arguments", "number"),
        (call("look_up"), "invalid_arguments", "number"),
    ],
    ids=str,
)
def test_a_bad_call_is_answered_to_the_model(
    scripted_model: ScriptedModel, bad: CallTool, code: str, words: str
) -> None:
    scripted_model.say(bad, "sorry")
    run: Any = run_to_end(clerk().start("hello"))
    assert (run.status, run.output, ran) == ("completed", "sorry", [])
    settled: Any = ToolCall.objects.get(run_id=run.pk)
    assert (settled.outcome, settled.error["code"], settled.attempts.count()) == ("failed", code, 0)
    told = scripted_model.requests[1].messages[-1].decode()
    assert '"tool"' in told
    assert words in told
    assert_invariants(run)


def test_a_good_call_beside_a_bad_one_runs(scripted_model: ScriptedModel) -> None:
    scripted_model.say([call("look_down"), call("look_up", number=7)], "done")
    run: Any = run_to_end(clerk().start("hello"))
    assert (run.output, ran, run.bad_calls) == ("done", [7], 0)
    assert_invariants(run)


def test_bad_calls_over_and_over_end_the_run(scripted_model: ScriptedModel, settings: Any) -> None:
    settings.LONGHAUL = {"BAD_CALLS_LIMIT": 3}
    # a good call in between begins the count again
    scripted_model.say(*[call("no")] * 2, call("look_up", number=1), *[call("no")] * 3)
    run: Any = run_to_end(clerk().start("hello"))
    assert (run.status, run.stop_reason, run.error["code"]) == ("failed", "model_error", "invalid_calls")
    assert run.steps == 6
    assert_invariants(run)


def test_the_last_step_is_asked_for_without_tools(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("look_up", number=1), call("look_up", number=2), ["so far", call("look_up", number=3)])
    run: Any = run_to_end(clerk(max_steps=3).start("hello"))
    assert (run.status, run.stop_reason, run.output, ran) == ("completed", "max_steps", "so far", [1, 2])
    assert [request.tool_choice for request in scripted_model.requests] == ["auto", "auto", "none"]
    assert_invariants(run)


def test_the_token_budget_ends_the_run_before_the_next_step(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("look_up", number=1))  # costs 1 + 1 tokens
    run: Any = run_to_end(clerk(max_total_tokens=2).start("hello"))
    assert (run.status, run.stop_reason, run.error["code"], run.steps) == ("failed", "token_budget", "token_budget", 1)
    assert_invariants(run)


def test_the_cost_budget_counts_by_the_prices(scripted_model: ScriptedModel, settings: Any) -> None:
    settings.LONGHAUL = {"PRICES": {"scripted:x": {"input": 1_000_000, "output": 2_000_000}}}
    scripted_model.say(call("look_up", number=1))  # 1 * 1 + 1 * 2
    run: Any = run_to_end(clerk(max_cost=3).start("hello"))
    assert (run.status, run.stop_reason, run.cost) == ("failed", "cost_budget", 3)
    assert_invariants(run)


def broken_instructions(run: Run) -> str:
    raise KeyError("customer")


@pytest.mark.parametrize("instructions", [broken_instructions, lambda run: 3])
def test_instructions_that_fail(scripted_model: ScriptedModel, instructions: Any) -> None:
    run: Any = run_to_end(clerk(instructions=instructions).start("hello"))
    assert (run.status, run.stop_reason) == ("failed", "configuration")
    assert "instructions" in run.error["message"]
    assert scripted_model.requests == []
    assert_invariants(run)


def test_an_agent_that_is_gone_under_a_live_run(scripted_model: ScriptedModel) -> None:
    run: Any = clerk().start("hello")
    del agents.registry._agents["clerk"]
    run_to_end(run)
    assert (run.status, run.stop_reason) == ("failed", "configuration")
    assert "'clerk'" in run.error["message"]
    assert_invariants(run)
