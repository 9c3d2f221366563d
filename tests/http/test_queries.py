"""How many queries each call makes: as many for 50 rows as for one.

`QUERIES` counts the statements of a request, the check of its key among them (one, and once a minute a second that notes
the key's use). What begins and ends a transaction or a savepoint is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test.utils import CaptureQueriesContext

from runs.agents import Agent
from runs.models import Leg, Run, Status, Step
from tests.http.conftest import Api
from threads import clock, database
from threads.ids import new_id
from threads.models import Message, Thread
from tools.models import ToolAttempt, ToolCall

pytestmark = pytest.mark.django_db

QUERIES: dict[str, int] = {
    "GET /api/threads": 2,
    "GET /api/threads/{thread}": 3,
    "GET /api/threads/{thread}/messages": 4,
    "GET /api/runs": 9,
    "GET /api/runs?active=true": 8,
    "GET /api/runs/{run}": 3,
    "GET /api/runs/{run}/events": 3,
    "GET /api/runs/{run}/steps": 3,
    "GET /api/runs/{run}/legs": 3,
    "GET /api/runs/{run}/messages": 3,
    "GET /api/runs/{run}/tool-calls": 4,
    "GET /api/tool-calls": 3,
    "GET /api/tool-calls/{call}": 3,
    "GET /api/agents": 1,
    "GET /api/tools": 1,
    "GET /api/usage": 3,
    "POST /api/threads": 2,
    "PATCH /api/threads/{thread}": 4,
    "POST /api/threads/{thread}/messages": 5,
    "POST /api/runs": 7,
    "POST /api/threads/{free}/runs": 12,
    "POST /api/threads/{thread}/runs": 14,  # it is busy: held
    "POST /api/runs/{live}/cancel": 6,
    "POST /api/runs/{run}/cancel": 5,
    "POST /api/runs/{failed}/resume": 14,
    "POST /api/runs/{said}/fork": 27,
    "POST /api/runs/{said}/retry": 21,
    "POST /api/tool-calls/{unknown_1}/result": 6,
    "POST /api/tool-calls/{unknown_2}/error": 6,
    "POST /api/tool-calls/{unknown_3}/cancel": 6,
    "DELETE /api/messages/{message}": 9,
    "DELETE /api/threads/{old}": 13,
}
LISTS = [
    name
    for name in QUERIES
    if name.startswith("GET") and name.endswith(("s", "true")) and not name.endswith(("events", "agents", "api/tools"))
]
NOT_COUNTED = ("SAVEPOINT", "RELEASE", "ROLLBACK", "BEGIN", "COMMIT")
BODIES: dict[str, Any] = {
    "POST /api/threads": {"title": "a"},
    "PATCH /api/threads/{thread}": {"title": "b"},
    "POST /api/threads/{thread}/messages": {"content": "a"},
    "POST /api/runs": {"agent": "helper", "input": "a"},
    "POST /api/threads/{thread}/runs": {"input": "a"},
    "POST /api/threads/{free}/runs": {"input": "a"},
    "POST /api/runs/{said}/fork": {"after_step": 0},
    "POST /api/tool-calls/{unknown_1}/result": {"result": 1},
    "POST /api/tool-calls/{unknown_2}/error": {"message": "It is not there.", "retryable": True},
}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the statements: Django's, and those that go to psycopg past it."""
    found: list[str] = []
    real = database._execute

    def execute(raw: Any, statement: str, parameters: Any) -> Any:
        found.append(statement)
        return real(raw, statement, parameters)

    with monkeypatch.context() as patched, CaptureQueriesContext(connection) as captured:
        patched.setattr(database, "_execute", execute)
        yield found
    found += [query["sql"] for query in captured if not query["sql"].startswith(NOT_COUNTED)]


def filled(api: Api, rows: int) -> dict[str, str]:
    """So many of everything: threads with a finished, a queued and a held run; a run with steps, legs, messages, calls."""
    owner, moment = api.user, clock.now()
    for _ in range(rows):
        thread = Thread.objects.create(owner=owner, agent="helper")
        run = Run.objects.create(
            owner=owner, thread=thread, agent="helper", status=Status.COMPLETED, stop_reason="end_turn"
        )
        for text in ("live", "held"):
            live = api.post(f"/api/threads/{thread.pk}/runs", {"input": text}, 202)
    # Runs that nobody has taken for long: `why` asks for workers too.
    Run.objects.filter(status=Status.QUEUED).update(queued_at=moment - timedelta(minutes=1), publishes=5)
    run = Run.objects.filter(status=Status.COMPLETED).order_by("id")[0]
    for number in range(1, rows + 1):
        message = Message.objects.create(
            thread=run.thread,
            role="user",
            position=100 + number,
            run_id=run.pk,
            content=[{"type": "text", "text": "a"}],
        )
        leg = Leg.objects.create(
            run=run, number=number, epoch=number, worker_id=uuid4(), worker="w", ended_at=moment, reason="budget"
        )
        Step.objects.create(
            run=run, number=number, leg_id=leg.pk, epoch=number, message_id=message.pk, model="scripted:x"
        )
        call = ToolCall.objects.create(
            run_id=run.pk, message_id=message.pk, step=number, index=0, name="look_up", status="settled",
            outcome="success", timeout=moment - moment, idempotency_key=str(number),
        )  # fmt: skip
        ToolAttempt.objects.create(call=call, number=1, worker_id=new_id())
    live = str(Run.objects.filter(status=Status.QUEUED).order_by("id")[0].pk)
    free = Thread.objects.create(owner=owner, agent="helper")
    old = Thread.objects.create(owner=owner)
    message, *_ = old.save_many([{"role": "user", "content": "a"}] * (rows + 1))
    named = {"free": free, "thread": run.thread, "run": run, "call": call, "old": old, "message": message}
    named |= {f"unknown_{number}": unknown_call(owner) for number in (1, 2, 3)}
    named |= {"said": ended_run(owner, Status.COMPLETED, rows), "failed": ended_run(owner, Status.FAILED, rows)}
    return {"live": live, **{name: str(row.pk) for name, row in named.items()}}


def unknown_call(owner: User) -> ToolCall:
    """A call that a person must say something about, of a run that waits for nothing else."""
    thread = Thread.objects.create(owner=owner, agent="helper")
    run = Run.objects.create(owner=owner, thread=thread, agent="helper", status=Status.REQUIRES_ACTION, steps=1)
    call = ToolCall.objects.create(
        run_id=run.pk, message_id=new_id(), step=1, index=0, name="refund", status="unknown", idempotent=False,
        timeout=timedelta(0), idempotency_key="1",
    )  # fmt: skip
    ToolAttempt.objects.create(call=call, number=1, worker_id=new_id(), outcome="lost", ended_at=clock.now())
    return call


def ended_run(owner: User, status: Status, steps: int) -> Run:
    """A run of so many steps, with an input and what the model said in each; a failed one has not said its last."""
    thread = Thread.objects.create(owner=owner, agent="helper")
    reason = "end_turn" if status == Status.COMPLETED else "deadline"
    run = Run.objects.create(owner=owner, thread=thread, agent="helper", status=status, stop_reason=reason, steps=steps)
    said = [Message(thread=thread, role="user", position=1, run_id=run.pk, content=[{"type": "text", "text": "a"}])]
    for number in range(1, steps + 1):
        role = "assistant" if status == Status.COMPLETED and number == steps else "user"
        said.append(
            Message(
                thread=thread,
                role=role,
                position=number + 1,
                run_id=run.pk,
                step=number,
                content=[{"type": "text", "text": "a"}],
            )
        )
        Step.objects.create(
            run=run, number=number, leg_id=new_id(), epoch=1, message_id=said[-1].pk, model="scripted:x"
        )
    Message.objects.bulk_create(said)
    Run.objects.filter(pk=run.pk).update(input_message_id=said[0].pk, dispatch_seq=1)
    return run


@pytest.mark.parametrize("rows", [1, 50])
def test_queries_are_bounded(api: Api, helper: Agent, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    named = filled(api, rows)
    api.get("/api/agents")  # the key's use is noted now
    found = {}
    for name in QUERIES:
        method, path = name.split()
        with counted(monkeypatch) as statements:
            answer = api.call(method.lower(), path.format(**named), BODIES.get(name))
        assert answer.status_code < 300, (name, answer.content)
        found[name] = len(statements)
        print(f"{len(statements):3}  {name}")
        if name in LISTS:
            assert len(answer.json()["results"]) >= rows
    assert found == QUERIES


def test_a_key_and_a_second_try_cost_few_more(api: Api, helper: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    api.get("/api/agents")
    body = {"agent": "helper", "input": "a"}
    with counted(monkeypatch) as first:
        api.call("post", "/api/runs", body, status=202, **{"Idempotency-Key": "a"})
    with counted(monkeypatch) as again:
        api.call("post", "/api/runs", body, status=202, **{"Idempotency-Key": "a"})
    assert len(first) == QUERIES["POST /api/runs"] + 2
    assert len(again) == 3
