"""What the model was sent in a step is rebuilt byte for byte, as a real server got it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import groupby
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import pytest

from agents_project.demo.model_server import ModelCall, ModelServer, Reasoning, Reply, Status, Text, ToolCall
from runs import Run, engine
from runs.agents import Agent
from runs.models import Step
from runs.providers import port
from runs.providers.openai import OpenAIProvider
from runs.pytest_longhaul import ScriptedModel, call, run_to_end
from runs.step_request import NoSuchStep, step_request
from runs.verification import verify
from tests.runs.scenes import Cast, agents_process
from tests.runs.test_commands import ran
from threads.models import Message, Thread
from tools import ToolFailed, tool
from tools.registry import Tool

pytestmark = pytest.mark.django_db


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def refuse(why: str, zeta: float = 0.5, alpha: dict[str, int] | None = None) -> str:
    """Refuse, and say why: Umlaute äöü, quotes \" and all."""
    raise ToolFailed(f"No: {why}")


class Recorder:
    """Stands between a client and a server, and keeps the body of each request as it came over the wire."""

    def __init__(self, url: str) -> None:
        self._to = urlsplit(url)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}{self._to.path}"
        self.bodies: list[bytes] = []
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in (self._listening, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # whoever waits for it wakes
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listening.accept()
                theirs = socket.create_connection((self._to.hostname or "", self._to.port or 0))
                self._open += [ours, theirs]
                threading.Thread(target=self._pass, args=(ours, theirs, self._take()), daemon=True).start()
                threading.Thread(target=self._pass, args=(theirs, ours, lambda data: None), daemon=True).start()

    def _pass(self, source: socket.socket, to: socket.socket, heard: Callable[[bytes], None]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                heard(data)
                to.sendall(data)
        with contextlib.suppress(OSError):
            to.shutdown(socket.SHUT_WR)

    def _take(self) -> Callable[[bytes], None]:
        received = bytearray()

        def heard(data: bytes) -> None:
            received.extend(data)
            while b"\r\n\r\n" in received:
                head, _, rest = bytes(received).partition(b"\r\n\r\n")
                [length] = [
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                ]
                if len(rest) < length:
                    return
                self.bodies.append(rest[:length])
                del received[: len(head) + 4 + length]

        return heard


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer(lambda call: [Text("done")]) as server:
        yield server


@pytest.fixture
def wire(server: ModelServer) -> Iterator[Recorder]:
    """Every model is asked over the wire that is recorded."""
    with (
        closing(Recorder(server.url)) as recorder,
        closing(OpenAIProvider("a-key", recorder.url)) as provider,
        mock.patch.dict(port._providers, {"openai": provider}),
    ):
        yield recorder


def counting(last: int) -> Callable[[ModelCall], Reply]:
    """A model that calls tools until it has done `last` steps, in the many ways in which a request may differ."""

    def script(call: ModelCall) -> Reply:
        steps = sum(message["role"] == "assistant" for message in call.messages)
        if not call.tools:
            return [Text("All done.")]
        if call.number % 7 == 3:
            return [Status(503, "busy")]
        if steps >= last:
            return [Reasoning("so"), Text("The end: ä, \u20ac, \U0001f600.")]
        return [
            Text(f"Step {call.number}."),
            ToolCall("add", {"b": 2, "a": call.number}),
            ToolCall("refuse", {"zeta": 1.5, "why": "ü", "alpha": {"z": 1, "a": 2}}),
            ToolCall("refuse", "no json"),
        ]

    return script


def proven(run: Run, wire: Recorder) -> list[dict[str, Any]]:
    """Each step's request, after its bytes were found on the wire, in order; a try that failed was sent the same."""
    assert run.finished, run.why()
    requests = [step_request(run, number) for number in range(1, run.steps + 1)]
    assert [request.body for request in requests] == [body for body, _ in groupby(wire.bodies)]
    assert not any(request.doubts for request in requests)
    return [json.loads(request.body) for request in requests]


def agent_of(cast: Cast, **options: Any) -> Agent:
    return cast(model="openai:gpt-test", tools=[add, refuse], **options)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("legs", ["one leg", "a leg a step"])
def test_every_request_of_a_long_run_is_what_the_server_got(
    cast: Cast, server: ModelServer, wire: Recorder, legs: str
) -> None:
    """The window moves on: the input is pinned, discarded messages are skipped; the last step is asked for without tools."""
    server.script = counting(40)
    agent = agent_of(
        cast,
        instructions=lambda run: f"You serve run {run.pk}. „So“",
        options={"temperature": 0.25, "top_p": 1.0, "seed": 7, "metadata": {"zz": 1, "a": "ä"}},
        context={"last_messages": 12},
    )
    thread = Thread.objects.create()
    thread.save_many([{"role": "user", "content": f"old {number}"} for number in range(20)])
    run = agent.start(
        "the task", thread=thread, messages=[{"role": "system", "content": "be brief"}], limits={"max_steps": 12}
    )
    if legs == "one leg":
        with agents_process() as process:
            while not run.finished:
                Run.objects.filter(pk=run.pk).update(not_before=None)
                run.refresh_from_db()
                engine.advance(run.pk, run.dispatch_seq, process)
                run.refresh_from_db()
    else:
        run_to_end(run, real_model=True)
    assert (run.status, run.stop_reason, run.steps) == ("completed", "max_steps", 12)
    bodies = proven(run, wire)
    assert len(wire.bodies) > run.steps, "some were tried again"
    assert bodies[-1]["tool_choice"] == "none"
    assert "tool_choice" not in bodies[0]
    contexts = [step.context for step in Step.objects.filter(run=run).order_by("number")]
    assert any(context["pinned"] for context in contexts)
    assert any(context["skipped"] for context in contexts)
    assert [message["content"] for message in bodies[-1]["messages"][1:3]] == ["be brief", "the task"]


def test_what_the_thread_and_the_run_override_is_in_the_request(
    cast: Cast, server: ModelServer, wire: Recorder
) -> None:
    server.script = counting(1)
    agent = agent_of(cast, instructions="Agent.", options={"temperature": 1})
    thread = Thread.objects.create(
        overrides={"instructions": "Thread.", "model": "openai:of-thread", "options": {"top_p": 0.5, "temperature": 0}}
    )
    run = run_to_end(agent.start("hello", thread=thread), real_model=True)
    [first, _] = proven(run, wire)
    assert (first["model"], first["messages"][0]["content"], first["temperature"]) == ("of-thread", "Thread.", 0)
    wire.bodies.clear()
    server.script = counting(10)
    run = run_to_end(
        agent.start(
            "again",
            thread=thread,
            model="openai:of-run",
            instructions="Run.",
            tools=["refuse"],
            tool_choice="refuse",
            options={"seed": 3},
            limits={"max_steps": 2},
        ),
        real_model=True,
    )
    first, last = proven(run, wire)
    assert (first["model"], first["messages"][0]["content"], first["seed"], first["top_p"]) == (
        "of-run",
        "Run.",
        3,
        0.5,
    )
    assert [each["function"]["name"] for each in first["tools"]] == ["refuse"]
    assert first["tool_choice"]["function"]["name"] == "refuse"
    assert last["tool_choice"] == "none"


def test_an_output_schema_and_the_correction_of_an_answer_are_in_the_request(
    cast: Cast, server: ModelServer, wire: Recorder
) -> None:
    server.script = lambda call: [Text("no json" if len(call.messages) == 1 else '{"zeta": 1, "alpha": 2}')]
    shape = {"type": "object", "properties": {"zeta": {"type": "integer"}, "alpha": {"type": "integer"}}}
    run = run_to_end(agent_of(cast).start("hello", output_schema=shape), real_model=True)
    assert (run.status, run.output) == ("completed", {"zeta": 1, "alpha": 2})
    first, second = proven(run, wire)
    assert first["response_format"]["json_schema"]["schema"] == shape
    assert len(second["messages"]) == 3
    assert [str(each) for each in verify(run).differences] == []


def test_the_command_shows_a_step_and_writes_its_very_body(cast: Cast, server: ModelServer, wire: Recorder) -> None:
    server.script = counting(1)
    run = run_to_end(agent_of(cast, instructions="Be kind.\nBe brief.").start("What?"), real_model=True)
    for number, body in enumerate(wire.bodies, start=1):
        assert ran("replay_run", str(run.pk)[-8:], "--at-step", str(number), "--json").out.encode() == body + b"\n"
    shown = ran("replay_run", str(run.pk), "--at-step", "2")
    assert (shown.code, shown.err) == (0, "")
    lines = [line.strip() for line in shown.out.splitlines()]
    step = Step.objects.get(run=run, number=2)
    for line in (
        f"Step 2 of run {run.pk}: what the model was sent ({len(wire.bodies[1]):,} bytes)",
        "model         openai:gpt-test",
        "tool_choice   auto",
        "options       {}",
        "Be kind.",
        "Be brief.",
        f"tools         2, digest {step.schema_digest} (as in code today)",
        "add: Add two numbers.",
        json.dumps(add.parameters),
        "What?",
        "Step 1.",
        'calls add({"a": 1, "b": 2})',
        "add success: 3",
    ):
        assert line in lines, (line, shown.out)
    assert [line for line in lines if line.startswith("refuse failed: ") and "No: ü" in line]


def test_a_step_that_is_not_there_is_answered_with_how_many_there_are(
    cast: Cast, scripted_model: ScriptedModel
) -> None:
    run = cast().start("hello")
    with pytest.raises(NoSuchStep, match="no committed step yet"):
        step_request(run, 1)
    scripted_model.say("done")
    run_to_end(run)
    for number in (0, 2, -1):
        with pytest.raises(NoSuchStep, match="it has committed 1, from 1"):
            step_request(run, number)


@tool(name="add")
def other_add(a: int, b: int, c: int = 0) -> int:
    """Add three numbers."""
    return a + b + c


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([other_add, refuse], "the schemas of its tools have changed in code"),
        ([refuse], "these tools are no longer in code: add"),
        (None, "the agent 'clerk' is no longer in code"),
    ],
    ids=["changed", "gone", "no agent"],
)
def test_what_has_changed_in_code_since_is_said_and_ends_with_1(
    cast: Cast, server: ModelServer, wire: Recorder, tools: list[Tool] | None, words: str
) -> None:
    from runs import agents

    run = run_to_end(agent_of(cast).start("hello"), real_model=True)
    assert ran("replay_run", str(run.pk), "--at-step", "1").code == 0
    if tools is None:
        del agents.registry._agents["clerk"]
    else:
        cast(model="openai:gpt-test", tools=tools)
    for options in ([], ["--json"]):
        shown = ran("replay_run", str(run.pk), "--at-step", "1", *options)
        assert shown.code == 1
        assert "This is not exactly what was sent: " in shown.err
        assert words in shown.err
        assert shown.out


def test_a_message_that_was_deleted_since_is_said(cast: Cast, scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("add", a=1, b=2), "three")
    run = run_to_end(cast(tools=[add]).start("hello"))
    assert step_request(run, 2).doubts == []
    Message.objects.filter(run_id=run.pk, role="user").delete()
    assert step_request(run, 2).doubts == ["1 of the messages that it was shown was deleted since"]
