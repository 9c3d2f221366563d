"""Gates under any order of events: what must hold after each of them, and that nobody is stranded."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from tests.protocol.rows import SECOND, Call, World, a_call
from tests.protocol.test_gates import let_out, parked

pytestmark = [pytest.mark.django_db, pytest.mark.slow]

WINDOW = 3
TOOL, MAIL = {"tool:refund": {"most": 2}}, {"tool:mail": {"count": 3, "seconds": 20}}
BOTH = {"tool:refund": {"most": 2}, "calls_of:a": {"most": 4, "count": 5, "seconds": 30}}


class Play:
    """Any moves of a worker, a person and the clock, with what each may see; `check` is what holds between them."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = Random(seed)
        self.worker = world.worker("tools@a")
        self.held: list[Call] = []
        self.at = 0

    def ask(self) -> None:
        claim = self.world.running()
        kinds = self.random.choices([None, TOOL, MAIL, BOTH], k=self.random.randint(1, 4))
        options = {"max_attempts": 3}
        calls = [a_call(i, **options, **({} if gates is None else {"gates": gates})) for i, gates in enumerate(kinds)]
        self.world.commit(claim, calls, window=WINDOW)

    def claim(self) -> None:
        rows = self.world.db.rows(
            "SELECT id FROM longhaul_tools_toolcall WHERE status IN ('requested', 'retrying') AND publishes > 0 ORDER BY id"
        )
        if rows:
            self.world.beat(self.worker)
            [row] = self.random.sample(rows, 1)
            if (answer := self.world.try_call_claim(row["id"], worker=self.worker, window=WINDOW)) is not None:
                self.held.append(Call(row["id"], answer["attempt"], self.worker))

    def take(self) -> Call | None:
        return self.held.pop(self.random.randrange(len(self.held))) if self.held else None

    def settle(self) -> None:
        if call := self.take():
            self.world.settle(call)

    def retry(self) -> None:
        call = self.take()
        if call and call.attempt < 3:
            self.world.retry(call, self.random.choice([0, 4]) * SECOND)
        elif call:
            self.world.settle(call, "failed")

    def lose(self) -> None:
        if call := self.take():
            self.world.call_reclaim(call)

    def cancel(self) -> None:
        rows = self.world.db.rows("SELECT id FROM longhaul_runs_run WHERE status = 'waiting' ORDER BY id")
        if rows and self.random.random() < 0.3:
            [row] = self.random.sample(rows, 1)
            self.world.cancel(row["id"])
            there = set(self.world.calls(row["id"]))
            self.held = [call for call in self.held if call.id not in there]

    def release(self) -> None:
        let_out(self.world.db, WINDOW)

    def wait(self) -> None:
        self.at += self.random.choice([1, 3, 11])
        self.world.ahead(self.at * SECOND)

    def look(self) -> None:
        self.world.db.call_rows("longhaul_calls_due", p_limit=2, p_window=WINDOW)

    def check(self) -> None:
        rows = self.world.db.rows("SELECT * FROM longhaul_tools_toolcall WHERE status <> 'settled'")
        out = [row for row in rows if row["status"] != "running" and row["publishes"] > 0]
        places = [row for row in rows if row["status"] == "running"] + out
        for key, most in (("tool:refund", 2), ("calls_of:a", 4)):
            assert sum(key in (row["gates"] or {}) for row in places) <= most, key
        for key, count, seconds in (("tool:mail", 3, 20), ("calls_of:a", 5, 30)):
            times = [row["started_at"] for row in self.world.db.rows(
                "SELECT a.started_at FROM longhaul_tools_toolattempt a JOIN longhaul_tools_toolcall c ON c.id = a.call_id"
                " WHERE jsonb_exists(c.gates, %s) ORDER BY a.started_at", key)]  # fmt: skip
            assert all(b - a >= seconds * SECOND for a, b in zip(times, times[count:], strict=False)), (key, times)


@pytest.mark.parametrize("seed", range(6))
def test_given_any_moves_then_no_gate_is_overdrawn_and_the_rest_goes_out_at_last(world: World, seed: int) -> None:
    play = Play(world, seed)
    moves: list[Callable[[], None]] = [
        play.ask, play.claim, play.claim, play.claim, play.settle, play.settle, play.retry, play.lose, play.cancel,
        play.release, play.release, play.wait, play.look,
    ]  # fmt: skip
    for _ in range(150):
        play.random.choice(moves)()
        play.check()
    # with nobody but the watcher and one worker, all that waits is run
    for _ in range(2000):
        if not parked(world) and not world.db.rows("SELECT 1 FROM longhaul_tools_toolcall WHERE status <> 'settled'"):
            break
        play.wait()
        play.look()
        play.release()
        play.claim()
        play.settle()
        play.check()
    else:
        pytest.fail("somebody is stranded")
