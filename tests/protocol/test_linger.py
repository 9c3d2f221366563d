"""Linger: a leg waits a little for its calls. While linger_until is ahead the join rings it and publishes nothing."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest

from tests.protocol.rows import MODEL_TIME, PREPARE, SECOND, Claim, Database, World, a_call, wait_until
from tests.protocol.test_claim import waits_for_a_lock

pytestmark = pytest.mark.django_db

LINGER = 2 * SECOND


def joined(world: World, claim: Claim) -> dict[str, object]:
    answer: dict[str, object] = {}
    for call in world.calls(claim.run):
        if world.tool_call(call)["status"] == "requested":
            answer = world.settle(world.call_claim(call), result=1) or {}
    return answer


def test_given_a_step_with_calls_when_its_leg_lingers_then_the_leg_stays_open_without_a_claim(world: World) -> None:
    claim = world.waiting(linger=LINGER)
    run = world.run(claim.run)
    assert (run["status"], run["holder"]) == ("waiting", None)
    assert run["linger_until"] - world.events(claim.run)[-1]["at"] == LINGER
    assert [leg["ended_at"] for leg in world.legs(claim.run)] == [None]
    assert world.types(claim.run)[-1] == "run.waiting"
    assert world.linger_claim(claim) == {"status": "waiting"}


def test_given_a_lingering_leg_when_the_join_comes_then_it_is_rung_and_the_publish_is_put_off(world: World) -> None:
    claim = world.waiting(linger=LINGER)
    until = world.run(claim.run)["linger_until"]
    answer = joined(world, claim)
    run = world.run(claim.run)
    assert (answer["status"], answer["lingering"], answer["dispatch_seq"]) == ("queued", True, 2)
    assert (run["next_publish_at"], run["publishes"]) == (until + SECOND, 1)


def test_given_a_lingerer_that_died_when_the_join_comes_after_linger_until_then_it_publishes(world: World) -> None:
    claim = world.waiting(linger=LINGER)
    world.ahead(3 * SECOND)
    answer = joined(world, claim)
    run = world.run(claim.run)
    assert (answer["status"], answer["lingering"]) == ("queued", False)
    assert run["next_publish_at"] == run["queued_at"] + SECOND


def test_given_a_lingerer_that_died_after_the_join_then_the_sweep_publishes(world: World) -> None:
    claim = world.waiting(linger=LINGER)
    joined(world, claim)
    world.ahead(2.5 * SECOND)
    assert world.db.call_rows("longhaul_runs_due", p_limit=10) == []
    world.ahead(3.5 * SECOND)
    assert [row["run_id"] for row in world.db.call_rows("longhaul_runs_due", p_limit=10)] == [claim.run]


def test_given_the_join_when_the_lingering_leg_looks_then_it_claims_with_what_it_finds_and_opens_its_turn(
    world: World,
) -> None:
    claim = world.waiting(linger=LINGER)
    joined(world, claim)
    last = world.run(claim.run)["last_seq"]
    answer = world.linger_claim(claim)
    run = world.run(claim.run)
    assert (answer["status"], answer["epoch"], answer["steps"]) == ("running", 2, 1)
    assert [one[2] for one in answer["turn"]["context"]] == ["user", "assistant", "tool"]
    assert (run["status"], run["epoch"], run["holder"], run["linger_until"]) == ("running", 2, claim.worker, None)
    assert (run["legs"], run["next_publish_at"], run["publishes"]) == (1, None, 0)
    # no leg.started: it is the same leg, its row carries the epoch of its last claim
    assert world.types(claim.run, last) == ["message.created"]
    [leg] = world.legs(claim.run)
    assert (leg["id"], leg["epoch"], leg["ended_at"]) == (claim.leg, 2, None)
    assert run["leg_deadline"] - world.events(claim.run)[-1]["at"] == MODEL_TIME
    # and the message that the sweep may have sent for the same dispatch matches no row
    assert world.try_claim(claim.run, world.worker(), dispatch=2) is None


def test_given_the_join_when_the_leg_wants_only_the_claim_then_no_turn_is_opened(world: World) -> None:
    claim = world.waiting(linger=LINGER)
    joined(world, claim)
    answer = world.linger_claim(claim, opens=False)
    assert (answer["status"], answer["turn"]) == ("running", None)
    run = world.run(claim.run)
    assert run["pending_message_id"] is None
    assert PREPARE - SECOND < run["leg_deadline"] - world.db.one("SELECT longhaul_now()") < PREPARE


def test_given_a_lingerer_that_is_not_present_when_it_looks_then_it_may_not_claim(world: World) -> None:
    claim = world.waiting(linger=timedelta(seconds=20))
    joined(world, claim)
    world.ahead(8 * SECOND)
    before = world.dump()
    assert world.linger_claim(claim) == {"status": "absent"}
    assert world.dump() == before


def test_given_a_lingering_leg_when_another_task_claims_then_the_lingering_leg_is_ended_first(world: World) -> None:
    claim = world.waiting(linger=LINGER)
    joined(world, claim)
    last = world.run(claim.run)["last_seq"]
    other = world.claim(claim.run)
    assert world.types(claim.run, last) == ["leg.ended", "leg.started"]
    assert world.run(claim.run)["linger_until"] is None
    assert [(leg["id"], leg["reason"]) for leg in world.legs(claim.run)] == [(claim.leg, "tools"), (other.leg, "")]
    before = world.dump()
    assert world.linger_claim(claim) == {"status": "lost"}
    assert world.linger_end(claim) == {}
    assert world.dump() == before


@pytest.mark.parametrize("first", ["lingerer", "task"])
def test_given_a_lingering_leg_and_another_task_that_claim_at_once_then_one_of_them_gets_the_run(
    world: World, db_b: Database, first: str
) -> None:
    claim = world.waiting(linger=LINGER)
    joined(world, claim)
    other, worker = World(db_b), world.worker()
    with world.db.transaction():
        if first == "lingerer":
            world.linger_claim(claim)
            late = db_b.in_background(other.try_claim, claim.run, worker, dispatch=2)
        else:
            world.try_claim(claim.run, worker, dispatch=2)
            late = db_b.in_background(other.linger_claim, claim)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    assert late.result() == (None if first == "lingerer" else {"status": "lost"})
    assert world.run(claim.run)["holder"] == (claim.worker if first == "lingerer" else worker)


def test_given_a_lingerer_that_gives_up_while_the_run_waits_then_its_leg_ends_and_the_join_will_publish(
    world: World,
) -> None:
    claim = world.waiting(linger=timedelta(seconds=60))
    assert world.linger_end(claim) == {}
    run = world.run(claim.run)
    assert (run["status"], run["linger_until"], run["next_publish_at"]) == ("waiting", None, None)
    assert [leg["reason"] for leg in world.legs(claim.run)] == ["tools"]
    assert joined(world, claim)["lingering"] is False
    run = world.run(claim.run)
    assert run["next_publish_at"] == run["queued_at"] + SECOND


def test_given_a_lingerer_that_gives_up_when_the_join_was_faster_then_the_run_is_to_be_published(world: World) -> None:
    claim = world.waiting(linger=timedelta(seconds=60))
    joined(world, claim)
    answer = world.linger_end(claim)
    assert answer == {"run": str(claim.run), "status": "queued", "dispatch_seq": 2, "lingering": False, "agent": "echo"}
    run = world.run(claim.run)
    assert run["linger_until"] is None
    assert run["next_publish_at"] - world.db.one("SELECT longhaul_now()") < SECOND
    assert world.linger_end(claim) == {}, "a repeated answer"
    assert world.try_claim(claim.run, world.worker(), dispatch=2)


@pytest.mark.parametrize("first", ["join", "end"])
def test_given_a_lingerer_that_gives_up_while_the_join_commits_then_the_run_is_published_by_one_of_them(
    world: World, db_b: Database, first: str
) -> None:
    claim = world.waiting(linger=LINGER)
    held = world.call_claim(*world.calls(claim.run))
    other = World(db_b)
    with world.db.transaction():
        if first == "join":
            early = world.settle(held, result=1) or {}
            late = db_b.in_background(other.linger_end, claim)
        else:
            early = world.linger_end(claim)
            late = db_b.in_background(other.settle, held, result=1)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    publishes = [answer["dispatch_seq"] for answer in (early, late.result()) if answer.get("lingering") is False]
    assert publishes == [2]


def test_given_a_leg_that_runs_again_when_it_is_told_to_give_up_then_nothing_changes(world: World) -> None:
    claim = world.waiting(linger=LINGER)
    joined(world, claim)
    world.linger_claim(claim)
    before = world.dump()
    assert world.linger_end(claim) == {}
    assert world.linger_claim(claim) == {"status": "lost"}, "a repeated claim whose answer was lost is given back"
    assert world.dump() == before


def test_given_many_steps_of_one_lingering_leg_then_it_is_one_leg_with_a_rising_epoch(world: World) -> None:
    claim = world.waiting(linger=LINGER)
    for step in range(2, 5):
        joined(world, claim)
        answer = world.linger_claim(claim)
        message = world.run(claim.run)["pending_message_id"]
        claim = Claim(claim.run, claim.worker, claim.leg, answer["epoch"], message)
        assert claim.epoch == step
        world.commit(claim, [a_call()], linger=LINGER)
    run = world.run(claim.run)
    assert (run["steps"], run["legs"], len(world.legs(claim.run))) == (4, 1, 1)
    assert isinstance(claim.message, UUID)


def test_given_a_lingering_leg_when_a_call_waits_for_a_person_then_it_still_finds_the_join(world: World) -> None:
    claim = world.waiting(a_call(idempotent=False), linger=LINGER)
    held = world.call_claim(*world.calls(claim.run))
    world.call_reclaim(held)
    assert world.linger_claim(claim) == {"status": "requires_action"}
    assert (world.settle(held) or {})["lingering"] is True
    assert world.linger_claim(claim)["status"] == "running"


def test_given_a_leg_that_lingered_when_another_leg_has_come_and_gone_then_it_may_not_claim(world: World) -> None:
    """The run is queued again: only the leg's own row says that its time is over."""
    claim = world.waiting(linger=timedelta(seconds=60))
    joined(world, claim)
    world.requeue(world.claim(claim.run))
    before = world.dump()
    assert world.linger_claim(claim) == {"status": "lost"}
    assert world.linger_end(claim) == {}
    assert world.dump() == before


def test_given_a_step_without_calls_then_nobody_lingers(world: World) -> None:
    claim = world.running()
    world.commit(claim, linger=LINGER)
    assert world.run(claim.run)["linger_until"] is None
