"""What the tests of runs share: agents of one test, what is in the database, what the model was asked, and a live process.

`Cast` makes agents that only one test knows. `add` is the tool that most of them have. `rows()` is all of Longhaul's rows, to see that nothing was changed.
`asked()` is a request as the scripted model got it. `Voice` is a provider that speaks piece by piece, as the test lets it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import orjson
import pytest
from django.db import connection

from runs import agents, engine
from runs.agents import Agent
from runs.conf import settings
from runs.flusher import Flusher
from runs.models import Event, Leg, Run, Step, Usage
from runs.providers import port
from runs.providers.port import Finished, ModelEvent, ModelRequest, ToolSpec
from threads.models import Message, Thread
from tools import execution, presence, tool
from tools import tasks as tool_tasks
from tools.models import ToolAttempt, ToolCall

TABLES = [model._meta.db_table for model in (Thread, Message, Run, Leg, Step, Event, Usage, ToolCall, ToolAttempt)]


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def rows() -> dict[str, list[str]]:
    """All of Longhaul's rows, as text."""
    found: dict[str, list[str]] = {table: [] for table in TABLES}
    with connection.cursor() as cursor:
        cursor.execute(" UNION ALL ".join(f"SELECT '{table}', t::text FROM {table} t" for table in TABLES))
        for table, row in cursor.fetchall():
            found[table].append(row)
    return {table: sorted(rows) for table, rows in found.items()}


@contextmanager
def refused(error: type[Exception], *words: str) -> Iterator[None]:
    """Expect the error, whose message has all the words, and every row as it was."""
    before = rows()
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
    assert rows() == before


class Cast:
    """Makes agents known for one test."""

    def __call__(self, name: str = "clerk", **options: Any) -> Agent:
        return agents.registry.add(Agent(name=name, **{"model": "scripted:x", **options}))


def asked(request: ModelRequest) -> dict[str, Any]:
    """A request as the scripted model got it, decoded."""
    return {
        "instructions": request.instructions,
        "messages": [orjson.loads(each) for each in request.messages],
        "tools": orjson.loads(request.tools) if request.tools else [],
        "tool_choice": request.tool_choice,
        "options": dict(request.options),
    }


def texts(request: ModelRequest) -> list[str]:
    """What a request shows, a short word a message: its text, `calls n` or the result."""
    return [shown(each) for each in asked(request)["messages"]]


def shown(message: Mapping[str, Any]) -> str:
    said = "".join(part["text"] for part in message["content"] if part["type"] == "text")
    calls = sum(part["type"] == "tool_call" for part in message["content"])
    results = [part for part in message["content"] if part["type"] == "tool_result"]
    if results:
        return f"-> {results[0]['result']}"
    return f"{said} calls {calls}".strip() if calls else said


def types(run: Run) -> list[str]:
    return list(Event.objects.filter(run=run).order_by("seq").values_list("type", flat=True))


def payloads(run: Run, type: str) -> list[dict[str, Any]]:
    return list(Event.objects.filter(run=run, type=type).order_by("seq").values_list("payload", flat=True))


class Voice:
    """A provider whose answers the test makes, event by event: `script` gets the request, and yields or raises."""

    name = "voice"

    def __init__(self, script: Callable[[ModelRequest], Iterator[ModelEvent]]) -> None:
        self.script = script
        self.requests: list[ModelRequest] = []
        self.closed = threading.Event()

    def render(self, message: Mapping[str, Any]) -> bytes:
        return orjson.dumps(message)

    def render_tools(self, tools: Sequence[ToolSpec]) -> bytes:
        return orjson.dumps([tool.name for tool in tools]) if tools else b""

    def warm(self) -> None: ...

    def close(self) -> None: ...

    def stream(self, request: ModelRequest) -> Iterator[ModelEvent]:
        self.requests.append(request)
        try:
            yield from self.script(request)
            yield Finished("stop")
        finally:
            self.closed.set()


@contextmanager
def speaking(script: Callable[[ModelRequest], Iterator[ModelEvent]]) -> Iterator[Voice]:
    """Let every model speak by the script."""
    voice = Voice(script)
    prefixes = {*port._factories, "scripted"}
    with (
        mock.patch.dict(port._factories, {"scripted": lambda: voice}),
        mock.patch.dict(port._providers, dict.fromkeys(prefixes, voice)),
    ):
        yield voice


@contextmanager
def agents_process(*, flushes: bool = True) -> Iterator[engine.Process]:
    """An agents worker's process: really present, with a flusher; its calls run at once, in this thread, as published.

    For tests that commit.
    """
    present = presence.Presence(name="test@localhost", kind="agents")
    present.tick()
    # One beat for all of it: nobody ticks again, and who has not beaten for seconds claims nothing.
    assert present._connection is not None
    ahead = "UPDATE longhaul_tools_worker SET beat_at = longhaul_now() + interval '1 hour' WHERE id = %s"
    present._connection.execute(ahead, (present.id,))
    flusher = Flusher(settings().flush_interval)
    flusher._thread = threading.Thread(target=_flush, args=(flusher,), daemon=True)
    process = engine.Process(present, flusher if flushes else None)
    if flushes:
        flusher.start()

    def execute(call_id: Any, attempt: int, *_: Any) -> None:
        execution.execute(call_id, attempt, presence=present)

    with mock.patch.object(tool_tasks, "publish", execute), mock.patch("runs.tasks.publish"):
        try:
            yield process
        finally:
            flusher.end()
            if flushes:
                flusher._thread.join(5)
            present.end()


def _flush(flusher: Flusher) -> None:
    """The flusher's own loop; its connection ends with it, for the test database is dropped at the end."""
    try:
        flusher._keep()
    finally:
        connection.close()


class Together:
    """Runs a function in several threads at once; each closes its own connection. `results` are answers or errors."""

    def __init__(self, *works: Callable[[], Any]) -> None:
        self.results: list[Any] = [None] * len(works)
        gate = threading.Barrier(len(works))

        def run(place: int, work: Callable[[], Any]) -> None:
            try:
                gate.wait(10)
                self.results[place] = work()
            except BaseException as error:
                self.results[place] = error
            finally:
                connection.close()

        self._threads = [
            threading.Thread(target=run, args=(place, work), daemon=True) for place, work in enumerate(works)
        ]
        for thread in self._threads:
            thread.start()

    def over(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def join(self) -> list[Any]:
        for thread in self._threads:
            thread.join(20)  # seconds: a deadlock must not hang the tests
            assert not thread.is_alive(), "still blocked"
        return self.results
