"""Whether a step costs the same late in a thread as early: step 1,000 of one thread against step 10.

Some runs of 1,000 steps at once, each on a thread of its own. The cost is Longhaul's: CPU of the workers and of Postgres,
and the wall time of a step less the time in which its model and its tool have the word. README.md tells more.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import median

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import command
from benchmarks.cpu import spent
from benchmarks.forms import Longhaul
from benchmarks.rig import Reading, Rig, RigError
from benchmarks.script import prompt
from benchmarks.step_cost import OUTSIDE, WARM_UP_RUNS

SCRIPT = "benchmarks.script:count"
BAR = 1.2
RUNS = 8  # at once
TIMEOUT = timedelta(minutes=8)

# A step's wall time by its events: from the answer's end to the call's start, and from the call's end to the next
# turn. Between them the tool has the word, and before them the model.
GAPS = """
WITH marks AS (
    SELECT run_id, seq, type, at, payload->>'role' AS role,
           lag(at) OVER w AS before, lag(type) OVER w AS said_before,
           count(*) FILTER (WHERE type = 'tool_call.settled') OVER w AS step
    FROM longhaul_runs_event
    WHERE run_id = ANY(%(runs)s) AND (type IN ('tool_call.started', 'tool_call.settled')
        OR type IN ('message.created', 'message.completed') AND payload->>'role' = 'assistant')
    WINDOW w AS (PARTITION BY run_id ORDER BY seq))
SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM at - before)) FILTER (WHERE type = 'tool_call.started')
     + percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM at - before)) FILTER (WHERE type = 'message.created')
FROM marks WHERE step BETWEEN %(first)s AND %(last)s
"""


@dataclass(frozen=True)
class Stretch:
    """From which step to which of a thread. A run goes on a little after it, so that no run's end is in it."""

    first: int
    last: int
    groups: int  # of runs, one after another: a short stretch needs several to be measured

    @property
    def run_steps(self) -> int:
        return self.last + 5


@dataclass(frozen=True)
class Cost:
    """What the steps of a stretch took. `cpu`: seconds by role; `wall`: Longhaul's own seconds a step."""

    steps: int
    cpu: dict[str, float]
    wall: float

    @property
    def cpu_ms(self) -> float:
        return sum(seconds for role, seconds in self.cpu.items() if role not in OUTSIDE) * 1000 / self.steps


EARLY = Stretch(first=3, last=17, groups=6)
WIDTH = 75  # steps of the late stretch


class Climb:
    """Groups of runs that go side by side, each on a thread of its own, and what was spent over a stretch of them."""

    def __init__(self, rig: Rig, runs: int, progress: Progress) -> None:
        self._rig = rig
        self._runs = runs
        self._progress = progress

    def measure(self, stretch: Stretch) -> Cost:
        costs = [self._group(stretch) for _ in range(stretch.groups)]
        return Cost(
            steps=sum(cost.steps for cost in costs),
            cpu={role: sum(cost.cpu[role] for cost in costs) for role in costs[0].cpu},
            wall=median(cost.wall for cost in costs),
        )

    def _group(self, stretch: Stretch) -> Cost:
        from django.db import transaction

        from benchmarks.longhaul_app.agents import counter

        with transaction.atomic():
            ids = [counter.start(prompt(stretch.run_steps), owner=None).id for _ in range(self._runs)]
        total = stretch.run_steps * self._runs
        task = self._progress.add_task(f"to step {stretch.run_steps}", total=total)
        marks = [stretch.first * self._runs, stretch.last * self._runs]
        seen: list[tuple[int, Reading]] = []
        deadline = time.monotonic() + TIMEOUT.total_seconds()
        while True:
            row = self._rig.connection.execute(
                "SELECT sum(steps)::int, count(*) FILTER (WHERE status = 'completed') FROM longhaul_runs_run WHERE id = ANY(%s)",
                [ids],
            ).fetchone()
            assert row is not None
            done, completed = row
            if len(seen) < len(marks) and done >= marks[len(seen)]:
                seen.append((done, self._rig.read()))
            self._progress.update(task, completed=done)
            if completed == self._runs:
                break
            self._rig.check_processes()
            if time.monotonic() > deadline:
                raise RigError(f"{done} of {total} steps in {TIMEOUT}.\n{self._rig.logs()}")
            time.sleep(0.02)
        self._progress.remove_task(task)
        if len(seen) < len(marks):
            raise RigError(f"The runs were over before their stretch was seen: {done} steps.")
        (before, begin), (after, end) = seen
        row = self._rig.connection.execute(GAPS, {"runs": ids, "first": stretch.first, "last": stretch.last}).fetchone()
        assert row is not None
        return Cost(after - before, spent(begin.cpu, end.cpu), float(row[0]))


def figures(measured: Sequence[tuple[Cost, Cost]], late: Stretch) -> command.Figures:
    roles = [role for role in measured[0][0].cpu if role not in OUTSIDE]
    by_role = {
        role: _pair([tuple(each.cpu[role] * 1000 / each.steps for each in pair) for pair in measured]) for role in roles
    }
    cpu = _pair([(early.cpu_ms, late.cpu_ms) for early, late in measured])
    return {
        "benchmark": "flat_cost",
        "runs_at_once": RUNS,
        "n": len(measured),
        "early_steps": [EARLY.first, EARLY.last],
        "late_steps": [late.first, late.last],
        "ratio": cpu["ratio"],
        "cpu_ms": cpu,
        "own_wall_ms": _pair([(early.wall * 1000, late.wall * 1000) for early, late in measured]),
        "cpu_ms_by_role": by_role,
    }


def _pair(values: Sequence[tuple[float, ...]]) -> dict[str, float]:
    """Return the medians of early and late values, and of their ratios."""
    early, late = (median(pair[place] for pair in values) for place in (0, 1))
    ratio = median(pair[1] / pair[0] if pair[0] else 1.0 for pair in values)
    return {"early": round(early, 3), "late": round(late, 3), "ratio": round(ratio, 3)}


def tables(found: command.Figures) -> list[Table]:
    table = Table(title=f"{RUNS} runs at once, medians, n = {found['n']} (bar: {BAR})")
    for heading in ("", "step 10", f"step {found['late_steps'][1]:,}", "ratio"):
        table.add_column(heading, justify="right")
    rows = {"CPU ms a step": found["cpu_ms"], "own wall ms a step": found["own_wall_ms"]}
    rows |= {f"CPU ms: {role}": pair for role, pair in found["cpu_ms_by_role"].items()}
    for title, pair in rows.items():
        table.add_row(title, *(f"{pair[key]:.2f}" for key in ("early", "late", "ratio")))
    return [table]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flat_cost", description=__doc__)
    parser.add_argument("--late", type=int, default=1_000, help="the step that is compared with step 10 (default 1000)")

    def measured(given: argparse.Namespace, console: Console) -> command.Figures:
        late = Stretch(first=given.late - WIDTH, last=given.late, groups=1)
        measured: list[tuple[Cost, Cost]] = []
        with Rig(SCRIPT) as rig:
            form = Longhaul(rig)
            form.start()
            form.run(WARM_UP_RUNS, 10)
            for _ in range(1 if given.quick else 5):
                with Progress(console=console, transient=True) as progress:
                    climb = Climb(rig, RUNS, progress)
                    # One after the other, for the machine changes its speed.
                    far, near = climb.measure(late), climb.measure(EARLY)
                measured.append((near, far))
                console.log(f"step 10: {near.cpu_ms:.2f} ms CPU; step {late.last:,}: {far.cpu_ms:.2f} ms CPU")
        return figures(measured, late)

    return command.run(parser, measured, tables, arguments, quick="one round: ends in under 75 s")


if __name__ == "__main__":
    sys.exit(main())
