"""Runs over HTTP: each start option has its effect, and each call its answer."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from runs.agents import Agent
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, run_to_end
from tests.http.conftest import Api

pytestmark = pytest.mark.django_db


def run_of(answer: Any) -> Run:
    return Run.objects.get(pk=answer["id"])


def test_a_run_is_started_on_a_new_thread_and_read_to_its_end(
    api: Api, helper: Agent, scripted_model: ScriptedModel
) -> None:
    scripted_model.say("It is on its way.")
    response = api.call("post", "/api/runs", {"agent": "helper", "input": "Where is it?"}, status=202)
    started = response.json()
    assert response["Location"] == f"/api/runs/{started['id']}"
    assert started["status"] == "queued"
    assert started["why"].startswith("queued for")
    run_to_end(run_of(started))

    ended = api.get(f"/api/runs/{started['id']}")
    assert (ended["status"], ended["output"], ended["steps"]) == ("completed", "It is on its way.", 1)
    said = api.get(f"/api/threads/{ended['thread']}/messages")
    assert [message["role"] for message in said["results"]] == ["user", "assistant"]
    assert said["cursor"] == {"run": None, "seq": 0}
    log = api.get(f"/api/runs/{started['id']}/events")
    assert log["finished"]
    assert [event["seq"] for event in log["results"]] == list(range(1, log["last_seq"] + 1))
    assert api.get(f"/api/threads/{ended['thread']}")["status"] == "completed"
    assert [step["number"] for step in api.get(f"/api/runs/{ended['id']}/steps")["results"]] == [1]
    assert [leg["reason"] for leg in api.get(f"/api/runs/{ended['id']}/legs")["results"]] == ["finished"]
    assert api.get(f"/api/runs/{ended['id']}/tool-calls")["results"] == []
    assert api.get("/api/runs?active=true")["results"] == []
    assert [run["id"] for run in api.get("/api/runs?active=false&agent=helper")["results"]] == [ended["id"]]


def test_what_is_not_there_is_not_found(api: Api) -> None:
    for path in ("runs", "threads", "tool-calls"):
        assert api.get(f"/api/{path}/{uuid4()}", 404)["errors"][0]["code"] == "not_found"
