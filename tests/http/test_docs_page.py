"""The API's page in a real browser, cut off from everything but our server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from django.contrib.auth.models import User
from django.test import Client

from runs.http.schema import document
from tests.http.web import Web
from tests.programs import CHROMIUM
from threads.authentication import create_key

if TYPE_CHECKING:
    from playwright.sync_api import Page

SHOTS = os.environ.get("LONGHAUL_SHOTS")  # a folder in which a screenshot is left


@dataclass
class Browser:
    page: Page
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def press(self, operation: str) -> dict[str, Any]:
        """Try an operation out on the page; return what the server answered."""
        page = self.page
        block = page.locator(f"#operations-{operation}")
        block.locator(".opblock-summary-control").click()
        block.locator(".try-out__btn").click()
        with page.expect_response(
            lambda response: "/api/" in response.url and response.request.resource_type == "fetch"
        ) as met:
            block.locator(".execute").click()
        block.locator(".live-responses-table .response-col_status").first.wait_for()
        answer = met.value
        return {"status": answer.status, "body": json.loads(answer.body() or b"null")}

    def authorize(self, key: str) -> None:
        page = self.page
        page.locator("button.authorize").first.click()
        box = page.locator(".dialog-ux .auth-container form", has_text="apiKey (http, Bearer)")
        box.locator("input").first.fill(key)
        box.locator("button.authorize").click()
        page.locator(".dialog-ux .btn-done").first.click()


@pytest.fixture
def key(transactional_db: None) -> str:
    return create_key(User.objects.create_user("ann"))[1]


@pytest.fixture
def browser(web: Web, key: str) -> Iterator[Browser]:
    """The page, open. Playwright runs a loop in this thread, so nobody asks the database here while it does."""
    from playwright.sync_api import Route, sync_playwright

    ours = urlsplit(web.url).netloc
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 1600})
        found = Browser(page)

        def only_ours(route: Route) -> None:
            if urlsplit(route.request.url).netloc == ours or route.request.url.startswith("data:"):
                route.continue_()
            else:
                found.outside.append(route.request.url)
                route.abort()

        page.route("**/*", only_ours)
        page.on("console", lambda said: found.errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: found.errors.append(str(error)))
        page.goto(f"{web.url}/api/docs")
        page.locator(".opblock").first.wait_for(timeout=60_000)  # ms: the page's script is large
        yield found
        chromium.close()


@pytest.mark.slow
@pytest.mark.needs_chromium
class TestInTheBrowser:
    def test_it_shows_each_operation_and_asks_nobody_else(self, browser: Browser) -> None:
        page = browser.page
        shown = page.locator(".opblock .opblock-summary-path").count()
        assert shown == sum(len(methods) for methods in document()["paths"].values())
        assert page.locator(".errors-wrapper").count() == 0
        assert page.locator(".opblock-tag-section").count() == len(document()["tags"])
        if SHOTS:
            page.screenshot(path=f"{SHOTS}/api-docs.png")
        for operation in ("runs-start_run_on_new_thread", "runs-stream_run"):
            page.locator(f"#operations-{operation} .opblock-summary-control").click()
            page.locator(f"#operations-{operation} .responses-wrapper").wait_for()
        assert (browser.errors, browser.outside) == ([], [])

    def test_an_operation_is_tried_out_with_a_key(self, browser: Browser, key: str) -> None:
        browser.authorize(key)
        made = browser.press("threads-create_thread")
        assert made["status"] == 201
        listed = browser.press("threads-list_threads")
        assert (listed["status"], [each["id"] for each in listed["body"]["results"]]) == (200, [made["body"]["id"]])
        assert (browser.errors, browser.outside) == ([], [])


def test_the_page_may_load_from_here_only(client: Client, db: None) -> None:
    page = client.get("/api/docs")
    assert page["Content-Type"].startswith("text/html")
    policy = dict(part.strip().partition(" ")[::2] for part in page["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert b"<script>" not in page.content
    for name, kind in {
        "start.js": "text/javascript",
        "swagger-ui.css": "text/css",
        "swagger-ui-bundle.js": "text/javascript",
        "favicon-32x32.png": "image/png",
    }.items():
        answer = client.get(f"/api/docs/{name}")
        assert (answer.status_code, answer["Content-Type"]) == (200, kind)
        assert len(answer.content) > 100
        assert answer["X-Content-Type-Options"] == "nosniff"
    for name in ("swagger-ui-bundle.js.map", "LICENSE", "..", "schema.py"):
        assert client.get(f"/api/docs/{name}").status_code == 404
