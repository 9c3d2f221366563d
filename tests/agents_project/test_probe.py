"""The health check of a container: who counts as well, and what it says of who does not."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.db import connection
from django.utils import timezone

from agents_project import probe
from agents_project.embedded import PROJECT
from threads.ids import new_id
from tools.models import Worker

HERE = socket.gethostname()


@pytest.fixture
def beat(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Worker]:
    """Have the probe look into the test's database, and let workers beat there."""
    connection.ensure_connection()
    monkeypatch.setenv("DATABASE_URL", connection.connection.info.dsn)

    def beat(kind: str = "tools", host: str = HERE, ago: float = 1, **more: Any) -> Worker:
        at = timezone.now() - timedelta(seconds=ago)
        key = new_id().int % 2**62
        return Worker.objects.create(name="w", kind=kind, host=host, pid=1, lock_key=key, beat_at=at, **more)

    return beat


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = probe.main(list(arguments))
    return code, capsys.readouterr().out.strip()


def test_a_worker_that_beats_here_is_well(beat: Callable[..., Worker], capsys: pytest.CaptureFixture[str]) -> None:
    beat(ago=600)  # an earlier life, killed, and not yet found dead
    beat()

    assert told(capsys, "tools") == (0, "the tools worker is present")


def test_another_hosts_another_kinds_a_childs_or_a_dead_workers_beat_is_none(
    beat: Callable[..., Worker], capsys: pytest.CaptureFixture[str]
) -> None:
    beat(host="elsewhere")
    beat(kind="agents")
    dead = beat(gone_at=timezone.now())
    beat(parent=dead)

    assert told(capsys, "tools") == (1, f"no tools worker is present on {HERE}")


def test_a_worker_that_fell_silent_is_not_well(beat: Callable[..., Worker], capsys: pytest.CaptureFixture[str]) -> None:
    beat(ago=20)

    assert told(capsys, "tools") == (1, f"the tools worker on {HERE} is silent since 20 s")


@pytest.mark.parametrize("url", ["postgresql://nobody@127.0.0.1:1/none", "", "postgresql://%%"])
def test_without_postgres_nobody_is_well_and_no_password_is_told(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)

    code, said = told(capsys, "agents")
    assert code == 1
    assert said.startswith("Postgres does not answer (" if url else "DATABASE_URL is not set")


def test_tables_that_are_not_there_are_no_mystery(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], transactional_db: None
) -> None:
    connection.ensure_connection()
    elsewhere = psycopg.conninfo.make_conninfo(connection.connection.info.dsn, dbname="postgres")
    monkeypatch.setenv("DATABASE_URL", elsewhere)

    assert told(capsys, "control") == (1, "the database has no tables of Longhaul's: run migrate")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A web server at PORT that answers each path with a status."""
    answers = {"/healthz": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers.get(self.path, 404))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("PORT", str(server.server_port))
        yield answers
        server.shutdown()
        thread.join()


def test_web_is_well_while_it_answers(site: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "web") == (0, "web answers")
    site["/healthz"] = 500
    assert told(capsys, "web") == (1, "web answers 500")


@pytest.mark.needs_openssl
def test_web_that_speaks_tls_itself_is_asked_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    subprocess.run(
        [*make, "-subj", "/CN=agents.example.com", "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    with HTTPServer(("127.0.0.1", 0), _Well) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("PORT", str(server.server_port))
        monkeypatch.setenv("LONGHAUL_HTTPS", "1")
        try:
            assert told(capsys, "web") == (0, "web answers")
        finally:
            server.shutdown()
            thread.join()


class _Well(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_web_that_is_away_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PORT", "1")

    assert told(capsys, "web") == (1, "web does not answer (ConnectionRefusedError)")


def test_it_takes_one_name_and_imports_neither_django_nor_celery() -> None:
    script = "import sys; from agents_project import probe; code = probe.main(['nobody']); print(*sys.modules); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=False
    )  # fmt: skip

    assert done.returncode == 2
    assert "web|flower|agents|tools|control" in done.stderr
    assert not {"django", "celery", "kombu"} & {name.partition(".")[0] for name in done.stdout.split()}
