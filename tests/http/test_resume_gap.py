"""A reader whose cursor lies before what a retention setting has left is told so once, and then gets what is there."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.db.models import F
from django.test import AsyncClient, override_settings

from runs.agents import Agent
from runs.housekeeping import keep_house
from runs.http import events
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, run_to_end
from tests.http import frames
from tests.http.conftest import Api
from tests.http.test_schema import document, fits  # noqa: F401 (a fixture)


@pytest.fixture
def removed(api: Api, helper: Agent, scripted_model: ScriptedModel) -> Run:
    scripted_model.say("It is on its way.")
    run = run_to_end(helper.start("Where is it?", owner=api.user))
    Run.objects.filter(pk=run.pk).update(finished_at=F("finished_at") - timedelta(days=31))
    with override_settings(LONGHAUL={"EVENT_RETENTION_DAYS": 30}):
        assert keep_house().logs == 1
    return run


@pytest.mark.django_db
@pytest.mark.parametrize(("cursor", "limit"), [(0, 1000), (2, 1000), (0, 1)])
def test_a_page_of_events_begins_with_it(
    api: Api, removed: Run, cursor: int, limit: int, document: dict[str, Any]  # noqa: F811
) -> None:  # fmt: skip
    last = removed.last_seq

    page = api.get(f"/api/runs/{removed.pk}/events?after={cursor}&limit={limit}")

    assert page["results"][0] == {"type": "resume_gap", "from": cursor + 1, "to": last - 1}
    assert [event["seq"] for event in page["results"][1:]] == [last]
    assert (page["last_seq"], page["finished"]) == (last, True)
    fits(document, "Events", page)
    form = type(events.Event.model_validate(page["results"][0]).root)
    assert form is events.ResumeGapEvent


@pytest.mark.django_db
def test_who_has_seen_all_but_the_end_misses_nothing(api: Api, removed: Run) -> None:
    [end] = api.get(f"/api/runs/{removed.pk}/events?after={removed.last_seq - 1}")["results"]
    assert end["type"] == "run.completed"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("cursor", [0, 2])
async def test_a_stream_begins_with_it(api: Api, removed: Run, cursor: int) -> None:
    last = removed.last_seq

    answer: Any = await AsyncClient().get(
        f"/api/runs/{removed.pk}/stream?starting_after={cursor}", headers={"Authorization": f"Bearer {api.key}"}
    )
    [gap, end] = [each async for each in frames.frames(answer.streaming_content) if each.event]

    # Without an id: who is cut off behind it is told again
    assert (gap.event, gap.id) == ("resume_gap", None)
    assert gap.data == {"type": "resume_gap", "from": cursor + 1, "to": last - 1}
    assert (end.event, end.id) == ("run.completed", last)


@pytest.mark.django_db
def test_the_run_itself_is_shown_as_before(api: Api, removed: Run) -> None:
    assert api.get(f"/api/runs/{removed.pk}")["output"] == "It is on its way."
    assert api.get(f"/api/runs/{removed.pk}/messages")["results"]
    assert api.get(f"/api/runs/{removed.pk}/steps")["results"]
