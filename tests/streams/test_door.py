"""How readers are let in: through the host's middleware and the view, on a few threads, and past them when those hang."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.utils.decorators import async_only_middleware, sync_only_middleware

from runs import with_streams
from runs.models import Run
from runs.streams import broadcast, door, seats
from runs.streams.app import Application
from tests.http.conftest import Api
from tests.streams.inside import Answer, ask
from tests.workers.conftest import eventually
from threads import access
from threads.access import Policy

pytestmark = pytest.mark.django_db(transaction=True)

passed: list[str] = []  # by the thread that each request came through


@sync_only_middleware
def notes_its_thread(get_response: Callable[[HttpRequest], HttpResponseBase]) -> Any:
    def noting(request: HttpRequest) -> HttpResponseBase:
        passed.append(threading.current_thread().name)
        return get_response(request)

    return noting


@async_only_middleware
def knows_coroutines_only(get_response: Callable[[HttpRequest], Awaitable[HttpResponseBase]]) -> Any:
    async def marking(request: HttpRequest) -> HttpResponseBase:
        if "closed" in request.headers:
            return HttpResponse(status=403)
        response = await get_response(request)
        response["X-Marked"] = "yes"
        return response

    return marking


@pytest.fixture
def noted() -> Iterator[list[str]]:
    passed.clear()
    yield passed
    passed.clear()


def stream(run: Run) -> str:
    return f"/api/runs/{run.pk}/stream"


async def test_readers_come_in_on_a_few_threads_that_are_kept(
    application: Application, api: Api, live: Run, settings: Any, noted: list[str]
) -> None:
    settings.MIDDLEWARE = [f"{__name__}.notes_its_thread", *settings.MIDDLEWARE]
    hosts = with_streams(get_asgi_application())
    answers = await asyncio.gather(*(ask(hosts, "GET", stream(live), api.key) for _ in range(3 * door.AT_ONCE)))
    assert [each.status for each in answers] == [200] * len(answers)
    assert len(broadcast.here().readers) == len(answers)
    assert set(noted) == {"longhaul-door"}
    assert len(noted) == len(answers)
    assert len([each for each in threading.enumerate() if each.name == "longhaul-door"]) <= door.AT_ONCE


async def test_what_is_no_stream_goes_by_djangos_own_way(
    application: Application, api: Api, live: Run, settings: Any, noted: list[str]
) -> None:
    settings.MIDDLEWARE = [f"{__name__}.notes_its_thread", *settings.MIDDLEWARE]
    hosts = with_streams(get_asgi_application())
    for path in (f"/api/runs/{live.pk}", "/nothing/of/ours/stream"):
        await ask(hosts, "GET", path, api.key)
    assert len(noted) == 2
    assert "longhaul-door" not in noted


@pytest.mark.parametrize(("said", "status"), [({}, 200), ({"closed": "1"}, 403)])
async def test_middleware_that_knows_coroutines_only_is_heeded(
    application: Application, api: Api, live: Run, settings: Any, said: dict[str, str], status: int
) -> None:
    settings.MIDDLEWARE = [f"{__name__}.knows_coroutines_only", *settings.MIDDLEWARE]
    answer = await ask(with_streams(get_asgi_application()), "GET", stream(live), api.key, **said)
    assert answer.status == status
    assert answer.headers.get("x-marked") == ("yes" if status == 200 else None)
    assert len(broadcast.here().readers) == (status == 200)


async def test_an_application_of_the_hosts_own_sees_every_request(
    api: Api, live: Run, application: Application
) -> None:
    seen: list[str] = []
    django = get_asgi_application()

    async def hosts(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        await django(scope, receive, send)

    assert (await ask(with_streams(hosts), "GET", stream(live), api.key)).status == 200
    assert seen == [stream(live)]


async def test_who_stands_in_a_line_that_does_not_move_goes_by_djangos_own_way(
    application: Application, api: Api, live: Run, settings: Any, noted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy hangs for all whom the door has room for; the one behind them is let in, with what it posted."""
    free, hang = threading.Event(), threading.Semaphore(door.AT_ONCE)

    class Hangs(Policy):
        def visible(self, queryset: Any, user: Any) -> Any:
            if hang.acquire(blocking=False):
                free.wait(20)
            return super().visible(queryset, user)

    hangs = Hangs()
    settings.MIDDLEWARE = [f"{__name__}.notes_its_thread", *settings.MIDDLEWARE]
    monkeypatch.setattr(access, "policy", lambda: hangs)
    monkeypatch.setattr(door, "LINE_SECONDS", 0.2)
    hosts = with_streams(get_asgi_application())
    stuck = [asyncio.create_task(ask(hosts, "GET", stream(live), api.key)) for _ in range(door.AT_ONCE)]
    try:
        await sync_to_async(eventually)(lambda: len(noted) == door.AT_ONCE)
        body = {"starting_after": live.last_seq}
        answer = await ask(hosts, "POST", stream(live), api.key, body)
        assert answer.status == 200
        assert not noted[-1].startswith("longhaul-door")
    finally:
        free.set()
    assert [each.status for each in await asyncio.gather(*stuck)] == [200] * door.AT_ONCE


async def test_a_client_that_sends_nothing_takes_nobodys_turn(application: Application, api: Api, live: Run) -> None:
    """A body that never ends is waited for outside of the line."""

    gone = asyncio.Event()

    async def never() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def unheard(message: Any) -> None:
        raise AssertionError(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": stream(live),
        "raw_path": stream(live).encode(), "root_path": "", "query_string": b"", "headers": [(b"host", b"localhost")],
        "server": ("localhost", 80), "client": ("127.0.0.1", 1),
    }  # fmt: skip
    slow = [asyncio.ensure_future(application(dict(scope), never, unheard)) for _ in range(2 * door.AT_ONCE)]
    try:
        await asyncio.sleep(0)  # they have begun
        answer = await asyncio.wait_for(ask(application, "GET", stream(live), api.key), 15)
        assert answer.status == 200
    finally:
        gone.set()
        await asyncio.gather(*slow)


@pytest.mark.parametrize("broken", [RuntimeError("of the host's"), SystemExit()])
async def test_a_broken_policy_ends_one_request_and_no_thread(
    application: Application, api: Api, live: Run, monkeypatch: pytest.MonkeyPatch, broken: BaseException
) -> None:
    class Breaks(Policy):
        def visible(self, queryset: Any, user: Any) -> Any:
            raise broken

    with monkeypatch.context() as patch:
        breaks = Breaks()
        patch.setattr(access, "policy", lambda: breaks)
        for _ in range(2 * door.AT_ONCE):
            answers: list[Answer] = []
            try:
                answers.append(await ask(application, "GET", stream(live), api.key))
            except RuntimeError:
                pass  # the server's to answer
            assert not [each for each in answers if each.status < 500]
    assert len(seats.here) == 0
    assert (await ask(application, "GET", stream(live), api.key)).status == 200
