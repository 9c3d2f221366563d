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
from threads import transcript
from threads.models import Thread

pytestmark = pytest.mark.django_db


def test_a_start_that_would_not_wait_is_refused_with_the_live_run(cast: Cast) -> None:
    thread = Thread.objects.create()
    live = cast().start("one", thread=thread)
    with refused(ThreadBusy, str(live.pk), "busy='enqueue'"):
        cast().start("two", thread=thread, busy="reject")


def test_what_goes_on_with_the_steering_of_a_bounded_run_waits_for_its_turn_as_any_other(cast: Cast) -> None:
    agent = cast(max_concurrency=1, queue="gpu")
    occupant, beside = agent.start("one"), agent.start("beside")
    assert [run for run, _, _ in lifecycle.release()] == [occupant.pk]
    assert agent.start("two", thread=occupant.thread, busy="steer") == occupant
    assert (
        lifecycle.cancel(occupant.pk)["release"] is True
    )  # its slot is free, though what goes on comes after the other
    after = Run.objects.get(parent=occupant)
    assert (after.status, after.gates, after.lane) == ("queued", occupant.gates, "gpu\nagent:clerk")
    assert after.turn is not None
    assert [run for run, _, _ in lifecycle.release()] == [beside.pk]
    lifecycle.cancel(beside.pk)
    assert [run for run, _, _ in lifecycle.release()] == [after.pk]
    assert_invariants()


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


@pytest.mark.parametrize("busy", ["enqueue", "steer", "interrupt", "rollback"])
@pytest.mark.django_db(transaction=True)
def test_an_input_that_comes_while_the_occupant_ends_is_not_stranded(cast: Cast, busy: str) -> None:
    """The end looks for held runs, finds none and has not committed: the start must not believe that the run lives."""
    agent, thread = cast(), Thread.objects.create()
    with mock.patch("runs.tasks.publish"):
        occupant = agent.start("one", thread=thread)
        with transaction.atomic():
            lifecycle.cancel(occupant.pk)
            starting = Together(lambda: agent.start("two", thread=thread, busy=busy))
            wait_until(lambda: _somebody_waits() or starting.results[0] is not None)
        [started] = starting.join()
    assert isinstance(started, Run), started
    started.refresh_from_db()
    assert (started.status, started.parent) == ("queued", None)
    assert_invariants()


@pytest.mark.django_db(transaction=True)
def test_an_end_that_comes_while_a_run_is_steered_sees_what_steers_it(cast: Cast) -> None:
    agent, thread = cast(), Thread.objects.create()
    with mock.patch("runs.tasks.publish"):
        occupant = agent.start("one", thread=thread)
        with transaction.atomic():
            assert agent.start("two", thread=thread, busy="steer") == occupant
            ending = Together(occupant.cancel)
            wait_until(_somebody_waits)
        [ended] = ending.join()
    assert isinstance(ended, Run), ended
    [after] = Run.objects.filter(parent=ended)
    assert (ended.status, after.status, after.origin) == ("cancelled", "queued", "steer")
    assert [message.text for message in thread.messages.order_by("position")] == ["one", "two"]
    assert_invariants()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("busy", ["steer", "interrupt", "rollback"])
def test_two_at_once_are_one_after_the_other(cast: Cast, busy: str) -> None:
    agent, thread = cast(), Thread.objects.create()
    with mock.patch("runs.tasks.publish"):
        occupant = agent.start("one", thread=thread)
        found = Together(
            *[lambda word=word: agent.start(word, thread=thread, busy=busy) for word in ("two", "three")]
        ).join()
    assert all(isinstance(each, Run) for each in found), found
    occupant.refresh_from_db()
    runs = Run.objects.order_by("entered_at").values_list("status", "stop_reason")
    if busy == "steer":
        assert found == [occupant, occupant]
        assert thread.messages.filter(status="waiting").count() == 2
    else:
        reason = {"interrupt": "interrupted", "rollback": "rolled_back"}[busy]
        assert list(runs) == [("cancelled", reason), ("cancelled", reason), ("queued", "")]
    assert_invariants()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("busy", ["steer", "interrupt"])
def test_two_at_once_with_one_key_are_one(cast: Cast, busy: str) -> None:
    agent, thread = cast(), Thread.objects.create()
    with mock.patch("runs.tasks.publish"):
        agent.start("one", thread=thread)
        found = Together(*[lambda: agent.start("two", thread=thread, busy=busy, idempotency_key="k")] * 2).join()
    assert isinstance(found[0], Run), found
    assert found[0] == found[1]
    assert thread.messages.count() == 2
    assert_invariants()


@pytest.mark.parametrize("busy", ["enqueue", "steer", "interrupt", "rollback"])
def test_a_thread_that_is_taken_between_the_look_and_the_insert_is_looked_at_again(cast: Cast, busy: str) -> None:
    agent, thread = cast(), Thread.objects.create()
    live = agent.start("one", thread=thread)
    looks = mock.Mock(side_effect=[False, True])
    real = transcript.lock_occupant
    with mock.patch.object(transcript, "lock_occupant", lambda thread_id: looks() and real(thread_id)):
        started = agent.start("two", thread=thread, busy=busy)
    live.refresh_from_db()
    assert looks.call_count == 2
    assert (live.status, started.status) == {
        "enqueue": ("queued", "held"), "steer": ("queued", "queued"),
    }.get(busy, ("cancelled", "queued"))  # fmt: skip
    assert (started.dispatch_seq == 0) == (busy == "enqueue")
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
