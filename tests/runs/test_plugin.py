"""`pytest_longhaul` as its users have it: agents and tools in a plain TestCase, without worker, broker or model service."""

from __future__ import annotations

import asyncio
import inspect
import re
import subprocess
import sys
import threading
import unittest
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.db import connection, transaction
from django.test import TestCase

from runs import agents, bells, pytest_longhaul
from runs.agents import Agent
from runs.models import Event, Run, Usage
from runs.providers import port
from runs.providers.port import ProviderError, ReasoningDelta, UsageReported
from runs.pytest_longhaul import (
    CallTool,
    ScriptedModel,
    WorkerKilled,
    assert_invariants,
    call,
    move_clock,
    run_to_end,
    scripted,
)
from runs.testing import inline_worker
from tests.docs import page
from tests.runs.scenes import Cast, Together, asked, payloads, rows, texts, types
from threads import clock
from threads.models import Clock
from tools import ModelRetry, RetryPolicy, ToolContext, messages, tool
from tools.models import ToolAttempt, ToolCall, Worker
from tools.registry import Tool

did: list[str] = []
NOTHING: Any = None


@tool
def note(word: str) -> str:
    """Note a word."""
    did.append(word)
    return f"noted {word}"


@tool(atomic=True)
def hire(name: str) -> str:
    """Add a user, exactly once."""
    User.objects.create_user(name)
    return f"hired {name}"


@tool(idempotent=False)
def pay(cents: int, ctx: ToolContext) -> str:
    """Pay, at most once."""
    return f"paid {cents} in attempt {ctx.attempt}"


@tool(retry=RetryPolicy(attempts=3, initial_seconds=300, max_seconds=600, jitter=False))
def flaky(fails: int) -> str:
    """Fail so many times."""
    did.append("try")
    if len(did) <= fails:
        raise RuntimeError("not now")
    return f"worked at last after {len(did)}"


@tool(idempotent=False)
def dies(ctx: ToolContext) -> str:
    """End the process."""
    raise WorkerKilled


@tool
async def look(name: str, ctx: ToolContext) -> str:
    """Find a user, by Django's async ORM and by the context."""
    users = await asyncio.gather(*[User.objects.aget(username=name) for _ in range(3)])
    return f"{users[0].username} by {ctx.owner or 'system'}"


TOOLS: list[Tool] = [note, hire, pay, flaky, dies, look]
clerk = agents.registry.add(Agent(name="clerk of the plugin", model="openai:a-real-one", tools=TOOLS))


@pytest.fixture(autouse=True)
def nothing_done() -> None:
    did.clear()


@pytest.fixture(autouse=True)
def no_services(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever asks the broker or Redis for something fails, and no thread is started."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("there is no such service here")

    monkeypatch.setattr(messages, "send", refuse)
    monkeypatch.setattr(bells, "_client", refuse)
    threads = set(threading.enumerate())
    yield
    assert not set(threading.enumerate()) - threads


# --- in a plain TestCase


class PlainTest(TestCase):
    def test_an_agent_is_run_by_the_real_engine_with_its_real_tools(self) -> None:
        owner = User.objects.create_user("ann")
        with scripted(
            ["I see. ", call("note", word="a"), call("hire", name="bob")], call("pay", cents=5), "Done."
        ) as model:
            run = run_to_end(clerk.start("Hire Bob.", owner=owner))
        assert (run.status, run.output, run.steps, run.legs) == ("completed", "Done.", 3, 3)
        assert did == ["a"]
        assert User.objects.filter(username="bob").exists()
        assert [each.result for each in ToolCall.objects.order_by("step", "index")][2] == "paid 5 in attempt 1"
        assert texts(model.requests[2])[-1] == "-> paid 5 in attempt 1"
        assert [event.seq for event in run.events()] == list(range(1, run.last_seq + 1))
        assert types(run)[-1] == "run.completed"
        assert_invariants(run)
        assert_invariants()

    def test_a_run_that_nobody_runs_stays_queued(self) -> None:
        run = clerk.start("Hello.")
        assert run.status == "queued"
        assert_invariants(run)

    def test_a_cancelled_run_is_left_as_it_is(self) -> None:
        run = clerk.start("Hello.").cancel()
        with scripted() as model:
            assert run_to_end(run).status == "cancelled"
        assert model.requests == []
        assert_invariants(run)

    def test_the_clock_moves(self) -> None:
        before = clock.now()
        move_clock(timedelta(hours=1))
        move_clock(timedelta(hours=1))
        assert abs(clock.now() - before - timedelta(hours=2)) < timedelta(minutes=1)


class SharedTest(TestCase):
    """Runs that are made once for the class: each test has them as they were."""

    queued: Run
    ended: Run

    @classmethod
    def setUpTestData(cls) -> None:
        with scripted("done"):
            cls.ended = run_to_end(clerk.start("hello"))
        cls.queued = clerk.start("and now?", thread=cls.ended.thread)

    def test_one_takes_it_to_its_end(self) -> None:
        with scripted("1"):
            assert run_to_end(self.queued).output == "1"
        assert_invariants()

    def test_another_cancels_it(self) -> None:
        assert self.queued.status == "queued"
        assert self.queued.cancel().status == "cancelled"
        assert_invariants()

    async def test_an_async_test_runs_it_on_the_tests_own_connection(self) -> None:
        with scripted(call("look", name="ann"), "1"):
            await User.objects.acreate(username="ann")
            await sync_to_async(run_to_end)(self.queued)
        assert (await ToolCall.objects.aget()).result == "ann by system"
        assert (await Run.objects.aget(pk=self.queued.pk)).output == "1"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(("case", "tests"), [(PlainTest, 4), (SharedTest, 3)])
def test_a_test_case_leaves_nothing_behind_and_the_clock_where_it_was(case: type[TestCase], tests: int) -> None:
    before = rows()
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    assert (result.testsRun, result.errors, result.failures) == (tests, [], [])
    assert rows() == before
    assert not Clock.objects.exists()
    assert not Worker.objects.exists()


# --- the model


@pytest.mark.django_db
def test_whatever_model_an_agent_names_the_script_speaks(scripted_model: ScriptedModel, cast: Cast) -> None:
    scripted_model.say("one", "two")
    assert run_to_end(clerk.start("hello")).output == "one"
    assert run_to_end(cast(model="scripted:x").start("hello")).output == "two"
    assert [request.model for request in scripted_model.requests] == ["a-real-one", "x"]


@pytest.mark.django_db
def test_replies_may_come_from_a_function_of_what_was_asked(scripted_model: ScriptedModel) -> None:
    def answer(messages: list[dict[str, Any]]) -> str | CallTool:
        return f"I saw {len(messages)}" if messages[-1]["role"] == "tool" else call("note", word="x")

    scripted_model.answer = answer
    assert run_to_end(clerk.start("hello")).output == "I saw 3"


@pytest.mark.django_db
def test_a_reply_too_few_fails_the_test_and_says_so(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("note", word="a"))
    with pytest.raises(AssertionError, match="more than it has replies"):
        run_to_end(clerk.start("hello"))


@pytest.mark.django_db
def test_the_request_is_recorded_as_the_provider_would_get_it(scripted_model: ScriptedModel) -> None:
    scripted_model.say("done")
    run_to_end(clerk.start("hello", instructions="Be kind."))
    request = asked(scripted_model.requests[0])
    assert (request["instructions"], request["tools"]) == ("Be kind.", [each.name for each in TOOLS])
    assert [each["content"] for each in request["messages"]] == [[{"type": "text", "text": "hello"}]]


@pytest.mark.django_db
def test_arguments_need_not_be_json_and_may_be_any_values(scripted_model: ScriptedModel) -> None:
    scripted_model.say([CallTool("note", "{word"), call("note", word="fine")], "done")
    run = run_to_end(clerk.start("hello"))
    assert list(ToolCall.objects.order_by("index").values_list("outcome", flat=True)) == ["failed", "success"]
    assert_invariants(run)


@pytest.mark.django_db
def test_a_reply_may_say_what_it_cost_and_thought_and_break_off(scripted_model: ScriptedModel) -> None:
    scripted_model.say(
        ["Half a", ProviderError("network", "cut")],
        [ReasoningDelta("hm"), "done", UsageReported(input_tokens=700, output_tokens=30)],
    )
    run = run_to_end(clerk.start("hello"))
    assert (run.output, run.input_tokens, run.output_tokens) == ("done", 700, 30)
    assert [each["text"] for each in payloads(run, "text.delta")] == ["done"]
    assert [each["text"] for each in payloads(run, "reasoning.delta")] == ["hm"]
    assert Usage.objects.count() == 1
    assert len(scripted_model.requests) == 2
    assert_invariants(run)


@pytest.mark.parametrize(
    ("reply", "error"),
    [(None, TypeError), (call, TypeError), (5, TypeError), (b"bytes", TypeError), (["text", 5], TypeError),
     ("", ValueError), ([], ValueError), ([UsageReported(1, 1)], ValueError)],
)  # fmt: skip
def test_what_is_no_reply_is_refused_where_it_is_given(reply: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="reply"), scripted("fine", reply):
        raise AssertionError("it was taken")
    model = ScriptedModel()
    with pytest.raises(error, match="reply"):
        model.say("fine", reply)
    assert model.replies == []


@pytest.mark.django_db
def test_what_a_function_answers_must_be_a_reply_too(scripted_model: ScriptedModel) -> None:
    scripted_model.answer = lambda messages: NOTHING
    with pytest.raises(TypeError, match="A reply is a text"):
        run_to_end(clerk.start("hello"))


@pytest.mark.django_db
def test_what_the_model_was_shown_is_read_as_messages(scripted_model: ScriptedModel) -> None:
    with pytest.raises(AssertionError, match="asked 0 times"):
        scripted_model.shown()
    scripted_model.say(call("note", word="ä"), "done")
    run_to_end(clerk.start("hello"))
    assert [each["role"] for each in scripted_model.shown(0)] == ["user"]
    assert [each["role"] for each in scripted_model.shown()] == ["user", "assistant", "tool"]
    assert scripted_model.shown()[-1]["content"][0]["result"] == "noted ä"


@pytest.mark.django_db
def test_replies_that_nobody_asked_for_fail_the_block_by_name() -> None:
    with pytest.raises(AssertionError, match=r"never asked for 2 of its replies: \['two', CallTool"):  # noqa: SIM117
        with scripted("one", "two", call("note", word="a")):
            run_to_end(clerk.start("hello"))
    with scripted("one", "two") as model:
        run_to_end(clerk.start("hello"))
        model.replies.clear()


@pytest.mark.django_db
def test_a_failure_of_the_block_is_not_hidden_by_replies_that_are_left() -> None:
    with pytest.raises(ZeroDivisionError), scripted("one"):
        raise ZeroDivisionError


@pytest.mark.django_db
def test_of_two_scripts_the_inner_one_speaks_until_its_end() -> None:
    with scripted("outer") as outer:
        with scripted("inner") as inner:
            assert run_to_end(clerk.start("hello")).output == "inner"
        assert run_to_end(clerk.start("hello")).output == "outer"
    assert (len(outer.requests), len(inner.requests)) == (1, 1)


@pytest.mark.django_db
def test_a_script_is_closed_like_any_provider() -> None:
    with scripted():
        port.forget_providers()


# --- without a script


@pytest.mark.django_db
def test_who_forgot_the_script_asks_no_service() -> None:
    run = clerk.start("hello")
    with pytest.raises(AssertionError, match=r"asks the model 'a-real-one', and no script is in place"):
        run_to_end(run)


class Service(ScriptedModel):
    """Stands where one of Longhaul's own providers would."""


@pytest.mark.django_db
def test_who_says_so_asks_the_real_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "__module__", "runs.providers.service")
    monkeypatch.setitem(port._providers, "openai", Service(replies=["really"]))
    with pytest.raises(AssertionError, match="no script"):
        run_to_end(clerk.start("hello"))
    assert run_to_end(clerk.start("hello"), real_model=True).output == "really"


@pytest.mark.django_db
def test_a_provider_of_the_projects_own_needs_no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(port._factories), dict(port._providers)
    monkeypatch.setitem(port._factories, "house", lambda: ScriptedModel(replies=["from the house"]))
    run = clerk.start("hello", model="house:small")
    assert run_to_end(run).output == "from the house"
    monkeypatch.undo()
    port._providers.pop("house", None)
    assert (dict(port._factories), dict(port._providers)) == before


@pytest.mark.django_db
def test_after_the_block_the_providers_are_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(port._factories), dict(port._providers)
    with scripted():
        assert "scripted" in port._factories
    assert (dict(port._factories), dict(port._providers)) == before
    with pytest.raises(ZeroDivisionError), scripted("done"):
        raise ZeroDivisionError
    assert (dict(port._factories), dict(port._providers)) == before


# --- timers


@pytest.mark.django_db
def test_a_retry_of_the_model_is_waited_out_by_the_clock(scripted_model: ScriptedModel) -> None:
    later = timedelta(minutes=4)
    scripted_model.say(ProviderError("overloaded", "not now", retry_after=later), "done")
    began = clock.now()
    run = run_to_end(clerk.start("hello"))
    assert (run.output, clock.now() - began >= later) == ("done", True)
    assert_invariants(run)


@pytest.mark.django_db
def test_a_retry_of_a_tool_is_waited_out_by_the_clock(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("flaky", fails=2), "done")
    began = clock.now()
    run = run_to_end(clerk.start("hello"))
    assert (did, run.output) == (["try"] * 3, "done")
    assert clock.now() - began >= timedelta(minutes=15)  # 5 and 10
    assert list(ToolAttempt.objects.order_by("number").values_list("outcome", flat=True)) == [
        "retrying",
        "retrying",
        "success",
    ]
    assert_invariants(run)


@pytest.mark.django_db
@pytest.mark.parametrize("waits_for", ["model", "tool"])
def test_who_moves_the_clock_by_hand_sees_what_is_not_due(scripted_model: ScriptedModel, waits_for: str) -> None:
    if waits_for == "model":
        scripted_model.say(ProviderError("overloaded", "no", retry_after=timedelta(minutes=4)), "done")
    else:
        scripted_model.say(call("flaky", fails=1), "done")
    run = clerk.start("hello")
    # Some of the wait is over when it is told, on a busy machine more.
    with pytest.raises(AssertionError, match=r"Nothing is due for (2[34]|29|30)\d\.\d s, .* [345] min"):
        run_to_end(run, moves_clock=False)
    assert not run.finished
    move_clock(timedelta(minutes=6))
    assert run_to_end(run, moves_clock=False).output == "done"
    assert_invariants(run)


@pytest.mark.django_db
def test_of_two_retries_the_earlier_one_comes_first(scripted_model: ScriptedModel, cast: Cast) -> None:
    def failing_once(name: str, seconds: int) -> Tool:
        @tool(name=name, retry=RetryPolicy(attempts=2, initial_seconds=seconds, max_seconds=seconds, jitter=False))
        def fails(ctx: ToolContext) -> str:
            did.append(f"{name} {ctx.attempt}")
            if ctx.attempt == 1:
                raise OSError
            return "done"

        return fails

    scripted_model.say([call("slow"), call("quick")], "done")
    run = run_to_end(cast(tools=[failing_once("slow", 600), failing_once("quick", 5)]).start("hello"))
    assert did == ["slow 1", "quick 1", "quick 2", "slow 2"]
    assert_invariants(run)


@pytest.mark.django_db
def test_a_deadline_that_comes_before_a_retry_ends_the_run_and_its_call(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("flaky", fails=1))
    began = clock.now()
    run = run_to_end(clerk.start("hello", limits={"deadline_seconds": 60}))
    assert (run.status, run.stop_reason, did) == ("failed", "deadline", ["try"])
    assert clock.now() - began < timedelta(seconds=299)
    assert ToolCall.objects.get().outcome == "cancelled"
    assert_invariants(run)


@pytest.mark.django_db
def test_a_held_run_has_a_deadline_of_its_own(scripted_model: ScriptedModel) -> None:
    scripted_model.say(ProviderError("overloaded", "no", retry_after=timedelta(minutes=4)), "done")
    first = clerk.start("one")
    second = clerk.start("two", thread=first.thread, limits={"deadline_seconds": 60})
    assert run_to_end(second).stop_reason == "deadline"
    assert clock.now() - second.created_at < timedelta(minutes=3)
    first.refresh_from_db()
    assert first.status == "queued"
    assert run_to_end(first).output == "done"
    assert_invariants()


@pytest.mark.django_db
def test_a_deadline_that_has_passed_ends_a_run_also_where_the_clock_is_moved_by_hand(
    scripted_model: ScriptedModel,
) -> None:
    run = clerk.start("hello", limits={"deadline_seconds": 60})
    move_clock(timedelta(minutes=2))
    assert run_to_end(run, moves_clock=False).stop_reason == "deadline"
    assert scripted_model.requests == []
    assert_invariants(run)


@pytest.mark.django_db
def test_a_tool_may_move_the_clock_itself(scripted_model: ScriptedModel, cast: Cast) -> None:
    @tool(timeout_seconds=7200)
    def work() -> str:
        """Work for an hour."""
        move_clock(timedelta(hours=1))
        return "worked"

    scripted_model.say([call("work"), call("work")], "done")
    run = run_to_end(cast(tools=[work]).start("hello"))
    assert run.output == "done"
    assert clock.now() - run.created_at >= timedelta(hours=2)
    assert_invariants(run)


@pytest.fixture
def after_the_clock(transactional_db: None) -> Iterator[None]:
    """What stands when longhaul_clock has ended, before the test's rows are removed."""
    yield
    assert not Clock.objects.exists()


def test_a_test_that_commits_gives_the_clock_back(
    after_the_clock: None, longhaul_clock: Callable[[timedelta], None]
) -> None:
    before = clock.now()
    longhaul_clock(timedelta(days=2))
    with transaction.atomic():
        assert clock.now() - before >= timedelta(days=2)
    assert Clock.objects.exists()


# --- to the end, or to where it waits


@pytest.mark.django_db
def test_runs_that_it_was_held_behind_come_first(scripted_model: ScriptedModel) -> None:
    first = clerk.start("one")
    second, third = clerk.start("two", thread=first.thread), clerk.start("three", thread=first.thread)
    scripted_model.say("1", "2", "3")
    assert run_to_end(third).output == "3"
    for run, output in ((first, "1"), (second, "2")):
        run.refresh_from_db()
        assert (run.status, run.output) == ("completed", output)
    assert texts(scripted_model.requests[2]) == ["one", "1", "two", "2", "three"]
    assert_invariants()


@pytest.mark.django_db
def test_a_run_that_a_person_must_decide_on_is_returned_as_it_stands(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("dies"))
    run = clerk.start("hello")
    with pytest.raises(WorkerKilled):
        run_to_end(run)
    assert run_to_end(run).status == "requires_action"
    assert ToolCall.objects.get().status == "unknown"
    assert run_to_end(run).status == "requires_action"
    assert_invariants(run)


@pytest.mark.django_db
def test_what_a_killed_worker_left_is_taken_over_by_the_next_one(scripted_model: ScriptedModel, cast: Cast) -> None:
    def dying_once(name: str, **options: Any) -> Tool:
        @tool(name=name, **options)
        def dies(ctx: ToolContext) -> str:
            User.objects.create_user(f"{name} {ctx.attempt}")
            if ctx.attempt == 1:
                raise WorkerKilled
            return "done"

        return dies

    agent = cast(tools=[dying_once("again", idempotent=True), dying_once("whole", atomic=True), dying_once("either")])
    scripted_model.say([call("again"), call("whole"), call("either")], "done")
    run = agent.start("hello")
    for _ in range(3):
        with pytest.raises(WorkerKilled):
            run_to_end(run)
    assert run_to_end(run).output == "done"
    assert [each.outcome for each in ToolAttempt.objects.order_by("call__index", "number")] == ["lost", "success"] * 3
    names = sorted(User.objects.values_list("username", flat=True))
    assert names == ["again 1", "again 2", "either 1", "either 2", "whole 2"]  # the atomic one left nothing
    assert_invariants(run)


@pytest.mark.django_db
def test_what_a_worker_that_is_present_holds_is_left_to_it(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("dies"))
    run = clerk.start("hello")
    with pytest.raises(WorkerKilled):
        run_to_end(run)
    holder = ToolCall.objects.get().holder
    Worker.objects.create(id=holder, name="tools@elsewhere", kind="tools", host="h", pid=1, lock_key=1)
    with pytest.raises(
        AssertionError, match=r"Nothing can be done for this run here.*dies \(running on tools@elsewhere"
    ):
        run_to_end(run)


@pytest.mark.django_db
def test_an_agent_whose_instructions_break_the_transaction_fails_as_in_a_worker(
    scripted_model: ScriptedModel, cast: Cast
) -> None:
    def instruct(run: Run) -> str:
        User.objects.create_user("ann")
        return "be kind"

    User.objects.create_user("ann")
    run = run_to_end(cast(instructions=instruct).start("hello"))
    assert (run.stop_reason, scripted_model.requests) == ("poison", [])
    assert_invariants(run)


@pytest.mark.django_db
def test_an_atomic_tool_that_cancels_its_own_run_never_commits(scripted_model: ScriptedModel, cast: Cast) -> None:
    @tool(atomic=True)
    def stop(ctx: ToolContext) -> str:
        """Cancel the run."""
        ctx.run.cancel("enough")
        return "too late"

    scripted_model.say(call("stop"), "done")
    run = run_to_end(cast(tools=[stop]).start("hello"))
    assert (run.output, ToolCall.objects.get().error) == ("done", {"code": "worker_lost", "message": mock.ANY})
    assert_invariants(run)


@pytest.mark.django_db
def test_a_run_that_is_held_behind_one_that_waits_for_a_person_says_so(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("dies"))
    first = clerk.start("one")
    second = clerk.start("two", thread=first.thread)
    with pytest.raises(WorkerKilled):
        run_to_end(first)
    with pytest.raises(AssertionError, match=rf"held for .* behind run {first.pk}.*That one: waiting for people.*dies"):
        run_to_end(second)
    first.cancel()
    scripted_model.say("done")
    assert run_to_end(second).output == "done"


@pytest.mark.django_db
def test_a_run_that_goes_on_and_on_is_given_up(scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inline_worker, "MAX_TURNS", 8)
    scripted_model.answer = lambda messages: call("note", word="again")
    with pytest.raises(AssertionError, match="did not end in 8 legs and calls"):
        run_to_end(clerk.start("hello"))


@pytest.mark.django_db
def test_a_tool_may_cancel_its_own_run(scripted_model: ScriptedModel, cast: Cast) -> None:
    @tool
    def stop(ctx: ToolContext) -> str:
        """Cancel the run."""
        ctx.run.cancel("enough")
        return "too late"

    scripted_model.say([call("stop"), call("stop")])
    run = run_to_end(cast(tools=[stop]).start("hello"))
    assert run.status == "cancelled"
    assert list(ToolCall.objects.values_list("outcome", flat=True)) == ["cancelled"] * 2
    assert_invariants(run)


@pytest.mark.django_db
def test_a_run_that_was_rolled_back_or_deleted_is_told_as_such(scripted_model: ScriptedModel) -> None:
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        run = clerk.start("hello")
        raise ZeroDivisionError
    with pytest.raises(AssertionError, match=f"no run {run.pk} .*rolled back"):
        run_to_end(run)
    with pytest.raises(AssertionError, match=f"no run {run.pk}"):
        assert_invariants(run)


@pytest.mark.django_db
def test_a_thread_that_does_not_see_the_tests_rows_says_why(scripted_model: ScriptedModel) -> None:
    run = clerk.start("hello")
    (error,) = Together(lambda: run_to_end(run)).join()
    assert isinstance(error, AssertionError)
    assert "open transaction of another thread" in str(error)


# --- tools in the test's transaction


@pytest.mark.django_db
@pytest.mark.parametrize("swallows", [False, True])
def test_a_statement_that_fails_in_a_tool_breaks_nothing_else(
    scripted_model: ScriptedModel, cast: Cast, swallows: bool
) -> None:
    @tool(retry=RetryPolicy(attempts=2))
    def add(name: str) -> str:
        """Add a user."""
        did.append(name)
        try:
            User.objects.create_user(name)
        except Exception:
            if not swallows:
                raise
        return "done"

    User.objects.create_user("ann")
    scripted_model.say([call("add", name="ann"), call("add", name="bob")], "done")
    run = run_to_end(cast(tools=[add]).start("hello"))
    assert run.output == "done"
    assert did == (["ann", "bob"] if swallows else ["ann", "bob", "ann"])
    assert User.objects.count() == 2
    assert_invariants(run)


@pytest.mark.django_db
def test_what_a_tool_wrote_before_it_failed_otherwise_stays_as_it_would_in_a_worker(
    scripted_model: ScriptedModel, cast: Cast
) -> None:
    @tool(retry=RetryPolicy(attempts=1))
    def half() -> str:
        """Write, then fail."""
        User.objects.create_user("ann")
        raise OSError

    @tool(atomic=True, retry=RetryPolicy(attempts=1))
    def none() -> str:
        """Write, then fail: atomic."""
        User.objects.create_user("bob")
        raise OSError

    scripted_model.say([call("half"), call("none")], "done")
    run_to_end(cast(tools=[half, none]).start("hello"))
    assert [each.username for each in User.objects.all()] == ["ann"]


@pytest.mark.django_db
def test_an_async_tool_sees_the_rows_of_the_test_and_fails_as_any_other(scripted_model: ScriptedModel) -> None:
    owner = User.objects.create_user("ann")
    scripted_model.say([call("look", name="ann"), call("look", name="nobody")], "done")
    run = run_to_end(clerk.start("hello", owner=owner))
    found, missing = ToolCall.objects.order_by("index")
    assert (found.result, missing.error) == (
        "ann by ann",
        {"code": "error", "message": "The tool failed with DoesNotExist."},
    )
    assert_invariants(run)


@pytest.mark.django_db
def test_after_a_run_no_worker_is_present(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("note", word="a"), "done")
    run_to_end(clerk.start("hello"))
    assert not Worker.objects.exists()


@pytest.mark.django_db
def test_a_tool_that_asks_the_model_to_try_again(scripted_model: ScriptedModel, cast: Cast) -> None:
    @tool
    def strict(word: str) -> str:
        """Take only please."""
        if word != "please":
            raise ModelRetry("say please")
        return "thanks"

    scripted_model.say(call("strict", word="now"), call("strict", word="please"), "done")
    run = run_to_end(cast(tools=[strict]).start("hello"))
    assert b"say please" in scripted_model.requests[1].messages[-1]
    assert (run.output, texts(scripted_model.requests[2])[-1]) == ("done", "-> thanks")
    assert_invariants(run)


# --- the invariants


@pytest.mark.django_db
def test_a_violated_run_fails_its_check_by_name_and_that_of_no_other(scripted_model: ScriptedModel) -> None:
    scripted_model.say("done", "done")
    sound, broken = run_to_end(clerk.start("hello")), run_to_end(clerk.start("hello"))
    assert_invariants()
    Event.objects.filter(run=broken, seq=2).delete()
    assert_invariants(sound)
    for run in (broken, None):
        with pytest.raises(AssertionError, match=str(broken.pk)):
            assert_invariants(run)


@pytest.mark.django_db
def test_a_terminal_run_that_is_said_to_be_queued_fails(scripted_model: ScriptedModel) -> None:
    scripted_model.say("done")
    run = run_to_end(clerk.start("hello"))
    with connection.cursor() as cursor:
        cursor.execute("UPDATE longhaul_runs_run SET status = 'queued', stop_reason = '' WHERE id = %s", (run.pk,))
    with pytest.raises(AssertionError):
        assert_invariants(Run.objects.get())


def test_the_plugin_is_found_by_pytest_and_imports_no_model_before_django_is_ready(
    pytestconfig: pytest.Config,
) -> None:
    assert pytestconfig.pluginmanager.get_plugin("pytest_longhaul") is pytest_longhaul
    code = "import runs.pytest_longhaul, sys; assert 'runs.models' not in sys.modules and 'threads.models' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={})


def test_the_functions_need_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; from runs.pytest_longhaul import run_to_end, scripted, move_clock"
    subprocess.run([sys.executable, "-c", code], check=True, env={})


def test_the_page_on_testing_names_all_of_it() -> None:
    rows = [page.code(name)[0] for name, _ in page.table("docs/testing.md", "Testing your agents")]
    told = {row.partition("(")[0]: row for row in rows}
    assert set(told) == set(pytest_longhaul.__all__) - {"CallTool", "Reply", "ScriptedModel"} | {
        "scripted_model",
        "longhaul_clock",
    }
    for name in ("run_to_end", "assert_invariants", "move_clock"):
        given = re.sub(
            r"\*, |: [^,=)]+", "", str(inspect.signature(getattr(pytest_longhaul, name))).partition(" ->")[0]
        )
        assert told[name] == name + given.replace("= ", "=")
