"""Publish after commit: a message speaks of rows that are there, and every transition that readies a row sends one."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest import mock
from uuid import UUID

import pytest
from django.db import transaction

from runs import agents, bells, engine
from runs.agents import Agent
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call
from tests.runs.scenes import agents_process
from threads.models import Thread
from tools import lifecycle, run_log, tool
from tools import tasks as tool_tasks
from tools.models import ToolCall

pytestmark = pytest.mark.django_db(transaction=True)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def clerk() -> Agent:
    return agents.registry.add(Agent(name="clerk", model="scripted:x", tools=[add]))


def test_the_calls_of_a_step_are_published_when_they_are_rows(scripted_model: ScriptedModel) -> None:
    scripted_model.say([call("add", a=1, b=2), call("add", a=3, b=4)])
    run = clerk().start("hello")
    there: list[bool] = []

    def publish(call_id: UUID, *told: Any) -> None:
        assert told[-3:] == ("add", run.pk, "clerk")
        there.append(ToolCall.objects.filter(pk=call_id, status="requested").exists())

    with agents_process(flushes=False) as process, mock.patch.object(tool_tasks, "publish", publish):
        engine.advance(run.pk, 1, process)
    assert there == [True, True]
    assert_invariants()


def test_the_join_publishes_the_run_at_once(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("add", a=1, b=2))
    run = clerk().start("hello")
    with agents_process(flushes=False) as process, mock.patch("runs.tasks.publish") as publish:
        engine.advance(run.pk, 1, process)  # its call runs at once, in this thread
    run.refresh_from_db()
    assert (run.status, run.dispatch_seq) == ("queued", 2)
    publish.assert_called_once_with(run.pk, 2, "clerk")


def test_the_end_of_a_run_publishes_the_one_that_it_releases(scripted_model: ScriptedModel) -> None:
    thread = Thread.objects.create()
    with mock.patch("runs.tasks.publish") as publish:
        first, held = clerk().start("one", thread=thread), clerk().start("two", thread=thread)
        publish.assert_called_once_with(first.pk, 1, "clerk")
        publish.reset_mock()
        first.cancel()
    publish.assert_called_once_with(held.pk, 1, "clerk")
    held.refresh_from_db()
    assert held.status == "queued"


def test_a_call_that_is_reclaimed_is_published_at_once(scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("add", a=1, b=2))
    run = clerk().start("hello")
    with agents_process(flushes=False) as process, mock.patch.object(tool_tasks, "publish") as publish:
        engine.advance(run.pk, 1, process)
        made = ToolCall.objects.get(run_id=run.pk)
        worker = process.presence.id
        lifecycle.claim(made.pk, 1, worker=worker, worker_name="tools@a", task_id="", alone=False)
        publish.reset_mock()
        run_log.current().announce(lifecycle.reclaim(made.pk, 1, holder=worker))
    publish.assert_called_once_with(made.pk, 2, timedelta(seconds=60), "", "add", str(run.pk), "clerk")


def test_a_cancel_in_a_transaction_that_rolls_back_was_never_there(scripted_model: ScriptedModel) -> None:
    thread = Thread.objects.create()
    first, held = clerk().start("one", thread=thread), clerk().start("two", thread=thread)
    with mock.patch("runs.tasks.publish") as publish, mock.patch("runs.bells.ring") as ring:
        with transaction.atomic():
            first.cancel()
            transaction.set_rollback(True)
        assert publish.call_count == ring.call_count == 0
        assert [Run.objects.get(pk=run.pk).status for run in (first, held)] == ["queued", "held"]
        with transaction.atomic():
            first.cancel()
            assert publish.call_count == ring.call_count == 0
        publish.assert_called_once_with(held.pk, 1, "clerk")


def test_what_a_tool_tells_its_readers_rings_after_its_commit_and_never_when_it_is_rolled_back(
    scripted_model: ScriptedModel,
) -> None:
    run = clerk().start("hello")
    with mock.patch("runs.bells.ring") as ring:
        with transaction.atomic():
            run_log.current().record(run.pk, "data", {"data": "never said"})
            transaction.set_rollback(True)
        assert ring.call_count == 0
        with transaction.atomic():
            run_log.current().record(run.pk, "data", {"data": "said"})
            assert ring.call_count == 0
        assert ring.call_count == 1
    assert [event.payload for event in run.events() if event.type == "data"] == [{"data": "said"}]


def test_deleting_a_thread_tells_the_legs_of_its_runs(scripted_model: ScriptedModel) -> None:
    """They may wait for a silent model, or for their calls."""
    run = clerk().start("one", thread=Thread.objects.create())
    with mock.patch("runs.bells.ring") as ring:
        run.thread.delete()
    rung = {channel for called in ring.call_args_list for channel in called.args[0]}
    assert bells.leg_channel(run.pk) in rung
