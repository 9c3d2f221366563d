"""What one step of a run costs: 50 tool calls one after another, 1 run alone and 20 runs at once.

Several forms of the same work take turns on the same servers (`forms`): Longhaul, a hand-made chain of Celery tasks, workflows
of DBOS and tasks of absurd, each with two kinds of model calls, and a bare loop that stores nothing. README.md tells
how it is measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.counters import StatementLog, Traffic
from benchmarks.cpu import spent
from benchmarks.forms import (
    ABSURD_PROCESSES,
    AT_ONCE,
    CORES,
    FORMS,
    AbsurdHttpx2,
    AbsurdTasks,
    BareLoop,
    CeleryChain,
    Dbos,
    DbosHttpx2,
    Form,
    Longhaul,
)
from benchmarks.rig import BROKERS, READY_TIMEOUT, Rig

SCRIPT = "benchmarks.script:steps"
STEPS = 50
WARM_UP_RUNS = 24  # more than any pool has processes, so that each has imported, connected and prepared

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


# What is asked of Longhaul beside a form: of its CPU, bar and goal, of its throughput, bar and goal.
ASKED = {
    "celery": ("<= 1.2", "1.0", ">= 1.0", "1.2"),
    "dbos": ("", "", "> 1.0", ""),
    "absurd": ("", "", "", "> 1.0"),
    "bare_openai": ("< 0.6", "0.5", "", ""),
}


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
    machine is busy, and only `fewer` runs at once are measured. `slow`: runs at once of the forms that use the
    `openai` package, which take by far the longest and cost the same a step whatever their number.
    """

    at_once: int
    fewer: int
    slow: int
    least: int
    most: int
    singles: int
    counted_runs: int
    until: float
    late: float


FULL = Plan(at_once=AT_ONCE, fewer=20, slow=20, least=2, most=9, singles=3, counted_runs=20, until=420, late=420)
QUICK = Plan(at_once=AT_ONCE, fewer=6, slow=8, least=1, most=3, singles=1, counted_runs=4, until=65, late=35)


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
        plan = replace(plan, at_once=plan.fewer, slow=plan.fewer)
        console.log(f"the machine is busy: {plan.fewer} runs at once")
    longest = 0.0
    for repetition in range(1, plan.most + 1):
        start = time.monotonic()
        if repetition > plan.least and start - begun + longest > plan.until:
            break
        for form in forms:
            results[form.name].single.append(measure(rig, form, 1, STEPS, plan.singles))
            sample = measure(rig, form, plan.slow if form.client == "openai" else plan.at_once, STEPS)
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


def figures(results: dict[str, Results], at_once: int, broker: str = "redis") -> dict[str, Any]:
    """Return what `--json` prints. A ratio is the median of the repetitions' ratios, each of neighbours in time."""
    by_form: dict[str, Any] = {}
    for name, result in results.items():
        by_form[name] = {
            "runs_at_once": result.many[0].steps // STEPS,
            "steps_per_s": middle(sample.steps_per_s for sample in result.many),
            "cpu_ms_per_step": middle(sample.cpu_ms() for sample in result.many),
            "cpu_ms_by_role": {
                role: middle(sample.cpu_ms(role) for sample in result.many) for role in result.many[0].cpu
            },
            "single_steps_per_s": middle(sample.steps_per_s for sample in result.single),
            "single_cpu_ms_per_step": middle(sample.cpu_ms() for sample in result.single),
        }
        if FORMS[name].stores:
            by_form[name] |= {
                "wal_bytes_per_step": middle(sample.wal_bytes / sample.steps for sample in result.many),
                "publishes_per_step": None,
                "bells_per_step": None,
                "valkey_commands_per_step": None,
                "round_trips_per_step": None,
                "transactions_per_step": None,
            }
        if FORMS[name].stores and "valkey" in FORMS[name].roles:  # others only hear from it when to begin
            by_form[name] |= {
                "publishes_per_step": (
                    middle(sample.commands["lpush"] / sample.steps for sample in result.many)
                    if broker == "redis"
                    else None  # RabbitMQ is not asked
                ),
                "bells_per_step": middle(sample.commands["publish"] / sample.steps for sample in result.many),
                "valkey_commands_per_step": middle(sample.commands.total() / sample.steps for sample in result.many),
            }
        if result.traffic is not None:
            by_form[name] |= {
                "round_trips_per_step": round(result.traffic.round_trips / result.traffic_steps, 2),
                "transactions_per_step": round(result.traffic.transactions / result.traffic_steps, 2),
            }
    ours = by_form.get("longhaul", {})
    return {
        "benchmark": "step_cost",
        "broker": broker,
        "steps_per_s": ours.get("steps_per_s"),
        "cpu_ms_per_step": ours.get("cpu_ms_per_step"),
        **{
            f"{what}_ratio_vs_{name}": _ratio(results, name, value)
            for what, value in (("cpu", Sample.cpu_ms), ("throughput", _steps_per_s))
            for name in FORMS
            if name != "longhaul"
        },
        "single_cpu_ratio_vs_celery": _ratio(results, "celery", Sample.cpu_ms, single=True),
        "single_throughput_ratio_vs_celery": _ratio(results, "celery", _steps_per_s, single=True),
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


def _steps_per_s(sample: Sample) -> float:
    return sample.steps_per_s


def middle(values: Iterable[float]) -> float:
    """Return the median, to three decimals."""
    return round(median(values), 3)


def _ratio(results: dict[str, Results], other: str, value: Any, single: bool = False) -> float | None:
    if "longhaul" not in results or other not in results:
        return None
    ours, theirs = (results[name].single if single else results[name].many for name in ("longhaul", other))
    return middle(value(mine) / value(its) for mine, its in zip(ours, theirs, strict=True))


def tables(found: dict[str, Any]) -> list[Table]:
    many = f"{found['runs_at_once']} runs at once over {found['broker']}"
    speed = Table(title=f"{STEPS} tool steps, {many}; medians, n = {found['n']}")
    speed.add_column("")
    servers = ("Postgres", "Valkey", "RabbitMQ") if found["broker"] == "rabbitmq" else ("Postgres", "Valkey")
    for heading in ("steps/s", "CPU ms/step", "workers", *servers, "1 run: steps/s", "CPU ms/step"):
        speed.add_column(heading, justify="right")
    for heading in ("not counted: model", "load"):
        speed.add_column(heading, justify="right", style="dim")
    costs = Table(title="a step")
    costs.add_column("")
    for heading in ("transactions", "round trips", "publishes", "bells", "Valkey commands", "WAL kB"):
        costs.add_column(heading, justify="right")
    for name, values in found["forms"].items():
        roles = values["cpu_ms_by_role"]
        workers = {role: value for role, value in roles.items() if role not in (*OUTSIDE, *map(str.lower, servers))}
        fewer = "" if values["runs_at_once"] == found["runs_at_once"] else f" ({values['runs_at_once']} at once)"
        speed.add_row(
            FORMS[name].title + fewer,
            f"{values['steps_per_s']:.0f}",
            f"{values['cpu_ms_per_step']:.2f}",
            ", ".join(f"{role.removeprefix('celery ')} {value:.2f}" for role, value in workers.items()),
            *(_number(roles.get(server.lower())) for server in servers),
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
        for heading in ("CPU", "bar", "goal", "throughput", "bar", "goal"):
            ratios.add_column(heading, justify="right")
        for name, form in FORMS.items():
            if name != "longhaul":
                cpu, throughput = (_number(found[f"{what}_ratio_vs_{name}"]) for what in ("cpu", "throughput"))
                wanted = ASKED.get(name, ("", "", "", ""))
                ratios.add_row(form.title, cpu, *wanted[:2], throughput, *wanted[2:])
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
    parser.add_argument("--only", help=f"measure only some forms, with commas: {','.join(FORMS)}")
    parser.add_argument("--broker", choices=BROKERS, default="redis", help="of Longhaul and Celery; default redis")
    parser.add_argument("--statements", action="store_true", help="show what Postgres is asked, statement by statement")
    for name, processes, what in (
        ("celery", AT_ONCE, "children of the raw Celery's steps worker (its model calls at once)"),
        ("dbos", CORES, "processes of DBOS"),
        ("absurd", ABSURD_PROCESSES, "workers of absurd"),
    ):
        parser.add_argument(f"--{name}-processes", type=int, default=processes, help=f"{what}; default {processes}")
    statements: list[Table] = []

    def measured(given: argparse.Namespace, console: Console) -> command.Figures:
        wanted = given.only.split(",") if given.only else list(FORMS)
        if set(wanted) - set(FORMS):
            parser.error(f"--only takes some of {', '.join(FORMS)}")
        with Rig(SCRIPT, given.broker) as rig:
            made: dict[str, Callable[[], Form]] = {
                Longhaul.name: lambda: Longhaul(rig),
                CeleryChain.name: lambda: CeleryChain(rig, given.celery_processes),
                Dbos.name: lambda: Dbos(rig, given.dbos_processes),
                DbosHttpx2.name: lambda: DbosHttpx2(rig, given.dbos_processes),
                AbsurdTasks.name: lambda: AbsurdTasks(rig, given.absurd_processes),
                AbsurdHttpx2.name: lambda: AbsurdHttpx2(rig, given.absurd_processes),
                BareLoop.name: lambda: BareLoop(rig),
            }
            forms = [made[name]() for name in wanted]
            results, plan = collect(rig, forms, QUICK if given.quick else FULL, console, begun)
        if given.statements:
            statements.extend(statement_table(form.title, results[form.name]) for form in forms if form.stores)
        return figures(results, plan.at_once, given.broker)

    return command.run(
        parser,
        measured,
        lambda found: [*tables(found), *statements],
        arguments,
        quick="fewer repetitions: ends in under 2 minutes",
    )


if __name__ == "__main__":
    sys.exit(main())
