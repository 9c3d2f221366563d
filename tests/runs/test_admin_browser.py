"""The admin's pages in a browser under a strict Content-Security-Policy: nothing is blocked, and what is hostile stays text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse
from pytest_django.live_server_helper import LiveServer

from runs import Agent
from runs.models import Event, Leg, Run, Step, Usage
from runs.pytest_longhaul import ScriptedModel, call, run_to_end
from tests.programs import CHROMIUM
from tests.runs.invariant_cases import State
from tests.runs.scenes import Cast
from tests.runs.test_admin import HOSTILE, list_of, look_up, page_of
from threads.authentication import create_key
from threads.ids import new_id
from threads.models import ApiKey, Message, Thread
from tools import task_ids
from tools.models import ToolAttempt, ToolCall, Worker

POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs_chromium,
    pytest.mark.timeout(300),  # a browser starts, and opens some 40 pages
]


def under_policy(get_response: Any) -> Any:
    """A middleware: every answer carries the policy."""

    def answer(request: Any) -> Any:
        response = get_response(request)
        response["Content-Security-Policy"] = POLICY
        return response

    return answer


@pytest.fixture
def story(transactional_db: None, cast: Cast, scripted_model: ScriptedModel) -> list[str]:
    """Runs in many states, and the URLs of the pages that show them."""
    owner = User.objects.create_user("mara")
    desk = cast(name="support", tools=[look_up], instructions="Be brief. Say which order you mean.", max_steps=20)
    cast(name="writer", instructions=_for_the_reader)
    runs = []
    titles = ("Where is order 1042?", "Two orders in one parcel", f"Hostile {HOSTILE}", "Wrong size, return wanted")
    for number, title in enumerate(titles, start=1):
        scripted_model.say(
            ["I look both orders up.", call("look_up", number=1041 + number, note=title), call("look_up", number=13)],
            f"Order {1041 + number} left our house this morning. Of order 13 I find nothing. {title}",
        )
        run = run_to_end(desk.start(title, owner=owner, metadata={"channel": "mail", "ticket": 7000 + number}))
        Thread.objects.filter(pk=run.thread_id).update(title=title, agent="support")
        task = task_ids.new("run", run.pk, 1)
        Leg.objects.filter(run=run).update(task_id=task)
        Usage.objects.create(
            run=run, step=1, epoch=1, message_id=new_id(), model="scripted:x", input_tokens=812, output_tokens=64
        )
        runs.append(run)
    state = State(scripted_model)
    waiting, unknown, held = state.waiting(), state.unknown(), state.held()
    stopped = state.waiting().cancel("The customer has called.")
    create_key(owner, "laptop")
    for number, kind in enumerate(("agents", "tools", "control"), start=1):
        Worker.objects.create(name=f"{kind}@shop", kind=kind, host="shop", pid=4000 + number, lock_key=number)
    shown: list[Any] = [*runs, waiting, unknown, held, stopped, runs[2].thread, ApiKey.objects.first()]
    shown += [model.objects.filter(run=runs[2]).first() for model in (Leg, Step, Event, Usage)]
    call_of = ToolCall.objects.filter(run_id=runs[2].pk).order_by("index")
    shown += [*call_of, *Message.objects.filter(run_id=runs[2].pk), ToolAttempt.objects.first(), Worker.objects.first()]
    models = (Thread, ApiKey, Message, Run, Leg, Step, Event, Usage, ToolCall, ToolAttempt, Worker)
    urls = [reverse("admin:index"), reverse("admin:longhaul_runs_agents"), reverse("admin:longhaul_threads_apikey_add")]
    urls += [reverse("admin:app_list", args=[app]) for app in ("longhaul_threads", "longhaul_tools", "longhaul_runs")]
    urls += [list_of(model) for model in models] + [page_of(each) for each in shown]
    urls += [list_of(Run, q="mara"), list_of(Event, run=runs[0].pk), list_of(Run, status="failed")]
    urls += [reverse("admin:longhaul_runs_run_cancel", args=[waiting.pk])]
    urls += [reverse("admin:longhaul_threads_thread_delete", args=[waiting.thread_id])]
    return urls


def _for_the_reader(run: Run) -> str:
    return f"Write for reader {run.owner_id}."


@pytest.fixture
def signed_in(transactional_db: None) -> str:
    """The cookie of a superuser's session."""
    client = Client()
    client.force_login(User.objects.create_superuser("admin"))
    return client.cookies["sessionid"].value


@pytest.fixture
def agent(cast: Cast) -> Agent:
    return cast(name="clerk")


@pytest.fixture
def server(transactional_db: None, settings: Any) -> Iterator[str]:
    """The URL of a server of this test's own, for its middleware is another: it sends the policy."""
    settings.MIDDLEWARE = [f"{__name__}.under_policy", *settings.MIDDLEWARE]
    running = LiveServer("localhost")
    yield running.url
    running.stop()


@pytest.fixture
def page(server: str, signed_in: str) -> Iterator[Any]:
    """A page of a browser that is signed in."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1440, "height": 1000})
        context.add_cookies([{"name": "sessionid", "value": signed_in, "url": server}])
        yield context.new_page()
        browser.close()


def test_every_page_is_clean_under_the_policy(story: list[str], server: str, page: Any) -> None:
    told: list[str] = []
    page.on("console", lambda message: _note(told, page.url, message))
    page.on("pageerror", lambda error: told.append(f"{page.url}: {error}"))
    page.on("requestfailed", lambda request: told.append(f"{page.url}: {request.url} failed"))
    page.on("dialog", lambda dialog: told.append(f"{page.url}: a dialog: {dialog.message}"))
    pictures = os.environ.get("LONGHAUL_SHOTS")  # a folder, for a person who wants to see the pages
    for number, url in enumerate(story):
        answer = page.goto(server + url)
        assert answer.status == 200, url
        assert answer.headers["content-security-policy"] == POLICY
        assert page.locator("img[src='x']").count() == 0, url
        for each in page.locator("details:not([open]) > summary").all()[:5]:
            if each.is_visible():
                each.click()
        if pictures:
            page.screenshot(path=f"{pictures}/{number:02}.png", full_page=True)
    assert told == []


def _note(told: list[str], url: str, message: Any) -> None:
    # Browsers ask for a favicon by themselves, which is the project's to have or not.
    if not message.location["url"].endswith("/favicon.ico"):
        told.append(f"{url}: {message.type}: {message.text}")


def test_a_run_is_cancelled_with_clicks(
    agent: Agent, server: str, signed_in: str, request: pytest.FixtureRequest
) -> None:
    run = agent.start("Go on for ever.")
    url = page_of(run)
    page = request.getfixturevalue("page")
    told: list[str] = []
    page.on("console", lambda message: _note(told, page.url, message))
    page.goto(server + url)
    page.click("text=Cancel run")
    page.fill("input[name=reason]", "It repeats itself.")
    page.click("input[type=submit]")
    page.wait_for_url(f"**{url}")
    assert told == []
    assert "1 run cancelled." in page.inner_text(".messagelist")
    assert "It repeats itself." in page.inner_text(".field-error_")
    assert page.locator("text=Cancel run").count() == 0
