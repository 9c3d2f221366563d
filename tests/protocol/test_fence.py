"""Fence: a leg that is not the claim any more writes nothing, whatever it calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.protocol.rows import SECOND, Claim, World, a_call
from threads.ids import new_id

pytestmark = pytest.mark.django_db

ENDED = {"status": "completed", "stop_reason": "end_turn", "output": "said", "error": None}

WRITES: dict[str, Callable[[World, Claim], Any]] = {
    "turn_open": lambda world, claim: world.try_turn(claim, new_id()),
    "step_commit with calls": lambda world, claim: world.try_commit(claim, [a_call()], usage={"model": "m"}),
    "step_commit at the end": lambda world, claim: world.try_commit(claim, end=ENDED),
    "requeue": lambda world, claim: world.requeue(claim, error={"code": "server"}, usage={"model": "m"}),
    "finish": lambda world, claim: world.finish(claim),
    "deltas_write": lambda world, claim: (
        {row["state"] for row in world.speak(claim, "late", first=2)} - {"lost"} or None
    ),
}

LOST: dict[str, Callable[[World, Claim], Claim]] = {
    "its epoch is old": lambda world, claim: replace(claim, epoch=claim.epoch - 1),
    "its epoch is not there yet": lambda world, claim: replace(claim, epoch=claim.epoch + 1),
    "another worker holds it": lambda world, claim: replace(claim, worker=world.worker()),
}


def requeued(world: World, claim: Claim) -> None:
    world.requeue(claim)


def reclaimed_and_claimed_anew(world: World, claim: Claim) -> None:
    world.reclaim(claim)
    world.turn(world.claim(claim.run))


def reclaimed_and_claimed_anew_by_the_same_worker(world: World, claim: Claim) -> None:
    world.reclaim(claim)
    world.turn(world.claim(claim.run, claim.worker))


ENDS: dict[str, Callable[[World, Claim], Any]] = {
    "was requeued": requeued,
    "was reclaimed": lambda world, claim: world.reclaim(claim),
    "was reclaimed and claimed anew": reclaimed_and_claimed_anew,
    "was reclaimed and claimed anew by the same worker": reclaimed_and_claimed_anew_by_the_same_worker,
    "was cancelled": lambda world, claim: world.cancel(claim.run),
    "has failed": lambda world, claim: world.finish(claim),
    "has completed": lambda world, claim: world.end(claim),
    "waits for its calls": lambda world, claim: world.commit(claim, [a_call()], linger=2 * SECOND),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
def test_given_a_fence_that_does_not_match_when_a_leg_writes_then_nothing_changes(
    world: World, lost: Callable[[World, Claim], Claim], write: Callable[[World, Claim], Any]
) -> None:
    claim = world.running()
    world.speak(claim, "so far")
    stale = lost(world, claim)
    before = world.dump()
    assert write(world, stale) is None
    assert world.dump() == before


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_given_a_run_that_left_its_leg_when_the_leg_writes_then_nothing_changes(
    world: World, end: Callable[[World, Claim], Any], write: Callable[[World, Claim], Any]
) -> None:
    claim = world.running()
    world.speak(claim, "so far")
    end(world, claim)
    before = world.dump()
    assert write(world, claim) is None
    assert world.dump() == before


AT_A_BOUNDARY = {name: WRITES[name] for name in ("turn_open", "requeue", "finish")}


@pytest.mark.parametrize("write", AT_A_BOUNDARY.values(), ids=AT_A_BOUNDARY)
@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
def test_given_a_fence_that_does_not_match_when_a_leg_comes_to_a_boundary_then_nothing_changes(
    world: World, lost: Callable[[World, Claim], Claim], write: Callable[[World, Claim], Any]
) -> None:
    """No message is pending there: the fence alone refuses it."""
    stale = lost(world, world.claim(world.start()))
    before = world.dump()
    assert write(world, stale) is None
    assert world.dump() == before


@pytest.mark.parametrize("write", AT_A_BOUNDARY.values(), ids=AT_A_BOUNDARY)
def test_given_a_run_that_is_claimed_anew_when_the_old_leg_comes_to_a_boundary_then_nothing_changes(
    world: World, write: Callable[[World, Claim], Any]
) -> None:
    old = world.claim(world.start())
    world.reclaim(old)
    world.claim(old.run, old.worker)
    before = world.dump()
    assert write(world, old) is None
    assert world.dump() == before


def test_given_the_fence_holds_but_the_message_is_another_when_a_leg_writes_then_nothing_changes(world: World) -> None:
    claim = replace(world.running(), message=new_id())
    before = world.dump()
    assert world.try_commit(claim, [a_call()]) is None
    assert [row["state"] for row in world.speak(claim, "late")] == ["lost"]
    assert world.dump() == before


def test_given_a_commit_whose_answer_was_lost_when_it_is_repeated_then_it_is_refused(world: World) -> None:
    claim = world.running()
    world.commit(claim)
    before = world.dump()
    assert world.try_commit(claim) is None
    assert world.dump() == before
    world.turn(claim)


def test_given_two_steps_under_one_claim_when_a_delta_of_the_first_is_late_then_only_the_second_is_written(
    world: World,
) -> None:
    """Its epoch, holder and status still match: the pending message is part of the fence."""
    first = world.running()
    world.commit(first)
    second = world.turn(first)
    rows = world.write_deltas(first.worker, [(first, "late", 9), (second, "now", 1), (first, "later", 10)])
    assert sorted(row["state"] for row in rows) == ["lost", "written"]
    deltas = [event for event in world.events(first.run) if event["type"] == "text.delta"]
    assert [delta["payload"]["text"] for delta in deltas] == ["now"]
