"""Limits of tool calls with real workers: owners in turn, so many at once, so many in a time, whoever dies."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.contrib.auth import get_user_model

from runs import Run
from runs.agents import registry
from runs.models import Leg
from tests.workers.app.agents import own_queue_test, worker_test
from tests.workers.conftest import Kit, eventually
from tests.workers.test_deaths import ended
from tools.models import ToolAttempt, ToolCall

pytestmark = pytest.mark.slow

SECOND = timedelta(seconds=1)


def attempts(*runs: Run) -> list[ToolAttempt]:
    """All that began of these runs, in order."""
    calls = ToolCall.objects.filter(run_id__in=[run.pk for run in runs])
    return list(ToolAttempt.objects.filter(call__in=calls).order_by("started_at"))


def test_an_owner_with_few_calls_does_not_wait_behind_one_with_many(workers: Kit) -> None:
    owners = [get_user_model()._default_manager.create(username=f"owner-{n}-of-turns") for n in range(2)]
    many = worker_test.start("fan idempotent 0.3 150", owner=owners[0])
    eventually(lambda: attempts(many), why="the first one's calls are under way")
    few = worker_test.start("fan idempotent 0.3 10", owner=owners[1])
    assert ended(few).output == "It is done."
    last = max(attempt.started_at for attempt in attempts(few))
    assert sum(attempt.started_at < last for attempt in attempts(many)) < 60
    many.cancel()


def test_no_more_than_its_limits_run_and_start_whoever_dies(workers: Kit) -> None:
    workers.up(tools=2)
    runs = [worker_test.start("fan narrow 0.2 9") for _ in range(2)]
    taken = eventually(
        lambda: ToolCall.objects.filter(run_id__in=[run.pk for run in runs], status="running").first(), why="one runs"
    )
    workers.kill(workers.of(taken.holder))
    for run in runs:
        assert ended(run).output == "It is done."
    began = attempts(*runs)
    assert len(began) > 18  # those that were lost began again
    for attempt in began:
        beside = [
            other for other in began if other.started_at <= attempt.started_at < (other.ended_at or attempt.started_at)
        ]
        assert len(beside) <= 2, beside
        in_a_second = [other for other in began if timedelta(0) <= other.started_at - attempt.started_at < SECOND]
        assert len(in_a_second) <= 8, in_a_second


def test_the_runs_of_an_agent_with_a_queue_of_its_own_wait_for_a_worker_of_that_queue(workers: Kit) -> None:
    registry.add(own_queue_test)
    run = own_queue_test.start("tell me")
    beside = worker_test.start("tell me")
    assert ended(beside).status == "completed"
    eventually(lambda: Run.objects.get(pk=run.pk).publishes >= 2, why="its message is sent again")
    run.refresh_from_db()
    assert (run.status, run.legs) == ("queued", 0)
    with workers.consuming("own_queue_test") as name:
        assert ended(run).status == "completed"
    assert [leg.worker for leg in Leg.objects.filter(run=run)] == [name]
