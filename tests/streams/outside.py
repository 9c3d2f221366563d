"""Web processes of their own, what a reader sees of them over a socket, and a wire to Redis that can be cut."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2
from django.conf import settings
from django.db import connection

from tests.http.web import free_port
from tests.streams.cutting import CuttingProxy
from tests.workers.conftest import eventually

ID = re.compile(rb"^id: (\S+)$", re.MULTILINE)


class Process:
    """One uvicorn process on the tests' database. It may be killed, and started again on its port."""

    def __init__(
        self, folder: Path, *options: str, application: str = "agents_project.asgi:application", **environment: str
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / f"uvicorn-{self.port}.log"
        self._command = ["-m", "uvicorn", application, "--port", str(self.port), "--no-access-log", *options]
        parts = urlsplit(os.environ["DATABASE_URL"])
        self._environment: dict[str, Any] = {
            **os.environ,
            "DATABASE_URL": urlunsplit(parts._replace(path=f"/{connection.settings_dict['NAME']}")),
            "DJANGO_SETTINGS_MODULE": "tests.http.settings",
            **environment,
        }
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, *self._command], env=self._environment, stdout=out, stderr=out
            )

    def up(self) -> None:
        def answers() -> bool:
            assert self.process.poll() is None, self.said()
            try:
                return httpx2.get(f"{self.url}/healthz").status_code == 200
            except httpx2.TransportError:
                return False

        eventually(answers, within=90.0, why="the server answers")  # s, for a loaded machine

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    @property
    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    @property
    def resident(self) -> int:
        """Bytes of memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    @property
    def connections(self) -> int:
        """How many clients it has."""
        told = Path("/proc/net/tcp").read_text().splitlines()[1:]
        return sum(f":{self.port:04X} " in f"{line.split()[1]} " and line.split()[3] == "01" for line in told)


@contextmanager
def processes(folder: Path, count: int, *options: str, **given: str) -> Iterator[list[Process]]:
    """Serve by this many processes for the block."""
    made = [Process(folder, *options, **given) for _ in range(count)]
    try:
        for each in made:
            each.up()
        yield made
    finally:
        for each in made:
            each.kill()


class Connection:
    """One open stream, read as it comes, over a socket that can be cut."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: int, head: bytes) -> None:
        self.status = status
        self.head = head
        self.ended = False  # in order, by the server
        self._reader = reader
        self._writer = writer
        opened.add(self)

    @classmethod
    async def open(
        cls, port: int, path: str, key: str, last: int | str | None = None, *, receives: int | None = None,
        body: Any = None, headers: Mapping[str, str] | None = None,
    ) -> Connection:  # fmt: skip
        """Ask for a stream, with a body by POST. Raises OSError when there is nobody. `receives` is the size of the socket's buffer."""
        wire = socket.socket()
        wire.setblocking(False)
        if receives is not None:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
        try:
            await asyncio.get_running_loop().sock_connect(wire, ("127.0.0.1", port))
        except OSError:
            wire.close()
            raise
        reader, writer = await asyncio.open_connection(sock=wire, limit=2**16 if receives is None else receives)
        said = {"Host": "127.0.0.1", **({"Authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
        sent, method = b"", "GET"
        if last is not None:
            said["Last-Event-ID"] = str(last)
        if body is not None:
            sent, method = json.dumps(body).encode(), "POST"
            said |= {"Content-Type": "application/json", "Content-Length": str(len(sent))}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in said.items()), "", ""]
        writer.write("\r\n".join(lines).encode() + sent)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except BaseException as error:
            writer.transport.abort()
            if isinstance(error, asyncio.IncompleteReadError | OSError):
                raise ConnectionResetError("no answer") from error
            raise
        return cls(reader, writer, int(head.split(b" ", 2)[1]), head)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield what comes, until the server ends it or the connection is lost."""
        try:
            while True:
                size = int(await self._reader.readuntil(b"\r\n"), 16)
                try:
                    piece = await self._reader.readexactly(size + 2)
                except asyncio.IncompleteReadError as error:
                    yield error.partial[:size]  # what came of it, which may end anywhere
                    return
                if size == 0:
                    self.ended = True
                    return
                yield piece[:-2]
        except (asyncio.IncompleteReadError, OSError, ValueError):
            return

    async def frames(self) -> AsyncIterator[bytes]:
        """Yield the bytes of each frame that came whole, but for comments."""
        rest = b""
        async for piece in self.pieces():
            rest += piece
            *whole, rest = rest.split(b"\n\n")
            for each in whole:
                if not each.startswith(b":"):
                    yield each + b"\n\n"

    def reset(self) -> None:
        """Cut the connection with a TCP reset."""
        wire = self._writer.get_extra_info("socket")
        if wire.fileno() < 0:
            return  # it was cut already
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.transport.abort()
        opened.discard(self)


opened: set[Connection] = set()


def seq_of(frame: bytes) -> int:
    found = ID.search(frame)
    assert found is not None, frame
    return int(found.group(1).rpartition(b":")[2])


class Wire(CuttingProxy):
    """A port that leads to Redis. It can be cut off, or stand still with all its connections open."""

    def __init__(self) -> None:
        parts = urlsplit(settings.REDIS_URL)
        super().__init__(parts.path if parts.scheme == "unix" else parts.port or 6379, kinds=())
        self.url = f"redis://127.0.0.1:{self.port}/0"
