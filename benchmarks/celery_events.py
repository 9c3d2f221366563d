"""What Celery's events cost the main job: the same workers do the same runs, with task events off and on in turns.

Without these events Flower shows workers and queues, but no tasks. The switch is LONGHAUL_CELERY_EVENTS; here it is thrown in
workers that run, by the command with which Flower itself would throw it, so that nothing else differs. README.md tells how
it is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.forms import Longhaul
from benchmarks.rig import READY_TIMEOUT, Rig, RigError
from benchmarks.step_cost import SCRIPT, STEPS, WARM_UP_RUNS, Sample, measure, middle
from benchmarks.workers import QUIET

ANSWERS_SECONDS = 10.0  # for a worker to hear of the switch; usual are milliseconds
# Celery sends a worker's heartbeats as events too: with them its dispatcher is there, as in the Procfile, and the switch
# tells it of tasks as well. Gossip is a listener to events, and stays off.
HEARTBEAT = "--without-heartbeat"


@dataclass(frozen=True)
class Plan:
    """`rounds` of `runs` runs at once and of one run alone (`singles` times), each with events off and on."""

    rounds: int
    runs: int
    singles: int


FULL = Plan(rounds=9, runs=20, singles=3)
QUICK = Plan(rounds=3, runs=8, singles=1)


class Heard(Longhaul):
    """Longhaul's workers with a dispatcher of events, and Flower, which listens."""

    roles = (*Longhaul.roles, "flower")

    def start(self) -> None:
        for name, (role, options, environment) in self.WORKERS.items():
            quiet = [option for option in QUIET if option != HEARTBEAT]
            celery = ["-m", "celery", "-A", "agents_project", "worker", *options, "-n", f"{name}@bench", *quiet]
            self._rig.start(name, role, celery, {**environment, "LONGHAUL_CELERY_EVENTS": "0"})
        flower = ["-m", "celery", "-A", "agents_project", "flower", "--conf=agents_project/flowerconfig.py"]
        self._rig.start(
            "flower",
            "flower",
            [*flower, "--address=127.0.0.1", "--port=0"],
            {"FLOWER_BASIC_AUTH": "bench:bench", "LONGHAUL_CELERY_EVENTS": "0"},
        )

    def switch(self, on: bool) -> None:
        """Turn the events of tasks on or off in every worker. Raises RigError when one does not answer."""
        from agents_project.celery import app

        verb = "enable_events" if on else "disable_events"
        answers = app.control.broadcast(verb, reply=True, timeout=ANSWERS_SECONDS, limit=len(self.WORKERS))
        if len(answers or ()) != len(self.WORKERS):
            raise RigError(f"{verb} was answered by {answers}.\n{self._rig.logs()}")


def collect(rig: Rig, plan: Plan, console: Console) -> dict[bool, list[tuple[Sample, Sample]]]:
    """Return (many, single) of each round, by whether events were on."""
    form = Heard(rig)
    form.start()
    console.log("waiting for the workers")
    form.run(WARM_UP_RUNS, STEPS // 5, READY_TIMEOUT)
    samples: dict[bool, list[tuple[Sample, Sample]]] = {False: [], True: []}
    for round_ in range(plan.rounds):
        # Which comes first changes, for a machine that grows slower would favour it.
        for on in (False, True) if round_ % 2 == 0 else (True, False):
            form.switch(on)
            form.run(2, STEPS // 5)  # what the switch itself wakes up is not measured
            many = measure(rig, form, plan.runs, STEPS)
            single = measure(rig, form, 1, STEPS, plan.singles)
            samples[on].append((many, single))
            console.log(
                f"{round_ + 1}: events {'on ' if on else 'off'}: {many.steps_per_s:.0f} steps/s, {_cpu(many):.2f} ms CPU a step"
            )
    rig.check_processes()
    return samples


def _cpu(sample: Sample) -> float:
    """Return the CPU milliseconds a step of all but Flower, which is shown beside it."""
    return sample.cpu_ms(*Longhaul.roles)


def figures(samples: dict[bool, list[tuple[Sample, Sample]]], plan: Plan) -> dict[str, Any]:
    """Return what `--json` prints. A ratio is the median of the rounds' ratios, events on to events off."""
    pairs = list(zip(samples[True], samples[False], strict=True))
    found: dict[str, Any] = {"benchmark": "celery_events", "n": plan.rounds, "runs_at_once": plan.runs, "steps": STEPS}
    for name, on in (("off", False), ("on", True)):
        many = [each for each, _ in samples[on]]
        single = [each for _, each in samples[on]]
        found[name] = {
            "steps_per_s": middle([each.steps_per_s for each in many]),
            "cpu_ms_per_step": middle([_cpu(each) for each in many]),
            "cpu_ms_by_role": {role: middle([each.cpu_ms(role) for each in many]) for role in Heard.roles},
            "bells_and_events_per_step": middle([each.commands["publish"] / each.steps for each in many]),
            "single_steps_per_s": middle([each.steps_per_s for each in single]),
            "single_cpu_ms_per_step": middle([_cpu(each) for each in single]),
        }
    found["ratio"] = {
        "cpu": middle([_cpu(on[0]) / _cpu(off[0]) for on, off in pairs]),
        "wall": middle([off[0].steps_per_s / on[0].steps_per_s for on, off in pairs]),
        "single_cpu": middle([_cpu(on[1]) / _cpu(off[1]) for on, off in pairs]),
        "single_wall": middle([off[1].steps_per_s / on[1].steps_per_s for on, off in pairs]),
    }
    return found


def tables(found: dict[str, Any]) -> list[Table]:
    off, on, ratio = found["off"], found["on"], found["ratio"]
    table = Table(title=f"Celery's events (medians, n = {found['n']}; {found['runs_at_once']} runs at once, and 1)")
    for column in ("", "off", "on", "on / off"):
        table.add_column(column, justify="right" if column else "left")
    for title, key, compared in (
        ("steps/s", "steps_per_s", "wall"),
        ("CPU ms a step", "cpu_ms_per_step", "cpu"),
        ("1 run: steps/s", "single_steps_per_s", "single_wall"),
        ("1 run: CPU ms a step", "single_cpu_ms_per_step", "single_cpu"),
    ):
        said = f"{ratio[compared]:.2f}" + (" (wall)" if "wall" in compared else "")
        table.add_row(title, f"{off[key]:.1f}", f"{on[key]:.1f}", said)
    for role in Heard.roles:
        table.add_row(f"  {role}", f"{off['cpu_ms_by_role'][role]:.2f}", f"{on['cpu_ms_by_role'][role]:.2f}", "")
    table.add_row(
        "PUBLISH a step", f"{off['bells_and_events_per_step']:.1f}", f"{on['bells_and_events_per_step']:.1f}", ""
    )
    return [table]


def main(arguments: Sequence[str] | None = None) -> int:
    def measured(given: argparse.Namespace, console: Console) -> command.Figures:
        plan = QUICK if given.quick else FULL
        with Rig(SCRIPT) as rig:
            return figures(collect(rig, plan, console), plan)

    parser = argparse.ArgumentParser(prog="python -m benchmarks.celery_events", description=__doc__)
    return command.run(parser, measured, tables, arguments, quick="about a minute: fewer rounds, fewer runs at once")


if __name__ == "__main__":
    sys.exit(main())
