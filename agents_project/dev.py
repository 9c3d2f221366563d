"""`make dev`: the processes of the Procfile on embedded servers, until Ctrl-C.

honcho reads the Procfile and prints the lines; the rest is done here, for honcho ends everything when one process ends, and
kills 5 s after SIGTERM, before a worker has handed on what it holds. Here one that ends by itself, or by somebody's
`kill -9`, is said and started again, and at Ctrl-C each gets the time of a drain.

Everything listens on 127.0.0.1. The login is made once for this checkout, and printed; nobody else knows its password.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import queue
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from honcho.colour import get_colours  # type: ignore[import-untyped]
from honcho.environ import parse_procfile  # type: ignore[import-untyped]
from honcho.printer import Message, Printer  # type: ignore[import-untyped]

from agents_project import embedded
from agents_project.processes import Children, free_port

PORTS = {"web": ("PORT", 8000), "flower": ("FLOWER_PORT", 5555)}
MODEL_PORT = 8087
USER = "dev"
# A drain: DRAIN_GRACE_SECONDS for streams, then the tools that run; a tool that takes longer is killed, and its call goes on
# elsewhere.
GRACE = datetime.timedelta(seconds=20)
LOOK_SECONDS = 0.1
READY_SECONDS = 1.0  # between two looks whether everything is up
# One that ends sooner than this after its start comes back later and later, and is left down after so many times in a row.
QUICK = 10.0
DELAYS = (0.0, 1.0, 2.0, 4.0, 8.0)


class DevError(Exception):
    """The processes cannot be started; the text says why and what to do."""


@dataclass
class Program:
    """One line of the Procfile, and how it fares."""

    name: str
    line: str
    colour: str | None = None
    started: float = 0.0
    quick_ends: int = 0  # in a row
    due: float | None = None  # when it is started again; None while it runs, or is left down
    down: bool = False  # left down
    port: int | None = None


@dataclass
class Stack:
    """The processes, from the first start to the last end. Use as a context manager: leaving it ends all of them."""

    procfile: Path
    folder: Path
    printer: Printer
    grace: datetime.timedelta = GRACE
    programs: dict[str, Program] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.children = Children(self.folder / "children.json")
        self._lines: queue.SimpleQueue[tuple[Program, bytes]] = queue.SimpleQueue()
        self._environment: dict[str, str] = {}
        self._readers: list[threading.Thread] = []
        self._lock: IO[str] | None = None
        self._colours = get_colours()
        for name, line in parse_procfile(self.procfile.read_text()).processes.items():
            self.add(name, line)

    def __enter__(self) -> Stack:
        self._lock = (self.folder / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            said = self._lock.read().strip()
            self._lock.close()
            raise DevError(
                f"make dev of this checkout runs already ({said}). LONGHAUL_PURPOSE=another gives a second one its own servers."
            ) from None
        self._write_lock(f"process {os.getpid()}")
        leftovers = self.children.kill_leftovers()
        if leftovers:
            pids = ", ".join(str(each.pid) for each in leftovers)
            self.say(f"ended what a killed earlier make dev had left running (processes {pids})")
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._end(self.grace)
        except KeyboardInterrupt:  # a second Ctrl-C: at once, then
            self.say("killing what is left")
            self._end(datetime.timedelta())
        finally:
            for reader in self._readers:
                reader.join(1)
            self._print_lines()
            if self._lock is not None:
                self._lock.close()

    def _end(self, grace: datetime.timedelta) -> None:
        printing = threading.Event()

        def print_on() -> None:
            while not printing.wait(LOOK_SECONDS):
                self._print_lines()

        printer = threading.Thread(target=print_on, name="dev-printer", daemon=True)
        printer.start()
        try:
            killed = self.children.stop_all(grace)
        finally:
            printing.set()
            printer.join()
        if killed and grace:
            self.say(f"{', '.join(killed)} did not end within {grace.seconds} s and were killed")

    def _write_lock(self, said: str) -> None:
        assert self._lock is not None
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(said)
        self._lock.flush()

    # --- what is said -----------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        self._print("dev", None, text)

    def _print(self, name: str, colour: str | None, data: bytes | str) -> None:
        self.printer.write(Message("line", data, datetime.datetime.now(), name, colour))

    def _print_lines(self, wait: float = 0.0) -> None:
        """Print what the processes have said; with `wait`, seconds, wait so long for the first line."""
        with contextlib.suppress(queue.Empty):
            program, line = self._lines.get(timeout=wait) if wait else self._lines.get_nowait()
            while True:
                self._print(program.name, program.colour, line)
                program, line = self._lines.get_nowait()

    def _read(self, program: Program, end: int) -> None:
        with open(end, "rb") as lines:
            for line in lines:
                self._lines.put((program, line))

    # --- the processes ----------------------------------------------------------------------------------------------

    def add(self, name: str, line: str) -> None:
        """Have one more process, by a line as in the Procfile. Before `start`."""
        self.programs[name] = Program(name, line, colour=next(self._colours))
        self.printer.width = max(len(each) for each in [*self.programs, "dev"])

    def choose_ports(self) -> None:
        for name, (variable, usual) in PORTS.items():
            if program := self.programs.get(name):
                wanted = int(os.environ.get(variable) or usual)
                program.port = free_port(wanted)
                if program.port != wanted != 0:
                    self.say(f"port {wanted} is taken; {name} listens on {program.port}")

    def address(self, name: str) -> str:
        return self.address_at(self.programs[name].port)

    @staticmethod
    def address_at(port: int | None) -> str:
        return f"http://127.0.0.1:{port}"

    def start(self, environment: Mapping[str, str]) -> None:
        """Start every process, in this environment and that of each."""
        self._environment = {**os.environ, **environment}
        # The scripts of this Python first, as `uvicorn` and `celery` are in the Procfile.
        self._environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{self._environment.get('PATH', '')}"
        self._environment["PYTHONUNBUFFERED"] = "1"
        for program in self.programs.values():
            self._start(program)
        self._write_lock(f"process {os.getpid()}, {self.address('web')}/admin/")

    def _start(self, program: Program) -> None:
        # From this thread only, the main one: on Linux a child dies with the thread that has started it.
        if program.port is not None:
            port = free_port(program.port)
            if port != program.port:  # somebody took it since we looked, or while the process was away
                self.say(f"port {program.port} was taken meanwhile; {program.name} listens on {self.address_at(port)}")
                program.port = port
            self._environment[PORTS[program.name][0]] = str(port)
        read, write = os.pipe()
        try:
            self.children.start(
                program.name,
                ["/bin/sh", "-c", program.line],
                env=self._environment,
                cwd=embedded.PROJECT,
                output=write,
            )
        finally:
            os.close(write)
        program.started = time.monotonic()
        program.due = None
        reader = threading.Thread(target=self._read, args=(program, read), name=f"dev-{program.name}", daemon=True)
        reader.start()
        self._readers = [each for each in self._readers if each.is_alive()] + [reader]

    def attend(self) -> None:
        """Print what was said, and start again what has ended. Returns after a moment; call it again and again."""
        self._print_lines(wait=LOOK_SECONDS)
        for program in self.programs.values():
            if program.due is not None:
                if time.monotonic() >= program.due:
                    self._start(program)
            elif not program.down and (code := self.children[program.name].poll()) is not None:
                self._ended(program, code)

    def _ended(self, program: Program, code: int) -> None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        quick = time.monotonic() - program.started < QUICK
        program.quick_ends = program.quick_ends + 1 if quick else 0
        if program.quick_ends >= len(DELAYS):
            program.down = True
            self.say(
                f"{program.name} {how}, for the {program.quick_ends}th time within {QUICK:g} s of its start: it is left down."
                " Its last lines are above; the others go on"
            )
            return
        delay = DELAYS[program.quick_ends]
        program.due = time.monotonic() + delay
        self.say(f"{program.name} {how}; it is started again{f' in {delay:g} s' if delay else ''}")


# --- the login ------------------------------------------------------------------------------------------------------


def password(folder: Path) -> str:
    """Return the password of this checkout's own, made once and kept where only we may read it."""
    path = folder / "password"
    with contextlib.suppress(FileNotFoundError):
        return path.read_text()
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    made = secrets.token_urlsafe(12)
    with open(descriptor, "w") as file:
        file.write(made)
    return made


def prepare_database(secret: str) -> None:
    """Bring the embedded database to this version, and see to the login. Django is set up."""
    from django.contrib.auth import get_user_model
    from django.core.management import call_command
    from django.db import connections

    call_command("migrate", verbosity=0, interactive=False)
    users: Any = get_user_model()
    user, _ = users.objects.get_or_create(**{users.USERNAME_FIELD: USER})
    wrong = not user.check_password(secret)
    if wrong or not (user.is_staff and user.is_superuser and user.is_active):
        user.is_staff = user.is_superuser = user.is_active = True
        if wrong:
            user.set_password(secret)
        user.save()
    connections.close_all()


def _refuse_unmigrated() -> None:
    """Raise DevError unless the database answers and has all tables."""
    from django.db import DatabaseError, connection
    from django.db.migrations.executor import MigrationExecutor

    try:
        executor = MigrationExecutor(connection)
        plan = executor.migration_plan(executor.loader.graph.leaf_nodes())
    except DatabaseError as error:
        raise DevError(f"The database of DATABASE_URL does not answer ({type(error).__name__}).") from None
    finally:
        connection.close()
    if plan:
        raise DevError("The database of DATABASE_URL is not migrated. Run: .venv/bin/python manage.py migrate")


# --- all of it ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal are a Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _model(stack: Stack) -> Mapping[str, str]:
    """Where the environment names no model service, have the scripted one of the demo; return what agents need for it."""
    if os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"):
        return {}
    port = free_port(MODEL_PORT)
    stack.add("model", f"exec python -m agents_project.demo.model_server --port {port}")
    return {
        "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1",
        "OPENAI_API_KEY": "demo",
        "LONGHAUL_DEMO_MODEL": "openai:demo",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def _say_when_ready(stack: Stack, done: threading.Event) -> None:
    """Ask until everything is there, and say so; or say once what is missing."""
    from runs import health

    began = time.monotonic()
    patience = 60.0
    while not done.wait(READY_SECONDS):
        answer = health.readiness()
        if answer["ready"]:
            took = time.monotonic() - began
            stack.say(f"everything is up after {took:.0f} s: {stack.address('web')}/admin/; Ctrl-C ends it")
            return
        if time.monotonic() - began > patience:
            missing = {name: check["detail"] for name, check in answer["checks"].items() if not check["ok"]}
            stack.say("not yet: " + "; ".join(f"{name}: {detail}" for name, detail in missing.items()))
            patience *= 4


def run(printer: Printer) -> None:
    """Start everything, and stay until Ctrl-C. Raises DevError, EmbeddedError."""
    own_database = bool(os.environ.get("DATABASE_URL"))
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "agents_project.settings")
    embedded.ensure()
    os.environ.setdefault("SECRET_KEY", embedded.secret_key())  # one for all, with a database of one's own too
    folder = embedded.data_folder() / "dev"
    done = threading.Event()
    with _ended_by_signals(), Stack(embedded.PROJECT / "Procfile", folder, printer) as stack:
        secret = password(folder)
        stack.choose_ports()
        admin = f"{stack.address('web')}/admin/"
        environment = {
            "LONGHAUL_CELERY_EVENTS": os.environ.get("LONGHAUL_CELERY_EVENTS", "1"),
            "LONGHAUL_FLOWER_URL": stack.address("flower"),
            "LONGHAUL_ADMIN_URL": admin,
            **_model(stack),
            "FLOWER_BASIC_AUTH": os.environ.get("FLOWER_BASIC_AUTH") or f"{USER}:{secret}",
        }
        os.environ.update(environment)
        import django

        django.setup()
        if own_database:
            # Somebody's own database: neither its tables nor its users are ours to change.
            _refuse_unmigrated()
            login = "a user of your own (manage.py createsuperuser)"
        else:
            prepare_database(secret)
            login = f"{USER} / {secret}"
        stack.start(environment)
        stack.say(f"admin     {admin}")
        stack.say(f"API docs  {stack.address('web')}/api/docs")
        stack.say(f"Flower    {stack.address('flower')}/")
        stack.say(f"login     {login}" + ("" if own_database else "   (Flower's too)"))
        if "model" in stack.programs:
            stack.say("model     the demo's script, for the agent `tester`; OPENAI_API_KEY=... takes a real service")
        if own_database:
            stack.say(f"Flower's  {environment['FLOWER_BASIC_AUTH'].replace(':', ' / ', 1)}")
        threading.Thread(target=_say_when_ready, args=(stack, done), name="dev-ready", daemon=True).start()
        try:
            while True:
                stack.attend()
        except KeyboardInterrupt:
            stack.say(f"ending; workers get up to {stack.grace.seconds} s to hand on what they hold")
        finally:
            done.set()
    stack.say("everything has ended")


def main() -> int:
    try:
        run(Printer(sys.stdout))
    except (DevError, embedded.EmbeddedError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
