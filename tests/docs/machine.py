"""A machine of a page's reader: servers of its own, processes that are started by their command, and their database."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from agents_project import embedded
from agents_project.processes import die_with_parent
from tests.docs import console
from tests.docs.page import ROOT

TERMINAL = ("completed", "failed", "cancelled")


def until(condition: Callable[[], Any], seconds: float, why: str = "it did not come true") -> Any:
    """Return the first true answer."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, why
        time.sleep(0.05)  # between looks at a condition
    return answer


@contextmanager
def servers(purpose: str) -> Iterator[embedded.Servers]:
    """Have servers of a test's own up for the block."""
    purpose = embedded.reserve(purpose)
    command = [f"{console.BIN}/python", "-m", "agents_project.embedded", "exec", "--", "sleep", "900"]
    holding = subprocess.Popen(command, cwd=ROOT, env=console.environment(LONGHAUL_PURPOSE=purpose))
    try:
        found = embedded.urls(purpose)
        until(lambda: _answers(found.database_url), 60)
        yield found
    finally:
        holding.terminate()
        holding.wait(30)
        embedded.remove(purpose, force=True)


def _answers(url: str) -> bool:
    try:
        with psycopg.connect(url):
            return True
    except psycopg.OperationalError:
        return False


class Machine:
    """Processes that have the same environment, of which nothing but PATH is this session's."""

    def __init__(self, environment: Mapping[str, str], folder: Path, cwd: Path = ROOT) -> None:
        path = {"PATH": console.BIN + os.pathsep + os.defpath, "HOME": str(folder)}
        # A copy of this project, whose code shall be tried and not that of the installed one, is named there.
        copy = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        self.environment = {**copy, **path, **environment}
        self.folder = folder
        self.cwd = cwd
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        return self.environment["DATABASE_URL"]

    def start(self, name: str, command: Sequence[str], **more: str) -> None:
        parent = os.getpid()
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                list(command),
                cwd=self.cwd,
                env={**self.environment, **more},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),
            )

    def worker(self, kind: str, number: int = 1) -> None:
        """Start a worker, and wait until it is present."""
        pool = {"agents": "gevent -c 100", "tools": "prefork -c 4", "control": "threads -c 2"}[kind]
        line = f"celery -q -A agents_project worker -Q longhaul.{kind} -P {pool} -n {kind}-{number}@test"
        # By its start, for a restored database knows of workers that it never had.
        began = self.one("SELECT longhaul_now()")
        self.start(f"{kind}-{number}", line.split(), LONGHAUL_DB_POOL="1" if kind == "agents" else "")
        query = "SELECT count(*) FROM longhaul_tools_worker WHERE kind = %s AND parent_id IS NULL AND started_at >= %s"
        until(lambda: self.one(query, kind, began), 60, f"{kind}-{number} is not present")

    def stop(self, name: str, within: float = 30) -> None:
        """SIGTERM to the main process alone; it must leave cleanly."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        code = process.wait(within)
        assert code in (0, -signal.SIGTERM), f"{name}: {code}\n{self.log(name)}"

    def end(self) -> None:
        """Kill all that runs."""
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-3000:]

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.cwd, env=self.environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def manage(self, *arguments: str) -> str:
        return self.run("python", str(ROOT / "manage.py"), *arguments)

    def start_run(self, agent: str, prompt: str, count: int = 1) -> list[str]:
        """Start runs; return their ids."""
        source = (
            "from runs.agents import registry\n"
            f"for _ in range({count}): print(registry.all()[{agent!r}].start({prompt!r}).pk)"
        )
        return self.manage("shell", "--verbosity", "0", "-c", source).split()

    # -- what the database says --

    def rows(self, query: str, *given: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True, application_name="the test") as session:
            return session.execute(query, given or None).fetchall()

    def one(self, query: str, *given: Any) -> Any:
        return self.rows(query, *given)[0][0]

    def present(self, kind: str) -> int:
        query = "SELECT count(*) FROM longhaul_tools_worker WHERE kind = %s AND gone_at IS NULL AND parent_id IS NULL"
        return int(self.one(query, kind))

    def settled(self) -> int:
        return int(self.one("SELECT count(*) FROM longhaul_tools_toolcall WHERE status = 'settled'"))

    def status(self, run: str) -> str:
        return str(self.one("SELECT status FROM longhaul_runs_run WHERE id = %s", run))

    def await_status(self, run: str, *statuses: str, within: float = 60) -> str:
        return str(until(lambda: (now := self.status(run)) in statuses and now, within, f"{run}: {self.status(run)}"))

    def unended(self) -> int:
        return int(self.one("SELECT count(*) FROM longhaul_runs_run WHERE finished_at IS NULL"))
