"""A browser's EventSource: it comes back by itself, and stops by itself."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.test import Client

from runs.models import Run
from runs.run_log import DatabaseRunLog
from tests.http.conftest import Api
from tests.programs import CHROMIUM
from tests.streams.cutting import CuttingProxy
from tests.streams.outside import Process, processes

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.slow,
    pytest.mark.needs_chromium,
    pytest.mark.timeout(240),
]

FOLLOW = """address => {
    window.told = []; window.opened = 0;
    window.source = new EventSource(address);
    source.onopen = () => { window.opened += 1; };
    for (const type of ["message.completed", "run.queued", "data", "run.cancelled"])
        source.addEventListener(type, event => told.push([event.lastEventId, type, event.data]));
}"""


@sync_to_async
def record(run: Run, *texts: str) -> None:
    for text in texts:
        assert DatabaseRunLog().record(run.pk, "data", {"data": text})


@sync_to_async
def session(api: Api) -> str:
    client = Client()
    client.force_login(api.user)
    return client.cookies["sessionid"].value


@pytest.mark.parametrize("address", ["/api/runs/{run}/stream", "/api/threads/{thread}/stream"])
async def test_an_event_source_resumes_by_itself(api: Api, live: Run, tmp_path: Path, address: str) -> None:
    from playwright.async_api import async_playwright

    signed_in = await session(api)
    with processes(tmp_path, 1) as (web,):
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
            context = await browser.new_context()
            await context.add_cookies([{"name": "sessionid", "value": signed_in, "url": web.url}])
            page = await context.new_page()
            await page.goto(f"{web.url}/healthz")
            await page.evaluate(FOLLOW, address.format(run=live.pk, thread=live.thread_id))
            await record(live, "one", "two")
            await has(page, 4)
            # Killed, and asked to end: it waits, asks again, and has what was said meanwhile.
            for number, end in enumerate((Process.kill, Process.terminate)):
                end(web)
                web.process.wait(20)
                await record(live, f"three {number}", f"four {number}")
                web.start()
                await has(page, 6 + 2 * number)
            await sync_to_async(live.cancel)()
            await has(page, 9)
            told: list[Any] = await page.evaluate("told")
            log = await sync_to_async(lambda: [event.as_dict() for event in live.events()])()
            assert [json.loads(data) for _, _, data in told] == json.loads(json.dumps(log))
            prefix = "" if "runs" in address else f"{live.pk}:"
            assert [id for id, _, _ in told] == [f"{prefix}{event['seq']}" for event in log]
            assert await page.evaluate("opened") >= 3
            if "runs" in address:  # a thread has no end
                await page.wait_for_function("source.readyState == EventSource.CLOSED", timeout=20_000)
            assert await page.evaluate("told.length") == len(log), "and nothing twice"
            await browser.close()


async def test_an_event_source_is_cut_anywhere_and_loses_nothing(api: Api, live: Run, tmp_path: Path) -> None:
    """Through a proxy that resets, closes, hangs, refuses, and lets requests stay without an answer, with the page's own cookie."""
    from playwright.async_api import async_playwright

    signed_in = await session(api)
    with (
        processes(tmp_path, 1) as (web,),
        CuttingProxy(web.port, seed=11, mean_bytes=2500, hang=timedelta(milliseconds=500)) as proxy,
    ):
        proxy.pause()
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
            context = await browser.new_context()
            await context.add_cookies([{"name": "sessionid", "value": signed_in, "url": proxy.url}])
            page = await context.new_page()
            await page.goto(f"{proxy.url}/healthz")
            await page.evaluate(FOLLOW, f"/api/runs/{live.pk}/stream")
            await has(page, 2)
            proxy.go_on()
            count = 2
            while sum(proxy.cuts.values()) < 5:
                await record(live, *["größer 日本語 🙂 " * 5] * 5)
                count += 5
                await has(page, count)
            await sync_to_async(live.cancel)()
            await page.wait_for_function("source.readyState == EventSource.CLOSED", timeout=60_000)
            told: list[Any] = await page.evaluate("told")
            log = await sync_to_async(lambda: [event.as_dict() for event in live.events()])()
            assert [json.loads(data) for _, _, data in told] == json.loads(json.dumps(log))
            assert [id for id, _, _ in told] == [str(event["seq"]) for event in log]
            await browser.close()


async def has(page: Any, count: int) -> None:
    await page.wait_for_function(f"told.length >= {count}", timeout=60_000)  # ms: a server starts
