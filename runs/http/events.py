"""The list of event types, with the fields of each: what the document promises, and what runs' events are tested against.

A reader passes over a type that it does not know. So do generated clients: `OtherEvent` takes what a later version adds.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, get_args
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, RootModel

SEQ = "the event's place in the run's log, from 1 without gaps"

LegEnd = Literal["budget", "tools", "person", "limited", "retry", "drained", "lost", "cancelled", "failed", "finished"]


RESULT = "as the model reads it: a long one is cut, with a note, and a file is described"
STORED = (
    "what of the result stands apart: 0 is the whole of one that was cut, or the file that is all of it; null: nothing"
)


class Stored(BaseModel):
    """A content of a result, had whole at `/api/tool-calls/{id}/content/{number}`."""

    number: int
    name: str
    content_type: str
    size: int = Field(description="bytes")


class Fault(BaseModel):
    """What went wrong: a code to program against, and a sentence to read."""

    model_config = ConfigDict(extra="allow", title="Fault")
    code: str
    message: str | None = None
    retryable: bool | None = None


class Logged(BaseModel):
    """What each event says."""

    model_config = ConfigDict(extra="allow")
    seq: Annotated[int, Field(ge=1, description=SEQ)]
    type: str
    run: UUID
    at: Annotated[datetime, Field(description="when it was written, RFC 3339 UTC")]


class RunHeldEvent(Logged):
    """The run waits for another one of its thread."""

    type: Literal["run.held"]


class RunQueuedEvent(Logged):
    """A worker may take the run."""

    type: Literal["run.queued"]
    reason: Literal["start", "tools", "budget", "limited", "retry", "lost", "drained", "released"]
    not_before: Annotated[
        datetime | None, Field(description="of `retry` and `limited`: from when it may be taken, or about that")
    ] = None
    superseded: Annotated[UUID | None, Field(description="of a run that retries another: the message left out")] = None
    after: Annotated[UUID | None, Field(description="the run whose place it took, or whose steering it answers")] = None


class RunStartedEvent(Logged):
    """A worker has taken the run, for the first time. Later claims show as `leg.started`."""

    type: Literal["run.started"]


class RunWaitingEvent(Logged):
    """The run waits for tool calls."""

    type: Literal["run.waiting"]
    tool_calls: list[UUID]


class RunRequiresActionEvent(Logged):
    """The run waits for a person."""

    type: Literal["run.requires_action"]
    tool_calls: list[UUID]


class EndUsage(BaseModel):
    """What all model calls of the run used together."""

    input_tokens: int
    output_tokens: int
    cost: float


class Ended(Logged):
    stop_reason: str
    output: Annotated[Any, Field(description="the final text, or the object that output_schema asks for")]
    usage: EndUsage
    error: Fault | None
    next: Annotated[
        UUID | None,
        Field(description="the run that took its place, or goes on with what steered it and was not taken in"),
    ] = None


class RunCompletedEvent(Ended):
    """The run has ended with an answer. Always the last event."""

    type: Literal["run.completed"]


class RunFailedEvent(Ended):
    """The run has ended with an error. Always the last event."""

    type: Literal["run.failed"]


class RunCancelledEvent(Ended):
    """The run was cancelled. Always the last event."""

    type: Literal["run.cancelled"]


class LegStartedEvent(Logged):
    """A worker goes on with the run."""

    type: Literal["leg.started"]
    leg: int
    epoch: int
    worker: str


class LegEndedEvent(Logged):
    """A worker has let go of the run."""

    type: Literal["leg.ended"]
    leg: int
    epoch: int
    worker: str
    reason: LegEnd


class OfMessage(Logged):
    message: UUID
    role: Literal["user", "assistant", "tool", "system"]
    step: Annotated[int | None, Field(description="the model turn; an input has none")] = None
    client_id: Annotated[str | None, Field(description="of an input: what its start called it")] = None
    shown: Annotated[
        bool | None, Field(description="false in its first event: the thread's list of messages leaves it out")
    ] = None


class MessageCreatedEvent(OfMessage):
    """The model begins to speak. Its deltas follow."""

    type: Literal["message.created"]


class MessageCompletedEvent(OfMessage):
    """A message is whole. Its content counts, whatever the deltas said."""

    type: Literal["message.completed"]
    content: list[dict[str, Any]]
    partial: Annotated[bool | None, Field(description="true: cut by a cancel, its text kept")] = None


class MessageDiscardedEvent(OfMessage):
    """A message counts no more, with its text and its calls: it was cut and is asked for again, or was taken back (`rolled_back`)."""

    type: Literal["message.discarded"]
    reason: str


class Delta(Logged):
    message: UUID
    text: str
    from_seq: Annotated[int | None, Field(description="of a compacted one: the first of those that it stands for")] = (
        None
    )


class TextDeltaEvent(Delta):
    """The model goes on speaking. How many deltas there are means nothing: chunks may be joined."""

    type: Literal["text.delta"]


class ReasoningDeltaEvent(Delta):
    """The model goes on thinking."""

    type: Literal["reasoning.delta"]


BY = "the id of the user who said so; null: nobody was named; left out where no person did"


class OfCall(Logged):
    tool_call: UUID
    name: str
    message: UUID


class ToolCallCreatedEvent(OfCall):
    """The model asks for a tool."""

    type: Literal["tool_call.created"]
    arguments: Any


class ToolCallArgumentsDeltaEvent(OfCall):
    """The model goes on writing a call's arguments."""

    type: Literal["tool_call.arguments_delta"]
    text: str
    from_seq: Annotated[int | None, Field(description="as of a text's delta")] = None


class ToolCallStartedEvent(OfCall):
    """A worker runs the tool."""

    type: Literal["tool_call.started"]
    attempt: int
    worker: str


class ToolCallProgressEvent(OfCall):
    """The tool says how far it is."""

    type: Literal["tool_call.progress"]
    fraction: float | None = None
    note: str | None = None


class ToolCallRetryingEvent(OfCall):
    """The tool runs again after a delay. `attempt` is the next one."""

    type: Literal["tool_call.retrying"]
    attempt: int
    error: Fault | None
    delay_seconds: float
    by: Annotated[str | None, Field(description=BY)] = None


class ToolCallUnknownEvent(OfCall):
    """The worker of a tool that must not start twice has died: whether it has had its effect is not known."""

    type: Literal["tool_call.unknown"]
    attempt: int


class ToolCallSettledEvent(OfCall):
    """The call has its outcome, for good."""

    type: Literal["tool_call.settled"]
    outcome: Literal["success", "failed", "denied", "cancelled"]
    result: Annotated[Any, Field(description=RESULT)] = None
    stored: Annotated[list[Stored] | None, Field(description=STORED)] = None
    error: Fault | None = None
    by: Annotated[str | None, Field(description=BY)] = None


class UsageEvent(Logged):
    """What a model call used."""

    type: Literal["usage"]
    message: UUID
    model: str
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    cost: Annotated[float | str | None, Field(description="null: the price is not known")] = None
    discarded: Annotated[bool | None, Field(description="true: of a message that was cut, and paid")] = None


class DataEvent(Logged):
    """What a tool or an agent has emitted."""

    type: Literal["data"]
    data: Any


class ErrorEvent(Logged):
    """An error that does not end the run: the model is asked again."""

    type: Literal["error"]
    error: Fault


Known = (
    RunHeldEvent | RunQueuedEvent | RunStartedEvent | RunWaitingEvent | RunRequiresActionEvent
    | RunCompletedEvent | RunFailedEvent | RunCancelledEvent
    | LegStartedEvent | LegEndedEvent
    | MessageCreatedEvent | MessageCompletedEvent | MessageDiscardedEvent
    | TextDeltaEvent | ReasoningDeltaEvent
    | ToolCallCreatedEvent | ToolCallArgumentsDeltaEvent | ToolCallStartedEvent | ToolCallProgressEvent
    | ToolCallRetryingEvent | ToolCallUnknownEvent | ToolCallSettledEvent
    | UsageEvent | DataEvent | ErrorEvent
)  # fmt: skip
FORMS: dict[str, type[Logged]] = {get_args(form.model_fields["type"].annotation)[0]: form for form in get_args(Known)}


class ResumeGapEvent(BaseModel):
    """No event of the log, and without a seq: the events `from` to `to` were removed by a retention setting."""

    model_config = ConfigDict(extra="allow")
    type: Literal["resume_gap"]
    from_: Annotated[int, Field(ge=1, alias="from")]
    to: Annotated[int, Field(ge=1)]


class OtherEvent(Logged):
    """An event of a type that this version does not have. Pass over it."""

    type: Annotated[str, Field(json_schema_extra={"not": {"enum": [*FORMS, "resume_gap"]}})]


class Event(RootModel[Known | ResumeGapEvent | OtherEvent]):
    """A fact of a run's log, in its place. `type` says which fields it has."""
