"""What clients get: each resource's shape, and how it is made of rows. The shapes are what the document promises."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from django.db.models import OuterRef, QuerySet, Subquery
from django.db.models.functions import Coalesce
from pydantic import BaseModel, ConfigDict, Field

from runs import agents as agent_registry
from runs import models
from runs.conf import settings
from runs.explain import explain_all
from runs.http.events import RESULT, STORED, Event, Stored
from runs.http.json import time
from runs.models import OCCUPYING
from threads.models import Message as MessageRow
from threads.models import Thread as ThreadRow
from tools.hooks import name_of
from tools.models import CallStatus as CallStatuses
from tools.models import ToolCall as CallRow
from tools.registry import Tool as ToolDefinition

RunStatus = Literal["held", "queued", "running", "waiting", "requires_action", "completed", "failed", "cancelled"]
CallStatus = Literal[
    "requested", "awaiting_approval", "running", "retrying", "awaiting_result", "awaiting_child", "unknown", "settled"
]
MessageStatus = Literal["waiting", "pending", "completed", "partial", "discarded", "superseded", "rolled_back"]


class Problem(BaseModel):
    """Why something failed: a code to program against, and a sentence to read."""

    model_config = ConfigDict(extra="allow")
    code: str
    message: str | None = None
    retryable: bool | None = None


class RunUsage(BaseModel):
    """What a run's model calls used, those of discarded messages too. `cost` is a decimal number as text."""

    input_tokens: int
    output_tokens: int
    cost: str


class RunLimits(BaseModel):
    """What bounds the run: its own, its thread's, its agent's and the settings' limits laid over one another."""

    max_steps: int | None
    max_total_tokens: int | None
    max_cost: float | None
    deadline_seconds: float | None
    leg_budget_seconds: float | None


class Effect(BaseModel):
    """A tool call of a run that was rolled back: its effect is there (`taken`), or may be (`possible`)."""

    id: UUID
    name: str
    arguments: Any
    outcome: str
    effect: Literal["taken", "possible"]


class RolledBack(BaseModel):
    """What a run with `busy: rollback` has taken back. The effects of these calls are not undone."""

    run: UUID
    tool_calls: list[Effect]


class Run(BaseModel):
    """One execution of an agent over a thread."""

    id: UUID
    thread: UUID
    agent: str
    status: RunStatus
    stop_reason: str | None
    why: str = Field(description="why the run stands where it stands, for a person")
    error: Problem | None
    output: Any = Field(description="the final text, or the object that output_schema asks for")
    usage: RunUsage
    limits: RunLimits | None
    legs: int
    steps: int
    epoch: int
    last_seq: int = Field(description="of the last event so far")
    parent: UUID | None
    origin: str = Field(description="start, resume, retry, fork, steer, child, handoff")
    priority: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    metadata: dict[str, Any]
    rolled_back: RolledBack | None = Field(
        default=None, description="only of a run that has rolled another one back, by itself"
    )


def run(row: models.Run) -> dict[str, Any]:
    found = runs([row])[0]
    if (taken_back := row.rolled_back) is not None:
        found["rolled_back"] = taken_back
    return found


def runs(rows: Iterable[models.Run]) -> list[dict[str, Any]]:
    rows = list(rows)
    told = explain_all(rows)
    return [_run(row, told[row.pk].why) for row in rows]


def _run(row: models.Run, why: str) -> dict[str, Any]:
    return {
        "id": str(row.pk),
        "thread": str(row.thread_id),
        "agent": row.agent,
        "status": row.status,
        "stop_reason": row.stop_reason or None,
        "why": why,
        "error": row.error,
        "output": row.output,
        "usage": {"input_tokens": row.input_tokens, "output_tokens": row.output_tokens, "cost": plain(row.cost)},
        "limits": limits(row),
        "legs": row.legs,
        "steps": row.steps,
        "epoch": row.epoch,
        "last_seq": row.last_seq,
        "parent": None if row.parent_id is None else str(row.parent_id),
        "origin": row.origin,
        "priority": row.priority,
        "created_at": time(row.created_at),
        "started_at": time(row.started_at),
        "finished_at": time(row.finished_at),
        "metadata": row.metadata,
    }


def plain(number: Any) -> str:
    """A decimal number as text, without the zeros that a column adds."""
    text = f"{number:f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"


def limits(row: models.Run) -> dict[str, Any] | None:
    """What bounds the run as its agent is defined now; None when there is no such agent any more."""
    try:
        said = agent_registry.define(agent_registry.get(row.agent), row.thread.overrides, row.overrides).limits
    except Exception:  # a definition that was renamed, removed or broken under a run: the run says so itself
        return None
    return {
        "max_steps": said.max_steps,
        "max_total_tokens": said.max_total_tokens,
        "max_cost": None if said.max_cost is None else float(said.max_cost),
        "deadline_seconds": None if said.deadline is None else said.deadline.total_seconds(),
        "leg_budget_seconds": said.leg_budget.total_seconds(),
    }


class Thread(BaseModel):
    """A conversation. `status` is that of its live run, or of its last one; null before the first."""

    id: UUID
    agent: str | None
    title: str
    summary: str
    metadata: dict[str, Any]
    status: RunStatus | None
    run: UUID | None = Field(description="the run whose status that is")
    model: str | None
    instructions: str | None
    tools: list[str] | None
    limits: dict[str, Any] | None
    context: dict[str, Any] | None
    archived: bool
    created_at: datetime


def with_run(rows: QuerySet[ThreadRow]) -> QuerySet[ThreadRow]:
    """Name each thread's live run, or its last one (`run_id`), and its status: by index, in the same query."""
    of_thread = models.Run.objects.filter(thread=OuterRef("pk"))
    live = of_thread.filter(status__in=OCCUPYING)
    last = of_thread.order_by("-entered_at", "-id")
    found: QuerySet[ThreadRow] = rows.annotate(
        run_id=Coalesce(Subquery(live.values("pk")[:1]), Subquery(last.values("pk")[:1])),
        run_status=Coalesce(Subquery(live.values("status")[:1]), Subquery(last.values("status")[:1])),
    )
    return found


def thread(row: Any) -> dict[str, Any]:
    """`row` comes from `with_run`."""
    said = row.overrides
    return {
        "id": str(row.pk),
        "agent": row.agent or None,
        "title": row.title,
        "summary": row.summary,
        "metadata": row.metadata,
        "status": row.run_status,
        "run": None if row.run_id is None else str(row.run_id),
        "model": said.get("model"),
        "instructions": said.get("instructions"),
        "tools": said.get("tools"),
        "limits": said.get("limits"),
        "context": said.get("context"),
        "archived": row.archived_at is not None,
        "created_at": time(row.created_at),
    }


def threads(rows: Iterable[Any]) -> list[dict[str, Any]]:
    return [thread(row) for row in rows]


class ContentPart(BaseModel):
    """`{type: text|reasoning, text}`, `{type: tool_call, tool_call, name, arguments}`, `{type: tool_result, tool_call,
    outcome, result, stored?}`, `{type: image|file|data, ...}`."""

    model_config = ConfigDict(extra="allow")
    type: str


class Message(BaseModel):
    """One entry of a thread."""

    id: UUID
    thread: UUID
    run: UUID | None
    step: int | None
    role: Literal["user", "assistant", "tool", "system"]
    status: MessageStatus
    content: list[ContentPart]
    metadata: dict[str, Any]
    client_id: str | None
    created_at: datetime


def message(row: MessageRow) -> dict[str, Any]:
    return {
        "id": str(row.pk),
        "thread": str(row.thread_id),
        "run": None if row.run_id is None else str(row.run_id),
        "step": row.step,
        "role": row.role,
        "status": row.status,
        "content": row.content,
        "metadata": row.metadata,
        "client_id": row.client_id or None,
        "created_at": time(row.created_at),
    }


def messages(rows: Iterable[MessageRow]) -> list[dict[str, Any]]:
    return [message(row) for row in rows]


class Step(BaseModel):
    """One committed model turn, and what was asked for in it."""

    number: int
    run: UUID
    leg: UUID
    epoch: int
    message: UUID
    model: str
    instructions: str
    tools: list[str]
    schema_digest: str
    options: dict[str, Any]
    created_at: datetime


def steps(rows: Iterable[models.Step]) -> list[dict[str, Any]]:
    return [
        {
            "number": row.number,
            "run": str(row.run_id),
            "leg": str(row.leg_id),
            "epoch": row.epoch,
            "message": str(row.message_id),
            "model": row.model,
            "instructions": row.instructions,
            "tools": row.tool_names,
            "schema_digest": row.schema_digest,
            "options": row.asked(),
            "created_at": time(row.created_at),
        }
        for row in rows
    ]


class Leg(BaseModel):
    """One Celery task's stretch of a run. `reason` says how it ended."""

    id: UUID
    run: UUID
    number: int
    epoch: int
    worker: str
    task: str | None
    started_at: datetime
    ended_at: datetime | None
    reason: str | None = Field(
        description="budget, limited, tools, person, retry, drained, lost, cancelled, failed, finished; null while it runs"
    )


def legs(rows: Iterable[models.Leg]) -> list[dict[str, Any]]:
    return [
        {
            "id": str(row.pk),
            "run": str(row.run_id),
            "number": row.number,
            "epoch": row.epoch,
            "worker": row.worker,
            "task": row.task_id or None,
            "started_at": time(row.started_at),
            "ended_at": time(row.ended_at),
            "reason": row.reason or None,
        }
        for row in rows
    ]


class Attempt(BaseModel):
    """One try at a tool call."""

    number: int
    worker: UUID = Field(description="one life of a worker's process")
    worker_name: str
    task: str | None
    started_at: datetime
    ended_at: datetime | None
    duration_seconds: float | None = Field(description="null while it runs")
    next_try_at: datetime | None = Field(description="of an attempt that is tried again: when the next one may begin")
    outcome: str | None = Field(
        description="success, failed, denied, cancelled, retrying, lost, given_back, released, or null"
    )
    error: Problem | None


class ToolCall(BaseModel):
    """The model's request to run a tool, and what became of it."""

    id: UUID
    run: UUID
    message: UUID
    step: int
    name: str
    arguments: Any
    status: CallStatus
    outcome: Literal["success", "failed", "denied", "cancelled"] | None
    result: Any = Field(description=RESULT)
    stored: list[Stored] | None = Field(description=STORED)
    error: Problem | None
    attempt: int
    max_attempts: int
    attempts: list[Attempt]
    idempotency_key: str
    idempotent: bool | None
    atomic: bool
    assignee: str | None
    deadline: datetime | None
    progress: Any
    not_before: datetime | None
    created_at: datetime
    settled_at: datetime | None


def tool_call(row: CallRow) -> dict[str, Any]:
    """`row` has its attempts prefetched."""
    return {
        "id": str(row.pk),
        "run": str(row.run_id),
        "message": str(row.message_id),
        "step": row.step,
        "name": row.name,
        "arguments": row.arguments,
        "status": row.status,
        "outcome": row.outcome or None,
        "result": row.result,
        "stored": row.stored,
        "error": row.error,
        "attempt": row.attempt,
        "max_attempts": row.max_attempts,
        "attempts": [
            {
                "number": attempt.number,
                "worker": str(attempt.worker_id),
                "worker_name": attempt.worker,
                "task": attempt.task_id or None,
                "started_at": time(attempt.started_at),
                "ended_at": time(attempt.ended_at),
                "duration_seconds": attempt.ended_at and (attempt.ended_at - attempt.started_at).total_seconds(),
                "next_try_at": time(attempt.retry_at),
                "outcome": attempt.outcome or None,
                "error": attempt.error,
            }
            for attempt in sorted(row.attempts.all(), key=lambda attempt: attempt.number)
        ],
        "idempotency_key": row.idempotency_key,
        "idempotent": row.idempotent,
        "atomic": row.atomic,
        "assignee": None if row.assignee_id is None else str(row.assignee_id),
        "deadline": time(row.deadline),
        "progress": row.progress,
        "not_before": time(row.not_before),
        "created_at": time(row.created_at),
        "settled_at": time(row.settled_at),
    }


def tool_calls(rows: Iterable[CallRow]) -> list[dict[str, Any]]:
    return [tool_call(row) for row in rows]


class Tool(BaseModel):
    """What an agent can call. `parameters` is the JSON schema that the model is shown."""

    name: str
    description: str
    parameters: dict[str, Any]
    timeout_seconds: float
    idempotent: bool | None
    atomic: bool
    needs_approval: bool
    deferred: bool
    in_context: str = Field(description="how long a model is shown its calls: thread, run, step")
    agents: list[str]


def tool(definition: ToolDefinition, of: list[str]) -> dict[str, Any]:
    return {
        "name": definition.name,
        "description": definition.description,
        "parameters": definition.parameters,
        "timeout_seconds": definition.timeout.total_seconds(),
        "idempotent": definition.idempotent,
        "atomic": definition.atomic,
        "needs_approval": bool(definition.needs_approval),
        "deferred": definition.deferred,
        "in_context": definition.in_context,
        "agents": of,
    }


class Agent(BaseModel):
    """A named definition in code. What it is told is not everybody's to read: the admin shows it."""

    name: str
    model: str | None
    tools: list[str]
    tool_functions: list[str] = Field(description="functions that return more tools, asked for each run")
    limits: dict[str, Any]
    context: dict[str, Any]
    tool_choice: str
    parallel_tool_calls: bool | None


def agent(definition: agent_registry.Agent) -> dict[str, Any]:
    return {
        "name": definition.name,
        "model": definition.model or settings().default_model,
        "tools": list(definition.tools_by_name),
        "tool_functions": [name_of(each) for each in definition.tool_functions],
        "limits": dict(definition.limits),
        "context": dict(definition.context),
        "tool_choice": definition.tool_choice,
        "parallel_tool_calls": definition.parallel_tool_calls,
    }


class Events(BaseModel):
    results: list[Event]
    last_seq: int = Field(description="of the run's last event so far")
    finished: bool = Field(description="whether the run has ended, so that no event follows its last one")


class Cursor(BaseModel):
    """Where a list of messages stands: stream this run after this seq, and nothing is missed or shown twice.

    `run` is the thread's live run, or its last one; null before the first.
    """

    run: UUID | None
    seq: int


class StandingCall(BaseModel):
    """A tool call of the live run's last step, as it stood at the cursor: what its events up to there say."""

    tool_call: UUID
    name: str
    message: UUID
    status: CallStatus
    attempt: int
    outcome: Literal["success", "failed", "denied", "cancelled"] | None
    result: Any
    error: Problem | None
    stored: list[Stored] | None = Field(description=STORED)
    fraction: float | None
    note: str | None


def standing(run: models.Run) -> list[dict[str, Any]]:
    """How the calls of a live run's last step stand: what its events say, and not what an attempt before has left in the row."""
    rows = CallRow.objects.filter(run_id=run.pk, step=run.steps).order_by("index")
    return [_stands(row) for row in rows]


def _stands(row: CallRow) -> dict[str, Any]:
    told = row.progress or {}
    if told.get("attempt") != row.attempt - (row.status == CallStatuses.RETRYING):
        told = {}
    return {
        "tool_call": str(row.pk),
        "name": row.name,
        "message": str(row.message_id),
        "status": row.status,
        "attempt": row.attempt,
        "outcome": row.outcome or None,
        "result": row.result,
        "stored": row.stored,
        "error": row.error if row.status in (CallStatuses.RETRYING, CallStatuses.SETTLED) else None,
        "fraction": told.get("fraction"),
        "note": told.get("note"),
    }


class Agents(BaseModel):
    results: list[Agent]


class Tools(BaseModel):
    results: list[Tool]
