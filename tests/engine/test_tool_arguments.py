"""What becomes of a call whose arguments, or whose tool, are not what they were when the model asked."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import AfterValidator

from runs import agents
from runs.pytest_longhaul import CallTool, ScriptedModel, assert_invariants, call
from tests.engine.tool_runs import SECRET, attempts, calls_of, only_call, secret_got_out, told, took
from tests.runs.scenes import payloads
from tools import RetryPolicy, tool
from tools.registry import Tool

pytestmark = pytest.mark.django_db

ran: list[Any] = []


@tool
def look_up(number: int) -> int:
    """Look up."""
    ran.append(number)
    return number


@tool(name="look_up")
def look_up_by_name(name: str) -> str:
    """Look up."""
    ran.append(name)
    return name


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    ran.clear()


def deploying(*tools: Tool) -> Tool:
    """A tool under which new code comes: from then on the agent has these tools."""

    @tool
    def deploy() -> None:
        """Let new code come."""
        agents.registry._agents["clerk"] = agents.Agent(name="clerk", model="scripted:x", tools=[deploy, *tools])

    return deploy


@pytest.mark.parametrize(
    ("then", "code", "words"),
    [([], "unknown_tool", "deploy"), ([look_up_by_name], "invalid_arguments", "name")],
    ids=["gone", "another signature"],
)
def test_a_call_whose_tool_changed_before_it_ran_is_answered_to_the_model(
    scripted_model: ScriptedModel, then: list[Tool], code: str, words: str
) -> None:
    run = took(scripted_model, deploying(*then), look_up, calls=[call("deploy"), call("look_up", number=1)])
    _, made = calls_of(run)
    assert made.error is not None
    assert (made.outcome, made.error["code"], attempts(made), ran) == ("failed", code, ["failed"], [])
    assert words in made.error["message"]
    assert told(run)[1]["error"] == made.error
    assert_invariants(run)


def test_new_code_does_not_raise_the_attempts_of_a_call_that_was_made(scripted_model: ScriptedModel) -> None:
    def failing(attempts: int) -> Tool:
        @tool(retry=RetryPolicy(attempts=attempts, initial_seconds=0))
        def fail() -> None:
            """Fail."""
            raise OSError

        return fail

    run = took(scripted_model, deploying(failing(5)), failing(2))
    assert attempts(calls_of(run)[1]) == ["retrying", "failed"]
    assert_invariants(run)


@pytest.mark.parametrize(("number", "runs"), [(2**64 - 1, True), (2**64, False), (-(10**30), False)])
def test_an_integer_that_json_readers_would_round_is_never_taken_for_another(
    scripted_model: ScriptedModel, number: int, runs: bool
) -> None:
    run = took(scripted_model, look_up, calls=[CallTool("look_up", f'{{"number": {number}}}')])
    assert ran == ([number] if runs else [])
    assert (only_call(run).error or {}).get("code") == (None if runs else "invalid_arguments")
    assert_invariants(run)


def test_the_text_of_an_exception_of_a_validator_is_kept_from_model_and_log(scripted_model: ScriptedModel) -> None:
    def known(number: int) -> int:
        raise KeyError(SECRET)

    @tool
    def refund(number: Annotated[int, AfterValidator(known)]) -> None:
        """Pay back."""
        ran.append(number)

    run = took(scripted_model, refund, calls=[call("refund", number=1)])
    made = only_call(run)
    assert made.error is not None
    assert (made.error["code"], attempts(made), ran) == ("invalid_arguments", [], [])
    assert "KeyError" in made.error["message"]
    assert not secret_got_out(scripted_model, run)
    assert_invariants(run)


def test_a_validator_that_begins_to_fail_after_the_model_asked_says_no_more(scripted_model: ScriptedModel) -> None:
    asked: list[int] = []

    def known(number: int) -> int:
        asked.append(number)
        if len(asked) > 1:
            raise KeyError(SECRET)
        return number

    @tool
    def refund(number: Annotated[int, AfterValidator(known)]) -> None:
        """Pay back."""
        ran.append(number)

    run = took(scripted_model, refund, calls=[call("refund", number=1)])
    made = only_call(run)
    assert made.error is not None
    assert (made.error["code"], attempts(made), ran) == ("invalid_arguments", ["failed"], [])
    assert [each["outcome"] for each in payloads(run, "tool_call.settled")] == ["failed"]
    assert not secret_got_out(scripted_model, run)
    assert_invariants(run)
