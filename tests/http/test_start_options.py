"""Starting runs: each option has its effect, and what is nearer wins: run over thread over agent, lists replace."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from runs import agents
from runs.agents import Agent
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from tests.http.conftest import Api, refusal
from tests.runs.scenes import asked, rows, texts
from threads.models import Message, Thread
from tools import tool

pytestmark = pytest.mark.django_db

BOTH = ("/api/runs", "/api/threads/{thread}/runs")


@tool
def look_up(number: int) -> str:
    """Find an order."""
    return f"order {number}"


@tool
def refund(number: int) -> str:
    """Pay an order back."""
    return f"paid back {number}"


@pytest.fixture
def clerk(helper: Agent) -> Agent:
    """An agent that has an opinion on everything."""
    return agents.registry.add(
        Agent(
            name="clerk",
            model="openai:of-agent",
            instructions="of the agent",
            tools=[look_up, refund],
            max_steps=11,
            max_total_tokens=1111,
            context={"last_messages": 11},
            tool_choice="auto",
        )
    )


@pytest.fixture
def thread(api: Api, clerk: Agent) -> Any:
    return api.post("/api/threads", {"agent": "clerk"}, 201)


def start(api: Api, thread: Any, body: Any, status: int = 202) -> Any:
    return api.post(f"/api/threads/{thread['id']}/runs", body, status)


def ended(api: Api, run: Any) -> Any:
    run_to_end(Run.objects.get(pk=run["id"]))
    return api.get(f"/api/runs/{run['id']}")


# --- input, message, messages, save ---------------------------------------------------------------------------------


def test_an_input_is_a_text_or_parts(api: Api, thread: Any, scripted_model: ScriptedModel) -> None:
    scripted_model.say("One.", "Two.")
    ended(api, start(api, thread, {"input": "as text"}))
    parts = [{"type": "text", "text": "as a part"}, {"type": "data", "data": {"order": 7}}]
    run = ended(api, start(api, thread, {"input": parts}))
    said = api.get(f"/api/runs/{run['id']}/messages")["results"]
    assert said[0]["content"] == parts
    assert [message["content"] for message in scripted_model.shown(1)][::2] == [
        [{"type": "text", "text": "as text"}],
        parts,
    ]


def test_a_saved_message_is_answered_and_two_submits_of_it_are_one_run(
    api: Api, thread: Any, scripted_model: ScriptedModel
) -> None:
    saved = api.post(f"/api/threads/{thread['id']}/messages", {"content": "saved before"}, 201)["results"][0]
    scripted_model.say("Answered.")
    run = start(api, thread, {"message": saved["id"]})
    assert start(api, thread, {"message": saved["id"]})["id"] == run["id"]
    assert ended(api, run)["output"] == "Answered."
    assert texts(scripted_model.requests[0]) == ["saved before"]
    shown = api.get(f"/api/threads/{thread['id']}/messages")["results"]
    assert [message["run"] for message in shown] == [run["id"], run["id"]]


def test_a_message_of_another_thread_is_none_and_changes_nothing(api: Api, thread: Any, clerk: Agent) -> None:
    other = api.post("/api/threads", {"agent": "clerk", "messages": [{"content": "mine"}]}, 201)
    message = api.get(f"/api/threads/{other['id']}/messages")["results"][0]["id"]
    before = rows()
    for body in ({"message": message}, {"message": str(uuid4())}):
        assert refusal(start(api, thread, body, 400)) == ("invalid", "message")
    assert refusal(api.post("/api/runs", {"agent": "clerk", "message": message}, 400)) == ("invalid", "message")
    both = start(api, other, {"message": message, "input": "and a text"}, 400)
    assert "not both" in both["errors"][0]["detail"]
    assert rows() == before


def test_extra_messages_come_before_the_input(api: Api, thread: Any, scripted_model: ScriptedModel) -> None:
    scripted_model.say("Yes.")
    extra = [{"role": "system", "content": "be brief"}, {"role": "assistant", "content": "hello"}]
    ended(api, start(api, thread, {"messages": extra, "input": "well?"}))
    assert texts(scripted_model.requests[0]) == ["be brief", "hello", "well?"]
    assert [message["role"] for message in scripted_model.shown(0)] == ["system", "assistant", "user"]


@pytest.mark.parametrize(
    ("save", "later"),
    [
        ("prompt_and_output", ["question", "answer", "and now?"]),
        ("all", ["extra", "question", "answer", "and now?"]),
        ("none", ["and now?"]),
    ],
)
def test_save_says_what_later_runs_see(
    api: Api, thread: Any, scripted_model: ScriptedModel, save: str, later: list[str]
) -> None:
    scripted_model.say("answer", "later answer")
    run = ended(api, start(api, thread, {"input": "question", "messages": [{"content": "extra"}], "save": save}))
    assert texts(scripted_model.requests[0]) == ["extra", "question"]
    ended(api, start(api, thread, {"input": "and now?"}))
    assert texts(scripted_model.requests[1]) == later
    shown = api.get(f"/api/threads/{thread['id']}/messages")["results"]
    assert [message["content"][0]["text"] for message in shown] == [*later, "later answer"]
    own = api.get(f"/api/runs/{run['id']}/messages")["results"]
    assert [message["content"][0]["text"] for message in own] == ["extra", "question", "answer"]


def test_without_input_and_message_the_run_goes_on_from_the_threads_last_state(
    api: Api, thread: Any, scripted_model: ScriptedModel
) -> None:
    empty = start(api, thread, {}, 409)
    assert refusal(empty) == ("nothing_to_do", None)
    api.post(f"/api/threads/{thread['id']}/messages", {"content": "said by hand"}, 201)
    scripted_model.say("Heard.")
    assert ended(api, start(api, thread, {}))["output"] == "Heard."
    assert texts(scripted_model.requests[0]) == ["said by hand"]
    before = rows()
    assert refusal(start(api, thread, {}, 409)) == ("nothing_to_do", None)
    assert refusal(api.post("/api/runs", {"agent": "clerk"}, 409)) == ("nothing_to_do", None)
    assert rows() == before


# --- the agent ------------------------------------------------------------------------------------------------------


def test_the_agent_defaults_to_the_threads(api: Api, thread: Any, clerk: Agent) -> None:
    assert start(api, thread, {"input": "a"})["agent"] == "clerk"
    assert start(api, thread, {"input": "a", "agent": "helper"})["agent"] == "helper"
    nobodys = api.post("/api/threads", {}, 201)
    assert refusal(start(api, nobodys, {"input": "a"}, 400)) == ("required", "agent")
    assert refusal(api.post("/api/runs", {"input": "a"}, 400)) == ("required", "agent")
    assert refusal(start(api, thread, {"input": "a", "agent": "nobody"}, 400)) == ("unknown_agent", "agent")


# --- precedence -----------------------------------------------------------------------------------------------------


OF_THREAD = {
    "model": "openai:of-thread",
    "instructions": "of the thread",
    "tools": ["look_up"],
    "limits": {"max_steps": 22, "max_cost": 2.5},
    "context": {"last_messages": 22},
}
OF_RUN = {
    "model": "openai:of-run",
    "instructions": "of the run",
    "tools": ["refund"],
    "limits": {"max_steps": 33, "deadline_seconds": 333.5},
    "context": {"last_messages": 3},
}


@pytest.mark.parametrize(
    ("of_thread", "of_run", "expected"),
    [
        ({}, {}, ("openai:of-agent", "of the agent", ["look_up", "refund"], 11)),
        (OF_THREAD, {}, ("openai:of-thread", "of the thread", ["look_up"], 22)),
        ({}, OF_RUN, ("openai:of-run", "of the run", ["refund"], 33)),
        (OF_THREAD, OF_RUN, ("openai:of-run", "of the run", ["refund"], 33)),
        (OF_THREAD, {"tools": []}, ("openai:of-thread", "of the thread", [], 22)),
        (OF_THREAD, dict.fromkeys(OF_RUN), ("openai:of-thread", "of the thread", ["look_up"], 22)),
    ],
    ids=["agent", "thread", "run", "run over thread", "an empty list replaces", "null says nothing"],
)
def test_the_nearest_wins_and_lists_replace(
    api: Api, clerk: Agent, scripted_model: ScriptedModel, of_thread: Any, of_run: Any, expected: Any
) -> None:
    thread = api.post("/api/threads", {"agent": "clerk", **of_thread}, 201)
    scripted_model.say("Done.")
    run = ended(api, start(api, thread, {"input": "go", **of_run}))
    request = scripted_model.requests[0]
    sent = asked(request)
    step = api.get(f"/api/runs/{run['id']}/steps")["results"][0]
    model, instructions, tools, max_steps = expected
    assert (step["model"], request.model) == (model, model.partition(":")[2])
    assert (sent["instructions"], step["instructions"]) == (instructions, instructions)
    assert (sent["tools"], step["tools"]) == (tools, tools)
    assert run["limits"]["max_steps"] == max_steps


def test_limits_are_laid_over_one_another_key_by_key(api: Api, clerk: Agent) -> None:
    thread = api.post("/api/threads", {"agent": "clerk", **OF_THREAD}, 201)
    run = start(api, thread, {"input": "go", "limits": OF_RUN["limits"]})
    assert run["limits"] == {
        "max_steps": 33,
        "max_total_tokens": 1111,
        "max_cost": 2.5,
        "deadline_seconds": 333.5,
        "leg_budget_seconds": 240.0,
    }
    row = Run.objects.get(pk=run["id"])
    assert row.deadline is not None
    assert (row.deadline - row.created_at).total_seconds() == 333.5


def test_a_limit_ends_the_run(api: Api, clerk: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("look_up", number=1), "Enough.")
    run = ended(api, api.post("/api/runs", {"agent": "clerk", "input": "go", "limits": {"max_steps": 2}}, 202))
    assert (run["status"], run["stop_reason"], run["steps"]) == ("completed", "max_steps", 2)


def test_context_bounds_what_the_model_is_shown(api: Api, clerk: Agent, scripted_model: ScriptedModel) -> None:
    old = [{"content": f"old {number}"} for number in range(8)]
    thread = api.post("/api/threads", {"agent": "clerk", "messages": old, "context": {"last_messages": 4}}, 201)
    scripted_model.say("a", "b")
    ended(api, start(api, thread, {"input": "new", "context": {"last_messages": 2}}))
    assert texts(scripted_model.requests[0]) == ["old 7", "new"]
    ended(api, start(api, thread, {"input": "newer"}))
    assert texts(scripted_model.requests[1]) == ["old 7", "new", "a", "newer"]


def test_tool_choice_reaches_the_model(api: Api, thread: Any, scripted_model: ScriptedModel) -> None:
    scripted_model.say("a")
    ended(api, start(api, thread, {"input": "go", "tool_choice": "none"}))
    assert scripted_model.requests[0].tool_choice == "none"
    for choice in ("refund", "required"):
        assert Run.objects.get(pk=start(api, thread, {"input": "go", "tool_choice": choice})["id"]).overrides == {
            "tool_choice": choice
        }
    assert refusal(start(api, thread, {"input": "go", "tool_choice": "sing"}, 400)) == ("invalid", "tool_choice")


def test_an_output_schema_makes_the_output_an_object(api: Api, thread: Any, scripted_model: ScriptedModel) -> None:
    schema = {"type": "object", "properties": {"total": {"type": "number"}}, "required": ["total"]}
    scripted_model.say('{"total": 12.5}')
    run = ended(api, start(api, thread, {"input": "sum up", "output_schema": schema}))
    assert run["output"] == {"total": 12.5}
    wrong = start(api, thread, {"input": "sum up", "output_schema": {"type": "nonsense"}}, 400)
    assert refusal(wrong) == ("invalid", "output_schema")


# --- busy, priority, metadata, client_id ----------------------------------------------------------------------------


def test_a_busy_thread_holds_the_next_run(api: Api, thread: Any, scripted_model: ScriptedModel) -> None:
    first = start(api, thread, {"input": "first"})
    second = start(api, thread, {"input": "second", "busy": "enqueue"})
    third = start(api, thread, {"input": "third"})
    assert [first["status"], second["status"], third["status"]] == ["queued", "held", "held"]
    shown = api.get(f"/api/threads/{thread['id']}")
    assert (shown["status"], shown["run"]) == ("queued", first["id"])
    said = api.get(f"/api/threads/{thread['id']}/messages")["results"]
    assert [message["status"] for message in said] == ["completed", "waiting", "waiting"]
    scripted_model.say("1", "2", "3")
    assert ended(api, third)["output"] == "3"
    assert texts(scripted_model.requests[2]) == ["first", "1", "second", "2", "third"]
    assert_invariants()


def test_a_busy_thread_can_refuse_and_names_its_live_run(api: Api, thread: Any) -> None:
    first = start(api, thread, {"input": "first"})
    before = rows()
    answer = start(api, thread, {"input": "second", "busy": "reject"}, 409)
    assert refusal(answer) == ("thread_busy", None)
    assert first["id"] in answer["errors"][0]["detail"]
    assert rows() == before


def test_too_many_held_runs_are_refused(api: Api, thread: Any, settings: Any) -> None:
    settings.LONGHAUL = {"MAX_HELD": 1}
    start(api, thread, {"input": "live"})
    start(api, thread, {"input": "held"})
    assert refusal(start(api, thread, {"input": "one too many"}, 409)) == ("thread_busy", None)


@pytest.mark.parametrize("path", BOTH)
def test_priority_metadata_and_client_id_are_kept(api: Api, thread: Any, path: str) -> None:
    said = {"ticket": 7, "tags": ["a", None], "who": {"name": "Zoë"}}
    body = {"agent": "clerk", "input": "go", "priority": -3, "metadata": said, "client_id": "draft-1"}
    run = api.post(path.format(thread=thread["id"]), body, 202)
    assert (run["priority"], run["metadata"]) == (-3, said)
    saved = api.get(f"/api/runs/{run['id']}/messages")["results"][0]
    assert saved["client_id"] == "draft-1"
    told = api.get(f"/api/runs/{run['id']}/events")["results"]
    assert [
        (event["message"], event["client_id"], event["content"])
        for event in told
        if event["type"] == "message.completed"
    ] == [(saved["id"], "draft-1", [{"type": "text", "text": "go"}])]


@pytest.mark.parametrize("path", BOTH)
def test_the_answer_names_the_run(api: Api, thread: Any, path: str) -> None:
    answer = api.call("post", path.format(thread=thread["id"]), {"agent": "clerk", "input": "go"}, status=202)
    run = answer.json()
    assert (answer["Location"], answer["X-Run-Id"]) == (f"/api/runs/{run['id']}", run["id"])
    assert api.get(answer["Location"])["id"] == run["id"]
    assert (run["origin"], run["parent"]) == ("start", None)
    assert (run["thread"] == thread["id"]) == ("{thread}" in path)
    assert Run.objects.get(pk=run["id"]).owner_id == api.user.pk


def test_a_stream_needs_a_server_that_can(api: Api, thread: Any) -> None:
    """Django's test client speaks WSGI; nothing may be started that the client then could not follow."""
    before = rows()
    assert refusal(start(api, thread, {"input": "go", "stream": True}, 501)) == ("needs_asgi", None)
    assert rows() == before


# --- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "attr", "code"),
    [
        ({"input": 7}, "input", "invalid"),
        ({"input": ""}, "input", "invalid"),
        ({"input": "  \n"}, "input", "invalid"),
        ({"input": []}, "input", "invalid"),
        ({"input": [{"type": "text"}]}, "input.0.text", "invalid"),
        ({"input": [{"type": "tool_call", "name": "x"}]}, "input.0.type", "invalid"),
        ({"input": [{"type": "text", "text": "a"}, {"text": "b"}]}, "input.1.type", "required"),
        ({"message": "no uuid"}, "message", "invalid"),
        ({"message": 5}, "message", "invalid"),
        ({"messages": [{"content": "a"}, {"content": 5}]}, "messages.1.content", "invalid"),
        ({"messages": [{"content": "a"}, {}]}, "messages.1.content", "required"),
        ({"messages": [{"content": "a", "role": "tool"}]}, "messages.0.role", "invalid"),
        ({"messages": [{"content": [{"type": "reasoning"}]}]}, "messages.0.content.0.text", "invalid"),
        ({"messages": {"content": "a"}}, "messages", "invalid"),
        ({"save": "some"}, "save", "invalid"),
        ({"busy": "wait"}, "busy", "invalid"),
        ({"priority": 1.5}, "priority", "invalid"),
        ({"priority": "1"}, "priority", "invalid"),
        ({"priority": True}, "priority", "invalid"),
        ({"priority": 40_000}, "priority", "invalid"),
        ({"priority": None}, "priority", "invalid"),
        ({"stream": "yes"}, "stream", "invalid"),
        ({"model": "nobody:x"}, "model", "invalid"),
        ({"model": 7}, "model", "invalid"),
        ({"tools": ["fly"]}, "tools", "invalid"),
        ({"tools": "look_up"}, "tools", "invalid"),
        ({"tools": [7]}, "tools.0", "invalid"),
        ({"limits": {"max_steps": 0}}, "limits.max_steps", "invalid"),
        ({"limits": {"max_steps": "5"}}, "limits.max_steps", "invalid"),
        ({"limits": {"max_steps": 2**70}}, "limits.max_steps", "invalid"),
        ({"limits": {"max_total_tokens": 10**13}}, "limits.max_total_tokens", "invalid"),
        ({"limits": {"max_cost": -1}}, "limits.max_cost", "invalid"),
        ({"limits": {"max_step": 5}}, "limits.max_step", "unknown_field"),
        ({"limits": [5]}, "limits", "invalid"),
        ({"context": {"last_messages": 0}}, "context.last_messages", "invalid"),
        ({"context": {"sources": []}}, "context.sources", "unknown_field"),
        ({"metadata": [1]}, "metadata", "invalid"),
        ({"metadata": {"huge": 2**80}}, "metadata", "invalid"),
        ({"client_id": "x" * 201}, "client_id", "invalid"),
        ({"output_schema": "object"}, "output_schema", "invalid"),
        ({"prompt": "a"}, "prompt", "unknown_field"),
        ({"idempotency_key": "a"}, "idempotency_key", "unknown_field"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("path", BOTH)
def test_what_is_wrong_is_named_and_nothing_is_changed(
    api: Api, thread: Any, path: str, body: Any, attr: str, code: str
) -> None:
    before = rows()
    answer = api.post(path.format(thread=thread["id"]), {"agent": "clerk", "input": "go", **body}, 400)
    assert answer["type"] == "validation_error"
    told = {error["attr"]: error["code"] for error in answer["errors"]}
    assert attr in told
    assert told[attr] == code or code == "invalid"  # what is of a wrong type has the kind of its type
    assert rows() == before


def test_several_mistakes_are_told_at_once(api: Api, thread: Any) -> None:
    answer = start(api, thread, {"input": 7, "limits": {"max_steps": -1}, "colour": "red"}, 400)
    assert {error["attr"] for error in answer["errors"]} == {"input", "limits.max_steps", "colour"}


def test_an_input_that_is_too_long_is_too_large(api: Api, thread: Any, settings: Any) -> None:
    settings.LONGHAUL = {"MAX_INPUT_CHARS": 100}
    assert refusal(start(api, thread, {"input": "x" * 101}, 413)) == ("too_large", "input")
    assert not Message.objects.exists()
    assert Thread.objects.count() == 1
