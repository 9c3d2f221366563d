"""Why a run stands still: every state that a run can stand in is named, with the command that mends it where one does."""

from __future__ import annotations

import io
import itertools
import json
import re
import shlex
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command

from runs import engine, explain, lifecycle
from runs.agents import Agent
from runs.models import Event, Run, StopReason
from runs.providers.port import ProviderError
from runs.pytest_longhaul import ScriptedModel, call, move_clock, run_to_end
from runs.sweep import SWEEP_LOCK
from runs.testing.inline_worker import working
from tests.protocol.rows import wait_until
from tests.runs.invariant_cases import STATES, State
from tests.runs.scenes import Cast
from threads import clock
from threads.clock import Now
from threads.ids import new_id
from tools import execution, presence, tool
from tools.lifecycle import claim as claim_call
from tools.models import Pause, ToolCall, Worker

pytestmark = pytest.mark.django_db


@tool
def look_up(number: int) -> str:
    """Look up."""
    return f"found {number}"


@tool(idempotent=False)
def refund(number: int) -> str:
    """Pay back."""
    return "paid"


@pytest.fixture
def agent(cast: Cast) -> Agent:
    return cast(tools=[look_up, refund])


_lock_keys = itertools.count(1)


def worker(kind: str) -> Worker:
    return Worker.objects.create(
        name=f"{kind}@host", kind=kind, host="host", pid=1, lock_key=next(_lock_keys), beat_at=Now()
    )


def claimed(run: Run, by: Worker) -> Run:
    """Let a worker claim the run, as the first thing that its leg does."""
    answer = lifecycle.claim(run.pk, run.dispatch_seq, worker=by.pk, worker_name=by.name, task_id="t", leg=new_id())
    assert answer is not None, run.why()
    run.refresh_from_db()
    return run


def says(run: Run, *words: str, mend: str | None, stuck: bool) -> None:
    run.refresh_from_db()
    told = explain.explain(run)
    for word in words:
        assert word in told.why, told
    assert told.stuck == stuck, told
    if mend is None:
        assert told.mend is None
    else:
        assert told.mend is not None, told
        assert mend in told.mend


# --- queued


def test_a_new_run_waits_for_a_moment_without_complaint(agent: Agent) -> None:
    says(agent.start("hello"), "queued for", "(new)", "published once", mend=None, stuck=False)


def test_a_run_without_an_agents_worker(agent: Agent) -> None:
    run = agent.start("hello")
    move_clock(timedelta(seconds=20))
    says(run, "no agents worker is present", mend="worker -Q longhaul.agents", stuck=True)
    Worker.objects.filter(pk=worker("agents").pk).update(gone_at=Now())  # found dead
    says(run, "no agents worker is present", mend="worker -Q longhaul.agents", stuck=True)


def test_a_run_that_nobody_publishes_again(agent: Agent) -> None:
    run = agent.start("hello")
    move_clock(timedelta(seconds=20))
    worker("agents")
    says(run, "no control worker is present", mend="worker -Q longhaul.control", stuck=True)
    worker("control")
    says(run, "again since", mend=None, stuck=False)


@pytest.mark.parametrize(("bounds", "settled", "words"), [
    ({"max_concurrency": 1}, {}, "waits for its turn: 1 of 1 runs of {agent} are at work"),
    ({"rate_limit": "1/h"}, {}, "waits for the rate of {agent}, 1/h"),
    ({}, {"RUNS_PER_OWNER": 1}, "waits for its turn: 1 of 1 runs of its owner are at work"),
    ({"queue": "gpu"}, {"MAX_DISPATCHED": 1}, "waits for room: 1 runs of gpu are out"),
])  # fmt: skip
def test_a_run_that_waits_for_its_turn_says_for_what_and_is_not_stuck_while_somebody_lets_it_out(
    cast: Cast, settings: Any, bounds: dict[str, Any], settled: dict[str, Any], words: str
) -> None:
    settings.LONGHAUL = {**settings.LONGHAUL, **settled}
    limited = cast(**bounds)
    owner = get_user_model()._default_manager.create(username="somebody")
    runs = [limited.start("hello", owner=owner) for _ in range(3)]
    lifecycle.release()
    words = words.format(agent=limited.name)
    says(runs[0], "published once", mend=None, stuck=False)
    says(runs[1], "queued for", f"(new), {words}", mend=None, stuck=False)
    says(runs[2], f"{words}, 1 before it", mend=None, stuck=False)
    move_clock(timedelta(seconds=12))
    own = ",gpu" if "queue" in bounds else ""
    says(runs[2], "no agents worker is present", mend=f"worker -Q longhaul.agents{own} -P", stuck=True)
    worker("agents")
    says(runs[2], "no control worker is present", mend="longhaul.control", stuck=True)
    worker("control")
    for each in runs[1:]:
        says(each, words, mend=None, stuck=False)
    assert "No run is stuck." in told("list_runs", "--stuck")


def test_a_run_whose_agent_is_left_alone_says_until_when(cast: Cast) -> None:
    paused = cast(max_concurrency=5)
    run = paused.start("hello")
    Pause.objects.create(key=f"agent:{paused.name}", until=clock.now() + timedelta(hours=1), reason="too dear")
    says(run, "waits until", f"UTC, for runs of {paused.name} are paused", mend=None, stuck=False)
    Pause.objects.all().delete()
    says(run, "waits for its turn, which has come", mend=None, stuck=False)


def test_a_worker_that_is_silent_is_not_present(agent: Agent) -> None:
    worker("agents")
    worker("control")
    run = agent.start("hello")
    move_clock(timedelta(seconds=20))
    says(run, "no agents worker is present", mend="longhaul.agents", stuck=True)


def test_a_model_that_failed_is_asked_again_at_a_time(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(ProviderError("rate_limited", "slow down", retry_after=timedelta(seconds=90)))
    run = agent.start("hello")
    with pytest.raises(AssertionError):
        run_to_end(run, moves_clock=False)  # it is not due
    says(run, "to be claimed in", "s", "try 2 of 8", "rate_limited: slow down", mend=None, stuck=False)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("joined", "its tool calls are settled"),
        ("handed_over", "its last leg used up its time"),
        ("reclaimed", "its worker died"),
    ],
)
def test_why_a_run_is_in_the_queue_again(scripted_model: ScriptedModel, state: str, words: str) -> None:
    says(getattr(State(scripted_model), state)(), f"({words})", mend=None, stuck=False)


def test_a_run_whose_worker_shut_down_and_one_whose_turn_has_come_say_so(agent: Agent) -> None:
    by = worker("agents")
    first = claimed(agent.start("one"), by)
    second = agent.start("two", thread=first.thread)
    lifecycle.requeue(first.pk, first.epoch, by.pk, "drained")
    says(first, "(its worker shut down)", mend=None, stuck=False)
    first.cancel()
    says(second, "(the run before it has ended)", mend=None, stuck=False)


def test_a_run_that_its_lingering_leg_takes_needs_no_message(scripted_model: ScriptedModel) -> None:
    run = State(scripted_model).joined()
    Run.objects.filter(pk=run.pk).update(linger_until=clock.now() + timedelta(seconds=30))
    move_clock(timedelta(seconds=20))
    says(run, "the leg that lingers takes it", mend=None, stuck=False)
    move_clock(timedelta(seconds=20))
    says(run, "no agents worker is present", mend="longhaul.agents", stuck=True)


def test_a_run_is_moved_on_by_who_sweeps_beside_other_work(agent: Agent) -> None:
    """A worker of all queues is no control worker by its row; it is known by the lock that who sweeps holds."""
    run = agent.start("hello")
    move_clock(timedelta(seconds=20))
    worker("agents")
    session = presence.connect("sweeps")
    session.execute("SELECT pg_advisory_lock(%s)", (SWEEP_LOCK,))
    says(run, "again since", mend=None, stuck=False)
    session.close()
    wait_until(lambda: explain.explain(run).stuck)


# --- held


def test_a_held_run_names_the_run_before_it_and_what_that_one_lacks(agent: Agent) -> None:
    first = agent.start("one")
    second = agent.start("two", thread=first.thread)
    third = agent.start("three", thread=first.thread)
    says(second, "held for", f"behind run {first.pk} of clerk (queued)", mend=None, stuck=False)
    says(third, f"behind run {first.pk}", "and 1 more", mend=None, stuck=False)
    move_clock(timedelta(seconds=20))
    says(third, f"behind run {first.pk}", mend="longhaul.agents", stuck=True)


# --- running


def test_a_running_run_names_its_worker_its_leg_and_what_it_does(agent: Agent) -> None:
    by = worker("agents")
    run = claimed(agent.start("hello"), by)
    says(run, "running on agents@host in leg 1", "prepares step 1", mend=None, stuck=False)
    with_model = lifecycle.open_turn(
        run.pk, run.epoch, by.pk, (new_id(), timedelta(seconds=600), 0, 100, 50, 2**40, "1e9")
    )
    assert with_model is not None
    says(run, "the model speaks step 1 since", "nothing heard yet", mend=None, stuck=False)


def test_a_model_that_speaks_was_heard_a_while_ago(agent: Agent) -> None:
    by = worker("agents")
    run = claimed(agent.start("hello"), by)
    message = new_id()
    lifecycle.open_turn(run.pk, run.epoch, by.pk, (message, timedelta(seconds=600), 0, 100, 50, 2**40, "1e9"))
    seq = run.last_seq + 50
    for ordinal in (1, 2):
        Event.objects.create(
            run=run, seq=seq + ordinal, type="text.delta", at=clock.now(), message_id=message, ordinal=ordinal
        )
        move_clock(timedelta(minutes=10))
        Worker.objects.update(beat_at=Now())
    says(run, "the model speaks step 1 since 20 min", "last heard 10 min", mend=None, stuck=False)


def test_a_run_whose_worker_is_gone_or_silent_is_taken_over_by_who_sweeps(agent: Agent) -> None:
    by = worker("agents")
    run = claimed(agent.start("hello"), by)
    move_clock(timedelta(seconds=20))
    says(run, "its worker is silent", "no control worker", mend="longhaul.control", stuck=True)
    worker("control")
    says(run, "its worker is silent", "the sweep takes it over", mend=None, stuck=False)
    Worker.objects.filter(pk=by.pk).update(gone_at=Now())
    says(run, "its worker is gone", mend=None, stuck=False)
    move_clock(timedelta(seconds=60))
    worker("control")
    says(run, "its time was up", mend=None, stuck=False)


# --- waiting


def waiting(agent: Agent, scripted_model: ScriptedModel, *calls: Any) -> Run:
    """A run that waits for its calls, which nobody runs."""
    scripted_model.say(list(calls))
    run = agent.start("hello")
    by = worker("agents")
    with working() as present:
        engine.advance(run.pk, 1, engine.Process(present))
    by.delete()
    run.refresh_from_db()
    assert run.status == "waiting", run.why()
    return run


def test_a_waiting_run_names_its_calls_and_what_each_waits_for(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = waiting(agent, scripted_model, call("look_up", number=1), call("look_up", number=2))
    says(
        run, "waiting for 2 of 2 tool calls", "look_up (requested, published once, attempt 1 of", mend=None, stuck=False
    )
    first = ToolCall.objects.get(run_id=run.pk, index=0)
    by = worker("tools")
    assert claim_call(first.pk, 1, worker=by.pk, worker_name=by.name, task_id="t", alone=True)
    says(run, "look_up (running on tools@host", mend=None, stuck=False)
    move_clock(timedelta(seconds=20))
    says(run, "which is silent", "no tools worker is present", mend="longhaul.tools", stuck=True)
    worker("tools")
    says(run, "no control worker is present", mend="longhaul.control", stuck=True)
    worker("control")
    says(run, "which is silent", mend=None, stuck=False)


def test_a_call_whose_worker_is_gone_needs_somebody_who_sweeps(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = waiting(agent, scripted_model, call("look_up", number=1))
    by, _other = worker("tools"), worker("tools")
    assert claim_call(ToolCall.objects.get().pk, 1, worker=by.pk, worker_name=by.name, task_id="t", alone=True)
    Worker.objects.filter(pk=by.pk).update(gone_at=Now())
    says(run, "running on a worker that is gone", "no control worker", mend="longhaul.control", stuck=True)
    worker("control")
    says(run, "running on a worker that is gone", mend=None, stuck=False)


def test_many_calls_are_told_in_short(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = waiting(agent, scripted_model, *(call("look_up", number=n) for n in range(8)))
    says(run, "waiting for 8 of 8 tool calls", "and 3 more", mend=None, stuck=False)
    assert run.why().count("look_up") == 5


def test_a_call_that_is_tried_again_later_says_when_and_after_what(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = waiting(agent, scripted_model, call("look_up", number=1))
    later = clock.now() + timedelta(minutes=5)
    ToolCall.objects.filter(run_id=run.pk).update(
        status="retrying", attempt=2, not_before=later, next_publish_at=later, error={"code": "timed_out"}
    )
    says(run, "look_up (again in", "after timed_out, attempt 2 of", mend=None, stuck=False)


def test_a_call_of_which_nobody_knows_whether_it_took_effect(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = waiting(agent, scripted_model, call("refund", number=1))
    ToolCall.objects.filter(run_id=run.pk).update(status="unknown", next_publish_at=None)
    Run.objects.filter(pk=run.pk).update(status="requires_action")
    says(run, "waiting for people at 1 of 1 tool call", "its worker died", mend="cancel()", stuck=False)


def test_a_settled_call_and_those_of_earlier_steps_are_not_waited_for(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    scripted_model.say(call("look_up", number=1))
    run = waiting(agent, scripted_model, call("look_up", number=2), call("look_up", number=3))
    assert run.steps == 1
    with working() as present:
        execution.execute(ToolCall.objects.get(run_id=run.pk).pk, 1, presence=present)
        run.refresh_from_db()
        engine.advance(run.pk, run.dispatch_seq, engine.Process(present))
        first, _ = ToolCall.objects.filter(run_id=run.pk, step=2).order_by("index")
        execution.execute(first.pk, 1, presence=present)
    says(run, "waiting for 1 of 2 tool calls: look_up (requested", mend=None, stuck=False)
    assert run.why().count("look_up") == 1


def test_a_call_that_was_sent_three_times_and_that_nobody_takes(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = waiting(agent, scripted_model, call("look_up", number=1))
    later = clock.now() + timedelta(seconds=8)
    ToolCall.objects.filter(run_id=run.pk).update(publishes=3, next_publish_at=later)
    says(run, "published 3 times", "no tools worker is present", mend="worker -Q longhaul.tools -P", stuck=True)
    worker("tools")
    worker("control")
    says(run, "published 3 times", mend=None, stuck=False)


def test_a_call_with_a_queue_of_its_own_needs_a_worker_of_that_queue(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    run = waiting(agent, scripted_model, call("look_up", number=1), call("look_up", number=2))
    ToolCall.objects.filter(run_id=run.pk, index=1).update(queue="slow")
    move_clock(timedelta(seconds=20))
    says(run, "no tools worker is present", mend="worker -Q longhaul.tools,slow -P prefork", stuck=True)


def test_a_call_that_waits_for_its_turn_is_not_stuck_while_somebody_lets_it_out(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    run = waiting(agent, scripted_model, call("look_up", number=1))
    ToolCall.objects.filter(run_id=run.pk).update(turn=1, lane="\n", publishes=0, next_publish_at=None)
    says(run, "look_up (waits for its turn, which has come, attempt 1 of", mend=None, stuck=False)
    move_clock(timedelta(seconds=20))
    says(run, "no tools worker is present", mend="longhaul.tools", stuck=True)
    worker("tools")
    says(run, "no control worker is present", mend="longhaul.control", stuck=True)
    worker("control")
    says(run, "waits for its turn", mend=None, stuck=False)


def test_an_unknown_call_does_not_hide_that_nobody_runs_the_other(scripted_model: ScriptedModel) -> None:
    run = State(scripted_model).unknown()
    ToolCall.objects.filter(run_id=run.pk, index=0).update(status="requested", outcome="", settled_at=None)
    move_clock(timedelta(seconds=20))
    ToolCall.objects.filter(run_id=run.pk, index=0).update(next_publish_at=clock.now() - timedelta(seconds=10))
    says(run, "unknown: its worker died", "no tools worker is present", mend="longhaul.tools", stuck=True)


@pytest.mark.parametrize("status", ["awaiting_approval", "awaiting_result"])
def test_a_call_that_waits_for_people_says_for_what_and_until_when(
    agent: Agent, scripted_model: ScriptedModel, status: str
) -> None:
    run = waiting(agent, scripted_model, call("look_up", number=1))
    ToolCall.objects.filter(run_id=run.pk).update(status=status, next_publish_at=None)
    Run.objects.filter(pk=run.pk).update(status="requires_action")
    said = status.replace("_", " ")
    says(run, f"waiting for people at 1 of 1 tool call: look_up ({said})", mend=None, stuck=False)
    ToolCall.objects.filter(run_id=run.pk).update(deadline=datetime(2030, 1, 2, 3, 4, tzinfo=UTC))
    says(run, f"look_up ({said}, until 2030-01-02 03:04 UTC)", mend=None, stuck=False)


def test_a_call_that_waits_for_another_run_names_it(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = waiting(agent, scripted_model, call("look_up", number=1))
    ToolCall.objects.filter(run_id=run.pk).update(status="awaiting_child", next_publish_at=None)
    child = agent.start("help")
    Run.objects.filter(pk=child.pk).update(parent=run, parent_call_id=ToolCall.objects.get(run_id=run.pk).pk)
    says(run, f"look_up (run {child.pk})", mend=None, stuck=False)


def test_a_run_that_moves_while_it_is_explained_is_explained_as_it_is(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    run = waiting(agent, scripted_model, call("look_up", number=1))
    with working() as present:
        execution.execute(ToolCall.objects.get(run_id=run.pk).pk, 1, presence=present)
    assert run.status == "waiting", "as it was read"
    assert explain.explain(run).why.startswith("queued for")
    assert run.why().startswith("queued for")
    assert explain.mend(run) is None
    Run.objects.get(pk=run.pk).cancel()
    assert run.why().startswith("cancelled (cancelled) after 1 step")
    mend = explain.mend(run)
    assert mend is not None
    assert "resume()" in mend
    queued = agent.start("hello")
    Run.objects.get(pk=queued.pk).cancel()
    assert queued.status == "queued", "as it was read"
    assert queued.why().startswith("cancelled")


# --- ended


def test_a_finished_run_says_how_it_ended(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("done")
    says(run_to_end(agent.start("hello")), "completed (end_turn) after 1 step", mend=None, stuck=False)


def test_a_failed_run_says_why_and_how_to_go_on(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(ProviderError("auth", "bad key"))
    run = run_to_end(agent.start("hello"))
    says(run, "failed (model_error) after 0 steps: auth: bad key", mend="resume()", stuck=False)
    assert "a key that is valid" in (explain.explain(run).mend or "")
    cancelled = agent.start("hello")
    cancelled.cancel()
    says(cancelled, "cancelled (cancelled)", mend="go on with a new run", stuck=False)


STOPS = {
    "completed": ["end_turn", "max_steps"],
    "failed": ["token_budget", "cost_budget", "deadline", "model_error", "poison", "tool_unknown", "configuration"],
    "cancelled": ["cancelled", "interrupted", "rolled_back", "thread_deleted", "parent_ended"],
}
FIRST = {
    "model_error": "when the model service is well",
    "poison": "look into the logs of its workers",
    "tool_unknown": "see whether the tool took effect",
    "configuration": "restart the agents workers",
}


def test_every_reason_to_stop_is_told_below() -> None:
    assert sorted(reason for reasons in STOPS.values() for reason in reasons) == sorted(StopReason.values)


@pytest.mark.parametrize(("status", "reason"), [(status, reason) for status in STOPS for reason in STOPS[status]])
def test_a_run_that_has_ended_names_its_reason_and_what_comes_first(agent: Agent, status: str, reason: str) -> None:
    run = agent.start("hello")
    run.cancel()
    error = {"code": "a_code", "message": "a message", "retryable": False}
    Run.objects.filter(pk=run.pk).update(status=status, stop_reason=reason, steps=3, error=error)
    mend = None if status == "completed" else f"go on with a new run: {explain.in_shell(run, 'resume()')}"
    says(run, f"{status} ({reason}) after 3 steps: a_code: a message", mend=mend, stuck=False)
    told = explain.mend(run) or ""
    assert [first for first in FIRST.values() if first in told] == ([FIRST[reason]] if reason in FIRST else [])


# --- what mends does mend


def in_shell(mend: str | None) -> None:
    """Do what the command says, as a shell would."""
    _, _, command = (mend or "").partition("manage.py ")
    name, *arguments = shlex.split(command)
    call_command(name, *arguments, verbosity=0)


def test_the_command_for_a_run_that_failed_goes_on_with_a_new_one(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(ProviderError("auth", "bad key"), "better now")
    run = run_to_end(agent.start("hello"))
    in_shell(explain.mend(run))
    onward = Run.objects.exclude(pk=run.pk).get()
    assert (onward.origin, onward.parent, onward.thread) == ("resume", run, run.thread)
    assert run_to_end(onward).output == "better now"


def test_the_command_for_an_unknown_call_gives_up(scripted_model: ScriptedModel) -> None:
    run = State(scripted_model).unknown()
    in_shell(explain.mend(run))
    says(run, "cancelled (cancelled)", mend="resume()", stuck=False)


def test_the_command_for_rows_that_cannot_be_names_the_invariant(agent: Agent, capsys: Any) -> None:
    run = agent.start("hello")
    Run.objects.filter(pk=run.pk).update(next_publish_at=None)
    with pytest.raises(SystemExit):
        in_shell(explain.mend(run))
    assert "Invariant 7: A queued run is due" in capsys.readouterr().out


def test_the_command_for_absent_workers_names_the_queues_of_this_project(agent: Agent, settings: Any) -> None:
    settings.LONGHAUL = {"AGENTS_QUEUE": "our.agents", "TOOLS_QUEUE": "our.tools", "CONTROL_QUEUE": "our.control"}
    app = f"{explain.celery()} -A agents_project worker -Q our"
    assert explain.start("agents") == f"{app}.agents -P gevent -c 1000 -n agents@%h"
    assert explain.start("tools") == f"{app}.tools -P prefork -n tools@%h"
    assert explain.start("control") == f"{app}.control -P threads -c 2 -n control@%h"


def test_rows_that_cannot_be_are_said_to_break_an_invariant(agent: Agent) -> None:
    run = agent.start("hello")
    Run.objects.filter(pk=run.pk).update(next_publish_at=None)
    says(run, "never again", mend=f"check_runs --run {run.pk}", stuck=True)
    Run.objects.filter(pk=run.pk).update(status="held")
    says(run, "though its thread is free", mend="check_runs", stuck=True)
    Run.objects.filter(pk=run.pk).update(status="waiting")
    says(run, "though every call is settled", mend="check_runs", stuck=True)


# --- words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-3, "0.0 s"),
        (0.26, "0.3 s"),
        (3.26, "3.3 s"),
        (12.4, "12 s"),
        (119.4, "119 s"),
        (119.6, "2 min"),
        (185, "3 min 5 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (4 * 86400 + 3600, "4 d 1 h"),
        (4 * 86400 + 59, "4 d"),
    ],
)
def test_a_span_of_time_has_two_units(seconds: float, words: str) -> None:
    assert explain.span(timedelta(seconds=seconds)) == words


def test_how_often() -> None:
    assert [explain.times(count) for count in range(4)] == ["not yet", "once", "twice", "3 times"]


# --- the commands


def told(*arguments: str) -> str:
    out = io.StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


def test_explain_run_tells_the_run_the_reason_and_the_command(agent: Agent) -> None:
    run = agent.start("hello")
    move_clock(timedelta(seconds=20))
    said = told("explain_run", str(run.pk))
    for word in (
        f"Run {run.pk} of clerk",
        "queued after 0 steps in 0 legs",
        "Why: queued for",
        f"To mend it: {explain.celery()} -A",
    ):
        assert word in said
    as_json = json.loads(told("explain_run", str(run.pk)[-12:], "--json"))  # the end of an id is enough
    assert (as_json["run"], as_json["status"], as_json["agent"]) == (str(run.pk), "queued", "clerk")
    assert "no agents worker" in as_json["why"]
    assert "longhaul.agents" in as_json["mend"]


@pytest.mark.parametrize("state", STATES)
def test_explain_run_tells_of_a_run_in_any_state_to_people_and_to_scripts(
    state: str, scripted_model: ScriptedModel
) -> None:
    run = getattr(State(scripted_model), state)()
    move_clock(timedelta(seconds=20))
    run.refresh_from_db()
    expected = explain.explain(run)
    [line] = told("explain_run", str(run.pk), "--json").splitlines()
    as_json = json.loads(line)
    assert (as_json["run"], as_json["status"], as_json["mend"]) == (str(run.pk), run.status, expected.mend)
    assert without_times(as_json["why"]) == without_times(expected.why)
    said = told("explain_run", str(run.pk))
    assert without_times(f"Why: {expected.why}") in without_times(said)
    assert (f"To mend it: {expected.mend}" in said) == (expected.mend is not None)
    assert ("To mend it" in said) == (expected.mend is not None)


def without_times(text: str) -> str:
    return re.sub(r"\d+(\.\d)? s\b", "", text)


def test_explain_run_of_no_run_or_of_more_than_one(agent: Agent) -> None:
    runs = [agent.start("hello") for _ in range(2)]
    with pytest.raises(CommandError, match="There is no run"):
        told("explain_run", str(new_id()))
    with pytest.raises(CommandError, match="More than one run"):
        told("explain_run", str(runs[0].pk)[:8])


def test_list_runs_tells_all_the_active_or_the_stuck(agent: Agent, scripted_model: ScriptedModel) -> None:
    assert told("list_runs") == "There are no runs.\n"
    scripted_model.say("done")
    done = run_to_end(agent.start("hello"))
    assert "No run is active." in told("list_runs", "--active")
    run = agent.start("hello")
    assert "No run is stuck." in told("list_runs", "--stuck")
    move_clock(timedelta(seconds=20))
    lines = [json.loads(line) for line in told("list_runs", "--json").splitlines()]
    assert [line["run"] for line in lines] == [str(run.pk), str(done.pk)]  # the latest first
    for option in ("--active", "--stuck"):
        said = told("list_runs", option)
        assert str(run.pk) in said
        assert str(done.pk) not in said
    assert "There are more: --limit 2" in told("list_runs", "--limit", "1")
    with pytest.raises(CommandError, match="at least 1"):
        told("list_runs", "--limit", "0")


def test_check_runs_counts_names_and_exits(agent: Agent, capsys: Any) -> None:
    run, other = agent.start("hello"), agent.start("hello")
    assert told("check_runs") == "2 runs, no invariant violated.\n"
    Run.objects.filter(pk=run.pk).update(last_seq=40)
    out = io.StringIO()
    with pytest.raises(SystemExit) as exit:
        call_command("check_runs", stdout=out)
    assert exit.value.code == 1
    assert "Invariant 2: " in out.getvalue()
    assert f"  run {run.pk}: " in out.getvalue()
    assert told("check_runs", "--run", str(other.pk)) == "1 run, no invariant violated.\n"
    out = io.StringIO()
    with pytest.raises(SystemExit):
        call_command("check_runs", "--json", stdout=out)
    report = json.loads(out.getvalue())
    assert report["runs"] == 2
    assert report["violations"]["2"] >= 1
    assert set(report["violations"]) == set("12345678")


def test_follow_run_shows_what_comes_after_a_cursor(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("well done")
    run = run_to_end(agent.start("hello"))
    assert "well done" in told("follow_run", str(run.pk))
    lines = [json.loads(line) for line in told("follow_run", str(run.pk), "--after", "2", "--json").splitlines()]
    assert [line["seq"] for line in lines] == list(range(3, run.last_seq + 1))
    assert lines[-1]["type"] == "run.completed"
    with pytest.raises(CommandError, match="nothing comes after"):
        told("follow_run", str(run.pk), "--after", str(run.last_seq))


def test_follow_run_of_a_run_that_failed_exits_with_1(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(ProviderError("auth", "bad key"))
    run = run_to_end(agent.start("hello"))
    with pytest.raises(SystemExit) as exit:
        told("follow_run", str(run.pk))
    assert exit.value.code == 1


@pytest.mark.django_db(transaction=True)
def test_sweep_runs_moves_what_is_overdue_or_only_says_so(agent: Agent) -> None:
    assert told("sweep_runs") == "Nothing is overdue.\n"
    run = agent.start("hello", limits={"deadline_seconds": 5})
    move_clock(timedelta(seconds=200))
    assert "The sweep would move: " in told("sweep_runs", "--dry-run")
    run.refresh_from_db()
    assert run.status == "queued"
    done = json.loads(told("sweep_runs", "--json"))
    run.refresh_from_db()
    assert (run.status, run.stop_reason) == ("failed", "deadline"), done
    assert told("sweep_runs") == "Nothing is overdue.\n"
