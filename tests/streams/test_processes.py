"""Streams of real web processes: cut in every way, and whole in the end."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import redis
from asgiref.sync import sync_to_async
from django.conf import settings as django_settings

from runs import bells
from runs.agents import Agent
from runs.models import Run
from runs.run_log import DatabaseRunLog
from tests.http.conftest import Api
from tests.streams.outside import Connection, Process, Wire, opened, processes, seq_of
from tests.workers.conftest import eventually

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
async def nothing_stays_open() -> AsyncIterator[None]:
    yield
    for each in list(opened):
        each.close()
    await asyncio.sleep(0.01)  # the loop closes their sockets


cancel = sync_to_async(Run.cancel)
later = sync_to_async(eventually)


def stream(run: Run) -> str:
    return f"/api/runs/{run.pk}/stream"


@sync_to_async
def record(run: Run, text: str) -> None:
    assert DatabaseRunLog().record(run.pk, "data", {"data": text})


async def whole(process: Process, run: Run, key: str) -> list[bytes]:
    """Read a finished run at one go."""
    connection = await Connection.open(process.port, stream(run), key)
    told = [each async for each in connection.frames()]
    assert connection.ended
    connection.close()
    return told


class Reader:
    """Follows a run over all that befalls it: it comes back with the last seq that it has, to any process."""

    def __init__(self, run: Run, key: str, ports: list[int], chance: random.Random) -> None:
        self.run, self.key, self.ports, self.chance = run, key, ports, chance
        self.frames: list[bytes] = []
        self.cuts = 0
        self.now: Connection | None = None

    async def follow(self) -> None:
        while not (self.frames and b"\nevent: run.cancelled\n" in self.frames[-1]):
            after = seq_of(self.frames[-1]) if self.frames else 0
            address, last = stream(self.run), None
            if self.chance.random() < 0.5:
                address += f"?starting_after={after}"
            elif after:
                last = after
            try:
                self.now = await Connection.open(self.chance.choice(self.ports), address, self.key, last)
            except OSError:
                await asyncio.sleep(0.05)  # a client's backoff, for a process that is not there
                continue
            assert self.now.status == 200, self.now.head
            async for frame in self.now.frames():
                self.frames.append(frame)
            if not self.now.ended:
                self.cuts += 1
            self.now.close()


async def test_two_hundred_readers_are_cut_and_miss_nothing(api: Api, helper: Agent, tmp_path: Path) -> None:
    """By TCP reset at random moments, and by a web process that is killed and comes back."""
    chance = random.Random(7)
    start = sync_to_async(lambda number: helper.start(f"run {number}", owner=api.user))
    runs = [await start(number) for number in range(20)]
    with processes(tmp_path, 2) as (one, other):
        ports = [one.port, other.port]
        readers = [Reader(runs[number % 20], api.key, ports, chance) for number in range(200)]
        following = [asyncio.create_task(each.follow()) for each in readers]
        while not all(each.frames for each in readers):
            await asyncio.sleep(0.05)  # between looks at a condition
            assert not any(each.done() for each in following), [each for each in following if each.done()]
        # Each of them has some hundred readers now, and the threads of a process that has none but ours.
        assert one.connections + other.connections >= 200
        assert max(one.threads, other.threads) < 30
        for number in range(60):
            await asyncio.gather(*(record(run, f"word {number}") for run in runs[number % 2 :: 2]))
            for each in chance.sample(readers, 6):
                if each.now is not None:
                    each.now.reset()
            if number == 30:
                one.kill()
                one.start()
        await sync_to_async(one.up)()
        for run in runs:
            await cancel(run)
        async with asyncio.timeout(60):
            await asyncio.gather(*following)
        assert sum(each.cuts for each in readers) > 100
        for run in runs:
            told = await whole(other, run, api.key)
            assert [seq_of(each) for each in told] == list(range(1, len(told) + 1))
            for each in readers:
                if each.run is run:
                    assert b"".join(each.frames) == b"".join(told)
        await later(lambda: one.connections + other.connections == 0, why="nothing is left open")
        assert "Traceback" not in one.said() + other.said()


async def test_a_process_that_is_asked_to_end_sends_its_readers_on(api: Api, live: Run, tmp_path: Path) -> None:
    """At once, though it would wait for its answers for half a minute: streams end in order, and the process with them."""
    with processes(tmp_path, 1, "--timeout-graceful-shutdown", "30") as (web,):
        readers = [await Connection.open(web.port, stream(live), api.key) for _ in range(20)]
        stuck = await Connection.open(web.port, stream(live), api.key, receives=2048)
        told = [each.frames() for each in readers]
        for each in told:
            await anext(each)
            await anext(each)
        for number in range(40):
            await record(live, str(number) * 20_000)  # more than the sockets of one who does not read can hold
        begin = time.monotonic()
        web.terminate()
        await asyncio.gather(*(_drain(each) for each in told))
        assert all(each.ended for each in readers)
        assert time.monotonic() - begin < 5
        await asyncio.to_thread(web.process.wait, 10)
        assert time.monotonic() - begin < 10
        stuck.close()
        await live.arefresh_from_db()
        assert live.status == "queued"
        assert "Traceback" not in web.said()


async def _drain(told: Any) -> list[bytes]:
    return [each async for each in told]


async def test_a_reader_who_does_not_read_costs_little_and_is_closed(api: Api, live: Run, tmp_path: Path) -> None:
    with processes(tmp_path, 1) as (web,):
        quick = await Connection.open(web.port, stream(live), api.key)
        told = quick.frames()
        await anext(told)
        stuck = [await Connection.open(web.port, stream(live), api.key, receives=2048) for _ in range(20)]
        await later(lambda: web.connections == 21)
        before, sent = web.resident, 0
        while web.connections > 1:
            await record(live, str(sent) * 30_000)
            sent += 1
            assert sent < 400, "they are closed long before"
        last = b""
        while seq_of(last := await anext(told)) < sent + 2:
            pass
        # Each held at most its queue and what the sockets hold; what they share is there once.
        assert web.resident - before < 30_000_000
        for each in stuck:
            each.close()
        again = await Connection.open(web.port, stream(live), api.key, seq_of(last) - 3)
        rest = again.frames()
        assert [seq_of(await anext(rest)) for _ in range(3)] == [sent, sent + 1, sent + 2]
        for each in (quick, again):
            each.close()
        assert "Traceback" not in web.said()


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


async def test_redis_is_only_a_bell(api: Api, live: Run, tmp_path: Path, wire: Wire) -> None:
    """Down, hung or flushed: events come by looking once a second. When it is back, at once."""
    count = 2

    with processes(tmp_path, 1, REDIS_URL=wire.url) as (web,):
        connection = await Connection.open(web.port, stream(live), api.key)
        told = connection.frames()
        for _ in range(2):
            await anext(told)

        async def delay() -> float:
            """Seconds from the commit of an event to its reader."""
            nonlocal count
            bells._unheard.clear()
            begin = time.monotonic()
            await record(live, "word")
            count += 1
            async with asyncio.timeout(20):
                assert seq_of(await anext(told)) == count
            return time.monotonic() - begin

        async def is_live() -> bool:
            return median([await delay() for _ in range(5)]) < 0.25

        async def live_again() -> None:
            async with asyncio.timeout(40):
                while not await is_live():
                    pass

        await live_again()
        wire.down()
        assert max([await delay() for _ in range(4)]) < 5
        # Who comes meanwhile is served as well.
        second = await Connection.open(web.port, f"{stream(live)}?starting_after={count}", api.key)
        others = second.frames()
        await delay()
        assert seq_of(await anext(others)) == count
        wire.back()
        await live_again()
        wire.stand_still()
        assert max([await delay() for _ in range(4)]) < 5
        third = await Connection.open(web.port, f"{stream(live)}?starting_after={count}", api.key)
        await delay()
        assert seq_of(await anext(third.frames())) == count
        wire.back()
        await live_again()
        redis.Redis.from_url(django_settings.REDIS_URL).flushall()
        await live_again()
        await cancel(live)
        assert b"run.cancelled" in (await _drain(told))[-1]
        for each in (connection, second, third):
            each.close()
        assert "Traceback" not in web.said()
