"""No transition costs more because its run, its thread or the tables are long: the rows it reads are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from tests.protocol.rows import SECOND, Call, Claim, Database, World, a_call
from threads.ids import new_id

pytestmark = pytest.mark.django_db

SHORT, LONG = 30, 250  # steps; by the first one the context of 20 messages is full
GROWING = ("event", "message", "toolcall", "toolattempt", "step", "leg")


@pytest.fixture(autouse=True)
def planned_by_index(world: World) -> Iterator[None]:
    """Plans are made anew, and not for the empty tables that other tests left: a scan means that no index serves."""
    world.db.execute("DISCARD PLANS")
    world.db.execute("SET enable_seqscan = off")
    yield
    world.db.execute("RESET enable_seqscan")
    world.db.execute("DISCARD PLANS")


def read(db: Database) -> Counter[str]:
    """How many rows of each table this transaction has fetched by index or by scan."""
    rows = db.rows(
        "SELECT relname, coalesce(idx_tup_fetch, 0) AS fetched, seq_tup_read AS scanned FROM pg_stat_xact_user_tables"
        " WHERE relname LIKE 'longhaul\\_%%' AND relname <> 'longhaul_threads_clock'".replace("%%", "%")
    )
    counts: Counter[str] = Counter()
    for row in rows:
        table = row["relname"].rpartition("_")[2]
        counts[f"{table} by index"] = row["fetched"]
        counts[f"{table} by scan"] = row["scanned"]
    return counts


class Meter:
    """Counts what each transition reads, while it is switched on."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.on = False
        self.counts: dict[str, dict[str, int]] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        if not self.on:
            return work()
        with self.db.transaction():
            before = read(self.db)
            answer = work()
            self.counts[name] = dict(sorted((read(self.db) - before).items()))
        return answer

    def take(self) -> dict[str, dict[str, int]]:
        counts, self.counts = self.counts, {}
        return counts


def step(world: World, claim: Claim, meter: Meter, tools: UUID, *, lingers: bool) -> Claim:
    """A whole step: what the hot path calls, from the deltas to the next turn."""
    call = a_call()
    held = Call(UUID(call["id"]), 1, tools)
    meter("deltas", lambda: world.speak(claim, "a", "b"))
    meter("step_commit", lambda: world.commit(claim, [call], linger=20 * SECOND if lingers else None))
    meter("call_claim", lambda: world.try_call_claim(held.id, 1, tools))
    meter("settle", lambda: world.settle(held, result=1))
    if lingers:
        answer = meter("linger_claim", lambda: world.linger_claim(claim, opens=False))
        claim = replace(claim, epoch=answer["epoch"])
    else:
        dispatch, leg = world.run(claim.run)["dispatch_seq"], new_id()
        answer = meter("claim", lambda: world.try_claim(claim.run, claim.worker, dispatch, leg))
        claim = replace(claim, epoch=answer["epoch"], leg=leg)
    claim = replace(claim, message=new_id())
    meter("turn_open", lambda: world.try_turn(claim, claim.message or leg, p_limit=20))
    return claim


@pytest.mark.parametrize(
    ("lingers", "known"),
    [
        pytest.param(True, "the thread", id="lingering-all is known", marks=pytest.mark.slow),
        pytest.param(True, "nothing", id="lingering-nothing is known", marks=pytest.mark.slow),
        pytest.param(True, "its start", id="lingering-its start is known", marks=pytest.mark.slow),
        pytest.param(False, "the thread", id="a leg a step-all is known", marks=pytest.mark.slow),
        pytest.param(False, "nothing", id="a leg a step-nothing is known"),
        pytest.param(False, "its start", id="a leg a step-its start is known"),
    ],
)
def test_given_a_long_run_then_each_transition_reads_as_many_rows_as_in_a_short_one(
    world: World, lingers: bool, known: str
) -> None:
    meter, worker, tools = Meter(world.db), world.worker(), world.worker("tools@a")
    claim = world.turn(world.claim(world.start(), worker))
    found = {}
    for number in range(1, LONG + 1):
        if number % SHORT == 0:
            world.beat(worker)
            world.beat(tools)
        meter.on = number in (SHORT, LONG)
        if (meter.on and known == "the thread") or (number == 1 and known == "its start"):
            world.db.execute("ANALYZE")  # what the planner knows of a short thread and of a long one is not the same
            world.db.execute("DISCARD PLANS")
        claim = step(world, claim, meter, tools, lingers=lingers)
        if meter.on:
            found[number] = meter.take()
    # Another plan may look at the one run once or twice more; none may read the thread, whatever the planner knows of it.
    sums = {at: {name: sum(rows.values()) for name, rows in found[at].items()} for at in found}
    apart = {name: (sums[SHORT][name], many) for name, many in sums[LONG].items() if abs(many - sums[SHORT][name]) > 5}
    assert apart == {}
    scans = {
        name: counts for name, counts in found[LONG].items() if any(f"{table} by scan" in counts for table in GROWING)
    }
    assert scans == {}
    # a hand-over and the ends, with a text so far
    meter.on = True
    world.speak(claim, "so far")
    with world.db.transaction(force_rollback=True):
        meter("requeue", lambda: world.requeue(claim))
    with world.db.transaction(force_rollback=True):
        meter("reclaim", lambda: world.reclaim(claim))
    with world.db.transaction(force_rollback=True):
        meter("end", lambda: world.end(claim))
    meter("cancel", lambda: world.cancel(claim.run))
    dear = {name: counts for name, counts in meter.take().items() if sum(counts.values()) >= 40}
    assert dear == {}


def test_given_a_step_of_many_calls_then_each_costs_as_much_as_one_of_few(world: World) -> None:
    """At its begin, in the middle and towards its end; the last one joins, and reads them all."""
    meter, tools = Meter(world.db), world.worker("tools@a")
    found: dict[tuple[int, str], set[int]] = {}
    for many in (10, 150):
        claim = world.waiting(*(a_call(index) for index in range(many)))
        for number, call in enumerate(world.calls(claim.run)):
            meter.on = number in (0, 1, many // 2, many - 3, many - 2)
            meter("call_claim", partial(world.try_call_claim, call, 1, tools))
            meter("settle", partial(world.settle, Call(call, 1, tools), result=number))
            for name, rows in meter.take().items():
                found.setdefault((many, name), set()).add(sum(rows.values()))
    assert {name for _, name in found} == {"call_claim", "settle"}
    apart = {name: rows for (many, name), rows in found.items() if max(rows) > max(found[10, name]) + 1}
    assert apart == {}


def test_given_many_open_calls_and_finished_runs_then_the_sweep_reads_only_what_is_due(world: World) -> None:
    for _ in range(60):
        world.cancel(world.waiting(*(a_call(i) for i in range(3))).run)
    world.start()
    world.waiting()
    world.ahead(2 * SECOND)
    meter = Meter(world.db)
    meter.on = True
    assert len(meter("runs", lambda: world.db.call_rows("longhaul_runs_due", p_limit=10))) == 1
    assert len(meter("calls", lambda: world.db.call_rows("longhaul_calls_due", p_limit=10))) == 1
    counts = meter.take()
    assert counts["runs"].get("run by scan", 0) == 0
    assert counts["calls"].get("toolcall by scan", 0) == 0
