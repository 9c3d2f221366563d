"""The long poll: at once when there is nothing to wait for, else when it comes, and in time."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.test import AsyncClient

from runs import events
from runs.agents import Agent
from runs.http import streams
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, run_to_end
from tests.http.conftest import Api
from tests.http.test_streams import FAR, cancel, connections_of, http
from tests.http.test_streams import _no_longer_permitted as no_longer_permitted
from tests.http.test_streams import _revoked as revoked
from tests.http.web import Web

pytestmark = pytest.mark.django_db(transaction=True)


async def waited(api: Api, run: Run, query: str = "") -> Any:
    response = await AsyncClient().get(
        f"/api/runs/{run.pk}/wait{query}", headers={"Authorization": f"Bearer {api.key}"}
    )
    assert response.status_code == 200, response.content
    return response.json()


async def listening(run: Run) -> None:
    """Until somebody waits for the run."""
    from runs import bells

    while bells.run_channel(run.pk) not in bells.ear()._events:
        await asyncio.sleep(0.01)  # between looks at a condition


async def test_a_finished_run_is_answered_at_once(
    api: Api, helper: Agent, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", FAR)
    scripted_model.say("It is on its way.")
    run = await sync_to_async(helper.start)("Where is it?", owner=api.user)
    await sync_to_async(run_to_end)(run)
    told = await waited(api, run, "?timeout_seconds=300")
    assert (told["status"], told["output"]) == ("completed", "It is on its way.")
    assert told == await sync_to_async(api.get)(f"/api/runs/{run.pk}")


@pytest.mark.parametrize("lose", [revoked, no_longer_permitted])
async def test_who_may_no_longer_see_the_run_is_not_told_of_its_end(
    api_of: Any, live: Run, lose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CHECK_SECONDS", 0.0)
    staff = await sync_to_async(api_of)("staff", is_staff=True, is_superuser=True)
    told = {"Authorization": f"Bearer {staff.key}"}
    waiting = asyncio.ensure_future(AsyncClient().get(f"/api/runs/{live.pk}/wait?timeout_seconds=100", headers=told))
    await listening(live)
    await lose(staff, live)
    await cancel(live)
    assert (await waiting).status_code == 404


async def test_it_answers_when_the_run_ends(api: Api, live: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", FAR)  # so it is the bell that wakes it
    waiting = asyncio.create_task(waited(api, live, "?timeout_seconds=100"))
    await listening(live)
    assert not waiting.done()
    await cancel(live)
    assert (await waiting)["status"] == "cancelled"


async def test_it_answers_in_time_with_the_run_as_it_is(api: Api, live: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", FAR)  # which must not make it longer
    for query in ("?timeout_seconds=0", "?timeout_seconds=0.3"):
        begin = time.monotonic()
        told = await waited(api, live, query)
        assert time.monotonic() - begin < 20  # seconds, on a busy machine
        assert told["status"] == "queued"
        assert told["why"].startswith("queued for")


async def test_until_it_needs_somebody(api: Api, live: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.02)

    async def needs() -> None:
        await listening(live)
        await Run.objects.filter(pk=live.pk).aupdate(status="requires_action")

    told, _ = await asyncio.gather(waited(api, live, "?timeout_seconds=100&until=requires_action"), needs())
    assert told["status"] == "requires_action"
    # Who waits for the end goes on waiting, for as long as they said.
    begin = time.monotonic()
    assert (await waited(api, live, "?timeout_seconds=0.5"))["status"] == "requires_action"
    assert time.monotonic() - begin >= 0.5
    await Run.objects.filter(pk=live.pk).aupdate(status="queued")
    waiting = asyncio.create_task(waited(api, live, "?timeout_seconds=100&until=requires_action"))
    await listening(live)
    await cancel(live)
    assert (await waiting)["status"] == "cancelled"


async def test_a_run_that_is_deleted_meanwhile_is_not_found(
    api: Api, live: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.02)
    client = AsyncClient()
    waiting = asyncio.create_task(
        client.get(f"/api/runs/{live.pk}/wait", headers={"Authorization": f"Bearer {api.key}"})
    )
    await listening(live)
    await sync_to_async(Run.objects.filter(pk=live.pk).delete)()
    response = await waiting
    assert response.status_code == 404
    assert response.json()["errors"][0]["code"] == "not_found"


@pytest.mark.parametrize(
    "query",
    ["timeout_seconds=-1", "timeout_seconds=301", "timeout_seconds=nan", "timeout_seconds=inf", "timeout_seconds=x",
     "until=tomorrow", "timeout=3"],
)  # fmt: skip
def test_what_cannot_be_waited_for(api: Api, live: Run, query: str) -> None:
    told = api.get(f"/api/runs/{live.pk}/wait?{query}", 400)
    assert told["errors"][0]["attr"] == query.partition("=")[0]


def test_it_waits_under_wsgi_too(api: Api, live: Run) -> None:
    assert api.get(f"/api/runs/{live.pk}/wait?timeout_seconds=0.1")["status"] == "queued"
    live.cancel()
    assert api.get(f"/api/runs/{live.pk}/wait")["status"] == "cancelled"


@pytest.mark.slow
async def test_two_hundred_who_wait_hold_up_nobody(api: Api, helper: Agent, web: Web) -> None:
    """On one process with ten connections: they take none while they wait, and none waits for another's thread."""
    run = await sync_to_async(helper.start)("Where is it?", owner=api.user)
    other = await sync_to_async(helper.start)("And that?", owner=api.user)

    async with http(api, web) as client:

        async def seconds() -> float:
            begin = time.monotonic()
            assert (await client.get(f"/api/runs/{other.pk}")).status_code == 200
            return time.monotonic() - begin

        alone = statistics.median([await seconds() for _ in range(20)])
        waiting = [asyncio.create_task(client.get(f"/api/runs/{run.pk}/wait?timeout_seconds=100")) for _ in range(200)]
        await asyncio.sleep(3)  # seconds in which they arrive, and look again: what is measured is the time after it
        assert not any(each.done() for each in waiting)
        beside = [await seconds() for _ in range(30)]
        assert 0 < await sync_to_async(connections_of)(web) <= 10 + 2  # the pool's, and who else is there for a moment
        print(f"a plain GET beside 200 that wait: median {statistics.median(beside) / alone:.1f} times as long,"
              f" the longest {max(beside) / alone:.1f} times")  # fmt: skip
        assert max(beside) < 20  # seconds; were they served one after another, each look of 200 would come first
        await cancel(run)
        begin = time.monotonic()
        answers = await asyncio.gather(*waiting)
        assert {answer.json()["status"] for answer in answers} == {"cancelled"}
        print(f"all 200 were answered {(time.monotonic() - begin) / alone:.0f} times that long after the end")
        assert time.monotonic() - begin < 20  # seconds
