"""Readers of real processes, cut at random bytes, while everything behind them dies: none misses a byte, none shows what is not.

What a reader holds after each cut is compared with `GET messages` at that moment; at the end all that it was sent is what an
uncut reader is sent. The seed is printed: with it the cuts fall at the same bytes.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
import redis
from asgiref.sync import sync_to_async
from django.conf import settings as django_settings
from django.db import connection

from agents_project.demo.model_server import ModelCall, Reasoning, Reply, Text, ToolCall
from runs import invariants
from runs.agents import registry
from runs.models import Event, Run
from tests.http.conftest import Api
from tests.streams.app.agents import teller
from tests.streams.cutting import CuttingProxy
from tests.streams.folding import Folded
from tests.streams.outside import Connection, Process, Wire, processes, seq_of
from tests.streams.reading import OVER, Reader, Site
from tests.workers.conftest import Kit, eventually, kit_over
from threads.models import Thread

pytestmark = pytest.mark.usefixtures("nothing_stays_open")

WORDS = ["word", "größer", "\u2028", "日本語", "🙂", "two\n\nlines", "data: x", '"quoted"', "id: 7", "e\u0301"]
SETTINGS = "tests.streams.settings"


def tell(call: ModelCall) -> Reply:
    """Think, speak, and call tools, as much as the user's text says: `tell STEPS CHUNKS SEED`."""
    last = max(place for place, each in enumerate(call.messages) if each["role"] == "user")
    _, steps, chunks, seed = str(call.messages[last]["content"]).split()
    step = sum(each["role"] == "assistant" for each in call.messages[last:])
    chance = random.Random(f"{seed}:{step}")
    delay = 0.1

    def words(count: int) -> str:
        return " ".join(chance.choices(WORDS, k=count))

    said: list[Any] = [Reasoning(words(int(chunks) // 2), chunk_chars=5, delay=delay)]
    said.append(Text(words(int(chunks)), chunk_chars=6, delay=delay))
    if step < int(steps):
        said += [ToolCall("flaky", {"number": chance.randint(0, 99)}), ToolCall("look", {"at": words(2)})]
    return said


class Broker:
    """The broker of the session, reached as ever; the bells ring through a wire."""

    def __init__(self, wire: Wire) -> None:
        self.environment: Mapping[str, str] = {"DJANGO_SETTINGS_MODULE": SETTINGS, "REDIS_URL": wire.url}

    def forget(self) -> None:
        redis.Redis.from_url(django_settings.REDIS_URL).flushall()

    def messages(self, queue: str) -> int:
        return 0


@dataclass
class World:
    """All that runs, and what can be done to it."""

    webs: list[Process]
    proxies: list[CuttingProxy]
    wire: Wire
    kit: Kit

    async def web_dies(self, number: int) -> None:
        self.webs[number].kill()
        await asyncio.sleep(0.3)
        self.webs[number].start()

    async def web_ends(self, number: int) -> None:
        self.webs[number].terminate()
        await asyncio.to_thread(self.webs[number].process.wait, 30)
        self.webs[number].start()

    async def agent_dies(self) -> None:
        """Kill the worker of a run that is speaking: its message is discarded, and told anew."""
        discarded = sync_to_async(lambda: Event.objects.filter(type="message.discarded").count())
        before = await discarded()

        def speaking() -> Any:
            if not Run.objects.filter(finished_at=None).exists():
                return "all is over"
            for run in Run.objects.filter(holder__isnull=False).order_by("?"):
                newest = run.event_set.order_by("-seq").values_list("type", flat=True).first()
                if newest in ("text.delta", "reasoning.delta"):
                    return run
            return None

        async with asyncio.timeout(60):
            while await discarded() == before:
                run = await sync_to_async(lambda: eventually(speaking, why="a run speaks"))()
                if run == "all is over":
                    return
                await sync_to_async(lambda run=run: self.kit.kill(self.kit.of(run.holder)))()
                self.kit._start("agents")  # meanwhile there is another
                # On a busy machine it may have said its last word before it died: then nothing is discarded, and another one dies.
                while await Run.objects.filter(holder=run.holder, status="running").aexists():
                    await asyncio.sleep(0.1)  # between looks at a condition

    async def redis_away(self) -> None:
        self.wire.down()
        await asyncio.sleep(2)
        self.wire.back()

    async def redis_hangs(self) -> None:
        self.wire.stand_still()
        await asyncio.sleep(2)
        self.wire.back()

    async def redis_forgets(self) -> None:
        self.kit.broker.forget()

    async def postgres_hangs_up(self) -> None:
        """End every connection of the web processes and workers."""

        def end() -> None:
            with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as admin:
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
                    " AND (application_name LIKE 'tests.%%' OR application_name LIKE 'longhaul%%')",
                    [connection.settings_dict["NAME"]],
                )

        await sync_to_async(end)()

    async def all_cut(self) -> None:
        for proxy in self.proxies:
            await asyncio.to_thread(proxy.cut_all)


@pytest.fixture
def seed() -> int:
    """CUTS_SEED, or one that is printed."""
    found = int(os.environ.get("CUTS_SEED", 0)) or random.SystemRandom().randrange(1, 2**31)
    print(f"CUTS_SEED={found}")
    return found


@pytest.fixture
def world(transactional_db: None, tmp_path: Path, seed: int) -> Iterator[World]:
    registry.add(teller)
    with ExitStack() as stack:
        wire = Wire()
        stack.callback(wire.close)
        kit = stack.enter_context(kit_over(Broker(wire), tmp_path))
        kit.model.script = tell
        webs = stack.enter_context(
            processes(tmp_path, 2, DJANGO_SETTINGS_MODULE=SETTINGS, REDIS_URL=wire.url, PGAPPNAME="tests.streams")
        )
        proxies = [
            stack.enter_context(
                CuttingProxy(web.port, seed=seed + number, mean_bytes=12_000, hang=timedelta(milliseconds=500))
            )
            for number, web in enumerate(webs)
        ]
        kit.up(agents=2, tools=1, control=1)
        yield World(webs, proxies, wire, kit)
        for run in Run.objects.exclude(status__in=["completed", "failed", "cancelled"]):
            run.cancel()
        report = invariants.check()
        assert not any(report.violations.values()), str(report)


async def uncut(port: int, path: str, key: str, runs: int = 1) -> list[bytes]:
    """Read a run that has ended, or a thread of so many of them, at one go."""
    found = await Connection.open(port, path, key)
    told: list[bytes] = []
    async for frame in found.frames():
        told.append(frame)
        runs -= frame.split(b"\n")[1].removeprefix(b"event: ").decode() in OVER
        if not runs:
            break
    found.close()
    return told


async def tell_and_read(
    api: Api,
    world: World,
    seed: int,
    *,
    readers: int,
    threads: int,
    runs: int,
    deeds: list[Callable[[], Any]],
    apart: int,
    within: float = 350,
) -> None:
    """Let each thread have so many runs, the last of them started by those who stream it, and let all this happen to them.

    Within so many seconds, and `apart` cuts between two deeds. Every reader ends with the bytes of an uncut one, and with
    the messages as they are.
    """
    site = Site(api.key, [each.port for each in world.proxies], [each.port for each in world.webs])
    begin = time.monotonic()
    following: list[Reader] = []
    told: dict[str, list[str]] = {}
    posted: dict[str, dict[str, Any]] = {}
    for number in range(threads):
        thread = str((await Thread.objects.acreate(owner=api.user, agent="teller")).pk)
        start = sync_to_async(lambda said, to: teller.start(said, thread=Thread.objects.get(pk=to)))
        told[thread] = [str((await start(f"tell 2 24 {seed}.{number}.{each}", thread)).pk) for each in range(runs - 1)]
        posted[thread] = {
            "input": f"tell 0 24 {seed}.{number}.last", "stream": True, "client_id": f"{seed}-{number}", "agent": "teller",
        }  # fmt: skip
    names = list(told)
    for number in range(readers):
        thread = names[number % threads]
        own = random.Random(f"{seed}:{number}")
        match number // threads % 5:
            case 0:
                one = Reader(site, own, thread=thread, start=posted[thread])
            case 1 | 2:
                one = Reader(site, own, thread=thread, run=own.choice(told[thread]))
            case 3:
                one = Reader(site, own, thread=thread, runs=runs)
            case _:
                one = Reader(site, own, thread=thread, runs=runs, forgets=True)
        following.append(one)
    live = Run.objects.filter(finished_at=None).aexists
    tasks = [asyncio.create_task(each.follow()) for each in following]
    try:
        async with asyncio.timeout(within):
            for deed in deeds:
                cut = sum(each.cuts for each in following)
                while sum(each.cuts for each in following) < cut + apart and await live():
                    await asyncio.sleep(0.1)  # between looks at a condition
                    _fail_early(tasks)
                if not await live():
                    break
                print(f"{time.monotonic() - begin:6.1f} s: {_name(deed)}, {sum(each.over for each in following)} over")
                await deed()
            while await live():
                await asyncio.sleep(0.1)  # between looks at a condition
                _fail_early(tasks)
            for proxy in world.proxies:
                proxy.pause()  # what is left would only be more of the same
            while not all(each.done() for each in tasks):
                await asyncio.sleep(0.1)  # between looks at a condition
                _fail_early(tasks)
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        cuts = sum((each.cuts for each in world.proxies), start=type(world.proxies[0].cuts)())
        print(f"{time.monotonic() - begin:6.1f} s: {sum(each.cuts for each in following)} times came back, {dict(cuts)},"
              f" {dict(site.checks)}, refused {dict(site.refused)}")  # fmt: skip
    assert site.checks["at its place"] > readers, "many were compared in between"
    assert await Event.objects.filter(type="message.discarded", run__thread__in=map(UUID, told)).aexists(), (
        "some were told anew"
    )
    for web in world.webs:
        await sync_to_async(web.up)()
    key, port = api.key, world.webs[0].port
    for thread, known in told.items():
        of_thread = await uncut(port, f"/api/threads/{thread}/stream", key, runs)
        places = [
            (frame.split(b"\n")[0].decode().removeprefix("id: ").rpartition(":")[0], seq_of(frame))
            for frame in of_thread
        ]
        last = places[-1][0]
        final = await site.snapshot(thread)
        assert (final.run, final.seq) == places[-1]
        for run in [*known, last]:
            of_run = await uncut(port, f"/api/runs/{run}/stream", key)
            assert [seq_of(each) for each in of_run] == list(range(1, len(of_run) + 1))
            assert [seq for of, seq in places if of == run] == list(range(1, len(of_run) + 1))
            for reader in following:
                if reader.run == run:
                    assert b"".join(reader.frames) == b"".join(of_run)
        for reader in following:
            if reader.thread == thread and reader.whole:
                for begun, frames in [*reader.past, (reader.begun, reader.frames)]:
                    at = 0 if begun is None else places.index(begun) + 1
                    assert b"".join(frames) == b"".join(of_thread[at : at + len(frames)])
                if not reader.forgets:
                    assert len(reader.frames) == len(of_thread)
                assert reader.at == places[-1]
            if reader.thread == thread:
                shown = Folded(final.of(None if reader.whole else reader.run))
                assert reader.fold.messages == shown.messages
    await site.close()
    for line in "".join(web.said() for web in world.webs).splitlines():
        assert "Traceback" not in line or any(word in line for word in ("OperationalError", "InterfaceError")), line


def _name(deed: Any) -> str:
    return str(getattr(deed, "func", deed).__name__)


def _fail_early(tasks: list[asyncio.Task[None]]) -> None:
    for each in tasks:
        if each.done():
            each.result()


def deeds_of(world: World) -> list[Callable[[], Any]]:
    return [
        world.all_cut, partial(world.web_dies, 0), world.agent_dies, world.redis_away, world.postgres_hangs_up,
        world.redis_forgets, partial(world.web_ends, 1), world.redis_hangs,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_readers_are_cut_while_all_behind_them_dies(api: Api, world: World, seed: int) -> None:
    await tell_and_read(api, world, seed, readers=50, threads=5, runs=2, deeds=deeds_of(world)[:-1], apart=25)


@pytest.mark.proof
@pytest.mark.timeout(3000)
async def test_two_hundred_readers_are_cut_for_long(api: Api, world: World, seed: int) -> None:
    """The same with more of all; CUTS_ROUNDS times, each with deaths in another order."""
    for number in range(int(os.environ.get("CUTS_ROUNDS", "3"))):
        deeds = deeds_of(world) * 2
        random.Random(f"{seed}:{number}").shuffle(deeds)
        for proxy in world.proxies:
            proxy.go_on()
        await tell_and_read(
            api, world, seed + number, readers=200, threads=10, runs=8, deeds=deeds, apart=50, within=900
        )
