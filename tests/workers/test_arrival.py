"""Workers that start before their database is there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from tests.workers.conftest import Kit, eventually

DATABASE = "longhaul_comes_late"


@pytest.fixture
def late(kit: Kit) -> Iterator[str]:
    """The address of a database that does not exist; it is dropped in the end."""
    here = os.environ["DATABASE_URL"]
    with psycopg.connect(here, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE IF EXISTS {DATABASE}")
        yield urlunsplit(urlsplit(here)._replace(path=f"/{DATABASE}"))
        admin.execute(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")


@pytest.mark.parametrize("pool", ["gevent", "prefork"])
def test_a_worker_that_starts_before_its_database_and_its_tables_is_present_when_they_are(
    kit: Kit, late: str, tmp_path: Path, pool: str
) -> None:
    environment = {**kit.environment, "DATABASE_URL": late}
    queue = {"gevent": "longhaul.agents", "prefork": "longhaul.tools"}[pool]
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "agents_project",
        "worker",
        "-P",
        pool,
        "-c",
        "1",
        "-n",
        "early@test",
    ]
    path = tmp_path / "early.log"
    with path.open("wb") as log:
        worker = subprocess.Popen(
            [*command, "-Q", queue], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        eventually(lambda: "waits for Postgres" in path.read_text(), why="it says what it waits for")
        with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {DATABASE}")
        subprocess.run([sys.executable, "manage.py", "migrate", "-v", "0"], env=environment, check=True)
        with psycopg.connect(late, autocommit=True) as database:
            query = "SELECT count(*) FROM longhaul_tools_worker WHERE beat_at > longhaul_now() - interval '3 s'"
            expected = {"gevent": 1, "prefork": 2}[pool]  # a parent and its child
            eventually(lambda: database.execute(query).fetchone() == (expected,), why="it is present")
        assert worker.poll() is None
    finally:
        kit.kill(worker)
