"""Calls that are kept out of later context, with their results: the transcript that a provider gets stays valid."""

from __future__ import annotations

from typing import Any

import pytest

from runs import agents
from runs.models import Run, Step
from runs.providers.port import ProviderError
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from runs.step_request import step_request
from tests.engine.test_context import in_one_leg, whole
from tests.runs.scenes import asked
from threads.models import Message
from tools import ModelRetry, tool
from tools.exceptions import ToolOptionError

pytestmark = pytest.mark.django_db


@tool
def always(word: str) -> str:
    """Shown in all later runs."""
    return word


@tool(in_context="run")
def a_run(word: str) -> str:
    """Shown in this run."""
    if word == "no":
        raise ModelRetry("not so")
    return word


@tool(in_context="step")
def a_step(word: str) -> str:
    """Shown until the model has spoken again."""
    return word


TOOLS = [always, a_run, a_step]


def clerk(**options: Any) -> agents.Agent:
    return agents.registry.add(agents.Agent(name="clerk", model="scripted:x", tools=TOOLS, **options))


def words(model: ScriptedModel, number: int = -1) -> list[str]:
    """What a request shows: texts, `tool(word)` of a call, `-> word` of a result."""
    said = []
    for message in asked(model.requests[number])["messages"]:
        for part in message["content"]:
            match part["type"]:
                case "text":
                    said.append(part["text"])
                case "tool_call":
                    said.append(f"{part['name']}({part['arguments'].get('word', '?')})")
                case "tool_result":
                    said.append(f"-> {part['result'] or part['error']['code']}")
    return said


def rebuilt(run: Run, model: ScriptedModel) -> None:
    """Each step's request is rebuilt from its row as it was sent, and is valid."""
    for step, request in zip(Step.objects.filter(run=run).order_by("number"), model.requests, strict=True):
        sent = step_request(run, step.number)
        shown = [{"role": each["role"], "content": list(each["content"])} for each in sent.messages]
        assert shown == asked(request)["messages"]
        assert sent.doubts == []
        assert whole(request)


def script(model: ScriptedModel) -> None:
    model.say(
        ["Let me see.", call("always", word="1"), call("a_run", word="2"), call("a_step", word="3")],
        call("a_step", word="4"),
        call("a_run", word="5"),
        "done",
    )


FIRST = ["Let me see.", "always(1)", "a_run(2)"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("legs", ["one leg", "a leg a step"])
def test_a_call_is_shown_for_as_long_as_its_tool_says_and_goes_with_its_result(
    scripted_model: ScriptedModel, legs: str
) -> None:
    script(scripted_model)
    run = clerk().start("hello")
    run = in_one_leg(run) if legs == "one leg" else run_to_end(run)
    assert run.output == "done", run.why()
    assert words(scripted_model, 1) == ["hello", *FIRST, "a_step(3)", "-> 1", "-> 2", "-> 3"]
    assert words(scripted_model, 2) == ["hello", *FIRST, "-> 1", "-> 2", "a_step(4)", "-> 4"]
    assert words(scripted_model, 3) == ["hello", *FIRST, "-> 1", "-> 2", "a_run(5)", "-> 5"]
    rebuilt(run, scripted_model)

    # A later run of the thread sees what is always shown, and nothing is lost of the rest.
    scripted_model.requests.clear()
    scripted_model.say("again")
    later = run_to_end(clerk().start("and now?", thread=run.thread))
    assert words(scripted_model) == ["hello", "Let me see.", "always(1)", "-> 1", "done", "and now?"]
    rebuilt(later, scripted_model)
    kept = [part for message in Message.objects.filter(run_id=run.pk) for part in message.content]
    assert sum(part["type"] == "tool_call" for part in kept) == sum(part["type"] == "tool_result" for part in kept) == 5
    for each in (run, later):
        assert_invariants(each)


def test_calls_that_failed_or_were_bad_are_kept_out_too(scripted_model: ScriptedModel) -> None:
    scripted_model.say([call("a_run", word="no"), call("a_run", ward="?"), call("always", word="1")], "done")
    run = run_to_end(clerk().start("hello"))
    assert words(scripted_model) == [
        "hello", "a_run(no)", "a_run(?)", "always(1)", "-> model_retry", "-> invalid_arguments", "-> 1"
    ]  # fmt: skip
    scripted_model.say("again")
    run_to_end(clerk().start("and now?", thread=run.thread))
    assert words(scripted_model) == ["hello", "always(1)", "-> 1", "done", "and now?"]


def test_a_message_of_which_all_was_left_out_is_not_shown(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("a_run", word="1"), "done")
    run = run_to_end(clerk().start("hello"))
    scripted_model.requests.clear()
    scripted_model.say("again")
    later = run_to_end(clerk().start("and now?", thread=run.thread))
    assert [message["role"] for message in asked(scripted_model.requests[0])["messages"]] == [
        "user", "assistant", "user"
    ]  # fmt: skip
    rebuilt(later, scripted_model)


def test_runs_that_go_on_with_the_work_of_another_one_are_shown_its_calls(scripted_model: ScriptedModel) -> None:
    script(scripted_model)
    scripted_model.replies[3] = ProviderError("auth", "no key")
    failed = run_to_end(clerk().start("hello"))
    shown = words(scripted_model, 3)
    assert failed.status == "failed"
    scripted_model.say("resumed", "retried", "forked", "forked at one", call("a_step", word="6"), "further", "new")
    resumed = run_to_end(failed.resume())
    assert words(scripted_model) == shown  # the model has not spoken since
    retried = run_to_end(resumed.retry())
    assert words(scripted_model) == shown
    run_to_end(failed.fork())
    assert words(scripted_model) == shown
    at_one = run_to_end(failed.fork(after_step=1))
    assert words(scripted_model) == ["hello", *FIRST, "a_step(3)", "-> 1", "-> 2", "-> 3"]
    run_to_end(at_one.fork(after_step=0))  # of a fork: the whole chain counts
    assert words(scripted_model)[-2:] == ["a_step(6)", "-> 6"]
    run_to_end(clerk().start("and now?", thread=retried.thread))
    assert words(scripted_model) == ["hello", "Let me see.", "always(1)", "-> 1", "retried", "and now?"]


def test_what_nobody_keeps_out_costs_no_look_at_other_runs(scripted_model: ScriptedModel) -> None:
    from unittest import mock

    scripted_model.say([call("always", word="1")], "done", "again")
    run = run_to_end(clerk().start("hello"))
    with mock.patch("runs.engine.work_of", side_effect=AssertionError):
        run_to_end(clerk().start("and now?", thread=run.thread))
    part = Message.objects.get(run_id=run.pk, role="assistant", step=1).content[0]
    assert part.keys() == {"type", "tool_call", "name", "arguments"}


def test_a_word_that_says_nothing_of_how_long_is_refused() -> None:
    with pytest.raises(ToolOptionError, match="in_context is one of thread, run, step; got 'never'"):

        @tool(in_context="never")  # type: ignore[call-overload]
        def plain() -> None:
            """Do nothing."""
