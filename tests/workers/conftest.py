"""Real workers, a real model server, and the database of this test session between them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
import redis
from django.conf import settings
from django.db import connection

from agents_project.demo.model_server import Cut, ModelCall, ModelServer, Pause, Reply, Silence, Status, Text, ToolCall
from runs import Run, invariants
from runs.agents import registry
from runs.sweep import SWEEP_LOCK
from runs.verification import verify_all
from tests.workers.app.agents import worker_test
from threads.database import rows_of
from tools.models import Worker

POOLS = {
    "agents": ["-P", "gevent", "-c", "100"],
    "tools": ["-P", "prefork", "-c", "2"],
    "control": ["-P", "threads", "-c", "2"],
}
PATIENCE = 40.0  # seconds: a loaded machine takes several for each Python it starts


def eventually(what: Callable[[], Any], *, within: float = PATIENCE, why: str = "") -> Any:
    """Return the first true answer."""
    until = time.monotonic() + within
    while True:
        answer = what()
        if answer:
            return answer
        if time.monotonic() > until:
            raise AssertionError(f"not within {within} s: {why or what}")
        time.sleep(0.02)  # between looks at a condition


def script(call: ModelCall) -> Reply:
    """Say what the user asks for.

    `tell ...`, `silence`, `call TOOL SECONDS`, `fan TOOL SECONDS CALLS`, `count TOOL CALLS`, `fail KIND ...` (by the tries so far).
    """
    last = next(place for place in range(len(call.messages) - 1, -1, -1) if call.messages[place]["role"] == "user")
    word, *rest = str(call.messages[last]["content"]).split()
    if any(message["role"] == "tool" for message in call.messages[last:]):
        return [Text("It is done.")]
    match word:
        case "call":
            return [ToolCall(rest[0], {"seconds": float(rest[1])})]
        case "count":
            return [ToolCall(rest[0], {"number": number}) for number in range(1, int(rest[1]) + 1)]
        case "fan":
            return [ToolCall(rest[0], {"seconds": float(rest[1])}) for _ in range(int(rest[2]))]
        case "silence":
            return [Text("So far so "), Silence()]
        case "fail":
            name = " ".join(rest)
            tries[name] = tries.get(name, 0) + 1
            if tries[name] > int(rest[1]):
                return [Text("At last.")]
            failures: dict[str, Reply] = {
                "500": [Status(500, "out of order")],
                "429": [Status(429, "slow down", {"retry-after": "1"})],
                "cut": [Text("Half a sen"), Cut()],
            }
            return failures[rest[0]]
        case _:
            return [Text(" ".join(f"w{n}" for n in range(40)), chunk_chars=4, delay=0.03), Pause(0.0)]


tries: dict[str, int] = {}


class Broker(Protocol):
    """What the tests ask of a broker beside what Celery asks. `environment` is what a process needs to reach it."""

    environment: Mapping[str, str]

    def forget(self) -> None:
        """Lose every message."""

    def messages(self, queue: str) -> int:
        """Return how many wait in the queue, or are taken and not acknowledged."""


class Redis:
    environment: Mapping[str, str] = {}  # that of the session

    def forget(self) -> None:
        redis.Redis.from_url(settings.REDIS_URL).flushall()

    def messages(self, queue: str) -> int:
        valkey = redis.Redis.from_url(settings.REDIS_URL)
        return valkey.llen(queue) + valkey.hlen("unacked")


@dataclass
class Kit:
    """The workers of this session. A test may kill any of them: the next one gets what it asks for by `up`."""

    environment: dict[str, str]
    folder: Path
    model: ModelServer
    broker: Broker
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    started: int = 0

    def up(self, **kinds: int) -> None:
        """Have at least so many workers of each kind, present by their rows."""
        for kind, count in kinds.items():
            for _ in range(count - len(self.names(kind))):
                self._start(kind)
        eventually(
            lambda: all(len(self._present(kind)) >= count for kind, count in kinds.items()),
            within=2 * PATIENCE,  # several Pythons start at once
            why=f"{kinds} present",
        )

    @contextmanager
    def consuming(self, queue: str) -> Iterator[str]:
        """Within the block a worker runs the agents of a queue of their own, and of no other. Yields its name."""
        self._start("own", queue)
        name = f"own-{self.started}"
        try:
            eventually(lambda: Worker.objects.filter(name=f"{name}@test", kind="agents", gone_at=None).exists())
            yield f"{name}@test"
        finally:
            self.kill(self.processes[name])

    def names(self, kind: str) -> list[str]:
        return [name for name, process in self.processes.items() if name.startswith(kind) and process.poll() is None]

    def _present(self, kind: str) -> list[str]:
        rows = Worker.objects.filter(kind=kind, gone_at=None, parent=None).values_list("name", flat=True)
        return [name for name in self.names(kind) if f"{name}@test" in set(rows)]

    def _start(self, kind: str, queue: str = "") -> None:
        self.started += 1
        name, pool = f"{kind}-{self.started}", "agents" if queue else kind
        command = [
            sys.executable,
            "-m",
            "celery",
            "-q",  # its banner is no log line
            "-A",
            "agents_project",
            "worker",
            "-Q",
            queue or f"longhaul.{kind}",
            "-n",
            f"{name}@test",
        ]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "INFO"]
        environment = {**self.environment, **({"LONGHAUL_DB_POOL": "1"} if pool == "agents" else {})}
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [*command, *POOLS[pool], *quiet], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    @contextmanager
    def who_sees_deaths_by_locks_alone(self) -> Iterator[None]:
        """Within the block the one control worker takes nobody for dead by the time of silence, and has seen all locks.

        Who dies then, and is missed at all, was missed by their lock: no stopwatch has to tell the two apart.
        """
        before = self.environment
        self._end("control")
        self.environment = {**before, "TESTS_PRESENCE_TTL_SECONDS": "600"}
        try:
            self.up(control=1)
            self._await_look()
            yield
        finally:
            self.environment = before
            self._end("control")

    def _end(self, kind: str) -> None:
        for name in self.names(kind):
            self.kill(self.processes[name])

    def _await_look(self) -> None:
        """Wait until who sweeps has looked at those who are present: a lock that it never saw held is no lost one."""
        [[now]] = rows_of("SELECT clock_timestamp()")
        looked = """
            SELECT 1 FROM pg_locks l JOIN pg_stat_activity a USING (pid)
            WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted AND a.datname = current_database()
              AND (l.classid::bigint << 32) | l.objid::bigint = %s
              AND a.state = 'idle' AND a.query_start > %s AND a.query LIKE '%%FROM longhaul_tools_worker w%%'"""
        eventually(lambda: rows_of(looked, (SWEEP_LOCK, now)), why="who sweeps has looked")

    def of(self, life: Any) -> subprocess.Popen[bytes]:
        """Return the process that holds a claim under this life."""
        name = Worker.objects.get(pk=life).name.partition("@")[0]
        return self.processes[name]

    def kill(self, process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
        """Send a signal to the whole worker: a prefork parent takes its children along."""
        os.killpg(process.pid, number)
        if number == signal.SIGKILL:
            process.wait()


kits: list[Kit] = []  # those that are up


def _await_no_connection(application: str) -> None:
    """The workers were connected to the test database, which goes now: wait until the server has noticed their end."""
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as admin:
        # (Presence, and an atomic tool, name their connections themselves.)
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
            " AND (application_name = %s OR application_name LIKE 'longhaul%%')"
        )
        theirs = (connection.settings_dict["NAME"], application)
        eventually(lambda: admin.execute(query, theirs).fetchone() == (0,), why="the workers' connections end")


@contextmanager
def kit_over(broker: Broker, folder: Path) -> Iterator[Kit]:
    """A model server, and workers on this broker, which end with the block."""
    parts = urlsplit(os.environ["DATABASE_URL"])
    database = urlunsplit(parts._replace(path=f"/{connection.settings_dict['NAME']}"))
    with ModelServer(script) as model:
        environment = {
            **os.environ,
            "DATABASE_URL": database,
            "DJANGO_SETTINGS_MODULE": "tests.workers.settings",
            "PGAPPNAME": "tests.workers",
            "OPENAI_BASE_URL": model.url,
            "OPENAI_API_KEY": "sk-test",
            **broker.environment,
        }
        kit = Kit(environment, folder, model, broker)
        kits.append(kit)
        try:
            yield kit
        finally:
            kits.remove(kit)
            for process in kit.processes.values():
                if process.poll() is None:
                    kit.kill(process)
            if not kits:  # the last one waits for all
                _await_no_connection(environment["PGAPPNAME"])
                # A worker that was there when a test emptied the tables has made its row anew.
                with psycopg.connect(database, autocommit=True) as own:
                    own.execute("DELETE FROM longhaul_tools_worker")
            connection.close()


@pytest.fixture(scope="module")  # other modules make runs that nobody may take
def kit(django_db_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    with kit_over(Redis(), tmp_path_factory.mktemp("workers")) as kit:
        yield kit


@pytest.fixture
def workers(kit: Kit, transactional_db: None) -> Iterator[Kit]:
    """Workers of every kind; afterwards nothing runs on, no invariant is violated, and the logs tell what the tables hold."""
    registry.add(worker_test)
    kit.up(agents=2, tools=1, control=1)
    yield kit
    for run in Run.objects.exclude(status__in=["completed", "failed", "cancelled"]):
        run.cancel()
    report = invariants.check()
    assert not any(report.violations.values()), str(report)
    assert [f"{told.run}: {each}" for told in verify_all() for each in told.differences] == []
