"""Cancel is a transition, not a flag: from any live status, in one transaction, and nothing happens afterwards."""

from __future__ import annotations

import pytest

from tests.protocol.rows import SECOND, Database, World, a_call, wait_until
from tests.protocol.test_claim import waits_for_a_lock

pytestmark = pytest.mark.django_db


def test_given_text_when_a_run_is_cancelled_then_it_is_kept_as_partial(world: World) -> None:
    claim = world.running()
    world.speak(claim, "hm", kind="reasoning.delta")
    world.speak(claim, "Half ", "a sent", first=2)
    world.cancel(claim.run)
    message = world.message(claim.message)
    kept = [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "Half a sent"}]
    assert (message["status"], message["content"]) == ("partial", kept)
    told = world.events(claim.run)[-3]
    assert (told["type"], told["payload"]["content"], told["payload"]["partial"]) == ("message.completed", kept, True)
    context = world.db.call(
        "longhaul_context_read", p_thread=message["thread_id"], p_run=claim.run, p_after=0, p_limit=9
    )
    assert [one[0] for one in context][-1] == str(claim.message)


def test_given_text_of_an_earlier_try_when_a_run_is_cancelled_then_only_the_last_is_kept(world: World) -> None:
    claim = world.running()
    world.speak(claim, "discarded")
    world.requeue(claim, "retry")
    claim = world.turn(world.claim(claim.run))
    world.speak(claim, "kept")
    world.cancel(claim.run)
    assert world.message(claim.message)["content"] == [{"type": "text", "text": "kept"}]


def test_given_no_text_when_a_run_is_cancelled_then_its_message_is_discarded(world: World) -> None:
    claim = world.running()
    world.speak(claim, '{"n"', kind="tool_call.arguments_delta")
    world.cancel(claim.run)
    assert world.message(claim.message)["status"] == "discarded"
    told = world.events(claim.run)[-3]
    assert (told["type"], told["payload"]["reason"]) == ("message.discarded", "cancelled")


@pytest.mark.parametrize("status", ["held", "queued", "running", "waiting", "requires_action"])
def test_given_any_live_run_when_it_is_cancelled_then_it_has_ended_with_a_higher_epoch(
    world: World, status: str
) -> None:
    run = world.in_status(status)
    before = world.run(run)
    answer = world.cancel(run) or {}
    after = world.run(run)
    assert answer["status"] == after["status"] == "cancelled"
    assert after["epoch"] == before["epoch"] + 1
    assert world.types(run)[-1] == "run.cancelled"


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_given_a_run_that_has_ended_when_it_is_cancelled_then_nothing_changes(world: World, status: str) -> None:
    run = world.in_status(status)
    before = world.dump()
    assert world.cancel(run) is None
    assert world.cancel(run, "failed", "deadline") is None
    assert world.dump() == before


def test_given_open_calls_when_a_run_is_cancelled_then_they_are_settled_and_answered_in_order(world: World) -> None:
    claim = world.waiting(a_call(0), a_call(1), a_call(2))
    done, running, requested = world.calls(claim.run)
    world.settle(world.call_claim(done), result=1)
    held = world.call_claim(running)
    world.cancel(claim.run)
    assert [world.tool_call(call)["outcome"] for call in (done, running, requested)] == [
        "success",
        "cancelled",
        "cancelled",
    ]
    assert [attempt["outcome"] for attempt in world.attempts(running)] == ["cancelled"]
    results = [one for one in world.messages(world.run(claim.run)["thread_id"]) if one["role"] == "tool"]
    assert [(one["content"][0]["tool_call"], one["content"][0]["outcome"]) for one in results] == [
        (str(done), "success"), (str(running), "cancelled"), (str(requested), "cancelled"),
    ]  # fmt: skip
    assert "run.queued" not in world.types(claim.run, after=claim.epoch + 3)
    # and the late result is refused
    before = world.dump()
    assert world.settle(held, result="late") is None
    assert world.retry(held) is None
    assert world.call_reclaim(held) is None
    assert world.try_call_claim(requested, 1, held.worker) is None
    assert world.dump() == before


def test_given_a_run_in_mid_fan_out_when_its_deadline_passes_then_it_joins_as_well(world: World) -> None:
    claim = world.waiting(a_call(0), a_call(1))
    world.cancel(claim.run, "failed", "deadline")
    results = [one for one in world.messages(world.run(claim.run)["thread_id"]) if one["role"] == "tool"]
    assert [one["content"][0]["outcome"] for one in results] == ["cancelled", "cancelled"]
    assert world.run(claim.run)["stop_reason"] == "deadline"


def test_given_a_call_that_failed_before_when_its_run_is_cancelled_then_its_answer_is_the_cancel(world: World) -> None:
    claim = world.waiting(a_call(max_attempts=3))
    world.retry(world.call_claim(*world.calls(claim.run)))
    world.cancel(claim.run)
    [call] = world.calls(claim.run)
    part = world.messages(world.run(claim.run)["thread_id"])[-1]["content"][0]
    assert (world.tool_call(call)["error"], part["outcome"], part.get("error")) == (None, "cancelled", None)


def test_given_a_lingering_leg_when_its_run_is_cancelled_then_the_leg_is_over(world: World) -> None:
    claim = world.waiting(linger=2 * SECOND)
    world.cancel(claim.run)
    [leg] = world.legs(claim.run)
    assert leg["reason"] == "cancelled"
    assert world.linger_claim(claim) == {"status": "lost"}
    before = world.dump()
    assert world.linger_end(claim) == {}
    assert world.dump() == before


@pytest.mark.parametrize("first", ["cancel", "commit"])
def test_given_a_step_that_commits_while_the_run_is_cancelled_then_whoever_is_first_wins(
    world: World, db_b: Database, first: str
) -> None:
    claim = world.running()
    world.speak(claim, "so far")
    other = World(db_b)
    with world.db.transaction():
        if first == "cancel":
            world.cancel(claim.run)
            late = db_b.in_background(other.try_commit, claim, [a_call()])
        else:
            world.commit(claim, [a_call()])
            late = db_b.in_background(other.cancel, claim.run)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    assert (late.result() is None) == (first == "cancel")
    run = world.run(claim.run)
    assert run["status"] == "cancelled"
    assert run["steps"] == (0 if first == "cancel" else 1)


def test_given_a_claim_while_the_run_is_cancelled_then_it_finds_no_row(world: World, db_b: Database) -> None:
    run, worker = world.start(), world.worker()
    other = World(db_b)
    with world.db.transaction():
        world.cancel(run)
        late = db_b.in_background(other.try_claim, run, worker, dispatch=1)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    assert late.result() is None


def test_given_a_settle_while_the_run_is_cancelled_then_it_is_refused(world: World, db_b: Database) -> None:
    claim = world.waiting()
    held = world.call_claim(*world.calls(claim.run))
    with world.db.transaction():
        world.cancel(claim.run)
        late = db_b.in_background(world.settle, held, result="late", db=db_b)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    assert late.result() is None
    assert world.tool_call(held.id)["result"] is None


def test_given_a_cancel_that_names_an_old_claim_then_the_claim_does_not_matter(world: World) -> None:
    """It is the run that is cancelled, whoever holds it now."""
    claim = world.running()
    world.reclaim(claim)
    newer = world.turn(world.claim(claim.run))
    world.cancel(claim.run)
    assert world.requeue(newer) is None


def test_given_a_joined_run_when_it_is_cancelled_then_its_calls_are_answered_once(world: World) -> None:
    claim = world.waiting(a_call(0), a_call(1))
    for call in world.calls(claim.run):
        world.settle(world.call_claim(call), result=1)
    assert world.run(claim.run)["status"] == "queued"
    world.cancel(claim.run)
    results = [one for one in world.messages(world.run(claim.run)["thread_id"]) if one["role"] == "tool"]
    assert [one["content"][0]["outcome"] for one in results] == ["success", "success"]
