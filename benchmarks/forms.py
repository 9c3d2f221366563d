"""The forms of the work that `step_cost` measures: each starts its processes, and does so many runs to their end.

A run is a prompt that makes the model call a tool so many times, one after another.
"""

from __future__ import annotations

import importlib
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar, Protocol

from benchmarks import bare_loop
from benchmarks.rig import READY_TIMEOUT, Rig, RigError
from benchmarks.script import prompt
from benchmarks.workers import QUIET, prepare

AT_ONCE = 20  # runs
CORES = os.cpu_count() or 1
ABSURD_PROCESSES = 2 * CORES  # the best of those tried; README.md has the others
RUN_TIMEOUT = timedelta(seconds=120)  # the slowest form needs 16 s for 20 runs; the machine may be three times slower


class Form(Protocol):
    """One way to do the work.

    `roles`: whose CPU it answers for. `client`: what the model is called by, None for what is the form's own.
    `application`: what its backends are known by to Postgres; None for Longhaul, whose are all that are nobody else's, and
    for who has none.
    """

    name: str
    title: str
    roles: tuple[str, ...]
    stores: bool
    client: str | None
    application: str | None

    def start(self) -> None:
        """Start its processes; they need not be ready."""

    def run(self, runs: int, steps: int, timeout: timedelta = RUN_TIMEOUT) -> float:
        """Do `runs` runs at once to their end; return the seconds it took. Raises RigError when one went wrong."""


def with_broker(rig: Rig, roles: tuple[str, ...]) -> tuple[str, ...]:
    """Return the roles of a form that sends its messages by the rig's broker; Longhaul's bells are Valkey's on any."""
    return (*roles, "rabbitmq") if rig.broker == "rabbitmq" else roles


class Longhaul:
    """One agents worker, one tools worker, one control worker."""

    name = "longhaul"
    title = "Longhaul"
    roles: tuple[str, ...] = ("agents", "tools", "control", "postgres", "valkey")
    stores = True
    client: str | None = None
    application: str | None = None

    # name: (role, queue, pool, environment)
    WORKERS: ClassVar[dict[str, tuple[str, list[str], dict[str, str]]]] = {
        "agents": ("agents", ["-Q", "longhaul.agents", "-P", "gevent", "-c", "200"], {"LONGHAUL_DB_POOL": "1"}),
        "tools": ("tools", ["-Q", "longhaul.tools", "-P", "prefork", "-c", "2"], {}),
        "control": ("control", ["-Q", "longhaul.control", "-P", "threads", "-c", "4"], {}),
    }

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.roles = with_broker(rig, self.roles)
        prepare(rig)

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
    client: str | None = "httpx2"
    application: str | None = "celery chain"

    def __init__(self, rig: Rig, processes: int = AT_ONCE) -> None:
        self._rig = rig
        self.roles = with_broker(rig, self.roles)
        self._processes = {"steps": processes, "tools": 2}
        # Not before: a module with a Celery app makes it the one of the process that imports it.
        from benchmarks import celery_chain

        self._first = celery_chain.step
        rig.connection.execute(celery_chain.SCHEMA)
        celery_chain.app.conf.update(broker_url=os.environ["CELERY_BROKER_URL"])

    def start(self) -> None:
        for role, queue in (("steps", "chain.steps"), ("tools", "chain.tools")):
            command = ["-m", "celery", "-A", "benchmarks.celery_chain", "worker", "-Q", queue, "-P", "prefork"]
            options = ["-c", str(self._processes[role]), "-n", f"{queue}@bench"]
            self._rig.start(
                f"celery {role}", f"celery {role}", [*command, *options, *QUIET], {"PGAPPNAME": str(self.application)}
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
            self._first.apply_async((run, 0, prompt(steps)))
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
    application: str | None = "dbos_transact"  # it calls itself so
    client: str | None = "openai"
    ORDERS = "longhaul-bench:dbos:orders"

    def __init__(self, rig: Rig, processes: int = CORES) -> None:
        self._rig = rig
        self._processes = processes
        rig.valkey.delete(f"{self.ORDERS}:launched")

    def start(self) -> None:
        if self._rig.has_started("dbos 0"):
            return  # by the form with the other client
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
            order = {
                "runs": ids[number :: self._processes],
                "client": self.client,
                "prompt": prompt(steps),
            }
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


class DbosHttpx2(Dbos):
    """The same processes, with the model calls stripped to what HTTP needs."""

    name = "dbos_httpx2"
    title = "DBOS, raw HTTP"
    client: str | None = "httpx2"


class AbsurdTasks:
    """Workers of absurd; each claims tasks from the queue in Postgres and runs them, a thread each.

    They work only while a run of theirs goes on, for a worker at rest asks Postgres four times a second.
    """

    name = "absurd"
    title = "absurd"
    roles: tuple[str, ...] = ("absurd", "postgres")
    stores = True
    application: str | None = "absurd"
    client: str | None = "openai"
    QUEUE = "bench"
    ORDERS = "longhaul-bench:absurd:orders"

    def __init__(self, rig: Rig, processes: int = ABSURD_PROCESSES) -> None:
        from absurd_sdk import Absurd

        self._rig = rig
        self._processes = processes
        self._absurd = Absurd(rig.connection, queue_name=self.QUEUE)
        row = rig.connection.execute("SELECT to_regnamespace('absurd') IS NOT NULL").fetchone()
        if row is None or not row[0]:  # the form with the other client may have made it
            rig.connection.execute(importlib.import_module("absurdctl").BUNDLED_SCHEMA_SQL)
            self._absurd.create_queue()

    def start(self) -> None:
        if self._rig.has_started("absurd"):
            return  # by the form with the other client
        concurrency = -(-AT_ONCE // self._processes)
        options = ["--processes", str(self._processes), "--concurrency", str(concurrency)]
        command = ["-m", "benchmarks.absurd_steps", self.QUEUE, self.ORDERS, *options]
        self._rig.start("absurd", "absurd", command, {"PGAPPNAME": str(self.application)})

    def _order(self, order: str) -> None:
        for number in range(self._processes):
            self._rig.valkey.rpush(f"{self.ORDERS}:{number}", order)

    def run(self, runs: int, steps: int, timeout: timedelta = RUN_TIMEOUT) -> float:
        connection = self._rig.connection
        asked = {"client": self.client, "prompt": prompt(steps)}
        with connection.transaction():
            spawned = [self._absurd.spawn("converse", asked, queue=self.QUEUE) for _ in range(runs)]
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


class AbsurdHttpx2(AbsurdTasks):
    """The same workers, with the model calls stripped to what HTTP needs."""

    name = "absurd_httpx2"
    title = "absurd, raw HTTP"
    client: str | None = "httpx2"


class BareLoop:
    """A process a core, for threads alone share one; the runs are split over them, a thread each."""

    name = "bare_openai"
    title = "bare openai loop"
    roles: tuple[str, ...] = ("bare",)
    stores = False
    client: str | None = "openai"
    application: str | None = None  # it has none

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


FORMS: dict[str, type[Longhaul] | type[CeleryChain] | type[Dbos] | type[AbsurdTasks] | type[BareLoop]] = {
    form.name: form for form in (Longhaul, CeleryChain, Dbos, DbosHttpx2, AbsurdTasks, AbsurdHttpx2, BareLoop)
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
