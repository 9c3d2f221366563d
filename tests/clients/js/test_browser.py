"""clients/js in a real Chromium: a page with a session, its thread, reloads, and a network that goes away."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.test import Client

from agents_project.demo.model_server import Pause, Text
from runs.models import Run
from tests.clients.js.node import HERE, MODULE
from tests.http.conftest import Api
from tests.programs import CHROMIUM
from tests.streams.cutting import CuttingProxy
from tests.streams.outside import processes
from tests.workers.conftest import Kit
from threads.models import Message

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.slow,
    pytest.mark.needs_chromium,
    pytest.mark.timeout(400),
]
PATIENCE = {"baseMs": 50, "maxMs": 500, "stallMs": 5000, "answerMs": 5000, "tries": 50}
TOLD = " ".join(f"w{n}" for n in range(40))  # what the tests' model says to `tell`

# How many lengths were shown at which no piece of the stream ended.
WITHIN_PIECES = """(() => {
    let length = 0;
    const ends = new Set([0]);
    for (const event of events) if (event.type == "text.delta") ends.add(length += event.text.length);
    return new Set(shown.map(([, length]) => length).filter(length => !ends.has(length))).size;
})()"""


@pytest.fixture
def proxy(workers: Kit, tmp_path: Path) -> Iterator[CuttingProxy]:
    """A server, and the way to it. It cuts when the test lets it."""
    with processes(tmp_path, 1) as (web,), CuttingProxy(web.port, seed=3, mean_bytes=1500, share=0.5) as proxy:
        proxy.pause()
        yield proxy


@pytest.fixture
async def page(proxy: CuttingProxy, api: Api) -> AsyncIterator[Any]:
    """The page of these tests, at the server's own address, of somebody who is signed in by a session."""
    from playwright.async_api import async_playwright

    def sign_in() -> str:
        client = Client()
        client.force_login(api.user)
        return client.cookies["sessionid"].value

    signed_in = await sync_to_async(sign_in)()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        context = await browser.new_context(viewport={"width": 800, "height": 600})
        await context.add_cookies([{"name": "sessionid", "value": signed_in, "url": proxy.url}])
        await context.add_init_script(f"sessionStorage.setItem('options', '{json.dumps({'patience': PATIENCE})}')")
        await context.route("**/page.html", lambda route: route.fulfill(path=HERE / "page.html"))
        await context.route("**/longhaul.js", lambda route: route.fulfill(path=MODULE / "longhaul.js"))
        page = await context.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        await page.goto(f"{proxy.url}/admin/login/?next=/healthz")  # which sets the CSRF cookie
        await page.goto(f"{proxy.url}/page.html")
        yield page
        await browser.close()
        assert wrong == []


async def say(page: Any, text: str) -> None:
    await page.fill("[name=say]", text)
    await page.press("[name=say]", "Enter")


async def until(page: Any, what: str) -> None:
    from playwright.async_api import TimeoutError

    condition = f"(() => {{ const state = thread.getSnapshot(); return {what}; }})()"
    try:
        await page.wait_for_function(condition, timeout=180_000)
    except TimeoutError as error:
        state = await page.evaluate("JSON.stringify(thread.getSnapshot(), null, 1)")
        raise AssertionError(f"never: {what}\n{state}") from error


async def texts(page: Any) -> list[str]:
    found: list[str] = await page.locator("article").all_inner_texts()
    return found


@sync_to_async
def saved() -> list[tuple[str, str, Any]]:
    rows = Message.objects.exclude(status="discarded").order_by("position")
    return [(row.role, row.status, "".join(part.get("text", "") for part in row.content)) for row in rows]


@pytest.fixture
def with_a_pause(workers: Kit) -> Iterator[None]:
    """The model says TOLD with a pause in its middle, within which a slow machine too loads a page again."""
    before, piece = workers.model.script, partial(Text, chunk_chars=4, delay=0.03)
    workers.model.script = lambda call: [piece(TOLD[:60]), Pause(10), piece(TOLD[60:])]
    yield
    workers.model.script = before


@pytest.mark.usefixtures("with_a_pause")
async def test_a_conversation_with_a_reload_in_its_middle(page: Any, proxy: CuttingProxy) -> None:
    await say(page, "tell me")
    assert await texts(page) == ["tell me"], "at once"
    await until(page, "state.messages.length == 2 && document.querySelectorAll('article')[1].innerText.length > 20")
    if folder := os.environ.get("LONGHAUL_SCREENSHOTS"):
        await page.screenshot(path=f"{folder}/middle.png")
    before = (await texts(page))[1]
    assert TOLD.startswith(before)
    assert before != TOLD
    # The page is loaded again: it shows what there is, goes on, and each character is there once.
    await page.reload()
    await until(page, "state.messages.length == 2")
    assert TOLD.startswith((await texts(page))[1])
    assert len((await texts(page))[1]) >= len(before)
    await until(page, "state.status == 'running' && state.isRunning")
    await until(page, "state.status == 'completed' && !state.isRunning")
    assert await texts(page) == ["tell me", TOLD]
    assert await saved() == [("user", "completed", "tell me"), ("assistant", "completed", TOLD)]


async def test_text_is_shown_at_an_even_pace(page: Any, proxy: CuttingProxy) -> None:
    await say(page, "tell me")
    await until(page, "state.status == 'completed'")
    assert await page.evaluate("shown.at(-1)[1]") == len(TOLD)
    assert await page.evaluate(WITHIN_PIECES) > 3, "also what ends within a piece that came"
    # Who wants no motion sees text as it comes.
    await page.emulate_media(reduced_motion="reduce")
    await page.evaluate("shown.length = events.length = 0")
    await say(page, "tell me more")
    await until(page, "state.messages.length == 4 && state.status == 'completed'")
    assert await page.evaluate(WITHIN_PIECES) == 0


async def test_stop_in_the_middle_and_resume(page: Any, proxy: CuttingProxy) -> None:
    await say(page, "silence")
    await until(page, "document.querySelectorAll('article')[1]?.innerText == 'So far so '")
    await page.click("[name=stop]")
    await until(page, "state.status == 'cancelled' && !state.isRunning")
    assert await texts(page) == ["silence", "So far so "]
    assert (await saved())[1] == ("assistant", "partial", "So far so ")
    run = await page.evaluate("thread.resume('tell me').then(run => run.id)")
    await until(page, f"state.run.id == '{run}' && state.status == 'completed'")
    assert await texts(page) == ["silence", "So far so ", "tell me", TOLD]


async def test_without_a_network_and_back(page: Any, proxy: CuttingProxy) -> None:
    # By itself it would come back in some minutes: that the page is online again is why it does.
    patience = {**PATIENCE, "baseMs": 900_000, "maxMs": 900_000}
    await page.context.add_init_script(f"sessionStorage.setItem('options', '{json.dumps({'patience': patience})}')")
    await page.reload()
    await say(page, "tell me")
    await until(page, "state.messages[1]?.content.length")
    await page.evaluate("window.connections = []; thread.subscribe(state => connections.push(state.connection))")
    await page.context.set_offline(True)
    proxy.cut_all()
    await until(page, "state.connection == 'reconnecting'")
    await say(page, "call idempotent 0.1")  # goes out when there is a network again
    assert (await texts(page))[-1] == "call idempotent 0.1"
    await page.context.set_offline(False)
    await until(page, "state.connection == 'open'")
    await until(page, "state.messages.length == 6 && !state.isRunning")
    assert await texts(page) == [
        "tell me", TOLD, "call idempotent 0.1", "idempotent", "idempotent", "It is done."
    ]  # fmt: skip
    assert await sync_to_async(Run.objects.count)() == 2


async def test_over_cuts_each_character_is_there_once(page: Any, proxy: CuttingProxy) -> None:
    proxy.go_on()
    for text in ("tell me", "call idempotent 0.1", "tell me more"):
        await say(page, text)
    await until(page, "state.messages.filter(each => each.status == 'completed').length == 8 && !state.isRunning")
    proxy.pause()
    assert sum(proxy.cuts.values()) >= 3
    shown = await page.evaluate(
        "thread.getSnapshot().messages.map(each => [each.role, each.status, each.content.map(part => part.text ?? '').join('')])"
    )
    assert [tuple(each) for each in shown] == await saved()
    assert await sync_to_async(Run.objects.count)() == 3
    runs = await sync_to_async(lambda: [str(run.pk) for run in Run.objects.order_by("created_at")])()
    events = await page.evaluate("events.map(event => [event.run, event.seq])")
    last = await sync_to_async(lambda: {str(run.pk): run.last_seq for run in Run.objects.all()})()
    assert [(run, seq) for run, seq in events] == [(run, seq + 1) for run in runs for seq in range(last[run])]
