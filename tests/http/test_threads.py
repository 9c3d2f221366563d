"""Threads over HTTP: made, changed, listed, deleted, and whose status they show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest

from runs.agents import Agent
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, run_to_end
from tests.http.conftest import Api, refusal
from tests.runs.scenes import rows
from threads import transcript
from threads.models import Message, Thread

pytestmark = pytest.mark.django_db


def test_a_thread_that_is_deleted_under_a_request_is_not_found(
    api: Api, helper: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(thread_id: UUID) -> bool:
        Thread.objects.filter(pk=thread_id).delete()
        return lock(thread_id)

    lock = transcript.lock_occupant
    for path, body in (("runs", {"agent": "helper", "input": "Hello"}), ("messages", {"content": "Hello"})):
        thread = Thread.objects.create(owner=api.user)
        monkeypatch.setattr(transcript, "lock_occupant", gone)
        api.post(f"/api/threads/{thread.pk}/{path}", body, 404)
        monkeypatch.undo()


FIELDS: dict[str, Any] = {
    "agent": "helper",
    "title": "Order 1042",
    "summary": "Asks where it is.",
    "metadata": {"customer": 7},
    "model": "openai:other",
    "instructions": "Be brief.",
    "tools": [],
    "limits": {"max_steps": 5},
    "context": {"last_messages": 20},
}


def test_a_thread_has_what_it_was_given(api: Api, helper: Agent) -> None:
    answer = api.call("post", "/api/threads", {**FIELDS, "messages": [{"content": "hello"}]}, status=201)
    thread = answer.json()
    assert answer["Location"] == f"/api/threads/{thread['id']}"
    assert {name: thread[name] for name in FIELDS} == FIELDS
    assert (thread["status"], thread["run"], thread["archived"]) == (None, None, False)
    assert api.get(answer["Location"]) == thread
    said = api.get(f"{answer['Location']}/messages")["results"]
    assert [(message["role"], message["status"], message["run"]) for message in said] == [("user", "completed", None)]
    assert not Run.objects.exists()
    assert Thread.objects.get().owner_id == api.user.pk


def test_an_empty_thread_needs_nothing(api: Api) -> None:
    thread = api.post("/api/threads", {}, 201)
    assert (thread["agent"], thread["title"], thread["metadata"], thread["tools"]) == (None, "", {}, None)
    assert api.call("post", "/api/threads", status=201).json()["agent"] is None  # no body at all


def test_a_change_leaves_what_is_left_out(api: Api, helper: Agent) -> None:
    thread = api.post("/api/threads", FIELDS, 201)
    path = f"/api/threads/{thread['id']}"
    assert api.patch(path, {}) == thread
    assert api.patch(path, {"title": "Order 1043"}) == {**thread, "title": "Order 1043"}
    assert api.patch(path, {"limits": {"max_cost": 2.0}})["limits"] == {"max_cost": 2.0}  # what is given replaces
    gone = api.patch(path, dict.fromkeys(FIELDS))
    assert {name: gone[name] for name in FIELDS} == {
        **dict.fromkeys(FIELDS),
        "title": "",
        "summary": "",
        "metadata": {},
    }
    assert Thread.objects.get().overrides == {}


def test_a_thread_is_put_into_the_archive_and_taken_out(api: Api) -> None:
    path = f"/api/threads/{api.post('/api/threads', {}, 201)['id']}"
    assert api.patch(path, {"archived": True})["archived"]
    since = Thread.objects.get().archived_at
    assert api.patch(path, {"archived": True, "title": "still"})["archived"]
    assert Thread.objects.get().archived_at == since
    assert api.patch(path, {"archived": None})["archived"]
    assert not api.patch(path, {"archived": False})["archived"]


@pytest.mark.parametrize(
    ("body", "attr"),
    [
        ({"agent": "nobody"}, "agent"),
        ({"agent": 7}, "agent"),
        ({"agent": "helper", "tools": ["fly"]}, "tools"),
        ({"model": "nobody:x"}, "model"),
        ({"title": "x" * 501}, "title"),
        ({"title": 5}, "title"),
        ({"metadata": "a"}, "metadata"),
        ({"limits": {"max_steps": 0}}, "limits.max_steps"),
        ({"limits": {"max_total_tokens": 10**13}}, "limits.max_total_tokens"),
        ({"context": {"last_messages": "5"}}, "context.last_messages"),
        ({"status": "queued"}, "status"),
        ({"owner": 1}, "owner"),
        ({"archived": "yes"}, "archived"),
        ({"tool_choice": "sing", "agent": "helper"}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"output_schema": {}}, "output_schema"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_and_nothing_is_changed(api: Api, helper: Agent, body: Any, attr: str) -> None:
    thread = api.post("/api/threads", FIELDS, 201)
    before = rows()
    assert refusal(api.patch(f"/api/threads/{thread['id']}", body, 400))[1] == attr
    assert refusal(api.post("/api/threads", body, 400))[1] == attr
    assert rows() == before


def test_one_bad_message_saves_neither_thread_nor_messages(api: Api) -> None:
    before = rows()
    for messages, attr in (
        ([{"content": "a"}, {"content": 5}], "messages.1.content"),
        ([{"content": "a"}, {"content": [{"type": "reasoning"}]}], "messages.1.content.0.text"),
        ([{"content": "a"}, {"content": "b", "metadata": {"huge": 2**80}}], "messages.1.metadata"),
    ):
        assert refusal(api.post("/api/threads", {"messages": messages}, 400))[1] == attr
    assert rows() == before


def test_tools_are_checked_when_the_agent_comes_later(api: Api, helper: Agent) -> None:
    thread = api.post("/api/threads", {"tools": ["fly"]}, 201)
    assert refusal(api.patch(f"/api/threads/{thread['id']}", {"agent": "helper"}, 400)) == ("invalid", "tools")
    assert api.patch(f"/api/threads/{thread['id']}", {"agent": "helper", "tools": None})["agent"] == "helper"


def test_a_change_takes_no_messages(api: Api) -> None:
    thread = api.post("/api/threads", {}, 201)
    answer = api.patch(f"/api/threads/{thread['id']}", {"messages": []}, 400)
    assert refusal(answer) == ("unknown_field", "messages")


def test_a_thread_shows_the_status_of_its_live_run_or_of_its_last_one(
    api: Api, helper: Agent, scripted_model: ScriptedModel
) -> None:
    path = f"/api/threads/{api.post('/api/threads', {'agent': 'helper'}, 201)['id']}"
    first, second = (api.post(f"{path}/runs", {"input": text}, 202) for text in ("one", "two"))

    def shown() -> tuple[str, str]:
        thread = api.get(path)
        assert api.get("/api/threads")["results"] == [thread]
        return thread["status"], thread["run"]

    assert shown() == ("queued", first["id"])  # though a held run came later
    scripted_model.say("1", "2")
    run_to_end(Run.objects.get(pk=first["id"]))
    assert shown() == ("queued", second["id"])
    run_to_end(Run.objects.get(pk=second["id"]))
    assert shown() == ("completed", second["id"])
    third = api.post(f"{path}/runs", {"input": "three"}, 202)
    api.post(f"/api/runs/{third['id']}/cancel")
    assert shown() == ("cancelled", third["id"])


def test_deleting_a_thread_cancels_its_runs_first(api: Api, helper: Agent, scripted_model: ScriptedModel) -> None:
    path = f"/api/threads/{api.post('/api/threads', {'agent': 'helper'}, 201)['id']}"
    scripted_model.say("done")
    ended = api.post(f"{path}/runs", {"input": "one"}, 202)
    run_to_end(Run.objects.get(pk=ended["id"]))
    live = api.post(f"{path}/runs", {"input": "two"}, 202)
    held = api.post(f"{path}/runs", {"input": "three"}, 202)
    assert api.delete(path).content == b""
    for gone in (path, *(f"/api/runs/{run['id']}" for run in (ended, live, held))):
        assert refusal(api.get(gone, 404)) == ("not_found", None)
    assert not Message.objects.exists()
    assert api.delete(path, 404)


def test_threads_are_listed_by_agent_order_and_archive(api: Api, helper: Agent) -> None:
    made = [
        api.post("/api/threads", {"title": str(place), "agent": "helper" if place % 2 else None}, 201)["id"]
        for place in range(4)
    ]
    api.patch(f"/api/threads/{made[3]}", {"archived": True})

    def listed(query: str = "") -> list[int]:
        return [made.index(thread["id"]) for thread in api.get(f"/api/threads?{query}")["results"]]

    assert listed() == [2, 1, 0]
    assert listed("order=asc") == [0, 1, 2]
    assert listed("archived=true") == [3]
    assert listed("archived=false&agent=helper") == [1]
    assert listed("agent=helper&agent=other&archived=true") == [3]
    assert listed("agent=other") == []


def test_somebody_elses_threads_are_not_there(api: Api, api_of: Callable[..., Api]) -> None:
    thread = api.post("/api/threads", {}, 201)
    other = api_of("bob")
    assert other.get("/api/threads")["results"] == []
    path = f"/api/threads/{thread['id']}"
    before = rows()
    other.get(path, 404)
    other.patch(path, {"title": "mine"}, 404)
    other.delete(path, 404)
    other.get(f"{path}/messages", 404)
    other.post(f"{path}/messages", {"content": "a"}, 404)
    other.post(f"{path}/runs", {"input": "a", "agent": "helper"}, 404)
    assert rows() == before


def test_an_unchanged_thread_is_not_sent_again(api: Api, helper: Agent) -> None:
    path = f"/api/threads/{api.post('/api/threads', {'agent': 'helper'}, 201)['id']}"
    for address in (path, "/api/threads", f"{path}/messages", "/api/runs"):
        first = api.call("get", address, status=200)
        again = api.call("get", address, status=304, **{"If-None-Match": first["ETag"]})
        assert (again.content, again["ETag"]) == (b"", first["ETag"])
        api.call("get", address, status=200, **{"If-None-Match": '"another"'})
    tag = api.call("get", path)["ETag"]
    run = api.post(f"{path}/runs", {"input": "a"}, 202)
    changed = api.call("get", path, status=200, **{"If-None-Match": tag})
    assert changed.json()["run"] == run["id"]


def test_what_is_not_there_is_not_found(api: Api) -> None:
    api.patch(f"/api/threads/{uuid4()}", {}, 404)
    api.delete(f"/api/threads/{uuid4()}", 404)
