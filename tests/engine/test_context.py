"""What the model is shown: the last messages, whole turns only, the run's own input always; and each request can be rebuilt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from runs import engine
from runs.models import Run, Step
from runs.providers.port import ModelRequest, ProviderError
from runs.pytest_longhaul import CallTool, Reply, ScriptedModel, assert_invariants, call, run_to_end
from tests.engine.tool_runs import clerk
from tests.runs.scenes import agents_process, asked, texts
from threads.models import Thread

pytestmark = pytest.mark.django_db


def in_one_leg(run: Run) -> Run:
    """Take the run to its end in a single leg, which reads the thread once and then what is new."""
    with agents_process() as process:
        engine.advance(run.pk, 1, process)
    run.refresh_from_db()
    assert run.finished
    assert run.legs == 1
    return run


def rebuilt(step: Step) -> dict[str, Any]:
    """The request as the rows of the step give it, in the words of `scenes.asked`."""
    options = step.asked()
    return {
        "instructions": step.instructions,
        "messages": [{"role": message.role, "content": message.content} for message in step.shown()],
        "tools": step.tool_names,
        "tool_choice": options.pop("tool_choice"),
        "options": options,
    }


def whole(request: ModelRequest) -> bool:
    """No call without its result, no result without its call."""
    open_calls: set[str] = set()
    for message in asked(request)["messages"]:
        for part in message["content"]:
            if part["type"] == "tool_call":
                open_calls.add(part["tool_call"])
            elif part["type"] == "tool_result":
                if part["tool_call"] not in open_calls:
                    return False
                open_calls.remove(part["tool_call"])
    return not open_calls


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("legs", ["one leg", "a leg a step"])
def test_the_request_of_each_step_can_be_rebuilt_from_its_row(scripted_model: ScriptedModel, legs: str) -> None:
    agent = clerk(instructions=lambda run: f"You serve run {run.pk}.", options={"temperature": 0.5})
    thread = Thread.objects.create()
    thread.save_many([{"role": "user", "content": f"old {n}"} for n in range(5)])
    replies: list[Reply] = [
        [f"step {n}", call("add", a=n, b=1), call("add", a=n, b=2)] if n % 3 else call("add", a=n, b=1)
        for n in range(70)
    ]
    if legs == "a leg a step":
        for place in range(60, 0, -10):  # each leaves a discarded message between the others
            replies.insert(place, ProviderError("server", "not now"))
    scripted_model.say(*replies, "done")
    run = agent.start(
        "the task", thread=thread, messages=[{"role": "system", "content": "be brief"}], limits={"max_steps": 71}
    )
    in_one_leg(run) if legs == "one leg" else run_to_end(run)

    assert run.status == "completed"
    answered = [
        request
        for request, reply in zip(scripted_model.requests, [*replies, "done"], strict=True)
        if not isinstance(reply, ProviderError)
    ]
    steps = list(Step.objects.filter(run=run).order_by("number"))
    for step, request in zip(steps, answered, strict=True):
        assert rebuilt(step) == asked(request), step
        assert whole(request), step
        assert len(request.messages) <= 100 + 2
        assert {"the task", "be brief"} <= set(texts(request))
    assert "old 4" in texts(answered[0])
    assert "old 4" not in texts(answered[-1])
    assert_invariants(run)


@pytest.mark.django_db(transaction=True)
def test_a_request_is_the_same_whether_its_leg_read_the_thread_at_once_or_step_by_step(
    scripted_model: ScriptedModel,
) -> None:
    agent = clerk(context={"last_messages": 6})
    extra = [{"role": "user", "content": "an example"}, {"role": "assistant", "content": "its answer"}]

    def requests(to_end: Callable[[Run], Run]) -> list[list[str]]:
        scripted_model.requests.clear()
        scripted_model.say(*(call("add", a=n, b=n) for n in range(12)), "done")
        assert_invariants(to_end(agent.start("the task", messages=extra)))
        return [texts(request) for request in scripted_model.requests]

    one_leg = requests(in_one_leg)
    assert requests(run_to_end) == one_leg
    assert one_leg[-1][:2] == ["an example", "the task"]
    assert len(one_leg[-1]) == 2 + 6


def test_a_turn_larger_than_the_window_is_shown_whole(scripted_model: ScriptedModel) -> None:
    scripted_model.say([call("add", a=n, b=0) for n in range(9)], "done")
    run = run_to_end(clerk(context={"last_messages": 4}).start("hello"))
    assert texts(scripted_model.requests[-1]) == ["hello", "calls 9", *(f"-> {n}" for n in range(9))]
    assert_invariants(run)


def test_a_message_saved_by_hand_during_a_run_is_shown_at_the_next_boundary(scripted_model: ScriptedModel) -> None:
    def answer(messages: list[dict[str, Any]]) -> Reply:
        if len(messages) == 1:
            thread.save(role="user", content="and mind the gap")
            return call("add", a=1, b=1)
        return "done"

    scripted_model.answer = answer
    thread = Thread.objects.create()
    run = run_to_end(clerk().start("hello", thread=thread))
    assert texts(scripted_model.requests[-1]) == ["hello", "calls 1", "-> 2", "and mind the gap"]
    assert_invariants(run)


def test_a_call_that_was_cancelled_has_its_result_in_the_next_runs_context(scripted_model: ScriptedModel) -> None:
    agent = clerk()
    run = agent.start("first")

    def answer(messages: list[dict[str, Any]]) -> Reply:
        run.cancel()
        return [call("add", a=1, b=1), CallTool("add", "not json")]

    scripted_model.answer = answer
    run_to_end(run)
    assert run.status == "cancelled"
    scripted_model.answer = None
    scripted_model.say("done")
    after = run_to_end(agent.start("second", thread=run.thread))
    assert whole(scripted_model.requests[-1])
    assert texts(scripted_model.requests[-1])[0] == "first"
    assert texts(scripted_model.requests[-1])[-1] == "second"
    assert_invariants(run)
    assert_invariants(after)
