"""At the seam, one moment at a time: a barrier holds what was read back, while the writer writes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import sync_to_async

from runs.agents import Agent
from runs.models import Run
from runs.run_log import DatabaseRunLog
from runs.streams import broadcast
from runs.streams.app import OPENING, Application
from runs.streams.broadcast import KEPT
from runs.streams.log import MOST_A_TAIL, Log
from tests.http.conftest import Api
from tests.streams.inside import Answer, ask
from threads.models import Thread

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.slow]

cancel = sync_to_async(Run.cancel)


class Barrier:
    """Stops each answer of one of the log's questions: it was read, and is not there yet, while the writer goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, question: str) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()
        real: Callable[..., Any] = getattr(Log, question)

        async def held(log: Log, *given: Any) -> Any:
            answer = await real(log, *given)
            if not self.open.is_set():
                self.reached.set()
                await self.open.wait()
            return answer

        monkeypatch.setattr(Log, question, held)

    def shut(self) -> None:
        self.reached.clear()
        self.open.clear()

    async def stands(self) -> None:
        await asyncio.wait_for(self.reached.wait(), 20)


@sync_to_async
def record(run: Run, count: int) -> None:
    for number in range(count):
        assert DatabaseRunLog().record(run.pk, "data", {"data": number})


@sync_to_async
def log_of(run: Run) -> list[dict[str, Any]]:
    return [event.as_dict() for event in run.events()]


@pytest.fixture(params=["heard", "lost"])
def bell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether bells ring; without them a run is looked at soon."""
    if request.param == "lost":
        monkeypatch.setattr("runs.bells.ring", lambda channels: None)
        monkeypatch.setattr(broadcast, "LOOK_SECONDS", 0.05)
    return str(request.param)


async def data_of(answer: Answer) -> list[Any]:
    return [frame.data for frame in await asyncio.wait_for(answer.events(), 30)]


@pytest.mark.parametrize("question", ["pages", "live"])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("others", [False, True])
async def test_what_is_written_between_history_and_live_comes_once(
    application: Application, api: Api, helper: Agent, monkeypatch: pytest.MonkeyPatch, bell: str, question: str, ends: bool,
    others: bool,
) -> None:  # fmt: skip
    """Little, more than a tail keeps, more than a round reads; with the run's last event; alone, and beside a live reader."""
    barrier = Barrier(monkeypatch, question)
    most = MOST_A_TAIL + 5 if ends and not others and bell == "lost" else KEPT + 5
    # The first is held, with the rest of its history, or with nothing, for it has all (4); the others come behind it.
    for many, cursors in ((0, (4, 0)), (3, (4, 3, 0)), (3, (3, 4)), (most, (4, 3, 0))):
        run = await sync_to_async(helper.start)("x", owner=api.user)
        readers = []
        if others:
            first = await ask(application, "GET", f"/api/runs/{run.pk}/stream", api.key)
            readers.append((0, first))
            async with asyncio.timeout(20):
                while run.pk not in broadcast.here().tails or not broadcast.here().tails[run.pk].joined:
                    await asyncio.sleep(0.01)  # between looks at a condition
        await record(run, 2)
        barrier.shut()
        for after in cursors:
            address = f"/api/runs/{run.pk}/stream?starting_after={after}&batch_size=2"
            readers.append((after, await ask(application, "GET", address, api.key)))
        await record(run, 1)  # so that there is something to ask for, also live
        if question == "pages" or others:
            await barrier.stands()
        await record(run, many)
        if others and question == "pages":  # the live reader is ahead now of those who are held
            await run.arefresh_from_db()
            async with asyncio.timeout(20):
                while broadcast.here().tails[run.pk].at < run.last_seq:
                    await asyncio.sleep(0.01)  # between looks at a condition
        if ends:
            await cancel(run)
        barrier.open.set()
        if not ends:
            await cancel(run)
        log = await log_of(run)
        for after, reader in readers:
            assert await data_of(reader) == log[after:], (many, after)
            assert reader.ended


async def test_a_cursor_that_is_the_last_seq_waits_for_the_next(
    application: Application, api: Api, helper: Agent, bell: str
) -> None:
    run = await sync_to_async(helper.start)("x", owner=api.user)
    last = (await log_of(run))[-1]["seq"]
    by_header = await ask(application, "GET", f"/api/runs/{run.pk}/stream", api.key, **{"last-event-id": str(last)})
    by_query = await ask(application, "GET", f"/api/runs/{run.pk}/stream?starting_after={last}", api.key)
    await record(run, 1)
    await cancel(run)
    log = await log_of(run)
    for answer in (by_header, by_query):
        assert await data_of(answer) == log[last:]
    end = log[-1]["seq"]
    over = await ask(application, "GET", f"/api/runs/{run.pk}/stream?starting_after={end}", api.key)
    assert (over.status, await over.whole(), over.ended) == (200, OPENING, True)
    over = await ask(application, "GET", f"/api/runs/{run.pk}/stream", api.key, **{"last-event-id": str(end)})
    assert over.status == 204
    await over.whole()


@pytest.mark.parametrize("meanwhile", ["nothing", "begins", "ends"])
async def test_between_two_runs_of_a_thread(
    application: Application, api: Api, helper: Agent, monkeypatch: pytest.MonkeyPatch, bell: str, meanwhile: str
) -> None:
    """It was told that there is no next run, and just then there is; or that there is, and just then it is over."""
    barrier = Barrier(monkeypatch, "next_runs")
    thread = await sync_to_async(Thread.objects.create)(owner=api.user)
    start = sync_to_async(lambda said: helper.start(said, thread=thread))
    first = await start("one")
    address = f"/api/threads/{thread.pk}/stream"
    answers = [
        await ask(application, "GET", address, api.key),
        await ask(application, "GET", f"{address}?after={first.pk}:2", api.key),
    ]
    barrier.shut()
    await cancel(first)
    runs = [first]
    if meanwhile == "nothing":
        await barrier.stands()
        runs.append(await start("two"))
    else:
        runs.append(await start("two"))
        await barrier.stands()
        if meanwhile == "ends":
            await cancel(runs[-1])
            runs.append(await start("three"))
    barrier.open.set()
    for run in runs[1:]:
        await run.arefresh_from_db()
        if not run.finished:
            await cancel(run)
    expected = [event for run in runs for event in await log_of(run)]
    for skipped, answer in zip((0, 2), answers, strict=True):
        told = []
        async with asyncio.timeout(30):
            async for frame in answer.frames():
                if frame.comment is None:
                    told.append(frame.data)
                if len(told) == len(expected) - skipped:
                    break
        assert told == expected[skipped:]
        await answer.leave()


async def test_a_large_page_and_what_came_meanwhile_are_not_too_much(
    application: Application, api: Api, live: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page is asked for when all before it was sent: its reader is not slow, however large it is."""
    large = "x" * (broadcast.MOST_QUEUED - 5000)
    assert await sync_to_async(DatabaseRunLog().record)(live.pk, "data", {"data": large})
    await live.arefresh_from_db()
    await ask(application, "GET", f"/api/runs/{live.pk}/stream?starting_after={live.last_seq}", api.key)
    now = broadcast.here()
    async with asyncio.timeout(20):
        while live.pk not in now.tails or not now.tails[live.pk].joined:
            await asyncio.sleep(0.01)  # between looks at a condition
    barrier = Barrier(monkeypatch, "pages")
    barrier.shut()
    reader = await ask(application, "GET", f"/api/runs/{live.pk}/stream", api.key)
    await barrier.stands()
    await record(live, KEPT - 4)
    await live.arefresh_from_db()
    async with asyncio.timeout(20):
        while now.tails[live.pk].at < live.last_seq:
            await asyncio.sleep(0.01)  # between looks at a condition
    barrier.open.set()
    await cancel(live)
    assert await data_of(reader) == await log_of(live)
    assert reader.ended
