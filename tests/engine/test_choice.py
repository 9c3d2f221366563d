"""Which tools a model is offered, whether it must call one, and how many at once."""

from __future__ import annotations

from typing import Any

import pytest

from runs import agents
from runs.exceptions import BadInput
from runs.models import Run, Step
from runs.providers.openai import OpenAIProvider
from runs.providers.port import ModelRequest
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from runs.step_request import step_request
from tests.engine.tool_runs import add, calls_of, told
from tests.runs.scenes import asked, payloads, refused
from threads.models import Thread
from tools import tool

pytestmark = pytest.mark.django_db


@tool
def shout(text: str) -> str:
    """Say it aloud."""
    return text.upper()


def clerk(**options: Any) -> agents.Agent:
    return agents.registry.add(
        agents.Agent(**{"name": "clerk", "model": "scripted:x", "tools": [add, shout], **options})
    )


def choices(model: ScriptedModel) -> list[str]:
    return [request.tool_choice for request in model.requests]


# --- which tools


@pytest.mark.parametrize(
    ("of_agent", "of_thread", "of_run", "offered"),
    [
        ([add, shout], None, None, ["add", "shout"]),
        ([add, shout], ["shout"], None, ["shout"]),
        ([add, shout], ["shout", "add"], None, ["shout", "add"]),
        ([add, shout], ["shout"], ["add"], ["add"]),
        ([add, shout], ["shout"], ["add", "shout"], ["add", "shout"]),
        ([add, shout], [], None, []),
        ([add, shout], None, [], []),
        ([add, shout], [], ["add"], ["add"]),
        ([add, shout], ["add"], [], []),
        ([], None, None, []),
        ([], None, [], []),
    ],
)
def test_the_nearest_list_of_tools_replaces_and_an_empty_one_means_none(
    scripted_model: ScriptedModel, of_agent: list[Any], of_thread: Any, of_run: Any, offered: list[str]
) -> None:
    agent = clerk(tools=of_agent)
    thread = Thread.objects.create(overrides={} if of_thread is None else {"tools": of_thread})
    scripted_model.say("done")
    run = run_to_end(agent.start("hello", thread=thread, tools=of_run))
    assert run.status == "completed", run.why()
    assert asked(scripted_model.requests[0])["tools"] == offered
    assert Step.objects.get(run=run).tool_names == offered
    assert_invariants(run)


def test_a_tool_that_the_run_was_not_given_is_not_run(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("shout", text="a"), "done")
    run = run_to_end(clerk().start("hello", tools=["add"]))
    [made] = calls_of(run)
    assert made.error is not None
    assert (made.outcome, made.error["code"], payloads(run, "tool_call.started")) == ("failed", "unknown_tool", [])
    assert_invariants(run)


# --- tool_choice


@pytest.mark.parametrize("choice", ["required", "add"])
@pytest.mark.parametrize("level", ["agent", "thread", "run"])
def test_a_call_is_forced_in_the_first_step_of_a_run_only(
    scripted_model: ScriptedModel, choice: str, level: str
) -> None:
    agent = clerk(tool_choice=choice if level == "agent" else "auto")
    thread = Thread.objects.create(overrides={"tool_choice": choice} if level == "thread" else {})
    scripted_model.say(call("add", a=1, b=2), call("add", a=3, b=4), "done")
    run = run_to_end(agent.start("hello", thread=thread, tool_choice=choice if level == "run" else None))
    assert (run.status, run.output) == ("completed", "done"), run.why()
    assert choices(scripted_model) == [choice, "auto", "auto"]
    # As it was asked, so it is kept: a step is shown and verified by this.
    kept = [step.asked()["tool_choice"] for step in Step.objects.filter(run=run).order_by("number")]
    assert kept == [choice, "auto", "auto"]
    assert_invariants(run)


def test_a_try_that_the_model_failed_does_not_use_up_the_force(scripted_model: ScriptedModel) -> None:
    from runs.providers.port import ProviderError

    scripted_model.say(ProviderError("server", "out of order"), call("add", a=1, b=2), "done")
    run = run_to_end(clerk(tool_choice="required").start("hello"))
    assert choices(scripted_model) == ["required", "required", "auto"]
    assert_invariants(run)


def test_none_stays_none_and_calls_that_come_all_the_same_are_left_out(scripted_model: ScriptedModel) -> None:
    scripted_model.say(["I answer.", call("add", a=1, b=2)])
    run = run_to_end(clerk(tool_choice="none").start("hello"))
    assert (run.status, run.stop_reason, run.output, calls_of(run)) == ("completed", "end_turn", "I answer.", [])
    assert choices(scripted_model) == ["none"]
    assert_invariants(run)


def test_the_last_allowed_step_is_free_of_tools_though_a_call_is_forced(scripted_model: ScriptedModel) -> None:
    scripted_model.say("done")
    run = run_to_end(clerk(tool_choice="required", max_steps=1).start("hello"))
    assert (choices(scripted_model), run.stop_reason) == (["none"], "max_steps")


def test_the_nearest_choice_wins_and_one_of_no_tool_is_refused(scripted_model: ScriptedModel) -> None:
    agent = clerk(tool_choice="required")
    thread = Thread.objects.create(overrides={"tool_choice": "shout"})
    scripted_model.say("a", "b")
    run_to_end(agent.start("hello", thread=thread))
    run_to_end(agent.start("hello", thread=thread, tool_choice="auto"))
    assert choices(scripted_model) == ["shout", "auto"]
    with refused(BadInput, "tool_choice", "'shout'"):
        agent.start("hello", thread=thread, tools=["add"])


# --- runs that follow another one


def test_a_run_that_goes_on_from_results_is_not_forced_again(scripted_model: ScriptedModel) -> None:
    agent = clerk(tool_choice="required")
    scripted_model.say(call("add", a=1, b=2), "done")
    first = run_to_end(agent.start("hello"))
    scripted_model.requests.clear()
    scripted_model.say("retried", "forked", "forked at one", call("add", a=1, b=2), "from the input", "as told")
    for new in (
        first.retry(),
        first.fork(),
        first.fork(after_step=1),
        first.fork(after_step=0),
        first.fork(after_step=1, tool_choice="add"),
    ):
        run_to_end(new)
        assert new.status == "completed", new.why()
        assert_invariants(new)
    assert choices(scripted_model) == ["auto", "auto", "auto", "required", "auto", "add"]


def test_a_retry_of_the_first_step_and_a_resumed_run_that_never_spoke_are_forced(scripted_model: ScriptedModel) -> None:
    agent = clerk(tool_choice="required")
    scripted_model.say("no, I will not")
    first = run_to_end(agent.start("hello"))
    scripted_model.say("again")
    run_to_end(first.retry())
    stopped = agent.start("hello").cancel()
    scripted_model.say("resumed", "asked anew")
    resumed = run_to_end(stopped.resume())
    run_to_end(resumed.thread.runs.get(pk=stopped.pk).resume("and now?"))
    assert choices(scripted_model) == ["required"] * 4


def test_a_run_that_is_resumed_from_results_is_not_forced_again(scripted_model: ScriptedModel) -> None:
    from runs.providers.port import ProviderError

    agent = clerk(tool_choice="add")
    scripted_model.say(call("add", a=1, b=2), ProviderError("auth", "no key"))
    failed = run_to_end(agent.start("hello"))
    assert failed.status == "failed"
    scripted_model.say("done", "done")
    run_to_end(failed.resume())
    run_to_end(Run.objects.get(pk=failed.pk).resume("and now?"))  # a new question: a new first step
    assert choices(scripted_model) == ["add", "auto", "auto", "add"]


# --- parallel calls


def test_without_parallel_calls_the_first_good_one_is_run_and_the_model_is_told_of_the_others(
    scripted_model: ScriptedModel,
) -> None:
    agent = clerk(parallel_tool_calls=False)
    several = [call("add", a="?"), call("add", a=1, b=2), call("shout", text="a"), call("add", a=3, b=4)]
    scripted_model.say(several, call("shout", text="a"), "done")
    run = run_to_end(agent.start("hello"))
    assert (run.status, run.output) == ("completed", "done"), run.why()
    assert [request.parallel_tool_calls for request in scripted_model.requests] == [False] * 3
    bad, first, *others, alone = run_calls(run)
    assert (bad.error["code"], first.result, alone.result) == ("invalid_arguments", 3, "A")
    said = "Not run: one call at a time, and another of this answer was. Call it again, alone, if it is still needed."
    for other in others:
        assert (other.outcome, other.error) == ("failed", {"code": "not_parallel", "message": said})
    assert len(payloads(run, "tool_call.started")) == 2
    assert len(told(run)) == 5  # every call has its answer, in order: the transcript is valid
    assert [part["tool_call"] for part in told(run)] == [str(made.pk) for made in run_calls(run)]
    assert step_request(run, 1).body
    assert_invariants(run)


def run_calls(run: Run) -> list[Any]:
    from tools.models import ToolCall

    return list(ToolCall.objects.filter(run_id=run.pk).order_by("step", "index"))


@pytest.mark.parametrize("parallel", [None, True])
def test_with_parallel_calls_all_are_run(scripted_model: ScriptedModel, parallel: bool | None) -> None:
    agent = clerk(parallel_tool_calls=parallel)
    scripted_model.say([call("add", a=1, b=2), call("shout", text="a")], "done")
    run = run_to_end(agent.start("hello"))
    assert [made.result for made in calls_of(run)] == [3, "A"]
    assert scripted_model.requests[0].parallel_tool_calls is parallel
    asked_of = Step.objects.get(run=run, number=1).asked()
    assert asked_of.get("parallel_tool_calls") is parallel
    assert ("parallel_tool_calls" in asked_of) is (parallel is not None)


def test_calls_that_are_not_run_for_another_one_are_no_bad_step(scripted_model: ScriptedModel) -> None:
    agent = clerk(parallel_tool_calls=False)
    scripted_model.say(*[[call("add", a=1, b=2), call("add", a=1, b=2)]] * 7, "done")
    run = run_to_end(agent.start("hello"))
    assert (run.status, run.steps) == ("completed", 8), run.why()


def test_a_word_that_says_neither_yes_nor_no_is_refused() -> None:
    with pytest.raises(BadInput, match="parallel_tool_calls must be True or False; it is 'no'"):
        clerk(parallel_tool_calls="no")
    with refused(BadInput, "parallel_tool_calls must be True or False; it is 1"):
        clerk().start("hello", parallel_tool_calls=1)


@pytest.mark.parametrize("parallel", [None, True, False])
def test_the_service_is_told_where_there_are_tools(parallel: bool | None) -> None:
    import orjson

    provider = OpenAIProvider("k", "http://127.0.0.1")
    tools = provider.render_tools([])
    body = ModelRequest("m", "", [], tools, parallel_tool_calls=parallel)
    assert "parallel_tool_calls" not in orjson.loads(provider.body(body))
    body = ModelRequest("m", "", [], b'[{"type":"function"}]', parallel_tool_calls=parallel)
    assert orjson.loads(provider.body(body)).get("parallel_tool_calls") is parallel
    provider.close()
