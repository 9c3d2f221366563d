"""Events: seq is gap-free from 1 and in commit order, whoever writes."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.protocol.rows import SECOND, Call, Database, World, a_call, wait_until
from tests.protocol.test_claim import waits_for_a_lock

pytestmark = pytest.mark.django_db


def test_given_a_whole_run_then_its_log_is_gap_free_and_in_order(world: World) -> None:
    claim = world.running()
    world.speak(claim, "a", "b")
    world.commit(
        claim, [a_call(0), a_call(1)],
        events=[
            ["text.delta", 3, {"message": str(claim.message), "text": "c"}],
            ["tool_call.created", None, {"tool_call": "x"}],
        ],
    )  # fmt: skip
    for call in world.calls(claim.run):
        world.settle(world.call_claim(call))
    second = world.turn(world.claim(claim.run))
    world.end(second)
    assert world.types(claim.run) == [
        "run.queued", "run.started", "leg.started", "message.created", "text.delta", "text.delta", "text.delta",
        "tool_call.created", "message.completed", "run.waiting", "leg.ended",
        "tool_call.started", "tool_call.settled", "tool_call.started", "tool_call.settled",
        "message.completed", "message.completed", "run.queued",
        "leg.started", "message.created", "message.completed", "leg.ended", "run.completed",
    ]  # fmt: skip
    seqs = [event["seq"] for event in world.events(claim.run)]
    assert seqs == list(range(1, world.run(claim.run)["last_seq"] + 1))


def test_given_two_writers_at_once_then_the_second_gets_the_seq_after_the_first_commit(
    world: World, db_b: Database
) -> None:
    claim = world.waiting(a_call(0), a_call(1))
    one, two = (world.call_claim(call) for call in world.calls(claim.run))
    start = world.run(claim.run)["last_seq"]
    with world.db.transaction():
        world.settle(one)
        late = db_b.in_background(world.settle, two, db=db_b)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    late.result()
    settled = [event for event in world.events(claim.run, start) if event["type"] == "tool_call.settled"]
    assert [event["payload"]["tool_call"] for event in settled] == [str(one.id), str(two.id)]
    assert settled[0]["seq"] == start + 1
    assert settled[0]["at"] < settled[1]["at"]


def test_given_a_writer_that_rolls_back_when_the_next_writes_then_no_seq_is_missing(
    world: World, db_b: Database
) -> None:
    claim = world.waiting(a_call(0), a_call(1))
    one, two = (world.call_claim(call) for call in world.calls(claim.run))
    start = world.run(claim.run)["last_seq"]
    with world.db.transaction(force_rollback=True):
        world.settle(one)
        late = db_b.in_background(world.settle, two, db=db_b)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    late.result()
    [settled] = world.events(claim.run, start)
    assert (settled["seq"], settled["payload"]["tool_call"]) == (start + 1, str(two.id))


def test_given_many_writers_of_one_run_on_two_connections_then_the_log_is_gap_free(
    world: World, db_b: Database
) -> None:
    claim = world.waiting(*(a_call(i, max_attempts=9) for i in range(12)))
    other = World(db_b)
    workers = world.worker("tools@a"), world.worker("tools@b")
    calls = world.calls(claim.run)

    def work(here: World, mine: int) -> None:
        for call in calls[mine::2]:
            held: Call = here.call_claim(call, workers[mine])
            here.retry(held)
            here.settle(here.call_claim(call, workers[mine]))

    late = db_b.in_background(work, other, 1)
    work(world, 0)
    late.result()
    events = world.events(claim.run)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert world.types(claim.run).count("run.queued") == 2
    results = [one for one in world.messages(world.run(claim.run)["thread_id"]) if one["role"] == "tool"]
    assert [one["content"][0]["tool_call"] for one in results] == [str(call) for call in calls]


def test_time_is_the_databases_and_the_clock_row_moves_it(world: World) -> None:
    def lag() -> timedelta:
        value: timedelta = world.db.one("SELECT longhaul_now() - clock_timestamp()")
        return value

    assert abs(lag()) < SECOND
    world.ahead(timedelta(hours=3))
    assert abs(lag() - timedelta(hours=3)) < SECOND
    run = world.start()
    [event] = world.events(run)
    assert event["at"] - world.db.one("SELECT clock_timestamp()") > timedelta(hours=2)


def test_longhaul_now_moves_on_inside_a_transaction(world: World) -> None:
    with world.db.transaction():
        assert world.db.one("SELECT longhaul_now()") < world.db.one("SELECT longhaul_now()")


def test_longhaul_uuid7_is_one(world: World) -> None:
    ids = [world.db.one("SELECT longhaul_uuid7()") for _ in range(50)]
    assert {(one.int >> 76 & 15, one.int >> 62 & 3) for one in ids} == {(7, 2)}
    assert len(set(ids)) == 50
    millis = int(world.db.one("SELECT extract(epoch FROM clock_timestamp()) * 1000"))
    assert abs((ids[-1].int >> 80) - millis) < 10_000


def test_given_two_calls_of_a_run_that_are_claimed_at_once_then_each_has_a_seq_of_its_own(
    world: World, db_b: Database
) -> None:
    claim = world.waiting(a_call(0), a_call(1))
    one, two = world.calls(claim.run)
    start, worker = world.run(claim.run)["last_seq"], world.worker("tools@b")
    with world.db.transaction():
        world.call_claim(one)
        late = db_b.in_background(World(db_b).try_call_claim, two, 1, worker)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    assert late.result() is not None
    told = [(event["seq"], event["payload"]["tool_call"]) for event in world.events(claim.run, start)]
    assert told == [(start + 1, str(one)), (start + 2, str(two))]
