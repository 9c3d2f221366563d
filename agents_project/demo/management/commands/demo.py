"""`manage.py demo`: the main job on real workers, with two kills, told as it happens and checked at the end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from django.conf import settings
from django.core.management import BaseCommand, CommandError, call_command
from django.db import OperationalError, ProgrammingError, connection, connections
from django.db.migrations.executor import MigrationExecutor
from rich.console import Console
from rich.live import Live

from agents_project import embedded
from agents_project.demo import sabotage
from agents_project.demo.sabotage import Sabotage
from agents_project.demo.supervisor import DemoError, Kill, Supervisor
from agents_project.demo.verdict import FIRST, LAST, Verdict, judge
from agents_project.demo.view import DemoView, summarize
from agents_project.processes import Identity
from runs.models import Run
from runs.terminal import console_on, draws, tell

_FAREWELL = "Ended, with everything that was started."
# The run begins as soon as it can be worked on; the others come while it runs, for starts are what costs here.
FIRST_WORKERS = ("agents", "tools")
LATER_WORKERS = ("control", "agents")
LIMIT = timedelta(seconds=120)  # of the run; it takes 25 to 35 s, and only a bug makes it stand still
_LOOK_SECONDS = 0.02
_PRESENT_SECONDS = 0.25


class Command(BaseCommand):
    help = (
        "Runs an agent through 50 tool calls on real Celery workers, kills the agents worker while it streams and the"
        " tools worker in the middle of a call, checks the outcome in the database, and stays up for runs of your own."
    )
    requires_system_checks = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--once", action="store_true", help="end after the summary; exit 1 if a claim is false")
        parser.add_argument(
            "--kill",
            default=",".join(sabotage.KINDS),
            metavar="KINDS",
            help=f"which workers to kill: {','.join(sabotage.KINDS)} (the default), one of them, or none",
        )
        parser.add_argument("--json", action="store_true", help="one JSON line on stdout; progress goes to stderr")

    def handle(self, *, once: bool, kill: str, json: bool, **_: Any) -> None:
        began = time.monotonic() - _age().total_seconds()
        kinds = [] if kill == "none" else [kind.strip() for kind in kill.split(",") if kind.strip()]
        if unknown := [kind for kind in kinds if kind not in sabotage.KINDS]:
            raise CommandError(f"--kill knows {', '.join(sabotage.KINDS)} and none; not {', '.join(unknown)}.")
        if len(set(kinds)) < len(kinds) or kinds != sorted(kinds, key=sabotage.KINDS.index):
            raise CommandError(f"--kill names each kind once, in the order {','.join(sabotage.KINDS)}.")
        stdout, stderr = _stream(self.stdout), _stream(self.stderr)
        console = console_on(stderr if json else stdout)
        done = False
        with _ends_by_signal():
            try:
                with Supervisor(lambda said: tell(console, [f"  {said}"])) as supervisor:
                    verdict = _do_the_job(supervisor, kinds, console, began, LIMIT if once else None)
                    if json:
                        stdout.write(_line(verdict))
                        stdout.flush()
                    done = True
                    if not once:
                        _stay_up(supervisor, verdict, console)
            except KeyboardInterrupt:
                tell(console, [_FAREWELL])
                if not done or once:
                    sys.exit(130)
                return
            except (DemoError, embedded.EmbeddedError, OperationalError) as error:
                raise CommandError(str(error)) from error
            except ProgrammingError as error:
                what = str(error).partition("\n")[0]
                raise CommandError(
                    f"The tables are not those of this code: {what}. `make clean` removes them."
                ) from error
        tell(console, [_FAREWELL])
        if not verdict.upheld:
            failed = [f"{claim.text}: {claim.found}" for claim in verdict.claims if not claim.true]
            raise CommandError("These claims do not hold. " + "; ".join(failed))


def _do_the_job(
    supervisor: Supervisor, kinds: list[str], console: Console, began: float, limit: timedelta | None
) -> Verdict:
    from agents_project.demo.agents import JOB, tester

    tell(console, ["Longhaul: an agent, 50 tool calls, many short tasks, two kill -9." if kinds else "Longhaul"])
    supervisor.start_model()  # its start overlaps with the migrations
    _migrate()
    supervisor.say(f"the tables are there after {time.monotonic() - began:.1f} s; the workers start")
    supervisor.await_model()
    for kind in FIRST_WORKERS:
        supervisor.start_worker(kind)
    supervisor.await_present(FIRST_WORKERS)
    supervisor.say(f"{', '.join(sorted(supervisor.present()))} are ready after {time.monotonic() - began:.1f} s")
    run = tester.start(JOB.format(first=FIRST, last=LAST))
    for kind in LATER_WORKERS:
        supervisor.start_worker(kind)
    if "tools" in kinds:
        supervisor.stand_by("tools")
    view = DemoView(run.pk, agent=tester.name, since=run.created_at, expected=LAST)
    reader = _Reader(run, view, console)
    plan = Sabotage(supervisor, run.pk, kinds)
    deadline = None if limit is None else time.monotonic() + limit.total_seconds()
    looked = 0.0
    with Live(view, console=console, refresh_per_second=8) if draws(console) else nullcontext():
        reader.start()
        while reader.is_alive():
            kill = plan.look()
            if kill is not None:
                successor = supervisor.start_worker(kill.kind)
                doing = _doing(kill, view)
                reader.told(view.killed(kill.kind, kill.worker, kill.pid, kill.at, doing, successor))
            if time.monotonic() - looked > _PRESENT_SECONDS:
                looked = time.monotonic()
                supervisor.replace_the_dead()
                present = supervisor.present()
                view.processes = {name: name in present for name in supervisor.kinds}
            if deadline is not None and time.monotonic() > deadline:
                raise DemoError(f"The run did not end within {LIMIT.seconds} s: {run.why()}. Logs: {supervisor.logs}")
            reader.join(_LOOK_SECONDS)
    if reader.failure is not None:
        raise reader.failure
    duration = timedelta(seconds=time.monotonic() - began)
    verdict = judge(run, plan.done, kinds, _violations(run), duration)
    summarize(console, verdict)
    return verdict


def _migrate() -> None:
    """Bring the tables up to date; cheap when they are, for most starts find them so."""
    executor = MigrationExecutor(connection)
    if executor.migration_plan(executor.loader.graph.leaf_nodes()):
        call_command("migrate", verbosity=0, interactive=False)


def _doing(kill: Kill, view: DemoView) -> str:
    if kill.kind == "agents":
        return f"while it streamed step {view.steps + 1}"
    call = view.calls.get(str(kill.cut))
    return f"in the middle of {call}" if call else "in the middle of a call"


class _Reader(threading.Thread):
    """Follows the run's events into the view. A thread, for the processes must be started by the main one."""

    def __init__(self, run: Run, view: DemoView, console: Console) -> None:
        super().__init__(name="demo reader", daemon=True)
        self.run_row, self.view, self.console = run, view, console
        self.failure: BaseException | None = None

    def told(self, lines: list[str]) -> None:
        if not draws(self.console):
            tell(self.console, lines)

    def run(self) -> None:
        try:
            for event in self.run_row.events(after=0, follow=True):
                self.told(self.view.apply(event.as_dict()))
        except BaseException as error:  # told by the main thread
            self.failure = error
        finally:
            connections.close_all()


def _violations(run: Run) -> int:
    from runs.invariants import check

    return sum(check(run.pk).violations.values())


def _stay_up(supervisor: Supervisor, verdict: Verdict, console: Console) -> None:
    python = os.path.relpath(sys.executable, embedded.PROJECT)
    purpose = os.environ.get("LONGHAUL_PURPOSE")
    prefix = (f"LONGHAUL_PURPOSE={shlex.quote(purpose)} " if purpose else "") + f"{shlex.quote(python)} manage.py"
    job = "Test the test tool with the numbers 1-5, one after another, then give me the total."
    tell(
        console,
        [
            "",
            "The workers stay up; one that dies is replaced. To start a run of your own, in",
            "another terminal:",
            "",
            f"  cd {shlex.quote(str(embedded.PROJECT))}",
            f'  {prefix} run_agent tester "{job}" --follow',
            "",
            f"  model     {supervisor.model_url}",
            f"  Postgres  {settings.DATABASE_URL}",
            f"  Redis     {settings.REDIS_URL}",
            f"  logs      {supervisor.logs}",
            *(f"  {name:<9} process {supervisor.pid(name)}" for name in supervisor.kinds),
            "",
            "Ctrl-C ends all of it; the data stays (`make clean` removes it).",
        ],
    )
    while True:
        supervisor.replace_the_dead()
        time.sleep(_PRESENT_SECONDS)


def _line(verdict: Verdict) -> str:
    return json.dumps(verdict.figures) + "\n"


def _stream(wrapper: Any) -> Any:
    # What Django wraps around a stream adds a newline to each write, which a drawing cannot bear.
    return getattr(wrapper, "_out", wrapper)


def _age() -> timedelta:
    """Return how long this process lives: manage.py brings up the servers before any command begins."""
    here = Identity.of(os.getpid())
    if here is None or not Path("/proc/self/stat").exists():
        return timedelta(seconds=time.process_time())
    return timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME) - int(here.started) / os.sysconf("SC_CLK_TCK"))


@contextmanager
def _ends_by_signal() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the demo as Ctrl-C does: with all that it started."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
