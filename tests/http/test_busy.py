"""Input to a busy thread over HTTP: the answers, their keys, and who may."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from runs import agents
from runs.agents import Agent
from runs.models import Run
from runs.providers.port import ModelEvent, ModelRequest, TextDelta, ToolCallDelta
from runs.pytest_longhaul import ScriptedModel, assert_invariants, run_to_end
from tests.http.conftest import Api, refusal
from tests.runs.scenes import add, rows, speaking
from threads.access import Policy
from threads.models import Message, Thread

pytestmark = pytest.mark.django_db
TAKES_ITS_PLACE = ("interrupt", "rollback")


@pytest.fixture
def path(live: Run) -> str:
    return f"/api/threads/{live.thread_id}/runs"


def test_a_steer_is_answered_with_the_live_run(api: Api, live: Run, path: str, scripted_model: ScriptedModel) -> None:
    scripted_model.say("Both.")
    answer = api.post(path, {"input": "and this", "busy": "steer", "client_id": "c"}, 202)
    assert (answer["id"], answer["status"]) == (str(live.pk), "queued")
    assert "rolled_back" not in answer
    listed = api.get(f"/api/threads/{live.thread_id}/messages")["results"]
    assert [(each["status"], each["client_id"]) for each in listed if each["status"] == "waiting"] == [("waiting", "c")]
    run_to_end(live)
    assert live.output == "Both."
    assert_invariants()


@pytest.mark.parametrize("busy", TAKES_ITS_PLACE)
def test_another_run_takes_the_place_of_the_live_one(api: Api, live: Run, path: str, busy: str) -> None:
    answer = api.post(path, {"input": "no, this", "busy": busy}, 202)
    assert (answer["parent"], answer["status"]) == (str(live.pk), "queued")
    old = api.get(f"/api/runs/{live.pk}")
    assert (old["status"], old["stop_reason"]) == (
        "cancelled", {"interrupt": "interrupted", "rollback": "rolled_back"}[busy],
    )  # fmt: skip
    assert answer["id"] in old["why"]
    assert api.get(f"/api/threads/{live.thread_id}")["run"] == answer["id"]
    wanted = {"run": str(live.pk), "tool_calls": []} if busy == "rollback" else None
    assert answer.get("rolled_back") == api.get(f"/api/runs/{answer['id']}").get("rolled_back") == wanted
    assert_invariants()


@pytest.mark.parametrize("busy", ["enqueue", "steer", *TAKES_ITS_PLACE])
def test_the_same_request_again_is_answered_as_the_first_time(api: Api, path: str, busy: str) -> None:
    body = {"input": "this", "busy": busy}
    first = api.post(path, body, 202, **{"Idempotency-Key": "k"})
    before = rows()
    assert api.post(path, body, 202, **{"Idempotency-Key": "k"}) == first
    assert rows() == before
    other = {"input": "this", "busy": "steer" if busy == "enqueue" else "enqueue"}
    assert refusal(api.post(path, other, 409, **{"Idempotency-Key": "k"}))[0] == "idempotency_conflict"
    assert rows() == before


def test_a_steer_without_input_is_refused(api: Api, path: str) -> None:
    before = rows()
    assert refusal(api.post(path, {"busy": "steer"}, 409))[0] == "nothing_to_do"
    assert rows() == before


def test_what_had_taken_effect_is_in_the_answer(api: Api, helper: Agent) -> None:
    adder = agents.registry.add(Agent(name="adder", model="scripted:x", tools=[add]))
    thread = Thread.objects.create(owner=api.user)
    answers: list[Any] = []

    def script(request: ModelRequest) -> Iterator[ModelEvent]:
        if len(voice.requests) == 1:
            yield ToolCallDelta(0, "x", "add", '{"a": 1, "b": 2}')
        else:
            body = {"agent": "helper", "input": "stop", "busy": "rollback"}
            answers.append(api.post(f"/api/threads/{thread.pk}/runs", body, 202))
            yield TextDelta("late")

    with speaking(script) as voice:
        run_to_end(adder.start("sum", thread=thread))
    [told] = answers[0]["rolled_back"]["tool_calls"]
    assert {key: told[key] for key in ("name", "arguments", "outcome", "effect")} == {
        "name": "add", "arguments": {"a": 1, "b": 2}, "outcome": "success", "effect": "taken",
    }  # fmt: skip
    run = answers[0]["rolled_back"]["run"]
    assert set(Message.objects.filter(run_id=run).values_list("status", flat=True)) <= {"rolled_back", "discarded"}
    assert_invariants()


class NoCancel(Policy):
    """Everybody may start runs; nobody may cancel one."""

    def may(self, user: Any, verb: str, obj: Any) -> bool:
        return verb != "cancel" and super().may(user, verb, obj)


@pytest.mark.parametrize("busy", TAKES_ITS_PLACE)
def test_who_may_not_cancel_a_run_may_not_take_its_place(
    api: Api, live: Run, path: str, busy: str, settings: Any
) -> None:
    settings.LONGHAUL = {"ACCESS": NoCancel}
    before = rows()
    api.post(path, {"input": "no, this", "busy": busy}, 403)
    assert rows() == before
    api.post(path, {"input": "and this", "busy": "steer"}, 202)
    live.cancel()
    [next_run] = Run.objects.filter(parent=live)
    next_run.cancel()
    api.post(path, {"input": "now it is free", "busy": busy}, 202)
