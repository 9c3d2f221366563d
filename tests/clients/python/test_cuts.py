"""Both clients through proxies that cut, at servers whose workers die: nothing is missed, nothing is shown that is not."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import sync_to_async

from agents_project.demo.model_server import ModelCall, Reasoning, Reply, Text, ToolCall
from longhaul_client import AsyncLonghaul, Backoff, Event, Longhaul, Messages, Transcript
from runs.models import Run
from tests.http.conftest import Api
from tests.streams.app.agents import teller
from tests.streams.test_cuts import WORDS, World, uncut
from threads.models import Thread

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.slow, pytest.mark.timeout(400)]

QUICK = Backoff(first=0.05, most=0.5)
Shown = list[tuple[str, str, str, Any]]


def tell(call: ModelCall) -> Reply:
    """Think, speak, and call tools, as much as the user's text says: `tell STEPS CHUNKS SEED`."""
    last = max(place for place, each in enumerate(call.messages) if each["role"] == "user")
    _, steps, chunks, seed = str(call.messages[last]["content"]).split()
    step = sum(each["role"] == "assistant" for each in call.messages[last:])
    chance = random.Random(f"{seed}:{step}")

    def words(count: int) -> str:
        return " ".join(chance.choices(WORDS, k=count))

    said: list[Any] = [Reasoning(words(int(chunks) // 2), chunk_chars=5, delay=0.03)]
    said.append(Text(words(int(chunks)), chunk_chars=6, delay=0.03))
    if step < int(steps):
        said += [ToolCall("look", {"at": words(2)})]
    return said


@pytest.fixture
def told(world: World) -> World:
    world.kit.model.script = tell
    return world


def shown(messages: Any) -> Shown:
    """What stands in the thread. What waits for its place is told when it gets it."""
    return [(each.id, each.role, each.status, each.content) for each in messages if each.status != "waiting"]


class Watched:
    """A fold of what one reader is given, held against what `GET messages` says at each cut."""

    def __init__(self, runs: int) -> None:
        self.transcript = Transcript()
        self.frames: list[bytes] = []
        self.left = runs
        self.seen = self.cuts = self.checked = 0
        self.due: dict[str, Shown] = {}

    def take(self, event: Event, connections: int) -> bool:
        """Take an event; return whether it came over a new connection."""
        assert self.transcript.take(event)
        self.frames.append(b"id: %s\nevent: %s\ndata: %s\n\n" % (event.id.encode(), event.type.encode(), event.raw))
        self.left -= event.terminal
        self.check()
        new, self.seen = connections != self.seen, connections
        return new

    def snapshot(self, page: Messages) -> None:
        self.cuts += 1
        if page.cursor is not None:
            self.due[page.cursor] = shown(page)
        self.check()

    def check(self) -> None:
        """What was loaded after a cut is what the stream has told, as soon as it stands there."""
        expected = self.due.pop(self.transcript.cursor or "", None)
        if expected is not None:
            assert shown(self.transcript.messages) == expected
            self.checked += 1


def follow(url: str, key: str, thread: str, runs: int) -> Watched:
    watched = Watched(runs)
    with Longhaul(url, api_key=key, backoff=QUICK, retries=50, stall=5.0, timeout=5.0) as client:
        stream = client.threads.stream(thread)
        for event in stream:
            if watched.take(event, stream.connections):
                watched.snapshot(client.threads.messages(thread, limit=200))
            if not watched.left:
                return watched
    raise AssertionError("a thread's stream has no end")


async def afollow(url: str, key: str, thread: str, runs: int) -> Watched:
    watched = Watched(runs)
    async with AsyncLonghaul(url, api_key=key, backoff=QUICK, retries=50, stall=5.0, timeout=5.0) as client:
        stream = client.threads.stream(thread)
        async for event in stream:
            if watched.take(event, stream.connections):
                watched.snapshot(await client.threads.messages(thread, limit=200))
            if not watched.left:
                return watched
    raise AssertionError("a thread's stream has no end")


async def converse(url: str, key: str, thread: str, last: str) -> Transcript:
    """Load the thread and follow it, as an interface does, until this run of it has ended."""
    async with AsyncLonghaul(url, api_key=key, backoff=QUICK, retries=50, stall=5.0, timeout=5.0) as client:
        async for state in client.conversation(thread):
            if state.run == last and not state.is_running:
                return state
    raise AssertionError("a conversation has no end")


async def test_both_clients_through_many_cuts(api: Api, told: World, seed: int) -> None:
    """Runs that think, call tools and lose their workers; readers that are cut by proxies and by web processes that end."""
    runs = 2
    threads = [str((await Thread.objects.acreate(owner=api.user, agent="teller")).pk) for _ in range(3)]
    start = sync_to_async(lambda said, to: teller.start(said, thread=Thread.objects.get(pk=to)))
    last: dict[str, str] = {}
    for thread in threads:
        for number in range(runs):
            last[thread] = str((await start(f"tell 1 30 {seed}.{number}", thread)).pk)
    urls = [each.url for each in told.proxies]
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(6) as pool:
        blocking = [
            loop.run_in_executor(pool, follow, urls[number % 2], api.key, threads[number % 3], runs)
            for number in range(6)
        ]
        others = [
            asyncio.create_task(afollow(urls[number % 2], api.key, threads[number % 3], runs)) for number in range(6)
        ]
        talks = [
            asyncio.create_task(converse(urls[number % 2], api.key, thread, last[thread]))
            for number, thread in enumerate(threads)
        ]
        await told.agent_dies()
        await told.all_cut()
        await told.web_ends(1)
        while not await sync_to_async(lambda: not Run.objects.filter(finished_at=None).exists())():
            await asyncio.sleep(0.1)  # between looks at a condition
        for proxy in told.proxies:
            proxy.pause()
        async with asyncio.timeout(90):
            watched = await asyncio.gather(*blocking, *others)
            states = await asyncio.gather(*talks)
    print(f"{sum(each.cuts for each in watched)} cuts, {sum(each.checked for each in watched)} compared")
    assert sum(each.cuts for each in watched) >= 2 * len(watched), "each was cut, in the middle"
    assert sum(each.checked for each in watched) >= len(watched)
    port = told.webs[0].port
    async with AsyncLonghaul(f"http://127.0.0.1:{port}", api_key=api.key) as client:
        for number, thread in enumerate(threads):
            final = await client.threads.messages(thread, limit=200)
            whole = b"".join(await uncut(port, f"/api/threads/{thread}/stream", api.key, runs))
            for place, each in enumerate(watched):
                if place % 3 == number:
                    assert b"".join(each.frames) == whole
                    assert shown(each.transcript.messages) == shown(final)
                    assert not each.transcript.is_running
            assert shown(states[number].messages) == shown(final)
