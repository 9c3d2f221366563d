"""What a streaming run costs an agents worker in memory: 500 runs at one chunk a second, less the same worker idle.

RSS is read from the kernel (VmRSS), of the one process that a gevent worker is. README.md tells how it is measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from uuid import UUID

from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.rig import Rig, RigError
from benchmarks.workers import Workers, prepare

SCRIPT = "benchmarks.script:slow"
CHUNKS_PER_S = 1.0
STREAM_SECONDS = 30
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


class Streams:
    """One agents worker, as a project would start it for so many streams, and one control worker."""

    def __init__(self, rig: Rig, runs: int) -> None:
        prepare(rig)
        self._rig = rig
        self._workers = Workers(rig, greenlets=runs + 20)
        self._workers.up(agents=1, control=1)
        self.pid = rig.process(self._workers.names("agents")[0]).pid

    def start(self, runs: int, seconds: int) -> list[UUID]:
        """Start runs whose one answer takes so many seconds; return their ids when all of them stream."""
        from django.db import transaction

        from benchmarks.longhaul_app.agents import speaker

        with transaction.atomic():
            ids = [speaker.start(f"Speak for {seconds} seconds.", owner=None).pk for _ in range(runs)]
        # A first chunk is a row: the run streams, and its buffers have been used.
        spoken = (
            "SELECT count(DISTINCT run_id) FROM longhaul_runs_event WHERE run_id = ANY (%s) AND ordinal IS NOT NULL"
        )
        self._workers.eventually(lambda: self._count(spoken, ids) == runs, "all runs stream", GATHER)
        return ids

    def still(self, ids: Sequence[UUID]) -> int:
        """Return how many of them stream."""
        return self._count("SELECT count(*) FROM longhaul_runs_run WHERE id = ANY (%s) AND status = 'running'", ids)

    def finish(self, ids: Sequence[UUID], within: timedelta) -> None:
        """Wait until all of them have completed."""
        ended = "SELECT count(*) FROM longhaul_runs_run WHERE id = ANY (%s) AND status = 'completed'"
        self._workers.eventually(lambda: self._count(ended, ids) == len(ids), "all runs complete", within)

    def _count(self, query: str, ids: Sequence[UUID]) -> int:
        row = self._rig.connection.execute(query.encode(), [list(ids)]).fetchone()
        assert row is not None
        return int(row[0])


def measure(streams: Streams, runs: int) -> Round:
    idle = steady(streams.pid, timedelta(seconds=1))
    ids = streams.start(runs, STREAM_SECONDS)
    streaming = steady(streams.pid, timedelta(seconds=5))
    if streams.still(ids) != runs:
        raise RigError(f"Only {streams.still(ids)} of {runs} runs still streamed; they were too short.")
    streams.finish(ids, timedelta(seconds=STREAM_SECONDS) + GATHER)
    return Round(runs, idle, streaming, steady(streams.pid, SETTLE))


def figures(rounds: Sequence[Round]) -> command.Figures:
    first = rounds[0]  # a later one finds the memory of the one before still resident
    return {
        "benchmark": "memory",
        "runs": first.runs,
        "n": len(rounds),
        "kb_per_run": round(first.kb_per_run, 1),
        "idle_mb": round(first.idle / 1e6, 1),
        "streaming_mb": round(first.streaming / 1e6, 1),
        "rounds": [{"idle": each.idle, "streaming": each.streaming, "after": each.after} for each in rounds],
    }


def tables(found: command.Figures) -> list[Table]:
    runs = found["runs"]
    table = Table(
        title=f"RSS of an agents worker, {runs} runs at {CHUNKS_PER_S:g} chunk/s: {found['kb_per_run']:.0f} kB a run (bar: {BAR_KB})"
    )
    for heading in ("round", "idle MB", "streaming MB", "after MB", "kB a run over this idle"):
        table.add_column(heading, justify="right")
    for number, each in enumerate(found["rounds"], 1):
        sizes = [f"{each[key] / 1e6:.1f}" for key in ("idle", "streaming", "after")]
        table.add_row(str(number), *sizes, f"{(each['streaming'] - each['idle']) / runs / 1000:.0f}")
    return [table]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS, help=f"streams at once (default {RUNS})")

    def measured(given: argparse.Namespace, console: Console) -> command.Figures:
        rounds: list[Round] = []
        with Rig(SCRIPT) as rig:
            streams = Streams(rig, given.runs)
            # So that what is made once for all runs is not counted as theirs.
            streams.finish(streams.start(WARM_UP_RUNS, 2), GATHER)
            for number in range(1, 2 if given.quick else 4):
                rounds.append(measure(streams, given.runs))
                console.log(f"{number}: {rounds[-1].kb_per_run:.0f} kB a run")
        return figures(rounds)

    return command.run(parser, measured, tables, arguments, quick="one round: ends in under 75 s")


if __name__ == "__main__":
    sys.exit(main())
