"""How calls wait for their turn: the window of a queue, gates, fair order, and nobody stranded."""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from tests.protocol.rows import SECOND, Call, Database, Row, World, a_call, wait_until

pytestmark = pytest.mark.django_db

MINUTE = timedelta(minutes=1)


def gated(index: int = 0, key: str = "tool:refund", **bounds: float) -> Row:
    """A call with one gate."""
    return a_call(index, gates={key: bounds})


def ask(world: World, calls: list[Row], *, owner: str = "", priority: int = 0, window: int | None = None) -> list[UUID]:
    """A run that waits for these calls; they, in order."""
    claim = world.running()
    world.db.execute("UPDATE longhaul_runs_run SET priority = %s WHERE id = %s", priority, claim.run)
    answer = world.commit(claim, calls, window=window)
    there = world.calls(claim.run)
    parked = [call for call in there if world.tool_call(call)["turn"] is not None]
    assert (answer.get("parked"), answer.get("out")) == (
        (True, [str(call) for call in there if call not in parked]) if parked else (None, None)
    )
    if owner:  # as longhaul_step_commit says it of a run that has one; here is no row of a user
        for call in parked:
            world.db.execute("UPDATE longhaul_tools_toolcall SET turn_of = %s, turn = NULL WHERE id = %s", owner, call)
        for call in parked:
            world.db.execute("SELECT longhaul_call_park(%s, false)", call)
    return there


def let_out(db: Database, window: int = 32) -> list[UUID]:
    return [row["call_id"] for row in db.call_rows("longhaul_calls_release", p_window=window)]


def parked(world: World) -> set[UUID]:
    rows = world.db.rows("SELECT id FROM longhaul_tools_toolcall WHERE turn IS NOT NULL")
    return {row["id"] for row in rows}


def test_given_no_gates_and_room_then_a_step_sends_its_calls_and_nobody_waits(world: World) -> None:
    calls = ask(world, [a_call(i) for i in range(3)], window=3)
    assert parked(world) == set()
    assert all(world.tool_call(call)["publishes"] == 1 for call in calls)
    assert let_out(world.db) == []


def test_given_more_calls_than_room_then_the_rest_waits_and_goes_out_in_order(world: World) -> None:
    calls = ask(world, [a_call(i) for i in range(7)], window=3)
    assert parked(world) == set(calls[3:])
    assert let_out(world.db, window=3) == []
    held = world.call_claim(calls[0])
    assert let_out(world.db, window=3) == [calls[3]]
    world.settle(held)
    assert let_out(world.db, window=3) == []
    for call in calls[1:4]:
        world.settle(world.call_claim(call))
    assert let_out(world.db, window=3) == calls[4:7]
    assert parked(world) == set()


def test_given_some_wait_for_room_then_who_comes_later_waits_behind_them(world: World) -> None:
    first = ask(world, [a_call(i) for i in range(3)], window=2)
    world.settle(world.call_claim(first[0]))  # there is room again, and it is the third one's
    later = ask(world, [a_call()], window=2)
    assert parked(world) == {first[2], *later}
    assert let_out(world.db, window=2) == [first[2]]


def test_given_a_queue_of_its_own_then_its_room_is_its_own(world: World) -> None:
    ask(world, [a_call(i) for i in range(2)], window=2)
    ask(world, [a_call(0, queue="slow"), a_call(1, queue="slow"), a_call(2, queue="slow")], window=2)
    assert len(parked(world)) == 1
    [waits] = parked(world)
    world.settle(world.call_claim(world.calls(world.tool_call(waits)["run_id"])[0]))
    assert let_out(world.db, window=2) == [waits]


def test_given_half_of_the_window_is_out_then_a_claim_says_that_others_may_come(world: World) -> None:
    calls = ask(world, [a_call(i) for i in range(8)], window=4)
    told = []
    for call in calls[:4]:
        answer = world.try_call_claim(call, window=4)
        assert answer is not None
        told.append(answer.get("parked", False))
    assert told == [False, True, True, True]


def test_given_nobody_waits_then_no_answer_says_so(world: World) -> None:
    [call] = ask(world, [a_call(max_attempts=3)], window=4)
    answer = world.try_call_claim(call, worker=(worker := world.worker("tools@a")), window=4)
    assert answer is not None
    settled = world.settle(Call(call, 1, worker))
    assert settled is not None
    assert "parked" not in {*answer, *settled}


def test_given_a_gate_then_so_many_are_out_or_run_and_each_that_ends_makes_room(world: World) -> None:
    calls = ask(world, [gated(i, most=2) for i in range(5)])
    assert parked(world) == set(calls)
    assert let_out(world.db) == calls[:2]
    assert let_out(world.db) == []
    held = [world.call_claim(call) for call in calls[:2]]
    assert let_out(world.db) == []
    answer = world.settle(held[0])
    assert answer is not None
    assert answer["parked"] is True
    assert let_out(world.db) == [calls[2]]


def test_given_calls_of_other_runs_and_lanes_with_the_same_gate_then_they_count_together(world: World) -> None:
    both = {"tool:refund": {"most": 2}, "calls_of:7": {"most": 5}}
    first = ask(world, [gated(0, most=2)])
    second = ask(world, [a_call(0, gates=both), a_call(1, gates=both)])
    assert let_out(world.db) == [first[0], second[0]]
    world.settle(world.call_claim(first[0]))
    assert let_out(world.db) == [second[1]]


def test_given_two_gates_then_both_must_be_open(world: World) -> None:
    calls = ask(world, [a_call(i, gates={"tool:refund": {"most": 5}, "calls_of:7": {"most": 1}}) for i in range(3)])
    assert let_out(world.db) == calls[:1]


def test_given_a_lane_that_is_shut_then_the_others_go_on(world: World) -> None:
    shut = ask(world, [gated(i, most=1) for i in range(3)])
    other = ask(world, [gated(i, key="tool:mail", most=3) for i in range(3)])
    assert set(let_out(world.db)) == {shut[0], *other}
    assert ask(world, [a_call()], window=32)
    assert parked(world) == set(shut[1:])


@pytest.mark.parametrize("end", ["retry", "unknown", "cancel", "answer"])
def test_given_a_call_that_no_longer_runs_then_its_place_is_free(world: World, end: str) -> None:
    first = ask(world, [gated(0, most=1) | {"max_attempts": 3} | ({"idempotent": False} if end == "unknown" else {})])
    second = ask(world, [gated(0, most=1)])
    assert let_out(world.db) == first
    held = world.call_claim(first[0])
    assert let_out(world.db) == []
    match end:
        case "retry":
            answer = world.retry(held, 10 * SECOND)
        case "unknown":
            answer = world.call_reclaim(held)
        case "cancel":
            world.cancel(world.tool_call(first[0])["run_id"])
            answer = {"parked": True}  # the watcher looks
        case _:
            answer = world.answer(first[0], "cancelled", among=["running"])
    assert answer is not None
    assert answer["parked"] is True
    assert let_out(world.db) == second


@pytest.mark.parametrize("way", ["retry", "reclaim", "release"])
def test_given_another_attempt_then_it_waits_for_the_gate_as_the_first_did(world: World, way: str) -> None:
    call = gated(0, most=1) | {"max_attempts": 3} | ({"idempotent": False} if way == "release" else {})
    [first], [second] = ask(world, [call]), ask(world, [gated(0, most=1)])
    assert let_out(world.db) == [first]
    held = world.call_claim(first)
    if way == "retry":
        world.retry(held)
        assert let_out(world.db) == [second]  # until its time has come the place is nobody's
        assert world.db.call_rows("longhaul_calls_due", p_limit=10, p_window=32) == []
    else:
        answer = world.call_reclaim(held)
        if way == "release":
            assert let_out(world.db) == [second]
            answer = world.db.call("longhaul_call_release", p_call=first, p_error={"code": "released"}, p_by="7")
        else:
            assert let_out(world.db) == [second]  # it was there before
        assert answer is not None
        assert answer["parked"] is True
        assert "publish_call" not in answer
    assert world.tool_call(first)["status"] == "retrying"
    assert parked(world) == {first}
    assert let_out(world.db) == []
    assert world.try_call_claim(first, attempt=2) is None  # a message of another time
    world.settle(world.call_claim(second))
    assert let_out(world.db) == [first]
    world.settle(world.call_claim(first))


def test_given_many_retries_due_at_once_then_no_more_than_the_window_go_out(world: World) -> None:
    calls = ask(world, [a_call(i, max_attempts=2) for i in range(6)])
    for call in calls:
        world.retry(world.call_claim(call), 5 * SECOND)
    world.ahead(6 * SECOND)
    out = [row["call_id"] for row in world.db.call_rows("longhaul_calls_due", p_limit=10, p_window=4)]
    assert len(out) == 4
    assert parked(world) == set(calls) - set(out)


def test_given_fewer_looked_at_than_due_then_none_passes_its_gate_unseen(world: World) -> None:
    calls = ask(world, [gated(i, most=3) | {"max_attempts": 2} for i in range(3)])
    assert let_out(world.db) == calls
    for call in calls:
        world.retry(world.call_claim(call))
    for _ in range(3):
        assert world.db.call_rows("longhaul_calls_due", p_limit=1, p_window=32) == []
    assert parked(world) == set(calls)


# --- rates


def test_given_a_rate_then_so_many_start_in_any_stretch_of_its_time(world: World) -> None:
    calls = ask(world, [gated(i, count=2, seconds=60) for i in range(5)])
    assert let_out(world.db) == calls[:2]
    world.settle(world.call_claim(calls[0]))
    assert let_out(world.db) == []  # one has begun, and one may any moment
    world.ahead(59 * SECOND)
    world.settle(world.call_claim(calls[1]))
    assert let_out(world.db) == []
    world.ahead(61 * SECOND)  # the first is out of the stretch, the second is not
    assert let_out(world.db) == [calls[2]]
    world.ahead(110 * SECOND)
    world.settle(world.call_claim(calls[2]))
    world.ahead(120 * SECOND)
    assert let_out(world.db) == [calls[3]]


def test_given_calls_sent_and_not_begun_then_they_count_against_the_rate(world: World) -> None:
    calls = ask(world, [gated(i, count=2, seconds=60) for i in range(4)])
    assert let_out(world.db) == calls[:2]
    world.ahead(10 * MINUTE)
    assert let_out(world.db) == []  # both may begin now


def test_given_an_attempt_that_is_lost_then_the_next_one_counts_against_the_rate(world: World) -> None:
    [call] = ask(world, [gated(0, count=1, seconds=60) | {"max_attempts": 3}])
    assert let_out(world.db) == [call]
    world.call_reclaim(world.call_claim(call))
    assert let_out(world.db) == []
    world.ahead(61 * SECOND)
    assert let_out(world.db) == [call]


def test_given_a_key_that_is_paused_then_nothing_of_it_starts_until_its_time(world: World) -> None:
    calls = ask(world, [gated(0, most=3)])
    world.db.execute(
        "INSERT INTO longhaul_tools_pause (key, until, reason) VALUES ('tool:refund', longhaul_now() + interval '1 min', '')"
    )
    assert let_out(world.db) == []
    world.ahead(61 * SECOND)
    assert let_out(world.db) == calls


def test_given_uses_whose_time_is_over_then_they_are_removed(world: World) -> None:
    calls = ask(world, [gated(i, count=3, seconds=1) for i in range(3)])
    for at, call in enumerate(calls):
        world.ahead(2 * at * SECOND)
        let_out(world.db)
        world.settle(world.call_claim(call))
    assert world.db.one("SELECT count(*) FROM longhaul_tools_rateuse") == 1


# --- fair order


def test_given_two_owners_then_they_take_turns_whoever_came_first(world: World) -> None:
    many = ask(world, [a_call(i) for i in range(10)], owner="a", window=0)
    few = ask(world, [a_call(i) for i in range(3)], owner="b", window=0)
    order = [call for _ in range(13) for call in _claimed(world, let_out(world.db, window=1))]
    assert order == [many[0], many[1], few[0], many[2], few[1], many[3], few[2], *many[4:]]


def test_given_an_owner_who_was_served_then_who_comes_later_does_not_overtake_for_that(world: World) -> None:
    many = ask(world, [a_call(i) for i in range(6)], owner="a", window=0)
    for _ in range(3):
        _claimed(world, let_out(world.db, window=1))
    few = ask(world, [a_call(i) for i in range(6)], owner="b", window=0)
    order = [call for _ in range(9) for call in _claimed(world, let_out(world.db, window=1))]
    places = [order.index(call) for call in few]
    assert order[0] == many[3]
    assert places[0] == 2
    assert places == sorted(places)


def test_given_lanes_of_one_queue_then_their_owners_take_turns_too(world: World) -> None:
    many = ask(world, [a_call(i, gates={"calls_of:a": {"most": 100}}) for i in range(6)], owner="a", window=0)
    for _ in range(2):
        _claimed(world, let_out(world.db, window=1))
    few = ask(world, [a_call(i, gates={"calls_of:b": {"most": 100}}) for i in range(2)], owner="b", window=0)
    order = [call for _ in range(6) for call in _claimed(world, let_out(world.db, window=1))]
    assert order == [many[2], many[3], few[0], many[4], few[1], many[5]]


@pytest.mark.parametrize("lane", ["the same", "another"])
def test_given_a_higher_priority_then_it_goes_first(world: World, lane: str) -> None:
    low = ask(world, [a_call()], window=0)
    high = ask(world, [a_call() if lane == "the same" else gated(most=3)], priority=5, window=0)
    assert let_out(world.db, window=1) == high
    assert world.tool_call(high[0])["priority"] == 5
    _claimed(world, high)
    assert let_out(world.db, window=1) == low


def _claimed(world: World, calls: list[UUID]) -> list[UUID]:
    for call in calls:
        world.settle(world.call_claim(call))
    return calls


# --- races


def test_given_a_release_that_is_not_committed_when_another_comes_then_it_lets_out_nothing(
    world: World, db_b: Database
) -> None:
    calls = ask(world, [gated(i, most=2) for i in range(3)])
    both = {"tool:refund": {"most": 2}, "calls_of:7": {"most": 5}}
    ask(world, [a_call(i, gates=both) for i in range(3)])  # another lane, whose calls nobody holds
    db_b.execute("SET lock_timeout = '2s'")
    with world.db.transaction():
        assert let_out(world.db) == calls[:2]
        assert let_out(db_b) == []
    assert let_out(db_b) == []  # and now it sees the two


def test_given_a_call_that_a_cancel_holds_when_released_then_it_is_left_and_nobody_waits(
    world: World, db_b: Database
) -> None:
    [first], [second] = ask(world, [gated(0, most=1)]), ask(world, [gated(0, most=1)])
    run = world.tool_call(first)["run_id"]
    db_b.execute("SET lock_timeout = '2s'")
    with world.db.transaction():
        world.cancel(run)
        assert let_out(db_b) == []  # it is the cancelled one's turn still, for who looks from outside
    assert let_out(db_b) == [second]
    assert world.tool_call(first)["turn"] is None


def test_given_a_release_under_way_when_its_run_is_cancelled_then_both_go_on(world: World, db_b: Database) -> None:
    calls = ask(world, [gated(i, most=2) for i in range(3)])
    run = world.tool_call(calls[0])["run_id"]
    with world.db.transaction():
        assert let_out(world.db) == calls[:2]
        cancel = db_b.in_background(db_b.call, "longhaul_run_cancel", p_run=run, p_status="cancelled",
                                    p_stop_reason="cancelled", p_error=None)  # fmt: skip
        wait_until(lambda: world.db.one("SELECT count(*) FROM pg_locks WHERE pid = %s AND NOT granted", db_b.pid()))
    assert cancel.result()["status"] == "cancelled"
    assert {world.tool_call(call)["status"] for call in calls} == {"settled"}
    assert parked(world) == set()


def test_given_a_claim_that_is_not_committed_when_released_then_its_place_is_counted(
    world: World, db_b: Database
) -> None:
    calls = ask(world, [gated(i, most=1, count=1, seconds=60) for i in range(2)])
    assert let_out(world.db) == calls[:1]
    with world.db.transaction():
        world.call_claim(calls[0])
        assert let_out(db_b) == []
    assert let_out(db_b) == []


def test_given_a_call_that_waits_for_its_turn_when_a_message_comes_then_it_is_not_claimed(world: World) -> None:
    [call] = ask(world, [gated(0, most=1)])
    assert world.try_call_claim(call, attempt=1) is None
    run = world.run(world.tool_call(call)["run_id"])
    assert run["last_seq"] == len(world.events(run["id"]))


# --- what it costs


def test_given_nobody_waits_then_nothing_of_the_gate_is_read(world: World) -> None:
    """What a step's commit, a claim and a settlement read of calls is their own; of rates and pauses nothing."""
    world.db.execute("SET enable_seqscan = off")
    counts: dict[str, int] = {}
    claim = world.running()
    worker = world.worker("tools@a")
    with world.db.transaction():
        before = _read(world.db)
        world.commit(claim, [a_call()], window=32)
        [call] = world.calls(claim.run)
        world.try_call_claim(call, 1, worker, window=32)
        world.settle(Call(call, 1, worker))
        counts = {table: count - before[table] for table, count in _read(world.db).items()}
    world.db.execute("RESET enable_seqscan")
    assert counts == {"longhaul_tools_rateuse": 0, "longhaul_tools_pause": 0}


def _read(db: Database) -> dict[str, int]:
    rows = db.rows(
        "SELECT relname, coalesce(idx_scan, 0) + seq_scan AS looks FROM pg_stat_xact_user_tables"
        " WHERE relname IN ('longhaul_tools_rateuse', 'longhaul_tools_pause')"
    )
    return {row["relname"]: row["looks"] for row in rows}


def test_given_a_thousand_that_wait_then_a_release_reads_as_many_as_it_lets_out(world: World) -> None:
    ask(world, [gated(i, most=3) for i in range(1000)])
    world.db.execute("ANALYZE longhaul_tools_toolcall")
    world.db.execute("DISCARD PLANS")
    world.db.execute("SET enable_seqscan = off")
    with world.db.transaction():
        [before] = _fetched(world.db)
        assert len(let_out(world.db)) == 3
        [after] = _fetched(world.db)
    world.db.execute("RESET enable_seqscan")
    assert after["scanned"] == before["scanned"]
    assert after["fetched"] - before["fetched"] < 60


def _fetched(db: Database) -> list[dict[str, Any]]:
    return db.rows(
        "SELECT coalesce(idx_tup_fetch, 0) AS fetched, seq_tup_read AS scanned FROM pg_stat_xact_user_tables"
        " WHERE relname = 'longhaul_tools_toolcall'"
    )


def test_given_any_order_of_events_then_the_longest_stretch_is_never_overdrawn(world: World) -> None:
    """A rate of 3 in 10 s, calls that are slow to begin: no 4 starts within 10 s."""
    ask(world, [gated(i, count=3, seconds=10) for i in range(9)])
    waiting: list[UUID] = []
    starts: list[float] = []
    for at in itertools.count():
        world.ahead(at * SECOND)
        waiting += let_out(world.db)
        if at % 4 == 3 and waiting:
            world.settle(world.call_claim(waiting.pop(0)))
            starts.append(at)
        if len(starts) == 9:
            break
    assert all(d - a >= 10 for a, d in zip(starts, starts[3:], strict=False))
