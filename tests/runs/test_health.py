"""Readiness tells the truth: with everything there, and with each thing away, hung or late. In two seconds, and no secrets."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery._state import get_current_app
from django.db import connections

from runs import health
from runs.sweep import SWEEP_LOCK
from tests.protocol.rows import World
from tools.models import Worker

pytestmark = pytest.mark.django_db(transaction=True)

BOUND = 20.0  # seconds; the wait is 2, and the machine may be busy. A server that hangs is silent for ever
SECRET = "hunter2"


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    yield
    for probe in (health.DATABASE, health.BROKER):
        probe.forget()


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp())  # pytest's own may be too long for a socket
    yield made
    shutil.rmtree(made)


@pytest.fixture
def silent(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Make a socket where somebody listens and never answers."""
    listening: list[socket.socket] = []

    def listen(name: str) -> Path:
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(folder / name))
        server.listen(50)
        listening.append(server)
        return folder / name

    yield listen
    for server in listening:
        server.close()


@pytest.fixture
def postgres_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    def at(folder: Path) -> None:
        for name, value in {"HOST": str(folder), "PORT": "5432", "PASSWORD": SECRET}.items():
            monkeypatch.setitem(connections.settings["default"], name, value)

    return at


@pytest.fixture
def broker_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    present = get_current_app()

    def at(url: str) -> None:
        monkeypatch.setenv("CELERY_BROKER_URL", url)  # wins over what an app is told
        Celery("elsewhere").set_current()

    yield at
    present.set_current()


def asked() -> dict[str, Any]:
    """Readiness, as JSON has it, in time and without a secret."""
    began = time.monotonic()
    answer = health.readiness()
    assert time.monotonic() - began < BOUND
    text = json.dumps(answer)
    assert SECRET not in text
    assert "/" not in text  # no address of whatever kind
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def failed(answer: dict[str, Any]) -> set[str]:
    return {name for name, check in answer["checks"].items() if not check["ok"]}


def test_with_everything_there_it_is_ready(world: World) -> None:
    for kind in health.KINDS:
        world.db.execute(
            "INSERT INTO longhaul_tools_worker (id, name, kind, host, pid, lock_key, started_at, beat_at, draining)"
            " VALUES (gen_random_uuid(), %s, %s, 'here', 1, floor(random() * 1e15), longhaul_now(), longhaul_now(), false)",
            f"{kind}@a",
            kind,
        )

    answer = asked()

    assert answer["ready"] is True
    assert {name: check["detail"] for name, check in answer["checks"].items()} == {
        "database": "answers",
        "broker": "answers",
        "agents": "1 worker present",
        "tools": "1 worker present",
        "control": "1 worker present",
        "overdue": "nothing is late",
    }
    assert answer["checks"]["agents"]["present"] == 1


def test_without_workers_it_says_which_are_missing(world: World) -> None:
    world.worker("agents@a")
    world.worker("agents@silent", silent_for=timedelta(seconds=13))
    world.worker("agents@gone", gone=True)

    answer = asked()

    assert (answer["ready"], failed(answer)) == (False, {"tools", "control"})
    assert answer["checks"]["agents"]["present"] == 1
    assert answer["checks"]["tools"] == {"ok": False, "detail": "no workers present", "present": 0}


def test_who_holds_the_sweeps_lock_sweeps_while_it_asks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.db.execute("SELECT pg_advisory_lock(%s)", SWEEP_LOCK)

    assert asked()["checks"]["control"] == {"ok": True, "detail": "a worker of several kinds sweeps", "present": 0}

    # A process that was stopped keeps the lock, and asks nothing more
    health.DATABASE.forget()
    monkeypatch.setattr(health, "SWEPT_WITHIN", timedelta(microseconds=1))
    assert asked()["checks"]["control"]["detail"] == "no workers present"


def test_a_child_of_a_prefork_worker_is_no_worker_more(world: World) -> None:
    parent = world.worker("agents@a")
    Worker.objects.filter(pk=world.worker("agents@a")).update(parent=parent)

    assert asked()["checks"]["agents"]["present"] == 1


@pytest.mark.parametrize(("late", "fine"), [(10, True), (45, False)])
def test_what_nobody_moves_on_is_late(world: World, late: int, fine: bool) -> None:
    world.start()
    world.ahead(timedelta(seconds=1 + late))

    check = asked()["checks"]["overdue"]

    assert check["ok"] is fine
    assert late <= check["seconds"] < late + 5
    assert "late by" in check["detail"]


def test_a_call_that_nobody_takes_back_is_late_too(world: World) -> None:
    claim = world.waiting()
    world.call_claim(*world.calls(claim.run))
    world.ahead(timedelta(seconds=60 + 40))  # a call may take 60 s

    assert failed(asked()) >= {"overdue"}


def test_without_postgres_it_says_so_and_what_it_cannot_know(folder: Path, postgres_at: Callable[[Path], None]) -> None:
    postgres_at(folder)

    answer = asked()

    assert (answer["ready"], failed(answer)) == (False, {"database", "agents", "tools", "control", "overdue"})
    assert answer["checks"]["database"]["detail"] == "away (OperationalError)"
    assert answer["checks"]["overdue"] == {"ok": False, "detail": "unknown", "seconds": None}


def test_a_postgres_that_hangs_holds_nobody_up(
    silent: Callable[[str], Path], postgres_at: Callable[[Path], None]
) -> None:
    postgres_at(silent(".s.PGSQL.5432").parent)

    answer = asked()

    assert answer["checks"]["broker"]["ok"] is True
    assert answer["checks"]["database"]["ok"] is False


def test_a_database_without_tables_wants_to_be_migrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.settings["default"], "NAME", "postgres")

    assert "run migrate" in asked()["checks"]["database"]["detail"]


def test_without_the_broker_it_says_so(broker_at: Callable[[str], None]) -> None:
    broker_at(f"redis://:{SECRET}@127.0.0.1:1/0")

    answer = asked()

    assert answer["checks"]["broker"]["ok"] is False
    assert answer["checks"]["broker"]["detail"].startswith("away (")
    assert answer["checks"]["database"]["ok"] is True


def test_a_broker_that_hangs_holds_nobody_up(silent: Callable[[str], Path], broker_at: Callable[[str], None]) -> None:
    broker_at(f"redis+socket://{silent('b.sock')}")

    assert asked()["checks"]["broker"]["ok"] is False


def test_a_storm_of_requests_is_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    def look(app: Any) -> dict[str, health.Check]:
        looks.append(time.monotonic())
        return {"database": {"ok": True, "detail": "answers"}}

    monkeypatch.setattr(health.DATABASE, "_ask", look)
    monkeypatch.setattr(health, "KEPT", timedelta(minutes=1))  # the threads of a busy machine take their time
    asking = [threading.Thread(target=health.readiness) for _ in range(50)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()

    assert len(looks) == 1


def test_behind_a_server_that_hangs_no_threads_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    looks: list[bool] = []

    def look(app: Any) -> dict[str, health.Check]:
        looks.append(ended.wait(30))
        return {"database": {"ok": True, "detail": "answers"}}

    monkeypatch.setattr(health.DATABASE, "_ask", look)
    monkeypatch.setattr(health, "WAIT", timedelta(milliseconds=50))
    details = [health.readiness()["checks"]["database"]["detail"] for _ in range(5)]
    ended.set()
    health.DATABASE.forget()

    assert details == ["no answer within 0.05 s"] * 5
    assert looks == [True]
