"""A deploy in the middle of the work: every worker is replaced, one after another, under 50 runs that stream and call tools.

The new worker is up before the old one gets SIGTERM. No run may fail or lose a step; what is measured is how long a run
stands still when its leg was drained, until its next leg. README.md tells how.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.table import Table

from benchmarks.rig import Rig, RigError
from benchmarks.speech import ENOUGH, SENTENCE
from benchmarks.workers import Workers, check_invariants, percentile, prepare, spread

SCRIPT = "benchmarks.speech:told"
RUNS = 50
STEP_SECONDS = 2.0  # that the text of a step is streamed over; then a tool is called
WORKERS = {"agents": 2, "tools": 2, "control": 1}
EXIT_TIMEOUT = timedelta(seconds=30)  # the grace of a drain is 5 s; a busy machine needs seconds more to end a Python
END_TIMEOUT = timedelta(seconds=90)


@dataclass(frozen=True)
class Stop:
    """The end of one worker after SIGTERM."""

    name: str
    code: int
    seconds: float


class Deploy:
    """The runs, the restarts, and what the rows say of them afterwards."""

    def __init__(self, rig: Rig, enough: Path) -> None:
        self._rig = rig
        self._enough = enough
        self.workers = Workers(rig)
        self.runs: list[UUID] = []

    def start(self, runs: int, steps: int = 900, seconds: float = STEP_SECONDS) -> None:
        from benchmarks.longhaul_app.agents import killed

        self.runs = [killed.start(f"call look {steps} {seconds}", owner=None).pk for _ in range(runs)]

    def streaming(self) -> None:
        """Wait until every run has said something."""
        query = "SELECT count(DISTINCT run_id) FROM longhaul_runs_event WHERE run_id = ANY (%s) AND type = 'text.delta'"
        self.workers.eventually(lambda: self._rows(query, self.runs)[0][0] == len(self.runs), "all runs stream")

    def restart(self, kind: str) -> list[Stop]:
        """Replace the workers of one kind, one after another; the new one is present before the old one is told to go."""
        stops = []
        for old in self.workers.names(kind):
            self.workers.up(**{kind: WORKERS[kind] + 1})
            code, seconds = self.workers.stop(old, EXIT_TIMEOUT)
            stops.append(Stop(old, code, seconds))
        return stops

    def finish(self) -> None:
        """Let the runs come to their end, and wait for it."""
        self._enough.touch()
        live = "SELECT count(*) FROM longhaul_runs_run WHERE id = ANY (%s) AND finished_at IS NULL"
        self.workers.eventually(lambda: self._rows(live, self.runs)[0][0] == 0, "all runs end", END_TIMEOUT)
        self._enough.unlink()

    def drained(self) -> list[float]:
        """Return how long each drained leg was away, in seconds: from its end to the begin of the run's next leg."""
        return [
            row[0]
            for row in self._rows(
                "SELECT extract(epoch FROM next.started_at - leg.ended_at)::float8 FROM longhaul_runs_leg leg"
                " JOIN longhaul_runs_leg next ON next.run_id = leg.run_id AND next.number = leg.number + 1"
                " WHERE leg.reason = 'drained' AND leg.run_id = ANY (%s)",
                self.runs,
            )
        ]

    def faults(self) -> list[str]:
        """Return what a deploy must not do and did, in words; empty when all is well."""
        from runs.models import Leg, Run, Step
        from threads.models import Message
        from tools.models import ToolAttempt, ToolCall

        found = []
        runs = Run.objects.filter(pk__in=self.runs)
        ends = Counter(runs.values_list("status", "stop_reason"))
        if ends != {("completed", "end_turn"): len(self.runs)}:
            found.append(f"runs ended as {dict(ends)}")
        if lost := runs.exclude(lost=0).count():
            found.append(f"{lost} runs count toward poison")
        reasons = Counter(Leg.objects.filter(run_id__in=self.runs).values_list("reason", flat=True))
        if odd := set(reasons) - {"drained", "tools", "budget", "finished"}:
            found.append(f"legs ended as {odd}")
        attempts = Counter(ToolAttempt.objects.filter(call__run_id__in=self.runs).values_list("number", "outcome"))
        calls = ToolCall.objects.filter(run_id__in=self.runs).count()
        if attempts != {(1, "success"): calls}:
            found.append(f"attempts of {calls} calls: {dict(attempts)}")
        messages = Message.objects.filter(run_id__in=self.runs, role="assistant", status="completed")
        texts = Counter(message.text == SENTENCE for message in messages)
        steps = Step.objects.filter(run_id__in=self.runs).count()
        if texts != {True: steps}:
            found.append(f"of {steps} steps {texts[True]} have their text, {texts[False]} another one")
        if steps != sum(runs.values_list("steps", flat=True)) or steps != calls + len(self.runs):
            found.append(f"{steps} steps with {calls} calls of {len(self.runs)} runs")
        if violations := check_invariants():
            found.append(f"check_runs counts {violations} violations")
        return found

    def steps(self) -> int:
        return int(self._rows("SELECT sum(steps) FROM longhaul_runs_run WHERE id = ANY (%s)", self.runs)[0][0])

    def _rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return self._rig.connection.execute(query.encode(), parameters).fetchall()


def measure(rig: Rig, enough: Path, console: Console) -> dict[str, Any]:
    prepare(rig)
    deploy = Deploy(rig, enough)
    console.log("waiting for the workers")
    deploy.workers.up(**WORKERS)
    deploy.start(4, steps=2, seconds=0.1)  # both of each kind have imported, connected and prepared
    deploy.finish()
    deploy.start(RUNS)
    deploy.streaming()
    stops: list[Stop] = []
    for kind in WORKERS:
        for stop in deploy.restart(kind):
            console.log(f"{stop.name} ended with {stop.code} after {stop.seconds:.1f} s")
            stops.append(stop)
    deploy.finish()
    faults = deploy.faults()
    faults += [f"{stop.name} ended with {stop.code}" for stop in stops if stop.code != 0]
    for stop in stops:
        said = rig.log(stop.name)
        if "ERROR" in said or "CRITICAL" in said or "Traceback" in said:
            faults.append(f"{stop.name} logged an error:\n{said}")
    times = deploy.drained()
    if not times:
        faults.append("no leg was drained")
    if faults:
        raise RigError("\n".join(faults))
    return {
        "benchmark": "rolling_restart",
        "drain": {**spread(times), "p99_ms": percentile(times, 99)},
        "runs": RUNS,
        "steps": deploy.steps(),
        "exit_s": {
            kind: round(max(stop.seconds for stop in stops if stop.name.startswith(kind)), 1) for kind in WORKERS
        },
    }


def tables(found: dict[str, Any]) -> list[Table]:
    table = Table(title=f"a rolling restart under {found['runs']} runs: from a drained leg to the next one, ms")
    for heading in ("n", "p50", "p90", "p99", "max", "goal: p99", "steps, none lost", "longest exit, s"):
        table.add_column(heading, justify="right")
    drain = found["drain"]
    table.add_row(
        str(drain["n"]),
        *(f"{drain[name]:.0f}" for name in ("p50_ms", "p90_ms", "p99_ms", "max_ms")),
        "< 1000",
        str(found["steps"]),
        ", ".join(f"{kind} {seconds}" for kind, seconds in found["exit_s"].items()),
    )
    return [table]


def main(arguments: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rolling_restart", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="there is only one form, which ends in under 55 s")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    given = parser.parse_args(arguments)
    console = Console(stderr=True, log_path=False)
    out = Console()
    if not out.is_terminal:
        out.width = 160  # a pipe has no width; rich would take 80
    try:
        with tempfile.TemporaryDirectory(prefix="longhaul-bench-") as folder:
            enough = Path(folder) / "enough"
            os.environ[ENOUGH] = str(enough)
            with Rig(SCRIPT) as rig:
                found = measure(rig, enough, console)
    except RigError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    found["duration_s"] = round(time.monotonic() - begun, 1)
    if given.json:
        print(json.dumps(found))
        return 0
    for table in tables(found):
        out.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
