"""What cannot be taken is refused at once: the message says what to do, and the database is as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from runs import agents
from runs.agents import Agent
from runs.exceptions import BadInput, IdempotencyConflict, InputTooLarge, UnknownAgent
from runs.models import Event, Run
from runs.pytest_longhaul import ScriptedModel, assert_invariants, run_to_end
from threads.models import Message, Thread
from tools import tool

pytestmark = pytest.mark.django_db


@tool
def look_up(number: int) -> str:
    """Look up a number."""
    return str(number)


@pytest.fixture
def agent(scripted_model: ScriptedModel) -> Agent:
    return agents.registry.add(Agent(name="clerk", model="scripted:x", tools=[look_up]))


def counts() -> tuple[int, ...]:
    return tuple(model.objects.count() for model in (Thread, Message, Run, Event))


@contextmanager
def refused(error: type[Exception], *words: str) -> Iterator[None]:
    """Expect the error, whose message has all the words, and no row more or less."""
    before = counts()
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
    assert counts() == before


def test_an_unknown_agent_is_answered_with_those_that_exist(agent: Agent) -> None:
    with refused(UnknownAgent, "'clark'", "clerk"):
        agents.get("clark")


@pytest.mark.parametrize("model", ["nobody:gpt", "gpt", ""])
def test_an_unknown_provider_is_answered_with_those_that_exist(agent: Agent, model: str) -> None:
    with refused(BadInput, "openai"):
        agent.start("hello", model=model)


def test_an_agent_of_an_unknown_provider_starts_nothing(agent: Agent) -> None:
    lost = agents.registry.add(Agent(name="lost", model="nobody:gpt"))
    with refused(BadInput, "nobody", "openai"):
        lost.start("hello")


def test_an_agent_without_a_model_says_where_to_give_one(agent: Agent) -> None:
    with refused(BadInput, "'mute'", "DEFAULT_MODEL"):
        Agent(name="mute").start("hello")


def test_a_deleted_thread(agent: Agent) -> None:
    thread = Thread.objects.create()
    Thread.objects.filter(pk=thread.pk).delete()
    with refused(BadInput, f"There is no thread {thread.pk}"):
        agent.start("hello", thread=thread)


def test_a_thread_that_is_not_saved(agent: Agent) -> None:
    with refused(BadInput, "Save the thread first"):
        agent.start("hello", thread=Thread())


@pytest.mark.parametrize("empty", ["", "  \n", [], [{"type": "text", "text": " "}]])
def test_an_empty_input(agent: Agent, empty: Any) -> None:
    with refused(BadInput, "empty", "Give a text"):
        agent.start(empty)


def test_an_input_that_is_too_large_says_what_is_allowed_and_which_setting(agent: Agent, settings: Any) -> None:
    settings.LONGHAUL = {"MAX_INPUT_CHARS": 10}
    with refused(InputTooLarge, "11", "10", "MAX_INPUT_CHARS"):
        agent.start("x" * 11)
    with refused(InputTooLarge, "MAX_INPUT_CHARS"):
        agent.start([{"type": "text", "text": "x" * 6}, {"type": "text", "text": "x" * 6}])
    assert agent.start("x" * 10).status == "queued"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limits": {"max_stairs": 3}}, ["max_stairs", "max_steps", "deadline_seconds"]),
        ({"limits": {"max_steps": 0}}, ["max_steps", "whole number from 1"]),
        ({"limits": {"max_steps": 1.5}}, ["max_steps", "whole number"]),
        ({"limits": {"max_steps": True}}, ["max_steps", "whole number"]),
        ({"limits": {"max_cost": -1}}, ["max_cost", "above 0"]),
        ({"limits": {"deadline_seconds": float("nan")}}, ["deadline_seconds", "above 0"]),
        ({"limits": [1]}, ["limits", "dict", "max_steps"]),
        ({"context": {"last": 3}}, ["'last'", "last_messages"]),
        ({"context": {"last_messages": 0}}, ["last_messages", "10000"]),
        ({"tools": ["refund"]}, ["'refund'", "look_up"]),
        ({"tools": [3]}, ["tools", "names"]),
        ({"tools": "look_up"}, ["tools", "list"]),
        ({"tools": 3}, ["tools", "list"]),
        ({"instructions": 3}, ["instructions", "string"]),
        ({"options": "hot"}, ["options", "dict"]),
        ({"busy": "wait"}, ["busy", "enqueue", "reject"]),
        ({"busy": "reject all"}, ["steer", "interrupt", "rollback"]),
        ({"save": "some"}, ["save", "prompt_and_output", "all", "none"]),
        ({"priority": 40_000}, ["priority", "32767"]),
        ({"client_id": "x" * 201}, ["client_id", "200"]),
        ({"metadata": {"a": object()}}, ["metadata", "JSON"]),
        ({"metadata": "x"}, ["metadata", "dict"]),
        ({"messages": [{"role": "judge", "content": "x"}]}, ["role", "judge", "user"]),
        ({"messages": [{"content": "x", "mood": "bad"}]}, ["mood", "content"]),
    ],
    ids=str,
)
def test_an_option_that_does_not_fit_is_named(agent: Agent, options: dict[str, Any], words: list[str]) -> None:
    with refused(BadInput, *words):
        agent.start("hello", **options)


def test_an_input_and_a_saved_message(agent: Agent) -> None:
    message = Thread.objects.create().save(role="user", content="saved")
    with refused(BadInput, "input or message"):
        agent.start("hello", message=message)


def test_nothing_to_go_on_from(agent: Agent, scripted_model: ScriptedModel) -> None:
    thread = Thread.objects.create()
    with refused(BadInput, "empty", "Give an input"):
        agent.start(thread=thread)
    scripted_model.say("done")
    run = run_to_end(agent.start("hello"))
    with refused(BadInput, "Give an input"):
        agent.start(thread=run.thread)
    assert_invariants(run)


def test_the_same_key_and_request_give_the_same_run(agent: Agent) -> None:
    run = agent.start("hello", idempotency_key="k")
    before = counts()
    assert agent.start("hello", idempotency_key="k") == run
    assert counts() == before
    assert_invariants(run)


@pytest.mark.parametrize(
    "other", [{"input": "bye"}, {"save": "all"}, {"metadata": {"a": 1}}, {"limits": {"max_steps": 2}}]
)
def test_the_same_key_and_another_request_is_a_conflict(agent: Agent, other: dict[str, Any]) -> None:
    run = agent.start("hello", idempotency_key="k")
    with refused(IdempotencyConflict, "'k'", str(run.pk), "new key"):
        agent.start(**{"input": "hello", "idempotency_key": "k", **other})
