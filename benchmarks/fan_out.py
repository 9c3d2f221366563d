"""What a call costs when a model asks for many in one step: 10, 100, 200 and 1,000 calls of a tool that does nothing.

Longhaul's calls beside two forms that a user would write with Celery alone, by turns on the same machine, servers and broker:
a task a call with a counter in Postgres, and a chord. README.md tells how it is measured.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table

from benchmarks import bars, command
from benchmarks.bars import Bar
from benchmarks.cpu import spent
from benchmarks.forms import Longhaul
from benchmarks.rig import READY_TIMEOUT, Rig, RigError
from benchmarks.script import prompt
from benchmarks.step_cost import OUTSIDE
from benchmarks.workers import QUIET

SCRIPT = "benchmarks.script:at_once"
CALLS = (10, 100, 200, 1000)
COMPARED = 200  # at which the goals hold; it is always measured
PROCESSES = 4  # of the tools' worker
LEAST_CALLS = 200  # a measurement: runs of few calls are done one after another until they have made so many
TIMEOUT = timedelta(seconds=120)
WARM_UP = (40, 3)  # calls, runs: each child has imported, connected and prepared


class FanOut(Longhaul):
    """One agents worker, one tools worker of four processes, one control worker."""

    WORKERS: ClassVar[dict[str, tuple[str, list[str], dict[str, str]]]] = {
        **Longhaul.WORKERS,
        "tools": ("tools", ["-Q", "longhaul.tools", "-P", "prefork", "-c", str(PROCESSES)], {}),
    }

    def fan(self, calls: int, timeout: timedelta = TIMEOUT) -> Times:
        from django.db import transaction

        from benchmarks.longhaul_app.agents import bench
        from runs.models import Run
        from tools.models import Outcome, ToolCall

        with transaction.atomic():
            run = bench.start(prompt(calls), owner=None).id
            started = self._rig.now()
        times = _await(self._rig, TIMES_OF_OURS, run, started, timeout)
        done = ToolCall.objects.filter(run_id=run, outcome=Outcome.SUCCESS).count()
        row = Run.objects.get(pk=run)
        if row.stop_reason != "end_turn" or done != calls:
            raise RigError(f"A run of {calls} calls ended as {row.stop_reason}, {row.error}.\n{self._rig.logs()}")
        return times


TIMES_OF_OURS = """
SELECT extract(epoch FROM min(c.created_at))::float8, extract(epoch FROM max(c.settled_at))::float8,
       extract(epoch FROM r.finished_at)::float8
FROM longhaul_runs_run r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
WHERE r.id = %s AND r.finished_at IS NOT NULL GROUP BY r.id
"""


class ByHand:
    """One of the Celery forms: a worker of one process for the steps, one of four for the calls."""

    def __init__(self, rig: Rig, name: str, title: str) -> None:
        self._rig = rig
        self.name = name
        self.title = title
        self.roles = (f"{name} steps", f"{name} tools", "postgres", "valkey")
        # Not before: a module with a Celery app makes it the one of the process that imports it.
        self._module = importlib.import_module(f"benchmarks.celery_{name}")
        rig.connection.execute(self._module.SCHEMA)
        self._module.app.conf.update(broker_url=os.environ["CELERY_BROKER_URL"])

    def start(self) -> None:
        for kind, processes in (("steps", 1), ("tools", PROCESSES)):
            queue = f"{self.name}.{kind}"
            command = ["-m", "celery", "-A", f"benchmarks.celery_{self.name}", "worker", "-Q", queue, "-P", "prefork"]
            self._rig.start(
                f"{self.name} {kind}",
                f"{self.name} {kind}",
                [*command, "-c", str(processes), "-n", f"{queue}@bench", *QUIET],
            )

    def fan(self, calls: int, timeout: timedelta = TIMEOUT) -> Times:
        connection = self._rig.connection
        row = connection.execute(
            f"INSERT INTO {self.name}_run (prompt) VALUES (%s) RETURNING id".encode(), [prompt(calls)]
        ).fetchone()
        assert row is not None
        run = row[0]
        started = self._rig.now()
        self._module.begin.apply_async((run, prompt(calls)))
        query = (
            "SELECT extract(epoch FROM called_at)::float8, extract(epoch FROM joined_at)::float8,"
            f" extract(epoch FROM finished_at)::float8 FROM {self.name}_run WHERE id = %s AND finished_at IS NOT NULL"
        )
        times = _await(self._rig, query, run, started, timeout)
        stored = connection.execute(
            f"SELECT array_agg(result::int ORDER BY index) FROM {self.name}_call WHERE run_id = %s".encode(), [run]
        ).fetchone()
        if stored is None or stored[0] != list(range(1, calls + 1)):
            raise RigError(f"{self.title} stored other results than those of {calls} calls.\n{self._rig.logs()}")
        return times


@dataclass(frozen=True)
class Times:
    """Seconds by Postgres's clock: of the whole run, and from its calls' being there to the last one's end."""

    whole: float
    calls: float


def _await(rig: Rig, query: str, run: Any, started: float, timeout: timedelta) -> Times:
    deadline = time.monotonic() + timeout.total_seconds()
    while (row := rig.connection.execute(query.encode(), [run]).fetchone()) is None:
        rig.check_processes()
        if time.monotonic() > deadline:
            raise RigError(f"A run did not end in {timeout}.\n{rig.logs()}")
        time.sleep(0.02)  # the row says when it ended; this says only how soon we hear of it
    called, joined, ended = row
    return Times(ended - started, joined - called)


@dataclass(frozen=True)
class Sample:
    """Some runs of `calls` calls each, one after another. `cpu`: seconds by role, of all of them."""

    calls: int
    times: tuple[Times, ...]
    cpu: dict[str, float]

    @property
    def wall_ms(self) -> float:
        """Milliseconds of a whole run, a call: from the input to the answer, both turns of the model with it."""
        return sum(each.whole for each in self.times) * 1000 / (self.calls * len(self.times))

    @property
    def calls_ms(self) -> float:
        """Milliseconds a call from the calls' being there to the last one's end."""
        return sum(each.calls for each in self.times) * 1000 / (self.calls * len(self.times))

    def cpu_ms(self, *roles: str) -> float:
        """CPU milliseconds a call of these roles, of all that are measured when none is named."""
        wanted = roles or tuple(role for role in self.cpu if role not in OUTSIDE)
        return sum(self.cpu[role] for role in wanted) * 1000 / (self.calls * len(self.times))


Form = FanOut | ByHand
Samples = dict[str, dict[int, list[Sample]]]  # by form and by calls


def measure(rig: Rig, form: Form, calls: int) -> Sample:
    before = rig.read()
    times = tuple(form.fan(calls) for _ in range(max(1, LEAST_CALLS // calls)))
    cpu = spent(before.cpu, rig.read().cpu)
    return Sample(calls, times, {role: cpu[role] for role in (*form.roles, *OUTSIDE)})


@dataclass(frozen=True)
class Plan:
    """Rounds: no further one begins that would end later than `until` seconds after the start."""

    least: int
    most: int
    until: float


FULL = Plan(least=3, most=9, until=400)
QUICK = Plan(least=1, most=2, until=45)


def collect(rig: Rig, sizes: Sequence[int], plan: Plan, console: Console, begun: float) -> Samples:
    """Warm all forms up and measure them in turns, A B C ... A B C."""
    forms: list[Form] = [
        FanOut(rig),
        ByHand(rig, "counter", "Celery and a counter in Postgres"),
        ByHand(rig, "chord", "Celery chord, results in Redis"),
    ]
    for form in forms:
        form.start()
    for form in forms:
        console.log(f"{form.title}: waiting for its processes")
        for _ in range(WARM_UP[1]):
            form.fan(WARM_UP[0], READY_TIMEOUT)
    samples: Samples = {form.name: {calls: [] for calls in sizes} for form in forms}
    longest = 0.0
    for number in range(plan.most):
        start = time.monotonic()
        if number >= plan.least and start - begun + longest > plan.until:
            break
        for calls in sizes:
            # Who comes first changes, for a machine that grows slower would favour it.
            for form in forms[number % len(forms) :] + forms[: number % len(forms)]:
                sample = measure(rig, form, calls)
                samples[form.name][calls].append(sample)
                console.log(
                    f"{number + 1}: {calls:,} calls, {form.title}: {sample.wall_ms:.2f} ms a call,"
                    f" {sample.cpu_ms():.2f} ms CPU"
                )
        longest = max(longest, time.monotonic() - start)
    rig.check_processes()
    return samples


def figures(samples: Samples) -> command.Figures:
    """Return what `--json` prints. A ratio is the median of the rounds' ratios, each of neighbours in time.

    `ratio_vs_counter` and `ratio_vs_chord` are the worse of CPU and wall at `COMPARED` calls. `growth`: the cost a call of
    Longhaul's with the most calls against that with the fewest, the worse of the two; `growth_of_more`: what each
    further call costs from the middle of the sizes to the most, against that from the fewest to the middle, for the fixed cost
    of a run hides in the first what grows with the calls.
    """
    ours = samples["longhaul"]
    sizes = sorted(ours)
    ratios = {
        f"{what}_ratio_vs_{other}": {
            calls: _middle(value(a) / value(b) for a, b in zip(ours[calls], samples[other][calls], strict=True))
            for calls in sizes
        }
        for other in samples
        if other != "longhaul"
        for what, value in (("cpu", Sample.cpu_ms), ("wall", _wall))
    }
    growth = {
        what: _middle(value(a) / value(b) for a, b in zip(ours[sizes[-1]], ours[sizes[0]], strict=True))
        for what, value in (("cpu", Sample.cpu_ms), ("wall", _wall))
    }
    of_more = {
        name: None
        if len(sizes) < 3
        else round(_of_more(each, sizes[-2], sizes[-1]) / _of_more(each, sizes[0], sizes[-2]), 3)
        for name, each in samples.items()
    }
    found: command.Figures = {
        "benchmark": "fan_out",
        "broker": "redis",
        "chord_result_backend": "redis",
        "tools_processes": PROCESSES,
        "n": len(ours[sizes[0]]),
        "ratio_vs_counter": max(ratios[f"{what}_ratio_vs_counter"][COMPARED] for what in ("cpu", "wall")),
        "ratio_vs_chord": max(ratios[f"{what}_ratio_vs_chord"][COMPARED] for what in ("cpu", "wall")),
        "growth": max(growth.values()),
        "growth_of": growth,
        "growth_of_more": of_more,
        **{name: {str(calls): value for calls, value in by_calls.items()} for name, by_calls in ratios.items()},
        "calls": {
            str(calls): {
                name: {
                    "wall_ms": _middle(each.wall_ms for each in by_calls[calls]),
                    "calls_ms": _middle(each.calls_ms for each in by_calls[calls]),
                    "cpu_ms": _middle(each.cpu_ms() for each in by_calls[calls]),
                    "cpu_ms_by_role": {
                        role: _middle(each.cpu_ms(role) for each in by_calls[calls]) for role in by_calls[calls][0].cpu
                    },
                }
                for name, by_calls in samples.items()
            }
            for calls in sizes
        },
    }
    found["bars"] = [
        each.as_dict()
        for each in (
            Bar(f"{COMPARED} calls, to Celery and a counter", found["ratio_vs_counter"], 1.3),
            Bar(f"{COMPARED} calls, to a Celery chord", found["ratio_vs_chord"], 1.0),
            Bar(f"a call of {sizes[-1]:,} to one of {sizes[0]:,}", found["growth"], 1.2),
        )
    ]
    return found


def _wall(sample: Sample) -> float:
    return sample.wall_ms


def _middle(values: Any) -> float:
    """Return the median, to three decimals."""
    return round(median(values), 3)


def _of_more(by_calls: dict[int, list[Sample]], fewer: int, more: int) -> float:
    """CPU milliseconds of each call beyond `fewer`."""
    total = {calls: median(each.cpu_ms() for each in by_calls[calls]) * calls for calls in (fewer, more)}
    return (total[more] - total[fewer]) / (more - fewer)


TITLES = {"longhaul": "Longhaul", "counter": "Celery, counter in Postgres", "chord": "Celery chord (Redis)"}


def tables(found: command.Figures) -> list[Table]:
    cost = Table(title=f"a call, in ms; {found['tools_processes']} processes for tools; medians, n = {found['n']}")
    for heading in ("calls", "", "wall", "calls alone", "CPU", "of it", "not counted: model", "load"):
        cost.add_column(heading, justify="left" if heading in ("", "of it") else "right")
    for calls, forms in found["calls"].items():
        for name, values in forms.items():
            roles = values["cpu_ms_by_role"]
            cost.add_row(
                f"{int(calls):,}",
                TITLES[name],
                *(f"{values[key]:.2f}" for key in ("wall_ms", "calls_ms", "cpu_ms")),
                ", ".join(
                    f"{role.removeprefix(f'{name} ')} {roles[role]:.2f}" for role in roles if role not in OUTSIDE
                ),
                *(f"{roles[role]:.2f}" for role in OUTSIDE),
            )
    ratios = Table(title="Longhaul to the others: medians of the rounds' ratios")
    for heading in ("calls", *(f"{what}, {other}" for other in ("counter", "chord") for what in ("CPU", "wall"))):
        ratios.add_column(heading, justify="right")
    for calls in found["calls"]:
        compared = (
            found[f"{what}_ratio_vs_{other}"][calls] for other in ("counter", "chord") for what in ("cpu", "wall")
        )
        ratios.add_row(f"{int(calls):,}", *(f"{value:.2f}" for value in compared))
    return [cost, ratios, bars.table(found["bars"])]


def main(arguments: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fan_out", description=__doc__)
    parser.add_argument(
        "--calls",
        default=",".join(map(str, CALLS)),
        help=f"how many calls a step, with commas; {COMPARED} is always among them (default %(default)s)",
    )

    def measured(given: argparse.Namespace, console: Console) -> command.Figures:
        try:
            sizes = sorted({COMPARED, *map(int, given.calls.split(","))})
        except ValueError:
            parser.error("--calls takes numbers, with commas: 10,100,1000")
        if sizes[0] < 1:
            parser.error("--calls takes numbers from 1")
        with Rig(SCRIPT) as rig:
            return figures(collect(rig, sizes, QUICK if given.quick else FULL, console, begun))

    return command.run(parser, measured, tables, arguments, quick="fewer rounds: ends in under 75 s")


if __name__ == "__main__":
    sys.exit(main())
