"""The proxy that cuts: it changes no byte before its cut, and cuts where the seed says."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from tests.streams.cutting import KINDS, CuttingProxy
from tests.workers.conftest import eventually

BODY = bytes(range(256)) * 400


@pytest.fixture
async def server() -> AsyncIterator[int]:
    """Answers with BODY when the asker has said all and closed its half."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = await reader.read()
            writer.write(asked + BODY)
            await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort() if writer.is_closing() else writer.close()

    there = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield there.sockets[0].getsockname()[1]
    there.close()


async def ask(port: int) -> tuple[bytes, str]:
    """Return what came, and how it ended."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionResetError:  # it came before the connection was seen to stand
        return b"", "reset"
    came, end = b"", "close"
    try:
        writer.write(b"?")
        writer.write_eof()
        async with asyncio.timeout(20):
            while piece := await reader.read(4096):
                came += piece
    except OSError:
        end = "reset"
    writer.transport.abort()
    await asyncio.sleep(0)
    return came, end


async def test_it_passes_every_byte_on_and_half_a_connection_that_was_closed(server: int) -> None:
    with CuttingProxy(server, kinds=()) as proxy:
        assert await ask(proxy.port) == (b"?" + BODY, "close")
        assert not proxy.cuts


@pytest.mark.parametrize("kind", KINDS)
async def test_each_kind_cuts_as_it_says_and_the_same_again_with_the_seed(server: int, kind: str) -> None:
    told = []
    for _ in range(2):
        with CuttingProxy(server, seed=3, kinds=[kind], hang=timedelta(milliseconds=20)) as proxy:
            told.append([await ask(proxy.port) for _ in range(5)])
            assert proxy.cuts == {kind: 5}
            proxy.pause()
            assert await ask(proxy.port) == (b"?" + BODY, "close")
            proxy.go_on()
            assert (await ask(proxy.port))[0] != b"?" + BODY
    for first, second in zip(*told, strict=True):
        assert first[1] == second[1] == ("close" if kind == "close" else "reset")
        assert (b"?" + BODY).startswith(first[0])
        if kind in ("refuse", "unanswered"):
            assert first[0] == b""
        if kind == "close":  # a reset may overtake what was sent before it
            assert first == second
    if kind == "close":
        assert len({len(came) for came, _ in told[0]}) == 5


async def test_it_can_be_down_and_back(server: int) -> None:
    with CuttingProxy(server, kinds=()) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"?")
        await asyncio.to_thread(eventually, lambda: proxy.open == 1)
        proxy.cut_all()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.transport.abort()
        proxy.down()
        with pytest.raises(ConnectionRefusedError):
            await ask(proxy.port)
        proxy.back()
        assert await ask(proxy.port) == (b"?" + BODY, "close")


def test_a_process_of_its_own_takes_orders() -> None:
    command = [sys.executable, "-m", "tests.streams.cutting", "--to", "1", "--seed", "4", "--kinds", "reset"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdin
        assert proxy.stdout
        assert json.loads(proxy.stdout.readline())["seed"] == 4
        for order, answer in (("cut_all", {"cuts": {"all": 0}, "open": 0}), ("sing", {"error": "no such order: sing"})):
            print(order, file=proxy.stdin, flush=True)
            assert json.loads(proxy.stdout.readline()) == answer
        proxy.stdin.close()
        assert proxy.wait(20) == 0
