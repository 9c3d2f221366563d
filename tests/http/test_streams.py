"""The event stream of a run: whole from any point, live to its end, and nobody waits for anybody."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any
from uuid import UUID, uuid4

import httpx2
import orjson
import pytest
import redis
from asgiref.sync import sync_to_async
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.db import connection, connections
from django.http import HttpRequest, HttpResponseBase
from django.test import AsyncClient

from runs import bells, events
from runs.agents import Agent
from runs.http import streams
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, run_to_end
from tests.http import frames
from tests.http.conftest import Api
from tests.http.frames import Frame
from tests.http.web import Web
from tests.workers.conftest import eventually
from threads import clock
from threads.models import ApiKey

pytestmark = pytest.mark.django_db(transaction=True)

FAR = 60.0  # seconds: a reader that misses what should wake it looks no sooner


async def opened(api: Api, address: str, method: str = "GET", body: Any = None, **headers: str) -> Any:
    sent = b"" if body is None else orjson.dumps(body)
    return await AsyncClient().generic(
        method, address, sent, "application/json", headers={"Authorization": f"Bearer {api.key}", **headers}
    )


async def streamed(api: Api, address: str, method: str = "GET", body: Any = None, **headers: str) -> list[Frame]:
    response = await opened(api, address, method, body, **headers)
    assert response.status_code == 200, response.content
    return await frames.events(response.streaming_content)


def stream(run: Run) -> str:
    return f"/api/runs/{run.pk}/stream"


cancel = sync_to_async(Run.cancel)


# --- what is in it --------------------------------------------------------------------------------------------------


async def test_a_finished_run_is_told_whole_and_closed(api: Api, ended: Run) -> None:
    response = await opened(api, stream(ended))
    assert response.status_code == 200
    assert response["Content-Type"] == "text/event-stream"
    assert response["X-Run-Id"] == str(ended.pk)
    assert response["Location"] == f"/api/runs/{ended.pk}"
    assert response["X-Accel-Buffering"] == "no"
    assert "no-transform" in response["Cache-Control"]
    assert "Content-Length" not in response
    told = await frames.events(response.streaming_content)
    log = await sync_to_async(api.get)(f"/api/runs/{ended.pk}/events")
    assert [each.data for each in told] == log["results"]
    for each in told:
        assert (each.id, each.event) == (each.data["seq"], each.data["type"])
        assert each.data["run"] == str(ended.pk)
    assert [each.id for each in told] == list(range(1, log["last_seq"] + 1))
    assert told[-1].event == "run.completed"
    assert [each.event for each in told].count("text.delta") >= 1


@pytest.mark.parametrize("batch", [1, 2, 1000])
async def test_it_goes_on_after_any_seq(api: Api, ended: Run, batch: int) -> None:
    whole = await streamed(api, stream(ended))
    for after in range(len(whole) + 1):
        told = await streamed(api, f"{stream(ended)}?starting_after={after}&batch_size={batch}")
        assert told == whole[after:]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_the_query_counts_before_the_body_and_the_header_before_both(api: Api, ended: Run, method: str) -> None:
    async def first(query: str, body: Any, **headers: str) -> int | None:
        return (await streamed(api, stream(ended) + query, method, body, **headers))[0].id

    assert await first("", None) == 1
    assert await first("", {"starting_after": 1, "batch_size": 1}) == 2
    assert await first("?starting_after=2", {"starting_after": 1}) == 3
    assert await first("?batch_size=2", {"starting_after": 1}) == 2
    assert await first("?starting_after=0", {"starting_after": 1}) == 1
    assert await first("?starting_after=2", {"starting_after": 1}, **{"Last-Event-ID": "3"}) == 4
    assert await first("?starting_after=2", {"starting_after": 1}, **{"Last-Event-ID": "0"}) == 1
    assert await first("?starting_after=2", None, **{"Last-Event-ID": ""}) == 3


@pytest.mark.parametrize(
    ("query", "body", "header", "attr"),
    [
        ("?starting_after=99", None, "", "starting_after"),
        ("?starting_after=-1", None, "", "starting_after"),
        ("?starting_after=x", None, "", "starting_after"),
        ("?starting_after=1.5", None, "", "starting_after"),
        ("?starting_after=99999999999999999999", None, "", "starting_after"),
        ("?starting_after=", None, "", "starting_after"),
        ("?batch_size=0", None, "", "batch_size"),
        ("?batch_size=1001", None, "", "batch_size"),
        ("?include_pings=perhaps", None, "", "include_pings"),
        ("?after=1", None, "", "after"),
        ("", {"starting_after": 99}, "", "starting_after"),
        ("", {"starting_after": "1"}, "", "starting_after"),
        ("", {"starting_after": -1}, "", "starting_after"),
        ("", {"starting_after": None}, "", "starting_after"),
        ("", {"unknown": 1}, "", "unknown"),
        ("", None, "99", "Last-Event-ID"),
        ("", None, "-1", "Last-Event-ID"),
        ("", None, "x", "Last-Event-ID"),
        ("", None, "1.0", "Last-Event-ID"),
        ("", None, "01990000-0000-7000-8000-000000000000:1", "Last-Event-ID"),  # of a thread's stream
        ("", None, "9" * 40, "Last-Event-ID"),
    ],
)
async def test_a_cursor_that_is_none_is_refused(
    api: Api, ended: Run, query: str, body: Any, header: str, attr: str
) -> None:
    headers = {"Last-Event-ID": header} if header else {}
    for method in ("GET", "POST"):
        response = await opened(api, stream(ended) + query, method, body, **headers)
        assert response.status_code == 400, method
        assert response.json()["errors"][0]["attr"] == attr


async def test_head_tells_the_headers_and_does_not_wait(api: Api, live: Run) -> None:
    response = await opened(api, stream(live), "HEAD")
    assert (response.status_code, response["Content-Type"], response.content) == (200, "text/event-stream", b"")


# --- live -----------------------------------------------------------------------------------------------------------


async def begun(api: Api, run: Run, query: str = "") -> AsyncIterator[Frame]:
    """Open the stream and read what is there already."""
    response = await opened(api, stream(run) + query)
    told = frames.frames(response.streaming_content)
    await past(told)
    return told


async def past(told: AsyncIterator[Frame]) -> list[int | None]:
    """Read what was there before: the comment that opens the stream, and a queued run's first events."""
    assert (await anext(told)).comment is not None
    seen = []
    async for each in told:
        seen.append(each.id)
        if each.event == "run.queued":
            break
    assert seen == list(range(1, len(seen) + 1))
    return seen


async def test_history_then_live_then_closed(api: Api, live: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", FAR)  # so it is the bell that wakes it
    told = await begun(api, live)
    await cancel(live)
    rest = [each async for each in told]
    assert [each.id for each in rest] == list(range(3, len(rest) + 3))
    assert rest[-1].event == "run.cancelled"


async def test_it_goes_on_without_the_bell(api: Api, live: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(bells, "ring", lambda channels: None)
    monkeypatch.setattr(bells, "_client", lambda: redis.Redis.from_url("redis://127.0.0.1:1"))
    bells.ear.cache_clear()
    try:
        told = await begun(api, live)
        await cancel(live)
        assert [each async for each in told][-1].event == "run.cancelled"
    finally:
        bells.ear.cache_clear()


async def test_a_redis_that_hangs_holds_nobody_up(api: Api, live: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many readers would wait for a time-out in turn, and only then read its first row."""
    tried: list[str] = []  # in which threads

    class Hangs:
        def subscribe(self, *_: str) -> None:
            tried.append(threading.current_thread().name)
            time.sleep(0.5)
            raise redis.TimeoutError("no answer")

        def unsubscribe(self, *_: str) -> None:
            raise redis.TimeoutError("no answer")

        def get_message(self, timeout: float) -> None:
            time.sleep(0.5)
            raise redis.TimeoutError("no answer")

    monkeypatch.setattr(bells, "_pubsub", lambda client: Hangs())
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.05)
    ear = bells.Ear()
    monkeypatch.setattr(bells, "ear", lambda: ear)

    async def listened(number: int) -> None:
        async with ear.alisten(f"longhaul.run.{number}"):
            pass

    await asyncio.gather(*(listened(number) for number in range(40)))
    # One after another they would all try, for 20 s. Nor are the loop's threads kept busy by them for so long.
    await sync_to_async(eventually)(lambda: not ear._events, why="all have left")
    assert 0 < len([name for name in tried if name != "longhaul-ear"]) < 20  # of 40
    told = await begun(api, live)
    await cancel(live)
    assert [each async for each in told][-1].event == "run.cancelled"


@pytest.mark.parametrize("asked", [True, False])
async def test_pings(api: Api, live: Run, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PING_SECONDS", 0.0)
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.02)
    told = await begun(api, live, f"?include_pings={str(asked).lower()}")
    ping = Frame(event="ping", data={}) if asked else Frame(comment="ping")
    assert [await anext(told) for _ in range(3)] == [ping] * 3
    await cancel(live)
    assert [each async for each in told if each != ping][-1].event == "run.cancelled"


async def test_no_ping_comes_before_its_time(api: Api, live: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PING_SECONDS", FAR)
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.01)
    looks = 0
    read = events.read

    def counted(*arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        return read(*arguments)

    monkeypatch.setattr(events, "read", counted)
    told = await begun(api, live)
    after: asyncio.Task[Frame] = asyncio.ensure_future(anext(told))
    while looks < 5:
        await asyncio.sleep(0.01)  # between looks at a condition
    await cancel(live)
    assert (await after).event == "run.cancelled"


async def test_a_run_that_is_deleted_ends_its_stream(api: Api, live: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.05)
    told = await begun(api, live)
    await sync_to_async(Run.objects.filter(pk=live.pk).delete)()
    assert [each async for each in told] == []


async def test_who_leaves_cancels_nothing_and_frees_what_they_held(api: Api, live: Run) -> None:
    response = await opened(api, stream(live))
    channel = bells.run_channel(live.pk)
    async with aclosing(frames.frames(response.streaming_content)) as told:  # type: ignore[type-var]
        await anext(told)
        await anext(told)
        assert channel in bells.ear()._events
    await gone(response)
    await sync_to_async(eventually)(lambda: channel not in bells.ear()._events)
    await live.arefresh_from_db()
    assert live.status == "queued"


async def gone(response: Any) -> None:
    """What Django's handler does when a client has gone: the task that reads the stream is cancelled."""
    reading = asyncio.create_task(frames.events(response.streaming_content))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_who_leaves_while_it_subscribes_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ear, entered, go_on = bells.Ear(), threading.Event(), threading.Event()
    add = ear.add

    def slow(channel: str, wake: Any) -> None:
        entered.set()
        assert go_on.wait(10)
        add(channel, wake)

    monkeypatch.setattr(ear, "add", slow)
    monkeypatch.setattr(ear, "_subscribe", lambda channel: None)

    async def listening() -> None:
        async with ear.alisten("longhaul.run.x"):
            pytest.fail("it had left before")

    task = asyncio.create_task(listening())
    assert await asyncio.to_thread(entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    removed = asyncio.Event()
    remove, loop = ear.remove, asyncio.get_running_loop()

    def told(channel: str, wake: Any) -> None:
        remove(channel, wake)
        loop.call_soon_threadsafe(removed.set)

    monkeypatch.setattr(ear, "remove", told)
    await asyncio.wait_for(removed.wait(), 10)
    assert ear._events == {}


async def _revoked(api: Api, run: Run) -> None:
    await ApiKey.objects.filter(owner=api.user).aupdate(revoked_at=clock.Now())


async def _expired(api: Api, run: Run) -> None:
    await ApiKey.objects.filter(owner=api.user).aupdate(expires_at=clock.Now())


async def _deactivated(api: Api, run: Run) -> None:
    await User.objects.filter(pk=api.user.pk).aupdate(is_active=False)


async def _no_longer_permitted(api: Api, run: Run) -> None:
    await User.objects.filter(pk=api.user.pk).aupdate(is_superuser=False)


async def _taken_over(api: Api, run: Run) -> None:
    await User.objects.filter(pk=api.user.pk).aupdate(is_superuser=False, is_staff=False)


@pytest.mark.parametrize("lose", [_revoked, _expired, _deactivated, _no_longer_permitted, _taken_over])
async def test_a_stream_ends_when_it_may_no_longer_be_seen(
    api_of: Any, live: Run, lose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.02)
    checks: list[bool] = []
    still_sees = streams.still_sees

    def checked(*arguments: Any) -> bool:
        checks.append(still_sees(*arguments))
        return checks[-1]

    monkeypatch.setattr(streams, "still_sees", checked)
    staff = await sync_to_async(api_of)("staff", is_staff=True, is_superuser=True)
    told = await begun(staff, live)
    reading = asyncio.ensure_future(frames_left(told))
    while len(checks) < 3:
        await asyncio.sleep(0.01)  # between looks at a condition
    assert checks == [True] * len(checks)
    assert not reading.done()
    await lose(staff, live)
    assert await reading == []
    await live.arefresh_from_db()
    assert live.status == "queued"


async def frames_left(told: AsyncIterator[Frame]) -> list[Frame]:
    return [each async for each in told]


@pytest.mark.parametrize("how", ["logout", "password"])
async def test_a_stream_ends_with_its_session(live: Run, api: Api, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(streams, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.02)
    client = AsyncClient()
    await client.aforce_login(api.user)
    response = await client.get(f"/api/runs/{live.pk}/stream")
    told = frames.frames(response.streaming_content)  # type: ignore[attr-defined]
    await past(told)
    reading = asyncio.ensure_future(frames_left(told))
    await asyncio.sleep(0.2)  # some looks: it goes on while its session does
    assert not reading.done()
    if how == "logout":
        await client.alogout()
    else:
        api.user.set_password("another one")
        await api.user.asave()
    assert await asyncio.wait_for(reading, timeout=10) == []
    await live.arefresh_from_db()
    assert live.status == "queued"


# --- a start that streams -------------------------------------------------------------------------------------------


async def test_a_start_that_streams(api: Api, helper: Agent) -> None:
    body = {"agent": "helper", "input": "Where is it?", "stream": True}
    key = {"Idempotency-Key": "one"}
    response = await opened(api, "/api/runs", "POST", body, **key)
    assert (response.status_code, response["Content-Type"]) == (200, "text/event-stream")
    run = await Run.objects.aget(pk=UUID(response["X-Run-Id"]))
    assert response["Location"] == f"/api/runs/{run.pk}"
    await told_until_cancelled(response, run)
    # Sent again: the same run, from its first event on.
    again = await opened(api, "/api/runs", "POST", body, **key)
    assert again["X-Run-Id"] == str(run.pk)
    told = await frames.events(again.streaming_content)
    assert [each.id for each in told] == list(range(1, len(told) + 1))
    assert told[-1].event == "run.cancelled"
    other = await opened(api, "/api/runs", "POST", {**body, "input": "Something else"}, **key)
    assert other.status_code == 409
    assert await Run.objects.acount() == 1
    more = await opened(api, f"/api/threads/{run.thread_id}/runs", "POST", {**body, "agent": None})
    assert (more.status_code, more["X-Run-Id"] == str(run.pk)) == (200, False)


async def told_until_cancelled(response: Any, run: Run) -> None:
    told = frames.frames(response.streaming_content)
    await past(told)
    await cancel(run)
    assert [each async for each in told][-1].event == "run.cancelled"


def test_wsgi_says_what_to_use_instead(api: Api, live: Run) -> None:
    for method in ("get", "post"):
        told = api.call(method, stream(live), status=501).json()["errors"][0]
        assert told["code"] == "needs_asgi"
        assert "/events" in told["detail"]
        assert f"/api/runs/{live.pk}/wait" in told["detail"]
    told = api.post("/api/runs", {"agent": "helper", "input": "x", "stream": True}, 501)["errors"][0]
    assert told["code"] == "needs_asgi"
    assert "leave `stream` out, and wait for the run at /api/runs/{id}/wait" in told["detail"]
    assert Run.objects.count() == 1


# --- hosts ----------------------------------------------------------------------------------------------------------


def only_sync(get_response: Callable[[HttpRequest], HttpResponseBase]) -> Callable[[HttpRequest], HttpResponseBase]:
    """A middleware of the host's that knows no coroutines: Django moves it into a thread."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        response["X-Host"] = "sync"
        return response

    return middleware


async def test_middleware_of_both_kinds_and_compression(api: Api, live: Run, settings: Any) -> None:
    settings.MIDDLEWARE = [
        "django.middleware.gzip.GZipMiddleware", f"{__name__}.only_sync", *settings.MIDDLEWARE,
        "django.middleware.http.ConditionalGetMiddleware",
    ]  # fmt: skip
    response = await opened(api, stream(live), **{"Accept-Encoding": "gzip"})
    assert response["X-Host"] == "sync"
    await told_until_cancelled(response, live)


async def test_atomic_requests(api: Api, helper: Agent, live: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)
    response = await opened(api, stream(live))
    await told_until_cancelled(response, live)
    waited = await opened(api, f"/api/runs/{live.pk}/wait")
    assert waited.json()["status"] == "cancelled"
    started = await opened(api, "/api/runs", "POST", {"agent": "helper", "input": "x", "stream": True})
    run = await Run.objects.aget(pk=UUID(started["X-Run-Id"]))
    await told_until_cancelled(started, run)
    refused = await opened(api, "/api/runs", "POST", {"agent": "helper", "input": "x", "message": str(uuid4())})
    assert refused.status_code == 400


# --- a real server --------------------------------------------------------------------------------------------------


def http(api: Api, web: Web) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        base_url=web.url,
        headers={"Authorization": f"Bearer {api.key}"},
        timeout=60,
        limits=httpx2.Limits(max_connections=400, max_keepalive_connections=400),
    )


def connections_of(web: Web) -> int:
    """How many connections the server's Django has to Postgres, whatever else there is from tests before."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", (web.application,))
        return int(cursor.fetchone()[0])


def listeners(run: Run) -> int:
    """How many processes hear the run's bell."""
    heard = redis.Redis.from_url(django_settings.REDIS_URL).pubsub_numsub(bells.run_channel(run.pk))
    return int(heard[0][1])


@pytest.mark.slow
async def test_fifty_streams_of_a_real_server_with_ten_connections(
    api: Api, helper: Agent, web: Web, scripted_model: ScriptedModel
) -> None:
    start = sync_to_async(lambda number: helper.start(f"run {number}", owner=api.user))
    runs = [await start(number) for number in range(50)]
    opened_now = 0

    async def follow(client: httpx2.AsyncClient, run: Run) -> list[Frame]:
        nonlocal opened_now
        async with client.stream("GET", stream(run)) as response:
            assert response.status_code == 200
            told: list[Frame] = []
            async for each in frames.frames(response.aiter_raw()):
                if each.comment is None:
                    opened_now += not told
                    told.append(each)
            return told

    async with http(api, web) as client:
        readers = [asyncio.create_task(follow(client, run)) for run in runs]
        while opened_now < 50:
            await asyncio.sleep(0.02)  # between looks at a condition
            assert not any(reader.done() for reader in readers), readers
        assert 0 < await sync_to_async(connections_of)(web) <= 10 + 2  # the pool's, and who else is there for a moment
        begin = time.monotonic()
        answers = await asyncio.gather(*(client.get(f"/api/runs/{run.pk}") for run in runs[:20]))
        assert {answer.status_code for answer in answers} == {200}
        assert time.monotonic() - begin < 20  # seconds: a connection that never comes costs 10 for each
        scripted_model.say(*["It is on its way."] * 25)
        for place, run in enumerate(runs):
            await (sync_to_async(run_to_end)(run) if place % 2 else cancel(run))
        told = await asyncio.gather(*readers)
    for place, each in enumerate(told):
        assert [frame.id for frame in each] == list(range(1, len(each) + 1))
        assert each[-1].event == ("run.completed" if place % 2 else "run.cancelled")


@pytest.mark.slow
async def test_clients_of_a_real_server_that_vanish(api: Api, live: Run, web: Web) -> None:
    async with http(api, web) as client:
        for _ in range(3):
            vanished = []
            for _ in range(10):
                response = await client.send(client.build_request("GET", stream(live)), stream=True)
                told = frames.frames(response.aiter_raw())
                await anext(told)
                await anext(told)
                vanished.append(response)
            assert await sync_to_async(listeners)(live) == 1
            for response in vanished:
                await response.aclose()
            await sync_to_async(eventually)(lambda: listeners(live) == 0, why="the subscription is given up")
        answer = (await client.get(f"/api/runs/{live.pk}")).json()
        assert (answer["status"], answer["last_seq"]) == ("queued", 2)
    assert "Traceback" not in web.said()


@pytest.mark.slow
async def test_a_start_on_a_real_server_streams_from_its_first_event(api: Api, web: Web) -> None:
    body = {"agent": "worker_test", "input": "tell me", "stream": True}
    async with http(api, web) as client, client.stream("POST", "/api/runs", json=body) as response:
        assert response.status_code == 200, await response.aread()
        run = await Run.objects.aget(pk=UUID(response.headers["X-Run-Id"]))
        assert response.headers["Location"] == f"/api/runs/{run.pk}"
        told = frames.frames(response.aiter_raw())
        await past(told)
        await cancel(run)
        assert [each async for each in told][-1].event == "run.cancelled"


@pytest.mark.slow
async def test_a_stream_of_a_real_server_whose_connections_are_cut_ends_and_is_resumed(
    api: Api, live: Run, web: Web
) -> None:
    """An EventSource that was cut off sends its first URL again, and the last id that it has seen."""
    async with http(api, web) as client:
        response = await client.send(client.build_request("GET", stream(live)), stream=True)
        told = frames.frames(response.aiter_raw())
        last = (await past(told))[-1]
        await response.aclose()
        await cancel(live)
        again = await client.get(f"{stream(live)}?starting_after=0", headers={"Last-Event-ID": str(last)})
        ids = [frames.frame(text).id for text in again.text.strip().split("\n\n")[1:]]
        assert ids == list(range(3, len(ids) + 3))
