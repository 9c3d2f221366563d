"""Streams as `with_streams` serves them, in this process and in servers of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import wait
from typing import Any

import pytest
from django.core.asgi import get_asgi_application

from runs import with_streams
from runs.streams import broadcast, departure
from runs.streams.app import Application
from tests.http.conftest import api as api
from tests.http.conftest import api_of as api_of
from tests.http.conftest import coroutines_connections_end as coroutines_connections_end
from tests.http.conftest import ended as ended
from tests.http.conftest import helper as helper
from tests.http.conftest import live as live
from tests.http.web import web as web
from tests.streams import outside
from tests.streams.inside import opened


@pytest.fixture
async def application(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Application]:
    """The project's application. At the end nothing may be left of its streams."""
    monkeypatch.setattr(broadcast, "IDLE_SECONDS", 0.0)
    yield with_streams(get_asgi_application())
    for answer in list(opened):
        await answer.leave()
    await free()


async def free() -> None:
    """Wait until the streams of this loop have freed all that they held."""
    now = broadcast.here()
    async with asyncio.timeout(20):
        while now.readers or now._work is not None:
            await asyncio.sleep(0.01)  # between looks at a condition
    assert not now.tails
    assert not now._between


@pytest.fixture(autouse=True)
def ears_are_free() -> Iterator[None]:
    """What waits to be heard no more is not heard, before the next test looks."""
    yield
    wait([broadcast._ear().submit(lambda: None)], timeout=20)


@pytest.fixture
async def nothing_stays_open() -> AsyncIterator[None]:
    """No connection to a server outside is left to the next test."""
    yield
    for each in list(outside.opened):
        each.close()
    await asyncio.sleep(0.01)  # the loop closes their sockets


@pytest.fixture(autouse=True)
def signals_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import signal

    monkeypatch.setattr(departure, "_leaving", False)
    before: dict[Any, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
