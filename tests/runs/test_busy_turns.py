"""Steered, interrupted and rolled back in mid stream and in mid fan-out, through the real engine: what the model is shown next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from runs.models import Run
from runs.providers.port import ModelEvent, ModelRequest, TextDelta, ToolCallDelta
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from runs.verification import verify
from tests.runs.scenes import Cast, payloads, speaking, texts, types
from threads.models import Message
from tools import tool

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _whole(db: None) -> Iterator[None]:
    """Afterwards every invariant holds, and the logs alone tell what the tables hold."""
    yield
    assert_invariants()
    for run in Run.objects.all():
        assert verify(run).differences == []


def said(run: Run) -> list[tuple[str, str, str]]:
    return [(m.role, m.text, m.status) for m in run.thread.messages.filter(position__isnull=False).order_by("position")]


def test_what_steers_a_run_while_it_says_its_last_word_is_answered_by_it(cast: Cast) -> None:
    agent = cast()

    def script(request: ModelRequest) -> Iterator[ModelEvent]:
        if len(voice.requests) == 1:
            yield TextDelta("One")
            assert agent.start("and two?", thread=run.thread, busy="steer", client_id="c") == run
            yield TextDelta(".")
        else:
            yield TextDelta("Two.")

    with speaking(script) as voice:
        run = agent.start("one?")
        run_to_end(run)
        assert [texts(each) for each in voice.requests] == [["one?"], ["one?", "One.", "and two?"]]
    assert (run.status, run.stop_reason, run.output, run.steps) == ("completed", "end_turn", "Two.", 2)
    assert Run.objects.count() == 1
    assert [each["client_id"] for each in payloads(run, "message.completed") if each["role"] == "user"] == ["", "c"]


def test_a_run_that_has_no_room_for_another_step_ends_and_its_steering_becomes_a_run(cast: Cast) -> None:
    agent = cast()

    def script(request: ModelRequest) -> Iterator[ModelEvent]:
        if len(voice.requests) == 1:
            agent.start("and two?", thread=run.thread, busy="steer")
        yield TextDelta(f"{len(voice.requests)}.")

    with speaking(script) as voice:
        run = agent.start("one?", limits={"max_steps": 1})
        run_to_end(run)
        [new] = Run.objects.filter(parent=run)
        run_to_end(new)
        assert texts(voice.requests[1]) == ["one?", "1.", "and two?"]
    assert (run.status, run.output, new.origin, new.output) == ("completed", "1.", "steer", "2.")
    assert new.overrides == run.overrides
    assert "went on" not in run.why()


def test_a_run_is_steered_while_its_tools_run_behind_their_results(cast: Cast, scripted_model: ScriptedModel) -> None:
    @tool
    def book(table: int) -> str:
        """Book a table."""
        if table == 1:
            agent.start("the window, please", thread=run.thread, busy="steer")
        return "booked"

    agent = cast(tools=[book])
    scripted_model.say([call("book", table=1), call("book", table=2)], "Done.")
    run = agent.start("two tables")
    run_to_end(run)
    assert texts(scripted_model.requests[1]) == [
        "two tables",
        "calls 2",
        "-> booked",
        "-> booked",
        "the window, please",
    ]
    assert run.status == "completed"


@pytest.mark.parametrize("busy", ["interrupt", "rollback"])
def test_in_mid_stream_the_next_model_call_is_shown_what_was_said_or_nothing(cast: Cast, busy: str) -> None:
    agent = cast(tools=[])
    started: list[Run] = []

    def script(request: ModelRequest) -> Iterator[ModelEvent]:
        if len(voice.requests) == 1:
            yield TextDelta("So far so")
            yield ToolCallDelta(0, "x", "book", '{"tab')
            started.append(agent.start("stop", thread=run.thread, busy=busy))
            yield TextDelta(" good")
        else:
            yield TextDelta("Stopped.")

    with speaking(script) as voice:
        run = agent.start("go")
        run_to_end(started[0] if started else run)
        run_to_end(started[0])
        # Nothing of it was a row yet: without a flusher every delta waits for the commit.
        assert texts(voice.requests[1]) == (["go", "stop"] if busy == "interrupt" else ["stop"])
    run.refresh_from_db()
    assert (run.status, run.stop_reason) == ("cancelled", {"interrupt": "interrupted", "rollback": "rolled_back"}[busy])
    assert types(run)[-1] == "run.cancelled"
    assert "text.delta" not in types(run)[types(run).index("run.cancelled") :]
    assert "went on in run" in run.why()


@pytest.mark.parametrize("busy", ["interrupt", "rollback"])
def test_in_mid_fan_out_every_call_is_answered_and_what_took_effect_is_told(
    cast: Cast, scripted_model: ScriptedModel, busy: str
) -> None:
    started: list[Run] = []

    @tool
    def book(table: int) -> str:
        """Book a table."""
        if table == 2:
            started.append(agent.start("stop", thread=run.thread, busy=busy))
        return "booked"

    agent = cast(tools=[book])
    scripted_model.say(["I book.", *(call("book", table=number) for number in (1, 2, 3))], "Stopped.")
    run = agent.start("three tables")
    run_to_end(run)
    [new] = started
    run_to_end(new)
    kept = ["three tables", "I book. calls 3", "-> booked", "-> None", "-> None", "stop"]
    assert texts(scripted_model.requests[1]) == (kept if busy == "interrupt" else ["stop"])
    results = Message.objects.filter(run_id=run.pk, role="tool").order_by("position")
    assert [each.content[0]["outcome"] for each in results] == ["success", "cancelled", "cancelled"]
    if busy == "rollback":
        told: Any = new.rolled_back
        assert told["run"] == str(run.pk)
        assert [(each["arguments"], each["effect"]) for each in told["tool_calls"]] == [
            ({"table": 1}, "taken"), ({"table": 2}, "possible"),
        ]  # fmt: skip
        assert set(results.values_list("status", flat=True)) == {"rolled_back"}
    assert new.output == "Stopped."


def test_an_answer_that_does_not_fit_its_schema_is_corrected_before_the_steering(cast: Cast) -> None:
    agent = cast()

    def script(request: ModelRequest) -> Iterator[ModelEvent]:
        if len(voice.requests) == 1:
            agent.start("quick", thread=run.thread, busy="steer")
        yield TextDelta("no JSON" if len(voice.requests) == 1 else "3")

    with speaking(script) as voice:
        run = agent.start("a number", output_schema={"type": "integer"})
        run_to_end(run)
        shown = texts(voice.requests[1])
    assert (shown[:2], shown[-1]) == (["a number", "no JSON"], "quick")
    assert "does not fit" in shown[2]
    assert run.output == 3
