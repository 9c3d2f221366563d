"""Both clients at a real server: each call, and what becomes of a stream that is cut, refused, or stands still."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from uuid import uuid4

import httpx2
import pytest
from asgiref.sync import sync_to_async

from longhaul_client import (
    ApiError,
    AsyncLonghaul,
    Backoff,
    BadRequest,
    Conflict,
    ConnectionLost,
    Longhaul,
    NotFound,
    ServerError,
    StreamBroken,
    TooManyRequests,
    Transcript,
    Unauthorized,
    fold,
)
from runs.agents import Agent
from runs.models import Event, Run
from runs.pytest_longhaul import ScriptedModel, run_to_end
from runs.run_log import DatabaseRunLog
from tests.http.conftest import Api
from tests.http.web import Web, free_port
from tests.streams.cutting import CuttingProxy
from tests.workers.conftest import eventually
from threads.models import ApiKey, IdempotencyKey

pytestmark = pytest.mark.django_db(transaction=True)

QUICK = Backoff(first=0.02, most=0.1)


@pytest.fixture
def client(web: Web, api: Api) -> Iterator[Longhaul]:
    with Longhaul(web.url, api_key=api.key, backoff=QUICK) as made:
        yield made


@pytest.mark.slow
def test_a_run_is_started_looked_at_waited_for_and_cancelled(client: Longhaul) -> None:
    assert client.alive()["status"] == "alive"
    thread = client.threads.create(agent="worker_test", title="Orders", metadata={"a": 1})
    assert client.threads.get(thread).title == "Orders"
    assert client.threads.update(thread, title="More", metadata=None).title == "More"
    [saved] = client.threads.save(thread, {"role": "user", "content": "Where is it?", "client_id": "c-1"})
    assert (saved.text, saved.client_id, saved.status) == ("Where is it?", "c-1", "completed")
    run = client.runs.start(thread=thread, message=saved, metadata={"page": "x"}, limits={"max_steps": 3})
    assert (run.status, run.thread, run.agent, run.limits and run.limits["max_steps"]) == (
        "queued",
        thread.id,
        "worker_test",
        3,
    )
    assert run.created_at.tzinfo is not None
    assert not run.finished
    assert client.runs.wait(run, timeout=0.05).status == "queued"
    assert [
        each.id for each in client.runs.list(active=True, agent=["worker_test", "other"], metadata={"page": "x"})
    ] == [run.id]
    assert len(client.runs.list(status="completed")) == len(client.runs.list(agent="other")) == 0
    assert [each.type for each in client.runs.events(run)] == ["message.completed", "run.queued"][
        : client.runs.get(run).last_seq
    ]
    assert list(client.tool_calls.list(run=run)) == []
    assert client.runs.cancel(run, reason="enough").status == "cancelled"
    assert client.runs.cancel(run).status == "cancelled"
    assert client.runs.wait(run).finished
    again = client.runs.resume(run, "And now?")
    assert (again.origin, again.parent, again.status) == ("resume", run.id, "queued")
    client.runs.cancel(again.id)
    events = client.runs.events(again)
    assert events.finished
    assert events.last_seq == len(events)
    assert [each.text for each in client.runs.messages(again)] == ["And now?"]
    assert [each.id for each in client.threads.list()] == [thread.id]
    with pytest.raises(Conflict):
        client.runs.start(thread=client.threads.create(agent="worker_test"))
    with pytest.raises(BadRequest) as wrong:
        client.runs.start("worker_test", "hi", limits={"max_steps": 0})
    assert wrong.value.attr == "limits.max_steps"
    client.threads.delete(thread)
    with pytest.raises(NotFound, match=f"GET /api/threads/{thread.id}"):
        client.threads.get(thread)


async def test_the_same_with_await(web: Web, api: Api) -> None:
    async with AsyncLonghaul(web.url, api_key=api.key) as client:
        thread = await client.threads.create(agent="worker_test")
        run = await client.runs.start(input="Hi", thread=thread)
        page = await client.runs.list(active=True, thread=thread)
        assert [each.id for each in page] == [run.id]
        await client.runs.cancel(run)
        assert (await client.runs.wait(run)).status == "cancelled"
        told = [event async for event in client.stream(run)]
        assert [each.seq for each in told] == list(range(1, len(told) + 1))
        assert told[-1].terminal
        assert [event async for event in client.stream(run, after=told[-1])] == []
        with pytest.raises(BadRequest, match="The run's last event so far is"):
            _ = [event async for event in client.stream(run, after=99)]


@pytest.mark.slow
def test_pages_are_turned(client: Longhaul) -> None:
    made = [client.threads.create(title=str(number)).id for number in range(5)]
    found, cursor = [], None
    while True:
        page = client.threads.list(order="asc", limit=2, cursor=cursor)
        found += [each.id for each in page]
        if (cursor := page.next) is None:
            break
    assert found == made


def test_a_stream_that_ended_is_told_whole_from_any_cursor(client: Longhaul, ended: Run) -> None:
    stream = client.stream(str(ended.pk))
    told = list(stream)
    assert [each.data for each in told] == [each.as_dict() for each in ended.events()]
    assert [each.seq for each in told] == [each.seq for each in client.runs.events(str(ended.pk))]
    assert stream.cursor == str(len(told))
    assert stream.connections == 1
    for place in range(len(told)):
        assert list(client.stream(str(ended.pk), after=told[place])) == told[place + 1 :]
    assert list(stream) == []
    assert "".join(client.stream(str(ended.pk)).text()) == "It is on its way."
    assert stream.finish().output == "It is on its way."
    made = fold(told)
    assert [(each.id, each.status, each.content) for each in made.messages] == [
        (each.id, each.status, each.content) for each in client.threads.messages(str(ended.thread_id))
    ]
    assert (made.status, made.output, made.text) == ("completed", "It is on its way.", "It is on its way.")


@pytest.mark.slow
def test_a_stream_that_was_left_goes_on_where_it_was(client: Longhaul, ended: Run) -> None:
    stream = client.stream(str(ended.pk))
    first = next(iter(stream))
    assert stream.cursor == "1"
    rest = list(stream)
    assert [first, *rest] == list(client.stream(str(ended.pk)))
    assert stream._response is None
    with client.stream(str(ended.pk)) as other:
        assert [len(batch) for batch in other.batches()] == [len(rest) + 1]


async def test_a_loop_that_was_left_closes_nothing_of_the_next_one(web: Web, api: Api, live: Run) -> None:
    """asyncio ends a generator that was left when it comes to it: then another may read already."""
    left = asyncio.Event()

    async def cancel() -> None:
        await left.wait()
        for _ in range(20):
            await asyncio.sleep(0)  # what asyncio has to do about the first loop, it does in these
        await sync_to_async(live.cancel)()

    async with AsyncLonghaul(web.url, api_key=api.key, backoff=QUICK) as client:
        cancelling = asyncio.create_task(cancel())
        stream = client.stream(str(live.pk))
        told = []
        async for event in stream:
            told.append(event)
            left.set()
            break
        told += [event async for event in stream]
        await cancelling
        assert [each.seq for each in told] == list(range(1, len(told) + 1))
        assert told[-1].type == "run.cancelled"
        assert stream.connections == 1


@pytest.mark.slow
async def test_a_task_that_is_cancelled_closes_its_connection_and_another_goes_on(
    web: Web, api: Api, live: Run
) -> None:
    async with AsyncLonghaul(web.url, api_key=api.key, backoff=QUICK) as client:
        stream = client.stream(str(live.pk))

        async def read() -> list[tuple[int | None, str]]:
            return [(event.seq, event.type) async for event in stream]

        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(read())
            while not stream.cursor:
                await asyncio.sleep(0.01)  # between looks at a condition
            reading.cancel()
        assert reading.cancelled()
        assert stream._response is None
        cursor = int(stream.cursor)
        await sync_to_async(live.cancel)()
        told = await read()
        assert [seq for seq, _ in told] == list(range(cursor + 1, cursor + 1 + len(told)))
        assert told[-1][1] == "run.cancelled"


@pytest.mark.slow
def test_a_conversation_is_the_thread_as_it_is_and_as_it_becomes(
    client: Longhaul, helper: Agent, ended: Run, scripted_model: ScriptedModel
) -> None:
    talk = iter(client.conversation(str(ended.thread_id)))
    state = next(talk)
    assert (state.status, state.text, len(state.messages)) == ("completed", "It is on its way.", 2)
    run = helper.start("And now?", thread=ended.thread)
    while next(talk).run != str(run.pk):
        pass
    assert state.is_running
    scripted_model.say("It is here.")
    run_to_end(run)
    while next(talk).is_running:
        pass
    assert (state.status, state.text, len(state.messages)) == ("completed", "It is here.", 4)
    talk.close()  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unanswered", "reset", "close", "refuse", "hang"])
def test_a_run_that_is_started_and_streamed_over_cuts_is_one(web: Web, api: Api, helper: Agent, kind: str) -> None:
    """Also when the first answers are lost before their headers. Each connection is cut until the proxy rests."""
    with ExitStack() as stack:
        proxy = stack.enter_context(CuttingProxy(web.port, seed=3, mean_bytes=60, kinds=[kind]))
        with Longhaul(proxy.url, api_key=api.key, backoff=QUICK, stall=0.6, timeout=5.0) as client:
            stream = client.runs.start_and_stream("worker_test", "Where is it?", client_id="mine")

            def rest() -> None:
                eventually(lambda: sum(proxy.cuts.values()) >= 8, why="it was cut")
                proxy.pause()

            resting = threading.Thread(target=rest)
            resting.start()
            run = stream.run_id()
            resting.join()
            started = Run.objects.get(pk=run)
            assert DatabaseRunLog().record(started.pk, "data", {"data": "größer"})
            started.cancel()
            told = list(stream)
            assert [each.data for each in told] == [each.as_dict() for each in started.events()]
            assert told[0]["client_id"] == "mine"
    assert Run.objects.count() == IdempotencyKey.objects.count() == 1


@pytest.mark.slow
async def test_the_same_with_await_over_cuts(web: Web, api: Api) -> None:
    with CuttingProxy(web.port, seed=4, mean_bytes=60, kinds=["unanswered", "reset"]) as proxy:
        async with AsyncLonghaul(proxy.url, api_key=api.key, backoff=QUICK) as client:
            stream = client.runs.start_and_stream("worker_test", "Where is it?")
            id = asyncio.create_task(stream.run_id())
            await sync_to_async(lambda: eventually(lambda: sum(proxy.cuts.values()) >= 8, why="it was cut"))()
            proxy.pause()
            started = await Run.objects.aget(pk=await id)
            await sync_to_async(started.cancel)()
            told = [each async for each in stream]
            assert [each.data for each in told] == await sync_to_async(
                lambda: [each.as_dict() for each in started.events()]
            )()
    assert await Run.objects.acount() == 1


@pytest.mark.slow
def test_a_call_over_cuts_happens_once(web: Web, api: Api) -> None:
    with CuttingProxy(web.port, seed=5, mean_bytes=1500, kinds=["unanswered", "reset", "refuse"]) as proxy:
        with Longhaul(proxy.url, api_key=api.key, backoff=QUICK, retries=50) as client:
            threads = [client.threads.create(title=str(number)) for number in range(5)]
            runs = [client.runs.start("worker_test", "Hi", thread=each) for each in threads]
            for each in runs:
                assert client.runs.cancel(each).status == "cancelled"
            client.threads.delete(threads[0])
            found = [each.id for each in client.threads.list(order="asc")]
            assert found == [each.id for each in threads[1:]]
        assert sum(proxy.cuts.values()) > 10
    assert Run.objects.count() == 4


@pytest.mark.slow
def test_a_stream_that_stands_still_is_lost(web: Web, api: Api, live: Run) -> None:
    with ExitStack() as stack:
        proxy = stack.enter_context(CuttingProxy(web.port, kinds=[]))
        with Longhaul(proxy.url, api_key=api.key, backoff=QUICK, stall=0.5) as client:
            told = iter(stream := client.stream(str(live.pk)))
            first = next(told)
            proxy.stand_still()
            live.cancel()
            going_on = threading.Timer(
                5.0, proxy.back
            )  # ten times the stall: the first connection is given up, and others
            going_on.start()
            assert [first, *told][-1].type == "run.cancelled"
            assert stream.connections >= 2
            going_on.join()


@pytest.mark.slow
def test_a_revoked_key_a_deleted_run_and_a_server_that_is_not_there_end_it(web: Web, api: Api, live: Run) -> None:
    with ExitStack() as stack:
        proxy = stack.enter_context(CuttingProxy(web.port, kinds=[]))
        with Longhaul(proxy.url, api_key=api.key, backoff=QUICK, give_up_after=0.5) as client:
            told = iter(client.stream(str(live.pk)))
            next(told)
            live.cancel()
            ApiKey.objects.all().delete()
            proxy.cut_all()
            with pytest.raises(Unauthorized):
                list(client.stream(str(live.pk)))
            with pytest.raises(Unauthorized):
                client.runs.get(str(live.pk))
            proxy.down()
            with pytest.raises(ConnectionLost, match=r"could not be had for \d+ s: ConnectError"):
                list(client.stream(str(live.pk), after=1))
            with pytest.raises(ConnectionLost, match="was not answered"):
                client.runs.get(str(live.pk))
    with Longhaul(web.url, api_key="lh_wrong") as client, pytest.raises(Unauthorized):
        list(client.stream(str(uuid4())))


@pytest.mark.slow
def test_what_was_removed_is_told_and_a_conversation_is_loaded_anew(client: Longhaul, ended: Run) -> None:
    Event.objects.filter(run=ended, seq__lte=3).delete()
    Run.objects.filter(pk=ended.pk).update(events_removed_through=3)
    told = list(client.stream(str(ended.pk)))
    assert (told[0].type, told[0].seq, told[0]["from"], told[0]["to"], told[0].id) == ("resume_gap", None, 1, 3, "3")
    assert [each.seq for each in told[1:]] == list(range(4, ended.last_seq + 1))
    made = Transcript().take_all(told)
    assert made.gap
    stream = client.threads.stream(str(ended.thread_id))
    found = []
    for event in stream:
        found.append(event.type)
        if event.terminal:
            break
    assert found == [each.type for each in told]


def test_no_key_is_said_when_it_fails(web: Web, api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = api.key
    nobody = f"http://127.0.0.1:{free_port()}"
    with Longhaul(nobody, api_key=key, backoff=QUICK, retries=1, give_up_after=0.1) as client:
        with pytest.raises(ConnectionLost) as one:
            client.alive()
        with pytest.raises(ConnectionLost) as other:
            client.runs.get("x")
        with pytest.raises(ConnectionLost) as third:
            list(client.stream("x"))
    with Longhaul(web.url, api_key=key) as client, pytest.raises(NotFound) as fourth:
        list(client.stream("x"))
    for caught in (one, other, third, fourth):
        assert key not in str(caught.value)
        frames = [each.frame for each in caught.traceback[1:]]  # without this test's own
        assert len(frames) > 2
        assert key not in "".join(f"{frame.f_locals}" for frame in frames)
    assert key not in caplog.text
    assert "The stream of run x" in caplog.text


@pytest.mark.slow
def test_a_client_of_ones_own_signs_in_as_it_does(web: Web, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGHAUL_URL", web.url)
    with httpx2.Client(headers={"Authorization": f"Bearer {api.key}"}) as http:
        with Longhaul(http=http) as client:
            assert list(client.runs.list()) == []
        assert not http.is_closed


@pytest.mark.slow
def test_a_server_that_is_no_longhaul_is_said(tmp_path: object) -> None:
    def page(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/api/threads":
            return httpx2.Response(503, headers={"Retry-After": "0"})
        return httpx2.Response(200, html="<p>Welcome</p>")

    with httpx2.Client(transport=httpx2.MockTransport(page)) as http:
        client = Longhaul("http://other", http=http, backoff=QUICK, retries=2)
        with pytest.raises(StreamBroken, match="no event stream"):
            list(client.stream("x"))
        with pytest.raises(Exception, match="200 not_an_answer"):
            client.runs.get("x")
        with pytest.raises(ServerError, match="503"):
            client.threads.list()


@pytest.mark.slow
def test_a_server_that_leads_elsewhere_or_asks_for_hours_is_said() -> None:
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        if request.url.path == "/api/threads":
            return httpx2.Response(429, headers={"Retry-After": "7200"})
        return httpx2.Response(302, headers={"Location": "http://elsewhere/"})

    with httpx2.Client(transport=httpx2.MockTransport(answer)) as http:
        client = Longhaul("http://other", api_key="lh_x", http=http, backoff=QUICK)
        for lost in (lambda: client.runs.get("x"), lambda: list(client.stream("x"))):
            with pytest.raises(ApiError, match="302"):
                lost()
        with pytest.raises(TooManyRequests):
            client.threads.list()
    assert asked == [
        "http://other/api/runs/x",
        "http://other/api/runs/x/stream?starting_after=0",
        "http://other/api/threads",
    ]
