"""How a run comes to be: what start takes, whose the run is, and that it is there once or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any
from unittest import mock

import orjson
import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.db import connection, transaction

from runs import admission, agents
from runs.agents import Agent
from runs.exceptions import BadInput, IdempotencyConflict, NothingToDo
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from tests.runs.scenes import Cast, Together, asked, payloads, refused, rows, shown, texts, types
from threads.logs import JSONFormatter
from threads.models import Message, Thread
from tools import tool

pytestmark = pytest.mark.django_db


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def shout(word: str) -> str:
    """Say it louder."""
    return word.upper()


@pytest.fixture
def agent(cast: Cast) -> Agent:
    return cast(tools=[add, shout], instructions="Be kind.")


@pytest.mark.django_db(transaction=True)
def test_a_start_is_told_to_the_log_with_the_ids_of_run_and_thread(
    agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.setFormatter(JSONFormatter())
    with caplog.at_level(logging.INFO, logger="longhaul"):
        run = agent.start("hello")

    [line] = [orjson.loads(line) for line in caplog.text.splitlines() if "run.queued" in line]
    assert (line["run"], line["thread"], line["agent"]) == (str(run.pk), str(run.thread_id), "clerk")


# --- the input


def test_a_text_is_the_users_message_on_a_new_thread(agent: Agent) -> None:
    run = agent.start("hello", client_id="c1")
    message = Message.objects.get(thread=run.thread)
    assert (message.role, message.text, message.status, message.position) == ("user", "hello", "completed", 1)
    assert (message.run_id, message.pk, message.client_id) == (run.pk, run.input_message_id, "c1")
    assert (run.thread.agent, run.status, run.origin) == ("clerk", "queued", "start")
    assert types(run) == ["message.completed", "run.queued"]
    assert payloads(run, "message.completed") == [
        {"message": str(message.pk), "role": "user", "content": message.content, "client_id": "c1"}
    ]
    assert payloads(run, "run.queued") == [{"reason": "start"}]
    assert run.last_seq == 2  # whoever gets the run from `start` reads on from here
    assert_invariants(run)


def test_parts_are_kept_as_they_are_given(agent: Agent, scripted_model: ScriptedModel) -> None:
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image", "url": "https://example.com/a.png"}]
    scripted_model.say("a cat")
    run = run_to_end(agent.start(parts))
    assert run.thread.messages.get(role="user").content == parts
    assert asked(scripted_model.requests[0])["messages"][0]["content"] == parts
    assert_invariants(run)


def test_a_nul_and_half_a_surrogate_pair_do_not_fail_a_start(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("fine")
    run = run_to_end(
        agent.start(
            [{"type": "text", "text": "a\x00b\ud800"}, {"type": "data", "data": {"k\x00": ["v\x00"]}}],
            metadata={"m": "x\x00"},
            instructions="kind\x00",
            client_id="c\x00",
        )
    )
    assert run.status == "completed"
    content = run.thread.messages.get(role="user").content
    assert content == [{"type": "text", "text": "ab?"}, {"type": "data", "data": {"k": ["v"]}}]
    assert (run.metadata, run.overrides["instructions"]) == ({"m": "x"}, "kind")
    assert_invariants(run)


def test_a_saved_message_is_the_input(agent: Agent, scripted_model: ScriptedModel) -> None:
    thread = Thread.objects.create()
    message = thread.save(role="user", content="saved")
    scripted_model.say("answered")
    run = agent.start(message=message)
    assert (run.thread, run.input_message_id) == (thread, message.pk)
    run_to_end(run)
    assert [shown({"content": each.content}) for each in thread.messages.order_by("position")] == ["saved", "answered"]
    assert texts(scripted_model.requests[0]) == ["saved"]
    assert_invariants(run)


def test_the_same_message_twice_is_one_run(agent: Agent) -> None:
    message = Thread.objects.create().save(role="user", content="saved")
    first = agent.start(message=message)
    before = rows()
    assert agent.start(message=message) == first
    assert rows() == before
    assert_invariants(first)


def test_extra_messages_stand_before_the_input(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("done")
    extra = [{"role": "system", "content": "the shop is closed"}, {"role": "user", "content": "by the way"}]
    run = run_to_end(agent.start("hello", messages=extra))
    assert texts(scripted_model.requests[0]) == ["the shop is closed", "by the way", "hello"]
    assert_invariants(run)


@pytest.mark.parametrize(
    ("save", "later"),
    [
        ("prompt_and_output", ["hello", "calls 1", "-> 3", "three", "next"]),
        ("all", ["extra", "hello", "calls 1", "-> 3", "three", "next"]),
        ("none", ["next"]),
    ],
)
def test_save_says_what_later_runs_see(
    agent: Agent, scripted_model: ScriptedModel, save: str, later: list[str]
) -> None:
    scripted_model.say(call("add", a=1, b=2), "three", "bye")
    first = run_to_end(agent.start("hello", messages=[{"role": "user", "content": "extra"}], save=save))
    # The run itself sees all of it.
    assert texts(scripted_model.requests[1]) == ["extra", "hello", "calls 1", "-> 3"]
    second = run_to_end(agent.start("next", thread=first.thread))
    assert texts(scripted_model.requests[2]) == later
    # And nothing is lost: it stays readable by its run.
    assert Message.objects.filter(run_id=first.pk).count() == 5
    assert_invariants(first)
    assert_invariants(second)


# --- going on without a prompt


def test_without_a_prompt_the_run_goes_on_from_the_threads_last_state(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    thread = Thread.objects.create()
    thread.save(role="user", content="waiting for an answer")
    scripted_model.say("here it is")
    run = run_to_end(agent.start(thread=thread))
    assert (run.input_message_id, run.output) == (None, "here it is")
    assert texts(scripted_model.requests[0]) == ["waiting for an answer"]
    with refused(NothingToDo, "finished answer", "Give an input"):
        agent.start(thread=thread)
    assert_invariants(run)


def test_a_finished_answer_that_later_runs_do_not_see_is_no_last_state(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    thread = Thread.objects.create()
    thread.save(role="user", content="open question")
    scripted_model.say("aside", "answer")
    run_to_end(agent.start("psst", thread=thread, save="none"))
    run = run_to_end(agent.start(thread=thread))
    assert texts(scripted_model.requests[1]) == ["open question"]
    assert_invariants(run)


# --- whose it is


def test_a_thread_gives_its_owner(agent: Agent) -> None:
    ann = User.objects.create_user("ann")
    run = agent.start("hello", owner=ann)
    assert (run.owner, run.thread.owner) == (ann, ann)
    admission.cancel(run)
    assert agent.start("again", thread=run.thread).owner == ann
    assert agent.start("again", thread=run.thread, owner=ann).owner == ann
    system = agent.start("hello")
    assert (system.owner, system.thread.owner) == (None, None)
    for each in Run.objects.all():
        assert_invariants(each)


def test_a_thread_of_somebody_else_is_refused(agent: Agent) -> None:
    ann, bob = User.objects.create_user("ann"), User.objects.create_user("bob")
    thread = Thread.objects.create(owner=ann)
    with refused(BadInput, "somebody else"):
        agent.start("hello", thread=thread, owner=bob)
    message = thread.save(role="user", content="hello")
    with refused(BadInput, "somebody else"):
        agent.start(message=message, owner=bob)
    system = Thread.objects.create()
    with refused(BadInput, "somebody else"):
        agent.start("hello", thread=system, owner=bob)


# --- what is nearest wins


def test_what_the_run_says_wins_over_its_thread_and_that_over_its_agent(
    cast: Cast, scripted_model: ScriptedModel
) -> None:
    agent = cast(
        tools=[add, shout],
        instructions="of the agent",
        options={"temperature": 1, "seed": 7},
        max_steps=10,
        max_total_tokens=1000,
        context={"last_messages": 50},
    )
    thread = Thread.objects.create(
        overrides={
            "model": "openai:of-the-thread",
            "instructions": "of the thread",
            "tools": ["shout", "add"],
            "limits": {"max_steps": 5},
            "context": {"last_messages": 2},
            "options": {"temperature": 2},
        }
    )
    scripted_model.say("one")
    run_to_end(agent.start("1", thread=thread))
    request = scripted_model.requests[0]
    assert (request.model, request.instructions) == ("of-the-thread", "of the thread")
    assert asked(request)["tools"] == ["shout", "add"]
    assert request.options == {"temperature": 2, "seed": 7}

    scripted_model.say(call("add", a=1, b=1), "two")
    run = agent.start(
        "2",
        thread=thread,
        model="openai:of-the-run",
        instructions="of the run",
        tools=["add"],  # a list replaces, it is never merged
        tool_choice="required",
        limits={"max_steps": 2},
        context={"last_messages": 1},
        options={"temperature": 3},
    )
    run_to_end(run)
    request, last = scripted_model.requests[1:]
    assert (request.model, request.instructions, request.tool_choice) == ("of-the-run", "of the run", "required")
    assert asked(request)["tools"] == ["add"]
    assert request.options == {"temperature": 3, "seed": 7}
    assert texts(request) == ["2"]
    assert (last.tool_choice, run.stop_reason) == ("none", "max_steps")
    assert_invariants(run)


NEAREST: dict[str, tuple[tuple[Any, Any, Any], Callable[[Run, ScriptedModel], Any]]] = {
    # what agent, thread and run say, and what came of it
    "model": (("scripted:a", "scripted:t", "scripted:r"), lambda run, model: f"scripted:{model.requests[0].model}"),
    "instructions": (("a", "t", "r"), lambda run, model: model.requests[0].instructions),
    "tools": (([add, shout], ["shout"], ["add"]), lambda run, model: asked(model.requests[0])["tools"]),
    "tool_choice": (("required", "add", "shout"), lambda run, model: model.requests[0].tool_choice),
    "parallel_tool_calls": (
        (True, False, True),
        lambda run, model: model.requests[0].parallel_tool_calls,
    ),
    "limits": (
        ({"max_steps": 2}, {"max_steps": 4}, {"max_steps": 3}),
        lambda run, model: {"max_steps": run.steps},
    ),
    "context": (
        ({"last_messages": 4}, {"last_messages": 2}, {"last_messages": 3}),
        lambda run, model: {"last_messages": len(model.requests[0].messages)},
    ),
    "options": (({"seed": 1}, {"seed": 2}, {"seed": 3}), lambda run, model: model.requests[0].options),
    "output_schema": (({"const": "a"}, {"const": "t"}, {"const": "r"}), lambda run, model: {"const": run.output}),
}


@pytest.mark.parametrize("layers", [1, 2, 3], ids=["agent", "thread", "run"])
@pytest.mark.parametrize("key", NEAREST)
def test_the_nearest_that_says_something_wins(cast: Cast, scripted_model: ScriptedModel, key: str, layers: int) -> None:
    (of_agent, of_thread, of_run), came_of_it = NEAREST[key]
    said = (of_agent, of_thread, of_run)[layers - 1]

    def answer(messages: list[dict[str, Any]]) -> Any:
        if key == "output_schema":
            return orjson.dumps(said["const"]).decode()
        goes_on = key == "limits" and scripted_model.requests[-1].tool_choice != "none"
        return call("add", a=1, b=2) if goes_on else "done"

    scripted_model.answer = answer
    agent = cast(**{"tools": [add, shout], key: of_agent})
    thread = Thread.objects.create(overrides={key: of_thread} if layers > 1 else {})
    thread.save_many([{"role": "user", "content": str(number)} for number in range(5)])
    run = run_to_end(agent.start("hello", thread=thread, **({key: of_run} if layers > 2 else {})))
    assert run.status == "completed", run.why()
    found = came_of_it(run, scripted_model)
    assert found == ([each.name for each in said] if key == "tools" and layers == 1 else said)
    assert set(NEAREST) == set(agents.OVERRIDES)
    assert_invariants(run)


def test_context_sources_are_not_there_yet(agent: Agent) -> None:
    with refused(BadInput, "sources", "not there yet"):
        agent.start("hello", context={"sources": ["thread"]})
    with refused(BadInput, "sources"):
        agent.start("hello", thread=Thread(overrides={}), context={"sources": []})


def test_a_tool_may_be_named_by_itself(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("done")
    run = run_to_end(agent.start("hello", tools=[shout]))
    assert (run.overrides, asked(scripted_model.requests[0])["tools"]) == ({"tools": ["shout"]}, ["shout"])
    assert_invariants(run)


def test_no_tools_is_an_override_too(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("done")
    run = run_to_end(agent.start("hello", tools=[]))
    assert asked(scripted_model.requests[0])["tools"] == []
    assert_invariants(run)


def test_the_default_model_is_the_settings(cast: Cast, scripted_model: ScriptedModel, settings: Any) -> None:
    settings.LONGHAUL = {"DEFAULT_MODEL": "openai:house"}
    scripted_model.say("done")
    run = run_to_end(cast(model=None).start("hello"))
    assert scripted_model.requests[0].model == "house"
    assert_invariants(run)


def test_what_is_told_of_a_run_is_kept(agent: Agent) -> None:
    run = agent.start(
        "hello",
        metadata={"order": 1042},
        priority=5,
        limits={"deadline_seconds": 90, "max_cost": Decimal("0.5")},
        save="all",
        busy="reject",
    )
    run.refresh_from_db()
    assert (run.metadata, run.priority, run.save_mode, run.busy) == ({"order": 1042}, 5, "all", "reject")
    assert run.overrides == {"limits": {"deadline_seconds": 90, "max_cost": 0.5}}
    assert run.deadline == run.created_at + timedelta(seconds=90)
    assert_invariants(run)


# --- once, or not at all


def test_a_key_is_its_owners(agent: Agent) -> None:
    ann, bob = User.objects.create_user("ann"), User.objects.create_user("bob")
    of_ann = agent.start("hello", owner=ann, idempotency_key="k")
    of_bob = agent.start("hello", owner=bob, idempotency_key="k")
    assert of_ann != of_bob
    assert agent.start("hello", owner=ann, idempotency_key="k") == of_ann
    with refused(IdempotencyConflict, "'k'", str(of_ann.pk), "new key"):
        agent.start("goodbye", owner=ann, idempotency_key="k")
    assert_invariants()


@pytest.mark.django_db(transaction=True)
def test_two_starts_at_once_with_one_key_are_one_run(agent: Agent) -> None:
    first, second = Together(*[lambda: agent.start("hello", idempotency_key="k")] * 2).join()
    assert first == second == Run.objects.get()
    assert Thread.objects.count() == Message.objects.count() == 1
    assert_invariants()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("busy", ["reject", "enqueue"])
def test_two_starts_at_once_on_one_thread_with_one_key_are_one_run(agent: Agent, busy: str) -> None:
    thread = Thread.objects.create()
    first, second = Together(*[lambda: agent.start("hello", thread=thread, idempotency_key="k", busy=busy)] * 2).join()
    assert first == second == Run.objects.get()
    assert_invariants()


@pytest.mark.django_db(transaction=True)
def test_two_starts_at_once_from_one_message_are_one_run(agent: Agent) -> None:
    message = Thread.objects.create().save(role="user", content="saved")
    first, second = Together(*[lambda: agent.start(message=message)] * 2).join()
    assert first == second == Run.objects.get()
    assert_invariants()


@pytest.mark.django_db(transaction=True)
def test_starts_at_once_on_one_thread_are_one_live_run_and_held_ones(agent: Agent) -> None:
    thread = Thread.objects.create()
    started = Together(*[lambda: agent.start("hello", thread=thread)] * 4).join()
    assert sorted(run.status for run in started) == ["held", "held", "held", "queued"]
    assert_invariants()


@pytest.mark.django_db(transaction=True)
def test_a_start_in_a_transaction_that_rolls_back_was_never_there(agent: Agent) -> None:
    before = rows()
    with mock.patch("runs.tasks.publish") as published, mock.patch("runs.bells.ring") as rung:
        with transaction.atomic():
            agent.start("hello")
            agent.start("hello", idempotency_key="k")
            transaction.set_rollback(True)
        assert rows() == before
        assert published.call_count == rung.call_count == 0
        # The key is free, for nothing has used it.
        with transaction.atomic():
            run = agent.start("another", idempotency_key="k")
            assert published.call_count == 0
        published.assert_called_once_with(run.pk, 1, run.agent)
    assert_invariants()


@pytest.mark.django_db(transaction=True)
def test_a_conflict_leaves_the_transaction_around_it_usable(agent: Agent) -> None:
    with transaction.atomic():
        agent.start("hello", idempotency_key="k")
        with pytest.raises(IdempotencyConflict):
            agent.start("other", idempotency_key="k")
        assert Run.objects.count() == 1
        assert not connection.needs_rollback
    assert_invariants()


@pytest.mark.django_db(transaction=True)
async def test_a_start_from_async_code(agent: Agent) -> None:
    run = await agent.astart("hello", metadata={"from": "async"})
    assert (await Run.objects.aget()).metadata == {"from": "async"}
    assert [event.type async for event in run.aevents(follow=False)] == ["message.completed", "run.queued"]
    await sync_to_async(assert_invariants)()
    await sync_to_async(
        lambda: connection.close()
    )()  # of the thread that async code uses: the test database is dropped


@pytest.mark.django_db(transaction=True)
def test_a_key_that_is_used_between_the_look_and_the_insert_gives_the_run_of_the_faster(agent: Agent) -> None:
    known = admission._known
    faster: list[Run | None] = []

    def look(*key: Any) -> Run | None:
        if not faster:
            faster.append(None)
            faster.extend(Together(lambda: agent.start("hello", idempotency_key="k")).join())
            return None  # what was there when we looked
        return known(*key)

    with mock.patch.object(admission, "_known", look):
        run = agent.start("hello", idempotency_key="k")
    assert run == faster[1] == Run.objects.get()
    assert_invariants()
