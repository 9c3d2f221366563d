"""Load the messages, stream from their cursor: every character once, whenever that is, and whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import random
from typing import Any
from uuid import UUID

import pytest
from asgiref.sync import sync_to_async

from runs.models import Run
from runs.streams.app import Application
from tests.http.conftest import Api
from tests.http.frames import Frame
from tests.streams.folding import folded
from tests.streams.inside import Answer, ask
from tests.workers.app.agents import worker_test
from tests.workers.conftest import Kit
from tests.workers.conftest import kit as kit
from tests.workers.conftest import workers as workers
from threads.models import Thread

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.slow, pytest.mark.timeout(240)]

Snapshot = dict[str, Any]


async def snapshot(api: Api, thread: Thread) -> Snapshot:
    found: Snapshot = await sync_to_async(api.get)(f"/api/threads/{thread.pk}/messages?limit=100")
    return found


def shown(messages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Messages without what waits for its place: it is told when it gets it."""
    return {id: each for id, each in messages.items() if each["status"] != "waiting"}


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_snapshot_and_the_stream_from_its_cursor_are_the_thread(
    application: Application, api: Api, workers: Kit, seed: int
) -> None:
    """Over runs that speak, call tools, are cut with their worker, cancelled, and wait for one another."""
    chance = random.Random(seed)
    thread = await Thread.objects.acreate(owner=api.user)
    start = sync_to_async(lambda said: worker_test.start(said, thread=thread))
    said = [await start(text) for text in ("tell me", "call idempotent 0.2", "tell me more", "silence")]
    taken: list[tuple[Snapshot, Answer]] = []

    async def look() -> None:
        """Load the messages and open the stream from there, at any moment."""
        while not over.is_set():
            found = await snapshot(api, thread)
            cursor = found["cursor"]
            after = f"?after={cursor['run']}:{cursor['seq']}" if cursor["run"] else ""
            taken.append((found, await ask(application, "GET", f"/api/threads/{thread.pk}/stream{after}", api.key)))
            await asyncio.sleep(chance.uniform(0.0, 0.15))  # so that the moments are many

    over = asyncio.Event()
    looking = asyncio.create_task(look())
    ended = sync_to_async(lambda: not Run.objects.filter(thread=thread, finished_at=None).exists())
    await until_it_speaks(said[0])
    holder = (await Run.objects.aget(pk=said[0].pk)).holder
    if holder is not None:
        await sync_to_async(lambda: workers.kill(workers.of(holder)))()
        await sync_to_async(lambda: workers.up(agents=2))()
    await until_it_speaks(said[3])
    await sync_to_async(said[3].cancel)()
    async with asyncio.timeout(60):
        while not await ended():
            await asyncio.sleep(0.05)  # between looks at a condition
    over.set()
    await looking
    log = await whole_log(thread)
    final = await snapshot(api, thread)
    expected = {each["id"]: (each["status"], each["content"]) for each in final["results"]}
    assert {status for status, _ in expected.values()} == {"completed", "partial"}
    assert "pending" in {each["status"] for found, _ in taken for each in found["results"]}, (
        "some were taken in between"
    )
    for found, answer in taken:
        at = place(log, found["cursor"])
        # What the snapshot shows is what the log says up to its cursor, not a character more.
        told = folded(event for _, event in log[:at])
        seen = shown(folded([], found["results"]))
        assert {id: each for id, each in told.items() if id in seen or each["status"] == "pending"} == seen
        # And with what streams from there it becomes the thread.
        rest = await told_to_the_end(answer, len(log) - at)
        assert [frame.data for frame in rest] == [event for _, event in log[at:]]
        whole = folded([event for _, event in log[at:]], found["results"])
        assert {id: (each["status"], each["content"]) for id, each in whole.items()} == expected


async def until_it_speaks(run: Run) -> None:
    deltas = sync_to_async(lambda: run.event_set.filter(type="text.delta").exists())
    async with asyncio.timeout(60):
        while not await deltas():
            await asyncio.sleep(0.02)  # between looks at a condition


@sync_to_async
def whole_log(thread: Thread) -> list[tuple[UUID, dict[str, Any]]]:
    runs = Run.objects.filter(thread=thread).order_by("created_at")
    return [(run.pk, event.as_dict()) for run in runs for event in run.events()]


def place(log: list[tuple[UUID, dict[str, Any]]], cursor: dict[str, Any]) -> int:
    """Return how many events of the log are up to the cursor."""
    if cursor["run"] is None:
        return 0
    return next(
        n for n, (run, event) in enumerate(log, 1) if (str(run), event["seq"]) == (cursor["run"], cursor["seq"])
    )


async def told_to_the_end(answer: Answer, count: int) -> list[Frame]:
    told: list[Frame] = []
    if count:
        async for frame in answer.frames():
            if frame.comment is None:
                told.append(frame)
            if len(told) == count:
                break
    await answer.leave()
    return told
