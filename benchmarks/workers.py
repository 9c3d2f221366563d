"""Longhaul's workers as a benchmark kills, stops and replaces them: several of each kind, known by the lives they hold."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

from benchmarks.rig import READY_TIMEOUT, Rig, RigError

T = TypeVar("T")

PROCESSES = 2  # of a tools worker
QUIET = ("--without-gossip", "--without-mingle", "--without-heartbeat")
POOLS: dict[str, tuple[str, ...]] = {
    "tools": ("-P", "prefork", "-c", str(PROCESSES)),
    "control": ("-P", "threads", "-c", "4"),
}


def prepare(rig: Rig, settings: str = "benchmarks.settings") -> None:
    """Make the tables, and be the benchmark's own process to Django. Call once, inside the rig."""
    os.environ["DJANGO_SETTINGS_MODULE"] = settings
    import django
    from django.core.management import call_command
    from django.db import connection

    django.setup()
    call_command("migrate", verbosity=0)
    connection.ensure_connection()
    rig.is_load_generator(connection.connection)


class Workers:
    """The workers of one benchmark, by names like agents-3. A name is used once."""

    def __init__(self, rig: Rig, *, greenlets: int = 200) -> None:
        self._rig = rig
        self._pools = {**POOLS, "agents": ("-P", "gevent", "-c", str(greenlets))}
        self._names: list[str] = []
        self._started = 0

    def names(self, kind: str) -> list[str]:
        return [name for name in self._names if name.startswith(kind)]

    def start(self, kind: str) -> str:
        """Start one more worker; it need not be present yet. Returns its name."""
        self._started += 1
        name = f"{kind}-{self._started}"
        command = ["-m", "celery", "-A", "agents_project", "worker", "-Q", f"longhaul.{kind}", *self._pools[kind]]
        environment = {"LONGHAUL_DB_POOL": "1"} if kind == "agents" else {}
        self._rig.start(name, kind, [*command, "-n", f"{name}@bench", *QUIET], environment)
        self._names.append(name)
        return name

    def up(self, **kinds: int) -> None:
        """Have so many of each kind, and wait until all of them are present."""
        for kind, count in kinds.items():
            for _ in range(count - len(self.names(kind))):
                self.start(kind)
        wanted = {name for kind in kinds for name in self.names(kind)}
        self.eventually(lambda: wanted <= self.present(), f"{', '.join(sorted(wanted))} are present")

    def present(self) -> set[str]:
        """Return the names of the workers that are present and may be counted on: prefork ones with all children."""
        rows = self._rig.connection.execute(
            "SELECT name, kind, count(*) FILTER (WHERE parent_id IS NULL), count(*) FILTER (WHERE parent_id IS NOT NULL)"
            " FROM longhaul_tools_worker WHERE gone_at IS NULL GROUP BY name, kind"
        ).fetchall()
        return {
            name.partition("@")[0]
            for name, kind, own, children in rows
            if own and (kind != "tools" or children >= PROCESSES)
        }

    def holder(self, life: UUID) -> str:
        """Return the name of the worker that lives (or has a child that lives) under this id."""
        row = self._rig.connection.execute("SELECT name FROM longhaul_tools_worker WHERE id = %s", [life]).fetchone()
        if row is None:
            raise RigError(f"No worker has the id {life}.")
        return str(row[0]).partition("@")[0]

    def kill(self, name: str) -> float:
        """SIGKILL a worker; the kernel kills the children of a prefork one. Returns when, by Postgres's clock."""
        moment = self._rig.now()
        self._rig.kill(name)
        self._names.remove(name)
        return moment

    def stop(self, name: str, within: timedelta) -> tuple[int, float]:
        """SIGTERM a worker and wait for its end. Returns its exit code and the seconds that it took."""
        process = self._rig.process(name)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        self.eventually(lambda: process.poll() is not None, f"{name} ends after SIGTERM", within=within)
        took = time.monotonic() - began
        self._rig.kill(name)  # known no longer, for it has ended
        self._names.remove(name)
        return process.returncode, took

    def eventually(self, what: Callable[[], T], why: str, within: timedelta = READY_TIMEOUT, pause: float = 0.02) -> T:
        """Return the first true answer. Raises RigError with the logs after `within`."""
        until = time.monotonic() + within.total_seconds()
        while not (answer := what()):
            if time.monotonic() > until:
                raise RigError(f"Not within {within}: {why}.\n{self._rig.logs()}")
            time.sleep(pause)  # between two looks; what is measured is read from rows
        return answer


def check_invariants() -> int:
    """Return the number of violated invariants over all rows, as `check_runs` counts them."""
    from runs import invariants

    return sum(invariants.check().violations.values())


def spread(seconds: list[float]) -> dict[str, Any]:
    """Return what `--json` says of some times: how many, and their median, tenth longest part and maximum in ms."""
    if not seconds:
        return {"n": 0, "p50_ms": None, "p90_ms": None, "max_ms": None}
    return {
        "n": len(seconds),
        "p50_ms": percentile(seconds, 50),
        "p90_ms": percentile(seconds, 90),
        "max_ms": round(max(seconds) * 1000, 1),
    }


def percentile(seconds: list[float], percent: float) -> float:
    """Return a percentile in ms, by the nearest rank (a value that was measured); the median of an even count is the mean."""
    ordered = sorted(seconds)
    if percent == 50 and len(ordered) % 2 == 0:
        middle = len(ordered) // 2
        return round(sum(ordered[middle - 1 : middle + 1]) * 500, 1)
    rank = -(-len(ordered) * percent // 100)
    return round(ordered[max(0, int(rank) - 1)] * 1000, 1)
