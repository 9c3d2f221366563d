"""A person's word on a call: exactly once, under the run's lock, and only for a call that waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from tests.protocol.rows import Call, Database, World, a_call, wait_until
from tests.protocol.test_claim import waits_for_a_lock

pytestmark = pytest.mark.django_db

OPEN = ("requested", "awaiting_approval", "running", "retrying", "awaiting_result", "awaiting_child", "unknown")


def an_unknown_call(world: World) -> Call:
    claim = world.waiting(a_call(idempotent=False))
    held = world.call_claim(*world.calls(claim.run))
    world.call_reclaim(held)
    return held


def test_given_an_unknown_call_when_a_person_answers_then_it_is_settled_and_the_attempt_stays_lost(
    world: World,
) -> None:
    held = an_unknown_call(world)
    answer = world.answer(held.id, result={"sent": True}) or {}
    row = world.tool_call(held.id)
    assert (answer["status"], row["status"], row["outcome"], row["result"]) == (
        "queued",
        "settled",
        "success",
        {"sent": True},
    )
    assert [attempt["outcome"] for attempt in world.attempts(held.id)] == ["lost"]
    told = next(each for each in world.events(row["run_id"]) if each["type"] == "tool_call.settled")
    assert (told["payload"]["by"], told["payload"]["result"]) == ("7", {"sent": True})


@pytest.mark.parametrize("first", ["an answer", "its release", "the late result", "the end of its run"])
def test_given_a_call_that_somebody_settled_when_a_person_answers_then_nothing_changes(
    world: World, first: str
) -> None:
    held = an_unknown_call(world)
    match first:
        case "an answer":
            world.answer(held.id)
        case "its release":
            world.release(held.id)
            world.settle(world.call_claim(held.id))
        case "the late result":
            world.settle(held)
        case _:
            world.cancel(world.tool_call(held.id)["run_id"])
    before = world.dump()
    assert world.answer(held.id, "failed") is None
    assert world.answer(held.id, "cancelled", among=OPEN) is None
    assert world.release(held.id) is None
    assert world.dump() == before


@pytest.mark.parametrize("status", [status for status in OPEN if status != "unknown"])
def test_given_a_call_that_waits_for_no_answer_when_a_person_answers_then_it_is_refused_by_name(
    world: World, status: str
) -> None:
    call = world.call_in_status(status)
    before = world.dump()
    assert world.answer(call) == world.release(call) == {"refused": status}
    assert world.dump() == before
    world.cancel(world.tool_call(call)["run_id"])


def test_given_two_answers_at_once_then_one_of_them_counts(world: World, db_b: Database) -> None:
    held = an_unknown_call(world)
    with world.db.transaction():
        assert world.answer(held.id, result=1)
        late = db_b.in_background(World(db_b).answer, held.id, "failed")
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    assert late.result() is None
    assert world.tool_call(held.id)["outcome"] == "success"


SAID: dict[str, Callable[[World, Call], Any]] = {
    "answer": lambda world, held: world.answer(held.id),
    "release": lambda world, held: world.release(held.id),
    "late result": lambda world, held: world.settle(held),
    "cancel of the call": lambda world, held: world.answer(held.id, "cancelled", among=OPEN),
    "cancel of the run": lambda world, held: world.cancel(world.tool_call(held.id)["run_id"]),
}


@pytest.mark.parametrize(
    ("first", "second"),
    [(a, b) for a in SAID for b in SAID if "result" in a + b or "run" in a + b if a != b],
)
def test_given_an_unknown_call_when_two_things_happen_to_it_at_once_then_the_first_counts(
    world: World, db_b: Database, first: str, second: str
) -> None:
    held = an_unknown_call(world)
    run = world.tool_call(held.id)["run_id"]
    with world.db.transaction():
        assert SAID[first](world, held)
        said = world.tool_call(held.id)
        late = db_b.in_background(SAID[second], World(db_b), held)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    if second == "cancel of the run":  # which goes on after the first, and ends then
        assert (late.result() or {})["status"] == world.run(run)["status"] == "cancelled"
        assert world.tool_call(held.id)["outcome"] == (said["outcome"] or "cancelled")
    else:
        assert late.result() is None
        assert world.tool_call(held.id) == said


def test_given_a_released_call_when_the_originals_late_result_comes_then_it_changes_nothing(world: World) -> None:
    held = an_unknown_call(world)
    answer = world.release(held.id) or {}
    row = world.tool_call(held.id)
    assert (answer["status"], answer["publish_call"]) == ("waiting", [str(held.id), 2, 60, "", "tool_0"])
    assert (row["status"], row["attempt"], row["max_attempts"], row["publishes"]) == ("retrying", 2, 2, 1)
    before = world.dump()
    assert world.settle(held, result="late") is None
    assert world.dump() == before
    again = world.call_claim(held.id)
    assert world.settle(held, result="late") is None
    assert world.settle(again, result=2)
    assert [attempt["outcome"] for attempt in world.attempts(held.id)] == ["released", "success"]


def test_given_a_running_call_when_it_is_cancelled_then_its_attempt_is_closed_and_its_result_refused(
    world: World,
) -> None:
    claim = world.waiting(a_call(0), a_call(1))
    first, second = (world.call_claim(call) for call in world.calls(claim.run))
    assert (world.answer(first.id, "cancelled", among=OPEN) or {})["status"] == "waiting"
    before = world.dump()
    assert world.settle(first, result="late") is None
    assert world.retry(first) is None
    assert world.dump() == before
    [attempt] = world.attempts(first.id)
    assert (attempt["outcome"], attempt["ended_at"] is not None) == ("cancelled", True)
    assert (world.settle(second) or {})["status"] == "queued"


@pytest.mark.parametrize(("policy", "status"), [("tell_model", "queued"), ("fail", "failed")])
def test_given_a_tool_that_asks_nobody_when_its_worker_is_lost_then_it_is_settled_as_it_chose(
    world: World, policy: str, status: str
) -> None:
    claim = world.waiting(a_call(0, idempotent=False, on_unknown=policy))
    [call] = world.calls(claim.run)
    held = world.call_claim(call)
    answer = world.call_reclaim(held) or {}
    row, run = world.tool_call(call), world.run(claim.run)
    assert (answer["code"], answer["status"], run["status"]) == ("unknown_outcome", status, status)
    assert (row["outcome"], row["error"]["code"]) == ("failed", "unknown_outcome")
    assert run["stop_reason"] == ("tool_unknown" if status == "failed" else "")
    before = world.dump()
    assert world.settle(held, result="late") is None
    assert world.dump() == before


def test_given_a_call_that_fails_its_run_when_its_worker_is_lost_then_its_siblings_are_closed_and_the_held_run_goes_on(
    world: World,
) -> None:
    claim = world.waiting(a_call(0, idempotent=False, on_unknown="fail"), a_call(1))
    lost, sibling = (world.call_claim(call) for call in world.calls(claim.run))
    behind = world.start(world.run(claim.run)["thread_id"], status="held")
    answer = world.call_reclaim(lost) or {}
    assert UUID(answer["released"][0]) == behind
    assert world.tool_call(sibling.id)["outcome"] == "cancelled"
    assert world.settle(sibling) is None
    assert world.types(claim.run)[-1] == "run.failed"
