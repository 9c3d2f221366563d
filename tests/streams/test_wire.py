"""What a stream is on the wire of a real server: each version of HTTP, what follows on its connection, and who leaves early."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import orjson
import pytest
from asgiref.sync import sync_to_async

from runs.models import Run
from runs.run_log import DatabaseRunLog
from tests.http.conftest import Api
from tests.streams.outside import Connection, Process, processes
from tests.workers.conftest import eventually

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.slow, pytest.mark.timeout(240)]

cancel = sync_to_async(Run.cancel)
later = sync_to_async(eventually)


@sync_to_async
def record(run: Run, text: str) -> None:
    assert DatabaseRunLog().record(run.pk, "data", {"data": text})


# What uvicorn takes where they are installed, and what it takes else.
@pytest.fixture(params=["--http=httptools --loop=uvloop", "--http=h11 --loop=asyncio"])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Process]:
    with processes(tmp_path, 1, *request.param.split()) as (made,):
        yield made


class Talk:
    """One connection, on which requests are written as they stand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
        self.reader, self.writer, self._key = reader, writer, key

    def ask(self, first: str, *headers: str, body: bytes = b"") -> None:
        said = [first, "Host: 127.0.0.1", f"Authorization: Bearer {self._key}", *headers]
        if body:
            said += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        self.writer.write("\r\n".join([*said, "", ""]).encode() + body)

    async def head(self) -> str:
        async with asyncio.timeout(60):
            return (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()

    async def rest(self) -> bytes:
        """Read until the server closes the connection."""
        async with asyncio.timeout(60):
            return await self.reader.read()

    async def body(self) -> bytes:
        """Read a chunked body, after which the connection is still open."""
        whole = b""
        async with asyncio.timeout(60):
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                whole += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        return whole

    def reset(self) -> None:
        wire = self.writer.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@pytest.fixture
async def talk(web: Process, api: Api) -> AsyncIterator[Talk]:
    made = Talk(*await asyncio.open_connection("127.0.0.1", web.port), api.key)
    yield made
    made.writer.transport.abort()
    await asyncio.sleep(0.01)  # the loop closes its socket


async def test_a_stream_over_http_1_0_ends_with_its_connection(talk: Talk, live: Run) -> None:
    talk.ask(f"GET /api/runs/{live.pk}/stream HTTP/1.0")
    head = await talk.head()
    await cancel(live)
    # With httptools uvicorn sends chunks to everybody, and calls its answer one of HTTP/1.1.
    chunked = "transfer-encoding: chunked" in head
    assert head.startswith("http/1.1 ") or not chunked
    assert "connection: close" in head
    told = await talk.body() if chunked else b""
    told += await talk.rest()
    assert told.startswith(b": longhaul\nretry: 1000\n\nid: 1\n")
    assert told.endswith(b"\n\n")
    assert b"\nevent: run.cancelled\n" in told


async def test_the_connection_goes_on_after_a_stream_that_ended(talk: Talk, live: Run) -> None:
    await cancel(live)
    for after in (0, 1):
        talk.ask(f"GET /api/runs/{live.pk}/stream?starting_after={after} HTTP/1.1")
        assert "connection: close" not in await talk.head()
        told = await talk.body()
        assert f"\n\nid: {after + 1}\n".encode() in told
    talk.ask(f"HEAD /api/runs/{live.pk}/stream HTTP/1.1")
    assert "text/event-stream" in await talk.head()  # and no body, or what follows would not be understood
    talk.ask(f"GET /api/runs/{live.pk}/stream HTTP/1.1", "Last-Event-ID: 99")
    assert (await talk.head()).startswith("http/1.1 400")


async def test_who_leaves_right_after_the_headers_of_a_start_cancels_nothing(
    talk: Talk, web: Process, live: Run
) -> None:
    body = orjson.dumps({"agent": "worker_test", "input": "Where is it?", "stream": True})
    talk.ask("POST /api/runs HTTP/1.1", body=body)
    head = await talk.head()
    assert head.startswith("http/1.1 200")
    talk.reset()
    run = await Run.objects.exclude(pk=live.pk).aget()
    assert f"x-run-id: {run.pk}" in head
    assert f"location: /api/runs/{run.pk}\r\n" in head
    await later(lambda: web.connections == 0, why="the server has noticed")
    await run.arefresh_from_db()
    assert run.status == "queued"


async def test_an_upgrade_that_is_offered_is_passed_over(talk: Talk, live: Run) -> None:
    """Java's client offers HTTP/2 with each of its requests, and sends the next one on the same connection."""
    offer = (
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    )
    await cancel(live)
    body = orjson.dumps({"starting_after": 1})
    for method in ("GET", "POST", "GET"):
        talk.ask(f"{method} /api/runs/{live.pk}/stream HTTP/1.1", *offer, body=body)
        assert (await talk.head()).startswith("http/1.1 200")
        assert b"\n\nid: 2\n" in await talk.body()


async def test_a_reader_who_does_not_read_is_closed_without_a_word_of_the_server(
    web: Process, api: Api, live: Run
) -> None:
    stuck = await Connection.open(web.port, f"/api/runs/{live.pk}/stream", api.key, receives=2048)
    await later(lambda: web.connections == 1)
    for number in range(200):
        await record(live, str(number) * 30_000)
        if web.connections == 0:
            break
    await later(lambda: web.connections == 0, why="it is closed, though it has not read")
    stuck.close()
    assert "ERROR" not in web.said()
    assert "Traceback" not in web.said()
