"""A busy thread: every end of its occupant queues the oldest held run with it; the end of a held run does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.protocol.rows import POISON, SECOND, Claim, Database, World, a_call, wait_until
from tests.protocol.test_claim import waits_for_a_lock
from threads.ids import new_id

pytestmark = pytest.mark.django_db


def poison(world: World, claim: Claim) -> Any:
    world.db.execute("UPDATE longhaul_runs_run SET lost = %s WHERE id = %s", POISON - 1, claim.run)
    return world.reclaim(claim)


ENDS: dict[str, Callable[[World, Claim], Any]] = {
    "completed": lambda world, claim: world.end(claim),
    "finished": lambda world, claim: world.finish(claim),
    "cancelled": lambda world, claim: world.cancel(claim.run),
    "past its deadline": lambda world, claim: world.cancel(claim.run, "failed", "deadline"),
    "poison": poison,
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_given_held_runs_when_the_occupant_ends_then_the_oldest_is_queued_and_its_input_has_a_place(
    world: World, end: Callable[[World, Claim], Any]
) -> None:
    claim = world.running()
    thread = world.run(claim.run)["thread_id"]
    oldest = world.start(thread, status="held", text="second")
    younger = world.start(thread, status="held", text="third")
    answer = end(world, claim)
    run = world.run(oldest)
    assert answer["released"] == [str(oldest), 1, "echo"]
    assert (run["status"], run["dispatch_seq"], run["publishes"]) == ("queued", 1, 1)
    assert run["next_publish_at"] - run["queued_at"] < 1.1 * SECOND
    assert world.types(oldest) == ["run.held", "message.completed", "run.queued"]
    assert world.events(oldest)[-1]["payload"] == {"reason": "released"}
    [said] = [one for one in world.messages(thread) if one["run_id"] == oldest]
    assert (said["status"], said["position"]) == ("completed", 3)
    assert world.run(younger)["status"] == "held"
    # and the next end takes the next one
    assert (world.cancel(oldest) or {})["released"] == [str(younger), 1, "echo"]


@pytest.mark.parametrize("status", ["queued", "waiting", "requires_action"])
def test_given_an_occupant_that_no_leg_holds_when_it_is_cancelled_then_it_releases_as_well(
    world: World, status: str
) -> None:
    run = world.in_status(status)
    held = world.start(world.run(run)["thread_id"], status="held")
    assert (world.cancel(run) or {})["released"] == [str(held), 1, "echo"]
    assert world.run(held)["status"] == "queued"


def test_given_a_held_run_when_it_is_cancelled_then_nothing_is_released_and_its_input_never_had_a_place(
    world: World,
) -> None:
    claim = world.running()
    thread = world.run(claim.run)["thread_id"]
    first, second = (world.start(thread, status="held") for _ in range(2))
    by_hand = world.say(thread, "by hand", waiting=True)
    answer = world.cancel(first) or {}
    assert "released" not in answer
    assert [world.run(run)["status"] for run in (claim.run, first, second)] == ["running", "cancelled", "held"]
    assert world.types(first) == ["run.held", "message.discarded", "run.cancelled"]
    assert world.message(by_hand)["status"] == "waiting", "it waits for the occupant"
    [said] = world.db.rows("SELECT * FROM longhaul_threads_message WHERE run_id = %s", first)
    assert (said["status"], said["position"]) == ("discarded", None)
    assert (world.end(claim) or {})["released"] == [str(second), 1, "echo"]


def test_given_hosts_whose_clocks_differ_then_the_oldest_is_the_one_accepted_first(world: World) -> None:
    """An id comes from its host's clock, created_at from the database's."""
    claim = world.running()
    thread = world.run(claim.run)["thread_id"]
    smaller, greater = sorted(new_id() for _ in range(2))
    world.start(thread, status="held", run=greater)
    world.start(thread, status="held", run=smaller)
    assert world.end(claim)["released"][0] == str(greater)


def test_given_messages_by_hand_and_a_held_run_when_the_occupant_ends_then_all_have_places_in_order(
    world: World,
) -> None:
    claim = world.running()
    thread = world.run(claim.run)["thread_id"]
    world.commit(claim, [a_call()])
    by_hand = world.say(thread, "by hand", waiting=True)
    held = world.start(thread, status="held", text="held")
    world.cancel(claim.run)
    rows = world.messages(thread)
    assert [one["role"] for one in rows] == ["user", "assistant", "tool", "user", "user"]
    assert (rows[3]["id"], rows[4]["run_id"]) == (by_hand, held)
    assert [one["position"] for one in rows] == [1, 2, 3, 4, 5]
    assert world.types(claim.run)[-2:] == ["message.completed", "run.cancelled"]


def test_given_a_held_run_that_is_cancelled_while_the_occupant_ends_then_the_next_one_is_released(
    world: World, db_b: Database
) -> None:
    claim = world.running()
    thread = world.run(claim.run)["thread_id"]
    first, second = (world.start(thread, status="held") for _ in range(2))
    other = World(db_b)
    with world.db.transaction():
        world.cancel(first)
        late = db_b.in_background(other.end, claim)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    assert late.result()["released"] == [str(second), 1, "echo"]


def test_given_an_occupant_that_ends_while_its_held_run_is_cancelled_then_the_cancel_ends_the_queued_run(
    world: World, db_b: Database
) -> None:
    claim = world.running()
    thread = world.run(claim.run)["thread_id"]
    first, second = (world.start(thread, status="held") for _ in range(2))
    other = World(db_b)
    with world.db.transaction():
        world.end(claim)
        late = db_b.in_background(other.cancel, first)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    assert late.result()["released"] == [str(second), 1, "echo"]
    assert [world.run(run)["status"] for run in (first, second)] == ["cancelled", "queued"]


def test_given_an_occupied_thread_when_a_second_run_would_occupy_it_then_postgres_refuses(world: World) -> None:
    claim = world.running()
    with pytest.raises(psycopg.errors.UniqueViolation, match="longhaul_one_run_occupies_a_thread"):
        world.start(world.run(claim.run)["thread_id"])
