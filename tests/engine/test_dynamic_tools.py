"""Tools that a function returns for a run: asked in the agents worker once a leg, and again where a call is run."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
from django.contrib.auth.models import Group, User
from django.db import OperationalError

from runs import agents
from runs.exceptions import BadInput
from runs.models import Run, Step
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from runs.step_request import step_request
from tests.engine.tool_runs import SECRET, add, attempts, calls_of, only_call, stored
from tests.runs.scenes import asked, refused
from threads.models import Thread
from tools import Hooks, Tool, tool
from tools.models import ToolCall

pytestmark = pytest.mark.django_db


@tool
def refund(euros: int) -> str:
    """Pay back."""
    return f"paid {euros}"


def for_staff(run: Run) -> list[Tool]:
    return [refund] if run.owner is not None and run.owner.is_staff else []


def counted(run: Run) -> Iterable[Tool]:
    """Tools that are made for this run."""

    @tool(name=f"count_{run.metadata.get('what', 'things')}")
    def count() -> int:
        """Count."""
        return Group.objects.count()

    yield count


def clerk(tools: Any, **options: Any) -> agents.Agent:
    return agents.registry.add(agents.Agent(name="clerk", model="scripted:x", tools=tools, **options))


def offered(model: ScriptedModel, number: int = -1) -> list[str]:
    names: list[str] = asked(model.requests[number])["tools"]
    return names


@pytest.mark.parametrize("staff", [True, False])
def test_a_function_of_the_run_says_which_tools_there_are(
    scripted_model: ScriptedModel, django_user_model: type[User], staff: bool
) -> None:
    ada = django_user_model.objects.create_user("ada", is_staff=staff)
    agent = clerk(for_staff)
    scripted_model.say(call("refund", euros=5), "done")
    run = run_to_end(agent.start("hello", owner=ada))
    assert run.status == "completed", run.why()
    assert offered(scripted_model, 0) == (["refund"] if staff else [])
    made = only_call(run)
    assert (made.outcome, made.result) == (("success", "paid 5") if staff else ("failed", None))
    assert_invariants(run)


def test_functions_and_tools_mix_in_their_order_and_one_that_comes_twice_counts_once(
    scripted_model: ScriptedModel,
) -> None:
    agent = clerk([counted, add, lambda run: [refund, add]])
    scripted_model.say([call("count_parcels"), call("add", a=1, b=2)], "done")
    run = run_to_end(agent.start("hello", metadata={"what": "parcels"}))
    assert offered(scripted_model, 0) == ["count_parcels", "add", "refund"]
    assert [made.result for made in calls_of(run)] == [Group.objects.count(), 3]
    # The step can be shown again, with what the function gives today.
    sent = step_request(run, 1)
    assert ([each.name for each in sent.tools], sent.gone, sent.doubts) == (offered(scripted_model, 0), [], [])
    assert_invariants(run)


def test_a_function_is_asked_once_a_leg_and_once_an_attempt_of_its_own_tools_only(
    scripted_model: ScriptedModel,
) -> None:
    where = []

    def functions(run: Run) -> list[Tool]:
        where.append(run.status)
        return [refund]

    agent = clerk([add, functions])
    scripted_model.say(call("add", a=1, b=2), call("refund", euros=1), "done")
    run = run_to_end(agent.start("hello"))
    assert run.legs == 3
    assert sorted(where) == ["running", "running", "running", "waiting"]


def test_a_tool_that_is_offered_no_more_is_not_run(scripted_model: ScriptedModel) -> None:
    gone = threading.Event()

    def once(run: Run) -> list[Tool]:
        return [] if gone.is_set() else [refund]

    agent = clerk([once])
    scripted_model.say([call("refund", euros=1)], "done")
    real = agents.Agent.tools_of

    def then_gone(self: agents.Agent, run: Run) -> dict[str, Tool]:
        found = real(self, run)
        gone.set()
        return found

    with mock.patch.object(agents.Agent, "tools_of", then_gone):
        run = run_to_end(agent.start("hello"))
    made = only_call(run)
    assert (run.status, made.error) == (
        "completed",
        {"code": "not_available", "message": "refund is not offered to this run any more."},
    )
    assert Step.objects.get(run=run, number=2).tool_names == []
    assert_invariants(run)


# --- overrides


def test_overrides_narrow_what_the_function_gives(
    scripted_model: ScriptedModel, caplog: pytest.LogCaptureFixture
) -> None:
    agent = clerk([add, lambda run: [refund]])
    thread = Thread.objects.create(overrides={"tools": ["refund", "later"]})
    scripted_model.say("a", "b", "c")
    run_to_end(agent.start("hello", thread=thread))
    assert offered(scripted_model) == ["refund"]
    assert "has no tool later for this run now" in caplog.text
    run_to_end(agent.start("hello", thread=thread, tools=["add"]))
    assert offered(scripted_model) == ["add"]
    run_to_end(agent.start("hello", thread=thread, tools=[]))
    assert offered(scripted_model) == []


def test_a_call_can_be_forced_of_a_tool_that_only_the_function_knows(scripted_model: ScriptedModel) -> None:
    agent = clerk([add, lambda run: [] if run.steps else [refund]])
    scripted_model.say(call("add", a=1, b=2), "done")
    run = run_to_end(agent.start("hello", tool_choice="refund"))
    assert run.status == "completed", run.why()  # that it is offered no more in the next leg is no fault
    assert [request.tool_choice for request in scripted_model.requests] == ["refund", "auto"]
    run = run_to_end(agent.start("hello", tool_choice="fly"))
    assert (run.status, run.stop_reason) == ("failed", "configuration")
    assert "one of the run's tools; it is 'fly'" in run.why()
    with refused(BadInput, "'fly'"):
        agent.start("hello", tools=["add"], tool_choice="fly")
    with refused(BadInput, "'fly'"):
        clerk([add]).start("hello", tools=["fly"])


# --- what a function does wrong


def fails(run: Run) -> list[Tool]:
    raise ConnectionError(SECRET)


async def later(run: Run) -> list[Tool]:
    return []


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (fails, "test_dynamic_tools.fails, which returns tools for agent 'clerk', failed (ConnectionError)"),
        (lambda run: None, "must return a list of tools for agent 'clerk'; it returned NoneType"),
        (lambda run: "refund", "it returned str"),
        (lambda run: [for_staff], "it returned <function for_staff"),
        (lambda run: [tool(name="add")(refund.function)], "Two tools are named 'add'"),
        (lambda run: [tool(atomic=True)(refund.function)], "atomic=True run inside its transaction"),
    ],
)
def test_a_function_that_does_wrong_fails_the_run_with_what_it_did(
    scripted_model: ScriptedModel, function: Any, said: str
) -> None:
    async def before(call: Any, arguments: Any, ctx: Any) -> None: ...

    run = run_to_end(clerk([add, function], hooks=[Hooks(before=before)]).start("hello"))
    assert (run.status, run.stop_reason) == ("failed", "configuration")
    assert said in run.why()
    assert "hunter2" not in stored(run)
    assert_invariants(run)


def test_a_function_that_fails_where_the_call_is_run_fails_the_call(scripted_model: ScriptedModel) -> None:
    def flaky(run: Run) -> list[Tool]:
        if run.status == "waiting":
            raise ConnectionError(SECRET)
        return [refund]

    scripted_model.say(call("refund", euros=1), "done")
    run = run_to_end(clerk(flaky).start("hello"))
    said = "refund is not available: what offers it to this run failed."
    assert (run.status, only_call(run).error) == ("completed", {"code": "not_available", "message": said})
    assert "hunter2" not in stored(run)


def test_what_can_be_asked_for_no_tools_is_refused_where_the_agent_is_written() -> None:
    def plain(a: int, b: int) -> int:
        return a + b

    with pytest.raises(TypeError, match=r"is no tool of agent 'clerk': decorate it with @tool"):
        clerk([plain])
    with pytest.raises(TypeError, match="3 is no tool of agent 'clerk'"):
        clerk([3])
    with pytest.raises(TypeError, match="must be a plain def, not async"):
        clerk(later)


def test_where_a_call_is_run_they_are_asked_for_again_when_the_database_did_not_answer(
    scripted_model: ScriptedModel,
) -> None:
    def away_at_first(run: Run) -> list[Tool]:
        if ToolCall.objects.filter(run_id=run.pk, status="running", attempt=1).exists():
            raise OperationalError("the server closed the connection")
        return [refund]

    agent = clerk(away_at_first)
    scripted_model.say(call("refund", euros=5), "done")
    run = run_to_end(agent.start("hello"))
    made = only_call(run)
    assert (made.outcome, made.result, attempts(made)) == ("success", "paid 5", ["retrying", "success"])
    assert_invariants(run)
