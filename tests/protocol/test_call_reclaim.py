"""A running call is taken only from the holder and attempt that were seen; what becomes of it depends on the tool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from tests.protocol.rows import SECOND, Call, Database, World, a_call, wait_until
from tests.protocol.test_claim import waits_for_a_lock

pytestmark = pytest.mark.django_db


def a_running_call(world: World, **changes: Any) -> Call:
    claim = world.waiting(a_call(**{"max_attempts": 3, **changes}))
    return world.call_claim(*world.calls(claim.run))


@pytest.mark.parametrize("kind", [{"idempotent": True}, {"idempotent": None}, {"atomic": True}], ids=str)
def test_given_a_call_that_may_run_again_when_its_worker_is_lost_then_it_does(
    world: World, kind: dict[str, bool]
) -> None:
    held = a_running_call(world, **kind)
    answer = world.call_reclaim(held) or {}
    row = world.tool_call(held.id)
    assert (answer["code"], answer["publish_call"], answer["status"]) == (
        "again",
        [str(held.id), 2, 60, "", "tool_0"],
        "waiting",
    )
    assert (row["status"], row["attempt"], row["max_attempts"], row["holder"]) == ("retrying", 2, 3, None)
    assert (row["timeout_at"], row["publishes"]) == (None, 1)
    assert [(one["outcome"], one["ended_at"] is not None) for one in world.attempts(held.id)] == [("lost", True)]
    assert world.types(row["run_id"])[-1] == "tool_call.retrying"
    again = world.call_claim(held.id)
    assert (world.settle(again, result=1) or {})["status"] == "queued"
    assert [one["outcome"] for one in world.attempts(held.id)] == ["lost", "success"]


def test_given_a_call_that_starts_at_most_once_when_its_worker_is_lost_then_it_is_unknown(world: World) -> None:
    held = a_running_call(world, idempotent=False)
    answer = world.call_reclaim(held) or {}
    assert (answer["code"], answer["status"]) == ("unknown", "requires_action")
    assert "publish_call" not in answer
    row = world.tool_call(held.id)
    assert (row["status"], row["attempt"], row["holder"], row["next_publish_at"]) == ("unknown", 1, None, None)
    assert world.try_call_claim(held.id, 1, held.worker) is None
    assert world.try_call_claim(held.id, 2, held.worker) is None


@pytest.mark.parametrize("kind", [{"idempotent": False}, {"max_attempts": 1}], ids=str)
def test_given_a_call_that_never_began_when_it_is_given_back_then_it_costs_no_attempt(
    world: World, kind: dict[str, object]
) -> None:
    held = a_running_call(world, **kind)
    allowed = world.tool_call(held.id)["max_attempts"]
    answer = world.call_reclaim(held, began=False) or {}
    row = world.tool_call(held.id)
    assert (answer["code"], row["status"], row["attempt"], row["max_attempts"]) == ("again", "retrying", 2, allowed + 1)
    assert [one["outcome"] for one in world.attempts(held.id)] == ["given_back"]


def test_given_no_attempt_left_when_the_worker_is_lost_then_the_call_has_failed(world: World) -> None:
    held = a_running_call(world, max_attempts=2)
    world.call_reclaim(held)
    answer = world.call_reclaim(world.call_claim(held.id)) or {}
    row = world.tool_call(held.id)
    assert (answer["code"], answer["status"]) == ("worker_lost", "queued")
    assert (row["status"], row["outcome"], row["error"]["code"]) == ("settled", "failed", "worker_lost")
    assert [one["outcome"] for one in world.attempts(held.id)] == ["lost", "lost"]


@pytest.mark.parametrize("kind", [{"idempotent": True}, {"idempotent": False}, {"atomic": True}], ids=str)
def test_given_a_call_past_its_time_when_reclaimed_then_it_timed_out(world: World, kind: dict[str, bool]) -> None:
    held = a_running_call(world, timeout_seconds=30, **kind)
    world.ahead(31 * SECOND)
    answer = world.call_reclaim(held) or {}
    row = world.tool_call(held.id)
    assert (answer["code"], row["outcome"], row["error"]["code"]) == ("timed_out", "failed", "timed_out")
    # `lost`, for its worker never said how it ended; and why it was taken.
    assert [(one["outcome"], one["error"]["code"]) for one in world.attempts(held.id)] == [("lost", "timed_out")]
    before = world.dump()
    assert world.settle(held, result="late") is None
    assert world.settle(held, "failed") is None
    assert world.dump() == before


def test_given_a_look_that_saw_something_else_when_it_reclaims_then_nothing_is_taken(world: World) -> None:
    held = a_running_call(world)
    world.call_reclaim(held)
    world.call_claim(held.id)
    stale = [held, replace(held, attempt=2), replace(held, worker=world.worker("tools@b"))]
    before = world.dump()
    assert [world.call_reclaim(each) for each in stale] == [None, None, None]
    assert world.dump() == before


@pytest.mark.parametrize("first", ["settle", "reclaim"])
def test_given_a_call_that_settles_while_it_is_reclaimed_then_whoever_is_first_wins(
    world: World, db_b: Database, first: str
) -> None:
    held = a_running_call(world)
    other = World(db_b)
    with world.db.transaction():
        if first == "settle":
            world.settle(held, result=1)
            late = db_b.in_background(other.call_reclaim, held)
        else:
            world.call_reclaim(held)
            late = db_b.in_background(other.settle, held, result=1)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    assert late.result() is None
    assert world.tool_call(held.id)["status"] == ("settled" if first == "settle" else "retrying")


# --- the open transaction of an atomic attempt whose worker is cut off, but lives


@contextmanager
def attempt_on(world: World, url: str, name: str | None, *, atomic: bool = True) -> Iterator[tuple[Call, Database]]:
    """An attempt on a connection of its own, whose open transaction has written a row of the application."""
    claim = world.waiting(a_call(max_attempts=3, atomic=atomic))
    [call] = world.calls(claim.run)
    body = Database(url)
    try:
        held = World(body).call_claim(call)
        [attempt] = world.attempts(call)
        body.execute("SELECT set_config('application_name', %s, false)", name or f"longhaul {attempt['id']}")
        body.execute("BEGIN")
        thread = world.run(claim.run)["thread_id"]
        body.execute("UPDATE longhaul_threads_thread SET title = 'refunded' WHERE id = %s", thread)
        yield held, body
    finally:
        body.connection.close()


def is_alive(world: World, pid: int) -> bool:
    return bool(world.db.one("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", pid))


def test_given_a_dead_attempts_open_transaction_when_reclaimed_then_its_backend_is_ended(
    world: World, database_url: str
) -> None:
    with attempt_on(world, database_url, None) as (held, body):
        pid = body.pid()
        world.call_reclaim(held)
        wait_until(lambda: not is_alive(world, pid))
        with pytest.raises(psycopg.OperationalError):
            world.settle(held, result=1, db=body)
    thread = world.run(world.tool_call(held.id)["run_id"])["thread_id"]
    assert world.db.one("SELECT title FROM longhaul_threads_thread WHERE id = %s", thread) == ""
    assert world.settle(world.call_claim(held.id), result=1)


def test_given_a_dead_attempt_that_holds_the_run_when_reclaimed_then_nobody_waits_for_it(
    world: World, database_url: str
) -> None:
    """Between its settlement and its commit an atomic attempt has the run locked; one that was stopped there holds it on."""
    with attempt_on(world, database_url, None) as (held, body):
        pid = body.pid()
        assert world.settle(held, result=1, db=body)
        world.db.execute("SET lock_timeout = '5s'")
        try:
            assert world.call_reclaim(held)
        finally:
            world.db.execute("RESET lock_timeout")
        wait_until(lambda: not is_alive(world, pid))
    assert world.settle(world.call_claim(held.id), result=1)


@pytest.mark.parametrize(("name", "atomic"), [("somebody else", True), (None, False)])
def test_given_a_backend_that_is_not_the_attempts_any_more_when_reclaimed_then_it_lives(
    world: World, database_url: str, name: str | None, atomic: bool
) -> None:
    with attempt_on(world, database_url, name, atomic=atomic) as (held, body):
        world.call_reclaim(held)
        assert world.settle(held, result=1, db=body) is None, "its guard refuses it, so its own work is rolled back"
        body.execute("ROLLBACK")


def test_given_a_call_that_its_holder_has_claimed_again_when_an_old_look_reclaims_then_nothing_is_taken(
    world: World,
) -> None:
    """The holder is the same: only the attempt tells."""
    held = a_running_call(world)
    world.call_reclaim(held)
    world.call_claim(held.id, held.worker)
    before = world.dump()
    assert world.call_reclaim(held) is None
    assert world.dump() == before
