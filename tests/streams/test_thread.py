"""A thread's stream: its runs one after another, with one cursor, and those to come."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from asgiref.sync import sync_to_async
from django.core.asgi import get_asgi_application
from django.db.models import QuerySet

from runs import bells
from runs.agents import Agent
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, run_to_end
from runs.streams import broadcast
from runs.streams import log as log_of_streams
from runs.streams.app import Application
from runs.streams.visitors import Visitor
from tests.http.conftest import Api
from tests.streams.inside import Answer, ask
from tests.workers.conftest import eventually
from threads.access import Policy
from threads.models import Thread

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.slow]

FAR = 60.0  # seconds
cancel = sync_to_async(Run.cancel)


@pytest.fixture(params=["with_streams", "django"])
async def either(
    request: pytest.FixtureRequest, application: Application, monkeypatch: pytest.MonkeyPatch
) -> Application:
    """The application around Django, and Django's own handler."""
    if request.param == "with_streams":
        return application
    monkeypatch.setattr("runs.events.LOOK_SECONDS", 0.05)
    return get_asgi_application()


@pytest.fixture
def talk(api: Api, helper: Agent, scripted_model: ScriptedModel) -> Thread:
    """A thread with three runs that have ended."""
    scripted_model.say("One.", "Two.", "Three.")
    thread = Thread.objects.create(owner=api.user)
    for word in ("one", "two", "three"):
        run_to_end(helper.start(word, thread=thread))
    return thread


def stream(thread: Thread) -> str:
    return f"/api/threads/{thread.pk}/stream"


Told = list[tuple[str, str]]


async def told(answer: Answer, ends: int) -> Told:
    """Read ids and types until so many runs have ended; then leave."""
    found: Told = []
    async for id, type in each(answer):
        found.append((id, type))
        if type in ("run.completed", "run.cancelled"):
            ends -= 1
            if not ends:
                break
    await answer.leave()
    return found


async def each(answer: Answer) -> AsyncIterator[tuple[str, str]]:
    """Yield ids and types; an id here is no number, as the frames of one run have it."""
    rest = b""
    async for piece in answer.pieces():
        rest += piece
        *whole, rest = rest.split(b"\n\n")
        for frame in whole:
            if frame.startswith(b"id: "):
                id, event, data = frame.decode().split("\n")
                assert f'"seq":{id.rpartition(":")[2]},' in data
                yield id.removeprefix("id: "), event.removeprefix("event: ")


@sync_to_async
def log(thread: Thread) -> Told:
    return [
        (f"{run.pk}:{event.seq}", event.type)
        for run in Run.objects.filter(thread=thread).order_by("created_at")
        for event in run.events()
    ]


async def test_its_runs_come_one_after_another_from_any_cursor(either: Application, api: Api, talk: Thread) -> None:
    whole = await log(talk)
    assert await told(await ask(either, "GET", stream(talk), api.key), 3) == whole
    for place, (id, _) in enumerate(whole[:-1]):
        ends = sum(type == "run.completed" for _, type in whole[place + 1 :])
        by_query = place % 2 == 0
        address = f"{stream(talk)}?after={id}&batch_size={1 + place % 3}" if by_query else stream(talk)
        headers = {} if by_query else {"last-event-id": id}
        assert await told(await ask(either, "GET", address, api.key, **headers), ends) == whole[place + 1 :]


async def test_a_held_run_that_is_overtaken_comes_when_it_is_released(
    either: Application, api: Api, helper: Agent, scripted_model: ScriptedModel
) -> None:
    """An interrupt goes before it, though it was made earlier: from the beginning, and from a cursor in the later one."""

    @sync_to_async
    def talked() -> tuple[Thread, list[Run]]:
        scripted_model.say("Three.", "Two.")
        thread = Thread.objects.create(owner=api.user)
        one, two = (helper.start(word, thread=thread) for word in ("one", "two"))
        three = helper.start("three", thread=thread, busy="interrupt")
        run_to_end(three)
        run_to_end(two)
        return thread, [one, three, two]

    thread, runs = await talked()
    wanted = [(f"{run.pk}:{event.seq}", event.type) for run in runs async for event in run.aevents(follow=False)]
    assert await told(await ask(either, "GET", stream(thread), api.key), 3) == wanted
    place = next(number for number, (id, _) in enumerate(wanted) if id == f"{runs[1].pk}:1")
    answer = await ask(either, "GET", f"{stream(thread)}?after={runs[1].pk}:1", api.key)
    assert await told(answer, 2) == wanted[place + 1 :]
    listed = await sync_to_async(api.get)(f"/api/threads/{thread.pk}/messages")
    assert listed["cursor"]["run"] == str(runs[-1].pk)


async def test_it_follows_the_runs_to_come(
    application: Application, api: Api, helper: Agent, talk: Thread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that waits for another: at once, for the thread has a bell."""
    last = (await log(talk))[-1][0]
    answer = await ask(application, "GET", f"{stream(talk)}?after={last}", api.key)
    channel = bells.thread_channel(talk.pk)
    await sync_to_async(eventually)(lambda: channel in bells.ear()._events)
    monkeypatch.setattr(broadcast, "LOOK_SECONDS", FAR)
    await asyncio.sleep(1.1)  # the look that was begun before
    start = sync_to_async(helper.start)
    first, second = await start("four", thread=talk), await start("five", thread=talk)
    following = each(answer)
    assert await asyncio.wait_for(anext(following), 10) == (f"{first.pk}:1", "message.completed")
    bells._unheard.clear()
    await cancel(first)
    seen = [await asyncio.wait_for(anext(following), 10) for _ in range(3)]
    assert seen[-1] == (f"{second.pk}:1", "run.held")
    await answer.leave()
    assert not broadcast.here()._thread_bells


@pytest.mark.parametrize(
    ("query", "header"),
    [("?after=x", ""), ("?after=RUN", ""), ("?after=RUN:-1", ""), ("?after=RUN:9999", ""), ("?after=NOTHING:1", ""),
     ("?after=OTHER:1", ""), ("?starting_after=1", ""), ("", "1"), ("", "RUN:x"), ("", "OTHER:1")],
)  # fmt: skip
async def test_a_cursor_that_is_none_is_refused(
    application: Application, api: Api, helper: Agent, query: str, header: str
) -> None:
    mine, other = (
        await sync_to_async(helper.start)("x", owner=api.user),
        await sync_to_async(helper.start)("y", owner=api.user),
    )

    def named(text: str) -> str:
        return text.replace("RUN", str(mine.pk)).replace("OTHER", str(other.pk)).replace("NOTHING", str(uuid4()))

    headers = {"last-event-id": named(header)} if header else {}
    thread = await Thread.objects.aget(pk=mine.thread_id)
    answer = await ask(application, "GET", stream(thread) + named(query), api.key, **headers)
    assert answer.status == 400
    await answer.whole()


class Hides(Policy):
    """Shows every thread and no run whose metadata say that it is hidden."""

    def visible(self, queryset: QuerySet[Any], user: Any) -> QuerySet[Any]:
        seen = super().visible(queryset, user)
        return seen.exclude(metadata__has_key="hidden") if queryset.model is Run else seen


async def test_a_run_that_is_not_theirs_to_see_is_passed_over(
    either: Application, api: Api, talk: Thread, settings: Any
) -> None:
    settings.LONGHAUL = {"ACCESS": f"{__name__}.Hides"}
    second = (await log(talk))[9][0].partition(":")[0]
    await Run.objects.filter(pk=second).aupdate(metadata={"hidden": True})
    expected = [each for each in await log(talk) if not each[0].startswith(second)]
    assert await told(await ask(either, "GET", stream(talk), api.key), 2) == expected


async def test_the_cursor_of_the_messages_is_one_of_the_stream_also_behind_a_run_that_is_not_theirs(
    application: Application, api: Api, helper: Agent, talk: Thread, settings: Any
) -> None:
    settings.LONGHAUL = {"ACCESS": f"{__name__}.Hides"}
    seen = (await log(talk))[-1][0]
    hidden = await sync_to_async(helper.start)("four", thread=talk)
    await Run.objects.filter(pk=hidden.pk).aupdate(metadata={"hidden": True})
    cursor = (await sync_to_async(api.get)(f"/api/threads/{talk.pk}/messages"))["cursor"]
    assert f"{cursor['run']}:{cursor['seq']}" == seen
    answer = await ask(application, "GET", f"{stream(talk)}?after={cursor['run']}:{cursor['seq']}", api.key)
    assert answer.status == 200
    await cancel(hidden)
    await answer.leave()


async def test_it_ends_with_its_thread(
    either: Application, api: Api, talk: Thread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "LOOK_SECONDS", 0.05)
    last = (await log(talk))[-1][0]
    answer = await ask(either, "GET", f"{stream(talk)}?after={last}", api.key)
    await sync_to_async(talk.delete)()
    assert [frame async for frame in each(answer)] == []
    assert answer.ended


async def test_a_thread_without_a_run_waits_for_its_first(either: Application, api: Api, helper: Agent) -> None:
    thread = await Thread.objects.acreate(owner=api.user)
    answer = await ask(either, "GET", stream(thread), api.key)
    run = await sync_to_async(helper.start)("one", thread=thread)
    await cancel(run)
    assert await told(answer, 1) == await log(thread)


async def test_a_round_that_is_full_with_a_runs_last_event_reads_no_more_of_it(
    application: Application, api: Api, helper: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its only reader has gone on, and no other stream of the process notices."""
    thread = await sync_to_async(Thread.objects.create)(owner=api.user)
    first = await sync_to_async(helper.start)("one", thread=thread)
    answer = await ask(application, "GET", stream(thread), api.key)
    following = each(answer)
    now = broadcast.here()
    async with asyncio.timeout(20):
        while first.pk not in now.tails or not now.tails[first.pk].joined:
            await asyncio.sleep(0.01)  # between looks at a condition
    work = now._work
    one_at_once = log_of_streams._LIVE.replace(f"LIMIT {log_of_streams.MOST_A_TAIL}", "LIMIT 1")
    monkeypatch.setattr(log_of_streams, "_LIVE", one_at_once)
    monkeypatch.setattr(broadcast, "MOST_A_TAIL", 1)
    await cancel(first)
    while (await anext(following))[1] != "run.cancelled":
        pass
    second = await sync_to_async(helper.start)("two", thread=thread)
    assert (await asyncio.wait_for(anext(following), 20))[0] == f"{second.pk}:1"
    assert now._work is work


async def test_two_threads_of_one_reader_go_on_at_once_together(
    application: Application, api: Api, helper: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy is asked about the run of one while it is asked about that of the other."""
    make, start = sync_to_async(Thread.objects.create), sync_to_async(helper.start)
    talks = [await make(owner=api.user) for _ in range(2)]
    answers = [await ask(application, "GET", stream(talk), api.key) for talk in talks]
    channels = {bells.thread_channel(talk.pk) for talk in talks}
    await sync_to_async(eventually)(lambda: channels <= set(bells.ear()._events))
    monkeypatch.setattr(broadcast, "LOOK_SECONDS", FAR)
    await asyncio.sleep(1.1)  # the look that was begun before
    asked, free = threading.Event(), threading.Event()
    real = Visitor.sees

    def sees(visitor: Visitor, rows: Any) -> set[Any]:
        asked.set()
        assert free.wait(20)
        return real(visitor, rows)

    monkeypatch.setattr(Visitor, "sees", sees)
    runs = [await start("one", thread=talks[0])]
    await asyncio.to_thread(asked.wait, 20)
    runs.append(await start("two", thread=talks[1]))
    async with asyncio.timeout(20):
        while broadcast.here()._go_now.is_set() or not all(each.led for each in broadcast.here().readers):
            await asyncio.sleep(0.01)  # between looks at a condition
    free.set()
    for run, answer in zip(runs, answers, strict=True):
        assert (await asyncio.wait_for(anext(each(answer)), 10))[0] == f"{run.pk}:1"
    for run in runs:
        await cancel(run)
