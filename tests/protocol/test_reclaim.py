"""Reclaim names holder and epoch; only it counts toward poison, and a committed step resets the count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.protocol.rows import POISON, SECOND, Claim, World, a_call

pytestmark = pytest.mark.django_db


def test_given_a_lost_leg_when_its_run_is_reclaimed_then_it_is_queued_under_a_new_epoch(world: World) -> None:
    claim = world.running()
    answer = world.reclaim(claim)
    run = world.run(claim.run)
    assert answer == {"run": str(claim.run), "status": "queued", "dispatch_seq": 2, "lingering": False, "agent": "echo"}
    assert (run["epoch"], run["dispatch_seq"], run["lost"], run["publishes"]) == (2, 2, 1, 1)
    assert run["next_publish_at"] - run["queued_at"] < 1.1 * SECOND


STALE: dict[str, Callable[[World, Claim], Claim]] = {
    "an older epoch": lambda world, claim: replace(claim, epoch=claim.epoch - 1),
    "another holder": lambda world, claim: replace(claim, worker=world.worker()),
}


@pytest.mark.parametrize("stale", STALE.values(), ids=STALE)
def test_given_a_look_that_saw_something_else_when_it_reclaims_then_nothing_is_taken(
    world: World, stale: Callable[[World, Claim], Claim]
) -> None:
    seen = stale(world, world.running())
    before = world.dump()
    assert world.reclaim(seen) is None
    assert world.dump() == before


def test_given_two_looks_at_one_death_when_both_reclaim_then_the_new_holder_keeps_the_run(world: World) -> None:
    claim = world.running()
    world.reclaim(claim)
    world.turn(world.claim(claim.run))
    before = world.dump()
    assert world.reclaim(claim) is None
    assert world.dump() == before


def test_given_five_losses_without_a_step_then_the_run_is_poison(world: World) -> None:
    run = world.start()
    for times in range(1, POISON):
        world.reclaim(world.turn(world.claim(run)))
        assert (world.run(run)["status"], world.run(run)["lost"]) == ("queued", times)
    answer = world.reclaim(world.turn(world.claim(run))) or {}
    row = world.run(run)
    assert answer["status"] == row["status"] == "failed"
    assert (row["stop_reason"], row["error"]["code"], row["lost"]) == ("poison", "poison", POISON)


def test_given_a_committed_step_then_the_losses_before_it_do_not_count(world: World) -> None:
    run = world.start()
    for _ in range(POISON - 1):
        world.reclaim(world.turn(world.claim(run)))
    claim = world.turn(world.claim(run))
    world.commit(claim, [a_call()])
    assert world.run(run)["lost"] == 0
    world.settle(world.call_claim(*world.calls(run)))
    world.reclaim(world.turn(world.claim(run)))
    assert (world.run(run)["status"], world.run(run)["lost"]) == ("queued", 1)


@pytest.mark.parametrize("reason", ["budget", "drained", "retry"])
def test_given_legs_that_end_themselves_then_they_do_not_count_toward_poison(world: World, reason: str) -> None:
    run = world.start()
    world.reclaim(world.turn(world.claim(run)))
    for _ in range(POISON + 1):
        world.requeue(world.turn(world.claim(run)), reason)
    row = world.run(run)
    assert (row["status"], row["lost"], row["legs"]) == ("queued", 1, POISON + 2)
