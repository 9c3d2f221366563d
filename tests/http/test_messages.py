"""Messages over HTTP: saved, listed as they stand in their thread, deleted; and a list that a stream goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from runs import agents, lifecycle
from runs.agents import Agent
from runs.http import threads as http_threads
from runs.models import Run
from runs.providers.port import ModelEvent, ModelRequest, ReasoningDelta, TextDelta
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from tests.http.conftest import Api
from tests.runs.scenes import Together, rows, speaking
from threads.models import Message
from tools import tool

pytestmark = pytest.mark.django_db


@tool
def look_up(number: int) -> str:
    """Find an order."""
    return f"order {number}"


@pytest.fixture
def clerk(helper: Agent) -> Agent:
    return agents.registry.add(Agent(name="clerk", model="openai:test", tools=[look_up]))


@pytest.fixture
def path(api: Api, helper: Agent) -> str:
    """Of a thread."""
    return f"/api/threads/{api.post('/api/threads', {'agent': 'helper'}, 201)['id']}"


def text_of(message: Any) -> str:
    return "".join(part.get("text", "") for part in message["content"])


def texts(page: Any) -> list[str]:
    return [text_of(message) for message in page["results"]]


def walked(api: Api, address: str, way: str = "next") -> list[str]:
    """All texts, page after page."""
    found = []
    page = api.get(address)
    while True:
        found += texts(page) if way == "next" else texts(page)[::-1]
        if page[way] is None:
            return found
        page = api.get(page[way])


# --- saved ----------------------------------------------------------------------------------------------------------


def test_one_message_or_a_list_of_them_is_saved(api: Api, path: str) -> None:
    one = api.post(f"{path}/messages", {"content": "one", "metadata": {"a": 1}, "client_id": "c-1"}, 201)["results"]
    more = [{"role": "assistant", "content": "two"}, {"role": "system", "content": [{"type": "text", "text": "three"}]}]
    two = api.post(f"{path}/messages", more, 201)["results"]
    assert [message["role"] for message in one + two] == ["user", "assistant", "system"]
    assert (one[0]["metadata"], one[0]["client_id"], one[0]["status"]) == ({"a": 1}, "c-1", "completed")
    assert (two[0]["metadata"], two[0]["client_id"], two[0]["run"]) == ({}, None, None)
    assert api.get(f"{path}/messages")["results"] == one + two
    assert not Run.objects.exists()


@pytest.mark.parametrize(
    ("bad", "attr"),
    [
        ({"content": 5}, "content"),
        ({}, "content"),
        ({"content": "a", "role": "tool"}, "role"),
        ({"content": "a", "colour": "red"}, "colour"),
        ({"content": [{"type": "tool_result"}]}, "content.0.type"),
        ({"content": [{"type": "text", "text": 5}]}, "content.0.text"),
        ({"content": [{"type": "text"}]}, "content.0.text"),
        ({"content": "a", "metadata": 5}, "metadata"),
        ({"content": "a", "metadata": {"huge": 2**80}}, "metadata"),
        ({"content": "a", "client_id": "x" * 201}, "client_id"),
    ],
    ids=str,
)
def test_one_bad_message_saves_none(api: Api, path: str, bad: Any, attr: str) -> None:
    before = rows()
    for body, prefix in (([{"content": "good"}, bad], "1."), (bad, "")):
        answer = api.post(f"{path}/messages", body, 400)
        assert prefix + attr in [error["attr"] for error in answer["errors"]]
    api.post(f"{path}/messages", [], 400)
    api.post(f"{path}/messages", b'"hello"', 400)
    assert rows() == before


def test_a_message_saved_while_a_run_is_live_waits_for_its_place(
    api: Api, path: str, scripted_model: ScriptedModel
) -> None:
    run = api.post(f"{path}/runs", {"input": "question"}, 202)
    saved = api.post(f"{path}/messages", [{"content": "by the way"}, {"content": "and"}], 201)["results"]
    assert [message["status"] for message in saved] == ["waiting", "waiting"]
    page = api.get(f"{path}/messages")
    assert texts(page) == ["question", "by the way", "and"]
    assert page["cursor"] == {"run": run["id"], "seq": api.get(f"/api/runs/{run['id']}")["last_seq"]}
    scripted_model.say("answer")
    run_to_end(Run.objects.get(pk=run["id"]))
    placed = api.get(f"{path}/messages")
    assert sorted(texts(placed)) == sorted(["question", "by the way", "and", "answer"])
    assert {message["status"] for message in placed["results"]} == {"completed"}
    assert placed["cursor"] == {"run": run["id"], "seq": api.get(f"/api/runs/{run['id']}")["last_seq"]}
    assert_invariants()


# --- listed ---------------------------------------------------------------------------------------------------------


def test_messages_are_listed_by_status_kind_place_and_order(
    api: Api, path: str, clerk: Agent, scripted_model: ScriptedModel
) -> None:
    scripted_model.say(["I look.", call("look_up", number=7)], "There.", "Again.")
    run = api.post(f"{path}/runs", {"agent": "clerk", "input": "where?"}, 202)
    run_to_end(Run.objects.get(pk=run["id"]))
    again = api.post(f"/api/runs/{run['id']}/retry", status=202)
    run_to_end(Run.objects.get(pk=again["id"]))
    api.post(f"{path}/runs", {"agent": "clerk", "input": "live"}, 202)
    api.post(f"{path}/messages", {"content": "later"}, 201)

    def listed(query: str) -> list[str]:
        return [text_of(message) or message["role"] for message in api.get(f"{path}/messages?{query}")["results"]]

    every = ["where?", "I look.", "tool", "Again.", "live", "later"]
    assert listed("") == every
    assert listed("order=desc") == every[::-1]
    assert listed("status=superseded") == ["There."]
    assert listed("status=waiting&status=superseded") == ["There.", "later"]
    assert listed("kind=tool") == ["I look.", "tool"]
    assert listed("kind=text") == ["where?", "Again.", "live", "later"]
    ids = {text_of(message): message["id"] for message in api.get(f"{path}/messages")["results"]}
    assert listed(f"after={ids['Again.']}") == ["live", "later"]
    assert listed(f"after={ids['Again.']}&order=desc") == ["tool", "I look.", "where?"]
    assert listed(f"after={ids['later']}") == []
    assert listed(f"after={ids['later']}&order=desc") == every[-2::-1]
    superseded = api.get(f"{path}/messages?status=superseded")["results"][0]["id"]
    assert listed(f"after={superseded}") == ["Again.", "live", "later"]
    for wrong in (f"after={uuid4()}", "after=7", "kind=image", "status=lost", "order=up", "colour=red"):
        answer = api.get(f"{path}/messages?{wrong}", 400)
        assert answer["errors"][0]["attr"].partition(".")[0] == wrong.partition("=")[0]


def test_pages_hold_each_message_once_those_that_wait_too(api: Api, path: str) -> None:
    api.post(f"{path}/messages", [{"content": f"{place:02}"} for place in range(7)], 201)
    api.post(f"{path}/runs", {"input": "07"}, 202)
    for place in range(8, 13):
        api.post(f"{path}/messages", {"content": f"{place:02}"}, 201)
    every = [f"{place:02}" for place in range(13)]
    for limit in (1, 2, 3, 12, 13):
        assert walked(api, f"{path}/messages?limit={limit}") == every
        assert walked(api, f"{path}/messages?limit={limit}&order=desc") == every[::-1]
    last = api.get(f"{path}/messages?limit=3")
    while last["next"]:
        last = api.get(last["next"])
    assert texts(last) == every[-1:]
    assert walked(api, last["previous"], "previous") == every[-2::-1]
    assert (
        walked(api, f"{path}/messages?order=desc&limit=2&after={api.get(f'{path}/messages')['results'][9]['id']}")
        == (every[8::-1])
    )


def test_a_message_that_gets_its_place_between_two_pages_is_not_lost(
    api: Api, path: str, scripted_model: ScriptedModel
) -> None:
    run = api.post(f"{path}/runs", {"input": "0"}, 202)
    for place in range(1, 5):
        api.post(f"{path}/messages", {"content": str(place)}, 201)
    page = api.get(f"{path}/messages?limit=1")
    scripted_model.say("answer")
    run_to_end(Run.objects.get(pk=run["id"]))
    found = texts(page) + walked(api, page["next"])
    assert sorted(found) == ["0", "1", "2", "3", "4", "answer"]


# --- snapshot and stream --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upto", range(6))
def test_snapshot_and_events_join_without_gap_or_double(api: Api, path: str, helper: Agent, upto: int) -> None:
    """The list is read in the middle of an answer; what comes after its cursor makes the answer whole."""
    pieces: list[ModelEvent] = [
        ReasoningDelta("Let me "), ReasoningDelta("think."), TextDelta("It is "), TextDelta("on its "), TextDelta("way."),
    ]  # fmt: skip
    seen: list[Any] = []

    def speak(request: ModelRequest) -> Iterator[ModelEvent]:
        for number, piece in enumerate([*pieces, None]):
            if number == upto:
                seen.append(api.get(f"{path}/messages"))
            if piece is not None:
                yield piece

    with speaking(speak):
        run = api.post(f"{path}/runs", {"input": "where?"}, 202)
        run_to_end(Run.objects.get(pk=run["id"]))
    page = seen[0]
    cursor = page["cursor"]
    assert cursor["run"] == run["id"]
    pending = page["results"][-1]
    assert (pending["status"], pending["role"], pending["run"]) == ("pending", "assistant", run["id"])
    told = {"reasoning": "", "text": ""}
    for part in pending["content"]:
        told[part["type"]] += part["text"]
    rest = api.get(f"/api/runs/{run['id']}/events?after={cursor['seq']}")
    assert [event["seq"] for event in rest["results"]] == list(range(cursor["seq"] + 1, rest["last_seq"] + 1))
    for event in rest["results"]:
        if event["type"] in ("text.delta", "reasoning.delta"):
            assert event["message"] == pending["id"]
            told[event["type"].partition(".")[0]] += event["text"]
    assert told == {"reasoning": "Let me think.", "text": "It is on its way."}
    whole = api.get(f"{path}/messages")["results"][-1]
    assert whole["id"] == pending["id"]
    assert "".join(part["text"] for part in whole["content"] if part["type"] == "text") == told["text"]


@pytest.mark.django_db(transaction=True)
def test_what_is_spoken_between_two_reads_of_the_list_comes_by_the_stream(
    api: Api, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cursor and the messages are one moment's, though they are read one after another."""
    run = Run.objects.get(pk=api.post(f"{path}/runs", {"input": "where?"}, 202)["id"])
    pending = Message.objects.create(
        thread_id=run.thread_id, run_id=run.pk, role="assistant", status="pending", position=2
    )
    Run.objects.filter(pk=run.pk).update(
        status="running", holder=uuid4(), epoch=1, pending_message_id=pending.pk, next_publish_at=None
    )

    def speak(text: str) -> None:
        kind = "text.delta" if text else "message.created"
        lifecycle.record(run.pk, kind, {"message": str(pending.pk), "text": text})

    speak("")
    speak("Before.")
    real = http_threads.page_of_messages

    def meanwhile(*given: Any, **named: Any) -> Any:
        assert Together(lambda: speak("Between.")).join() == [None]
        return real(*given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(http_threads, "page_of_messages", meanwhile)
        page = api.get(f"{path}/messages")
    assert text_of(page["results"][-1]) == "Before."
    rest = api.get(f"/api/runs/{run.pk}/events?after={page['cursor']['seq']}")["results"]
    assert [event["text"] for event in rest] == ["Between."]


# --- deleted --------------------------------------------------------------------------------------------------------


def test_a_message_is_deleted_but_not_under_a_run_nor_half_a_step(
    api: Api, path: str, clerk: Agent, scripted_model: ScriptedModel
) -> None:
    scripted_model.say(call("look_up", number=7), "There.")
    run = api.post(f"{path}/runs", {"agent": "clerk", "input": "where?"}, 202)
    said = api.get(f"{path}/messages")["results"][0]
    waiting = api.post(f"{path}/messages", {"content": "waits"}, 201)["results"][0]
    before = rows()
    assert api.delete(f"/api/messages/{said['id']}", 409).json()["errors"][0]["code"] == "thread_busy"
    assert rows() == before
    api.delete(f"/api/messages/{waiting['id']}")
    run_to_end(Run.objects.get(pk=run["id"]))
    question, asked, result, answer = api.get(f"{path}/messages")["results"]
    before = rows()
    for part in (asked, result):
        assert api.delete(f"/api/messages/{part['id']}", 409).json()["errors"][0]["code"] == "part_of_a_step"
    assert rows() == before
    for gone in (answer, question):
        api.delete(f"/api/messages/{gone['id']}")
        api.delete(f"/api/messages/{gone['id']}", 404)
    assert [message["id"] for message in api.get(f"{path}/messages")["results"]] == [asked["id"], result["id"]]


def test_somebody_elses_message_is_not_there(api: Api, path: str, api_of: Any) -> None:
    saved = api.post(f"{path}/messages", {"content": "mine"}, 201)["results"][0]
    api_of("bob").delete(f"/api/messages/{saved['id']}", 404)
    assert Message.objects.filter(pk=UUID(saved["id"])).exists()
