"""`manage.py demo`: two jobs on real workers, told as they happen and checked at the end.

The main job counts to 50 by a tool, while two workers are killed. The audit reads the source of an installed package,
with several tools at once in each step, and writes a report.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from django.conf import settings
from django.core.management import BaseCommand, CommandError, call_command
from django.db import OperationalError, ProgrammingError, connection, connections
from django.db.migrations.executor import MigrationExecutor
from rich.console import Console

from agents_project import embedded
from agents_project.demo import sabotage, source
from agents_project.demo.sabotage import Sabotage
from agents_project.demo.supervisor import DemoError, Kill, Supervisor
from agents_project.demo.verdict import FIRST, LAST, Verdict, judge, judge_audit
from agents_project.demo.view import DemoView, show_report, summarize
from agents_project.processes import Identity
from runs.models import Run
from runs.terminal import console_on, database_clock, drawing, draws, patient, tell

JOBS = ("main", "audit", "all")
PACKAGE = "celery"  # always there, and large enough to be worth a look
_TITLES = {
    "main": "Longhaul: an agent, 50 tool calls, many short tasks, two kill -9.",
    "audit": "Longhaul: an agent that audits a package, several tools at once.",
}
_FAREWELL = "Ended, with everything that was started."
# The run begins as soon as it can be worked on; the others come while it runs, for starts are what costs here.
FIRST_WORKERS = ("agents", "tools")
LATER_WORKERS = ("control", "agents")
SLOW_START = timedelta(seconds=12)  # of the first workers; 3 to 6 s are usual
LIMIT = timedelta(seconds=120)  # of the run; it takes 25 to 35 s, and only a bug makes it stand still
_LOOK_SECONDS = 0.02
_PRESENT_SECONDS = 0.25


class Command(BaseCommand):
    help = (
        "Runs an agent through 50 tool calls on real Celery workers, kills the agents worker while it streams and the"
        " tools worker in the middle of a call; then another agent audits an installed package, with several tools at"
        " once. Checks the outcomes in the database, and stays up for runs of your own."
    )
    requires_system_checks = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--once", action="store_true", help="end after the summary; exit 1 if a claim is false")
        parser.add_argument(
            "--job", choices=JOBS, default="all", help="only the main job, only the audit, or one after the other: all"
        )
        parser.add_argument(
            "--package",
            metavar="NAME",
            help=f"the installed package that is audited ({PACKAGE}), as pip or import has it",
        )
        parser.add_argument(
            "--kill",
            metavar="KINDS",
            help=f"which workers to kill in the main job: {','.join(sabotage.KINDS)} (the default), one, or none",
        )
        parser.add_argument("--json", action="store_true", help="one JSON line on stdout; progress goes to stderr")

    def handle(self, *, once: bool, job: str, package: str | None, kill: str | None, json: bool, **_: Any) -> None:
        began = time.monotonic() - _age().total_seconds()
        kinds = _kinds(kill)
        if job == "audit" and kill is not None:
            raise CommandError("--kill is about the main job, which --job audit leaves out.", returncode=2)
        if job == "main" and package is not None:
            raise CommandError("--package is what the audit looks at, which --job main leaves out.", returncode=2)
        audited = None if job == "main" else _package(PACKAGE if package is None else package)
        stdout, stderr = _stream(self.stdout), _stream(self.stderr)
        console = console_on(stderr if json else stdout)
        done = False
        with _ends_by_signal():
            try:
                embedded.ensure()  # not before the options are known to be good: manage.py leaves it to us
                with Supervisor(lambda said: tell(console, [f"  {said}"])) as supervisor:
                    stage = _Stage(supervisor, console, began, LIMIT if once else None)
                    stage.set_up("main" if job != "audit" else "audit", kinds)
                    verdicts: dict[str, Verdict] = {}
                    if job != "audit":
                        verdicts["main"] = _main_job(stage, kinds)
                    if audited is not None:
                        verdicts["audit"] = _audit(stage, audited)
                    if json:
                        stdout.write(_line(verdicts))
                        stdout.flush()
                    done = True
                    if not once:
                        _stay_up(supervisor, console)
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
        failed = [
            f"{claim.text}: {claim.found}"
            for verdict in verdicts.values()
            for claim in verdict.claims
            if not claim.true
        ]
        if failed:
            raise CommandError("These claims do not hold. " + "; ".join(failed))


def _kinds(kill: str | None) -> list[str]:
    if kill is None:
        return list(sabotage.KINDS)
    kinds = [] if kill == "none" else [kind.strip() for kind in kill.split(",") if kind.strip()]
    if unknown := [kind for kind in kinds if kind not in sabotage.KINDS]:
        raise CommandError(f"--kill knows {', '.join(sabotage.KINDS)} and none; not {', '.join(unknown)}.")
    if len(set(kinds)) < len(kinds) or kinds != sorted(kinds, key=sabotage.KINDS.index):
        raise CommandError(f"--kill names each kind once, in the order {','.join(sabotage.KINDS)}.")
    return kinds


def _package(name: str) -> source.Package:
    try:
        return source.find(name)
    except source.NotFound as error:
        raise CommandError(str(error), returncode=2) from error


@dataclass
class _Stage:
    """What the jobs play on: the processes, the screen, and how long a job may take."""

    supervisor: Supervisor
    console: Console
    began: float  # of this process, by time.monotonic()
    limit: timedelta | None
    complete: bool = False  # all the workers were started
    shown: int = 0  # runs so far

    def set_up(self, first: str, kinds: list[str]) -> None:
        """Bring up the model, the tables, and the workers without which no run begins."""
        supervisor = self.supervisor
        tell(self.console, [_TITLES[first] if first == "audit" or kinds else "Longhaul"])
        supervisor.start_model()  # its start overlaps with the migrations
        _migrate()
        supervisor.say(f"the tables are there after {self.age():.1f} s; the workers start")
        supervisor.await_model()
        starting = time.monotonic()
        for kind in FIRST_WORKERS:
            supervisor.start_worker(kind)
        supervisor.await_present()
        if time.monotonic() - starting > SLOW_START.total_seconds():
            # The others would come when the run is over, and a worker is killed only when another one is there.
            self.start_others()
            if "tools" in kinds:
                supervisor.stand_by("tools")
            supervisor.await_present()
        supervisor.say(f"{', '.join(sorted(supervisor.present()))} are ready after {self.age():.1f} s")

    def age(self) -> float:
        return time.monotonic() - self.began

    def start_others(self) -> None:
        """Start the workers that come while the run runs, once."""
        for kind in LATER_WORKERS if not self.complete else ():
            self.supervisor.start_worker(kind)
        self.complete = True

    def show(self, run: Run, view: DemoView, kinds: list[str]) -> list[Kill]:
        """Show the run until it ends, killing workers of these kinds on the way; returns the kills."""
        supervisor = self.supervisor
        self.start_others()
        if "tools" in kinds:
            supervisor.stand_by("tools")
        reader = _Reader(run, view, self.console)
        plan = Sabotage(supervisor, run.pk, kinds)
        deadline = None if self.limit is None else time.monotonic() + self.limit.total_seconds()
        looked = 0.0
        try:
            with drawing(view, self.console) if draws(self.console) else nullcontext():
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
                        raise DemoError(
                            f"The run did not end within {LIMIT.seconds} s: {run.why()}. Logs: {supervisor.logs}"
                        )
                    reader.join(_LOOK_SECONDS)
        finally:
            reader.left = True
        if reader.failure is not None:
            raise reader.failure
        self.shown += 1
        return plan.done


def _main_job(stage: _Stage, kinds: list[str]) -> Verdict:
    from agents_project.demo.agents import JOB, tester

    run = tester.start(JOB.format(first=FIRST, last=LAST))
    view = DemoView(run.pk, agent=tester.name, since=run.created_at, expected=LAST, clock=database_clock())
    kills = stage.show(run, view, kinds)
    verdict = judge(run, kills, kinds, _violations(run), timedelta(seconds=stage.age()))
    summarize(stage.console, verdict)
    return verdict


def _audit(stage: _Stage, package: source.Package) -> Verdict:
    from agents_project.demo.agents import AUDIT_JOB, auditor

    if stage.shown:
        tell(stage.console, ["", _TITLES["audit"]])
    began = time.monotonic()
    run = auditor.start(AUDIT_JOB.format(package=package.name))
    view = DemoView(run.pk, agent=auditor.name, since=run.created_at, expected=None, clock=database_clock())
    stage.show(run, view, [])
    verdict = judge_audit(run, package, _violations(run), timedelta(seconds=time.monotonic() - began))
    show_report(stage.console, verdict)
    summarize(stage.console, verdict)
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
        self.left = False  # nobody waits for it any more: the demo ends, and the servers under it

    def told(self, lines: list[str]) -> None:
        if not self.left and not draws(self.console):
            tell(self.console, lines)

    def run(self) -> None:
        try:
            for event in patient(lambda after: self.run_row.events(after=after, follow=True), self.view, self.told):
                self.told(self.view.apply(event.as_dict()))
        except BaseException as error:  # told by the main thread
            self.failure = error
        finally:
            connections.close_all()


def _violations(run: Run) -> int:
    from runs.invariants import check

    return sum(check(run.pk).violations.values())


def _stay_up(supervisor: Supervisor, console: Console) -> None:
    python = os.path.relpath(sys.executable, embedded.PROJECT)
    purpose = os.environ.get("LONGHAUL_PURPOSE")
    prefix = (f"LONGHAUL_PURPOSE={shlex.quote(purpose)} " if purpose else "") + f"{shlex.quote(python)} manage.py"
    job = "Test the test tool with the numbers 1-5, then give me the total."
    tell(
        console,
        [
            "",
            "The workers stay up; one that dies is replaced. To start a run of your own, in",
            "another terminal:",
            "",
            f"  cd {shlex.quote(str(embedded.PROJECT))}",
            f"  {prefix} run_agent --follow tester \\",
            f'    "{job}"',
            f"  {prefix} run_agent --follow auditor \\",
            '    "Audit the installed package rich."',
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


def _line(verdicts: Mapping[str, Verdict]) -> str:
    """Return one line: the main job's figures as they are, those of the audit under `audit`."""
    figures = dict(verdicts["main"].figures) if "main" in verdicts else {}
    if "audit" in verdicts:
        figures["audit"] = verdicts["audit"].figures
    return json.dumps(figures) + "\n"


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
