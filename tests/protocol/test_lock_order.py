"""Runs are locked before calls: whoever waits for a run has not locked its call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.protocol.rows import Background, Call, Claim, Database, World, a_call, wait_until
from tests.protocol.test_claim import waits_for_a_lock

pytestmark = pytest.mark.django_db

CALL_FUNCTIONS: dict[str, Callable[[World, Call], Any]] = {
    "settle": lambda world, held: world.settle(held),
    "retry": lambda world, held: world.retry(held),
    "reclaim": lambda world, held: world.call_reclaim(held),
    "answer": lambda world, held: world.answer(held.id, "cancelled", among=["running"]),
    "release": lambda world, held: world.release(held.id),
    "cancel of the run": lambda world, held: world.cancel(world.tool_call(held.id)["run_id"]),
}


@pytest.mark.parametrize("function", CALL_FUNCTIONS.values(), ids=CALL_FUNCTIONS)
def test_given_a_locked_run_when_a_call_is_changed_then_it_waits_without_the_calls_lock(
    world: World, db_b: Database, function: Callable[[World, Call], Any]
) -> None:
    claim = world.waiting(a_call(max_attempts=3))
    held = world.call_claim(*world.calls(claim.run))
    late = behind_the_runs_lock(world, db_b, claim, held.id, lambda: function(World(db_b), held))
    assert late.result() is not None


def test_given_a_locked_run_when_a_call_is_claimed_then_it_waits_without_the_calls_lock(
    world: World, db_b: Database
) -> None:
    claim = world.waiting()
    [call] = world.calls(claim.run)
    worker = world.worker("tools@a")
    late = behind_the_runs_lock(world, db_b, claim, call, lambda: World(db_b).try_call_claim(call, 1, worker))
    assert late.result() is not None


def behind_the_runs_lock(
    world: World, db_b: Database, claim: Claim, call: object, work: Callable[[], Any]
) -> Background:
    with world.db.transaction():
        world.db.call("longhaul_run_lock", p_run=claim.run)
        late = db_b.in_background(work)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
        # nobody has locked the call: NOWAIT would refuse
        world.db.rows("SELECT 1 FROM longhaul_tools_toolcall WHERE id = %s FOR UPDATE NOWAIT", call)
    return late


def test_given_a_run_that_ended_while_its_lock_was_waited_for_then_the_lock_says_so(
    world: World, db_b: Database
) -> None:
    claim = world.running()
    with world.db.transaction():
        world.end(claim)
        late = db_b.in_background(db_b.rows, "SELECT * FROM longhaul_run_lock(%s)", claim.run)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    assert set(late.result()[0].values()) == {None}


def test_given_a_live_run_when_it_is_locked_then_the_lock_holds_and_says_what_it_is(
    world: World, db_b: Database
) -> None:
    for status in ("held", "queued", "running", "waiting", "requires_action"):
        run = world.in_status(status)
        with world.db.transaction():
            [row] = world.db.rows("SELECT * FROM longhaul_run_lock(%s)", run)
            assert (row["thread_id"], row["agent"], row["owner"]) == (world.run(run)["thread_id"], "echo", None)
            with pytest.raises(psycopg.errors.LockNotAvailable):
                db_b.rows("SELECT 1 FROM longhaul_runs_run WHERE id = %s FOR NO KEY UPDATE NOWAIT", run)
            # events and legs refer to the run: their foreign keys must not wait for its writers
            db_b.rows("SELECT 1 FROM longhaul_runs_run WHERE id = %s FOR KEY SHARE NOWAIT", run)


def test_given_every_function_at_once_on_a_few_runs_then_nobody_deadlocks(world: World, db_b: Database) -> None:
    """Two sessions go through the same calls in opposite orders, with reclaims, sweeps, people's words and cancels between."""
    once = {"idempotent": False}
    claims = [world.waiting(*(a_call(i, max_attempts=50, **once if i % 2 else {}) for i in range(4))) for _ in range(3)]
    calls = [call for claim in claims for call in world.calls(claim.run)]
    released: list[Any] = []
    workers = world.worker("tools@a"), world.worker("tools@b")

    def work(db: Database, mine: list[Any], worker: Any) -> int:
        here, done = World(db), 0
        for call in mine * 3:
            db.call_rows("longhaul_calls_due", p_limit=3)
            answer = here.try_call_claim(call, worker=worker)
            if answer and "call" in answer:
                held = Call(call, answer["attempt"], worker)
                done += 1
                (here.retry if done % 2 else here.call_reclaim)(held)
            released.append(here.release(call))
            db.call_rows("longhaul_runs_due", p_limit=3)
        for call in mine[::3]:
            here.answer(call, "cancelled", among=["requested", "retrying", "running", "unknown"])
        for claim in claims if mine is calls else reversed(claims):
            here.cancel(claim.run)
        return done

    late = db_b.in_background(work, db_b, list(reversed(calls)), workers[1])
    assert work(world.db, calls, workers[0]) > 0
    late.result()
    assert any(answer and "publish_call" in answer for answer in released)
    assert {world.run(claim.run)["status"] for claim in claims} == {"cancelled"}
