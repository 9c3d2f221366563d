"""What a running tool knows of its run, and what it can say to it."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from django.contrib.auth import get_user_model
from django.db import connection

from runs import agents
from runs.agents import Agent
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from runs.verification import verify
from tests.engine.tool_runs import add, attempts, calls_of, only_call, told, took
from tests.runs.scenes import payloads, types
from threads import clock
from tools import RetryPolicy, ToolCall, ToolContext, lifecycle, run_log, tool

pytestmark = pytest.mark.django_db

AT_ONCE = RetryPolicy(attempts=3, initial_seconds=0)


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("atomic", [True, False])
def test_a_tool_knows_its_run_thread_owner_and_call(scripted_model: ScriptedModel, owned: bool, atomic: bool) -> None:
    user = get_user_model()._default_manager.create(username="anna") if owned else None
    seen: list[ToolContext] = []

    @tool(atomic=atomic)
    def look(number: int, ctx: ToolContext) -> str:
        """Look."""
        seen.append(ctx)
        return ctx.run.status

    run = took(scripted_model, look, calls=[call("look", number=7)], owner=user)
    [ctx] = seen
    made = only_call(run)
    assert (ctx.run, ctx.thread, ctx.owner) == (run, run.thread, user)
    assert (ctx.run_id, ctx.thread_id) == (run.pk, run.thread_id)
    assert ctx.owner_id == (None if user is None else str(user.pk))
    assert (ctx.tool_call, ctx.tool_call.name, ctx.tool_call.arguments) == (made, "look", {"number": 7})
    assert made.result == "waiting"
    assert_invariants(run)


def test_the_key_of_a_call_is_its_own_and_stays_over_its_attempts(scripted_model: ScriptedModel) -> None:
    seen = []

    @tool(retry=AT_ONCE)
    def charge(ctx: ToolContext) -> None:
        """Charge."""
        seen.append((ctx.tool_call.pk, ctx.attempt, ctx.idempotency_key))
        if ctx.attempt < 3:
            raise OSError

    run = took(scripted_model, charge, calls=[call("charge"), call("charge")])
    keys = {made.pk: made.idempotency_key for made in calls_of(run)}
    assert len(set(keys.values())) == 2
    assert sorted(seen) == sorted((pk, attempt, key) for pk, key in keys.items() for attempt in (1, 2, 3))
    assert_invariants(run)


@pytest.mark.parametrize(("limit", "whose"), [(600, "the tool's"), (20, "the run's")])
def test_an_attempt_is_cut_off_at_the_tools_time_or_the_runs(
    scripted_model: ScriptedModel, limit: int, whose: str
) -> None:
    seen = []

    @tool(timeout_seconds=30, retry=RetryPolicy(attempts=2, initial_seconds=3, jitter=False))
    def look(ctx: ToolContext) -> None:
        """Look."""
        seen.append((clock.now(), ctx.deadline))
        if ctx.attempt == 1:
            raise OSError

    run = took(scripted_model, look, limits={"deadline_seconds": limit})
    assert len(seen) == 2
    for now, deadline in seen:
        assert deadline is not None
        if whose == "the run's":
            assert deadline == run.deadline
        else:
            assert timedelta(seconds=25) < deadline - now <= timedelta(seconds=30)
    assert_invariants(run)


# --- what it says


def test_what_a_tool_emits_is_read_in_the_log_and_not_by_the_model(scripted_model: ScriptedModel) -> None:
    @tool
    def work(ctx: ToolContext) -> str:
        """Work."""
        ctx.progress(0.25, "a quarter of a\udcff\0")
        ctx.emit({"draft": [1, timedelta(seconds=2)]})
        return "worked"

    run = took(scripted_model, work)
    made = only_call(run)
    [progress] = payloads(run, "tool_call.progress")
    assert progress == {
        "tool_call": str(made.pk),
        "name": "work",
        "message": str(made.message_id),
        "fraction": 0.25,
        "note": "a quarter of a?\ufffd",
    }
    assert payloads(run, "data") == [{"data": {"draft": [1, "PT2S"]}}]
    order = [each for each in types(run) if each.startswith("tool_call.") or each == "data"]
    assert order[-4:] == ["tool_call.started", "tool_call.progress", "data", "tool_call.settled"]
    request = b"".join(scripted_model.requests[1].messages)
    assert b"quarter" not in request
    assert b"draft" not in request
    assert_invariants(run)


def test_progress_is_told_at_most_once_a_second_but_its_end_always(scripted_model: ScriptedModel) -> None:
    @tool
    def work(ctx: ToolContext) -> None:
        """Work in parts."""
        for part in range(1, 101):
            ctx.progress(part / 100)

    run = took(scripted_model, work)
    fractions = [each["fraction"] for each in payloads(run, "tool_call.progress")]
    assert (fractions[0], fractions[-1]) == (0.01, 1.0)
    assert len(fractions) <= 5  # a slow machine takes some seconds for a hundred
    assert_invariants(run)


def test_what_cannot_be_emitted_is_an_error_of_the_tool_and_says_so(scripted_model: ScriptedModel) -> None:
    @tool
    def work(ctx: ToolContext) -> str:
        """Work."""
        with pytest.raises(TypeError, match="object cannot be written as JSON"):
            ctx.emit(object())
        return "worked"

    run = took(scripted_model, work)
    assert only_call(run).result == "worked"
    assert payloads(run, "data") == []
    assert_invariants(run)


@pytest.mark.parametrize("atomic", [True, False])
def test_what_a_failed_atomic_attempt_said_was_never_said(scripted_model: ScriptedModel, atomic: bool) -> None:
    @tool(atomic=atomic, retry=AT_ONCE)
    def work(ctx: ToolContext) -> None:
        """Work."""
        ctx.emit(ctx.attempt)
        ctx.progress(ctx.attempt / 4)
        if ctx.attempt < 3:
            raise OSError

    run = took(scripted_model, work)
    assert attempts(only_call(run)) == ["retrying", "retrying", "success"]
    assert [each["data"] for each in payloads(run, "data")] == ([3] if atomic else [1, 2, 3])
    fractions = [each["fraction"] for each in payloads(run, "tool_call.progress")]
    assert fractions == ([0.75] if atomic else [0.25, 0.5, 0.75])
    assert list(run.event_set.order_by("seq").values_list("seq", flat=True)) == list(range(1, run.last_seq + 1))
    assert_invariants(run)


def test_an_async_tool_may_use_its_context(scripted_model: ScriptedModel) -> None:
    @tool
    async def work(ctx: ToolContext) -> Any:
        """Work."""
        await asyncio.sleep(0)
        ctx.progress(0.5)
        ctx.emit("said")
        return [str(ctx.run.pk), str(ctx.thread.pk), ctx.owner, ctx.is_cancelled()]

    run = took(scripted_model, work)
    assert only_call(run).result == [str(run.pk), str(run.thread_id), None, False]
    assert [each["fraction"] for each in payloads(run, "tool_call.progress")] == [0.5]
    assert payloads(run, "data") == [{"data": "said"}]
    assert_invariants(run)


# --- when nobody wants its result any more


def test_a_tool_learns_that_its_run_has_ended_and_can_say_nothing_more(scripted_model: ScriptedModel) -> None:
    cancelled = []

    @tool(retry=AT_ONCE)
    def work(ctx: ToolContext) -> str:
        """Work, until the run is cancelled."""
        cancelled.append(ctx.is_cancelled())
        ctx.run.cancel()
        cancelled.append(ctx.is_cancelled())
        ctx.emit("too late")
        ctx.progress(1.0)
        return "too late"

    agent = agents.registry.add(agents.Agent(name="clerk", model="scripted:x", tools=[work]))
    scripted_model.say(call("work"))
    run = run_to_end(agent.start("hello"))
    made = only_call(run)
    assert (run.status, cancelled) == ("cancelled", [False, True])
    assert (made.outcome, made.result, attempts(made)) == ("cancelled", None, ["cancelled"])
    assert [part["outcome"] for part in told(run)] == ["cancelled"]
    assert types(run)[-1] == "run.cancelled"
    assert not {"data", "tool_call.progress"} & set(types(run))
    assert_invariants(run)


def test_nothing_is_written_to_a_run_that_has_ended(scripted_model: ScriptedModel) -> None:
    run = took(scripted_model, add, calls=[call("add", a=1, b=2)])
    before = types(run)
    assert run_log.current().record(run.pk, "data", {"data": "too late"}) is False
    assert types(run) == before


@pytest.mark.parametrize("taken", ["cancelled", "taken over"])
def test_a_tool_whose_call_was_taken_from_it_learns_so_and_says_nothing_more(
    scripted_model: ScriptedModel, taken: str
) -> None:
    """Its run goes on: what it said of a settled call would stand behind the settlement."""
    cancelled = []

    @tool(retry=AT_ONCE)
    def work(ctx: ToolContext) -> str:
        """Work."""
        if ctx.attempt > 1:
            return "again"
        cancelled.append(ctx.is_cancelled())
        made = ToolCall.objects.get(pk=ctx.tool_call.id)
        if taken == "cancelled":
            made.cancel()
        else:
            assert made.holder is not None
            assert lifecycle.reclaim(made.pk, 1, holder=made.holder)
        cancelled.append(ctx.is_cancelled())
        ctx.emit("too late")
        ctx.progress(1.0)
        return "too late"

    run = took(scripted_model, work)
    made = only_call(run)
    assert cancelled == [False, True]
    assert (made.outcome, made.result) == (("cancelled", None) if taken == "cancelled" else ("success", "again"))
    assert not {"data", "tool_call.progress"} & set(types(run))
    assert verify(run).differences == []
    assert_invariants(run)


def test_a_tool_of_which_nobody_knows_is_still_wanted_until_somebody_answers(scripted_model: ScriptedModel) -> None:
    """Its worker was taken for dead and lives: its late result would settle the call."""
    cancelled = []

    @tool(idempotent=False)
    def work(ctx: ToolContext) -> str:
        """Work."""
        made = ToolCall.objects.get(pk=ctx.tool_call.id)
        assert made.holder is not None
        assert lifecycle.reclaim(made.pk, 1, holder=made.holder)["code"] == "unknown"
        cancelled.append(ctx.is_cancelled())
        ctx.emit("in time")
        made.succeed("seen")
        cancelled.append(ctx.is_cancelled())
        ctx.emit("too late")
        return "too late"

    run = took(scripted_model, work)
    assert cancelled == [False, True]
    assert (only_call(run).result, payloads(run, "data")) == ("seen", [{"data": "in time"}])
    assert verify(run).differences == []
    assert_invariants(run)


@pytest.mark.django_db(transaction=True)
def test_an_atomic_tool_that_speaks_to_readers_does_not_hold_its_run_meanwhile(scripted_model: ScriptedModel) -> None:
    """Whoever wants to change the run (a cancel, the sweep) does not wait for the tool's body."""
    free: list[bool] = []

    @tool(atomic=True)
    def work(ctx: ToolContext) -> str:
        """Work."""
        ctx.emit("half")
        ctx.progress(0.5)
        with psycopg.connect(connection.connection.info.dsn, autocommit=True) as other:
            query = "SELECT 1 FROM longhaul_runs_run WHERE id = %s FOR NO KEY UPDATE SKIP LOCKED"
            free.append(other.execute(query, (ctx.run_id,)).fetchone() is not None)
        return "done"

    scripted_model.say(call("work"), "done")
    agent = agents.registry.add(Agent(name="speaker", model="scripted:x", tools=[work]))
    run = run_to_end(agent.start("hello"))
    assert free == [True]
    told = [event.type for event in run.events() if event.type in ("data", "tool_call.progress", "tool_call.settled")]
    assert told == ["data", "tool_call.progress", "tool_call.settled"]
    assert_invariants(run)
