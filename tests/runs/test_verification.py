"""The log alone tells what the tables hold, of runs of every kind; and what was tampered with is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db.models import F

from runs import Run, engine, lifecycle
from runs.agents import Agent
from runs.flusher import Flusher
from runs.models import Event, Leg, Step, Usage
from runs.providers.port import ModelEvent, ModelRequest, ProviderError, ReasoningDelta, TextDelta, UsageReported
from runs.pytest_longhaul import Reply, ScriptedModel, WorkerKilled, call, run_to_end
from runs.replay import replay
from runs.testing.inline_worker import working
from runs.verification import Report, verify, verify_all
from tests.runs.scenes import Cast, speaking
from threads.models import Message, MessageStatus, Thread
from tools import RetryPolicy, ToolFailed, tool
from tools.models import ToolAttempt, ToolCall

pytestmark = pytest.mark.django_db

killed: list[str] = []


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool(retry=RetryPolicy(attempts=3))
def fragile(how: str) -> str:
    """Fail once, in one of the ways."""
    if how not in killed:
        killed.append(how)
        if how == "killed":
            raise WorkerKilled
        if how == "error":
            raise RuntimeError("not now")
    if how == "failed":
        raise ToolFailed("never")
    return "there"


@tool(idempotent=False)
def once() -> str:
    """Kill the worker: whether it took effect nobody knows."""
    raise WorkerKilled


@pytest.fixture(autouse=True)
def fresh() -> None:
    killed.clear()


@pytest.fixture
def agent(cast: Cast) -> Agent:
    return cast(tools=[add, fragile, once])


def taken(run: Run) -> Run:
    """Take the run to its end over the deaths of its workers."""
    while True:
        try:
            return run_to_end(run)
        except WorkerKilled:
            continue


def sound(run: Run) -> Report:
    run.refresh_from_db()
    report = verify(run)
    assert [str(each) for each in report.differences] == []
    assert report.events == run.last_seq == run.event_set.count() > 0
    return report


# --- runs of every kind


def test_a_run_with_calls_that_succeed_fail_and_are_bad(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(
        ["Let me see.", call("add", a=1, b=2), call("fragile", how="failed"), call("nothing"), call("add", a="x")],
        "It is three.",
    )
    run = run_to_end(agent.start("How much?", messages=[{"role": "system", "content": "be brief"}], client_id="c-1"))
    sound(run)
    told = replay(event.as_dict() for event in run.events())
    assert [(each.role, each.step, each.client_id) for each in told.transcript] == [
        ("system", None, ""), ("user", None, "c-1"), ("assistant", 1, None), *[("tool", 1, None)] * 4, ("assistant", 2, None),
    ]  # fmt: skip
    assert [(each.name, each.outcome, each.result) for each in told.calls.values()] == [
        ("add", "success", 3), ("fragile", "failed", None), ("nothing", "failed", None), ("add", "failed", None),
    ]  # fmt: skip
    assert (told.status, told.stop_reason, told.output, told.steps) == ("completed", "end_turn", "It is three.", 2)


def test_tools_that_were_retried_and_whose_worker_died(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say([call("fragile", how="error"), call("fragile", how="killed")], "done")
    run = taken(agent.start("try"))
    assert run.status == "completed"
    sound(run)
    told = replay(event.as_dict() for event in run.events())
    tried = [[attempt.outcome for attempt in each.attempts] for each in told.calls.values()]
    assert tried == [["retrying", "success"], ["lost", "success"]]


def test_a_call_of_which_nobody_knows_whether_it_took_effect(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("once"))
    run = taken(agent.start("try"))
    assert run.status == "requires_action"
    sound(run)
    run.cancel()
    sound(run)


def test_a_model_that_failed_in_the_middle_and_was_paid_for_it(agent: Agent, scripted_model: ScriptedModel) -> None:
    paid = UsageReported(100, 7, cached_tokens=3, reasoning_tokens=2)

    def script(request: ModelRequest) -> Any:
        yield TextDelta("I ")
        yield paid
        if len(asked.requests) < 3:
            raise ProviderError("server", "cut")
        yield TextDelta("see.")

    with speaking(script) as asked:
        run = agent.start("hello")
        with working() as present:
            for _ in range(3):
                present.beat()
                Run.objects.filter(pk=run.pk).update(not_before=None)
                run.refresh_from_db()
                engine.advance(run.pk, run.dispatch_seq, engine.Process(present))
                sound(run)
    run.refresh_from_db()
    assert (run.status, run.input_tokens, run.output_tokens) == ("completed", 300, 21)
    assert [event.payload.get("discarded", False) for event in Event.objects.filter(type="usage").order_by("seq")] == [
        True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("prices", [{}, {"x": {"input": 0.15, "output": 0.6}}, {"x": {"input": 1 / 3}}])
def test_costs_and_a_model_that_fails_for_good(
    agent: Agent, scripted_model: ScriptedModel, settings: Any, prices: dict[str, Any]
) -> None:
    settings.LONGHAUL = {**settings.LONGHAUL, "PRICES": prices}
    scripted_model.say(
        [UsageReported(1234567, 89), call("add", a=1, b=1)],
        [UsageReported(7, 11), call("add", a=1, b=1)],
        ProviderError("auth", "no"),
    )
    run = run_to_end(agent.start("hello"))
    assert (run.status, run.stop_reason) == ("failed", "model_error")
    assert bool(run.cost) == bool(prices)
    sound(run)


@pytest.mark.parametrize("limits", [{"max_steps": 2}, {"max_total_tokens": 1}])
def test_a_run_that_a_limit_ends(agent: Agent, scripted_model: ScriptedModel, limits: dict[str, Any]) -> None:
    replies: list[Reply] = [call("add", a=1, b=1), ["no more", call("add", a=1, b=1)]]
    scripted_model.say(*replies[: limits.get("max_steps", 1)])
    run = run_to_end(agent.start("hello", limits=limits))
    assert run.finished
    sound(run)


def cut(agent: Agent, do: Callable[[Run], Any], **options: Any) -> Run:
    """A run to which something happens while its model speaks, and what it has said so far is in the log."""
    run = agent.start("hello", **options)

    def script(request: ModelRequest) -> Iterator[ModelEvent]:
        yield TextDelta("one ")
        yield ReasoningDelta("hm")
        yield TextDelta("two")
        flusher.flush()
        do(run)
        yield TextDelta(" three")

    with speaking(script), working() as present:
        flusher = Flusher(timedelta())  # not started: its thread would have a connection of its own
        engine.advance(run.pk, 1, engine.Process(present, flusher))
    run.refresh_from_db()
    return run


def test_a_run_that_was_cancelled_lost_or_failed_while_it_spoke(agent: Agent) -> None:
    run = cut(agent, lambda run: run.cancel("enough"))
    assert (run.status, run.error) == ("cancelled", {"code": "cancelled", "message": "enough", "retryable": False})
    sound(run)

    def lose(run: Run) -> None:
        run.refresh_from_db()
        assert run.holder is not None
        sound(run)  # in flight, with a pending message
        lifecycle.reclaim(run.pk, run.epoch, run.holder)

    run = cut(agent, lose)
    assert run.status == "queued"
    sound(run)


def test_runs_that_were_held_and_messages_that_were_saved_meanwhile(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    thread = Thread.objects.create()
    before = thread.save(role="user", content="saved before")
    first = agent.start(message=before)
    second = agent.start("second", thread=thread, client_id="c-2")
    third = agent.start("third", thread=thread, messages=[{"role": "user", "content": "more"}])
    thread.save(role="user", content="by hand", client_id="c-3")
    hand = thread.save(role="user", content="and run from it")
    fourth = agent.start(message=hand, thread=thread)
    for run in (first, second, third, fourth):
        sound(run)
    third.cancel()
    sound(third)
    assert [each.payload["role"] for each in third.event_set.filter(type="message.discarded").order_by("seq")] == [
        "user", "user",
    ]  # fmt: skip
    scripted_model.say(call("add", a=1, b=1), "one", "two", "four")
    for run in (first, second, fourth):
        run_to_end(run)
        sound(run)
    told = replay(event.as_dict() for event in first.events())
    said = [part["text"] for each in told.transcript for part in each.content or [] if part["type"] == "text"]
    assert said == ["saved before", "by hand", "one"]


def test_successors_and_what_they_do_to_a_log_that_has_ended(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("add", a=1, b=1), "two")
    run = run_to_end(agent.start("how much?"))
    again, copy = run.retry(), run.fork(after_step=1)
    [since] = sound(run).since
    assert since.endswith("was marked superseded")
    scripted_model.say("too", "also two")
    for each in (again, copy):
        sound(each)
        run_to_end(each)
        sound(each)
    # A message that was deleted since is no difference either, and told
    Message.objects.filter(run_id=again.pk).delete()
    assert [line.endswith("was deleted") for line in sound(again).since] == [True]
    assert {report.run: len(report.differences) for report in verify_all(batch=2)} == {
        run.pk: 0, again.pk: 0, copy.pk: 0,
    }  # fmt: skip


# --- what was tampered with


def _of_event(type: str, **change: Any) -> Callable[[Run], None]:
    def tamper(run: Run) -> None:
        event = Event.objects.filter(run=run, type=type).order_by("-seq")[0]
        Event.objects.filter(pk=event.pk).update(payload={**event.payload, **change})

    return tamper


def _drop(type: str) -> Callable[[Run], None]:
    return lambda run: Event.objects.filter(pk=Event.objects.filter(run=run, type=type).order_by("-seq")[0].pk).delete()  # type: ignore[return-value]


def _rows(model: Any, **change: Any) -> Callable[[Run], None]:
    return lambda run: model.objects.update(**change)


def _last(**change: Any) -> Callable[[Run], None]:
    return lambda run: Message.objects.filter(  # type: ignore[return-value]
        pk=Message.objects.filter(run_id=run.pk, role="assistant").order_by("-position")[0].pk
    ).update(**change)


TAMPERED = {
    "status": _rows(Run, status="failed"),
    "stop_reason": _rows(Run, stop_reason="max_steps"),
    "output": _rows(Run, output="four"),
    "error": _rows(Run, error={"code": "x"}),
    "last seq": _rows(Run, last_seq=F("last_seq") + 1),
    "steps": _rows(Run, steps=3),
    "legs": _rows(Run, legs=7),
    "usage": _rows(Run, input_tokens=F("input_tokens") + 1),
    "rows of usage": _rows(Usage, output_tokens=F("output_tokens") + 1),
    "rows of steps": lambda run: Step.objects.filter(number=1).delete(),
    "legs, how they ended": _rows(Leg, reason="lost"),
    "leg 1 epoch": _rows(Leg, epoch=9),
    "pending messages": _last(status=MessageStatus.PENDING),
    "status: the log tells 'completed', the table holds 'discarded'": _last(status=MessageStatus.DISCARDED),
    "(assistant) content": _last(content=[{"type": "text", "text": "four"}]),
    "(assistant) step": _last(step=5),
    "(assistant) role": _last(role="user"),
    "client_id": lambda run: Message.objects.filter(role="user").update(client_id="z"),
    "place in the thread": lambda run: Message.objects.filter(role="user").update(position=99),
    "(user): the log tells nothing": lambda run: Message.objects.create(
        thread=run.thread, run_id=run.pk, role="user", content=[], position=77
    ),
    "(add) result": _rows(ToolCall, result=4),
    "(add) arguments": _rows(ToolCall, arguments={}),
    "(add) outcome": _rows(ToolCall, outcome="failed"),
    "(add) attempt:": _rows(ToolCall, attempt=2),
    "(add) attempts": lambda run: ToolAttempt.objects.all().delete(),
    "attempt 1 outcome": _rows(ToolAttempt, outcome="failed"),
    "tool calls, in order": lambda run: ToolCall.objects.all().delete(),
    "output: the log tells 'five'": _of_event("run.completed", output="five"),
    "usage that the terminal event tells": _of_event("run.completed", usage={"input_tokens": 1}),
    "usage: the log tells": _of_event("usage", input_tokens=9999),
    "kept or differ": _of_event("text.delta", text="no such word"),
    "(add) result: the log tells 5": _of_event("tool_call.settled", result=5),
    "there is a gap": _drop("tool_call.started"),
    "status: the log tells 'running'": _drop("run.completed"),
    "leg 2 ends, and was not open": _drop("leg.started"),
    "which nobody made": _drop("tool_call.created"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_tampered_with_is_named(agent: Agent, scripted_model: ScriptedModel, what: str) -> None:
    scripted_model.say(["Let me see.", call("add", a=1, b=2)], "It is three.")
    run = run_to_end(agent.start("How much?"))
    sound(run)
    TAMPERED[what](run)
    found = [str(each) for each in verify(run.pk).differences]
    assert any(what in each for each in found), found


def test_a_run_of_which_an_event_came_twice_or_after_the_end() -> None:
    at = {"at": "2026-11-21T07:00:00Z", "run": "r"}
    events: list[dict[str, Any]] = [
        {"seq": 1, "type": "run.queued", **at},
        {"seq": 1, "type": "run.queued", **at},
        {"seq": 2, "type": "run.cancelled", **at},
        {"seq": 3, "type": "data", "data": 1, **at},
    ]
    assert replay(events).faults == [
        "event 1: follows 1: there is a gap, or an event twice",
        "event 3: data after the end",
    ]
    # One that stands for a range, as compaction will write it, is no gap
    assert replay([events[0], {"seq": 9, "from_seq": 2, "type": "data", **at}]).faults == []
