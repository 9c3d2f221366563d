"""A start on a thread that a run occupies."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from django.db import connection, transaction

from runs import lifecycle
from runs.exceptions import ThreadBusy, TooManyHeld
from runs.models import Run
from runs.pytest_longhaul import assert_invariants
from tests.protocol.rows import wait_until
from tests.runs.scenes import Cast, Together, refused
from threads.models import Thread

pytestmark = pytest.mark.django_db


def test_a_start_that_would_not_wait_is_refused_with_the_live_run(cast: Cast) -> None:
    thread = Thread.objects.create()
    live = cast().start("one", thread=thread)
    with refused(ThreadBusy, str(live.pk), "busy='enqueue'"):
        cast().start("two", thread=thread, busy="reject")


def test_a_thread_holds_so_many_runs_and_no_more(cast: Cast, settings: Any) -> None:
    settings.LONGHAUL = {"MAX_HELD": 2}
    thread = Thread.objects.create()
    started = [cast().start(word, thread=thread) for word in ("one", "two", "three")]
    assert [run.status for run in started] == ["queued", "held", "held"]
    with refused(TooManyHeld, "2 runs wait"):
        cast().start("four", thread=thread)
    started[0].cancel()
    assert cast().start("four", thread=thread).status == "held"
    assert_invariants()


@pytest.mark.django_db(transaction=True)
def test_an_input_that_comes_while_the_occupant_ends_is_not_stranded(cast: Cast) -> None:
    """The end looks for held runs, finds none and has not committed: the start must not believe that the run lives."""
    agent, thread = cast(), Thread.objects.create()
    with mock.patch("runs.tasks.publish"):
        occupant = agent.start("one", thread=thread)
        with transaction.atomic():
            lifecycle.cancel(occupant.pk)
            starting = Together(lambda: agent.start("two", thread=thread))
            wait_until(lambda: _somebody_waits() or starting.results[0] is not None)
        [started] = starting.join()
    assert isinstance(started, Run), started
    started.refresh_from_db()
    assert started.status == "queued"
    assert_invariants()


def _somebody_waits() -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT EXISTS (SELECT 1 FROM pg_locks WHERE NOT granted)")
        return bool(cursor.fetchone()[0])


@pytest.mark.parametrize("status", ["queued", "waiting", "requires_action"])
def test_a_run_that_nobody_holds_at_the_moment_occupies_its_thread_all_the_same(cast: Cast, status: str) -> None:
    thread = Thread.objects.create()
    occupant = cast().start("one", thread=thread)
    Run.objects.filter(pk=occupant.pk).update(status=status)
    assert cast().start("two", thread=thread).status == "held"
