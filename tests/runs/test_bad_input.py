"""What cannot be taken is refused with what to do, and every row is as before; what goes wrong under a run ends it clearly.

More of the same, by option, stands in `tests/engine/test_bad_input.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from django.apps import apps
from django.db import connection

from runs import agents, engine
from runs.agents import Agent, Registry
from runs.exceptions import BadInput, InputTooLarge, UnknownAgent
from runs.models import Event, Run
from runs.providers.port import ModelEvent, ModelRequest, TextDelta
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from tests.runs.scenes import Cast, Together, add, agents_process, refused, rows, speaking
from threads.models import Message, Thread
from tools import tool
from tools.exceptions import ToolSchemaError
from tools.models import ToolAttempt, ToolCall

pytestmark = pytest.mark.django_db


@pytest.fixture
def agent(cast: Cast) -> Agent:
    return cast(tools=[add])


# --- what is unknown


def test_an_unknown_agent(agent: Agent) -> None:
    with refused(UnknownAgent, "'clark'", "clerk"):
        agents.get("clark")


def test_an_unknown_thread_or_message(agent: Agent) -> None:
    with refused(BadInput, "Thread", "Message"):
        agent.start("hello", thread=uuid4())
    gone = Thread(id=uuid4())
    gone._state.adding = False
    with refused(BadInput, f"There is no thread {gone.pk}"):
        agent.start("hello", thread=gone)
    message = Thread.objects.create().save(role="user", content="x")
    Message.objects.all().delete()
    with refused(BadInput, f"There is no message {message.pk}", "Save it again"):
        agent.start(message=message)


def test_a_message_that_nobody_could_answer(agent: Agent) -> None:
    thread = Thread.objects.create()
    with refused(BadInput, "saved in its thread"):
        agent.start(message=Message(thread=thread, role="user", content=[]))
    answer = thread.save(role="assistant", content="I said so")
    with refused(BadInput, "of the user"):
        agent.start(message=answer)
    with refused(BadInput, "not of this thread"):
        agent.start(message=answer, thread=Thread(id=uuid4()))


# --- sizes


def test_what_is_no_text_counts_as_what_is_stored_of_it(agent: Agent, settings: Any) -> None:
    settings.LONGHAUL = {"MAX_INPUT_CHARS": 100}
    with refused(InputTooLarge, "100", "MAX_INPUT_CHARS"):
        agent.start([{"type": "data", "data": {"x": "y" * 100}}])
    with refused(InputTooLarge, "A message", "MAX_INPUT_CHARS"):
        agent.start("hello", messages=[{"role": "user", "content": "x" * 101}])


# --- values


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"idempotency_key": ""}, ["idempotency_key", "empty"]),
        ({"idempotency_key": 7}, ["idempotency_key", "string"]),
        ({"idempotency_key": "x" * 201}, ["idempotency_key", "200"]),
        ({"client_id": 7}, ["client_id", "string"]),
        ({"limits": {"max_steps": 10**10}}, ["max_steps", "1,000,000"]),
        ({"limits": {"deadline_seconds": 10**11}}, ["deadline_seconds", "315,360,000"]),
        ({"limits": {"leg_budget_seconds": float("inf")}}, ["leg_budget_seconds"]),
        ({"tool_choice": "multiply"}, ["tool_choice", "'multiply'", "auto, none, required"]),
        ({"tool_choice": "add", "tools": []}, ["tool_choice", "'add'"]),
        ({"options": {"x": object()}}, ["options", "JSON"]),
        ({"metadata": {"n": 2**70}}, ["metadata", "JSON"]),
        ({"metadata": {"n": float("nan")}}, ["metadata", "JSON"]),
        ({"messages": "hello"}, ["messages", "list"]),
        ({"messages": ["hello"]}, ["message", "dict"]),
        ({"messages": [{"role": "user", "content": None}]}, ["content"]),
        ({"messages": [{"role": ["user"], "content": "x"}]}, ["role"]),
        ({"messages": [{"role": "tool", "content": "x"}]}, ["role", "'tool'"]),
        ({"messages": [{"role": "user", "content": "x", "client_id": "x" * 201}]}, ["client_id", "200"]),
        ({"messages": [{"role": "user", "content": "x", "metadata": [1]}]}, ["metadata", "dict"]),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_kept(agent: Agent, options: dict[str, Any], words: list[str]) -> None:
    with refused(BadInput, *words):
        agent.start("hello", **options)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (7, ["content", "string or a list"]),
        ([7], ["content[0]"]),
        ([{"type": ["text"]}], ["content[0]", "text"]),
        ([{"type": "text", "text": "x"}, {"type": "song"}], ["content[1]", "image"]),
        ([{"type": "text", "text": 7}], ["content[0].text", "str"]),
        ([{"type": "data", "data": {"x": object()}}], ["content[0]", "JSON"]),
        # One without the other is a transcript that no provider takes.
        ([{"type": "tool_call", "tool_call": "1", "name": "add"}], ["content[0]", "only runs write"]),
        ([{"type": "tool_result", "tool_call": "1", "outcome": "success"}], ["content[0]", "only runs write"]),
    ],
    ids=str,
)
def test_an_input_that_is_no_content(agent: Agent, content: Any, words: list[str]) -> None:
    with refused(BadInput, *words):
        agent.start(content)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model": "nobody:gpt"}, ["nobody", "openai"]),
        ({"limits": {"max_steps": "many"}}, ["max_steps", "whole number"]),
        ({"mood": "good"}, ["mood", "instructions"]),
        ({"tools": ["multiply"]}, ["'multiply'", "add"]),
    ],
    ids=str,
)
def test_a_thread_whose_overrides_do_not_fit(
    agent: Agent, scripted_model: ScriptedModel, overrides: dict[str, Any], words: list[str]
) -> None:
    thread = Thread.objects.create(overrides=overrides)
    with refused(BadInput, *words):
        agent.start("hello", thread=thread)
    # The same, put there under a run that waits: it fails, and says why.
    run = agent.start("hello")
    Thread.objects.filter(pk=run.thread_id).update(overrides=overrides)
    run_to_end(run)
    assert (run.status, run.stop_reason) == ("failed", "configuration")
    assert run.error is not None
    assert all(word in run.error["message"] for word in words)
    assert scripted_model.requests == []
    assert_invariants(run)


# --- a thread that is deleted under a run


def test_a_thread_deleted_under_a_waiting_run(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = agent.start("hello")
    agent.start("and then", thread=run.thread)
    also = Thread.objects.get(pk=run.thread_id)
    run.thread.delete()
    assert not any(rows().values())
    with refused(BadInput, f"There is no thread {also.pk}"):
        agent.start("again", thread=also)


@pytest.mark.django_db(transaction=True)
def test_a_thread_deleted_under_a_running_run_stops_its_leg_which_writes_nothing_more(cast: Cast) -> None:
    run: Run

    def script(request: ModelRequest) -> Iterator[ModelEvent]:
        yield TextDelta("begins")
        Thread.objects.get(pk=run.thread_id).delete()
        yield TextDelta(" and goes on")

    with speaking(script) as voice, agents_process() as process:
        run = cast().start("hello")
        engine.advance(run.pk, 1, process)
        assert voice.closed.is_set()
        assert len(voice.requests) == 1
    assert not any(rows().values())


@pytest.mark.django_db(transaction=True)
def test_a_thread_deleted_under_running_calls(cast: Cast, scripted_model: ScriptedModel) -> None:
    @tool
    def leave() -> str:
        """Delete the thread."""
        Thread.objects.get(pk=run.thread_id).delete()
        return "too late"

    scripted_model.say([call("leave"), call("leave")])
    with agents_process() as process:
        run = cast(tools=[leave]).start("hello")
        engine.advance(run.pk, 1, process)
    assert not any(rows().values())
    assert not ToolCall.objects.exists()
    assert not ToolAttempt.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_thread_deleted_while_a_run_starts_on_it(agent: Agent) -> None:
    for _ in range(5):
        thread = Thread.objects.create()
        started, deleted = Together(partial(agent.start, "hello", thread=thread), partial(_delete, thread.pk)).join()
        assert isinstance(started, Run | BadInput), started
        assert not isinstance(deleted, BaseException), deleted
        assert not any(rows().values())


def _delete(pk: Any) -> None:
    Thread.objects.get(pk=pk).delete()


# --- code that cannot be used


@pytest.fixture
def apps_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Make apps of a name and the text of their agents.py, and return a fresh registry over them."""
    made: list[str] = []

    def make(**texts: str) -> Registry:
        monkeypatch.syspath_prepend(tmp_path)
        configs = []
        for name, text in texts.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("")
            (tmp_path / name / "agents.py").write_text(text)
            made.append(name)
            configs.append(SimpleNamespace(name=name, module=__import__(name)))
        monkeypatch.setattr(apps, "get_app_configs", lambda: configs)
        return Registry()

    yield make
    for name in made:
        for module in (name, f"{name}.agents"):
            sys.modules.pop(module, None)


FINE = "from runs import Agent\n{0} = Agent(name='{0}', model='scripted:x')\n"


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("import no_such_library\n", ["no_such_library"]),
        ("def f(:\n", ["SyntaxError"]),
        (
            "from tools import tool\n@tool\ndef refund(number: int, amount) -> str:\n    'Pay back.'\n",
            ["ToolSchemaError", "'refund'", "'amount'"],
        ),
        ("from runs import Agent\na = Agent(name='a', limits={'max_stairs': 1})\n", ["max_stairs", "max_steps"]),
        (FINE.format("fine"), ["Two agents are named 'fine'", "Rename"]),
    ],
    ids=["import", "syntax", "tool", "limit", "name"],
)
def test_an_agents_module_that_cannot_be_used_is_named_and_the_others_work(
    apps_on_disk: Any, broken: str, words: list[str]
) -> None:
    registry = apps_on_disk(good_app=FINE.format("fine"), broken_app=broken, last_app=FINE.format("last"))
    assert registry.get("fine").name == "fine"
    assert registry.get("last").name == "last"
    assert list(registry.broken()) == ["broken_app.agents"]
    with refused(UnknownAgent, "'missing'", "fine, last", "broken_app.agents", *words):
        registry.get("missing")


def test_a_tool_signature_that_cannot_be_a_schema_names_the_parameter() -> None:
    with pytest.raises(ToolSchemaError, match=r"'pay'.*'how'"):

        @tool
        def pay(amount: int, how: Event.DoesNotExist) -> str:
            """Pay."""
            return ""


def test_the_sql_of_a_refusal_leaves_the_connection_usable(agent: Agent) -> None:
    with refused(BadInput):
        agent.start("hello", metadata={"x": object()})
    assert not connection.needs_rollback
    assert_invariants(agent.start("hello"))
