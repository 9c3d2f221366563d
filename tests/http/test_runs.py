"""Runs over HTTP: each start option has its effect, and each call its answer."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, timedelta
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import pytest

from runs.agents import Agent, registry
from runs.models import Run, Usage
from runs.pytest_longhaul import ScriptedModel, call, run_to_end
from tests.http.conftest import Api, refusal
from tests.runs.scenes import asked, rows, texts
from threads import clock
from tools import RetryPolicy, tool
from tools.models import ToolCall

pytestmark = pytest.mark.django_db

TRIES: list[int] = []


@tool
def look_up(number: int) -> str:
    """Find an order."""
    return f"order {number}"


@tool(retry=RetryPolicy(attempts=2), idempotent=True)
def flaky() -> str:
    """Work at the second try."""
    TRIES.append(1)
    if len(TRIES) == 1:
        raise ConnectionError("not now")
    return "worked"


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
    assert said["cursor"] == {"run": started["id"], "seq": ended["last_seq"]}
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


# --- listed ---------------------------------------------------------------------------------------------------------


def test_runs_are_found_by_what_they_are(
    api: Api, helper: Agent, scripted_model: ScriptedModel, api_of: Callable[..., Api]
) -> None:
    registry.add(Agent(name="clerk", model="openai:test"))
    said: list[Any] = [
        {"ticket": 7, "kind": "refund"},
        {"ticket": "7", "open": True},
        {"ticket": 8, "open": None, "kéy": 1.5},
        {},
    ]
    made = [
        api.post("/api/runs", {"agent": agent, "input": "a", "metadata": metadata}, 202)
        for agent, metadata in zip(("helper", "clerk", "helper", "clerk"), said, strict=True)
    ]
    api_of("bob").post("/api/runs", {"agent": "helper", "input": "a", "metadata": said[0]}, 202)
    scripted_model.say("Done.")
    run_to_end(run_of(made[0]))
    api.post(f"/api/runs/{made[1]['id']}/cancel")
    held = api.post(f"/api/threads/{made[2]['thread']}/runs", {"input": "b"}, 202)
    made.append(held)

    def found(**query: Any) -> list[int]:
        listed = api.get(f"/api/runs?{urlencode(query, doseq=True)}")["results"]
        return sorted([run["id"] for run in made].index(run["id"]) for run in listed)

    assert found() == [0, 1, 2, 3, 4]
    assert found(active="true") == [2, 3, 4]
    assert found(active="false") == [0, 1]
    assert found(status="queued") == [2, 3]
    assert found(status=["held", "completed"]) == [0, 4]
    assert found(status="held", active="false") == []
    assert found(agent="clerk") == [1, 3]
    assert found(agent=["clerk", "helper"]) == [0, 1, 2, 3, 4]
    assert found(active="true", agent=["clerk", "helper"]) == [2, 3, 4]
    assert found(active="true", agent=["clerk", "nobody"]) == [3]
    assert found(thread=made[2]["thread"]) == [2, 4]
    assert found(thread=str(uuid4())) == []
    assert found(**{"metadata.ticket": 7}) == [0, 1]  # a query is text: the number and the text
    assert found(**{"metadata.ticket": 8}) == [2]
    assert found(**{"metadata.kind": "refund"}) == [0]
    assert found(**{"metadata.kind": "refund", "metadata.ticket": "8"}) == []
    assert found(**{"metadata.open": "true"}) == [1]
    assert found(**{"metadata.open": "null"}) == [2]
    assert found(**{"metadata.kéy": "1.5"}) == [2]
    assert found(**{"metadata.ticket": "1e999"}) == found(**{"metadata.ticket": "9" * 400}) == []
    assert found(**{"metadata.ticket": "[7"}) == found(**{'metadata.it\'s "%s" \\': "x"}) == []


@pytest.mark.parametrize(
    ("query", "attr"),
    [
        ("active=perhaps", "active"),
        ("status=lost", "status.0"),
        ("thread=7", "thread"),
        ("metadata.=a", "metadata."),
        ("metadata=a", "metadata"),
        ("colour=red", "colour"),
        ("agent=%00", "agent.0"),
        ("metadata.a=%00", "metadata.a"),
        ("metadata.%00=a", "metadata.\x00"),
    ],
)
def test_a_query_that_is_wrong_is_named(api: Api, query: str, attr: str) -> None:
    assert refusal(api.get(f"/api/runs?{query}", 400))[1] == attr


# --- read -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def worked(api: Api, helper: Agent, scripted_model: ScriptedModel) -> dict[str, Any]:
    """A run of two steps and two tool calls, one of which is tried twice."""
    registry.add(Agent(name="clerk", model="openai:test", instructions="Be brief.", tools=[look_up, flaky]))
    TRIES.clear()
    scripted_model.say([call("look_up", number=7), call("flaky")], "Found.")
    run = api.post("/api/runs", {"agent": "clerk", "input": "find"}, 202)
    run_to_end(run_of(run))
    found: dict[str, Any] = api.get(f"/api/runs/{run['id']}")
    return found


def test_steps_legs_and_messages_tell_what_was_done(api: Api, worked: dict[str, Any]) -> None:
    path = f"/api/runs/{worked['id']}"
    steps, legs, messages = (api.get(f"{path}/{name}")["results"] for name in ("steps", "legs", "messages"))
    assert [step["number"] for step in steps] == [1, 2]
    assert (worked["steps"], worked["legs"]) == (2, len(legs))
    assert [leg["number"] for leg in legs] == list(range(1, len(legs) + 1))
    assert {step["leg"] for step in steps} <= {leg["id"] for leg in legs}
    assert [leg["reason"] for leg in legs] == ["tools", "finished"]
    assert (steps[0]["model"], steps[0]["instructions"], steps[0]["tools"]) == (
        "openai:test", "Be brief.", ["look_up", "flaky"],
    )  # fmt: skip
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [step["message"] for step in steps] == [messages[1]["id"], messages[4]["id"]]
    assert worked["output"] == "Found."
    assert (worked["usage"]["input_tokens"], worked["usage"]["output_tokens"]) == (5, 2)


def test_tool_calls_tell_their_attempts(api: Api, worked: dict[str, Any], api_of: Callable[..., Api]) -> None:
    calls = api.get(f"/api/runs/{worked['id']}/tool-calls")["results"]
    assert [(each["name"], each["status"], each["outcome"]) for each in calls] == [
        ("look_up", "settled", "success"),
        ("flaky", "settled", "success"),
    ]
    assert (calls[0]["arguments"], calls[0]["result"]) == ({"number": 7}, "order 7")
    assert [(attempt["number"], attempt["outcome"]) for attempt in calls[1]["attempts"]] == [
        (1, "retrying"),
        (2, "success"),
    ]
    first, second = calls[1]["attempts"]
    assert first["worker_name"] == second["worker_name"] != ""
    assert first["ended_at"] <= first["next_try_at"] <= second["started_at"]
    assert (second["next_try_at"], second["duration_seconds"] >= 0) == (None, True)
    for each in calls:
        assert api.get(f"/api/tool-calls/{each['id']}") == each
        api_of(f"bob {each['name']}").get(f"/api/tool-calls/{each['id']}", 404)
        again = api.call("get", f"/api/tool-calls/{each['id']}", status=200)
        api.call("get", f"/api/tool-calls/{each['id']}", status=304, **{"If-None-Match": again["ETag"]})


def test_tool_calls_are_found_by_what_they_are(api: Api, worked: dict[str, Any]) -> None:
    first, second = api.get(f"/api/runs/{worked['id']}/tool-calls")["results"]

    def found(query: str) -> list[str]:
        return [each["id"] for each in api.get(f"/api/tool-calls?{query}")["results"]]

    assert found("") == found(f"run={worked['id']}") == found("status=settled") == [second["id"], first["id"]]
    assert found("name=flaky") == [second["id"]]
    assert found("name=flaky&name=look_up&status=running&status=settled") == [second["id"], first["id"]]
    assert found(f"run={uuid4()}") == found("status=unknown") == found("needs=approval") == []
    ToolCall.objects.filter(pk=first["id"]).update(status="unknown", outcome="", assignee=api.user)
    assert found("needs=decision") == found(f"assignee={api.user.pk}") == [first["id"]]
    for nobody in ("ann", "9" * 30, "-1", "1.5"):
        assert found(f"assignee={nobody}") == []
    for wrong in ("status=lost", "needs=love", "run=7", "assignee=%00", "colour=red"):
        assert refusal(api.get(f"/api/tool-calls?{wrong}", 400))[1].partition(".")[0] == wrong.partition("=")[0]


def test_events_are_read_from_a_cursor_on(api: Api, worked: dict[str, Any]) -> None:
    path = f"/api/runs/{worked['id']}/events"
    whole = api.get(path)
    last = whole["last_seq"]
    assert whole["finished"]
    assert last == worked["last_seq"] == len(whole["results"])
    assert whole["results"][-1]["type"] == "run.completed"
    assert api.get(f"{path}?after={last}") == {"results": [], "last_seq": last, "finished": True}
    assert [event["seq"] for event in api.get(f"{path}?after=3&limit=2")["results"]] == [4, 5]
    seen: list[Any] = []
    while len(seen) < last:
        seen += api.get(f"{path}?after={len(seen)}&limit=7")["results"]
    assert seen == whole["results"]
    for wrong in (f"after={last + 1}", "after=-1", "after=x", "limit=0", "limit=1001", "after=99999999999999999999"):
        assert refusal(api.get(f"{path}?{wrong}", 400))[1] == wrong.partition("=")[0]


def test_an_etag_lasts_until_the_run_moves(
    api: Api, helper: Agent, scripted_model: ScriptedModel, longhaul_clock: Callable[[timedelta], None]
) -> None:
    run = api.post("/api/runs", {"agent": "helper", "input": "a"}, 202)
    path = f"/api/runs/{run['id']}"
    first = api.call("get", path, status=200)
    longhaul_clock(timedelta(seconds=0.3))
    later = api.call("get", path, status=304, **{"If-None-Match": first["ETag"]})
    assert (later.content, later["ETag"]) == (b"", first["ETag"])
    api.call("get", path, status=304, **{"If-None-Match": f'"other", {first["ETag"]}'})
    scripted_model.say("Done.")
    run_to_end(run_of(run))
    ended = api.call("get", path, status=200, **{"If-None-Match": first["ETag"]})
    assert ended["ETag"] != first["ETag"]
    assert ended["Cache-Control"] == "private, no-cache"


# --- cancelled, and gone on with ------------------------------------------------------------------------------------


def test_a_cancel_says_why_and_a_finished_run_stays(api: Api, helper: Agent) -> None:
    run = api.post("/api/runs", {"agent": "helper", "input": "a"}, 202)
    path = f"/api/runs/{run['id']}"
    cancelled = api.post(f"{path}/cancel", {"reason": "changed my mind"}, 200)
    assert (cancelled["status"], cancelled["stop_reason"]) == ("cancelled", "cancelled")
    assert cancelled["error"]["message"] == "changed my mind"
    before = rows()
    assert api.post(f"{path}/cancel", {"reason": "again"}, 200) == cancelled
    assert refusal(api.post(f"{path}/cancel", {"reason": 5}, 400))[1] == "reason"
    assert refusal(api.post(f"{path}/cancel", {"why": "a"}, 400)) == ("unknown_field", "why")
    assert rows() == before
    unsaid = api.post("/api/runs", {"agent": "helper", "input": "a"}, 202)
    assert api.post(f"/api/runs/{unsaid['id']}/cancel", status=200)["error"] is None


def test_a_resume_goes_on_on_the_same_thread(api: Api, helper: Agent, scripted_model: ScriptedModel) -> None:
    first = api.post("/api/runs", {"agent": "helper", "input": "question", "metadata": {"a": 1}}, 202)
    assert refusal(api.post(f"/api/runs/{first['id']}/resume", {}, 400))[0] == "invalid"
    api.post(f"/api/runs/{first['id']}/cancel")
    answer = api.call("post", f"/api/runs/{first['id']}/resume", {}, status=202)
    new = answer.json()
    assert (answer["Location"], answer["X-Run-Id"]) == (f"/api/runs/{new['id']}", new["id"])
    assert (new["parent"], new["origin"], new["thread"], new["metadata"]) == (
        first["id"], "resume", first["thread"], {"a": 1},
    )  # fmt: skip
    scripted_model.say("answer", "more")
    run_to_end(run_of(new))
    assert texts(scripted_model.requests[0]) == ["question"]
    third = api.post("/api/runs", {"agent": "helper", "input": "x"}, 202)
    api.post(f"/api/runs/{third['id']}/cancel")
    with_input = api.post(f"/api/runs/{third['id']}/resume", {"input": [{"type": "text", "text": "go on"}]}, 202)
    run_to_end(run_of(with_input))
    assert texts(scripted_model.requests[1])[-1] == "go on"
    assert refusal(api.post(f"/api/runs/{first['id']}/resume", {"input": 5}, 400))[1] == "input"


def test_a_retry_does_the_last_step_again(api: Api, helper: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("first try", "second try", "later")
    first = api.post("/api/runs", {"agent": "helper", "input": "question"}, 202)
    assert refusal(api.post(f"/api/runs/{first['id']}/retry", {}, 400))[0] == "invalid"  # it lives
    run_to_end(run_of(first))
    new = api.post(f"/api/runs/{first['id']}/retry", {}, 202)
    assert (new["parent"], new["origin"]) == (first["id"], "retry")
    assert refusal(api.post(f"/api/runs/{first['id']}/retry", {}, 409))[0] == "thread_busy"
    assert run_to_end(run_of(new)).output == "second try"
    said = api.get(f"/api/threads/{first['thread']}/messages?status=superseded")["results"]
    assert [message["content"][0]["text"] for message in said] == ["first try"]
    assert refusal(api.post(f"/api/runs/{first['id']}/retry", {}, 409))[0] == "not_last"
    assert refusal(api.post(f"/api/runs/{first['id']}/retry", {"input": "a"}, 400)) == ("unknown_field", "input")
    scripted_model.replies.clear()


def test_a_fork_goes_on_on_a_copy(api: Api, worked: dict[str, Any], scripted_model: ScriptedModel) -> None:
    path = f"/api/runs/{worked['id']}/fork"
    scripted_model.say("Otherwise.")
    overrides = {"instructions": "Be long.", "tools": ["look_up"], "limits": {"max_steps": 3}, "model": None}
    new = api.post(path, {"after_step": 1, "overrides": overrides}, 202)
    assert (new["parent"], new["origin"]) == (worked["id"], "fork")
    assert new["thread"] != worked["thread"]
    assert new["limits"]["max_steps"] == 3
    run_to_end(run_of(new))
    sent = asked(scripted_model.requests[-1])
    assert (sent["instructions"], sent["tools"]) == ("Be long.", ["look_up"])
    assert texts(scripted_model.requests[-1])[0] == "find"
    before = rows()
    assert refusal(api.post(path, {}, 409))[0] == "nothing_to_do"  # after the step that ended it
    assert refusal(api.post(path, {"after_step": 9}, 400))[1] == "after_step"
    assert refusal(api.post(path, {"after_step": -1}, 400))[1] == "after_step"
    assert refusal(api.post(path, {"after_step": "1"}, 400))[1] == "after_step"
    assert refusal(api.post(path, {"after_step": 0, "overrides": {"tools": ["fly"]}}, 400))[1] == "overrides.tools"
    assert refusal(api.post(path, {"overrides": {"agent": "clerk"}}, 400)) == ("unknown_field", "overrides.agent")
    assert rows() == before


@pytest.mark.parametrize("call", ["cancel", "resume", "retry", "fork", "events", "steps", "legs", "messages"])
def test_somebody_elses_run_is_not_there(api: Api, helper: Agent, api_of: Callable[..., Api], call: str) -> None:
    run = api.post("/api/runs", {"agent": "helper", "input": "a"}, 202)
    before = rows()
    bob = api_of("bob")
    method = "post" if call in ("cancel", "resume", "retry", "fork") else "get"
    assert bob.call(method, f"/api/runs/{run['id']}/{call}").status_code == 404
    assert rows() == before


def test_a_run_whose_agent_is_gone_is_still_shown(api: Api, helper: Agent) -> None:
    run = api.post("/api/runs", {"agent": "helper", "input": "a"}, 202)
    del registry._agents["helper"]
    assert api.get(f"/api/runs/{run['id']}")["limits"] is None
    assert api.get("/api/runs")["results"][0]["limits"] is None


# --- the catalogue --------------------------------------------------------------------------------------------------


def test_agents_and_tools_are_listed(api: Api, worked: dict[str, Any]) -> None:
    agents = {agent["name"]: agent for agent in api.get("/api/agents")["results"]}
    assert agents["clerk"]["tools"] == ["look_up", "flaky"]
    assert "instructions" not in agents["clerk"]
    tools = {tool["name"]: tool for tool in api.get("/api/tools")["results"] if "clerk" in tool["agents"]}
    assert tools["look_up"]["parameters"]["properties"]["number"]["type"] == "integer"
    assert tools["look_up"]["description"] == "Find an order."


def test_usage_is_summed_up_by_agent_model_and_day(
    api: Api, worked: dict[str, Any], scripted_model: ScriptedModel, api_of: Callable[..., Api]
) -> None:
    scripted_model.say("a", "b")
    run_to_end(run_of(api.post("/api/runs", {"agent": "helper", "input": "a", "model": "openai:other"}, 202)))
    bob = api_of("bob")
    run_to_end(run_of(bob.post("/api/runs", {"agent": "helper", "input": "a"}, 202)))

    def sums(query: str, of: Api = api) -> list[tuple[Any, ...]]:
        found = of.get(f"/api/usage?{query}")["results"]
        name = "agent" if "by=" not in query else query.partition("by=")[2].partition("&")[0]
        return [
            (row[name], row["model_calls"], row["runs"], row["input_tokens"], row["output_tokens"]) for row in found
        ]

    assert sums("") == sums("by=agent") == [("clerk", 2, 1, 5, 2), ("helper", 1, 1, 1, 1)]
    assert sums("by=model") == [("other", 1, 1, 1, 1), ("test", 2, 1, 5, 2)] or sums("by=model") == [
        ("openai:other", 1, 1, 1, 1), ("openai:test", 2, 1, 5, 2),
    ]  # fmt: skip
    today = clock.now().astimezone(UTC).date().isoformat()
    assert sums("by=day") == [(today, 3, 2, 6, 3)]
    assert sums("agent=helper") == [("helper", 1, 1, 1, 1)]
    assert sums("", bob) == [("helper", 1, 1, 1, 1)]
    Usage.objects.filter(run__agent="clerk").update(created_at=clock.now() - timedelta(days=40))
    assert sums("") == [("helper", 1, 1, 1, 1)]  # the last 30 days
    old = (clock.now() - timedelta(days=41)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert [row[0] for row in sums(f"since={old}")] == ["clerk", "helper"]
    assert [row[0] for row in sums(f"since={old}&until={today}T00:00:00Z")] == ["clerk"]
    assert sums("since=0001-01-01T00:00:00%2B14:00&until=9999-12-31T23:59:59-14:00")
    for wrong in ("by=owner", "since=yesterday", "until=x", "since=1e400", "colour=red"):
        assert refusal(api.get(f"/api/usage?{wrong}", 400))[1] == wrong.partition("=")[0]
