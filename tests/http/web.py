"""A real server on the tests' database: uvicorn in a process of its own, spoken to over real sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2
import psycopg
import pytest
from django.db import connection

from tests.workers.conftest import eventually

APPLICATION = "tests.http.web"  # the connections of each server are named for it, and by its port


@dataclass
class Web:
    """The server's address. What its process writes stands in `log`."""

    url: str
    port: int
    log: Path

    @property
    def application(self) -> str:
        """Under which name its Django is connected to Postgres."""
        return f"{APPLICATION}.{self.port}"

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def raw(self, data: bytes, *, close_early: bool = False, timeout: float = 20.0) -> bytes:
        """Send these bytes; return all that comes back until the server closes, or nothing when we close first."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as wire:
            try:
                wire.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has answered already, and reads no more
            if close_early:
                return b""
            found = bytearray()
            try:
                while piece := wire.recv(65536):
                    found += piece
            except ConnectionResetError:
                pass  # closed with our bytes unread: what it said before counts
            return bytes(found)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def web(django_db_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with serving(tmp_path_factory.mktemp("web")) as web:
        yield web


@contextmanager
def serving(folder: Path, **more: str) -> Iterator[Web]:
    """Serve for the block, with this environment beside the usual one."""
    port = free_port()
    parts = urlsplit(os.environ["DATABASE_URL"])
    database = urlunsplit(parts._replace(path=f"/{connection.settings_dict['NAME']}"))
    environment: dict[str, Any] = {
        **os.environ,
        "DATABASE_URL": database,
        "DJANGO_SETTINGS_MODULE": "tests.http.settings",
        "PGAPPNAME": f"{APPLICATION}.{port}",
        **more,
    }
    log = folder / "uvicorn.log"
    command = ["uvicorn", "agents_project.asgi:application", "--port", str(port), "--no-access-log"]
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", *command], env=environment, stdout=out, stderr=out)
    web = Web(f"http://127.0.0.1:{port}", port, log)
    try:

        def up() -> bool:
            assert process.poll() is None, web.said()
            try:
                return httpx2.get(f"{web.url}/healthz").status_code == 200
            except httpx2.TransportError:
                return False

        eventually(up, within=90.0, why="the server answers")  # s, for a loaded machine
        yield web
    finally:
        process.terminate()
        try:
            process.wait(10)  # seconds, for a stream that hangs
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # It was connected to the test database, which goes now: wait until Postgres has noticed. (A pooler keeps the
        # connections that it made for it, under its name.)
        if environment["DATABASE_URL"] == database:
            with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as admin:
                query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name = %s"
                its = (connection.settings_dict["NAME"], environment["PGAPPNAME"])
                eventually(lambda: admin.execute(query, its).fetchone() == (0,), why="the server's connections end")
        connection.close()
