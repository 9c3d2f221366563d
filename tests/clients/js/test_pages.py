"""What clients/js/README.md and docs/clients.md show runs as it stands there. The pages' agent has another name here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.test import Client

from tests.clients.js.node import MODULE, node
from tests.clients.js.test_browser import TOLD
from tests.docs.page import Block, blocks
from tests.http.conftest import Api
from tests.programs import CHROMIUM
from tests.streams.outside import Process, processes
from tests.workers.conftest import Kit

README, DOCS = "clients/js/README.md", "docs/clients.md"
PROGRAMS = [block for page in (README, DOCS) for block in blocks(page) if block.kind == "js"]
PAGES = [block for block in blocks(README) if block.kind == "html"]
HERE = "tests/clients/js/test_pages.py::"
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def web(workers: Kit, tmp_path: Path) -> Iterator[Process]:
    with processes(tmp_path, 1) as (web,):
        yield web


def written(block: Block, folder: Path) -> Path:
    """Write a program where its first line says, beside the module as a package."""
    package = folder / "node_modules" / "longhaul-client"
    if not package.exists():
        package.parent.mkdir()
        package.symlink_to(MODULE)
    path = folder / block.body.partition("\n")[0].removeprefix("// ")
    path.write_text(block.body.replace('"support"', '"worker_test"'))
    return path


def test_each_block_is_tried() -> None:
    assert {block.told for block in PROGRAMS} == {
        f"tried by {HERE}{test.__name__}"
        for test in (test_the_hook_of_the_page_works, test_the_programs_of_the_pages_run)
    }
    assert {block.told for block in PAGES} == {f"tried by {HERE}{test_the_pages_of_the_page_work.__name__}"}


@pytest.mark.needs_node
def test_the_programs_of_the_pages_run(web: Process, api: Api, tmp_path: Path) -> None:
    said = {}
    for block in PROGRAMS:
        if block.told.endswith(test_the_programs_of_the_pages_run.__name__):
            path = written(block, tmp_path)
            done = node("--preserve-symlinks", str(path), API=f"{web.url}/api", KEY=api.key)
            assert done.returncode == 0, done.stderr
            said[path.name] = done.stdout
    assert set(said) == {"follow.mjs", "talk.mjs"}
    first, *rest = said["follow.mjs"].splitlines()
    assert first == TOLD
    assert rest[0].startswith("4 ")
    assert rest[-2:] == [f"{len(rest) + 2} run.completed", "0"]
    assert "[ 'user: Where is order 1042?' ]" in said["talk.mjs"]
    assert "open running" in said["talk.mjs"]
    assert "run.completed" in said["talk.mjs"]


@pytest.mark.needs_node
def test_the_hook_of_the_page_works(tmp_path: Path) -> None:
    (block,) = (block for block in PROGRAMS if block.told.endswith(test_the_hook_of_the_page_works.__name__))
    path = written(block, tmp_path)
    react = tmp_path / "node_modules" / "react"
    react.mkdir()
    # As much of React as the hook asks for, with the second mount of its strict mode.
    (react / "package.json").write_text(json.dumps({"name": "react", "type": "module", "exports": "./react.js"}))
    (react / "react.js").write_text("""
        const state = new Map();
        export const effects = [];
        export const useState = (make) => [state.get("it") ?? state.set("it", make()).get("it")];
        export const useEffect = (effect) => effects.push(effect);
        export const useSyncExternalStore = (subscribe, getSnapshot) => (subscribe(() => {})(), getSnapshot());
    """)
    (tmp_path / "try.mjs").write_text(f"""
        import {{ useThread }} from "./{path.name}";
        import {{ effects }} from "react";
        const asked = [];
        const fetch = async (url) => {{ asked.push(url); throw new TypeError("no network"); }};
        const shown = () => useThread({{ baseUrl: "http://test/api", thread: "t", fetch }});
        const [before, thread] = shown();
        console.log(before.connection, asked.length);
        const leave = effects[0]();
        console.log(shown()[0].connection, shown()[1] === thread);
        leave();
        console.log(shown()[0].connection);
        const leaveAgain = effects[0]();
        console.log(shown()[0].connection);
        leaveAgain();
    """)
    done = node("--preserve-symlinks", str(tmp_path / "try.mjs"))
    assert done.stderr == ""
    assert done.stdout.split() == ["idle", "0", "connecting", "true", "closed", "connecting"]


@pytest.mark.needs_chromium
async def test_the_pages_of_the_page_work(web: Process, api: Api) -> None:
    from playwright.async_api import async_playwright

    def sign_in() -> str:
        client = Client()
        client.force_login(api.user)
        return client.cookies["sessionid"].value

    signed_in = await sync_to_async(sign_in)()
    thread_page, source_page = (block.body.replace('"support"', '"worker_test"') for block in PAGES)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        context = await browser.new_context()
        await context.add_cookies([{"name": "sessionid", "value": signed_in, "url": web.url}])
        html = "text/html; charset=utf-8"
        await context.route("**/thread", lambda route: route.fulfill(body=thread_page, content_type=html))
        await context.route("**/source", lambda route: route.fulfill(body=source_page, content_type=html))
        await context.route("**/longhaul.js", lambda route: route.fulfill(path=MODULE / "longhaul.js"))
        page = await context.new_page()
        await page.goto(f"{web.url}/admin/login/?next=/healthz")  # which sets the CSRF cookie
        await page.goto(f"{web.url}/thread")
        await say(page, "silence")
        await page.wait_for_function("document.querySelectorAll('li')[1]?.textContent == 'So far so '", timeout=60_000)
        await page.click("text=Stop")
        await page.wait_for_function("document.querySelector('[type=button]').disabled", timeout=60_000)
        thread = page.url.partition("#")[2]
        source = await context.new_page()
        await source.goto(f"{web.url}/source#{thread}")
        await source.wait_for_function("performance.getEntriesByType('resource').length", timeout=60_000)
        await say(page, "tell me")
        await source.wait_for_function(f"document.querySelector('output').innerText == {TOLD!r}", timeout=60_000)
        await page.wait_for_function("document.querySelector('[type=button]').disabled", timeout=60_000)
        assert await page.locator("li").all_text_contents() == ["silence", "So far so ", "tell me", TOLD]
        assert await page.locator("li").evaluate_all("items => items.map(item => item.className)") == [
            "completed", "partial", "completed", "completed"
        ]  # fmt: skip
        await browser.close()


async def say(page: Any, text: str) -> None:
    await page.fill("[name=say]", text)
    await page.press("[name=say]", "Enter")
