"""A deploy in the middle of the work: every worker is replaced, one after another, under 50 runs that stream and call tools.

The new worker is up before the old one gets SIGTERM. No run may fail or lose a step; what is measured is how long a run
stands still when its leg was drained, until its next leg. README.md tells how.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.rig import Rig, RigError
from benchmarks.speech import ENOUGH, SENTENCE
from benchmarks.workers import Workers, check_invariants, percentile, prepare, spread

SCRIPT = "benchmarks.speech:told"
RUNS = 50
# What the text of a step is streamed over; then a tool is called. The grace of a drain is 5 s: the long ones may be cut. Short
# and long ones come in pairs, for two workers take messages by turns, and the long ones are of many lengths, so that
# they are not all near their ends at the same moment.
STEP_SECONDS = tuple(2.0 if number % 4 < 2 else 8.0 + number % 9 * 0.5 for number in range(36))
WORKERS = {"agents": 2, "tools": 2, "control": 1}
EXIT_TIMEOUT = timedelta(seconds=30)  # the grace of a drain is 5 s; a busy machine needs seconds more to end a Python
END_TIMEOUT = timedelta(seconds=90)


@dataclass(frozen=True)
class Stop:
    """The end of one worker: when it got SIGTERM by Postgres's clock, its exit code, the seconds that it took."""

    name: str
    since: float
    code: int
    seconds: float


class Deploy:
    """The runs, the restarts, and what the rows say of them afterwards."""

    def __init__(self, rig: Rig, enough: Path) -> None:
        self._rig = rig
        self._enough = enough
        self.workers = Workers(rig)
        self.runs: list[UUID] = []

    def start(self, runs: int, steps: int = 900, seconds: Sequence[float] = STEP_SECONDS) -> None:
        from benchmarks.longhaul_app.agents import killed

        self.runs = [
            killed.start(f"call look {steps} {seconds[number % len(seconds)]}", owner=None).pk for number in range(runs)
        ]

    def streaming(self) -> None:
        """Wait until every run has said something."""
        query = "SELECT count(DISTINCT run_id) FROM longhaul_runs_event WHERE run_id = ANY (%s) AND type = 'text.delta'"
        self.workers.eventually(lambda: self._rows(query, self.runs)[0][0] == len(self.runs), "all runs stream")

    def restart(self, at_once: bool) -> Iterator[Stop]:
        """Replace the workers one after another, by kind; the new one is present before the old one is told to go.

        `at_once`: all the new ones are brought up before the first old one goes, which takes less time.
        """
        old = {kind: self.workers.names(kind) for kind in WORKERS}
        if at_once:
            self.workers.up(**{kind: count * 2 for kind, count in WORKERS.items()})
        for kind, names in old.items():
            for name in names:
                self.workers.up(**{kind: WORKERS[kind] + 1})
                since = self._rig.now()
                code, seconds = self.workers.stop(name, EXIT_TIMEOUT)
                yield Stop(name, since, code, seconds)

    def finish(self) -> None:
        """Let the runs come to their end, and wait for it."""
        self._enough.touch()
        live = "SELECT count(*) FROM longhaul_runs_run WHERE id = ANY (%s) AND finished_at IS NULL"
        self.workers.eventually(lambda: self._rows(live, self.runs)[0][0] == 0, "all runs end", END_TIMEOUT)
        self._enough.unlink()

    def drained(self, stops: Sequence[Stop]) -> list[tuple[str, float]]:
        """Return the legs that the stopped workers ended, each by its reason, and how long its run then waited for the next.

        In seconds, from the moment that the run was queued: of a leg that was drained (reason `drained`) that is its end; of
        one that was done with its step (`tools`), and does not linger in a worker that drains, the end of the step's calls.
        """
        found: list[tuple[str, float]] = []
        for stop in stops:
            found += self._rows(
                "SELECT leg.reason, extract(epoch FROM next.started_at - (SELECT max(at) FROM longhaul_runs_event"
                "  WHERE run_id = next.run_id AND type = 'run.queued' AND at <= next.started_at))::float8"
                " FROM longhaul_runs_leg leg"
                " JOIN longhaul_runs_leg next ON next.run_id = leg.run_id AND next.number = leg.number + 1"
                " WHERE leg.worker = %s AND leg.ended_at >= to_timestamp(%s) AND leg.run_id = ANY (%s)",
                f"{stop.name}@bench",
                stop.since,
                self.runs,
            )
        return found

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


def measure(rig: Rig, enough: Path, console: Console, quick: bool) -> dict[str, Any]:
    prepare(rig)
    deploy = Deploy(rig, enough)
    console.log("waiting for the workers")
    deploy.workers.up(**WORKERS)
    deploy.start(4, steps=2, seconds=(0.1,))  # both of each kind have imported, connected and prepared
    deploy.finish()
    deploy.start(RUNS)
    deploy.streaming()
    stops: list[Stop] = []
    for stop in deploy.restart(at_once=quick):
        console.log(f"{stop.name} ended with {stop.code} after {stop.seconds:.1f} s")
        stops.append(stop)
    deploy.finish()
    faults = deploy.faults()
    faults += [f"{stop.name} ended with {stop.code}" for stop in stops if stop.code != 0]
    for stop in stops:
        said = rig.log(stop.name)
        if "ERROR" in said or "CRITICAL" in said or "Traceback" in said:
            faults.append(f"{stop.name} logged an error:\n{said}")
    legs = deploy.drained(stops)
    times = [seconds for _, seconds in legs]
    handed_on = [seconds for reason, seconds in legs if reason == "drained"]
    if not handed_on:
        faults.append("no leg was handed on: the drains found no stream to cut")
    if faults:
        raise RigError("\n".join(faults))
    return {
        "benchmark": "rolling_restart",
        "drain": {**spread(times), "p99_ms": percentile(times, 99)},
        "drain_handed_on": {**spread(handed_on), "p99_ms": percentile(handed_on, 99)},
        "runs": RUNS,
        "steps": deploy.steps(),
        "exit_s": {
            kind: round(max(stop.seconds for stop in stops if stop.name.startswith(kind)), 1) for kind in WORKERS
        },
    }


def tables(found: dict[str, Any]) -> list[Table]:
    table = Table(title=f"a rolling restart under {found['runs']} runs, {found['steps']} steps: until the next leg, ms")
    table.add_column("")
    for heading in ("n", "p50", "p90", "p99", "max", "goal: p99"):
        table.add_column(heading, justify="right")
    for label, key in (
        ("legs that ended in a worker that drains", "drain"),
        ("of these handed on: cut, or at a boundary", "drain_handed_on"),
    ):
        values = found[key]
        times = (f"{values[name]:.0f}" for name in ("p50_ms", "p90_ms", "p99_ms", "max_ms"))
        table.add_row(label, str(values["n"]), *times, "< 1000")
    exits = Table(title="longest from SIGTERM to the exit, s")
    for kind in found["exit_s"]:
        exits.add_column(kind, justify="right")
    exits.add_row(*(f"{seconds:.1f}" for seconds in found["exit_s"].values()))
    return [table, exits]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rolling_restart", description=__doc__)

    def measured(given: argparse.Namespace, console: Console) -> command.Figures:
        with tempfile.TemporaryDirectory(prefix="longhaul-bench-") as folder:
            enough = Path(folder) / "enough"
            os.environ[ENOUGH] = str(enough)
            with Rig(SCRIPT) as rig:
                return measure(rig, enough, console, given.quick)

    quick = "all new workers start at once: ends in under 55 s"
    return command.run(parser, measured, tables, arguments, quick=quick)


if __name__ == "__main__":
    sys.exit(main())
