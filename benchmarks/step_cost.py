"""What one step of a run costs: 50 tool calls one after another, 1 run alone and 20 runs at once.

Five forms of the same work take turns on the same servers: Longhaul, a hand-made chain of Celery tasks
(`celery_chain`), workflows of DBOS (`dbos_steps`), tasks of absurd (`absurd_steps`), and a bare loop on the `openai`
client that stores nothing (`bare_loop`). README.md tells how it is measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from statistics import median
from typing import Any, ClassVar, Protocol

from rich.console import Console
from rich.table import Table

from benchmarks import bare_loop, celery_chain
from benchmarks.counters import StatementLog, Traffic
from benchmarks.cpu import spent
from benchmarks.rig import READY_TIMEOUT, Rig, RigError
from benchmarks.script import prompt

SCRIPT = "benchmarks.script:steps"
STEPS = 50
WARM_UP_RUNS = 24  # more than any pool has processes, so that each has imported, connected and prepared
AT_ONCE = 20  # runs
CORES = os.cpu_count() or 1
ABSURD_PROCESSES = 2 * CORES  # the best of those tried; README.md has the others
RUN_TIMEOUT = timedelta(seconds=120)  # the slowest form needs 12 s for 20 runs; the machine may be three times slower

# Who is measured, and who only measures: the model server and the load generator are shown beside the sum.
OUTSIDE = ("model", "load")


@dataclass(frozen=True)
class Sample:
    """One measurement of one form. `cpu`: seconds by role."""

    steps: int
    wall: float
    cpu: dict[str, float]
    wal_bytes: int
    commands: Counter[str]

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.wall

    def cpu_ms(self, *roles: str) -> float:
        """Return the CPU milliseconds a step of these roles, of all that are measured when none is named."""
        wanted = roles or tuple(role for role in self.cpu if role not in OUTSIDE)
        return sum(self.cpu.get(role, 0.0) for role in wanted) * 1000 / self.steps


class Form(Protocol):
    """One way to do the work.

    `roles`: whose CPU it answers for. `application`: what its backends are known by to Postgres; None for Longhaul,
    whose are all that are nobody else's, and for who has none.
    """

    name: str
    title: str
    roles: tuple[str, ...]
    stores: bool

    @property
    def application(self) -> str | None: ...

    def start(self) -> None:
        """Start its processes; they need not be ready."""

    def run(self, runs: int, steps: int, timeout: timedelta = RUN_TIMEOUT) -> float:
        """Do `runs` runs at once to their end; return the seconds it took. Raises RigError when one went wrong."""


class Longhaul:
    """One agents worker, one tools worker, one control worker."""

    name = "longhaul"
    title = "Longhaul"
    roles: tuple[str, ...] = ("agents", "tools", "control", "postgres", "valkey")
    stores = True
    application = None

    # name: (role, queue, pool, environment)
    WORKERS: ClassVar[dict[str, tuple[str, list[str], dict[str, str]]]] = {
        "agents": ("agents", ["-Q", "longhaul.agents", "-P", "gevent", "-c", "200"], {"LONGHAUL_DB_POOL": "1"}),
        "tools": ("tools", ["-Q", "longhaul.tools", "-P", "prefork", "-c", "2"], {}),
        "control": ("control", ["-Q", "longhaul.control", "-P", "threads", "-c", "4"], {}),
    }

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
        import django
        from django.core.management import call_command
        from django.db import connection

        django.setup()
        call_command("migrate", verbosity=0)
        connection.ensure_connection()
        rig.is_load_generator(connection.connection)

    def start(self) -> None:
        for name, (role, options, environment) in self.WORKERS.items():
            command = ["-m", "celery", "-A", "agents_project", "worker", *options, "-n", f"{name}@bench"]
            self._rig.start(name, role, [*command, *QUIET], environment)

    def run(self, runs: int, steps: int, timeout: timedelta = RUN_TIMEOUT) -> float:
        from django.db import transaction

        from benchmarks.longhaul_app.agents import bench
        from runs.models import Run
        from tools.models import CallStatus, Outcome, ToolCall

        with transaction.atomic():
            ids = [bench.start(prompt(steps), owner=None).id for _ in range(runs)]
            started = self._rig.now()
        ended = _await_rows(
            self._rig,
            "SELECT count(*), extract(epoch FROM max(finished_at))::float8 FROM longhaul_runs_run"
            " WHERE id = ANY(%s) AND finished_at IS NOT NULL",
            ids,
            timeout,
        )
        stopped = Counter(Run.objects.filter(id__in=ids).values_list("stop_reason", flat=True))
        done = ToolCall.objects.filter(run_id__in=ids, status=CallStatus.SETTLED, outcome=Outcome.SUCCESS).count()
        if stopped != {"end_turn": runs} or done != runs * steps:
            errors = list(Run.objects.filter(id__in=ids).exclude(error=None).values_list("error", flat=True)[:3])
            calls = Counter(
                ToolCall.objects.filter(run_id__in=ids).values_list(
                    "status", "outcome", "error__code", "error__message"
                )
            )
            raise RigError(
                f"{runs} runs of {steps} steps ended as {dict(stopped)}, {errors}, with the calls {dict(calls)}.\n"
                + self._rig.logs()
            )
        return ended - started


class CeleryChain:
    """One worker for the steps and one for the tools, both prefork.

    A step's task holds its process while the model speaks, so `runs at once` takes a process a run.
    """

    name = "celery"
    title = "raw Celery chain"
    roles: tuple[str, ...] = ("celery steps", "celery tools", "postgres", "valkey")
    stores = True
    application = "celery chain"

    def __init__(self, rig: Rig, processes: int = AT_ONCE) -> None:
        self._rig = rig
        self._processes = {"steps": processes, "tools": 2}
        rig.connection.execute(celery_chain.SCHEMA)
        celery_chain.app.conf.update(broker_url=os.environ["CELERY_BROKER_URL"])

    def start(self) -> None:
        for role, queue in (("steps", "chain.steps"), ("tools", "chain.tools")):
            command = ["-m", "celery", "-A", "benchmarks.celery_chain", "worker", "-Q", queue, "-P", "prefork"]
            options = ["-c", str(self._processes[role]), "-n", f"{queue}@bench"]
            self._rig.start(
                f"celery {role}", f"celery {role}", [*command, *options, *QUIET], {"PGAPPNAME": self.application}
            )

    def run(self, runs: int, steps: int, timeout: timedelta = RUN_TIMEOUT) -> float:
        connection = self._rig.connection
        rows = connection.execute(
            "INSERT INTO chain_run (id) SELECT nextval('chain_run_id_seq') FROM generate_series(1, %s) RETURNING id",
            [runs],
        ).fetchall()
        ids = [row[0] for row in rows]
        started = self._rig.now()
        for run in ids:
            celery_chain.step.apply_async((run, 0, prompt(steps)))
        ended = _await_rows(
            self._rig,
            "SELECT count(*), extract(epoch FROM max(finished_at))::float8 FROM chain_run"
            " WHERE id = ANY(%s) AND finished_at IS NOT NULL",
            ids,
            timeout,
        )
        row = connection.execute(
            "SELECT count(*) FROM chain_message WHERE run_id = ANY(%s) AND role = 'tool'", [ids]
        ).fetchone()
        if row is None or row[0] != runs * steps:
            raise RigError(f"The chain of {runs} runs of {steps} steps called {row and row[0]} tools.")
        return ended - started


class Dbos:
    """Processes that launch DBOS; the runs are split over them, a workflow and a thread each.

    Each process starts the workflows that it is told of, so no queue is polled.
    """

    name = "dbos"
    title = "DBOS"
    roles: tuple[str, ...] = ("dbos", "postgres")
    stores = True
    application = "dbos_transact"  # it calls itself so
    ORDERS = "longhaul-bench:dbos:orders"

    def __init__(self, rig: Rig, processes: int = CORES) -> None:
        self._rig = rig
        self._processes = processes
        rig.valkey.delete(f"{self.ORDERS}:launched")

    def start(self) -> None:
        for number in range(self._processes):
            command = ["-m", "benchmarks.dbos_steps", self._orders(number), f"{self.ORDERS}:launched"]
            self._rig.start(f"dbos {number}", "dbos", command)

    def _orders(self, number: int) -> str:
        return f"{self.ORDERS}:{number}"

    def _await_launch(self) -> None:
        """Wait until every process has launched DBOS: only then its tables stand."""
        deadline = time.monotonic() + READY_TIMEOUT.total_seconds()
        while self._rig.valkey.llen(f"{self.ORDERS}:launched") < self._processes:
            self._rig.check_processes()
            if time.monotonic() > deadline:
                raise RigError(f"DBOS was not launched in {READY_TIMEOUT}.\n{self._rig.logs()}")
            time.sleep(0.05)

    def run(self, runs: int, steps: int, timeout: timedelta = RUN_TIMEOUT) -> float:
        self._await_launch()
        ids = [str(uuid.uuid4()) for _ in range(runs)]
        started = self._rig.now()
        for number in range(min(runs, self._processes)):
            order = {"runs": ids[number :: self._processes], "prompt": prompt(steps)}
            self._rig.valkey.rpush(self._orders(number), json.dumps(order))
        ended = _await_rows(
            self._rig,
            "SELECT count(*), max(completed_at) / 1000.0::float8 FROM dbos.workflow_status"
            " WHERE workflow_uuid = ANY(%s) AND completed_at IS NOT NULL",
            ids,
            timeout,
        )
        found = self._rig.connection.execute(
            "SELECT (SELECT count(*) FROM dbos.workflow_status WHERE workflow_uuid = ANY(%(ids)s)"
            "   AND status = 'SUCCESS'),"
            " (SELECT count(*) FROM (SELECT FROM dbos.operation_outputs WHERE workflow_uuid = ANY(%(ids)s)"
            "   AND function_name = 'take' AND error IS NULL GROUP BY workflow_uuid HAVING count(*) = %(steps)s) as_asked)",
            {"ids": ids, "steps": steps},
        ).fetchone()
        if found != (runs, runs):
            raise RigError(
                f"DBOS, {runs} runs of {steps} steps: (ended well, called as many tools) is {found}.\n{self._rig.logs()}"
            )
        return ended - started


class AbsurdTasks:
    """Workers of absurd; each claims tasks from the queue in Postgres and runs them, a thread each.

    They work only while a run of theirs goes on, for a worker at rest asks Postgres four times a second.
    """

    name = "absurd"
    title = "absurd"
    roles: tuple[str, ...] = ("absurd", "postgres")
    stores = True
    application = "absurd"
    QUEUE = "bench"
    ORDERS = "longhaul-bench:absurd:orders"

    def __init__(self, rig: Rig, processes: int = ABSURD_PROCESSES) -> None:
        from absurd_sdk import Absurd

        self._rig = rig
        self._processes = processes
        rig.connection.execute(importlib.import_module("absurdctl").BUNDLED_SCHEMA_SQL)
        self._client = Absurd(rig.connection, queue_name=self.QUEUE)
        self._client.create_queue()

    def start(self) -> None:
        concurrency = -(-AT_ONCE // self._processes)
        options = ["--processes", str(self._processes), "--concurrency", str(concurrency)]
        command = ["-m", "benchmarks.absurd_steps", self.QUEUE, self.ORDERS, *options]
        self._rig.start("absurd", "absurd", command, {"PGAPPNAME": self.application})

    def _order(self, order: str) -> None:
        for number in range(self._processes):
            self._rig.valkey.rpush(f"{self.ORDERS}:{number}", order)

    def run(self, runs: int, steps: int, timeout: timedelta = RUN_TIMEOUT) -> float:
        connection = self._rig.connection
        with connection.transaction():
            spawned = [self._client.spawn("converse", {"prompt": prompt(steps)}, queue=self.QUEUE) for _ in range(runs)]
            started = self._rig.now()
        ids = [each["task_id"] for each in spawned]
        self._order("work")
        ended = _await_rows(
            self._rig,
            "SELECT count(*), extract(epoch FROM max(completed_at))::float8 FROM absurd.r_bench"
            " WHERE task_id = ANY(%s) AND state IN ('completed', 'failed', 'cancelled')",
            ids,
            timeout,
        )
        self._order("rest")
        found = connection.execute(
            "SELECT (SELECT count(*) FROM absurd.t_bench WHERE task_id = ANY(%(ids)s) AND state = 'completed'),"
            " (SELECT count(*) FROM (SELECT FROM absurd.c_bench WHERE task_id = ANY(%(ids)s)"
            "   AND checkpoint_name ~ '^take(#|$)' GROUP BY task_id HAVING count(*) = %(steps)s) as_asked)",
            {"ids": ids, "steps": steps},
        ).fetchone()
        if found != (runs, runs):
            raise RigError(
                f"absurd, {runs} runs of {steps} steps: (ended well, called as many tools) is {found}.\n{self._rig.logs()}"
            )
        return ended - started


class BareLoop:
    """A process a core, for threads alone share one; the runs are split over them, a thread each."""

    name = "bare_openai"
    title = "bare openai loop"
    roles: tuple[str, ...] = ("bare",)
    stores = False
    application = None  # it has none

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._processes = CORES

    def start(self) -> None:
        for number in range(1, self._processes + 1):
            self._rig.start(f"bare {number}", "bare", ["-m", "benchmarks.bare_loop"])

    def run(self, runs: int, steps: int, timeout: timedelta = RUN_TIMEOUT) -> float:
        shares = [runs // self._processes + (number < runs % self._processes) for number in range(self._processes)]
        orders = [json.dumps({"runs": share, "prompt": prompt(steps)}) for share in shares if share]
        valkey = self._rig.valkey
        valkey.delete(bare_loop.ORDERS, bare_loop.ANSWERS)
        started = time.monotonic()
        valkey.rpush(bare_loop.ORDERS, *orders)
        answers: list[dict[str, Any]] = []
        while len(answers) < len(orders):
            answer = valkey.blpop([bare_loop.ANSWERS], timeout=1)
            if answer is not None:
                answers.append(json.loads(answer[1]))
                continue
            self._rig.check_processes()
            if time.monotonic() - started > timeout.total_seconds():
                raise RigError(f"The bare loops did not end in {timeout}.\n{self._rig.logs()}")
        called = sum(answer["calls"] for answer in answers)
        if called != runs * steps:
            raise RigError(f"The bare loops of {runs} runs of {steps} steps called {called} tools.")
        return time.monotonic() - started


# What no form needs: talk between workers. Measured to cost nothing; off, so that nothing but the work is counted.
QUIET = ("--without-gossip", "--without-mingle", "--without-heartbeat")
FORMS: dict[str, type[Longhaul] | type[CeleryChain] | type[Dbos] | type[AbsurdTasks] | type[BareLoop]] = {
    form.name: form for form in (Longhaul, CeleryChain, Dbos, AbsurdTasks, BareLoop)
}


def _await_rows(rig: Rig, query: str, ids: Sequence[Any], timeout: timedelta) -> float:
    """Ask until all rows of `ids` have ended; return when the last one did, by Postgres's clock."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        row = rig.connection.execute(query.encode(), [list(ids)]).fetchone()
        assert row is not None
        if row[0] == len(ids):
            return float(row[1])
        rig.check_processes()
        if time.monotonic() > deadline:
            raise RigError(f"{len(ids) - row[0]} of {len(ids)} runs did not end in {timeout}.\n{rig.logs()}")
        time.sleep(0.05)  # the rows say when they ended; this says only how soon we hear of it


def measure(rig: Rig, form: Form, runs: int, steps: int, times: int = 1) -> Sample:
    """Do `runs` runs at once, `times` times one after another, and return what it took."""
    before = rig.read()
    wall = sum(form.run(runs, steps) for _ in range(times))
    after = rig.read()
    cpu = spent(before.cpu, after.cpu)
    return Sample(
        steps=runs * steps * times,
        wall=wall,
        cpu={role: cpu[role] for role in (*form.roles, *OUTSIDE)},
        wal_bytes=after.wal_bytes - before.wal_bytes,
        commands=Counter(after.commands) - Counter(before.commands),
    )


@dataclass
class Results:
    """All samples of one form, and what was counted in runs that were not timed."""

    many: list[Sample] = field(default_factory=list)
    single: list[Sample] = field(default_factory=list)
    traffic: Traffic | None = None
    traffic_steps: int = 0


@dataclass(frozen=True)
class Plan:
    """How much is measured. Times are seconds from the start of the benchmark.

    `until`: no further repetition begins that would end later. `late`: when the warm-up ends later than this, the
    machine is busy, and only `fewer` runs at once are measured. `bare`: runs at once of the bare loop, which takes by
    far the longest and costs the same a step whatever their number.
    """

    at_once: int
    fewer: int
    bare: int
    least: int
    most: int
    singles: int
    counted_runs: int
    until: float
    late: float


FULL = Plan(at_once=AT_ONCE, fewer=20, bare=20, least=2, most=9, singles=3, counted_runs=20, until=420, late=420)
QUICK = Plan(at_once=AT_ONCE, fewer=6, bare=8, least=1, most=3, singles=1, counted_runs=4, until=65, late=35)


def collect(
    rig: Rig, forms: Sequence[Form], plan: Plan, console: Console, begun: float
) -> tuple[dict[str, Results], Plan]:
    """Start all forms, warm them up, count their statements, measure them in turns; return what was done, too."""
    results = {form.name: Results() for form in forms}
    for form in forms:
        form.start()
    for form in forms:
        # The first runs that come through show that its workers are ready.
        console.log(f"{form.title}: waiting for its processes")
        form.run(WARM_UP_RUNS, STEPS // 5, READY_TIMEOUT)
    for form in forms:
        if form.stores:
            count(rig, form, plan, results[form.name])
    if time.monotonic() - begun > plan.late:
        plan = replace(plan, at_once=plan.fewer, bare=plan.fewer)
        console.log(f"the machine is busy: {plan.fewer} runs at once")
    longest = 0.0
    for repetition in range(1, plan.most + 1):
        start = time.monotonic()
        if repetition > plan.least and start - begun + longest > plan.until:
            break
        for form in forms:
            results[form.name].single.append(measure(rig, form, 1, STEPS, plan.singles))
            sample = measure(rig, form, plan.at_once if form.stores else plan.bare, STEPS)
            results[form.name].many.append(sample)
            console.log(
                f"{repetition}: {form.title}: {sample.steps_per_s:.0f} steps/s, {sample.cpu_ms():.2f} ms CPU a step"
            )
        longest = max(longest, time.monotonic() - start)
    return results, plan


def count(rig: Rig, form: Form, plan: Plan, results: Results) -> None:
    """Count round trips and transactions of some runs. Not timed, for naming every statement slows Postgres down."""
    log: AbstractContextManager[StatementLog | None] = rig.statement_log() or nullcontext()
    with log as statements:
        if statements is None:
            return
        # Backends hear of the new setting between two statements; the first run is theirs to hear it.
        form.run(WARM_UP_RUNS, 3)
        statements.mark()
        form.run(plan.counted_runs, STEPS)
        results.traffic = statements.read(backends_of(rig, form))
        results.traffic_steps = plan.counted_runs * STEPS


def backends_of(rig: Rig, form: Form) -> Callable[[int], bool]:
    """Return whether a pid is that of a form's backend: all forms' processes are up while one is counted."""
    if form.application is not None:
        return rig.is_backend_of(form.application)
    others = [rig.is_backend_of(each.application) for each in FORMS.values() if each.application is not None]
    return lambda pid: rig.is_counted(pid) and not any(is_other(pid) for is_other in others)


# --- the report ----------------------------------------------------------------------------------------------------


def figures(results: dict[str, Results], at_once: int) -> dict[str, Any]:
    """Return what `--json` prints. A ratio is the median of the repetitions' ratios, each of neighbours in time."""
    by_form: dict[str, Any] = {}
    for name, result in results.items():
        by_form[name] = {
            "steps_per_s": _middle(sample.steps_per_s for sample in result.many),
            "cpu_ms_per_step": _middle(sample.cpu_ms() for sample in result.many),
            "cpu_ms_by_role": {
                role: _middle(sample.cpu_ms(role) for sample in result.many) for role in result.many[0].cpu
            },
            "single_steps_per_s": _middle(sample.steps_per_s for sample in result.single),
            "single_cpu_ms_per_step": _middle(sample.cpu_ms() for sample in result.single),
        }
        if FORMS[name].stores:
            by_form[name] |= {
                "wal_bytes_per_step": _middle(sample.wal_bytes / sample.steps for sample in result.many),
                "publishes_per_step": None,
                "bells_per_step": None,
                "valkey_commands_per_step": None,
                "round_trips_per_step": None,
                "transactions_per_step": None,
            }
        if FORMS[name].stores and "valkey" in FORMS[name].roles:  # others only hear from it when to begin
            by_form[name] |= {
                "publishes_per_step": _middle(sample.commands["lpush"] / sample.steps for sample in result.many),
                "bells_per_step": _middle(sample.commands["publish"] / sample.steps for sample in result.many),
                "valkey_commands_per_step": _middle(sample.commands.total() / sample.steps for sample in result.many),
            }
        if result.traffic is not None:
            by_form[name] |= {
                "round_trips_per_step": round(result.traffic.round_trips / result.traffic_steps, 2),
                "transactions_per_step": round(result.traffic.transactions / result.traffic_steps, 2),
            }
    ours = by_form.get("longhaul", {})
    return {
        "benchmark": "step_cost",
        "steps_per_s": ours.get("steps_per_s"),
        "cpu_ms_per_step": ours.get("cpu_ms_per_step"),
        "cpu_ratio_vs_celery": _ratio(results, "celery", Sample.cpu_ms),
        "cpu_ratio_vs_bare_openai": _ratio(results, "bare_openai", Sample.cpu_ms),
        "cpu_ratio_vs_dbos": _ratio(results, "dbos", Sample.cpu_ms),
        "cpu_ratio_vs_absurd": _ratio(results, "absurd", Sample.cpu_ms),
        "throughput_ratio_vs_celery": _ratio(results, "celery", lambda sample: sample.steps_per_s),
        "throughput_ratio_vs_dbos": _ratio(results, "dbos", lambda sample: sample.steps_per_s),
        "throughput_ratio_vs_absurd": _ratio(results, "absurd", lambda sample: sample.steps_per_s),
        "single_cpu_ratio_vs_celery": _ratio(results, "celery", Sample.cpu_ms, single=True),
        "single_throughput_ratio_vs_celery": _ratio(results, "celery", lambda sample: sample.steps_per_s, single=True),
        "round_trips_per_step": ours.get("round_trips_per_step"),
        "transactions_per_step": ours.get("transactions_per_step"),
        "wal_bytes_per_step": ours.get("wal_bytes_per_step"),
        "publishes_per_step": ours.get("publishes_per_step"),
        "bells_per_step": ours.get("bells_per_step"),
        "runs_at_once": at_once,
        "steps_per_run": STEPS,
        "n": len(next(iter(results.values())).many),
        "forms": by_form,
    }


def _middle(values: Any) -> float:
    return round(median(values), 3)


def _ratio(results: dict[str, Results], other: str, value: Any, single: bool = False) -> float | None:
    if "longhaul" not in results or other not in results:
        return None
    ours, theirs = (results[name].single if single else results[name].many for name in ("longhaul", other))
    return _middle(value(mine) / value(its) for mine, its in zip(ours, theirs, strict=True))


def tables(found: dict[str, Any]) -> list[Table]:
    speed = Table(title=f"{STEPS} tool steps, {found['runs_at_once']} runs at once; medians, n = {found['n']}")
    speed.add_column("")
    for heading in ("steps/s", "CPU ms/step", "workers", "Postgres", "Valkey", "1 run: steps/s", "CPU ms/step"):
        speed.add_column(heading, justify="right")
    for heading in ("not counted: model", "load"):
        speed.add_column(heading, justify="right", style="dim")
    costs = Table(title="a step")
    costs.add_column("")
    for heading in ("transactions", "round trips", "publishes", "bells", "Valkey commands", "WAL kB"):
        costs.add_column(heading, justify="right")
    for name, values in found["forms"].items():
        roles = values["cpu_ms_by_role"]
        workers = {role: value for role, value in roles.items() if role not in (*OUTSIDE, "postgres", "valkey")}
        speed.add_row(
            FORMS[name].title,
            f"{values['steps_per_s']:.0f}",
            f"{values['cpu_ms_per_step']:.2f}",
            ", ".join(f"{role.removeprefix('celery ')} {value:.2f}" for role, value in workers.items()),
            _number(roles.get("postgres")),
            _number(roles.get("valkey")),
            f"{values['single_steps_per_s']:.0f}",
            f"{values['single_cpu_ms_per_step']:.2f}",
            f"{roles['model']:.2f}",
            f"{roles['load']:.2f}",
        )
        if FORMS[name].stores:
            costs.add_row(
                FORMS[name].title,
                _number(values["transactions_per_step"]),
                _number(values["round_trips_per_step"]),
                _number(values["publishes_per_step"]),
                _number(values["bells_per_step"]),
                _number(values["valkey_commands_per_step"]),
                _number(values["wal_bytes_per_step"] / 1000),
            )
    made = [speed, costs]
    if any(found[key] is not None for key in found if "_ratio_vs_" in key):
        ratios = Table(title="Longhaul to the others: medians of the repetitions' ratios")
        ratios.add_column("")
        for heading in ("measured", "bar", "goal"):
            ratios.add_column(heading, justify="right")
        for label, key, bar, goal in (
            ("CPU to Celery's", "cpu_ratio_vs_celery", "<= 1.2", "1.0"),
            ("CPU to the bare loop's", "cpu_ratio_vs_bare_openai", "< 0.6", "0.5"),
            ("CPU to DBOS's", "cpu_ratio_vs_dbos", "", ""),
            ("CPU to absurd's", "cpu_ratio_vs_absurd", "", ""),
            ("throughput to Celery's", "throughput_ratio_vs_celery", ">= 1.0", "1.2"),
            ("throughput to DBOS's", "throughput_ratio_vs_dbos", "> 1.0", ""),
            ("throughput to absurd's", "throughput_ratio_vs_absurd", "", "> 1.0"),
        ):
            ratios.add_row(label, _number(found[key]), bar, goal)
        made.append(ratios)
    return made


def statement_table(title: str, result: Results) -> Table:
    table = Table(title=f"{title}: what Postgres is asked, a step")
    table.add_column("times", justify="right")
    table.add_column("statement")
    if result.traffic is not None:
        for statement, times in result.traffic.statements.most_common(15):
            table.add_row(f"{times / result.traffic_steps:.2f}", statement)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cost", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: ends in under 75 s")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of tables")
    parser.add_argument("--only", help=f"measure only some forms, with commas: {','.join(FORMS)}")
    parser.add_argument("--statements", action="store_true", help="show what Postgres is asked, statement by statement")
    for name, processes, what in (
        ("celery", AT_ONCE, "children of the raw Celery's steps worker (its model calls at once)"),
        ("dbos", CORES, "processes of DBOS"),
        ("absurd", ABSURD_PROCESSES, "workers of absurd"),
    ):
        parser.add_argument(f"--{name}-processes", type=int, default=processes, help=f"{what}; default {processes}")
    given = parser.parse_args(arguments)
    wanted = given.only.split(",") if given.only else list(FORMS)
    if set(wanted) - set(FORMS):
        parser.error(f"--only takes some of {', '.join(FORMS)}")
    plan = QUICK if given.quick else FULL
    console = Console(stderr=True, log_path=False)
    out = Console()
    if not out.is_terminal:
        out.width = 160  # a pipe has no width; rich would take 80
    try:
        with Rig(SCRIPT) as rig:
            made: dict[str, Callable[[], Form]] = {
                Longhaul.name: lambda: Longhaul(rig),
                CeleryChain.name: lambda: CeleryChain(rig, given.celery_processes),
                Dbos.name: lambda: Dbos(rig, given.dbos_processes),
                AbsurdTasks.name: lambda: AbsurdTasks(rig, given.absurd_processes),
                BareLoop.name: lambda: BareLoop(rig),
            }
            forms = [made[name]() for name in wanted]
            results, plan = collect(rig, forms, plan, console, begun)
    except RigError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    found = {**figures(results, plan.at_once), "duration_s": round(time.monotonic() - begun, 1)}
    if given.json:
        print(json.dumps(found))
        return 0
    for table in tables(found):
        out.print(table)
    if given.statements:
        for form in forms:
            if form.stores:
                out.print(statement_table(form.title, results[form.name]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
