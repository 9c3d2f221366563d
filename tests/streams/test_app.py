"""The application around Django: who is let in, what is turned into a stream and what is not, and what a reader gets."""

from __future__ import annotations

import asyncio
import gc
import secrets
import signal
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID, uuid4
from weakref import WeakSet

import orjson
import pytest
from asgiref.sync import sync_to_async
from django.core.asgi import get_asgi_application
from django.db import OperationalError, ProgrammingError, connection, connections
from django.db.models import Model
from django.http import HttpRequest, HttpResponse, HttpResponseBase

from runs import bells, with_streams
from runs.agents import Agent, registry
from runs.http import streams
from runs.models import Event, Run
from runs.pytest_longhaul import ScriptedModel, call, run_to_end
from runs.run_log import DatabaseRunLog
from runs.streams import app, broadcast, departure, log, questions, seats
from runs.streams.app import Application
from runs.streams.visitors import Visitor
from tests.http.conftest import Api
from tests.http.frames import Frame
from tests.streams.inside import Answer, ask
from tests.workers.conftest import eventually
from threads import clock
from threads.models import ApiKey
from tools import tool

pytestmark = pytest.mark.django_db(transaction=True)

FAR = 60.0  # seconds: a reader that misses what should wake it looks no sooner
cancel = sync_to_async(Run.cancel)


def stream(run: Run) -> str:
    return f"/api/runs/{run.pk}/stream"


@sync_to_async
def record(run: Run, *texts: str) -> None:
    for text in texts:
        assert DatabaseRunLog().record(run.pk, "data", {"data": text})


@pytest.mark.slow
async def test_a_finished_run_is_told_whole_and_closed(application: Application, api: Api, ended: Run) -> None:
    """As Django's own handler tells it."""
    answer = await ask(application, "GET", stream(ended), api.key)
    told = await answer.events()
    assert answer.status == 200
    assert answer.ended
    log = await sync_to_async(api.get)(f"/api/runs/{ended.pk}/events")
    assert [each.data for each in told] == log["results"]
    assert [(each.id, each.event) for each in told] == [(each["seq"], each["type"]) for each in log["results"]]
    headers = answer.headers
    assert headers["content-type"] == "text/event-stream"
    assert headers["x-run-id"] == str(ended.pk)
    assert headers["location"] == f"/api/runs/{ended.pk}"
    assert headers["x-accel-buffering"] == "no"
    assert headers["cache-control"] == "private, no-cache, no-transform"
    assert headers["content-encoding"] == "identity"
    assert "content-length" not in headers
    assert not [name for name in headers if "longhaul" in name]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 1000])
async def test_it_goes_on_after_any_seq(application: Application, api: Api, ended: Run, batch: int) -> None:
    whole = await (await ask(application, "GET", stream(ended), api.key)).events()
    for after in range(len(whole) + 1):
        answer = await ask(application, "GET", f"{stream(ended)}?starting_after={after}&batch_size={batch}", api.key)
        assert await answer.events() == whole[after:]


async def test_what_a_frame_says_is_what_events_says(application: Application, api: Api, live: Run) -> None:
    """Postgres writes the frames: text of all kinds, numbers, moments with and without a fraction, and no payload."""
    odd = {
        "text": 'line\nbreak\r\n "quoted" \\ back\u2028slash \U0001f600 é',
        "n": [1e10, 0.1, -7, 1.0, None, True],
        "run": "x",
    }
    await sync_to_async(lambda: DatabaseRunLog().record(live.pk, "data", {"data": odd}))()
    await sync_to_async(lambda: DatabaseRunLog().record(live.pk, "data", {}))()
    await cancel(live)
    at = (await Event.objects.aget(run=live, seq=1)).at
    await Event.objects.filter(run=live, seq=1).aupdate(at=at.replace(microsecond=0))
    told = await (await ask(application, "GET", stream(live), api.key)).events()
    log = await sync_to_async(api.get)(f"/api/runs/{live.pk}/events")
    assert [each.data for each in told] == log["results"]
    assert [list(each.data)[:4] for each in told] == [["seq", "type", "run", "at"]] * len(told)


# --- rounds ---------------------------------------------------------------------------------------------------------


async def test_all_runs_have_their_turn(
    application: Application, api: Api, helper: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when more ring than a round reads, and ring again before the next."""
    runs = [await sync_to_async(helper.start)("Where?", owner=api.user) for _ in range(6)]
    for run in runs:
        await begun(application, api, run)
    now = broadcast.here()
    async with asyncio.timeout(20):
        while not all(run.pk in now.tails and now.tails[run.pk].joined for run in runs):
            await asyncio.sleep(0.01)  # between looks at a condition
    rounds: list[set[UUID]] = []
    read, enough = log.Log.live, asyncio.Event()

    async def live(self: log.Log, after: Sequence[tuple[UUID, int]]) -> Any:
        rounds.append({run for run, _ in after})
        found = await read(self, after)
        for run in runs:
            now._make_due(run.pk)
        if len(rounds) == 8:
            enough.set()
        return found

    monkeypatch.setattr(broadcast, "MOST_TAILS", 2)
    monkeypatch.setattr(log.Log, "live", live)
    await asyncio.wait_for(enough.wait(), 20)
    assert set().union(*rounds[1:8]) == {run.pk for run in runs}


@pytest.mark.slow
@pytest.mark.parametrize("moves", range(6))
async def test_who_comes_as_the_work_ends_for_want_of_readers_is_served(
    application: Application, api: Api, live: Run, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    look, ended = broadcast.Broadcast._look, asyncio.Event()

    async def looks(self: broadcast.Broadcast, *given: Any) -> None:
        await look(self, *given)
        ended.set()

    monkeypatch.setattr(broadcast.Broadcast, "_look", looks)
    now = broadcast.here()
    who = Visitor(user=(type(api.user), api.user.pk), key=None, session=None)
    plan = broadcast.Plan(visitor=who, run=live.pk)
    now.leave(now.enter(plan))
    await ended.wait()
    for _ in range(moves):  # of the event loop, in which the work is ended
        await asyncio.sleep(0)
    reader = now.enter(plan)
    try:
        assert b"run.queued" in await asyncio.wait_for(reader.next(), 20)
    finally:
        now.leave(reader)


@pytest.mark.slow
async def test_a_page_of_large_events_costs_what_it_has_and_not_what_comes_behind(
    application: Application, api: Api, live: Run
) -> None:
    """Else a thousand of them take longer than a statement may, and the stream begins again and again."""
    large = "".join(secrets.token_hex(1000) for _ in range(60))
    await record(live, *[large] * 4)

    async def took() -> float:
        one = log.Log("tests")
        times = []
        try:
            for _ in range(6):
                began = time.monotonic()
                (page,) = await one.pages([(live.pk, 2, 1000, "")])
                times.append(time.monotonic() - began)
                assert (page.last - 2, len(page.body) // len(large)) == (3, 3)
        finally:
            await one.close()
        return statistics.median(times)

    few = await took()
    await record(live, *[large] * 120)
    assert await took() < few * 5
    await cancel(live)
    told = await (await ask(application, "GET", stream(live), api.key)).events()
    assert [each.id for each in told] == list(range(1, len(told) + 1))
    assert [each.data["data"] for each in told if each.event == "data"] == [large] * 124


async def test_it_reads_in_the_role_that_django_assumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection.settings_dict["OPTIONS"], "assume_role", "pg_read_all_data")
    one = log.Log("tests")
    assert await one._ask("SELECT current_user::text") == [("pg_read_all_data",)]
    await one.close()


# --- who is let in --------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_what_django_refuses_is_its_own_answer(
    application: Application, api: Api, api_of: Any, live: Run
) -> None:
    eve = await sync_to_async(api_of)("eve")
    asked = [
        (401, "", stream(live)), (404, eve.key, stream(live)), (404, api.key, f"/api/runs/{uuid4()}/stream"),
        (400, api.key, f"{stream(live)}?starting_after=99"), (400, api.key, f"{stream(live)}?starting_after=-1"),
        (400, api.key, f"{stream(live)}?starting_after=x"),
    ]  # fmt: skip
    for status, key, address in asked:
        answer = await ask(application, "GET", address, key)
        assert (answer.status, answer.headers["content-type"]) == (status, "application/json"), address
        assert b"errors" in await answer.whole()
    assert not broadcast.here().readers


@pytest.mark.slow
async def test_head_tells_the_headers_and_opens_nothing(application: Application, api: Api, live: Run) -> None:
    answer = await ask(application, "HEAD", stream(live), api.key)
    assert (answer.status, answer.headers["content-type"], await answer.whole()) == (200, "text/event-stream", b"")


async def test_nobody_can_forge_an_internal_answer(application: Application, api: Api, api_of: Any, live: Run) -> None:
    """What a client sends, in whatever header, makes a stream of nothing."""
    eve = await sync_to_async(api_of)("eve")
    forged = {app.HEADER.lower(): str(live.pk), app.IN_SCOPE: "word"}
    for address, status in (
        (stream(live), 404),
        (f"/api/runs/{live.pk}", 404),
        ("/api/agents", 200),
        ("/nowhere", 404),
    ):
        answer = await ask(application, "GET", address, eve.key, **forged)
        assert answer.status == status
        assert "event-stream" not in answer.headers["content-type"]
        await answer.whole()
    assert not broadcast.here().readers


# Middleware of a host's, of many kinds.


def replaces(get_response: Callable[[HttpRequest], HttpResponseBase]) -> Callable[[HttpRequest], HttpResponseBase]:
    def middleware(request: HttpRequest) -> HttpResponseBase:
        get_response(request)
        return HttpResponse("closed for the night")

    return middleware


def refuses(get_response: Callable[[HttpRequest], HttpResponseBase]) -> Callable[[HttpRequest], HttpResponseBase]:
    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        response.status_code = 503
        return response

    return middleware


def repeats(get_response: Callable[[HttpRequest], HttpResponseBase]) -> Callable[[HttpRequest], HttpResponseBase]:
    """Answers with what it has seen in an earlier answer, as a cache does."""
    seen: list[dict[str, str]] = []

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        seen.append(dict(response.items()))
        return HttpResponse(headers=seen[0])

    return middleware


def copies(get_response: Callable[[HttpRequest], HttpResponseBase]) -> Callable[[HttpRequest], HttpResponseBase]:
    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        copied = HttpResponse(headers={**dict(response.items()), "X-Host": "copied"})
        copied.set_cookie("seen", "1")
        return copied

    return middleware


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "status"), [("replaces", 200), ("refuses", 503)])
async def test_an_answer_that_the_host_puts_in_its_place_is_the_answer(
    api: Api, live: Run, settings: Any, kind: str, status: int
) -> None:
    settings.MIDDLEWARE = [f"{__name__}.{kind}", *settings.MIDDLEWARE]
    answer = await ask(with_streams(get_asgi_application()), "GET", stream(live), api.key)
    assert answer.status == status
    assert not [name for name in answer.headers if name.startswith("x-longhaul")]
    assert await answer.whole() == (b"closed for the night" if kind == "replaces" else b"")
    assert not broadcast.here().readers


@pytest.mark.slow
async def test_a_word_is_good_for_one_request(api: Api, live: Run, settings: Any, application: Application) -> None:
    settings.MIDDLEWARE = [f"{__name__}.repeats", *settings.MIDDLEWARE]
    cached = with_streams(get_asgi_application())
    first = await ask(cached, "GET", stream(live), api.key)
    await first.leave()
    again = await ask(cached, "GET", stream(live), api.key)
    assert await again.whole() == b""
    assert not [name for name in again.headers if name.startswith("x-longhaul")]


@pytest.mark.slow
async def test_middleware_that_copies_compresses_and_tags(
    api: Api, live: Run, settings: Any, application: Application
) -> None:
    settings.MIDDLEWARE = [
        "django.middleware.gzip.GZipMiddleware", f"{__name__}.copies", *settings.MIDDLEWARE,
        "django.middleware.http.ConditionalGetMiddleware",
    ]  # fmt: skip
    hosts = with_streams(get_asgi_application())
    answer = await ask(hosts, "GET", stream(live), api.key, **{"accept-encoding": "gzip"})
    assert (answer.headers["x-host"], answer.headers["content-encoding"]) == ("copied", "identity")
    assert "seen=1" in answer.headers["set-cookie"]
    await cancel(live)
    assert (await answer.events())[-1].event == "run.cancelled"


async def test_a_start_that_streams(application: Application, api: Api, helper: Agent) -> None:
    body = {"agent": "helper", "input": "Where is it?", "stream": True}
    answer = await ask(application, "POST", "/api/runs", api.key, body, **{"idempotency-key": "one"})
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
    run = await Run.objects.aget(pk=UUID(answer.headers["x-run-id"]))
    assert answer.headers["location"] == f"/api/runs/{run.pk}"
    await cancel(run)
    told = await answer.events()
    assert [each.id for each in told] == list(range(1, len(told) + 1))
    assert told[-1].event == "run.cancelled"
    again = await ask(application, "POST", "/api/runs", api.key, body, **{"idempotency-key": "one"})
    assert again.headers["x-run-id"] == str(run.pk)
    assert await again.events() == told
    assert await Run.objects.acount() == 1


# --- live -----------------------------------------------------------------------------------------------------------


async def begun(application: Application, api: Api, run: Run, query: str = "") -> tuple[Answer, Any]:
    """Open a stream, and read what a queued run has said by now."""
    answer = await ask(application, "GET", stream(run) + query, api.key)
    told = answer.frames()
    assert (await anext(told)).comment is not None
    async for each in told:
        if each.event == "run.queued":
            break
    return answer, told


async def test_history_then_live_then_closed(
    application: Application, api: Api, live: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "LOOK_SECONDS", FAR)  # so it is the bell that wakes it
    answer, told = await begun(application, api, live)
    await heard(live)
    await record(live, "one")
    assert (await anext(told)).data["data"] == "one"
    await cancel(live)
    rest = [each async for each in told]
    assert [each.id for each in rest] == list(range(4, len(rest) + 4))
    assert rest[-1].event == "run.cancelled"
    assert answer.ended


@pytest.mark.slow
async def test_what_rang_is_read_once_for_all_its_readers(
    application: Application, api: Api, helper: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One subscription to a run, and one query for all runs that rang meanwhile."""
    monkeypatch.setattr(broadcast, "LOOK_SECONDS", FAR)
    first, *others = [await sync_to_async(helper.start)("x", owner=api.user) for _ in range(4)]
    told = [(await begun(application, api, run))[1] for run in (first, *others) for _ in range(3)]
    for run in (first, *others):
        await heard(run)
        assert len(bells.ear()._events[bells.run_channel(run.pk)]) == 1
    asked: list[list[UUID]] = []
    reached, go_on, real = asyncio.Event(), asyncio.Event(), log.Log.live

    async def live(self: log.Log, after: Sequence[tuple[UUID, int]]) -> Any:
        asked.append([run for run, _ in after])
        reached.set()
        await go_on.wait()
        return await real(self, after)

    monkeypatch.setattr(log.Log, "live", live)
    await record(first, "word")
    await asyncio.wait_for(reached.wait(), 20)
    for run in others:
        await record(run, "word")
    async with asyncio.timeout(20):
        while not {run.pk for run in others} <= set(broadcast.here()._due):
            await asyncio.sleep(0.01)  # between looks at a condition
    go_on.set()
    assert [(await anext(each)).data["data"] for each in told] == ["word"] * 12
    assert len(asked) == 2
    assert {run.pk for run in others} <= set(asked[1])
    for runs in asked:
        assert len(runs) == len(set(runs))


async def heard(run: Run) -> None:
    """Wait until the process listens for the run's bell, and its writers know that somebody does."""
    channel = bells.run_channel(run.pk)
    await sync_to_async(eventually)(lambda: channel in bells.ear()._events)
    bells._unheard.clear()


@pytest.mark.slow
async def test_many_readers_of_one_run_are_given_the_same(application: Application, api: Api, live: Run) -> None:
    readers = [await ask(application, "GET", f"{stream(live)}?starting_after={n % 3}", api.key) for n in range(12)]
    for number in range(40):
        await record(live, f"word {number}")
        if number % 10 == 5:  # they come at any moment, and join where the others are
            readers.append(await ask(application, "GET", stream(live), api.key))
    await cancel(live)
    told = await asyncio.gather(*(each.events() for each in readers))
    whole = told[0]
    assert [each.id for each in whole] == list(range(1, len(whole) + 1))
    for number, each in enumerate(told):
        assert each == whole[number % 3 if number < 12 else 0 :]


@pytest.mark.slow
async def test_a_reader_who_leaves_cancels_nothing_and_frees_all(application: Application, api: Api, live: Run) -> None:
    answer, _ = await begun(application, api, live)
    other, told = await begun(application, api, live)
    await answer.leave()
    assert len(broadcast.here().readers) == 1
    await record(live, "on it goes")
    assert (await anext(told)).data["data"] == "on it goes"
    await other.leave()
    assert not broadcast.here().readers
    assert not broadcast.here().tails
    channel = bells.run_channel(live.pk)
    await sync_to_async(eventually)(lambda: channel not in bells.ear()._events)
    await live.arefresh_from_db()
    assert live.status == "queued"


async def test_a_reader_who_does_not_read_is_cut_off_and_can_come_back(
    application: Application, api: Api, live: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "MOST_QUEUED", 5000)
    slow, told = await begun(application, api, live)
    quick, others = await begun(application, api, live)
    slow.may_send.clear()
    for number in range(30):
        await record(live, str(number) * 500)
        assert (await anext(others)).id == number + 3
    await asyncio.wait_for(slow.task, 20)
    assert not slow.ended  # it is cut: its client knows that there is more
    got = [each async for each in told]
    last = got[-1].id if got else 2
    assert last is not None
    assert last < 32
    again = await ask(application, "GET", stream(live), api.key, **{"last-event-id": str(last)})
    await cancel(live)
    rest = await again.events()
    assert [each.id for each in rest] == list(range(last + 1, last + 1 + len(rest)))
    assert rest[-1].event == "run.cancelled"
    assert (await Answer.events(quick))[-1].event == "run.cancelled"


@pytest.mark.slow
async def test_a_reader_who_stands_still_is_cut_off(
    application: Application, api: Api, live: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "SEND_SECONDS", 0.1)
    slow, _ = await begun(application, api, live)
    slow.may_send.clear()
    await record(live, "one")
    await asyncio.wait_for(slow.task, 20)
    assert not slow.ended


@pytest.mark.slow
@pytest.mark.parametrize("asked", [True, False])
async def test_pings(
    application: Application, api: Api, live: Run, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "PING_SECONDS", 0.0)
    _, told = await begun(application, api, live, f"?include_pings={str(asked).lower()}")
    ping = Frame(event="ping", data={}) if asked else Frame(comment="ping")
    assert [await anext(told) for _ in range(3)] == [ping] * 3
    await cancel(live)
    assert [each async for each in told if each != ping][-1].event == "run.cancelled"


@pytest.mark.slow
async def test_pings_come_also_while_a_tool_runs_for_long(
    application: Application, api: Api, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "PING_SECONDS", 0.0)
    monkeypatch.setattr(registry, "_agents", dict(registry.all()))
    over = threading.Event()

    @tool(idempotent=True)
    def count_stock() -> int:
        """Count what is there."""
        assert over.wait(60)
        return 7

    clerk = registry.add(Agent(name="clerk", model="openai:test", tools=[count_stock]))
    scripted_model.say(call("count_stock"), "There are seven.")
    run = await sync_to_async(clerk.start)("How many are there?", owner=api.user)

    def work() -> None:
        try:
            run_to_end(run)
        finally:
            connections.close_all()

    answer = await ask(application, "GET", stream(run), api.key)
    told = answer.frames()
    working = asyncio.create_task(asyncio.to_thread(work))
    try:
        while (await anext(told)).event != "tool_call.started":
            pass
        assert [(await anext(told)).comment for _ in range(5)] == ["ping"] * 5
    finally:
        over.set()
        await working
    assert [each async for each in told if each.comment is None][-1].event == "run.completed"


def test_what_is_promised_in_seconds() -> None:
    """The tests of these have made them short."""
    for module in (broadcast, streams):
        assert module.PING_SECONDS == 15
        assert module.CHECK_SECONDS <= 30  # with the time of an answer less than a minute
    assert questions.ANSWER_SECONDS + broadcast.CHECK_SECONDS < 60


@pytest.mark.slow
async def test_a_run_that_is_deleted_ends_its_stream(
    application: Application, api: Api, live: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(broadcast, "QUIET_SECONDS", 0.0)
    answer, told = await begun(application, api, live)
    await sync_to_async(Run.objects.filter(pk=live.pk).delete)()
    assert [each async for each in told] == []
    assert answer.ended


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["key", "permission", "policy", "policy's table", "policy's database"])
async def test_a_stream_ends_when_it_may_no_longer_be_seen(
    application: Application, api_of: Any, live: Run, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setattr(broadcast, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(broadcast, "UNCHECKED_SECONDS", 0.3)
    staff = await sync_to_async(api_of)("staff", is_staff=True, is_superuser=True)
    answer, told = await begun(application, staff, live)
    await record(live, "seen")
    assert (await anext(told)).data["data"] == "seen"
    if lost == "key":
        await ApiKey.objects.filter(owner=staff.user).aupdate(revoked_at=clock.Now())
    elif lost == "permission":
        await type(staff.user).objects.filter(pk=staff.user.pk).aupdate(is_superuser=False)
    else:
        errors = {"policy": RuntimeError, "policy's table": ProgrammingError, "policy's database": OperationalError}

        def raises(*_: Any) -> Any:
            raise errors[lost]("the team's service is away")

        monkeypatch.setattr("threads.access.policy", raises)
    assert [each async for each in told] == []
    assert answer.ended
    await live.arefresh_from_db()
    assert live.status == "queued"


@pytest.mark.slow
async def test_an_end_of_the_process_ends_all_streams(application: Application, api: Api, live: Run) -> None:
    answer, told = await begun(application, api, live)
    broadcast.here().depart()
    assert [each async for each in told] == []
    assert answer.ended


async def test_who_comes_as_the_process_leaves_is_sent_elsewhere(
    application: Application, api: Api, live: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host may take minutes to end. Nothing is started for who is turned away; an EventSource would not come back."""
    monkeypatch.setattr(departure, "_leaving", True)
    start = {"agent": "helper", "input": "Where is it?", "stream": True}
    for method, address, body in (("GET", stream(live), None), ("POST", "/api/runs", start)):
        late = await ask(application, method, address, api.key, body)
        assert (late.status, late.headers["retry-after"], late.headers["connection"]) == (503, "1", "close")
        assert orjson.loads(await late.whole())["errors"][0]["code"] == "leaving"
    assert await Run.objects.acount() == 1
    browser = await ask(application, "GET", stream(live), api.key, accept="text/event-stream")
    assert (browser.status, browser.headers["connection"]) == (200, "close")
    assert await browser.whole() == app.OPENING
    assert "connection" not in (await ask(application, "GET", f"/api/runs/{live.pk}", api.key)).headers
    assert len(seats.here) == 0


class Robot:
    """What a class of the host's takes for a user, as it is: no row, and not asked whether it is active."""

    is_authenticated = True

    def __init__(self, pk: Any) -> None:
        self.pk = pk


def test_who_is_no_row_is_asked_about_as_they_are(api: Api, live: Run) -> None:
    rows: dict[type[Model], list[UUID]] = {Run: [live.pk]}
    assert Visitor(user=Robot(api.user.pk), key=None, session=None).sees(rows) == {live.pk}
    assert Visitor(user=Robot(api.user.pk + 1), key=None, session=None).sees(rows) == set()


# --- how many -------------------------------------------------------------------------------------------------------


async def test_a_process_has_so_many_seats_and_an_owner_some_of_them(
    application: Application, api: Api, api_of: Any, live: Run, settings: Any
) -> None:
    settings.LONGHAUL = {"MAX_STREAMS": 2, "STREAMS_PER_OWNER": 1}
    eve, ben = [await sync_to_async(api_of)(name, is_staff=True, is_superuser=True) for name in ("eve", "ben")]
    start = {"agent": "helper", "input": "Where is it?", "stream": True}

    async def refused(key: str, method: str = "GET", address: str = stream(live), body: Any = None) -> tuple[Any, ...]:
        answer = await ask(application, method, address, key, body)
        return answer.status, orjson.loads(await answer.whole())["errors"][0]["code"], answer.headers["retry-after"]

    first, _ = await begun(application, api, live)
    assert await refused(api.key) == (429, "too_many_streams", "5")
    assert await refused(api.key, "POST", "/api/runs", start) == (429, "too_many_streams", "5")
    second, _ = await begun(application, eve, live)
    assert await refused(ben.key) == (503, "streams_full", "5")
    assert await Run.objects.acount() == 1  # none was started for nothing
    assert (await ask(application, "HEAD", stream(live), api.key)).status == 200
    await first.leave()
    third, _ = await begun(application, ben, live)  # the seat is free again
    for answer in (second, third):
        await answer.leave()
    assert len(seats.here) == 0


async def test_a_seat_is_free_again_however_the_request_ends(
    application: Application, api: Api, live: Run, settings: Any
) -> None:
    settings.MIDDLEWARE = [f"{__name__}.refuses", *settings.MIDDLEWARE]
    refused = await ask(with_streams(get_asgi_application()), "GET", stream(live), api.key)
    await refused.whole()
    assert (refused.status, len(seats.here)) == (503, 0)
    body = {"agent": "nobody", "input": "Where is it?", "stream": True}
    unknown = await ask(application, "POST", "/api/runs", api.key, body)
    await unknown.whole()
    assert unknown.status == 400
    assert len(seats.here) == 0


def test_a_seat_that_is_taken_when_the_request_is_over_is_free() -> None:
    """Its client has left; the thread of its view goes on."""
    handover = app.Handover()
    handover.end()
    handover.sit("ann")
    assert len(seats.here) == 0
    again = seats.here.take("ann")
    for _ in range(2):
        again.leave()
    assert len(seats.here) == 0


# --- the end --------------------------------------------------------------------------------------------------------


async def test_the_end_is_heard_before_the_first_stream(application: Application, api: Api, live: Run) -> None:
    """Who comes with a request that was under way would keep the process to its last second."""
    signal.signal(signal.SIGINT, lambda *_: None)
    await (await ask(application, "GET", "/healthz")).whole()
    signal.raise_signal(signal.SIGINT)
    assert (await ask(application, "GET", stream(live), api.key)).status == 503


class Streams:
    """Those of one event loop."""

    def __init__(self, heard: list[str], name: str = "streams") -> None:
        self._heard, self._name = heard, name

    def depart(self) -> None:
        self._heard.append(self._name)


def test_the_streams_of_all_loops_are_told_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(departure, "_told", WeakSet())
    signal.signal(signal.SIGINT, lambda *_: heard.append("host"))
    one, other, gone = (Streams(heard, name) for name in ("one", "other", "gone"))
    for each in (one, other, gone):
        departure.listen(each)
    del gone, each
    signal.raise_signal(signal.SIGINT)
    assert sorted(heard[:2]) == ["one", "other"]
    assert heard[2:] == ["host"]
    assert departure.leaving()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_that_the_host_ignores_ends_nothing(monkeypatch: pytest.MonkeyPatch, ignored: bool) -> None:
    heard: list[str] = []
    monkeypatch.setattr(departure, "_told", WeakSet())
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else lambda *_: heard.append("host"))
    streams = Streams(heard)
    departure.listen(streams)
    signal.raise_signal(signal.SIGINT)
    assert heard == ([] if ignored else ["streams", "host"])


def test_a_loop_that_was_closed_is_let_go() -> None:
    async def here() -> weakref.ref[broadcast.Broadcast]:
        return weakref.ref(broadcast.here())

    first = asyncio.run(here())
    second = asyncio.run(here())
    gc.collect()
    assert first() is None
    assert second() is not None
