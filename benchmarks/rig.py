"""The stand that a benchmark is measured on: servers, a database and a model server of its own, and the processes.

All that is started ends with the rig, also on Ctrl-C, SIGTERM or an error; when the rig itself is killed, the kernel
kills its children. The servers are embedded ones, kept apart from all others by their purpose, unless DATABASE_URL and
REDIS_URL name some: then nobody else should use those meanwhile, for what they spend is counted as a whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import redis

from agents_project import embedded
from agents_project.processes import Children, free_port
from agents_project.rabbitmq import RabbitMQ, RabbitMQError
from benchmarks.counters import StatementLog, valkey_commands, wal_position
from benchmarks.cpu import ProcessTable

PROJECT = Path(__file__).resolve().parent.parent
DATABASE = "longhaul_bench"
BROKERS = ("redis", "rabbitmq")
READY_TIMEOUT = timedelta(seconds=60)  # workers need 3 to 5 s to import all; the machine may be busy


class RigError(Exception):
    """The benchmark cannot go on."""


@dataclass(frozen=True)
class Reading:
    """What had been spent at one moment. `cpu`: seconds by role, running totals; `commands`: Valkey's."""

    cpu: dict[str, float]
    wal_bytes: int
    commands: Mapping[str, int]


class Rig:
    """Use as a context manager. Sets DATABASE_URL, REDIS_URL, CELERY_BROKER_URL, OPENAI_BASE_URL, OPENAI_API_KEY."""

    def __init__(self, script: str, broker: str = "redis") -> None:
        """`broker`: one of BROKERS; bells are Redis's always.

        `script`: what the model server plays, as `module:attribute`; a name without a colon is a module that is a model
        server of its own.
        """
        self._script = script
        self.broker = broker
        self._rabbitmq: RabbitMQ | None = None
        self._exit = contextlib.ExitStack()
        self._roles: dict[str, str] = {}
        self._load_backends: set[int] = set()

    def __enter__(self) -> Rig:
        if not Path("/proc/self/stat").exists():
            raise RigError("The CPU of processes is read from /proc: these benchmarks need Linux.")
        # `kill` ends us as Ctrl-C does: by way of every `finally`.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        with self._exit:
            self._open()
            self._exit = self._exit.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _open(self) -> None:
        purpose = embedded.reserve(os.environ.get("LONGHAUL_PURPOSE") or "bench")
        os.environ["LONGHAUL_PURPOSE"] = purpose
        is_ours = not os.environ.get("DATABASE_URL")
        servers = embedded.ensure(purpose)
        os.environ.setdefault("SECRET_KEY", embedded.secret_key())
        self._exit.callback(embedded.leave, servers.folder)
        self._log = servers.folder / "postgres.log" if is_ours else None

        if self.broker == "rabbitmq":
            try:
                self._rabbitmq = self._exit.enter_context(RabbitMQ())
            except RabbitMQError as error:
                raise RigError(str(error)) from error
            os.environ["CELERY_BROKER_URL"] = self._rabbitmq.url

        self.folder = Path(tempfile.mkdtemp(prefix="longhaul-bench-"))
        self._exit.callback(shutil.rmtree, self.folder, ignore_errors=True)

        # A database of our own, for what stands in the one of DATABASE_URL is not ours to use, or to measure over.
        server_url = os.environ["DATABASE_URL"]
        self._admin = self._exit.enter_context(psycopg.connect(server_url, autocommit=True))
        self._admin.execute(f"DROP DATABASE IF EXISTS {DATABASE}")
        self._admin.execute(f"CREATE DATABASE {DATABASE}")
        self._exit.callback(self._admin.execute, f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")
        os.environ["DATABASE_URL"] = urlunsplit(urlsplit(server_url)._replace(path=f"/{DATABASE}"))
        self.connection: psycopg.Connection[Any] = self._exit.enter_context(
            psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
        )
        self.valkey = redis.Redis.from_url(os.environ["REDIS_URL"])
        self._exit.callback(self.valkey.close)

        table = ProcessTable()
        self._postmaster = table.parent(self.connection.info.backend_pid)
        self._valkey_pid = int(self.valkey.info("server")["process_id"])
        self.is_load_generator(self._admin)
        self.is_load_generator(self.connection)

        self._children = Children(self.folder / "children.json")
        self._exit.callback(self._children.stop_all, timedelta(seconds=5))
        self._start_model_server()

    def _start_model_server(self) -> None:
        port = free_port(0)
        os.environ["OPENAI_BASE_URL"] = f"http://127.0.0.1:{port}/v1"
        os.environ["OPENAI_API_KEY"] = "benchmark"
        played = ":" in self._script
        module = ["agents_project.demo.model_server", "--script", self._script] if played else [self._script]
        self.start("model server", "model", ["-m", *module, "--port", str(port)])
        deadline = time.monotonic() + READY_TIMEOUT.total_seconds()
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            self.check_processes()
            if time.monotonic() > deadline:
                raise RigError(f"The model server was not ready in {READY_TIMEOUT}.\n{self.log('model server')}")
            time.sleep(0.02)

    # --- processes -------------------------------------------------------------------------------------------------

    def start(
        self, name: str, role: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start Python with `arguments` in the project's folder. `role` is what its CPU is shown under."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self._children.start(
                name, [sys.executable, *arguments], env={**os.environ, **(environment or {})}, cwd=PROJECT, output=log
            )
        self._roles[name] = role

    def process(self, name: str) -> subprocess.Popen[bytes]:
        """Return the process that was started under this name. Raises KeyError when there is none."""
        return self._children[name]

    def kill(self, name: str) -> None:
        """SIGKILL a process, if it still runs, and know it no longer. Its log stays."""
        self._children.kill(name)
        del self._roles[name]

    def has_started(self, name: str) -> bool:
        """Return whether a process of this name was started, by whoever."""
        return name in self._roles

    def check_processes(self) -> None:
        """Raise RigError, with the end of its log, when a process that was started has ended."""
        for name in self._children:
            if self._children[name].poll() is not None:
                raise RigError(f"{name} ended with {self._children[name].returncode}.\n{self.log(name)}")

    def log(self, name: str, lines: int = 25) -> str:
        text = (self.folder / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def logs(self) -> str:
        """Return the end of every log that is not empty."""
        said = {name: self.log(name, 10) for name in self._children}
        return "\n".join(f"--- {name}\n{text}" for name, text in said.items() if text)

    # --- measuring -------------------------------------------------------------------------------------------------

    def is_load_generator(self, connection: psycopg.Connection[Any]) -> None:
        """Count the backend of this connection as the load generator's, not as Postgres's."""
        self._load_backends.add(connection.info.backend_pid)

    def read(self) -> Reading:
        """Read what everything has spent.

        Roles: those of `start`, "postgres", "valkey", "rabbitmq" where it is the broker, and "load", which is us.
        """
        wal_bytes = wal_position(self.connection)
        commands = valkey_commands(self.valkey)
        table = ProcessTable()
        cpu = dict.fromkeys(self._roles.values(), 0.0)
        for name, role in self._roles.items():
            cpu[role] += table.tree(self._children[name].pid)
        cpu["postgres"] = table.tree(self._postmaster, without=self._load_backends)
        cpu["valkey"] = table.own(self._valkey_pid)
        if self._rabbitmq is not None:
            cpu["rabbitmq"] = table.tree(self._rabbitmq.pid)
        cpu["load"] = table.own(os.getpid()) + sum(table.own(pid) for pid in self._load_backends)
        return Reading(cpu, wal_bytes, commands)

    def now(self) -> float:
        """Return Postgres's clock, in seconds: what rows say about their end is compared with it."""
        row = self.connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
        assert row is not None
        return float(row[0])

    def statement_log(self) -> StatementLog | None:
        """Return the log of statements; None on servers that are not ours, whose log we cannot read."""
        return None if self._log is None else StatementLog(self._admin, self._log)

    def is_backend_of(self, application: str) -> Callable[[int], bool]:
        """Return whether a pid is that of a live backend whose client calls itself so (PGAPPNAME)."""
        rows = self.connection.execute("SELECT pid FROM pg_stat_activity WHERE application_name = %s", [application])
        pids = {row[0] for row in rows}
        return pids.__contains__

    def is_counted(self, pid: int) -> bool:
        """Return whether a backend is not the load generator's."""
        return pid not in self._load_backends
