"""What a streaming run costs an agents worker in memory: 500 runs at one chunk a second, less the same worker idle.

RSS is read from the kernel (VmRSS), of the one process that a gevent worker is. README.md tells how it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rig import Rig, RigError
from benchmarks.step_cost import QUIET, Longhaul

SCRIPT = "benchmarks.script:slow"
CHUNK_SECONDS = 1.0
RUNS = 500
WARM_UP_RUNS = 20
BAR_KB = 150
GATHER = timedelta(seconds=90)  # until all runs stream: a busy machine starts some 50 a second
SETTLE = timedelta(seconds=5)  # after the last run has ended: what waits to be closed is closed


@dataclass(frozen=True)
class Round:
    """One ascent. Bytes; `idle` is the worker's RSS before it, `streaming` while all runs stream, `after` when all ended."""

    runs: int
    idle: int
    streaming: int
    after: int

    @property
    def kb_per_run(self) -> float:
        return (self.streaming - self.idle) / self.runs / 1000


def resident(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RigError(f"The kernel does not tell the memory of process {pid}.")


def steady(pid: int, wait: timedelta) -> int:
    """Return the median of what is resident over a while, looked at 10 times a second."""
    until = time.monotonic() + wait.total_seconds()
    seen = []
    while time.monotonic() < until:
        seen.append(resident(pid))
        time.sleep(0.1)
    return int(median(seen))


class Worker:
    """One agents worker, as a project would start it for so many streams, and one control worker."""

    def __init__(self, rig: Rig, runs: int) -> None:
        self._rig = rig
        self._form = Longhaul(rig)  # the database and Django
        self._runs = runs

    def start(self) -> None:
        common = ["-m", "celery", "-A", "agents_project", "worker"]
        greenlets = ["-Q", "longhaul.agents", "-P", "gevent", "-c", str(self._runs + 20), "-n", "agents@bench"]
        self._rig.start("agents", "agents", [*common, *greenlets, *QUIET], {"LONGHAUL_DB_POOL": "1"})
        threads = ["-Q", "longhaul.control", "-P", "threads", "-c", "2", "-n", "control@bench"]
        self._rig.start("control", "control", [*common, *threads, *QUIET])

    @property
    def pid(self) -> int:
        return self._rig.pid("agents")

    def stream(self, runs: int, seconds: int) -> list[Any]:
        """Start runs whose one answer takes so many seconds; return their ids when all of them stream."""
        from django.db import transaction

        from benchmarks.longhaul_app.agents import speaker

        with transaction.atomic():
            ids = [speaker.start(f"Speak for {seconds} seconds.", owner=None).id for _ in range(runs)]
        # A first chunk is a row: the run streams, and its buffers have been used.
        self._await(
            "SELECT count(DISTINCT run_id) FROM longhaul_runs_event WHERE run_id = ANY(%s) AND ordinal IS NOT NULL",
            ids,
            GATHER,
        )
        return ids

    def finished(self, ids: Sequence[Any], within: timedelta) -> None:
        self._await("SELECT count(*) FROM longhaul_runs_run WHERE id = ANY(%s) AND status = 'completed'", ids, within)

    def streaming(self, ids: Sequence[Any]) -> int:
        row = self._rig.connection.execute(
            "SELECT count(*) FROM longhaul_runs_run WHERE id = ANY(%s) AND status = 'running'", [list(ids)]
        ).fetchone()
        assert row is not None
        return int(row[0])

    def _await(self, query: str, ids: Sequence[Any], within: timedelta) -> None:
        deadline = time.monotonic() + within.total_seconds()
        while True:
            row = self._rig.connection.execute(query.encode(), [list(ids)]).fetchone()
            assert row is not None
            if row[0] == len(ids):
                return
            self._rig.check_processes()
            if time.monotonic() > deadline:
                raise RigError(f"{row[0]} of {len(ids)} runs came so far in {within}.\n{self._rig.logs()}")
            time.sleep(0.1)


def measure(worker: Worker, runs: int, seconds: int) -> Round:
    idle = steady(worker.pid, timedelta(seconds=1))
    ids = worker.stream(runs, seconds)
    streaming = steady(worker.pid, timedelta(seconds=5))
    if worker.streaming(ids) != runs:
        raise RigError(f"Only {worker.streaming(ids)} of {runs} runs still streamed; they were too short.")
    worker.finished(ids, timedelta(seconds=seconds) + GATHER)
    return Round(runs, idle, streaming, steady(worker.pid, SETTLE))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round; ends in under 75 s")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    parser.add_argument("--runs", type=int, default=RUNS, help="streams at once")
    given = parser.parse_args(arguments)
    console = Console(stderr=True, log_path=False)
    rounds: list[Round] = []
    try:
        with Rig(SCRIPT) as rig:
            worker = Worker(rig, given.runs)
            worker.start()
            # So that what is made once for all runs is not counted as theirs.
            worker.finished(worker.stream(WARM_UP_RUNS, 2), GATHER)
            time.sleep(SETTLE.total_seconds())
            for number in range(1 if given.quick else 3):
                rounds.append(measure(worker, given.runs, 30))
                console.log(f"{number + 1}: {rounds[-1].kb_per_run:.0f} KB a run")
    except RigError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    first = rounds[0]  # later ones find the memory of the one before still resident
    found = {
        "benchmark": "memory",
        "runs": given.runs,
        "n": len(rounds),
        "kb_per_run": round(first.kb_per_run, 1),
        "idle_mb": round(first.idle / 1e6, 1),
        "streaming_mb": round(first.streaming / 1e6, 1),
        "rounds": [{"idle": each.idle, "streaming": each.streaming, "after": each.after} for each in rounds],
    }
    if given.json:
        print(json.dumps(found))
        return 0
    table = Table(
        title=f"RSS of an agents worker with {given.runs} runs at {CHUNK_SECONDS:g} chunk/s (bar: {BAR_KB} KB a run)"
    )
    for heading in ("round", "idle MB", "streaming MB", "after MB", "KB a run, over this idle"):
        table.add_column(heading, justify="right")
    for number, each in enumerate(rounds, 1):
        table.add_row(
            str(number),
            *(f"{size / 1e6:.1f}" for size in (each.idle, each.streaming, each.after)),
            f"{each.kb_per_run:.0f}",
        )
    Console(width=None if os.isatty(1) else 160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
