"""Workers and web behind PgBouncer in transaction mode: nobody has a session, so a death is known by missed beats alone.

The same kit as in test_deaths, whose workers reach Postgres through the pooler here; the test itself does not.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import httpx2
import psycopg
import pytest
from django.contrib.auth.models import User
from django.db import connection

from agents_project.demo.models import Ledger
from runs import Run
from runs.models import Event
from tests.http import frames
from tests.http.web import serving
from tests.workers.app.agents import worker_test
from tests.workers.conftest import Kit, eventually
from tests.workers.pgbouncer import PgBouncer
from tests.workers.test_deaths import SENTENCE, ended, starts, streaming, working
from threads import database
from threads.authentication import create_key
from threads.models import Message
from tools.models import ToolAttempt, Worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs_pgbouncer,
]

TTL = 6.0  # seconds, in the settings of these workers
BEAT = 2.0


def direct_url() -> str:
    parts = urlsplit(os.environ["DATABASE_URL"])
    return urlunsplit(parts._replace(path=f"/{connection.settings_dict['NAME']}"))


@pytest.fixture(scope="module")
def pgbouncer(django_db_setup: None) -> Iterator[PgBouncer]:
    with psycopg.connect(os.environ["DATABASE_URL"]) as postgres:
        info = postgres.info
        server = {"host": info.host, "port": info.port, "user": info.user, "password": info.password}
    made = PgBouncer(server)
    try:
        made.start()
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module", autouse=True)
def behind(kit: Kit, pgbouncer: PgBouncer) -> Iterator[None]:
    """The kit's workers of this module are started with the pooler's address, and none of another module goes on."""

    def nobody() -> None:
        for process in kit.processes.values():
            if process.poll() is None:
                kit.kill(process)

    nobody()
    before = kit.environment
    kit.environment = {
        **before,
        "DATABASE_URL": pgbouncer.url(connection.settings_dict["NAME"]),
        "LONGHAUL_DB_PREPARE": "0",
    }
    yield
    nobody()
    kit.environment = before


def killed(workers: Kit, life: UUID | None) -> None:
    assert life is not None
    workers.kill(workers.of(life))


def present() -> set[UUID]:
    return set(Worker.objects.filter(gone_at=None).values_list("pk", flat=True))


def resumed(run: Run, legs: int) -> None:
    eventually(lambda: Run.objects.get(pk=run.pk).legs > legs, why="the next leg")


def test_a_killed_agents_worker_is_missed_after_its_time_and_not_before(workers: Kit) -> None:
    run = streaming(worker_test.start("tell me"))
    assert not Worker.objects.filter(gone_at=None).exclude(lock_key=None).exists()
    legs, began = run.legs, time.monotonic()
    killed(workers, run.holder)
    resumed(run, legs)
    assert TTL - BEAT - 0.5 < time.monotonic() - began < TTL + 10  # s; the second bound is for a busy machine
    ended(run)
    assert (run.status, run.output) == ("completed", SENTENCE)
    assert Message.objects.filter(run_id=run.pk, status="discarded").count() == 1
    assert [leg.reason for leg in run.leg_set.order_by("number")] == ["lost", "finished"]


def test_the_calls_of_killed_tools_workers_go_on_as_they_declare(workers: Kit) -> None:
    workers.up(tools=2)  # of two processes each
    kinds = ("atomic", "idempotent", "plain", "once")
    runs = {kind: worker_test.start(f"call {kind} 60") for kind in kinds}
    calls = {kind: working(run) for kind, run in runs.items()}
    for name in workers.names("tools"):
        workers.kill(workers.processes[name])
    workers.up(tools=1)
    for kind in kinds[:-1]:
        run, call = ended(runs[kind]), calls[kind]
        assert (run.status, run.output) == ("completed", "It is done.")
        attempts = ToolAttempt.objects.filter(call=call).order_by("number")
        assert [attempt.outcome for attempt in attempts] == ["lost", "success"]
        assert starts(call) == 2
        assert Ledger.objects.filter(call_id=call.pk).count() == (kind == "atomic")
    once = calls["once"]
    eventually(lambda: Run.objects.get(pk=once.run_id).status == "requires_action", why="the run asks for a person")
    once.refresh_from_db()
    assert (once.status, starts(once)) == ("unknown", 1)


def test_when_the_sweeping_control_worker_dies_another_goes_on_and_one_at_a_time(
    workers: Kit, pgbouncer: PgBouncer
) -> None:
    workers.up(control=2)
    query = """
        SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
        WHERE l.locktype = 'advisory' AND l.granted AND a.datname = current_database()"""

    def locks() -> int:
        return int(database.rows_of(query)[0][0])

    eventually(lambda: locks() == 1, why="one sweeps")
    began = time.monotonic()
    pgbouncer.admin("PAUSE")  # waits for the end of every transaction, and of the sweeper's turn too
    assert time.monotonic() - began < 10  # s; such a turn is ended after 5
    pgbouncer.admin("RESUME")
    eventually(lambda: locks() == 1, why="one sweeps again")
    first, *_ = workers.names("control")
    workers.kill(workers.processes[first])
    run = streaming(worker_test.start("tell me"))
    killed(workers, run.holder)
    assert ended(run).output == SENTENCE
    eventually(lambda: locks() == 1, why="another sweeps")


def test_cutting_every_connection_of_the_pooler_costs_no_run(workers: Kit) -> None:
    there = present()
    run = worker_test.start("call atomic 1")
    telling = streaming(worker_test.start("tell me"))
    call = working(run)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    assert ended(telling).output == SENTENCE
    assert ended(run).output == "It is done."
    assert Ledger.objects.filter(call_id=call.pk).count() == 1
    assert present() == there


@pytest.mark.parametrize("outage", ["killed", "frozen"])
def test_an_outage_of_the_pooler_costs_no_run_and_kills_nobody(workers: Kit, pgbouncer: PgBouncer, outage: str) -> None:
    """It lasts for longer than the time after which a silent worker is dead. A frozen one answers in the end."""
    there = present()
    run = worker_test.start("call atomic 3")
    once = worker_test.start("call once 3")
    telling = streaming(worker_test.start("tell me"))
    calls = [working(run), working(once)]
    pgbouncer.kill() if outage == "killed" else pgbouncer.signal(signal.SIGSTOP)
    time.sleep(TTL + BEAT)  # the outage itself
    pgbouncer.start() if outage == "killed" else pgbouncer.signal(signal.SIGCONT)
    assert ended(telling).output == SENTENCE
    assert ended(run).output == "It is done."
    assert ended(once).output == "It is done."
    assert Ledger.objects.filter(call_id=calls[0].pk).count() == 1
    assert starts(calls[1]) == 1
    time.sleep(1)  # four looks of the watcher
    assert present() == there
    assert not Event.objects.filter(type="tool_call.unknown").exists()


def test_a_worker_that_was_stopped_is_taken_for_dead_and_writes_nothing_when_it_wakes(workers: Kit) -> None:
    """An atomic tool of such a worker has a transaction open, and so a connection of the pooler: that one is ended."""
    workers.up(tools=2)
    atomic = worker_test.start("call atomic 8")
    call = working(atomic)
    run = streaming(worker_test.start("tell me"))
    assert run.holder is not None
    assert call.holder is not None
    life, stopped, tools = run.holder, workers.of(run.holder), workers.of(call.holder)
    name = Worker.objects.get(pk=life).name
    for process in (stopped, tools):
        workers.kill(process, signal.SIGSTOP)
    try:
        ended(run)
        last = run.last_seq
        assert (run.status, run.output) == ("completed", SENTENCE)
        assert ended(atomic).output == "It is done."
        assert list(Ledger.objects.values_list("number", flat=True)) == [2]
    finally:
        for process in (stopped, tools):
            workers.kill(process, signal.SIGCONT)
    log = workers.folder / f"{name.partition('@')[0]}.log"
    eventually(lambda: f"Run {run.pk} epoch 1 was lost" in log.read_text(), why="the woken leg sees that it was lost")
    eventually(lambda: Worker.objects.filter(name=name, gone_at=None).exclude(pk=life).exists(), why="a new life")
    run.refresh_from_db()
    assert (run.last_seq, run.event_set.count()) == (last, last)


def test_a_run_over_http_is_streamed_to_its_end(workers: Kit, pgbouncer: PgBouncer) -> None:
    owner = User.objects.create_user("ada")
    _, key = create_key(owner)
    pooled = {name: workers.environment[name] for name in ("DATABASE_URL", "LONGHAUL_DB_PREPARE")}

    async def talk(url: str) -> list[frames.Frame]:
        headers = {"Authorization": f"Bearer {key}"}
        body = {"agent": "worker_test", "input": "call idempotent 0", "stream": True}
        async with (
            httpx2.AsyncClient(base_url=url, headers=headers, timeout=60) as client,
            client.stream("POST", "/api/runs", json=body) as response,
        ):
            assert response.status_code == 200
            return await frames.events(response.aiter_bytes())

    with serving(workers.folder, **pooled, LONGHAUL_DB_POOL="1") as web:

        async def many() -> list[list[frames.Frame]]:
            return await asyncio.gather(*(talk(web.url) for _ in range(12)))  # more than the pooler has connections

        for told in asyncio.run(many()):
            assert [frame.id for frame in told] == list(range(1, len(told) + 1))
            assert told[-1].event == "run.completed"
        ready = httpx2.get(f"{web.url}/readyz").json()
        assert ready["ready"], ready
        assert "Traceback" not in web.said()


def test_the_check_says_what_it_costs_and_the_hint_is_right(workers: Kit) -> None:
    def said(**more: str) -> str:
        command = [sys.executable, "manage.py", "check", "--database", "default"]
        environment = {**workers.environment, **more}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr

    assert "longhaul.W008) A pooler stands between Longhaul and its Postgres ('default')" in said()
    assert "longhaul." not in said(DIRECT_DATABASE_URL=direct_url())


def test_with_a_way_past_the_pooler_a_death_is_seen_at_once_and_the_pooled_are_left_alone(workers: Kit) -> None:
    """A mixed fleet: of the agents workers one shows itself by its beats alone."""
    for name in workers.names("agents")[1:]:
        workers.kill(workers.processes[name])
    before = workers.environment
    workers.environment = {**before, "DIRECT_DATABASE_URL": direct_url()}
    try:
        workers.up(agents=2)
        with workers.who_sees_deaths_by_locks_alone():
            one_of_each_kind(workers)
    finally:
        workers.environment = before
    for name in workers.names("agents"):  # the next test has its own
        workers.kill(workers.processes[name])


def one_of_each_kind(workers: Kit) -> None:
    kinds = Worker.objects.filter(gone_at=None, kind="agents", name__in=[f"{n}@test" for n in workers.names("agents")])
    [pooled], [direct] = kinds.filter(lock_key=None), kinds.exclude(lock_key=None)
    while True:
        run = streaming(worker_test.start("tell me"))
        if run.holder == direct.pk:
            break
    killed(workers, run.holder)
    assert ended(run).output == SENTENCE
    assert [leg.reason for leg in run.leg_set.order_by("number")] == ["lost", "finished"]
    eventually(lambda: direct.pk not in present(), why="the dead one is closed")
    assert pooled.pk in present()
