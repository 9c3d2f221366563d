"""Readers of live runs: does every chunk reach each of them once, how soon, and at what cost?

    python -m benchmarks.streams --readers 1000 --runs 200 --rate 5 --seconds 30 --cut random

A model server says numbered chunks, an agents worker writes them, one web process serves all readers, who are a process of
their own and may be cut at random by TCP resets. A chunk's latency is from the model server's word to its reader. README.md
tells more.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from agents_project.processes import free_port
from benchmarks import command
from benchmarks.cpu import spent
from benchmarks.memory import resident, steady
from benchmarks.rig import PROJECT, READY_TIMEOUT, Rig, RigError
from benchmarks.workers import Workers, check_invariants, prepare

SCRIPT = "benchmarks.chunks:stamped"
SERVER = "web"
WARM_UP = 20  # readers, of a run of a few chunks, before memory counts
CUT_SECONDS = 5.0  # between two cuts of a reader, on average
STARTS_A_SECOND = 40.0  # readers and runs that are begun, of a busy machine
BAR_P50_MS, BAR_P99_MS, BAR_KB = 60, 300, 80


class Stage:
    """The web process, the workers, and a user with a key."""

    def __init__(self, rig: Rig, runs: int) -> None:
        prepare(rig)
        from django.contrib.auth import get_user_model

        from threads.authentication import create_key

        self.rig = rig
        self.owner: Any = get_user_model().objects.create(username="reader")
        self.key = create_key(self.owner, "benchmark")[1]
        self._workers = Workers(rig, greenlets=runs + 20)
        self._workers.up(agents=1, control=1)
        self.port = free_port(0)
        rig.start(
            SERVER, SERVER,
            ["-m", "uvicorn", "agents_project.asgi:application", "--port", str(self.port), "--no-access-log",
             "--log-level", "warning", "--backlog", "4096"],
            {"PGAPPNAME": SERVER, "LOG_LEVEL": "WARNING"},
        )  # fmt: skip
        self._workers.eventually(self._answers, "the web process answers", READY_TIMEOUT)

    def _answers(self) -> bool:
        self.rig.check_processes()
        try:
            return httpx2.get(f"http://127.0.0.1:{self.port}/healthz").status_code == 200
        except httpx2.TransportError:
            return False

    @property
    def pid(self) -> int:
        return self.rig.process(SERVER).pid

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def measure(self, readers: int, runs: int, rate: float, seconds: float, cut: float | None) -> command.Figures:
        """Let so many readers follow so many runs, each of which says `rate` chunks a second."""
        from django.db import transaction

        from benchmarks.longhaul_app.agents import speaker

        chunks = max(2, round(rate * seconds))
        lead = 3 + (readers + runs) / STARTS_A_SECOND
        idle = resident(self.pid)
        with transaction.atomic():
            ids = [str(speaker.start(f"chunks {chunks} {rate} {lead}", owner=self.owner).pk) for _ in range(runs)]
        plan = {"port": self.port, "key": self.key, "runs": ids, "readers": readers, "cut": cut, "chunks": chunks}
        client = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.streams_client"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT,
        )  # fmt: skip
        try:
            assert client.stdin is not None
            assert client.stdout is not None
            begun = time.monotonic()
            client.stdin.write(json.dumps(plan) + "\n")
            client.stdin.flush()
            if not client.stdout.readline():
                raise RigError(f"The readers ended: {client.wait()}.\n{self.rig.logs()}")
            opened = time.monotonic() - begun
            if opened > lead:
                raise RigError(
                    f"The readers needed {opened:.0f} s to come, more than the {lead:.0f} s before the first chunk."
                )
            # From the first chunk on, and while all of them come.
            time.sleep(max(0.0, lead - opened))
            before, since = self.rig.read(), time.monotonic()
            streaming, threads = steady(self.pid, timedelta(seconds=min(2.0, seconds / 2))), self.threads()
            time.sleep(max(0.0, seconds - (time.monotonic() - since)))
            cpu, took = spent(before.cpu, self.rig.read().cpu), time.monotonic() - since
            told = client.stdout.readline()
            if client.wait() or not told:
                raise RigError(f"The readers failed.\n{self.rig.logs()}")
        finally:
            if client.poll() is None:
                client.kill()
                client.wait()
        self.rig.check_processes()
        seen = json.loads(told)
        load = seen["cpu"] / seen["wall"]
        delivered = readers * chunks
        return {
            "readers": readers, "runs": runs, "rate": rate, "seconds": seconds, "chunks": chunks,
            "cut": "random" if cut else "none",
            **{name: seen[name] for name in ("lost", "doubled", "mismatched", "cuts", "p50_ms", "p99_ms")},
            "deliveries_per_s": round(delivered / seconds),
            "kb_per_reader": round((streaming - idle) / readers / 1000, 1),
            "web": {"idle_mb": round(idle / 1e6, 1), "streaming_mb": round(streaming / 1e6, 1), "threads": threads},
            # Shares of one core.
            "cpu": {role: round(cpu[role] / took, 3) for role in sorted(cpu) if role != "load"} | {"readers": round(load, 3)},
            "cpu_us_per_delivery": round(cpu[SERVER] / (delivered * took / seconds) * 1e6, 1),
        }  # fmt: skip


def measure(given: argparse.Namespace, console: Console) -> command.Figures:
    if given.quick:
        given.readers, given.runs, given.seconds = min(given.readers, 100), min(given.runs, 20), min(given.seconds, 6.0)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # of the web process too, which inherits it
    with Rig(SCRIPT) as rig:
        stage = Stage(rig, given.runs)
        console.log("warm-up")
        stage.measure(WARM_UP, 2, 5, 1, None)
        console.log(f"{given.readers} readers of {given.runs} runs")
        cut = CUT_SECONDS if given.cut == "random" else None
        found = stage.measure(given.readers, given.runs, given.rate, given.seconds, cut)
        violations = check_invariants()
    return {"benchmark": "streams", **found, "violations": violations}


def tables(found: command.Figures) -> list[Table]:
    table = Table(
        title=f"{found['readers']} readers of {found['runs']} runs of {found['rate']:g} chunks/s, cut: {found['cut']}"
    )
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("lost, doubled, mismatched", f"{found['lost']}, {found['doubled']}, {found['mismatched']}")
    table.add_row("cuts", str(found["cuts"]))
    table.add_row(f"chunk to reader, p50 (bar: {BAR_P50_MS})", f"{found['p50_ms']} ms")
    table.add_row(f"chunk to reader, p99 (bar: {BAR_P99_MS})", f"{found['p99_ms']} ms")
    table.add_row(f"memory a reader (bar: {BAR_KB})", f"{found['kb_per_reader']} kB")
    table.add_row("threads of the web process", str(found["web"]["threads"]))
    table.add_row("deliveries", f"{found['deliveries_per_s']}/s")
    table.add_row("CPU of web a delivery", f"{found['cpu_us_per_delivery']} us")
    for role, share in found["cpu"].items():
        table.add_row(f"cores: {role}", f"{share:.2f}")
    return [table]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streams", description=__doc__.partition("\n")[0])
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--rate", type=float, default=5.0, help="chunks a second, of each run")
    parser.add_argument("--seconds", type=float, default=30.0, help="that each run speaks")
    parser.add_argument("--cut", choices=["none", "random"], default="none", help="reset the readers' connections")
    return command.run(parser, measure, tables, arguments, quick="at most 100 readers of 20 runs; under 50 s")


if __name__ == "__main__":
    sys.exit(main())
