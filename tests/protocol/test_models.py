"""The limits of model calls: never more than allowed in any stretch of the window, fair among those that wait, nobody forgotten."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from tests.protocol.rows import SECOND, Claim, Database, World, linger_arguments, wait_until
from tests.protocol.test_claim import waits_for_a_lock
from threads.ids import new_id

pytestmark = pytest.mark.django_db

KEY = "model:openai:small"
WINDOW = 62.0  # seconds
ENDED = {"status": "completed", "stop_reason": "end_turn", "output": "said", "error": None}


def limits(**said: int) -> dict[str, Any]:
    return {**said, "seconds": WINDOW}


class Model:
    """Legs that ask one model, by the functions that real ones call."""

    def __init__(self, world: World, said: dict[str, Any] | None, *, size: int = 0, answer: int = 500) -> None:
        self.world, self.said = world, said
        self.size, self.answer_size = size, answer
        self.worker = world.worker()
        self.ahead = timedelta()

    @property
    def ask(self) -> dict[str, Any]:
        ask: dict[str, Any] = {"key": KEY, "bytes": self.size, "answer": self.answer_size}
        return ask if self.said is None else {**ask, "limits": self.said}

    def move(self, by: timedelta) -> None:
        self.ahead += by
        self.world.ahead(self.ahead)
        self.world.beat(self.worker)

    def now(self) -> datetime:
        found: datetime = self.world.db.one("SELECT longhaul_now()")
        return found

    def start(self, owner: str = "", priority: int = 0) -> UUID:
        run = self.world.start()
        self.world.db.execute("UPDATE longhaul_runs_run SET priority = %s WHERE id = %s", priority, run)
        self.owners[run] = owner
        return run

    @property
    def owners(self) -> dict[UUID, str]:
        return self.__dict__.setdefault("_owners", {})

    def claim(self, run: UUID) -> Claim:
        return self.world.claim(run, self.worker)

    def open(self, claim: Claim, db: Database | None = None) -> Claim | dict[str, Any]:
        """Ask for leave at a boundary: the claim with its pending message, or what the leg is told."""
        message = new_id()
        answer = World(db or self.world.db).try_turn(claim, message, p_ask=self.ask)
        assert answer is not None
        return answer if "limit" in answer else replace(claim, message=message)

    def go(self, run: UUID) -> Claim | None:
        """A leg from its claim to its turn; refused, it hands the run over, as the engine does."""
        claim = self.claim(run)
        opened = self.open(claim)
        if isinstance(opened, Claim):
            return opened
        assert opened["limit"] == "model"
        self.world.requeue(claim, "limited", timedelta(seconds=float(opened["delay"])))
        leave = "UPDATE longhaul_runs_leave SET turn_of = %s WHERE run_id = %s"
        self.world.db.execute(leave, self.owners.get(run, ""), run)
        return None

    def release(self) -> list[UUID]:
        """The watcher's look: returns who was let go by it, in the order of the line."""
        before = self.waiting()
        count = self.world.db.call("longhaul_models_release")
        free = [row["run_id"] for row in before if row["released_at"] is None]
        after = {row["run_id"] for row in self.waiting() if row["released_at"] is not None}
        let_go = [run for run in free if run in after]
        assert count == len(let_go)
        return let_go

    def due(self) -> list[UUID]:
        """Who is sent now."""
        return [row["run_id"] for row in self.world.db.call_rows("longhaul_runs_due", p_limit=1000)]

    def waiting(self) -> list[dict[str, Any]]:
        return self.world.db.rows("SELECT * FROM longhaul_runs_leave WHERE message_id IS NULL ORDER BY turn, run_id")


def opened(claim: Claim | dict[str, Any] | None) -> Claim:
    assert isinstance(claim, Claim), claim
    return claim


# --- exactness


def worst(times: list[datetime], seconds: float) -> int:
    """The most of them in any stretch so long."""
    times = sorted(times)
    return max(sum(start <= each < start + timedelta(seconds=seconds) for each in times) for start in times)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_given_whatever_happens_then_no_minute_sees_more_requests_and_all_are_asked(world: World, seed: int) -> None:
    """Runs start, speak, end, die, fail and are cancelled while time passes; the requests are counted as they are granted."""
    dice = random.Random(seed)
    model = Model(world, limits(requests=4, concurrency=3))
    granted: list[datetime] = []
    held: list[Claim] = []
    out: set[UUID] = set()
    alive: set[UUID] = set()

    def go(run: UUID) -> None:
        out.discard(run)
        if (claim := model.go(run)) is not None:
            granted.append(model.now())
            held.append(claim)

    for _ in range(150):
        match dice.choice(
            ["start", "start", "commit", "die", "retry", "cancel", "time", "time", "look", "look", "take"]
        ):
            case "start" if len(alive) < 25:
                alive.add(run := model.start())
                go(run)
            case "commit" if held:
                claim = held.pop(dice.randrange(len(held)))
                world.commit(claim, end=ENDED)
                alive.discard(claim.run)
            case "die" if held:
                claim = held.pop(dice.randrange(len(held)))
                world.reclaim(claim)
                out.add(claim.run)
            case "retry" if held:
                claim = held.pop(dice.randrange(len(held)))
                world.requeue(claim, "retry", SECOND)
            case "cancel" if alive:
                run = dice.choice(sorted(alive))
                if world.cancel(run):
                    alive.discard(run)
                    held[:] = [claim for claim in held if claim.run != run]
                    out.discard(run)
            case "time":
                model.move(SECOND * dice.choice([0.2, 1, 5, 20, 40]))
            case "look":
                model.release()
                out |= set(model.due()) & alive
            case "take" if out:
                go(dice.choice(sorted(out)))
        assert len(held) <= 3
    for _ in range(400):  # nothing more fails: everybody gets there
        model.release()
        out |= set(model.due()) & alive
        for run in sorted(out):
            go(run)
        for claim in held:
            world.commit(claim, end=ENDED)
            alive.discard(claim.run)
        held.clear()
        if not alive:
            break
        model.move(2 * SECOND)
    assert not alive
    for _ in range(30):  # what they left is cleared away
        model.move(20 * SECOND)
        model.release()
    assert not model.waiting()
    assert len(granted) > 10
    assert worst(granted, WINDOW) <= 4


def test_given_two_that_ask_for_the_last_place_at_once_then_one_is_given_it(world: World, db_b: Database) -> None:
    model = Model(world, limits(requests=1))
    first, second = model.claim(model.start()), model.claim(model.start())
    with world.db.transaction():
        opened(model.open(first))
        late = db_b.in_background(model.open, second, db_b)
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
    answer = late.result()
    assert (answer["limit"], answer["reason"]) == ("model", "1 requests a minute are used")
    assert 60 < float(answer["delay"]) <= WINDOW


def test_given_a_call_is_out_when_its_worker_dies_or_it_ends_then_its_place_is_free(world: World) -> None:
    model = Model(world, limits(concurrency=1))
    ways = {
        "end": lambda claim: world.commit(claim, end=ENDED),
        "death": world.reclaim,
        "cancel": lambda claim: world.cancel(claim.run),
        "failure": lambda claim: world.requeue(claim, "retry", 3600 * SECOND),
    }
    for name, end in ways.items():
        claim = opened(model.go(model.start()))
        refused = model.open(model.claim(model.start()))
        assert isinstance(refused, dict), name
        assert refused["reason"] == "1 of 1 calls are out"
        world.db.execute("DELETE FROM longhaul_runs_leave WHERE message_id IS NULL")
        end(claim)
        world.end(opened(model.go(model.start())))


# --- what a refused leg leaves


def test_given_no_room_then_the_run_is_handed_over_without_a_trace_but_its_place(world: World) -> None:
    model = Model(world, limits(requests=1))
    model.go(model.start())
    run = model.start()
    assert model.go(run) is None
    row = world.run(run)
    assert (row["status"], row["steps"], row["lost"], row["model_tries"]) == ("queued", 0, 0, 0)
    assert row["pending_message_id"] is None
    assert row["next_publish_at"] - row["not_before"] == 60 * SECOND, "it is let go by the line, not by its own time"
    *_, ended, queued = world.events(run)
    assert (ended["type"], ended["payload"]["reason"]) == ("leg.ended", "limited")
    assert (queued["type"], queued["payload"]["reason"]) == ("run.queued", "limited")
    assert world.types(run).count("message.created") == 0


def test_given_a_leg_that_lingers_when_there_is_no_room_then_it_claims_and_opens_nothing(world: World) -> None:
    claim = world.waiting(linger=20 * SECOND)
    model = Model(world, limits(requests=1))
    model.go(model.start())
    [call] = world.calls(claim.run)
    world.settle(world.call_claim(call), result=1)
    answer = world.db.call("longhaul_linger_claim", **linger_arguments(claim, True), p_ask=model.ask)
    assert answer["status"] == "running"
    assert answer["turn"]["limit"] == "model"
    row = world.run(claim.run)
    assert (row["pending_message_id"], row["epoch"]) == (None, 2)
    assert world.requeue(replace(claim, epoch=2), "limited", SECOND)
    assert world.legs(claim.run)[-1]["reason"] == "limited"


def test_given_a_model_without_limits_then_asking_reads_no_row_and_writes_none(world: World) -> None:
    model = Model(world, None)
    claim = model.claim(model.start())
    query = (
        "SELECT coalesce(sum(coalesce(idx_tup_fetch, 0) + seq_tup_read + n_tup_ins), 0)::int FROM pg_stat_xact_user_tables"
        " WHERE relname IN ('longhaul_runs_leave', 'longhaul_tools_rateuse', 'longhaul_tools_pause')"
    )
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    with world.db.transaction():
        before = world.db.one(query)
        claim = opened(model.open(claim))
        world.commit(claim, end=ENDED, usage={"model": "echo", "input_tokens": 3})
        assert world.db.one(query) == before
        assert world.db.one(locks) == 0


# --- fairness


def line_up(model: Model, *owners: str, priority: int = 0) -> dict[UUID, str]:
    runs = {model.start(owner, priority): owner for owner in owners}
    for run in runs:
        assert model.go(run) is None
    return runs


def line(world: World, model: Model, runs: dict[UUID, str]) -> str:
    """The owners in the order in which they are given leave, one a window."""
    told = ""
    for _ in runs:
        model.move(timedelta(seconds=WINDOW))
        [run] = model.release()
        world.commit(opened(model.go(run)), end=ENDED)
        told += runs[run]
    return told


def as_owned(world: World, *names: str) -> dict[str, int]:
    """Users, for the line counts turns by the run's own owner."""
    made = {}
    for name in names:
        made[name] = world.db.one(
            "INSERT INTO auth_user (username, password, is_superuser, first_name, last_name, email, is_staff, is_active, date_joined)"
            " VALUES (%s, '', false, '', '', '', false, true, now()) RETURNING id",
            f"{name}-{new_id()}",
        )
    return made


def test_given_owners_that_wait_then_they_take_turns_and_priority_comes_first(world: World) -> None:
    world.db.one("SELECT setseed(0.5)")  # one look in ten goes by age: not the first one here
    model = Model(world, limits(requests=1))
    users = as_owned(world, "a", "b")
    try:
        opened(model.go(model.start()))
        runs = {}
        for name, priority in [*[("a", 0)] * 6, *[("b", 0)] * 2, ("a", 5)]:
            run = model.start(str(users[name]), priority)
            world.db.execute("UPDATE longhaul_runs_run SET owner_id = %s WHERE id = %s", users[name], run)
            assert model.go(run) is None
            runs[run] = name.upper() if priority else name
        told = line(world, model, runs)
        assert told[0] == "A"
        assert told[1:6].count("b") == 2, told
    finally:
        world.db.execute("UPDATE longhaul_runs_run SET owner_id = NULL")
        world.db.execute("DELETE FROM auth_user WHERE id = ANY (%s)", list(users.values()))


def test_given_those_of_a_high_priority_come_without_end_then_a_low_one_is_asked_all_the_same(world: World) -> None:
    world.db.one("SELECT setseed(0.5)")
    model = Model(world, limits(requests=1))
    opened(model.go(model.start()))
    [low] = line_up(model, "low")
    first: list[UUID] = []
    for _ in range(100):
        line_up(model, "high", priority=9)
        model.move(timedelta(seconds=WINDOW))
        first += model.release()
        if first[-1] == low:
            break
        world.commit(opened(model.go(first[-1])), end=ENDED)
    assert first[-1] == low
    assert len(first) > 1, "the high ones come first as a rule"


def test_given_a_line_when_somebody_new_asks_then_it_does_not_go_first(world: World) -> None:
    model = Model(world, limits(requests=1))
    opened(model.go(model.start()))
    [first] = line_up(model, "a")
    model.move(timedelta(seconds=WINDOW))
    new = model.start()
    assert model.go(new) is None
    assert model.waiting()[-1]["reason"] == "1 requests a minute are used"
    assert model.release() == [first]
    opened(model.go(first))
    assert [row["run_id"] for row in model.waiting()] == [new]


def test_given_a_pause_ends_then_those_that_wait_are_spread_and_all_get_there(world: World) -> None:
    model = Model(world, None)
    world.db.call(
        "longhaul_model_pause", p_key=KEY, p_pause=5 * SECOND, p_reason="slow down", p_run=None, p_limits=None
    )
    runs = line_up(model, *["a"] * 35)
    due = sorted(world.run(run)["not_before"] for run in runs)
    assert len(set(due)) == len(due), "each has a time of its own"
    assert model.release() == []
    model.move(5 * SECOND)
    looks: list[int] = []
    while sum(looks) < 35:
        looks.append(len(released := model.release()))
        assert 0 < looks[-1] <= 10, "no herd"
        for run in released:
            world.commit(opened(model.go(run)), end=ENDED)
    assert not model.waiting()


def test_given_who_was_let_go_and_never_comes_then_its_place_is_given_on(world: World) -> None:
    """Its queue may have no worker. It stays first when it comes after all, as far as there is room."""
    model = Model(world, limits(requests=1))
    opened(model.go(model.start()))
    first, second = line_up(model, "a", "a")
    model.move(timedelta(seconds=WINDOW))
    assert model.release() == [first]
    assert model.release() == [], "the place is kept for it"
    model.move(10 * SECOND)
    assert second in model.release()
    opened(model.go(second))
    assert model.go(first) is None
    model.move(timedelta(seconds=WINDOW))
    assert model.release() == [first]


@pytest.mark.parametrize("end", ["cancelled", "deleted"])
def test_given_who_waits_is_gone_then_nobody_waits_for_it(world: World, end: str) -> None:
    model = Model(world, limits(requests=1))
    opened(model.go(model.start()))
    gone, next_one = line_up(model, "a", "a")
    world.cancel(gone)
    if end == "deleted":
        world.db.execute("DELETE FROM longhaul_runs_event WHERE run_id = %s", gone)
        world.db.execute("DELETE FROM longhaul_runs_leg WHERE run_id = %s", gone)
        world.db.execute("DELETE FROM longhaul_runs_run WHERE id = %s", gone)
    model.move(timedelta(seconds=WINDOW))
    assert model.release() == [next_one]
    assert [row["run_id"] for row in model.waiting()] == [next_one]


def test_given_nobody_lets_go_then_the_first_of_the_line_gets_there_by_its_own_time(world: World) -> None:
    """The line is not all that moves it: its time comes, and it asks as the first."""
    model = Model(world, limits(requests=1))
    opened(model.go(model.start()))
    first, second = line_up(model, "a", "a")
    model.move(timedelta(seconds=2 * WINDOW + 61))
    assert first in model.due()
    assert model.go(second) is None, "it is not its turn"
    opened(model.go(first))


# --- those that wait for their turn as runs


def park(world: World, run: UUID) -> None:
    """The gate of its agent shuts before it is sent: so the run waits, in no line but that."""
    world.db.execute(
        """UPDATE longhaul_runs_run SET gates = '{"agent:echo": {"most": 1}}', lane = E'\\nagent:echo' WHERE id = %s""",
        run,
    )
    world.db.call_rows("longhaul_runs_due", p_limit=10)
    assert world.run(run)["turn"] is not None


def test_given_one_let_go_that_waits_for_its_gate_then_nobody_waits_for_it(world: World) -> None:
    model = Model(world, limits(concurrency=1))
    busy = opened(model.go(model.start()))
    first, second = line_up(model, "a", "a")
    world.commit(busy, end=ENDED)
    assert model.release() == [first]
    park(world, first)
    assert model.release() == [second], "no place is kept for one that cannot come"
    going = opened(model.go(second))
    world.commit(going, end=ENDED)
    opened(model.go(model.start()))


def test_given_one_in_the_line_that_waits_for_its_gate_then_it_is_passed_by_and_keeps_its_turn(world: World) -> None:
    model = Model(world, limits(concurrency=1))
    busy = opened(model.go(model.start()))
    first, second = line_up(model, "a", "a")
    model.move(timedelta(seconds=62))  # longer than anybody forgets it
    park(world, first)
    turn = world.run(first)["turn"]
    world.commit(busy, end=ENDED)
    assert model.release() == [second]
    row = world.run(first)
    assert (row["turn"], row["next_publish_at"]) == (turn, None)
    assert first not in model.due()


def test_given_an_old_leave_whose_run_asks_again_when_the_watcher_looks_then_neither_waits_for_the_other(
    world: World, db_b: Database
) -> None:
    model = Model(world, limits(concurrency=5))
    run = model.start()
    world.requeue(opened(model.go(run)), "retry", SECOND)  # its call told of no usage
    model.move(timedelta(minutes=16))
    asks = model.claim(run)
    other = model.claim(model.start())
    world.db.call("longhaul_model_pause", p_key=KEY, p_pause=0 * SECOND, p_reason="", p_run=other.run, p_limits=None)
    with world.db.transaction():
        world.db.execute("SELECT longhaul_model_lock(%s)", KEY)  # as it does when it asks
        looks = db_b.in_background(db_b.call, "longhaul_models_release")
        wait_until(lambda: waits_for_a_lock(world.db, db_b))
        opened_or_told = model.open(asks)
    assert looks.result() is not None
    assert opened_or_told


# --- tokens


def left(world: World, most: int) -> int:
    found: int = world.db.one("SELECT longhaul_rate_left(%s, %s, %s, longhaul_now())", f"tokens:{KEY}", most, WINDOW)
    return found


def test_given_an_estimate_then_what_is_reported_takes_its_place(world: World) -> None:
    model = Model(world, limits(tokens=10_000), size=4000, answer=500)
    claim = opened(model.go(model.start()))
    assert 10_000 - 1700 < left(world, 10_000) < 10_000 - 1500, "a quarter of its characters, and an answer"
    world.commit(claim, end=ENDED, usage={"model": "echo", "input_tokens": 7000, "output_tokens": 500})
    assert left(world, 10_000) == 2500
    assert not world.db.rows("SELECT 1 FROM longhaul_runs_leave")
    refused = [model.open(model.claim(model.start())) for _ in range(2)][1]
    assert isinstance(refused, dict)
    assert refused["reason"] == "10000 tokens a minute are used"


def test_given_a_discarded_answer_then_its_usage_counts_as_well(world: World) -> None:
    model = Model(world, limits(tokens=10_000))
    claim = opened(model.go(model.start()))
    world.requeue(claim, "retry", SECOND, usage={"model": "echo", "input_tokens": 300, "output_tokens": 30})
    assert left(world, 10_000) == 9670


def test_given_a_request_that_is_larger_than_a_minute_then_it_goes_when_nothing_is_used(world: World) -> None:
    model = Model(world, limits(tokens=1000), size=40)
    opened(model.go(model.start()))
    model.size = 1_000_000
    [large] = line_up(model, "a")
    model.move(timedelta(seconds=WINDOW))
    assert model.release() == [large]
    opened(model.go(large))
    assert left(world, 1000) == 0


# --- pauses


def test_given_a_pause_then_nobody_asks_and_a_shorter_one_ends_it_not(world: World) -> None:
    model = Model(world, limits(requests=100))
    for seconds in (30, 10):
        world.db.call(
            "longhaul_model_pause",
            p_key=KEY,
            p_pause=seconds * SECOND,
            p_reason="rate_limited",
            p_run=None,
            p_limits=None,
        )
    run = model.start()
    assert model.go(run) is None
    [row] = model.waiting()
    assert row["reason"] == "its service asked for a pause"
    assert timedelta(seconds=29) < world.run(run)["not_before"] - model.now() <= timedelta(seconds=30)
    model.move(20 * SECOND)
    assert model.release() == []
    model.move(10 * SECOND)
    assert model.release() == [run]
    opened(model.go(run))


def test_given_who_was_told_to_wait_then_it_is_before_those_that_come_meanwhile(world: World) -> None:
    model = Model(world, limits(requests=1))
    claim = opened(model.go(model.start()))
    pause: dict[str, Any] = {"p_key": KEY, "p_pause": 100 * SECOND, "p_reason": "rate_limited"}
    world.db.call("longhaul_model_pause", **pause, p_run=claim.run, p_limits=limits(requests=1))
    world.requeue(claim, "retry", 100 * SECOND)
    line_up(model, "a")
    model.move(101 * SECOND)
    assert model.release() == [claim.run]
    assert world.run(claim.run)["model_tries"] == 1


def test_given_other_models_then_they_know_nothing_of_it(world: World) -> None:
    model = Model(world, limits(requests=1))
    opened(model.go(model.start()))
    for n, key in zip(range(3), itertools.cycle(["model:a:b", "model:a:c", "model:a:d"]), strict=False):
        claim = model.claim(model.start())
        ask = {**model.ask, "key": key}
        answer = world.try_turn(claim, new_id(), p_ask=ask)
        assert answer is not None, n
        assert "limit" not in answer
