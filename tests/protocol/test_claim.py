"""Claim: one UPDATE by dispatch_seq, by a worker that is present. A doubled, late or early message matches no row."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.protocol.rows import PREPARE, SECOND, Database, World, a_call, wait_until
from threads.ids import new_id

pytestmark = pytest.mark.django_db

ABSENT = {
    "its beat is stale": {"silent_for": 7 * SECOND},
    "it was found gone": {"gone": True},
}


def test_given_a_queued_run_when_claimed_then_the_claim_is_its_row(world: World) -> None:
    run, worker, leg = world.start(), world.worker("agents@b"), new_id()
    answer = world.try_claim(run, worker, leg=leg)
    assert answer is not None
    row = world.run(run)
    assert (row["status"], row["epoch"], row["holder"], row["legs"]) == ("running", 1, worker, 1)
    assert row["next_publish_at"] is None
    assert timedelta(seconds=59) < row["leg_deadline"] - row["started_at"] <= PREPARE
    assert (answer["epoch"], answer["leg"], answer["steps"]) == (1, 1, 0)
    assert [one["id"] for one in world.legs(run)] == [leg]
    assert world.types(run) == ["run.queued", "run.started", "leg.started"]
    assert world.events(run)[2]["epoch"] == 1


def test_given_a_claimed_run_when_the_message_comes_doubled_then_no_row_matches(world: World) -> None:
    run = world.start()
    claim = world.claim(run)
    before = world.dump()
    assert world.try_claim(run, claim.worker, dispatch=1) is None
    assert world.dump() == before


def test_given_a_run_that_was_queued_anew_when_the_old_message_comes_then_no_row_matches(world: World) -> None:
    claim = world.claim(world.start())
    world.requeue(claim)
    before = world.dump()
    assert world.try_claim(claim.run, claim.worker, dispatch=1) is None
    assert world.dump() == before
    assert world.try_claim(claim.run, claim.worker, dispatch=2) is not None


def test_given_a_run_put_off_when_its_message_comes_early_then_no_row_matches(world: World) -> None:
    claim = world.claim(world.start())
    world.requeue(claim, "retry", delay=30 * SECOND)
    before = world.dump()
    assert world.try_claim(claim.run, claim.worker) is None
    assert world.dump() == before
    world.ahead(31 * SECOND)
    world.beat(claim.worker)
    assert world.try_claim(claim.run, claim.worker) is not None


@pytest.mark.parametrize("absence", ABSENT.values(), ids=ABSENT)
def test_given_a_worker_that_is_not_present_when_it_claims_then_it_is_refused(world: World, absence: Any) -> None:
    worker, run, lingering = world.worker(**absence), world.start(), world.waiting(linger=2 * SECOND)
    [call] = world.calls(lingering.run)
    before = world.dump()
    assert world.try_claim(run, worker) == {"absent": True}
    assert world.try_claim(run, new_id()) == {"absent": True}
    assert world.try_call_claim(call, worker=worker) == {"absent": True}
    assert world.dump() == before


def test_given_a_worker_that_woke_when_it_has_beaten_again_then_it_may_claim(world: World) -> None:
    worker, run = world.worker(silent_for=20 * SECOND), world.start()
    assert world.try_claim(run, worker) == {"absent": True}
    world.beat(worker)
    assert world.try_claim(run, worker) is not None


def test_given_a_second_leg_when_it_claims_then_the_run_is_not_started_twice(world: World) -> None:
    claim = world.running()
    world.requeue(claim)
    second = world.claim(claim.run)
    assert second.epoch == 2
    assert world.types(claim.run).count("run.started") == 1
    assert [leg["number"] for leg in world.legs(claim.run)] == [1, 2]


def test_given_two_workers_that_claim_at_once_then_one_of_them_gets_the_run(world: World, db_b: Database) -> None:
    run, a, b = world.start(), world.worker(), world.worker()
    other = World(db_b)
    with world.db.transaction():
        first = world.try_claim(run, a, dispatch=1)
        second = db_b.in_background(other.try_claim, run, b, dispatch=1)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    assert first is not None
    assert second.result() is None
    assert world.run(run)["holder"] == a


def test_given_two_workers_that_claim_a_call_at_once_then_one_of_them_gets_it(world: World, db_b: Database) -> None:
    claim = world.waiting(a_call())
    [call] = world.calls(claim.run)
    a, b = world.worker(), world.worker()
    other = World(db_b)
    with world.db.transaction():
        first = world.try_call_claim(call, 1, a)
        second = db_b.in_background(other.try_call_claim, call, 1, b)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    assert first is not None
    assert second.result() is None
    assert [attempt["worker_id"] for attempt in world.attempts(call)] == [a]
    assert world.types(claim.run).count("tool_call.started") == 1


def test_given_a_claim_of_a_call_that_waited_for_its_run_then_its_times_are_those_of_the_lock(
    world: World, db_b: Database
) -> None:
    claim = world.waiting(a_call())
    [call] = world.calls(claim.run)
    worker, other = world.worker(), World(db_b)
    told = {"p_run": claim.run, "p_type": "data", "p_payload": {"data": 1}}
    with world.db.transaction():
        world.db.call("longhaul_run_record", **told)
        late = db_b.in_background(other.try_call_claim, call, 1, worker)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
        world.db.call("longhaul_run_record", **told)
    assert late.result() is not None
    events = world.db.rows("SELECT type, at FROM longhaul_runs_event WHERE run_id = %s ORDER BY seq", claim.run)
    times = [event["at"] for event in events]
    assert (events[-1]["type"], times) == ("tool_call.started", sorted(times))
    [attempt] = world.attempts(call)
    assert attempt["started_at"] == world.tool_call(call)["claimed_at"] == times[-1]


def test_given_a_worker_that_goes_while_its_claim_of_a_call_waits_then_it_is_refused(
    world: World, db_b: Database
) -> None:
    claim = world.waiting(a_call())
    [call] = world.calls(claim.run)
    worker, other, before = world.worker(), World(db_b), world.types(claim.run)
    with world.db.transaction():
        world.db.call("longhaul_run_lock", p_run=claim.run)
        late = db_b.in_background(other.try_call_claim, call, 1, worker)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
        world.db.execute("UPDATE longhaul_tools_worker SET gone_at = longhaul_now() WHERE id = %s", worker)
    assert late.result() == {"absent": True}
    assert (world.tool_call(call)["status"], world.types(claim.run)) == ("requested", before)


def test_given_a_requested_call_when_claimed_then_the_attempt_is_a_row(world: World) -> None:
    claim = world.waiting(a_call(timeout_seconds=30, atomic=True, max_attempts=3))
    [call] = world.calls(claim.run)
    worker = world.worker("tools@a")
    answer = world.try_call_claim(call, 1, worker) or {}
    row = world.tool_call(call)
    [attempt] = world.attempts(call)
    assert (row["status"], row["holder"], row["next_publish_at"]) == ("running", worker, None)
    assert row["timeout_at"] == row["claimed_at"] + 30 * SECOND
    assert (attempt["worker_id"], attempt["backend_pid"], attempt["ended_at"]) == (worker, world.db.pid(), None)
    assert (answer["attempt_id"], answer["idempotency_key"]) == (str(attempt["id"]), str(call))
    assert world.types(claim.run)[-1] == "tool_call.started"


def test_given_a_run_with_a_deadline_when_its_call_is_claimed_then_the_call_ends_no_later(world: World) -> None:
    claim = world.waiting(a_call(timeout_seconds=300))
    world.db.execute(
        "UPDATE longhaul_runs_run SET deadline = longhaul_now() + %s WHERE id = %s", 10 * SECOND, claim.run
    )
    [call] = world.calls(claim.run)
    world.call_claim(call)
    assert world.tool_call(call)["timeout_at"] == world.run(claim.run)["deadline"]


def test_given_a_worker_that_runs_one_call_at_a_time_when_one_names_it_still_then_it_is_told(world: World) -> None:
    claim = world.waiting(a_call(0), a_call(1))
    first, second = world.calls(claim.run)
    worker = world.worker("tools@a")
    world.call_claim(first, worker)
    before = world.dump()
    assert world.try_call_claim(second, 1, worker, alone=True) == {"orphans": [[str(first), 1]]}
    assert world.dump() == before
    assert "call" in (world.try_call_claim(second, 1, worker, alone=False) or {})


def test_given_a_message_of_an_earlier_attempt_or_of_a_deleted_run_then_no_row_matches(world: World) -> None:
    claim = world.waiting(a_call(max_attempts=3))
    [call] = world.calls(claim.run)
    world.retry(world.call_claim(call))
    before = world.dump()
    assert world.try_call_claim(call, 1, world.worker()) is None
    assert world.try_call_claim(new_id(), 1, world.worker()) is None
    assert {table: rows for table, rows in world.dump().items() if "worker" not in table} == {
        table: rows for table, rows in before.items() if "worker" not in table
    }


def waits_for_a_lock(db: Database, other: Database) -> bool:
    waits: bool = db.one("SELECT cardinality(pg_blocking_pids(%s)) > 0", other.pid())
    return waits
