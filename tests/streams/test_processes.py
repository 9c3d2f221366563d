"""Streams of real web processes: cut in every way, and whole in the end."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import redis
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.test import Client

from runs import bells
from runs.agents import Agent
from runs.models import Run
from runs.run_log import DatabaseRunLog
from tests.http.conftest import Api
from tests.streams.outside import Connection, Process, Wire, processes, seq_of
from tests.workers.conftest import eventually
from threads import clock
from threads.models import ApiKey

pytestmark = [
    pytest.mark.django_db(transaction=True), pytest.mark.slow, pytest.mark.timeout(240),
    pytest.mark.usefixtures("nothing_stays_open"),
]  # fmt: skip


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
    """At once, though it would wait for its answers for five minutes: streams end in order, and the process with them."""
    with processes(tmp_path, 1, "--timeout-graceful-shutdown", "300") as (web,):
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
        assert time.monotonic() - begin < 60
        await asyncio.to_thread(web.process.wait, 60)
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


async def test_redis_is_only_a_bell(
    api: Api, live: Run, tmp_path: Path, wire: Wire, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down, hung or flushed: events come by looking once a second, and are written. When it is back, at once."""
    count, waited = 2, 0.0
    settings.REDIS_URL = wire.url  # the writer's, too
    monkeypatch.setattr(bells, "_client", cache(bells._client.__wrapped__))

    with processes(tmp_path, 1, REDIS_URL=wire.url) as (web,):
        crowd = [await Connection.open(web.port, stream(live), api.key) for _ in range(50)]
        told = [each.frames() for each in crowd]

        async def all_have(seq: int) -> None:
            async with asyncio.timeout(20):
                assert {seq_of(each) for each in await asyncio.gather(*map(anext, told))} == {seq}

        for seq in (1, 2):
            await all_have(seq)

        async def delay() -> float:
            """Seconds from the commit of an event until the last reader has it."""
            nonlocal count, waited
            bells._unheard.clear()
            begin = time.monotonic()
            await record(live, "word")
            wrote = time.monotonic()
            waited = max(waited, wrote - begin)
            count += 1
            await all_have(count)
            return time.monotonic() - wrote

        async def live_again() -> None:
            """Below a poll's interval, as it was before."""
            async with asyncio.timeout(40):
                while median([await delay() for _ in range(5)]) >= 0.25:
                    pass

        await live_again()
        wire.down()
        assert max([await delay() for _ in range(4)]) < 5
        # Who comes meanwhile is served as well.
        second = await Connection.open(web.port, f"{stream(live)}?starting_after={count}", api.key)
        await delay()
        assert seq_of(await anext(second.frames())) == count
        wire.back()
        await live_again()
        wire.stand_still()
        assert max([await delay() for _ in range(4)]) < 5
        third = await Connection.open(web.port, f"{stream(live)}?starting_after={count}", api.key)
        await delay()
        assert seq_of(await anext(third.frames())) == count
        wire.back()
        await live_again()
        redis.Redis.from_url(wire.url).flushall()
        await live_again()
        assert waited < 10, "a write waits for one answer of Redis, of 2 s, and no longer"
        await cancel(live)
        for each in told:
            assert b"run.cancelled" in (await _drain(each))[-1]
        for one in (*crowd, second, third):
            one.close()
        assert "Traceback" not in web.said()


@sync_to_async
def credentials(api_of: Any, helper: Agent) -> dict[str, dict[str, Any]]:
    """Somebody for each way to lose sight of a run, with a run of theirs, and what takes it from them."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("key revoked", "key expired", "permission", "user", "thread", "session", "nothing"):
        theirs = api_of(name.replace(" ", "_"))
        reader = api_of("staff", is_staff=True, is_superuser=True) if name == "permission" else theirs
        run = helper.start("x", owner=theirs.user)
        found[name] = {"key": reader.key, "headers": {}, "run": run}
        keys, users = ApiKey.objects.filter(owner=reader.user), User.objects.filter(pk=reader.user.pk)
        if name == "session":
            client = Client()
            client.force_login(reader.user)
            found[name] |= {"key": "", "headers": {"Cookie": f"sessionid={client.cookies['sessionid'].value}"}}
        found[name]["takes"] = {
            "key revoked": partial(keys.update, revoked_at=clock.Now()),
            "key expired": partial(keys.update, expires_at=datetime(2026, 1, 1, tzinfo=UTC)),
            "permission": partial(users.update, is_superuser=False),
            "user": partial(users.update, is_active=False),
            "thread": lambda run=run: run.thread.delete(),
            "session": Session.objects.all().delete,
            "nothing": bool,
        }[name]
    return found


async def test_who_may_no_longer_see_a_run_is_sent_away_and_told_why(
    api_of: Any, helper: Agent, tmp_path: Path
) -> None:
    people = await credentials(api_of, helper)
    with processes(tmp_path, 1, application="tests.streams.app.asgi:application") as (web,):

        async def begin(one: dict[str, Any], address: str) -> Connection:
            return await Connection.open(web.port, address, one["key"], headers=one["headers"])

        for name, one in people.items():
            addresses = [stream(one["run"]), f"/api/threads/{one['run'].thread_id}/stream"]
            streams = [await begin(one, address) for address in addresses]
            told = [each.frames() for each in streams]
            for each in told:
                assert seq_of(await anext(each)) == 1
            await sync_to_async(one["takes"])()
            if name == "nothing":
                await cancel(one["run"])
                assert b"run.cancelled" in (await _drain(told[0]))[-1]
                streams[1].close()
                continue
            async with asyncio.timeout(
                30
            ):  # asked every second; thread and run are looked for after some seconds of silence
                for each in told:
                    await _drain(each)
            assert [each.ended for each in streams] == [True, True], name
            again = [await begin(one, address) for address in addresses]
            refused = 404 if name in ("permission", "thread") else 401
            assert {each.status for each in again} <= {refused, 403 if name == "session" else refused}, name
            for opened_once in (*streams, *again):
                opened_once.close()
        assert "Traceback" not in web.said()
