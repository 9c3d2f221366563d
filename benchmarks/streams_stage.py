"""What `benchmarks.streams` and `benchmarks.delta_writes` measure on: processes, loads, readers, and what they saw.

A load is said by the metronome, which waits until all runs have asked it and all readers are there. CPU is read from the
moment at which the first chunk is due until the last one is.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import httpx2
from rich.console import Console

from agents_project.processes import free_port
from benchmarks import relay
from benchmarks.command import Figures
from benchmarks.cpu import ProcessTable, spent
from benchmarks.memory import resident, steady
from benchmarks.rig import PROJECT, READY_TIMEOUT, Rig, RigError
from benchmarks.workers import Workers

SERVER = "benchmarks.metronome"
WEB = "web"
OURS = ("web", "agents", "control", "postgres", "valkey")
RELAYS = ("relay", "relay web", "valkey")
APART = ("readers", "model", "load")  # who makes the load, and listens to it
SETTLED = 0.2  # of a load's time, and at most SETTLED_SECONDS: until what is carried a second is counted
SETTLED_SECONDS = 2.0
CORES = os.cpu_count() or 1
WAIT = timedelta(seconds=180)  # until all runs have asked the model and all readers are there
DRAIN = timedelta(seconds=240)  # after the last chunk was due, until all have it
MB = 1e6


@dataclass(frozen=True)
class Load:
    """`rate`: chunks a second of each run. `cut`: mean seconds between two resets of a reader; None: none."""

    readers: int
    runs: int
    rate: float
    seconds: float
    cut: float | None = None

    @property
    def chunks(self) -> int:
        """Of each run."""
        return max(2, round(self.rate * self.seconds))

    @property
    def offered(self) -> float:
        """Chunks a second of all runs."""
        return self.runs * self.rate

    def faster(self, by: float) -> Load:
        return replace(self, rate=round(self.rate * by, 2))

    def asked(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.readers} readers of {self.runs} runs of {self.rate:g} chunks/s"


@dataclass(frozen=True)
class Chunks:
    """What readers measured. Microseconds; three columns of one length, a row a chunk and reader."""

    due: array[int]
    came: array[int]  # negative: while its reader was catching up
    late: array[int]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Chunks:
        flat: array[int] = array("q")
        for path in paths:
            flat.frombytes(path.read_bytes())
        return cls(flat[0::3], flat[1::3], flat[2::3])

    def ages(self, since: int = 0, until: int = 2**62) -> list[int]:
        """Return how old the chunks were that were due in a time, of readers that were not catching up; sorted."""
        return sorted(
            came - due for due, came in zip(self.due, self.came, strict=True) if came > 0 and since <= due < until
        )

    def arrived(self, since: int, until: int) -> int:
        """Return how many came in a time."""
        return sum(since <= abs(came) < until for came in self.came)


def percentile_ms(ages: Sequence[int], percent: float) -> float | None:
    """Return a percentile of sorted microseconds, in milliseconds; None of none."""
    if not ages:
        return None
    return round(ages[min(int(len(ages) * percent / 100), len(ages) - 1)] / 1000, 1)


class Form(Protocol):
    """Who carries chunks from the model server to readers. `roles`: whose CPU it answers for; `web`: its web process."""

    name: str
    roles: tuple[str, ...]
    web: str
    port: int

    def begin(self, load: Load) -> list[str]:
        """Start the runs; return the paths of their streams."""

    def end(self, *, whole: bool) -> None:
        """Leave nothing of them: what is not `whole` is ended."""


class Longhaul:
    """Agents workers (gevent), a control worker, one web process; a user with a key. The rig is prepared."""

    name = "longhaul"
    roles: tuple[str, ...] = OURS
    web = WEB

    def __init__(self, rig: Rig, runs: int, agents: int = 1) -> None:
        from django.contrib.auth import get_user_model

        from threads.authentication import create_key

        self._rig = rig
        self.owner: Any = get_user_model().objects.create(username="reader")
        self.key = create_key(self.owner, "benchmark")[1]
        self.workers = Workers(rig, greenlets=runs + 20)
        self.workers.up(agents=agents, control=1)
        self.port = serve(rig, self.workers, WEB, "agents_project.asgi:application", "/healthz")
        self.ids: list[Any] = []

    def begin(self, load: Load) -> list[str]:
        from django.db import transaction

        from benchmarks.longhaul_app.agents import speaker

        with transaction.atomic():
            started = [speaker.start(f"chunks {load.chunks} {load.rate}", owner=self.owner) for _ in range(load.runs)]
        self.ids = [run.pk for run in started]
        return [f"/api/runs/{id}/stream" for id in self.ids]

    def end(self, *, whole: bool) -> None:
        """Wait until all runs have ended."""
        from runs.models import Run

        live = Run.objects.filter(pk__in=self.ids, status__in=["queued", "running", "waiting"])
        if not whole:
            for run in live:
                run.cancel()
        self.workers.eventually(lambda: not live.exists(), "all runs have ended", WAIT)


class Relay:
    """`benchmarks.relay`: one producer, one web process."""

    name = "relay"
    roles: tuple[str, ...] = RELAYS
    web = "relay web"

    def __init__(self, rig: Rig, workers: Workers, gather_ms: float) -> None:
        self._rig = rig
        self._gather_ms = gather_ms
        self._start()
        self.port = serve(rig, workers, self.web, "benchmarks.relay:application", "/")
        self._runs: list[str] = []
        self._number = 0

    def _start(self) -> None:
        environment = {"LONGHAUL_BENCH_GATHER_MS": str(self._gather_ms)}
        self._rig.start("relay", "relay", ["-m", "benchmarks.relay"], environment)

    def begin(self, load: Load) -> list[str]:
        self._number += 1
        self._runs = [f"{self._number}-{run}" for run in range(load.runs)]
        self._rig.valkey.rpush(
            relay.PLAN, json.dumps({"runs": self._runs, "prompt": f"chunks {load.chunks} {load.rate}"})
        )
        return [f"/{run}" for run in self._runs]

    def end(self, *, whole: bool) -> None:
        if not whole:  # what it still says has nobody to hear it
            self._rig.kill("relay")
            self._start()
        for run in self._runs:
            self._rig.valkey.delete(relay.stream_key(run))


def serve(rig: Rig, workers: Workers, name: str, application: str, health: str) -> int:
    """Start a web process of this name, and wait until it answers. Returns its port."""
    port = free_port(0)
    rig.start(
        name, name,
        ["-m", "uvicorn", application, "--port", str(port), "--no-access-log", "--log-level", "warning", "--backlog", "4096"],
        {"PGAPPNAME": name, "LOG_LEVEL": "WARNING"},
    )  # fmt: skip

    def answers() -> bool:
        rig.check_processes()
        try:
            return httpx2.get(f"http://127.0.0.1:{port}{health}").status_code == 200
        except httpx2.TransportError:
            return False

    workers.eventually(answers, f"{name} answers", READY_TIMEOUT)
    return port


class Readers:
    """A process of readers. A context manager: what runs still at its end is killed."""

    def __init__(self, stage: Stage, plan: Mapping[str, Any], name: str) -> None:
        self._stage = stage
        self.name = name
        self.records = stage.rig.folder / f"{name}-{time.monotonic_ns()}.records"
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.streams_client"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PROJECT, bufsize=0,
        )  # fmt: skip
        self._said = b""
        self.tell({**plan, "records": str(self.records)})

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            pipe.close()
        self.records.unlink(missing_ok=True)

    @property
    def pid(self) -> int:
        return self._child.pid

    def tell(self, line: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(line).encode() + b"\n")

    def wait(self, word: str, within: timedelta) -> Any:
        """Return what it says under this word, and show its progress meanwhile. Raises RigError, TimeoutError."""
        assert self._child.stdout is not None
        until = time.monotonic() + within.total_seconds()
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while True:
                line, found, rest = self._said.partition(b"\n")
                if found:
                    self._said = rest
                    told = json.loads(line)
                    if word in told:
                        return told[word]
                    if "progress" in told:
                        self._stage.console.log(f"  {self.name}: {told['progress']}")
                    continue
                if time.monotonic() > until:
                    raise TimeoutError
                if not selector.select(1.0):
                    self._stage.rig.check_processes()
                    continue
                read = os.read(self._child.stdout.fileno(), 2**20)
                if not read:
                    raise RigError(f"The readers ended: {self._child.wait()}.\n{self._stage.rig.logs()}")
                self._said += read


@dataclass(frozen=True)
class Machine:
    """How busy the whole machine was: seconds of all cores, by /proc/stat."""

    busy: float

    @classmethod
    def now(cls) -> Machine:
        fields = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle = fields[3] + fields[4]
        return cls((sum(fields) - idle) / os.sysconf("SC_CLK_TCK"))


class Stage:
    """The rig and the console, and what is measured on them."""

    def __init__(self, rig: Rig, console: Console) -> None:
        self.rig, self.console = rig, console
        self._model = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")

    def model(self, word: str) -> dict[str, Any]:
        """Ask the metronome: state, begin, hold."""
        answer = httpx2.get(f"{self._model}/{word}", timeout=30)
        found: dict[str, Any] = answer.json()
        return found

    def readers(self, form: Form, key: str, paths: Sequence[str], name: str = "readers", **plan: Any) -> Readers:
        given = {"port": form.port, "key": key, "paths": list(paths), "chunks": None, "cut": None, **plan}
        return Readers(self, given, name)

    def begin(self, load: Load) -> int:
        """Wait until all runs have asked the model, and let them speak. Returns when: microseconds, monotonic."""
        until = time.monotonic() + WAIT.total_seconds()
        while (waiting := self.model("state")["waiting"]) < load.runs:
            if time.monotonic() > until:
                raise RigError(f"Only {waiting} of {load.runs} runs asked the model.\n{self.rig.logs()}")
            self.rig.check_processes()
            time.sleep(0.05)
        return int(self.model("begin")["at_us"])

    def carry(self, form: Form, key: str, load: Load) -> Figures:
        """Let a form carry a load, and return what came of it."""
        pid = self.rig.process(form.web).pid
        idle = resident(pid)
        self.model("hold")
        paths = form.begin(load)
        with self.readers(form, key, paths, readers=load.readers, chunks=load.chunks, cut=load.cut) as readers:
            readers.wait("open", WAIT)
            at = self.begin(load)
            until_us(at)
            meter = Meter(self.rig, {"readers": [readers]})
            streaming = steady(pid, timedelta(seconds=min(2.0, load.seconds / 2)))
            threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
            ends = at + int(load.seconds * 1e6)
            until_us(ends)
            cpu, others = meter.stop()
            seen, whole = self._result(readers)
            chunks = Chunks.read([readers.records])
        form.end(whole=whole)
        return self._figures(form, load, seen, chunks, cpu, at, ends) | {
            "kb_per_reader": round((streaming - idle) / load.readers / 1000, 1),
            "web": {"idle_mb": round(idle / MB, 1), "streaming_mb": round(streaming / MB, 1), "threads": threads},
            "others_cores": others,
        }

    def _result(self, readers: Readers) -> tuple[Any, bool]:
        """Return what the readers saw, and whether they saw it to the end."""
        try:
            return readers.wait("seen", DRAIN), True
        except TimeoutError:
            self.console.log("  not all has come: the load is cut off")
            readers.tell({"stop": True})
            return readers.wait("seen", WAIT), False

    def _figures(
        self, form: Form, load: Load, seen: Any, chunks: Chunks, cpu: dict[str, float], at: int, ends: int
    ) -> Figures:
        settled = at + int(min(SETTLED_SECONDS, SETTLED * load.seconds) * 1e6)
        times = load.readers / load.runs  # that each chunk is read
        arrived = chunks.arrived(settled, ends)
        carried = arrived / times / ((ends - settled) / 1e6)
        ages = chunks.ages()
        late = sorted(chunks.late)
        ours = sum(cpu[role] for role in form.roles)
        return {
            "form": form.name, "readers": load.readers, "runs": load.runs, "rate": load.rate, "seconds": load.seconds,
            "chunks": load.chunks, "cut": "random" if load.cut else "none",
            "lost": seen["lost"], "doubled": seen["doubled"],
            "mismatched": sum(len(each) - 1 for each in seen["digests"].values()),
            "unfinished": seen["unfinished"], "gaps": seen["gaps"], "cuts": seen["cuts"],
            "p50_ms": percentile_ms(ages, 50), "p99_ms": percentile_ms(ages, 99),
            "max_ms": percentile_ms(ages, 100), "timed": len(ages),
            "model_late_p99_ms": percentile_ms(late, 99),
            "offered_per_s": round(load.offered, 1), "carried_per_s": round(carried, 1),
            "drained_after_s": round(max((seen["ended_us"] - ends) / 1e6, 0.0), 1),
            "deliveries_per_s": round(arrived / ((ends - settled) / 1e6)),
            "cpu": {role: round(share, 3) for role, share in sorted(cpu.items())},
            "cores": round(ours, 3),
            "cpu_us_per_chunk": round(ours / carried * 1e6, 1) if carried else None,
            "cpu_us_per_delivery": round(cpu[form.web] / (carried * times) * 1e6, 1) if carried else None,
        }  # fmt: skip


class Meter:
    """CPU by role from now on, in cores. `readers` are processes that the rig does not know, by role."""

    def __init__(self, rig: Rig, readers: Mapping[str, Sequence[Readers]]) -> None:
        self._rig, self._readers = rig, readers
        self._before = self._read()
        self._machine, self._since = Machine.now(), time.monotonic()

    def _read(self) -> dict[str, float]:
        table = ProcessTable()
        apart = {role: sum(table.own(each.pid) for each in group) for role, group in self._readers.items()}
        return self._rig.read().cpu | apart

    def stop(self) -> tuple[dict[str, float], float]:
        """Return the cores by role, and those that processes of others took."""
        took = time.monotonic() - self._since
        cpu = {role: seconds / took for role, seconds in spent(self._before, self._read()).items()}
        others = (Machine.now().busy - self._machine.busy) / took - sum(cpu.values())
        return cpu, round(max(others, 0.0), 2)


def until_us(moment: int) -> None:
    """Sleep until a moment of the monotonic clock, in microseconds."""
    time.sleep(max(0.0, moment / 1e6 - time.monotonic()))


def first_to_saturate(found: Figures) -> str:
    """Return, in words, what stands in the way of more: a process at its core, or all cores together."""
    cpu = {role: share for role, share in found["cpu"].items() if role != "load"}
    most = max(cpu, key=lambda role: cpu[role])
    total = sum(cpu.values()) + found["cpu"].get("load", 0.0) + found["others_cores"]
    single = {role: share for role, share in cpu.items() if role not in ("postgres", "control") and share >= 0.85}
    if single:
        role = max(single, key=lambda each: single[each])
        return f"{role}, at {single[role]:.2f} of its one core"
    if total >= 0.9 * CORES:
        shares = ", ".join(f"{role} {share:.2f}" for role, share in sorted(cpu.items(), key=lambda each: -each[1])[:4])
        return f"the machine, at {total:.2f} of {CORES} cores: {shares}"
    return f"nobody: {most} has the most, {cpu[most]:.2f} of a core"


def middle(values: Sequence[float]) -> float:
    return round(median(values), 3)
