"""Calls that wait for their turn, through the engine: what is sent, what a step without limits costs, what a person reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from django.contrib.auth import get_user_model
from django.db import connection
from django.test.utils import CaptureQueriesContext

from runs import agents, engine
from runs.agents import Agent
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from runs.sweep import Sweep
from runs.testing.inline_worker import working
from tests.runs.scenes import agents_process
from threads import database
from tools import execution, tool
from tools import tasks as tool_tasks
from tools.models import ToolCall

pytestmark = pytest.mark.django_db(transaction=True)


@tool
def free(n: int) -> int:
    """Wait for nobody."""
    return n


@tool(max_concurrency=1, queue="narrow")
def narrow(n: int) -> int:
    """One at a time."""
    return n


@tool(rate_limit="2/h")
def rare(n: int) -> int:
    """Twice an hour."""
    return n


def clerk() -> Agent:
    return agents.registry.add(Agent(name="clerk", model="scripted:x", tools=[free, narrow, rare]))


def asked(model: ScriptedModel, name: str, count: int, **options: Any) -> Run:
    model.say([call(name, n=n) for n in range(count)])
    return clerk().start("hello", **options)


def to_end(model: ScriptedModel, run: Run) -> Run:
    model.say("done")
    return run_to_end(run)


def calls_of(run: Run) -> list[ToolCall]:
    return list(ToolCall.objects.filter(run_id=run.pk).order_by("index"))


def test_given_no_limits_then_a_step_and_its_calls_make_no_further_round_trip(scripted_model: ScriptedModel) -> None:
    run = asked(scripted_model, "free", 2)
    with working() as present, mock.patch.object(tool_tasks, "let_out") as let_out:
        with round_trips() as leg:
            engine.advance(run.pk, 1, engine.Process(present))
        first, _ = calls_of(run)
        with round_trips() as attempt:
            execution.execute(first.pk, 1, presence=present)
    let_out.assert_not_called()
    assert leg == ["longhaul_run_claim", "longhaul_turn_open", "longhaul_step_commit", "longhaul_linger_end"]
    assert attempt == ["longhaul_call_claim", "longhaul_call_settle"]


@contextmanager
def round_trips() -> Iterator[list[str]]:
    """Note each statement that is sent: the name of its function, else its text."""
    sent: list[str] = []
    rows_of = database.rows_of

    def note(statement: str, parameters: Any = ()) -> Any:
        sent.append(statement.removeprefix("SELECT ").partition("(")[0])
        return rows_of(statement, parameters)

    with mock.patch.object(database, "rows_of", note), CaptureQueriesContext(connection) as others:
        yield sent
    sent += [query["sql"] for query in others.captured_queries]  # what goes by Django


def test_given_more_calls_than_room_then_the_first_are_sent_and_each_claim_lets_out_others(
    scripted_model: ScriptedModel, settings: Any
) -> None:
    settings.LONGHAUL = {**settings.LONGHAUL, "MAX_DISPATCHED_CALLS": 2}
    run = asked(scripted_model, "free", 5)
    with agents_process(flushes=False) as process, mock.patch.object(tool_tasks, "publish") as publish:
        engine.advance(run.pk, 1, process)
        calls = calls_of(run)
        assert [each.args[0] for each in publish.call_args_list] == [each.pk for each in calls[:2]]
        for place, each in enumerate(calls, 1):
            execution.execute(each.pk, 1, presence=process.presence)
            # half of the window is one: the first claim lets out one, so does each other while somebody waits
            assert publish.call_count == min(place + 2, 5)
    assert [each.args[0] for each in publish.call_args_list] == [each.pk for each in calls]
    assert publish.call_args.args[4:] == ("free", run.pk, "clerk")
    run.refresh_from_db()
    assert run.status == "queued"
    assert_invariants()


def test_given_a_tool_one_at_a_time_then_each_settlement_sends_the_next(scripted_model: ScriptedModel) -> None:
    run = asked(scripted_model, "narrow", 3)
    with agents_process(flushes=False) as process, mock.patch.object(tool_tasks, "publish") as publish:
        engine.advance(run.pk, 1, process)
        calls = calls_of(run)
        for place, each in enumerate(calls, 1):
            assert [sent.args[0] for sent in publish.call_args_list] == [each.pk for each in calls[:place]]
            assert publish.call_args.args[3] == "narrow"
            execution.execute(each.pk, 1, presence=process.presence)
    assert_invariants()


def test_given_everybody_died_but_the_watcher_then_it_lets_out_who_waits(scripted_model: ScriptedModel) -> None:
    run = asked(scripted_model, "narrow", 2)
    with working() as present:  # who lets nobody out
        engine.advance(run.pk, 1, engine.Process(present))
    assert [each.turn is None for each in calls_of(run)] == [False, False]
    with mock.patch.object(tool_tasks, "publish") as publish:
        sweep = Sweep(patient=False)
        done = sweep.look()
        sweep.watcher.drop()
    assert done.published_calls == 1
    assert [sent.args[0] for sent in publish.call_args_list] == [calls_of(run)[0].pk]


@pytest.mark.parametrize("name", ["free", "narrow", "rare"])
def test_given_limits_then_a_run_of_a_test_goes_to_its_end_all_the_same(
    scripted_model: ScriptedModel, name: str
) -> None:
    run = to_end(scripted_model, asked(scripted_model, name, 5))
    assert (run.status, run.output) == ("completed", "done")
    assert_invariants()


def test_given_a_bound_for_owners_then_the_calls_of_one_carry_it_and_nobodys_do_not(
    scripted_model: ScriptedModel, settings: Any
) -> None:
    settings.LONGHAUL = {**settings.LONGHAUL, "CALLS_PER_OWNER": 3, "CALL_RATE_PER_OWNER": "100/min"}
    owner = get_user_model()._default_manager.create(username="somebody")
    theirs = to_end(scripted_model, asked(scripted_model, "free", 1, owner=owner, priority=4))
    [made] = calls_of(theirs)
    assert made.gates == {f"calls_of:{owner.pk}": {"most": 3, "count": 100, "seconds": 60.0}}
    assert (made.turn_of, made.priority) == (str(owner.pk), 4)
    [nobodys] = calls_of(to_end(scripted_model, asked(scripted_model, "free", 1)))
    assert nobodys.gates is None


@pytest.mark.parametrize(("name", "before", "words"), [
    ("narrow", 1, "narrow (waits for its turn: 1 of 1 calls of narrow run"),
    ("rare", 2, "rare (waits for the rate of rare, 2/h"),
    ("free", 2, "free (waits for room: 2 calls of longhaul.tools are out"),
])  # fmt: skip
def test_who_waits_says_for_what(
    scripted_model: ScriptedModel, settings: Any, name: str, before: int, words: str
) -> None:
    settings.LONGHAUL = {**settings.LONGHAUL, "MAX_DISPATCHED_CALLS": 2}
    run = asked(scripted_model, name, before + 2)
    with agents_process(flushes=False) as process, mock.patch.object(tool_tasks, "publish"):
        engine.advance(run.pk, 1, process)
    run.refresh_from_db()
    assert words in run.why()
    assert f"{words}, 1 before it" in run.why()
