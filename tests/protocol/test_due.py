"""What the sweep publishes again: queued runs and requested calls that are due, each raised as it is taken."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from uuid import UUID

import pytest

from tests.protocol.rows import SECOND, Database, World, a_call

pytestmark = pytest.mark.django_db

BACKOFF = [1, 2, 4, 8, 15, 15]  # seconds between one publish and the next


def due_runs(db: Database, limit: int = 100) -> list[tuple[UUID, int]]:
    return [(row["run_id"], row["dispatch_seq"]) for row in db.call_rows("longhaul_runs_due", p_limit=limit)]


def due_calls(db: Database, limit: int = 100) -> list[tuple[UUID, int]]:
    return [(row["call_id"], row["attempt"]) for row in db.call_rows("longhaul_calls_due", p_limit=limit)]


def gaps(
    world: World, due: Callable[[Database], object], wanted: tuple[UUID, int], after: timedelta = timedelta()
) -> list[int]:
    """Move the clock a tenth of a second at a time; the whole seconds between two publishes."""
    published: list[timedelta] = []
    at = after
    while len(published) < len(BACKOFF):
        at += SECOND / 4
        world.ahead(at)
        if due(world.db) == [wanted]:
            published.append(at - after)
    return [round((b - a) / SECOND) for a, b in zip([timedelta(), *published], published, strict=False)]


def test_given_a_queued_run_whose_message_is_lost_then_it_is_published_again_with_backoff(world: World) -> None:
    assert gaps(world, due_runs, (world.start(), 1)) == BACKOFF


def test_given_a_requested_call_whose_message_is_lost_then_it_is_published_again_with_backoff(world: World) -> None:
    claim = world.waiting()
    assert gaps(world, due_calls, (world.calls(claim.run)[0], 1)) == BACKOFF


def test_given_a_run_put_off_then_it_is_first_published_when_it_is_due(world: World) -> None:
    claim = world.running()
    world.requeue(claim, "retry", delay=20 * SECOND)
    world.ahead(19 * SECOND)
    assert due_runs(world.db) == []
    world.ahead(20.5 * SECOND)
    assert due_runs(world.db) == [(claim.run, 2)]
    assert due_runs(world.db) == []
    assert gaps(world, due_runs, (claim.run, 2), 20.5 * SECOND) == BACKOFF


def test_given_a_call_put_off_then_it_is_first_published_when_it_is_due(world: World) -> None:
    claim = world.waiting(a_call(max_attempts=3))
    held = world.call_claim(*world.calls(claim.run))
    world.retry(held, 5 * SECOND)
    world.ahead(4 * SECOND)
    assert due_calls(world.db) == []
    world.ahead(5.5 * SECOND)
    assert due_calls(world.db) == [(held.id, 2)]


def test_given_a_retry_without_a_delay_then_it_is_due_at_once(world: World) -> None:
    claim = world.waiting(a_call(max_attempts=3))
    held = world.call_claim(*world.calls(claim.run))
    world.retry(held)
    assert due_calls(world.db) == [(held.id, 2)]


def test_given_what_is_not_ready_then_it_is_never_due(world: World) -> None:
    for status in ("held", "running", "waiting", "requires_action", "completed", "failed", "cancelled"):
        world.in_status(status)
    for status in ("running", "settled", "unknown", "awaiting_approval", "awaiting_result", "awaiting_child"):
        world.call_in_status(status)
    world.ahead(timedelta(hours=1))
    runs = {run for run, _ in due_runs(world.db)}
    assert {world.run(run)["status"] for run in runs} <= {"queued"}
    assert {world.tool_call(call)["status"] for call, _ in due_calls(world.db)} <= {"requested"}


def test_given_a_bound_then_the_longest_overdue_come_first(world: World) -> None:
    runs = [world.start() for _ in range(3)]
    world.ahead(2 * SECOND)
    assert {run for run, _ in due_runs(world.db, limit=2)} == set(runs[:2])
    assert due_runs(world.db, limit=2) == [(runs[2], 1)]


def test_given_a_bound_then_those_of_a_higher_priority_come_first_and_then_the_longest_overdue(world: World) -> None:
    low, old, new, high = (world.start() for _ in range(4))
    for run, priority in ((low, -1), (old, 5), (new, 5), (high, 9)):
        world.db.execute("UPDATE longhaul_runs_run SET priority = %s WHERE id = %s", priority, run)
    world.ahead(2 * SECOND)
    assert [run for run, _ in due_runs(world.db, limit=3)] == [high, old, new]
    assert [run for run, _ in due_runs(world.db, limit=3)] == [low]


def test_given_more_of_a_high_priority_than_are_sent_then_the_longest_overdue_does_not_starve(world: World) -> None:
    low = world.start()
    world.db.execute("UPDATE longhaul_runs_run SET priority = -1 WHERE id = %s", low)
    for _ in range(30):
        world.start()
    world.ahead(20 * SECOND)
    assert due_runs(world.db, limit=1) != [(low, 1)]
    world.ahead(40 * SECOND)  # the others are overdue as long, or again
    assert due_runs(world.db, limit=1) == [(low, 1)]


def test_given_two_sweepers_at_once_then_none_waits_and_nothing_is_published_twice(
    world: World, db_b: Database
) -> None:
    runs = {world.start() for _ in range(6)}
    calls = {world.calls(world.waiting().run)[0] for _ in range(4)}
    world.ahead(2 * SECOND)
    db_b.execute("SET lock_timeout = '2s'")
    with world.db.transaction():
        first, first_calls = due_runs(world.db, limit=4), due_calls(world.db, limit=3)
        second, second_calls = due_runs(db_b), due_calls(db_b)
    assert (len(first), len(second), len(first_calls), len(second_calls)) == (4, 2, 3, 1)
    assert {run for run, _ in first + second} == runs
    assert {call for call, _ in first_calls + second_calls} == calls


def test_given_a_run_that_is_being_claimed_when_swept_then_the_sweep_passes_it_by(world: World, db_b: Database) -> None:
    run, other = world.start(), world.start()
    world.ahead(2 * SECOND)
    worker = world.worker()
    db_b.execute("SET lock_timeout = '2s'")
    with world.db.transaction():
        world.try_claim(run, worker)
        assert [one for one, _ in due_runs(db_b)] == [other]
