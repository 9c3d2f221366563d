"""`pytest_longhaul` as its users have it: agents and tools in a plain TestCase, without worker, broker or model service."""

from __future__ import annotations

import threading
import unittest
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection, transaction
from django.test import TestCase

from runs import agents, bells, pytest_longhaul
from runs.agents import Agent
from runs.models import Event, Run
from runs.providers import port
from runs.providers.port import ProviderError
from runs.pytest_longhaul import (
    CallTool,
    ScriptedModel,
    assert_invariants,
    call,
    move_clock,
    run_to_end,
    scripted,
)
from tests.runs.scenes import Cast, asked, rows, texts, types
from threads import clock
from threads.models import Clock
from tools import ModelRetry, RetryPolicy, ToolContext, messages, tool
from tools import lifecycle as calls
from tools.models import ToolAttempt, ToolCall, Worker
from tools.registry import Tool

did: list[str] = []


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


class Killed(BaseException):
    """The worker's process ends in the middle of a tool."""


@tool(idempotent=False)
def dies(ctx: ToolContext) -> str:
    """End the process."""
    raise Killed


TOOLS: list[Tool] = [note, hire, pay, flaky, dies]
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


@pytest.mark.django_db(transaction=True)
def test_a_test_case_leaves_nothing_behind_and_the_clock_where_it_was() -> None:
    before = rows()
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(PlainTest).run(result)
    assert (result.testsRun, result.errors, result.failures) == (4, [], [])
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
    with pytest.raises(AssertionError, match=r"Nothing is due for (240|300)\.\d s, .* (4|5) min"):
        run_to_end(run, moves_clock=False)
    assert not run.finished
    move_clock(timedelta(minutes=6))
    assert run_to_end(run, moves_clock=False).output == "done"
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
    with pytest.raises(Killed):
        run_to_end(run)
    lost = ToolCall.objects.get(run_id=run.pk)
    assert lost.holder is not None
    # Nobody is there who would find out that its worker is gone.
    with pytest.raises(AssertionError, match=r"Nothing can be done for this run here.*dies"):
        run_to_end(run)
    calls.reclaim(lost.pk, 1, holder=lost.holder)
    assert run_to_end(run).status == "requires_action"
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
    import subprocess
    import sys

    assert pytestconfig.pluginmanager.get_plugin("pytest_longhaul") is pytest_longhaul
    code = "import runs.pytest_longhaul, sys; assert 'runs.models' not in sys.modules and 'threads.models' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={})
