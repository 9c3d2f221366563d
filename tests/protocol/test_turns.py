"""How runs wait for their turn: the window, gates of agents and owners, fair order, and nobody stranded."""

from __future__ import annotations

import random
from collections import Counter
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from psycopg.types.json import Jsonb

from runs.gates import lane_of
from tests.protocol.rows import SECOND, Claim, Database, Row, World, a_call

pytestmark = pytest.mark.django_db

MINUTE = timedelta(minutes=1)
MANY = 1000  # a window that bounds nothing here


@pytest.fixture
def owners(world: World) -> Any:
    """Make rows of users by their names; they go with the runs."""
    made: list[int] = []

    def make(*names: str) -> list[int]:
        for name in names:
            made.append(
                world.db.one(
                    "INSERT INTO auth_user (username, password, first_name, last_name, email, is_superuser, is_staff, is_active,"
                    " date_joined) VALUES (%s, '', '', '', '', false, false, true, now()) RETURNING id",
                    name,
                )
            )
        return made[-len(names) :]

    yield make
    world.db.execute("UPDATE longhaul_runs_run SET owner_id = NULL WHERE owner_id = ANY (%s)", made)
    world.db.execute("DELETE FROM auth_user WHERE id = ANY (%s)", made)


def gate(key: str = "agent:echo", **bounds: float) -> dict[str, Any]:
    return {key: bounds}


def enter(
    world: World,
    gates: dict[str, Any] | None = None,
    *,
    owner: int | None = None,
    priority: int = 0,
    window: int = MANY,
    queue: str = "",
    thread: UUID | None = None,
    status: str = "queued",
) -> UUID:
    """A run with gates, as admission makes it: it goes out, or waits for its turn."""
    run = world.start(thread, status=status)
    world.db.execute(
        "UPDATE longhaul_runs_run SET owner_id = %s, priority = %s, gates = %s, lane = %s, max_dispatched = %s WHERE id = %s",
        owner, priority, None if gates is None else Jsonb(gates), lane_of(queue, gates), window, run,
    )  # fmt: skip
    world.db.call("longhaul_run_park", p_run=run)
    return run


def let_out(db: Database, window: int = MANY) -> list[UUID]:
    return [row["run_id"] for row in db.call_rows("longhaul_runs_release", p_window=window)]


def parked(world: World) -> set[UUID]:
    return {row["id"] for row in world.db.rows("SELECT id FROM longhaul_runs_run WHERE turn IS NOT NULL")}


def working(world: World, run: UUID, calls: int = 0, linger: timedelta | None = None) -> Claim:
    """Claim the run and take it through a turn; with calls, to where it waits for them."""
    claim = world.turn(world.claim(run))
    if calls:
        world.commit(claim, [a_call(index) for index in range(calls)], linger=linger)
    return claim


def settle(world: World, run: UUID) -> Row:
    """Settle the run's calls. Returns what the join says."""
    answers = [world.settle(world.call_claim(call)) for call in world.calls(run)]
    assert answers[-1] is not None
    return answers[-1]


# --- the window


def test_given_no_gates_and_room_then_a_run_goes_out_and_nobody_waits(world: World) -> None:
    run = enter(world, window=1)
    assert parked(world) == set()
    assert world.run(run)["publishes"] == 1
    assert let_out(world.db) == []


def test_given_as_many_out_as_may_be_then_a_run_waits_until_there_is_room_and_nobody_claims_it(world: World) -> None:
    first, second, third = (enter(world, window=2) for _ in range(3))
    assert parked(world) == {third}
    assert world.try_claim(third, world.worker()) is None
    assert let_out(world.db, window=2) == []
    answer = world.try_claim(first, world.worker())
    assert answer is not None
    assert answer["release"] is True
    assert let_out(world.db, window=2) == [third]
    assert world.run(third)["publishes"] == 1
    world.claim(second)
    world.claim(third)


def test_given_more_than_half_is_out_yet_then_a_claim_asks_for_no_release(world: World) -> None:
    runs = [enter(world, window=4) for _ in range(5)]
    told = [world.try_claim(run, world.worker()) for run in runs[:2]]
    assert [answer is not None and "release" in answer for answer in told] == [False, True]


def test_given_one_waits_then_who_comes_after_it_waits_too_though_there_is_room(world: World) -> None:
    first, second = enter(world, window=1), enter(world, window=1)
    world.claim(first)
    assert parked(world) == {second}
    third = enter(world, window=1)
    assert parked(world) == {second, third}
    assert let_out(world.db, window=1) == [second]


def test_given_a_queue_of_its_own_then_its_room_is_its_own(world: World) -> None:
    enter(world, window=1)
    other = enter(world, window=1, queue="gpu")
    assert parked(world) == set()
    waits = enter(world, window=1, queue="gpu")
    assert parked(world) == {waits}
    world.claim(other)
    assert let_out(world.db, window=1) == [waits]


def test_given_no_room_then_a_join_waits_and_one_inside_its_linger_does_not(world: World) -> None:
    late, early = enter(world, window=1), enter(world, window=1)
    claims = []
    for run, linger in ((late, None), (early, 60 * SECOND)):
        let_out(world.db, 1)
        claims.append(working(world, run, 1, linger))
    enter(world, window=1)  # the room is full
    answer = settle(world, late)
    assert (answer["status"], answer["dispatch_seq"]) == ("queued", None)
    assert parked(world) == {late}
    assert settle(world, early)["lingering"]
    assert parked(world) == {late}
    assert world.linger_claim(claims[1])["status"] == "running"


def test_given_no_room_then_a_held_run_waits_when_its_thread_is_free(world: World) -> None:
    thread = world.thread()
    first = enter(world, thread=thread)
    held = enter(world, thread=thread, window=1, status="held")
    claim = world.turn(world.claim(first))
    enter(world, window=1)
    answer = world.end(claim)
    assert "released" not in answer
    assert parked(world) == {held}
    assert world.run(held)["status"] == "queued"


def test_given_no_room_then_a_retry_that_is_due_waits_and_who_hands_over_does_not(world: World) -> None:
    tried, handed = enter(world, window=1), enter(world, window=1)
    put_off = world.claim(tried)
    let_out(world.db, 1)
    going = world.claim(handed)
    world.requeue(put_off, "retry", 5 * SECOND)
    assert parked(world) == set()
    world.requeue(going, "budget")
    world.ahead(6 * SECOND)
    due = [row["run_id"] for row in world.db.call_rows("longhaul_runs_due", p_limit=10)]
    assert due == [handed]
    assert parked(world) == {tried}
    world.beat(going.worker)
    world.claim(handed, going.worker)
    assert let_out(world.db, 1) == [tried]


def test_given_several_retries_that_are_due_at_once_then_no_more_go_out_than_have_room(world: World) -> None:
    runs = [enter(world) for _ in range(5)]
    world.db.execute("UPDATE longhaul_runs_run SET max_dispatched = 2")
    for run in runs:
        world.requeue(world.claim(run), "retry", SECOND)
    world.ahead(2 * SECOND)
    assert len(world.db.call_rows("longhaul_runs_due", p_limit=10)) == 2
    assert len(parked(world)) == 3


# --- so many at work


def test_given_so_many_at_work_then_the_next_waits_until_one_ends(world: World) -> None:
    runs = [enter(world, gate(most=2)) for _ in range(3)]
    assert parked(world) == set(runs)
    assert let_out(world.db) == runs[:2]
    assert let_out(world.db) == []
    claim = working(world, runs[0])
    assert let_out(world.db) == []
    assert world.end(claim)["release"] is True
    assert let_out(world.db) == [runs[2]]


@pytest.mark.parametrize("leaves", ["cancelled while out", "cancelled", "put off", "waiting"])
def test_given_one_at_work_leaves_then_its_slot_goes_to_the_next(world: World, leaves: str) -> None:
    first, second = enter(world, gate(most=1)), enter(world, gate(most=1))
    assert let_out(world.db) == [first]
    answer: Row | None
    if leaves == "cancelled while out":
        answer = world.cancel(first)
    else:
        claim = world.turn(world.claim(first))
        if leaves == "cancelled":
            answer = world.cancel(first)
        elif leaves == "put off":
            answer = world.requeue(claim, "retry", 60 * SECOND)
        else:
            answer = world.commit(claim, [a_call()])
    assert answer is not None
    assert answer["release"] is True
    assert let_out(world.db) == [second]


@pytest.mark.parametrize("keeps", ["budget", "lost", "lingering"])
def test_given_one_that_goes_on_then_it_keeps_its_slot(world: World, keeps: str) -> None:
    first = enter(world, gate(most=1))
    second = enter(world, gate(most=1))
    let_out(world.db)
    claim = world.turn(world.claim(first))
    if keeps == "budget":
        world.requeue(claim, "budget")
    elif keeps == "lost":
        world.reclaim(claim)
    else:
        world.commit(claim, [a_call()], linger=60 * SECOND)
    assert let_out(world.db) == []
    if keeps == "lingering":
        assert settle(world, first)["lingering"]
        assert let_out(world.db) == []
        assert world.linger_claim(claim)["status"] == "running"
    else:
        world.claim(first)
    assert parked(world) == {second}


def test_given_a_leg_that_gives_its_linger_up_then_its_slot_goes_on_and_the_join_waits(world: World) -> None:
    first, second = enter(world, gate(most=1)), enter(world, gate(most=1))
    let_out(world.db)
    claim = working(world, first, 1, 60 * SECOND)
    assert world.linger_end(claim)["release"] is True
    assert let_out(world.db) == [second]
    assert settle(world, first)["dispatch_seq"] is None
    assert parked(world) == {first}
    world.cancel(second)
    assert let_out(world.db) == [first]


def test_given_a_lingerer_that_died_then_its_slot_is_free_after_its_time(world: World) -> None:
    first, second = enter(world, gate(most=1)), enter(world, gate(most=1))
    let_out(world.db)
    claim = working(world, first, 1, 20 * SECOND)
    assert let_out(world.db) == []
    world.ahead(21 * SECOND)
    assert let_out(world.db) == [second]
    tools = world.worker("tools@b")
    world.settle(world.call_claim(world.calls(first)[0], tools))
    assert parked(world) == {first}
    # and should it live after all, it claims nothing
    world.beat(claim.worker)
    assert world.linger_claim(claim)["status"] == "waiting"
    world.linger_end(claim)
    assert world.run(first)["next_publish_at"] is None


def test_given_a_join_that_is_under_way_when_the_linger_is_over_then_it_keeps_its_slot(
    world: World, db_b: Database
) -> None:
    first, second = enter(world, gate(most=1)), enter(world, gate(most=1))
    let_out(world.db)
    working(world, first, 1, 20 * SECOND)
    held = world.call_claim(world.calls(first)[0])
    with world.db.transaction():
        world.settle(held)
        World(db_b).ahead(21 * SECOND)
        db_b.execute("SET lock_timeout = '2s'")
        assert let_out(db_b) == []  # it waits for nobody
    assert let_out(world.db) == []
    assert parked(world) == {second}


def test_given_two_releases_at_once_then_the_second_leaves_it_to_the_first(world: World, db_b: Database) -> None:
    runs = [enter(world, gate(most=2)) for _ in range(4)]
    beside = enter(world, gate(most=2) | gate("runs_of:1", most=9))  # of another lane, bounded by the same
    with world.db.transaction():
        assert let_out(world.db) == runs[:2]
        assert let_out(db_b) == []
    assert let_out(db_b) == []
    assert parked(world) == {*runs[2:], beside}


def test_given_a_run_that_is_being_cancelled_then_the_release_passes_it_by(world: World, db_b: Database) -> None:
    first, second = enter(world, gate(most=1)), enter(world, gate(most=1))
    db_b.execute("SET lock_timeout = '2s'")
    with world.db.transaction():
        world.cancel(first)
        assert let_out(db_b) == []  # its place was counted as the first's
    assert let_out(world.db) == [second]


def test_given_a_run_that_waits_when_it_is_cancelled_then_it_waits_no_more(world: World) -> None:
    first, second, third = (enter(world, gate(most=1)) for _ in range(3))
    assert let_out(world.db) == [first]
    world.cancel(second)
    assert parked(world) == {third}
    world.cancel(first)
    assert let_out(world.db) == [third]


def test_given_a_shut_gate_then_others_pass_it(world: World) -> None:
    shut = [enter(world, gate("agent:slow", most=1)) for _ in range(3)]
    assert let_out(world.db) == shut[:1]
    free = enter(world, gate("agent:quick", most=1))
    assert let_out(world.db) == [free]
    assert world.run(enter(world, window=3))["turn"] is None


def test_given_two_gates_then_both_must_be_open(world: World) -> None:
    both = gate("agent:echo", most=3) | gate("runs_of:1", most=1)
    runs = [
        enter(world, both),
        enter(world, both),
        enter(world, gate("agent:echo", most=3) | gate("runs_of:2", most=5)),
    ]
    assert let_out(world.db) == [runs[0], runs[2]]
    other = enter(world, gate("agent:echo", most=3))
    another = enter(world, gate("agent:echo", most=3))
    assert let_out(world.db) == [other]
    assert parked(world) == {runs[1], another}


def test_given_lanes_with_the_same_gate_then_one_release_counts_them_together(world: World) -> None:
    for gates in (gate(most=3), gate(most=3) | gate("runs_of:1", most=9)):
        enter(world, gates)
        enter(world, gates)
    assert len(let_out(world.db)) == 3
    assert let_out(world.db) == []


def test_given_a_pause_then_nothing_of_its_key_goes_out_until_its_time(world: World) -> None:
    run = enter(world, gate(most=1))
    world.db.execute(
        "INSERT INTO longhaul_tools_pause (key, until, reason) VALUES ('agent:echo', longhaul_now() + interval '5 s', '')"
    )
    assert let_out(world.db) == []
    world.ahead(6 * SECOND)
    assert let_out(world.db) == [run]


# --- so many starts in a time


def test_given_a_rate_then_no_more_start_in_any_such_time(world: World) -> None:
    runs = [enter(world, gate(count=2, seconds=60)) for _ in range(4)]
    assert let_out(world.db) == runs[:2]
    assert let_out(world.db) == []  # they will start
    world.ahead(50 * SECOND)
    world.claim(runs[0])
    world.ahead(100 * SECOND)
    assert let_out(world.db) == []  # one started 50 s ago, one is out
    world.claim(runs[1])
    world.ahead(111 * SECOND)
    assert let_out(world.db) == [runs[2]]
    world.ahead(161 * SECOND)
    assert let_out(world.db) == [runs[3]]


def test_given_a_rate_then_who_has_started_goes_on_without_it(world: World) -> None:
    first, second = (enter(world, gate(count=1, seconds=60)) for _ in range(2))
    let_out(world.db)
    working(world, first, 1)
    assert settle(world, first)["dispatch_seq"] is not None
    assert parked(world) == {second}
    world.claim(first)
    assert let_out(world.db) == []


def test_given_a_rate_and_a_bound_then_who_has_started_waits_for_the_bound_alone(world: World) -> None:
    gates = gate(most=1, count=2, seconds=60)
    first, second, third = (enter(world, gates) for _ in range(3))
    let_out(world.db)
    working(world, first, 1)
    assert let_out(world.db) == [second]
    settle(world, first)
    assert parked(world) == {first, third}
    world.cancel(second)
    assert world.run(first)["lane"] == "\nagent:echo"
    # the third would be the second start; either may go, and not both
    assert len(let_out(world.db)) == 1
    assert let_out(world.db) == []


def test_given_a_start_that_is_cancelled_before_its_claim_then_it_was_none(world: World) -> None:
    first, second = (enter(world, gate(count=1, seconds=60)) for _ in range(2))
    let_out(world.db)
    world.cancel(first)
    assert let_out(world.db) == [second]


def test_given_a_run_that_is_lost_then_its_second_claim_is_no_start(world: World) -> None:
    run = enter(world, gate(count=1, seconds=60))
    let_out(world.db)
    world.reclaim(world.claim(run))
    world.claim(run)
    assert world.db.one("SELECT count(*) FROM longhaul_tools_rateuse") == 1


# --- the order


def test_given_two_owners_then_they_take_turns_whoever_came_first(world: World, owners: Any) -> None:
    many, few = owners("many", "few")
    enter(world, window=1)  # the room is taken
    a = [enter(world, owner=many, window=1) for _ in range(40)]
    b = [enter(world, owner=few, window=1) for _ in range(5)]
    order = let_out(world.db)
    assert set(order) == {*a, *b}
    assert order.index(b[-1]) < order.index(a[10])
    assert [run for run in order if run in a] == a
    assert [run for run in order if run in b] == b


def test_given_priorities_then_the_higher_goes_first_and_owners_take_turns_within(world: World, owners: Any) -> None:
    one, two = owners("one", "two")
    enter(world, window=1)
    low = [enter(world, owner=one, window=1) for _ in range(3)]
    high = [enter(world, owner=one, window=1, priority=5) for _ in range(3)]
    other = enter(world, owner=two, window=1, priority=5)
    assert let_out(world.db) == [high[0], high[1], other, high[2], *low]


def test_given_others_that_wait_then_who_comes_to_an_empty_lane_does_not_overtake_them(world: World) -> None:
    enter(world, window=1)
    waiting = [enter(world, window=1) for _ in range(6)]
    assert let_out(world.db, window=4) == waiting[:3]
    later = [enter(world, gate(most=9), window=1) for _ in range(2)]
    assert let_out(world.db) == [waiting[3], waiting[4], later[0], waiting[5], later[1]]


def test_the_lane_in_python_is_that_in_sql(world: World) -> None:
    for queue in ("", "gpu"):
        for gates in (None, gate(most=1), gate(count=1, seconds=2) | gate("agent:Äb", most=1, count=2, seconds=1)):
            there = world.db.one(
                "SELECT longhaul_run_lane(%s, %s, false)", queue, None if gates is None else Jsonb(gates)
            )
            assert there == lane_of(queue, gates)


# --- all of it, at random


class Chance:
    """Runs that live at random, while their bounds are looked at after each move."""

    MOST, COUNT, SECONDS, WINDOW = 3, 4, 30, 5

    def __init__(self, world: World, owners: list[int], seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.owners = owners
        self.at = timedelta()
        self.worker = world.worker()
        self.tools = world.worker("tools@a")
        self.claims: dict[UUID, Claim] = {}
        self.started: list[timedelta] = []
        self.out = 0

    def tick(self) -> None:
        self.at += self.random.choice([0.1, 1, 3, 10]) * SECOND
        self.world.ahead(self.at)
        self.world.beat(self.worker)
        self.world.beat(self.tools)

    def enter(self) -> None:
        owner = self.random.choice(self.owners)
        gates: dict[str, Any] | None = self.random.choice(
            [
                None,
                gate("agent:a", most=self.MOST),
                gate("agent:b", count=self.COUNT, seconds=self.SECONDS),
                gate("agent:a", most=self.MOST) | gate(f"runs_of:{owner}", most=1),
            ]
        )
        enter(self.world, gates, owner=owner, priority=self.random.choice([0, 0, 1]), window=self.WINDOW)

    def look(self) -> None:
        """What the watcher does: publish what is due, and release."""
        self.world.db.call_rows("longhaul_runs_due", p_limit=50)
        let_out(self.world.db, self.WINDOW)

    def move(self) -> None:
        db = self.world.db
        rows = db.rows("SELECT * FROM longhaul_runs_run WHERE finished_at IS NULL AND turn IS NULL ORDER BY id")
        if not rows:
            return
        row = self.random.choice(rows)
        run = row["id"]
        match row["status"]:
            case "queued" if row["publishes"]:  # no other has a message by which it could be claimed
                answer = self.world.try_claim(run, self.worker)
                if answer is not None:
                    claim = Claim(
                        run,
                        self.worker,
                        db.one("SELECT id FROM longhaul_runs_leg WHERE run_id = %s AND ended_at IS NULL", run),
                        answer["epoch"],
                    )
                    self.claims[run] = self.world.turn(claim)
                    if answer["leg"] == 1 and "agent:b" in (row["gates"] or {}):
                        self.started.append(self.at)
            case "running":
                claim = self.claims[run]
                match self.random.randrange(6):
                    case 0 | 1:
                        self.world.commit(claim, [a_call()], linger=self.random.choice([None, 2 * SECOND]))
                    case 2:
                        self.world.requeue(claim, self.random.choice(["budget", "drained"]))
                    case 3:
                        self.world.requeue(claim, "retry", 5 * SECOND)
                    case 4:
                        self.world.reclaim(claim)
                    case _:
                        self.world.end(claim)
            case "waiting":
                for call in self.world.calls(run):
                    if self.world.tool_call(call)["status"] == "requested":
                        self.world.settle(self.world.call_claim(call, self.tools))
        if self.random.random() < 0.05:
            self.world.cancel(run)

    def check(self) -> None:
        working = Counter(
            key
            for row in self.world.db.rows(
                "SELECT * FROM longhaul_runs_run WHERE gates IS NOT NULL AND turn IS NULL AND (status = 'running'"
                " OR status = 'queued' AND publishes > 0"
                " OR status IN ('waiting', 'requires_action') AND linger_until > longhaul_now())"
            )
            for key, bounds in row["gates"].items()
            if "most" in bounds
        )
        assert working["agent:a"] <= self.MOST
        assert all(count <= 1 for key, count in working.items() if key.startswith("runs_of"))
        for began in self.started:
            stretch = [at for at in self.started if began <= at < began + self.SECONDS * SECOND]
            assert len(stretch) <= self.COUNT

    def finish(self) -> None:
        """With no more to come, all that live end: none is stranded."""
        for _ in range(2000):
            rows = self.world.db.rows("SELECT id, status FROM longhaul_runs_run WHERE finished_at IS NULL")
            if not rows:
                return
            self.tick()
            self.look()
            for _ in range(3):
                self.move()
            self.check()
        raise AssertionError(f"stranded: {rows}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_whatever_happens_no_bound_is_passed_and_nobody_is_stranded(world: World, owners: Any, seed: int) -> None:
    chance = Chance(world, owners("one", "two", "three"), seed)
    for _ in range(40 if seed == 1 else 150):
        chance.tick()
        if chance.random.random() < 0.6:
            chance.enter()
        chance.move()
        chance.move()
        chance.check()
        if chance.random.random() < 0.7:
            chance.look()
    chance.finish()
