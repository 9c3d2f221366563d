"""Settle exactly once, under attempt, holder and status; the last settlement joins, in call order, exactly once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.protocol.rows import SECOND, Call, Database, World, a_call, wait_until
from tests.protocol.test_claim import waits_for_a_lock

pytestmark = pytest.mark.django_db


def tool_messages(world: World, run: object) -> list[tuple[str, str, object]]:
    """(call, outcome, result) of each tool message of the thread, by place."""
    rows = world.messages(world.run(run)["thread_id"])  # type: ignore[arg-type]
    parts = [one["content"][0] for one in rows if one["role"] == "tool"]
    return [(part["tool_call"], part["outcome"], part["result"]) for part in parts]


# --- settle


def test_given_a_running_call_when_settled_then_its_attempt_is_closed_and_the_log_says_so(world: World) -> None:
    claim = world.waiting()
    held = world.call_claim(*world.calls(claim.run))
    answer = world.settle(held, result={"n": None})
    row = world.tool_call(held.id)
    [attempt] = world.attempts(held.id)
    assert (row["status"], row["outcome"], row["result"], row["holder"]) == ("settled", "success", {"n": None}, None)
    assert (attempt["outcome"], attempt["ended_at"]) == ("success", row["settled_at"])
    assert answer == {"run": str(claim.run), "status": "queued", "dispatch_seq": 2, "lingering": False, "agent": "echo"}
    settled = world.events(claim.run)[-3]
    assert (settled["type"], settled["payload"]["result"], settled["epoch"]) == ("tool_call.settled", {"n": None}, None)


def test_given_a_settlement_whose_answer_was_lost_when_it_is_repeated_then_it_says_already(world: World) -> None:
    claim = world.waiting(a_call(0), a_call(1))
    first, _ = world.calls(claim.run)
    held = world.call_claim(first)
    world.settle(held, result=1)
    before = world.dump()
    assert world.settle(held, result=1) == {"already": True}
    assert world.dump() == before


def test_given_a_run_that_has_gone_on_when_the_settlement_is_repeated_then_it_says_already(world: World) -> None:
    claim = world.waiting()
    held = world.call_claim(*world.calls(claim.run))
    world.settle(held, result=1)
    for go_on in (lambda: world.turn(world.claim(claim.run)), lambda: world.cancel(claim.run)):
        go_on()
        before = world.dump()
        assert world.settle(held, result=1) == {"already": True}
        assert world.dump() == before


def taken_over(world: World, held: Call) -> Call:
    world.call_reclaim(held)
    world.call_claim(held.id)
    return held


STALE: dict[str, Callable[[World, Call], Call]] = {
    "an attempt that was reclaimed and begun anew": taken_over,
    "an attempt that is not there yet": lambda world, held: replace(held, attempt=held.attempt + 1),
    "another holder": lambda world, held: replace(held, worker=world.worker("tools@b")),
}


@pytest.mark.parametrize("stale", STALE.values(), ids=STALE)
def test_given_a_claim_that_does_not_match_when_it_settles_then_nothing_changes(
    world: World, stale: Callable[[World, Call], Call]
) -> None:
    claim = world.waiting(a_call(max_attempts=3))
    wrong = stale(world, world.call_claim(*world.calls(claim.run)))
    before = world.dump()
    assert world.settle(wrong, result="late") is None
    assert world.settle(wrong, "failed") is None
    assert world.retry(wrong) is None
    assert world.dump() == before


def test_given_an_unknown_call_when_its_late_result_comes_then_it_settles_it(world: World) -> None:
    claim = world.waiting(a_call(idempotent=False))
    held = world.call_claim(*world.calls(claim.run))
    world.call_reclaim(held)
    assert world.run(claim.run)["status"] == "requires_action"
    answer = world.settle(held, result="after all") or {}
    assert answer["status"] == "queued"
    assert [attempt["outcome"] for attempt in world.attempts(held.id)] == ["success"]
    assert tool_messages(world, claim.run) == [(str(held.id), "success", "after all")]
    before = world.dump()
    assert world.settle(held, result="after all") == {"already": True}
    assert world.dump() == before


def test_given_a_failure_when_its_policy_grants_another_attempt_then_the_call_is_put_off(world: World) -> None:
    claim = world.waiting(a_call(max_attempts=3))
    held = world.call_claim(*world.calls(claim.run))
    answer = world.retry(held, 5 * SECOND) or {}
    row = world.tool_call(held.id)
    assert (row["status"], row["attempt"], row["holder"], row["timeout_at"]) == ("retrying", 2, None, None)
    assert row["not_before"] == row["next_publish_at"]
    assert (answer["status"], answer["attempt"], answer["call"]) == ("waiting", 2, str(held.id))
    [attempt] = world.attempts(held.id)
    assert (attempt["outcome"], attempt["ended_at"] is not None) == ("retrying", True)
    before = world.dump()
    assert world.try_call_claim(held.id, 2, held.worker) is None, "not due yet"
    assert world.dump() == before, "and the log does not speak of it"
    assert world.retry(held) is None, "a repeated answer"
    assert world.dump() == before
    world.ahead(6 * SECOND)
    world.beat(held.worker)
    assert world.try_call_claim(held.id, 2, held.worker)


# --- the join


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_given_calls_settled_in_any_order_then_the_last_joins_them_in_call_order(
    world: World, order: tuple[int, ...]
) -> None:
    claim = world.waiting(*(a_call(i) for i in range(3)))
    held = [world.call_claim(call) for call in world.calls(claim.run)]
    for place in order[:-1]:
        answer = world.settle(held[place], result=place)
        assert answer == {"run": str(claim.run), "status": "waiting", "agent": "echo"}
        assert tool_messages(world, claim.run) == []
    answer = world.settle(held[order[-1]], result=order[-1]) or {}
    assert (answer["status"], answer["dispatch_seq"]) == ("queued", 2)
    assert tool_messages(world, claim.run) == [(str(one.id), "success", i) for i, one in enumerate(held)]
    assert world.types(claim.run)[-4:] == ["message.completed"] * 3 + ["run.queued"]
    told = world.events(claim.run)[-4:-1]
    assert [event["payload"]["content"][0]["tool_call"] for event in told] == [str(one.id) for one in held]


def test_given_calls_of_which_some_fail_then_their_siblings_go_on_and_all_are_answered_in_call_order(
    world: World,
) -> None:
    ends = ["failed", "success", "retried", "cancelled", "success", "lost"]
    claim = world.waiting(*(a_call(index, max_attempts=3) for index in range(len(ends))))
    calls = world.calls(claim.run)
    held = {call: world.call_claim(call) for call in calls}
    for place in (3, 0, 5, 2, 4, 1):
        call, end = calls[place], ends[place]
        siblings = {each: world.tool_call(each) for each in calls if each != call}
        if end == "cancelled":
            world.answer(call, "cancelled", among=["running"])
        else:
            if end == "retried":
                world.retry(held[call])
            elif end == "lost":
                world.call_reclaim(held[call])
            if end in ("retried", "lost"):
                assert world.run(claim.run)["status"] == "waiting"
                held[call] = world.call_claim(call)
            world.settle(held[call], "failed" if end == "failed" else "success", None if end == "failed" else place)
        assert {each: world.tool_call(each) for each in siblings} == siblings
    assert tool_messages(world, claim.run) == [
        (str(call), end if end in ("failed", "cancelled") else "success", None if end in ("failed", "cancelled") else n)
        for n, (call, end) in enumerate(zip(calls, ends, strict=True))
    ]
    assert world.run(claim.run)["status"] == "queued"


def test_given_two_last_settlements_at_once_then_exactly_one_of_them_joins(world: World, db_b: Database) -> None:
    """Under READ COMMITTED the second must not look at its siblings with a snapshot from before the lock."""
    claim = world.waiting(a_call(0), a_call(1))
    one, two = (world.call_claim(call) for call in world.calls(claim.run))
    with world.db.transaction():
        first = world.settle(one, result=1) or {}
        late = db_b.in_background(world.settle, two, result=2, db=db_b)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
        assert not late.is_done()
    assert first["status"] == "waiting"
    assert late.result()["status"] == "queued"
    assert tool_messages(world, claim.run) == [(str(one.id), "success", 1), (str(two.id), "success", 2)]
    assert world.run(claim.run)["dispatch_seq"] == 2


def test_given_the_first_settlement_rolls_back_when_the_second_settles_then_the_run_waits_on(
    world: World, db_b: Database
) -> None:
    claim = world.waiting(a_call(0), a_call(1))
    one, two = (world.call_claim(call) for call in world.calls(claim.run))
    with world.db.transaction(force_rollback=True):
        world.settle(one, result=1)
        late = db_b.in_background(world.settle, two, result=2, db=db_b)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    assert late.result()["status"] == "waiting"
    assert (world.settle(one, result=1) or {})["status"] == "queued"


def test_given_a_second_step_then_its_join_leaves_the_first_alone(world: World) -> None:
    claim = world.waiting(a_call(0), a_call(1))
    for call in world.calls(claim.run):
        world.settle(world.call_claim(call), result="one")
    claim = world.turn(world.claim(claim.run))
    world.commit(claim, [a_call(0)])
    world.settle(world.call_claim(world.calls(claim.run)[-1]), "failed")
    assert [(outcome, result) for _, outcome, result in tool_messages(world, claim.run)] == [
        ("success", "one"), ("success", "one"), ("failed", None),
    ]  # fmt: skip
    assert world.messages(world.run(claim.run)["thread_id"])[-1]["content"][0]["error"] == {"code": "exception"}


# --- waiting <-> requires_action is a function of the open calls


def test_given_one_call_waits_for_a_person_when_the_others_are_settled_then_the_run_requires_action(
    world: World,
) -> None:
    claim = world.waiting(a_call(0, idempotent=False), a_call(1))
    lost, plain = (world.call_claim(call) for call in world.calls(claim.run))
    assert (world.call_reclaim(lost) or {})["status"] == "waiting"
    assert (world.settle(plain) or {})["status"] == "requires_action"
    assert (world.settle(lost) or {})["status"] == "queued"


def test_given_all_open_calls_wait_for_a_person_then_the_log_says_so_once(world: World) -> None:
    claim = world.waiting(a_call(0, idempotent=False), a_call(1, idempotent=False))
    one, two = (world.call_claim(call) for call in world.calls(claim.run))
    last = world.run(claim.run)["last_seq"]
    world.call_reclaim(one)
    assert world.types(claim.run, last) == ["tool_call.unknown"]
    world.call_reclaim(two)
    assert world.types(claim.run, last) == ["tool_call.unknown", "tool_call.unknown", "run.requires_action"]
    assert world.events(claim.run)[-1]["payload"] == {"tool_calls": [str(one.id), str(two.id)]}
    assert (world.settle(one) or {})["status"] == "requires_action"
    assert (world.settle(two) or {})["status"] == "queued"


@pytest.mark.parametrize("person", ["awaiting_approval", "awaiting_result", "unknown"])
@pytest.mark.parametrize("machine", ["requested", "running", "retrying", "awaiting_child"])
def test_given_each_mix_of_open_calls_then_the_status_follows_from_them(
    world: World, person: str, machine: str
) -> None:
    claim = world.waiting(a_call(0), a_call(1))
    first, second = world.calls(claim.run)

    def put(call: object, status: str) -> str:
        """By hand, then what every change of a call's status ends in."""
        world.db.execute(
            "UPDATE longhaul_tools_toolcall SET status = %s, holder = CASE WHEN %s THEN id END,"
            " next_publish_at = longhaul_now() WHERE id = %s",
            status, status == "running", call,
        )  # fmt: skip
        answer = world.db.call("longhaul_calls_changed", p_run=claim.run)
        assert answer["status"] == world.run(claim.run)["status"]
        return str(answer["status"])

    assert put(first, person) == "waiting"
    assert put(second, person) == "requires_action"
    assert put(first, machine) == "waiting"
    world.cancel(claim.run)
