"""One batch of deltas of many runs: it waits for nobody, and says for each run what became of its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.protocol.rows import Claim, Database, World, delta_arguments, wait_until
from tests.protocol.test_claim import waits_for_a_lock
from threads.ids import new_id

pytestmark = pytest.mark.django_db


def speaking(world: World, count: int) -> list[Claim]:
    """Runs of one worker, each with a pending message."""
    worker = world.worker()
    return [world.turn(world.claim(world.start(), worker)) for _ in range(count)]


def texts(world: World, claim: Claim) -> list[tuple[str, int]]:
    return [
        (event["payload"]["text"], event["ordinal"])
        for event in world.events(claim.run)
        if event["type"] == "text.delta"
    ]


def states(rows: list[dict[str, Any]]) -> dict[Any, str]:
    return {row["run_id"]: row["state"] for row in rows}


def test_given_many_runs_in_one_batch_then_each_has_its_rows_in_order_with_their_ordinals(world: World) -> None:
    claims = speaking(world, 5)
    batch = [(claim, f"{place}", place) for place in range(1, 4) for claim in claims]
    rows = world.write_deltas(claims[0].worker, batch)
    assert states(rows) == {claim.run: "written" for claim in claims}
    for claim in claims:
        assert texts(world, claim) == [("1", 1), ("2", 2), ("3", 3)]
        deltas = world.events(claim.run, after=4)
        assert [delta["seq"] for delta in deltas] == [5, 6, 7]
        assert {(delta["epoch"], delta["message_id"]) for delta in deltas} == {(claim.epoch, claim.message)}
        assert world.run(claim.run)["last_seq"] == 7


def test_given_one_run_that_is_locked_when_a_batch_is_written_then_it_is_busy_and_the_others_are_written(
    world: World, db_b: Database
) -> None:
    claims = speaking(world, 3)
    batch = [(claim, "a", 1) for claim in claims]
    with db_b.transaction():
        db_b.call("longhaul_run_lock", p_run=claims[1].run)
        world.db.execute("SET lock_timeout = '2s'")
        rows = world.write_deltas(claims[0].worker, batch)
        world.db.execute("RESET lock_timeout")
    assert [states(rows)[claim.run] for claim in claims] == ["written", "busy", "written"]
    assert [texts(world, claim) for claim in claims] == [[("a", 1)], [], [("a", 1)]]
    # the next round takes it
    rows = world.write_deltas(claims[0].worker, [(claims[1], "a", 1), (claims[1], "b", 2)])
    assert states(rows) == {claims[1].run: "written"}
    assert texts(world, claims[1]) == [("a", 1), ("b", 2)]


def test_given_lost_fences_in_a_batch_then_they_are_told_and_the_others_are_written(world: World) -> None:
    kept, cancelled, reclaimed, over, deleted = claims = speaking(world, 5)
    world.cancel(cancelled.run)
    world.reclaim(reclaimed)
    world.end(over)
    thread = world.run(deleted.run)["thread_id"]
    for table, column in (
        ("runs_event", "run_id"), ("runs_leg", "run_id"), ("threads_message", "run_id"), ("runs_run", "id"),
    ):  # fmt: skip
        world.db.execute(f"DELETE FROM longhaul_{table} WHERE {column} = %s", deleted.run)
    before = {claim.run: world.types(claim.run) for claim in claims[1:]}
    rows = world.write_deltas(kept.worker, [(claim, "late", 1) for claim in claims])
    assert [states(rows)[claim.run] for claim in claims] == ["written", "lost", "lost", "lost", "lost"]
    assert {claim.run: world.types(claim.run) for claim in claims[1:]} == before
    assert thread


def test_given_one_process_with_an_old_and_a_new_claim_of_a_run_then_only_the_new_one_writes(world: World) -> None:
    [old] = speaking(world, 1)
    world.reclaim(old)
    new = world.turn(world.claim(old.run, old.worker))
    rows = world.write_deltas(old.worker, [(old, "old", 5), (new, "new", 1)])
    assert {row["epoch"]: row["state"] for row in rows} == {old.epoch: "lost", new.epoch: "written"}
    assert texts(world, new) == [("new", 1)]


def test_given_nothing_but_lost_or_busy_runs_then_nothing_is_written(world: World, db_b: Database) -> None:
    lost, busy = speaking(world, 2)
    world.cancel(lost.run)
    before = world.dump()
    with db_b.transaction():
        db_b.call("longhaul_run_lock", p_run=busy.run)
        rows = world.write_deltas(lost.worker, [(lost, "a", 1), (busy, "a", 1)])
    assert states(rows) == {lost.run: "lost", busy.run: "busy"}
    assert world.dump() == before


def test_given_a_batch_in_flight_when_a_step_commits_then_the_commit_waits_and_comes_after_it(
    world: World, db_b: Database
) -> None:
    [claim] = speaking(world, 1)
    other = World(db_b)
    with world.db.transaction():
        world.write_deltas(claim.worker, [(claim, "a", 1)])
        late = db_b.in_background(other.end, claim)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    late.result()
    assert world.types(claim.run)[-4:] == ["text.delta", "message.completed", "leg.ended", "run.completed"]


def test_given_a_lost_answer_when_the_batch_is_sent_again_then_nothing_is_there_twice(world: World) -> None:
    [claim] = speaking(world, 1)
    batch = [(claim, "a", 3), (claim, "b", 7)]
    world.write_deltas(claim.worker, batch)
    again = world.write_deltas(claim.worker, [*batch, (claim, "c", 8)])
    assert states(again) == {claim.run: "written"}
    rows = world.db.rows("SELECT ordinal FROM longhaul_runs_event WHERE message_id = %s AND ordinal > 0", claim.message)
    assert sorted(row["ordinal"] for row in rows) == [3, 7, 8]


def test_given_two_batches_in_opposite_orders_and_cancels_at_once_then_nobody_deadlocks(
    world: World, db_b: Database, database_url: str
) -> None:
    claims = speaking(world, 8)
    worker = claims[0].worker
    rounds = 30
    forth = [delta_arguments(worker, [(claim, "x", 2 * n + 1) for claim in claims]) for n in range(rounds)]
    back = [delta_arguments(worker, [(claim, "y", 2 * n + 2) for claim in reversed(claims)]) for n in range(rounds)]
    third = Database(database_url)

    def write(db: Database, batches: list[dict[str, Any]]) -> int:
        rows = [row for batch in batches for row in db.call_rows("longhaul_deltas_write", **batch)]
        return sum(row["state"] == "written" for row in rows)

    flushers = [db_b.in_background(write, db_b, back), world.db.in_background(write, world.db, forth)]
    for claim in claims[::3]:
        World(third).cancel(claim.run)
    written = sum(flusher.result() for flusher in flushers)
    third.connection.close()
    # What comes after a higher ordinal of its message is taken for a batch that was sent again.
    count = "SELECT count(*), count(DISTINCT (message_id, ordinal)) FROM longhaul_runs_event WHERE type = 'text.delta'"
    [row] = world.db.rows(f"SELECT c.a, c.b FROM ({count}) AS c(a, b)")
    assert 0 < row["a"] == row["b"] <= written


def test_given_a_batch_that_holds_its_runs_when_another_comes_then_it_goes_on_with_the_rest_at_once(
    world: World, db_b: Database
) -> None:
    claims = speaking(world, 3)
    with world.db.transaction():
        world.write_deltas(claims[0].worker, [(claim, "a", 1) for claim in claims[:2]])
        db_b.execute("SET lock_timeout = '2s'")
        rows = world.write_deltas(claims[0].worker, [(claim, "b", 2) for claim in reversed(claims)], db=db_b)
    assert [states(rows)[claim.run] for claim in claims] == ["busy", "busy", "written"]


def test_given_rows_of_other_messages_in_a_batch_then_the_seq_counts_only_what_was_written(world: World) -> None:
    [claim] = speaking(world, 1)
    others = [replace(claim, message=new_id()) for _ in range(6)]
    batch = [(each, "late", n) for each in others for n in range(1, 4)]
    rows = world.write_deltas(claim.worker, [*batch[:9], (claim, "now", 1), *batch[9:]])
    assert sorted(row["state"] for row in rows) == ["lost"] * 6 + ["written"]
    assert texts(world, claim) == [("now", 1)]
    assert world.run(claim.run)["last_seq"] == world.events(claim.run)[-1]["seq"]


def test_given_a_batch_without_an_answer_when_its_step_commits_then_the_commit_writes_only_what_is_not_there(
    world: World,
) -> None:
    claim = world.running()
    world.speak(claim, "one ", "two ")
    message = str(claim.message)
    texts = enumerate(["one ", "two ", "three"], 1)
    world.commit(claim, events=[["text.delta", n, {"message": message, "text": text}] for n, text in texts])
    deltas = [event for event in world.events(claim.run) if event["type"] == "text.delta"]
    assert [(delta["ordinal"], delta["payload"]["text"]) for delta in deltas] == [
        (1, "one "),
        (2, "two "),
        (3, "three"),
    ]
