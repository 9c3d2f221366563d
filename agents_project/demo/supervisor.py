"""The demo's processes: a model server and Celery workers, started, killed on purpose, replaced, and ended.

    agents-1, agents-2   gevent: the model's streams       tools-1     prefork: the tools
    control-1            threads: sweep and watcher        model       the scripted model, over HTTP

A tools worker stands by (standby.py), to take the place of the one that is killed.

Everything is a child of this process, in a session of its own; each writes a log in the data folder. Nothing here waits
by sleeping for a time: a worker is ready when its row says so, the model server when it answers.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO
from uuid import UUID

from agents_project import embedded
from agents_project.demo import standby
from agents_project.demo.agents import model
from agents_project.processes import Children, Identity, free_port
from threads.clock import now
from tools.models import Worker

READY_TIMEOUT = timedelta(seconds=60)  # a first start on a slow, busy machine; usual are 3 to 6 s
MODEL_PORT = 8087
_MODEL = ("-m", "agents_project.demo.model_server")
_LOOK_SECONDS = 0.025

# What Celery is told, by kind. -c of the agents worker is greenlets: each holds a stream.
POOLS = {
    "agents": ("-P", "gevent", "-c", "100"),
    "tools": ("-P", "prefork", "-c", "3"),
    "control": ("-P", "threads", "-c", "2"),
}


class DemoError(Exception):
    """The demo cannot run; the text says why and what to do."""


@dataclass(frozen=True)
class Kill:
    """A worker that was killed on purpose. `cut` is the message or the tool call that it was busy with."""

    kind: str
    worker: str
    pid: int
    at: datetime  # by the database's clock
    cut: UUID


@dataclass
class Supervisor:
    """Owns the processes of one demo. Use as a context manager: leaving it ends all of them.

    `say` gets a sentence for each thing that happens to a process.
    """

    say: Callable[[str], None]
    folder: Path = field(default_factory=embedded.data_folder)
    grace: timedelta = timedelta(seconds=8)
    kills: list[Kill] = field(default_factory=list)
    model_url: str = ""  # once it is known

    def __post_init__(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.logs = self.folder / "demo"
        self.logs.mkdir(mode=0o700, exist_ok=True)
        self.children = Children(self.logs / "children.json")
        self.kinds: dict[str, str] = {}  # worker name -> kind, of those that are meant to run
        self._lock: IO[str] | None = None
        self._numbers: dict[str, int] = {}
        self._standby: dict[str, str] = {}  # kind -> name
        self._environment: dict[str, str] = dict(os.environ)
        self._began: datetime | None = None
        self._deaths: list[float] = []
        self._model_again = True

    def __enter__(self) -> Supervisor:
        self._lock = (self.logs / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            pid = self._lock.read().strip()
            self._lock.close()
            raise DemoError(
                f"A demo of this project runs already (process {pid}). End it with Ctrl-C there, or start runs against"
                " it: manage.py run_agent tester ... --follow. LONGHAUL_PURPOSE=another gives a second one its own"
                " servers."
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        leftovers = self.children.kill_leftovers()
        if leftovers:
            pids = ", ".join(str(each.pid) for each in leftovers)
            self.say(f"ended what a killed earlier demo had left running (processes {pids})")
        return self

    def __exit__(self, *_: object) -> None:
        try:
            try:
                killed = self.children.stop_all(self.grace)
                if killed:
                    self.say(f"{', '.join(killed)} did not end within {self.grace.seconds} s and were killed")
            except KeyboardInterrupt:  # a second Ctrl-C: at once, then
                self.children.stop_all(timedelta())
        finally:
            if self._lock is not None:
                self._lock.close()

    # --- the model --------------------------------------------------------------------------------------------------

    def start_model(self) -> None:
        """Start the scripted model, unless the environment names a real service."""
        real = os.environ.get("OPENAI_BASE_URL")
        if real or os.environ.get("OPENAI_API_KEY"):
            self.model_url = real or "https://api.openai.com/v1"
            self.say(f"model: {model()} at {self.model_url}")
            return
        self._start("model", [*_MODEL, "--port", str(free_port(MODEL_PORT))])

    def await_model(self) -> None:
        """Wait until the model server says where it listens; workers started from now on are told. Raises DemoError."""
        deadline = time.monotonic() + READY_TIMEOUT.total_seconds()
        while not self.model_url:
            if self.children["model"].poll() is not None and self._model_again:
                # Somebody took the port between our look and the server's: now any will do.
                self._model_again = False
                self._start("model", [*_MODEL, "--port", "0"])
            self.complain_of_the_dead()
            if time.monotonic() > deadline:
                raise DemoError(
                    f"The model server did not listen within {READY_TIMEOUT.seconds} s; {self.log('model')}"
                )
            said = self.tail("model").partition("\n")[0]
            if said.startswith("{") and said.endswith("}"):
                self.model_url = json.loads(said)["url"]
                break
            time.sleep(_LOOK_SECONDS)
        if "model" not in self.children:
            return
        if f":{MODEL_PORT}/" not in self.model_url:
            self.say(f"port {MODEL_PORT} is taken; the model server listens at {self.model_url}")
        self._environment.update(
            OPENAI_BASE_URL=self.model_url,
            OPENAI_API_KEY="demo",
            LONGHAUL_DEMO_MODEL="openai:demo",
            NO_PROXY="127.0.0.1",
            no_proxy="127.0.0.1",
        )

    # --- the workers ------------------------------------------------------------------------------------------------

    def start_worker(self, kind: str) -> str:
        """Start one more worker of this kind, return its name. One that stands by goes first. The tables must be there."""
        if self._began is None:
            self._began = now()
        ready = self.stands_by(kind)
        name = self._standby.pop(kind, None)
        if name is not None and ready:
            os.kill(self.children[name].pid, signal.SIGUSR1)
        else:
            name = self._begin(kind, ["-m", "celery", "-A", "agents_project"])
        self.kinds[name] = kind
        return name

    def stand_by(self, kind: str) -> None:
        """Have a worker of this kind imported and waiting, to take the place of one that dies; once."""
        if kind not in self._standby:
            self._standby[kind] = self._begin(kind, ["-m", "agents_project.demo.standby"])

    def stands_by(self, kind: str) -> bool:
        """Say whether a worker of this kind is imported and waits."""
        name = self._standby.get(kind)
        return name is not None and self.children[name].poll() is None and standby.READY in self.tail(name)

    def _begin(self, kind: str, program: Sequence[str]) -> str:
        number = self._numbers[kind] = self._numbers.get(kind, 0) + 1
        name = f"{kind}-{number}"
        environment = dict(self._environment)
        environment.pop("LONGHAUL_DB_POOL", None)
        if kind == "agents":
            environment["LONGHAUL_DB_POOL"] = "1"
        queue = ("-Q", f"longhaul.{kind}", "-n", f"{name}@%h", "--loglevel", "INFO")
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")
        self._start(name, [*program, "worker", *POOLS[kind], *queue, *quiet], environment=environment)
        return name

    def _start(self, name: str, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        with self.log(name).open("wb") as output:
            self.children.start(
                name,
                [sys.executable, *arguments],
                env=self._environment if environment is None else environment,
                cwd=embedded.PROJECT,
                output=output.fileno(),
            )

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def pid(self, name: str) -> int:
        return self.children[name].pid

    def present(self, since: timedelta = timedelta()) -> set[str]:
        """Return the names of the workers that are there `since` so long: their row is, of a prefork one a child's too."""
        by_pid = {self.children[name].pid: name for name in self.kinds}
        rows = Worker.objects.filter(gone_at=None, started_at__gte=self._began)
        if since:
            rows = rows.filter(started_at__lte=now() - since)
        parents = {id: by_pid[pid] for id, pid in rows.filter(pid__in=by_pid, parent=None).values_list("id", "pid")}
        forked = set(rows.filter(parent__in=parents).values_list("parent", flat=True))
        return {name for id, name in parents.items() if self.kinds[name] != "tools" or id in forked}

    def await_present(self) -> None:
        """Wait until every worker that was started is ready. Raises DemoError."""
        deadline = time.monotonic() + READY_TIMEOUT.total_seconds()
        while True:
            missing = set(self.kinds) - self.present()
            if not missing:
                return
            self.complain_of_the_dead()
            if time.monotonic() > deadline:
                what = ", ".join(sorted(missing))
                raise DemoError(f"Not ready within {READY_TIMEOUT.seconds} s: {what}. Their logs are in {self.logs}.")
            time.sleep(_LOOK_SECONDS)

    def complain_of_the_dead(self) -> None:
        """Raise DemoError, with the end of its log, when a child has ended by itself."""
        for name in self.children:
            code = self.children[name].poll()
            if code is not None:
                raise DemoError(f"{name} {_ended(code)}. The end of {self.log(name)}:\n{self.tail(name)}")

    def tail(self, name: str, lines: int = 12) -> str:
        try:
            return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return str(error)

    def replace_the_dead(self) -> None:
        """Start a worker for each that ended, by itself or by a reader's hand. Raises DemoError if they keep ending."""
        for name, kind in list(self.kinds.items()):
            code = self.children[name].poll()
            if code is None:
                continue
            self._deaths = [at for at in self._deaths if time.monotonic() - at < 60]
            self._deaths.append(time.monotonic())
            if len(self._deaths) > 10:
                self.complain_of_the_dead()
            self.children.kill(name)
            del self.kinds[name]
            self.say(f"{name} {_ended(code)}; {self.start_worker(kind)} takes its place")
        if "model" in self.children:
            code = self.children["model"].poll()
            if code is not None:
                raise DemoError(f"model {_ended(code)}. The end of {self.log('model')}:\n{self.tail('model')}")

    # --- the kills --------------------------------------------------------------------------------------------------

    def worker_of(self, holder: UUID) -> tuple[str, Identity] | None:
        """Return which of our workers lives this life, and in which process (of a prefork one in a child)."""
        rows = Worker.objects.filter(id=holder, gone_at=None, started_at__gte=self._began)
        row = rows.select_related("parent").first()
        if row is None:
            return None
        top = (row.parent or row).pid
        name = next((name for name in self.kinds if self.children[name].pid == top), None)
        identity = Identity.of(row.pid)
        return None if name is None or identity is None else (name, identity)

    def kill_while(self, holder: UUID, cut: UUID, busy: Callable[[], bool]) -> Kill | None:
        """SIGKILL the whole worker that lives as `holder` while `busy()`; None when it was too late for that.

        The process is stopped for the last look, so that what it is busy with cannot end between look and kill.
        """
        found = self.worker_of(holder)
        if found is None:
            return None
        name, process = found
        process.kill(signal.SIGSTOP)
        time.sleep(0.02)  # what it had sent to Postgres before it stopped is answered by then
        if not busy():
            process.kill(signal.SIGCONT)
            return None
        at = now()
        pid = self.children.kill(name)  # of a prefork worker the parent: its children die with it, on Linux
        process.kill(signal.SIGKILL)
        kill = Kill(self.kinds.pop(name), name, pid, at, cut)
        self.kills.append(kill)
        return kill


def _ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
