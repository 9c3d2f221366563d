"""How long a run stands still when its worker is killed: from SIGKILL to its next leg, or its call's next attempt.

The agents worker is killed in mid-stream, the tools worker in mid-call, each at a random moment, with a second one of
its kind up; then it is replaced. All times are Postgres's. README.md tells how it is measured.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.rig import BROKERS, Rig, RigError
from benchmarks.speech import SENTENCE
from benchmarks.workers import Workers, check_invariants, percentile, prepare, spread

SCRIPT = "benchmarks.speech:told"
STREAM_SECONDS = 3.0  # of the run that is killed in mid-stream
LATEST_KILL_SECONDS = 1.0  # after its first text, or after the begin of its call
KINDS = ("idempotent", "atomic", "other")
AT_ONCE = ("idempotent", "atomic")  # what may run again at once; `other` waits for a missed beat too
PATIENCE = timedelta(seconds=30)

# By their documentation or source, at default settings; not measured here.
PEERS = {
    "absurd": "120 s",
    "procrastinate": "up to 10 min",
    "DBOS": "never without a person",
    "LangGraph": "never without a person",
    "Celery on Redis": "over 90 s",
}
# On RabbitMQ the message of the dead comes back at once, and its receiver need not wait for the watcher.
GOAL_ON_RABBITMQ = 150
GOALS = (
    ("agents, mid-stream", "agents", 500, 1000),
    ("tools: idempotent", "tools_idempotent", 500, 1000),
    ("tools: atomic", "tools_atomic", 500, 1000),
    ("tools: idempotent and atomic", "tools", 500, 1000),
    ("tools: other", "tools_other", 5000, 5000),
)


@dataclass(frozen=True)
class Kill:
    """One kill. All in seconds by Postgres's clock: `killed` before the signal was sent, `free` when the session lock of
    the dead was seen free, `lost` when it was reclaimed, `next` when the next leg or attempt was claimed, `spoke` when
    its first text was written (None for a call).
    """

    kind: str
    killed: float
    free: float
    lost: float
    next: float
    spoke: float | None = None

    @property
    def seconds(self) -> float:
        return self.next - self.killed


@dataclass(frozen=True)
class Plan:
    """How often is killed: a round kills one agents worker and one tools worker. Times are seconds from the start of the
    benchmark: no round begins after `until`, but for the first `least`.
    """

    least: int
    most: int
    until: float


FULL = Plan(least=15, most=30, until=400)  # at most 30 agents workers, and 10 tools workers a kind
QUICK = Plan(least=3, most=9, until=33)


class Resume:
    """Kills, and reads from the rows what became of it."""

    def __init__(self, rig: Rig) -> None:
        from benchmarks.longhaul_app.agents import killed

        self._rig = rig
        self._agent = killed
        self.workers = Workers(rig)
        self._random = random.Random()
        self._runs: list[UUID] = []

    def round(self, kind: str) -> list[Kill]:
        """Kill an agents worker, then a tools worker in a call of this kind; replace both and see both runs to their end."""
        kills = [self.agents(), self.tools(kind)]
        # After the measuring, for a Python that starts takes a core for seconds.
        self.workers.up(agents=2, tools=2)
        self.ended()
        return kills

    def agents(self) -> Kill:
        run = self._start(f"tell {STREAM_SECONDS}")
        spoken = "SELECT 1 FROM longhaul_runs_event WHERE run_id = %s AND type = 'text.delta' LIMIT 1"
        self._eventually(spoken, run, why="the run streams")
        self._wait_at_random()
        holder, number = self._one("SELECT holder, legs FROM longhaul_runs_run WHERE id = %s", run)
        killed, free = self._kill(holder)
        (began,) = self._eventually(
            "SELECT extract(epoch FROM started_at)::float8 FROM longhaul_runs_leg WHERE run_id = %s AND number = %s",
            run,
            number + 1,
            why="the next leg",
        )
        lost, reason = self._one(
            "SELECT extract(epoch FROM ended_at)::float8, reason FROM longhaul_runs_leg WHERE run_id = %s AND number = %s",
            run,
            number,
        )
        if reason != "lost":
            raise RigError(f"The leg of the killed worker ended as {reason!r}.")
        (spoke,) = self._eventually(
            "SELECT extract(epoch FROM at)::float8 FROM longhaul_runs_event WHERE run_id = %s AND type = 'text.delta'"
            " AND seq > (SELECT seq FROM longhaul_runs_event WHERE run_id = %s AND type = 'leg.started'"
            " ORDER BY seq DESC LIMIT 1) ORDER BY seq LIMIT 1",
            run,
            run,
            why="the next leg streams",
        )
        return Kill("agents", killed, free, lost, began, spoke)

    def tools(self, kind: str) -> Kill:
        run = self._start(f"call killed_{kind} 1 0")
        call, holder = self._eventually(
            "SELECT id, holder FROM longhaul_tools_toolcall WHERE run_id = %s AND status = 'running'",
            run,
            why="the tool runs",
        )
        self._wait_at_random()
        killed, free = self._kill(holder)
        attempt = (
            "SELECT extract(epoch FROM started_at)::float8, extract(epoch FROM ended_at)::float8, outcome"
            " FROM longhaul_tools_toolattempt WHERE call_id = %s AND number = %s"
        )
        began, *_ = self._eventually(attempt, call, 2, why="the next attempt")
        _, lost, outcome = self._one(attempt, call, 1)
        if outcome != "lost":
            raise RigError(f"The attempt of the killed worker ended as {outcome!r}.")
        return Kill(kind, killed, free, lost, began)

    def ended(self) -> None:
        """Wait for the end of all runs, and see that none has lost anything."""
        from runs.models import Run

        live = "SELECT count(*) = 0 FROM longhaul_runs_run WHERE id = ANY (%s) AND finished_at IS NULL"
        self.workers.eventually(lambda: self._one(live, self._runs)[0], "all runs end", PATIENCE)
        for run in Run.objects.filter(pk__in=self._runs):
            if (run.status, run.output) != ("completed", SENTENCE):
                raise RigError(f"Run {run.pk} is {run.status}, its output {run.output!r}: {run.why()}")
        self._runs.clear()

    def _start(self, prompt: str) -> UUID:
        run = self._agent.start(prompt, owner=None).pk
        self._runs.append(run)
        return run

    def _wait_at_random(self) -> None:
        time.sleep(self._random.uniform(0.05, LATEST_KILL_SECONDS))  # the moment is what is drawn

    def _kill(self, life: UUID) -> tuple[float, float]:
        name = self.workers.holder(life)
        killed = self.workers.kill(name)
        free = "SELECT extract(epoch FROM clock_timestamp())::float8 WHERE NOT longhaul_worker_locked(%s)"
        return killed, self._eventually(free, life, why="the lock of the killed worker is free", pause=0.001)[0]

    def _one(self, query: str, *parameters: Any) -> tuple[Any, ...]:
        row = self._rig.connection.execute(query.encode(), parameters).fetchone()
        if row is None:
            raise RigError(f"No row: {query}")
        return tuple(row)

    def _eventually(self, query: str, *parameters: Any, why: str, pause: float = 0.02) -> tuple[Any, ...]:
        def look() -> tuple[Any, ...] | None:
            return self._rig.connection.execute(query.encode(), parameters).fetchone()

        row = self.workers.eventually(look, why, PATIENCE, pause)
        assert row is not None
        return row


def collect(rig: Rig, plan: Plan, console: Console, begun: float) -> list[Kill]:
    prepare(rig)
    bench = Resume(rig)
    console.log("waiting for the workers")
    bench.workers.up(agents=2, tools=2, control=1)
    for _ in range(4):  # both of each kind have imported, connected and prepared
        bench._start("call look 2 0")
    bench.ended()
    kills: list[Kill] = []
    for number in range(plan.most):
        if number >= plan.least and time.monotonic() - begun > plan.until:
            break
        for kill in bench.round(KINDS[number % len(KINDS)]):
            kills.append(kill)
            console.log(f"{number + 1}: {kill.kind}: {kill.seconds * 1000:.0f} ms")
    violations = check_invariants()
    if violations:
        raise RigError(f"check_runs counts {violations} violations.")
    return kills


# --- the report ----------------------------------------------------------------------------------------------------


def figures(kills: Sequence[Kill], broker: str = "redis") -> dict[str, Any]:
    """Return what `--json` prints. "tools" are the idempotent and the atomic ones."""
    groups: dict[str, Sequence[str]] = {
        "agents": ("agents",),
        "tools": AT_ONCE,
        **{f"tools_{kind}": (kind,) for kind in KINDS},
    }
    found: dict[str, Any] = {"benchmark": "resume", "broker": broker}
    for name, kinds in groups.items():
        chosen = [kill for kill in kills if kill.kind in kinds]
        found[name] = {**spread([kill.seconds for kill in chosen]), "parts": parts(chosen)}
    found["tools"]["kinds"] = list(AT_ONCE)
    found["peers_by_default"] = PEERS
    return found


def parts(kills: Sequence[Kill]) -> dict[str, Any]:
    """Return where the time goes: median and longest of each part, in ms."""
    each = {
        "lock_free": [kill.free - kill.killed for kill in kills],
        "seen_and_reclaimed": [kill.lost - kill.free for kill in kills],
        "sent_and_claimed": [kill.next - kill.lost for kill in kills],
        "first_text": [kill.spoke - kill.next for kill in kills if kill.spoke is not None],
    }
    return {
        name: {"p50_ms": percentile(seconds, 50), "max_ms": percentile(seconds, 100)}
        for name, seconds in each.items()
        if seconds
    }


def tables(found: dict[str, Any]) -> list[Table]:
    spreads = Table(title=f"from SIGKILL to the next leg (the next attempt) over {found['broker']}, ms")
    spreads.add_column("")
    for heading in ("n", "p50", "p90", "max", "goal: p50", "max"):
        spreads.add_column(heading, justify="right")
    where = Table(title="where the time goes, ms: p50 (max)")
    where.add_column("")
    headings = {
        "lock_free": "the kernel frees the lock",
        "seen_and_reclaimed": "it is seen and reclaimed",
        "sent_and_claimed": "sent and claimed",
        "first_text": "then: the first text",
    }
    for heading in headings.values():
        where.add_column(heading, justify="right")
    for label, key, p50, longest in GOALS:
        values = found[key]
        if not values["n"]:
            continue
        if found["broker"] == "rabbitmq" and key != "tools_other":
            p50 = GOAL_ON_RABBITMQ
        spreads.add_row(
            label,
            str(values["n"]),
            *(f"{values[name]:.0f}" for name in ("p50_ms", "p90_ms", "max_ms")),
            f"< {p50}",
            f"< {longest}",
        )
        where.add_row(
            label,
            *(
                f"{part['p50_ms']:.0f} ({part['max_ms']:.0f})" if (part := values["parts"].get(name)) else "-"
                for name in headings
            ),
        )
    peers = Table(title="the same by the peers' defaults, not measured here")
    for name in PEERS:
        peers.add_column(name, justify="right")
    peers.add_row(*PEERS.values())
    return [spreads, where, peers]


def main(arguments: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=__doc__)
    parser.add_argument("--broker", choices=BROKERS, default="redis", help="what carries the messages; default redis")

    def measured(given: argparse.Namespace, console: Console) -> command.Figures:
        with Rig(SCRIPT, given.broker) as rig:
            return figures(collect(rig, QUICK if given.quick else FULL, console, begun), given.broker)

    return command.run(parser, measured, tables, arguments, quick="fewer kills: ends in under 55 s")


if __name__ == "__main__":
    sys.exit(main())
