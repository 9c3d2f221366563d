"""What the HTTP API costs at 100,000 runs and a million events, beside two bare DRF views on the same server.

One uvicorn process serves Longhaul's API and, under /bare/, a DRF view that inserts a row and one that reads one; all check
the same key. Each call is measured after these two in every round. README.md tells more.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from uuid import uuid4

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from agents_project.processes import free_port
from benchmarks import command
from benchmarks.counters import Traffic
from benchmarks.cpu import spent
from benchmarks.rig import PROJECT, READY_TIMEOUT, Rig, RigError
from benchmarks.workers import percentile, prepare

SCRIPT = "benchmarks.script:count"  # of the model server, which nobody asks
BAR = 2.5  # a start to a bare insert
CONNECTIONS = 8
THREADS = 5000
WARM_UP = 30  # requests of each call
SERVER = "web"

Request = tuple[str, str, Any, dict[str, str]]


@dataclass(frozen=True)
class Call:
    """One kind of request. `beside`: the bare view that it is compared with; `share`: of the usual number of requests."""

    name: str
    beside: str
    requests: Callable[[Stage, int], list[Request]]
    expect: int = 200
    by: str = "many"
    share: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One measurement: the requests' seconds, and what they took altogether. `cpu`: seconds by role; `client`: seconds."""

    seconds: list[float]
    wall: float
    cpu: dict[str, float]
    client: float
    bytes: int

    @property
    def count(self) -> int:
        return len(self.seconds)

    @property
    def per_s(self) -> float:
        return self.count / self.wall

    @property
    def p50_ms(self) -> float:
        return percentile(self.seconds, 50)

    @property
    def p95_ms(self) -> float:
        return percentile(self.seconds, 95)

    def cpu_ms(self, *roles: str) -> float:
        return sum(self.cpu[role] for role in roles) * 1000 / self.count


class Stage:
    """The server, the crowd in its database, and the keys of who asks: the owner of many runs, of a few, and staff."""

    def __init__(self, rig: Rig, runs: int, console: Console) -> None:
        prepare(rig, "benchmarks.bare_drf.settings")
        from django.contrib.auth import get_user_model
        from django.db import connection

        from benchmarks import crowd
        from benchmarks.bare_drf.models import Note
        from threads.authentication import create_key

        self.rig = rig
        begun = time.monotonic()
        self.crowd = crowd.fill(runs, threads=THREADS)
        rig.connection.execute("VACUUM ANALYZE")
        console.log(f"{self.crowd} in {time.monotonic() - begun:.0f} s")
        with connection.schema_editor() as editor:
            editor.create_model(Note)
        users = get_user_model()
        self.owner = users.objects.get(username=crowd.MANY)
        staff = users.objects.create(username="staff", is_staff=True, is_superuser=True)
        few = users.objects.create(username="few")
        rig.connection.execute(
            "UPDATE longhaul_runs_run SET owner_id = %s WHERE id IN"
            " (SELECT id FROM longhaul_runs_run WHERE status = 'completed' ORDER BY id LIMIT 20 OFFSET 500)",
            [few.pk],
        )
        self.keys = {
            who: create_key(user, "benchmark")[1]
            for who, user in (("many", self.owner), ("few", few), ("staff", staff))
        }
        self.since = self._one("SELECT longhaul_now()")
        note = Note.objects.create(owner=self.owner, body={"input": "hello"})
        self.note = str(note.pk)
        self._serve()

    def _serve(self) -> None:
        self.port = free_port(0)
        self.rig.start(
            SERVER, SERVER,
            ["-m", "uvicorn", "agents_project.asgi:application", "--port", str(self.port), "--no-access-log", "--log-level", "warning"],
            {"PGAPPNAME": SERVER},
        )  # fmt: skip
        deadline = time.monotonic() + READY_TIMEOUT.total_seconds()
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                self.rig.check_processes()
            if time.monotonic() > deadline:
                raise RigError(f"The server was not ready in {READY_TIMEOUT}.\n{self.rig.log(SERVER)}")
            time.sleep(0.05)

    def _one(self, statement: str, *values: Any) -> Any:
        row = self.rig.connection.execute(statement, values).fetchone()
        assert row is not None
        return row[0]

    def ids(self, statement: str, *values: Any) -> list[str]:
        """Return the first column of a statement's rows, as text."""
        return [str(row[0]) for row in self.rig.connection.execute(statement, values)]

    def some(self, count: int) -> list[str]:
        """Return ids of the owner's runs that called a tool, so many, some of them again if there are fewer."""
        mine = "SELECT id FROM longhaul_runs_run WHERE owner_id = %s AND status = 'completed' AND steps > 1 LIMIT %s"
        found = self.ids(mine, self.owner.pk, count)
        return [found[n % len(found)] for n in range(count)]

    def measure(self, call: Call, count: int, connections: int) -> Sample:
        plan = {
            "port": self.port,
            "connections": connections,
            "headers": {"Authorization": f"Bearer {self.keys[call.by]}"},
            "requests": call.requests(self, count),
            "expect": call.expect,
        }
        before = self.rig.read()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.http_client"],
            input=json.dumps(plan) + "\n", capture_output=True, text=True, cwd=PROJECT, check=False,
        )  # fmt: skip
        self.rig.check_processes()
        if done.returncode:
            raise RigError(f"{call.name}: {done.stderr}\n{self.rig.log(SERVER)}")
        found = json.loads(done.stdout)
        cpu = spent(before.cpu, self.rig.read().cpu)
        return Sample(found["seconds"], found["wall"], cpu, found["cpu"], found["bytes"])

    def tidy(self) -> None:
        """End the runs that were started since, and forget their messages, for no worker does."""
        self.rig.connection.execute(
            "UPDATE longhaul_runs_run SET status = 'completed', stop_reason = 'end_turn', finished_at = longhaul_now(),"
            " next_publish_at = NULL WHERE status = 'queued' AND created_at >= %s",
            [self.since],
        )
        self.rig.valkey.delete("longhaul.agents")


def _start(stage: Stage, count: int) -> list[Request]:
    return [("POST", "/api/runs", {"agent": "bench", "input": "hello"}, {}) for _ in range(count)]


def _start_keyed(stage: Stage, count: int) -> list[Request]:
    return [(method, path, body, {"Idempotency-Key": str(uuid4())}) for method, path, body, _ in _start(stage, count)]


def _start_on(stage: Stage, count: int) -> list[Request]:
    """On threads that nothing occupies: each of them once."""
    stage.tidy()
    free = stage.ids(
        "SELECT id FROM longhaul_threads_thread t WHERE owner_id = %s AND NOT EXISTS (SELECT 1 FROM longhaul_runs_run"
        " WHERE thread_id = t.id AND status IN ('held', 'queued', 'running', 'waiting', 'requires_action'))"
        " ORDER BY id LIMIT %s",
        stage.owner.pk,
        count,
    )
    if len(free) < count:
        raise RigError(f"Only {len(free)} threads are free, {count} are needed.")
    return [("POST", f"/api/threads/{thread}/runs", {"agent": "bench", "input": "hello"}, {}) for thread in free]


def _cancel(stage: Stage, count: int) -> list[Request]:
    """Runs that wait to be taken: made by SQL's own hand, for what they cost is not the question."""
    stage.tidy()
    made = stage.ids(
        "WITH made AS (INSERT INTO longhaul_threads_thread (id, owner_id, agent, title, summary, metadata, overrides, created_at)"
        " SELECT longhaul_uuid7(), %s, 'bench', '', '', '{}', '{}', longhaul_now() FROM generate_series(1, %s) RETURNING id, owner_id)"
        " INSERT INTO longhaul_runs_run (id, thread_id, owner_id, agent, status, stop_reason, origin, depth, busy, priority,"
        " overrides, save_mode, metadata, fingerprint, epoch, dispatch_seq, pending_ordinal, publishes, next_publish_at, last_seq,"
        " steps, legs, lost, bad_calls, model_tries, input_tokens, output_tokens, cost, created_at, queued_at)"
        " SELECT longhaul_uuid7(), id, owner_id, 'bench', 'queued', '', 'start', 0, 'enqueue', 0, '{}', 'prompt_and_output', '{}',"
        " '', 0, 1, 0, 1, longhaul_now(), 0, 0, 0, 0, 0, 0, 0, 0, 0, longhaul_now(), longhaul_now() FROM made RETURNING id",
        stage.owner.pk,
        count,
    )
    return [("POST", f"/api/runs/{run}/cancel", {}, {}) for run in made]


def _of_runs(path: str) -> Callable[[Stage, int], list[Request]]:
    return lambda stage, count: [("GET", path.format(run), None, {}) for run in stage.some(count)]


def _same(path: str) -> Callable[[Stage, int], list[Request]]:
    return lambda stage, count: [("GET", path, None, {})] * count


def _threads_of(stage: Stage, count: int) -> list[str]:
    found = stage.ids(
        "SELECT id FROM longhaul_threads_thread WHERE owner_id = %s ORDER BY id LIMIT %s", stage.owner.pk, count
    )
    return [found[n % len(found)] for n in range(count)]


def _events(stage: Stage, count: int) -> list[Request]:
    long = stage.ids("SELECT id FROM longhaul_runs_run WHERE last_seq > 1000 LIMIT %s", count)
    return [("GET", f"/api/runs/{long[n % len(long)]}/events?limit=1000", None, {}) for n in range(count)]


CALLS = (
    Call("bare read", "", lambda stage, count: [("GET", f"/bare/notes/{stage.note}", None, {})] * count),
    Call("bare insert", "", lambda stage, count: [("POST", "/bare/notes", {"body": {"agent": "bench", "input": "hello"}}, {})] * count, 201),
    Call("start", "bare insert", _start, 202),
    Call("start on a thread", "bare insert", _start_on, 202),
    Call("start, Idempotency-Key", "bare insert", _start_keyed, 202),
    Call("cancel", "bare insert", _cancel),
    Call("get run", "bare read", _of_runs("/api/runs/{}")),
    Call("list runs", "bare read", _same("/api/runs"), share=0.4),
    Call("list runs, of a few", "bare read", _same("/api/runs"), by="few", share=0.4),
    Call("list runs, staff", "bare read", _same("/api/runs"), by="staff", share=0.4),
    Call("list runs, active", "bare read", _same("/api/runs?active=true"), share=0.4),
    Call("list runs, active, of a few", "bare read", _same("/api/runs?active=true"), by="few", share=0.4),
    Call("list runs, active, staff", "bare read", _same("/api/runs?active=true"), by="staff", share=0.4),
    Call("list runs, agent", "bare read", _same("/api/runs?agent=speaker"), share=0.4),
    Call("list runs, agent, staff", "bare read", _same("/api/runs?agent=speaker"), by="staff", share=0.4),
    Call("list runs, metadata", "bare read", _same("/api/runs?metadata.customer=20"), share=0.4),
    Call("list runs, metadata, staff", "bare read", _same("/api/runs?metadata.customer=20"), by="staff", share=0.4),
    Call("list threads", "bare read", _same("/api/threads"), share=0.4),
    Call("list threads, staff", "bare read", _same("/api/threads"), by="staff", share=0.4),
    Call("list messages", "bare read", lambda stage, count: [("GET", f"/api/threads/{id}/messages", None, {}) for id in _threads_of(stage, count)], share=0.4),
    Call("events, 1000", "bare read", _events, by="staff", share=0.2),
    Call("steps", "bare read", _of_runs("/api/runs/{}/steps")),
    Call("tool calls", "bare read", _of_runs("/api/runs/{}/tool-calls")),
    Call("agents", "bare read", _same("/api/agents")),
)  # fmt: skip
BARE = ("bare read", "bare insert")


@dataclass
class Results:
    """The samples of one call, one a round: with one connection, and with many."""

    one: list[Sample] = field(default_factory=list)
    many: list[Sample] = field(default_factory=list)
    traffic: Traffic | None = None


def measure(stage: Stage, calls: Sequence[Call], rounds: int, count: int, progress: Progress) -> dict[str, Results]:
    found = {call.name: Results() for call in calls}
    task = progress.add_task("requests", total=(rounds * 2 + 1) * len(calls))
    for call in calls:
        stage.measure(call, WARM_UP, CONNECTIONS)
        progress.advance(task)
    for _ in range(rounds):
        for call in calls:
            wanted = max(10, int(count * call.share))
            progress.update(task, description=call.name)
            found[call.name].one.append(stage.measure(call, wanted // 2, 1))
            progress.advance(task)
            found[call.name].many.append(stage.measure(call, wanted, CONNECTIONS))
            progress.advance(task)
        stage.tidy()
    log = stage.rig.statement_log()
    if log is not None:
        with log:
            for call in calls:
                log.mark()
                stage.measure(call, 10, 1)
                found[call.name].traffic = log.read(stage.rig.is_backend_of(SERVER))
    return found


def figures(results: dict[str, Results], crowd: dict[str, int], beside: dict[str, str]) -> command.Figures:
    """Medians of the rounds; a ratio is the median of the rounds' ratios."""
    calls = {}
    for name, got in results.items():
        each: dict[str, Any] = {
            "per_s": round(median(sample.per_s for sample in got.many), 1),
            "p50_ms": round(median(sample.p50_ms for sample in got.one), 2),
            "p95_ms": round(median(sample.p95_ms for sample in got.one), 2),
            "p95_ms_busy": round(median(sample.p95_ms for sample in got.many), 2),
            "cpu_ms": {
                role: round(median(sample.cpu_ms(role) for sample in got.many), 2)
                for role in (SERVER, "postgres", "valkey")
            },
            "bytes": round(median(sample.bytes / sample.count for sample in got.one)),
            "client_share": round(median(sample.client / sample.wall for sample in got.many), 2),
        }
        if got.traffic is not None:
            each["round_trips"] = got.traffic.round_trips / 10
            each["transactions"] = got.traffic.transactions / 10
        if bare := results.get(beside.get(name, "")):
            each["beside"] = beside[name]
            each["ratio"] = {
                "throughput": _ratio(bare.many, got.many, lambda sample: sample.per_s),
                "p50": _ratio(got.one, bare.one, lambda sample: sample.p50_ms),
                "p95": _ratio(got.one, bare.one, lambda sample: sample.p95_ms),
                "cpu_web": _ratio(got.many, bare.many, lambda sample: sample.cpu_ms(SERVER)),
                "cpu": _ratio(got.many, bare.many, lambda sample: sample.cpu_ms(SERVER, "postgres", "valkey")),
            }
        calls[name] = each
    starts = calls.get("start", {}).get("ratio")
    return {
        "benchmark": "http",
        "n": len(next(iter(results.values())).many),
        "connections": CONNECTIONS,
        **crowd,
        "start_to_bare_insert": None if starts is None else starts["throughput"],
        "calls": calls,
    }


def _ratio(over: Sequence[Sample], under: Sequence[Sample], of: Callable[[Sample], float]) -> float:
    return round(median(of(a) / max(of(b), 1e-9) for a, b in zip(over, under, strict=True)), 2)


def tables(found: command.Figures) -> list[Table]:
    table = Table(
        title=f"{found['runs']:,} runs, {found['events']:,} events; medians, n = {found['n']}; requests/s with"
        f" {found['connections']} connections, times with one. A start to a bare insert: {found['start_to_bare_insert']} (bar: {BAR})"
    )
    for heading in ("call", "/s", "p50 ms", "p95 ms", "CPU ms web", "Postgres", "trips", "kB", "to bare: time", "p50", "p95", "CPU web", "CPU"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "call" else "right")
    for name, each in found["calls"].items():
        ratio = each.get("ratio", {})
        table.add_row(
            name, f"{each['per_s']:.0f}", f"{each['p50_ms']:.1f}", f"{each['p95_ms']:.1f}", f"{each['cpu_ms'][SERVER]:.1f}",
            f"{each['cpu_ms']['postgres']:.1f}", f"{each.get('round_trips', 0):.1f}", f"{each['bytes'] / 1000:.1f}",
            *(f"{ratio[key]:.2f}" if ratio else "" for key in ("throughput", "p50", "p95", "cpu_web", "cpu")),
        )  # fmt: skip
    return [table]


def statements(results: dict[str, Results]) -> list[Table]:
    """What Postgres is asked in one request of each call."""
    made = []
    for name, got in results.items():
        if got.traffic is None:
            continue
        table = Table(title=f"{name}: a request's statements")
        table.add_column("times", justify="right")
        table.add_column("statement", overflow="fold")
        for statement, times in got.traffic.statements.most_common():
            table.add_row(f"{times / 10:.1f}", statement)
        made.append(table)
    return made


def chosen(names: str) -> list[Call]:
    """Return the calls that `--only` names, and the bare ones. Raises ValueError."""
    wanted = [name.strip() for name in names.split(";") if name.strip()]
    if unknown := set(wanted) - {call.name for call in CALLS}:
        raise ValueError(f"no call is named {', '.join(sorted(unknown))}")
    return [call for call in CALLS if not wanted or call.name in BARE or call.name in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http", description=__doc__)
    parser.add_argument("--runs", type=int, help="in the database (default 100,000; with --quick 10,000)")
    parser.add_argument(
        "--only", type=chosen, default=list(CALLS), help="calls by name, with ; between; the bare ones are always there"
    )
    parser.add_argument(
        "--statements", action="store_true", help="also: what Postgres is asked, statement by statement"
    )
    asked: list[Table] = []

    def measured(given: argparse.Namespace, console: Console) -> command.Figures:
        runs = given.runs or (10_000 if given.quick else 100_000)
        rounds, count = (1, 80) if given.quick else (3, 200)
        with Rig(SCRIPT) as rig, Progress(console=console, transient=True) as progress:
            stage = Stage(rig, runs, console)
            results = measure(stage, given.only, rounds, count, progress)
        if given.statements:
            asked.extend(statements(results))
        sizes = {name: getattr(stage.crowd, name) for name in ("runs", "events", "messages", "threads", "live")}
        return figures(results, sizes, {call.name: call.beside for call in CALLS})

    return command.run(
        parser,
        measured,
        lambda found: [*tables(found), *asked],
        arguments,
        quick="fewer runs and requests: ends in under 75 s",
    )


if __name__ == "__main__":
    sys.exit(main())
