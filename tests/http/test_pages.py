"""Lists a page at a time: every row once, whatever is added meanwhile, and no cursor but ours."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Callable
from itertools import chain
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit
from uuid import UUID, uuid4

import pytest

from runs.agents import Agent
from runs.models import Leg, Run, Status, Step
from tests.http.conftest import Api
from threads import clock
from threads.models import Message, Thread
from tools.models import ToolCall

pytestmark = pytest.mark.django_db

LISTS = [
    "/api/threads",
    "/api/threads?order=asc",
    "/api/runs",
    "/api/tool-calls",
    "/api/threads/{thread}/messages",
    "/api/threads/{thread}/messages?order=desc",
    "/api/runs/{run}/steps",
    "/api/runs/{run}/legs",
    "/api/runs/{run}/messages",
    "/api/runs/{run}/messages?order=desc",
    "/api/runs/{run}/tool-calls",
]
ROWS = 7


@pytest.fixture
def places(api: Api, helper: Agent) -> dict[str, str]:
    """A run with ROWS of each thing that is listed."""
    owner = api.user
    threads = [Thread.objects.create(owner=owner, agent="helper") for _ in range(ROWS)]
    thread = threads[0]
    runs = [ended(owner, each) for each in threads]
    for number in range(1, ROWS + 1):
        add(owner, thread, runs[0], number)
    return {"thread": str(thread.pk), "run": str(runs[0].pk)}


def ended(owner: Any, thread: Thread) -> Run:
    return Run.objects.create(
        owner=owner,
        thread=thread,
        agent="helper",
        status=Status.COMPLETED,
        stop_reason="end_turn",
        finished_at=clock.now(),
    )


def add(owner: Any, thread: Thread, run: Run, number: int) -> None:
    """One more of all that hangs on a run."""
    moment = clock.now()
    message = Message.objects.create(
        thread=thread, role="user", position=number, run_id=run.pk, content=[{"type": "text", "text": str(number)}]
    )
    leg = Leg.objects.create(
        run=run, number=number, epoch=number, worker_id=uuid4(), worker="w", ended_at=moment, reason="budget"
    )
    Step.objects.create(run=run, number=number, leg_id=leg.pk, epoch=number, message_id=message.pk, model="scripted:x")
    ToolCall.objects.create(
        run_id=run.pk, message_id=message.pk, step=number, index=0, name="look_up", status="settled", outcome="success",
        timeout=moment - moment, idempotency_key=str(number),
    )  # fmt: skip


def key(row: Any) -> Any:
    return row.get("id") or row["number"]


def keys(page: Any) -> list[Any]:
    return [key(row) for row in page["results"]]


def more(address: str, query: str) -> str:
    return f"{address}{'&' if '?' in address else '?'}{query}"


@pytest.mark.parametrize("address", LISTS)
@pytest.mark.parametrize("limit", [1, 3, ROWS])
def test_the_pages_are_the_list(api: Api, places: dict[str, str], address: str, limit: int) -> None:
    address = address.format(**places)
    every = keys(api.get(address))
    assert len(every) == len(set(every)) == ROWS
    page = api.get(more(address, f"limit={limit}"))
    assert page["previous"] is None
    there = [keys(page)]
    while page["next"]:
        page = api.get(page["next"])
        there.append(keys(page))
    assert list(chain(*there)) == every
    assert all(len(part) == limit for part in there[:-1])
    assert there[-1]  # the last page is not told by an empty one after it
    back = [keys(page)]
    while page["previous"]:
        page = api.get(page["previous"])
        back.append(keys(page))
    assert list(chain(*back[::-1])) == every


@pytest.mark.parametrize("address", ["/api/runs", "/api/threads", "/api/threads?order=asc"])
def test_rows_that_come_meanwhile_move_nothing(api: Api, places: dict[str, str], address: str) -> None:
    every = keys(api.get(address))
    page = api.get(more(address, "limit=2"))
    found = keys(page)
    added = []
    while page["next"]:
        run = ended(api.user, Thread.objects.create(owner=api.user))
        added.append(str(run.pk if address == "/api/runs" else run.thread_id))
        page = api.get(page["next"])
        found += keys(page)
        if len(found) > 4 * ROWS:
            break
    newer = address.endswith("asc")
    assert [each for each in found if each in every] == every
    assert len(found) == len(set(found))
    if not newer:
        assert found == every  # what is new stands before the first page
        while page["previous"]:
            page = api.get(page["previous"])
        assert keys(page)[0] == added[-1]


def test_rows_that_go_meanwhile_move_nothing(api: Api, places: dict[str, str]) -> None:
    every = keys(api.get("/api/runs"))
    page = api.get("/api/runs?limit=3")
    Run.objects.filter(pk__in=[UUID(each) for each in every[:3]]).delete()
    assert keys(api.get(page["next"])) == every[3:6]
    Run.objects.filter(pk__in=[UUID(each) for each in every[3:]]).delete()
    empty = api.get(page["next"])
    assert (empty["results"], empty["next"]) == ([], None)
    assert api.get(empty["previous"])["results"] == []


def test_an_empty_page_leads_back(api: Api, places: dict[str, str]) -> None:
    every = keys(api.get("/api/runs"))
    page = api.get("/api/runs?limit=3")
    Run.objects.filter(pk__in=[UUID(each) for each in every[3:]]).delete()
    assert keys(api.get(api.get(page["next"])["previous"])) == every[:3]


def test_filters_and_limit_stay_in_the_links(api: Api, places: dict[str, str]) -> None:
    page = api.get("/api/runs?limit=2&agent=helper&agent=other&status=completed&metadata.k%C3%A9y=")
    assert page["next"] is None
    asked = "limit=2&agent=helper&agent=other&status=completed&active=false"
    query = parse_qs(urlsplit(api.get(f"/api/runs?{asked}")["next"]).query)
    assert {name: query[name] for name in ("limit", "agent", "status", "active")} == {
        "limit": ["2"], "agent": ["helper", "other"], "status": ["completed"], "active": ["false"],
    }  # fmt: skip


def token(text: str) -> str:
    return urlsafe_b64encode(text.encode()).decode().rstrip("=")


TAMPERED = [
    "", "=", "====", "!", "ä", "a b", "AAAA", "x" * 5000, "bm8", "cD0x",
    token("a"), token("anothing"), token("a" + "9" * 40), token("z" + str(uuid4())), token(str(uuid4())),
    token("a-1"), token("a1.5"), token("a٣"), token("w" + str(uuid4())), token("aw"), token("a" + str(uuid4()) + "0"),
    token("a\x00"), "\x00", "r=1&p=x", "None",
]  # fmt: skip


@pytest.mark.parametrize("address", LISTS)
def test_a_cursor_that_no_list_gave_is_refused(api: Api, places: dict[str, str], address: str) -> None:
    for cursor in TAMPERED:
        answer = api.get(more(address.format(**places), f"cursor={quote(cursor)}"), 400)
        assert answer["errors"][0]["attr"] == "cursor", cursor


def test_a_cursor_of_another_list_or_owner_shows_nothing_else(
    api: Api, api_of: Callable[..., Api], places: dict[str, str]
) -> None:
    cursor = parse_qs(urlsplit(api.get("/api/runs?limit=2")["next"]).query)["cursor"][0]
    bob = api_of("bob")
    assert bob.get(f"/api/runs?cursor={cursor}")["results"] == []
    assert bob.get(f"/api/threads?cursor={cursor}")["results"] == []
    api.get(f"/api/runs/{places['run']}/steps?cursor={cursor}", 400)
    number = parse_qs(urlsplit(api.get(f"/api/runs/{places['run']}/steps?limit=2")["next"]).query)["cursor"][0]
    api.get(f"/api/runs?cursor={number}", 400)


@pytest.mark.parametrize("address", LISTS)
def test_limits_have_bounds(api: Api, places: dict[str, str], address: str) -> None:
    address = address.format(**places)
    for limit in ("0", "-1", "201", "a", "", "1.5", "9" * 30, "%00"):
        assert api.get(more(address, f"limit={limit}"), 400)["errors"][0]["attr"] == "limit"
    assert len(api.get(more(address, "limit=200"))["results"]) == ROWS
