"""The log folded into what an interface shows: messages, tool calls, how the run stands. The rule is docs/streams.md's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from longhaul_client.answers import ENDED, CallStatus, Event, Message, Messages, Part, Run, RunStatus

RUN_STATUS = {
    **{f"run.{status}": status for status in get_args(RunStatus)},
    "run.started": "running",
    "leg.started": "running",
}
CALL_STATUS: dict[str, CallStatus] = {
    "tool_call.created": "requested",
    "tool_call.started": "running",
    "tool_call.retrying": "retrying",
    "tool_call.approval_requested": "awaiting_approval",
    "tool_call.approved": "requested",
    "tool_call.awaiting_result": "awaiting_result",
    "tool_call.awaiting_child": "awaiting_child",
    "tool_call.unknown": "unknown",
    "tool_call.settled": "settled",
}
# What an event says of a call, beside how it stands.
CALL_FIELDS = (
    "arguments",
    "outcome",
    "result",
    "stored",
    "error",
    "by",
    "attempt",
    "fraction",
    "note",
    "deadline",
    "assignee",
)


@dataclass(slots=True)
class CallState:
    """A tool call as its last event left it. `fraction` (0 to 1) and `note` are its progress; `by` is who answered in its place."""

    id: str
    name: str
    message: str
    status: CallStatus = "requested"
    arguments: Any = None
    outcome: str | None = None
    result: Any = None
    stored: list[dict[str, Any]] | None = None  # what of the result stands apart
    error: dict[str, Any] | None = None
    attempt: int = 0
    fraction: float | None = None
    note: str | None = None
    deadline: str | None = None
    assignee: str | None = None
    by: str | None = None


class Transcript:
    """A thread, or a run of it, as it is after the events that were taken: `take` each, in their order.

    Begin with nothing and a run's first event, or with a snapshot (`threads.messages`) and the stream from its cursor. Events
    that came before are passed over, so it does no harm to take some twice.
    """

    def __init__(self, snapshot: Messages | Iterable[Message] = (), *, run: Run | None = None) -> None:
        self.tool_calls: dict[str, CallState] = {}
        self.run: str | None = None  # whose events came last
        self.status: RunStatus | None = None
        self.stop_reason: str | None = None
        self.output: Any = None
        self.error: dict[str, Any] | None = None
        self.usage: dict[str, Any] | None = None
        self.gap = False  # events were removed: what is shown may lack something until a new snapshot
        self._messages: dict[str, Message] = {}
        self._seqs: dict[str, int] = {}
        # The newest page of a thread has what is being said there. What it lacks, the thread does not show.
        self._whole = isinstance(snapshot, Messages) and (
            not len(snapshot) or any(m.status != "waiting" for m in snapshot)
        )
        for message in sorted(snapshot, key=lambda each: each.status == "waiting"):
            # A copy, for it changes here.
            self._messages[message.id] = own = replace(
                message, content=[cast(Part, {**part}) for part in message.content]
            )
            self._calls_of(own)
        if isinstance(snapshot, Messages) and snapshot.run is not None:
            self.run = snapshot.run
            self._seqs[snapshot.run] = snapshot.seq
            for told in snapshot.tool_calls:
                self._call_stands(told)
        if run is not None and run.id == self.run:
            self._stands(run)

    def __repr__(self) -> str:
        return f"<Transcript of {len(self._messages)} messages, run {self.run} {self.status}>"

    @property
    def messages(self) -> list[Message]:
        """As they stand in the thread; last those that wait for a place in it."""
        rows = list(self._messages.values())
        return [each for each in rows if each.status != "waiting"] + [each for each in rows if each.status == "waiting"]

    def message(self, id: str) -> Message | None:
        return self._messages.get(id)

    @property
    def text(self) -> str:
        """What the last assistant's message says so far."""
        return next((each.text for each in reversed(self._messages.values()) if each.role == "assistant"), "")

    @property
    def is_running(self) -> bool:
        return self.status is not None and self.status not in ENDED

    @property
    def cursor(self) -> str | None:
        """Where the thread's stream goes on; None before the first event."""
        return None if self.run is None else f"{self.run}:{self._seqs.get(self.run, 0)}"

    @property
    def seq(self) -> int:
        """Where the stream of `run` goes on."""
        return 0 if self.run is None else self._seqs.get(self.run, 0)

    def _stands(self, run: Run) -> None:
        """Take over how the run stands, that was asked for after the snapshot."""
        if run.last_seq == self.seq:
            self.status, self.stop_reason = run.status, run.stop_reason
            self.output, self.error, self.usage = run.output, run.error, run.usage
        else:
            self.status = "running"  # it was live, for events follow; they say how it stands

    def take(self, event: Event) -> bool:
        """Fold one event in. Return whether it was new."""
        seq, type = event.seq, event.type
        if seq is None:
            self.gap = self.gap or type == "resume_gap"
            return type == "resume_gap"
        if seq <= self._seqs.get(event.run, 0):
            return False
        self._seqs[event.run] = seq
        if event.run != self.run:
            self.run = event.run
            self.stop_reason = self.output = self.error = self.usage = None
        data = event.data
        if type in ("text.delta", "reasoning.delta"):
            self._append(event, "text" if type == "text.delta" else "reasoning", data["text"])
        elif type == "message.created":
            self._messages[data["message"]] = self._made(event)
        elif type == "message.completed":
            self._complete(event)
        elif type == "message.discarded":
            self._remove(data["message"])
        elif type.startswith("tool_call."):
            self._call(type, event)
        elif type in RUN_STATUS:
            self._run(type, event)
        return True

    def take_all(self, events: Iterable[Event]) -> Transcript:
        for event in events:
            self.take(event)
        return self

    def _made(self, event: Event) -> Message:
        data = event.data
        return Message(
            data["message"], data.get("role", "assistant"), "pending", [],
            run=event.run, step=data.get("step"), client_id=data.get("client_id") or None, created_at=event.at,
            shown=data.get("shown", True),
        )  # fmt: skip

    def _append(self, event: Event, kind: str, text: str) -> None:
        message = self._messages.get(event.data["message"])
        if message is None:  # its beginning was not asked for; or it is in no snapshot, for the thread does not show it
            message = self._messages[event.data["message"]] = self._made(event)
            message.shown = not self._whole
        parts = message.content
        if parts and parts[-1]["type"] == kind:
            parts[-1]["text"] += text
        else:
            parts.append({"type": kind, "text": text})

    def _complete(self, event: Event) -> None:
        data = event.data
        message = self._messages.get(data["message"])
        if message is None:
            message = self._made(event)
            if self._whole and message.role == "assistant" and message.step is not None:
                message.shown = False  # it has begun before the snapshot, which does not show it
        elif message.status == "waiting":
            del self._messages[message.id]  # it has got its place now, behind all that have one
        message.status = "partial" if data.get("partial") else "completed"
        if data.get("partial"):
            self._forget_calls(message.id)  # those that it was about to make
        message.role = data.get("role", message.role)
        message.content = list(data["content"])
        message.run = message.run or event.run
        message.step = data.get("step", message.step)
        message.client_id = data.get("client_id") or message.client_id
        self._messages[message.id] = message
        self._calls_of(message)

    def _remove(self, id: str) -> None:
        self._messages.pop(id, None)
        self._forget_calls(id)

    def _forget_calls(self, message: str) -> None:
        self.tool_calls = {call: state for call, state in self.tool_calls.items() if state.message != message}

    def _calls_of(self, message: Message) -> None:
        """Know the calls that a message names."""
        for part in message.content:
            if part["type"] == "tool_call" and part["tool_call"] not in self.tool_calls:
                made = CallState(part["tool_call"], part["name"], message.id, arguments=part.get("arguments"))
                self.tool_calls[made.id] = made
            elif part["type"] == "tool_result" and (call := self.tool_calls.get(part["tool_call"])) is not None:
                call.status, call.outcome = "settled", part.get("outcome")
                call.result, call.error = part.get("result"), part.get("error")
                call.stored = part.get("stored")

    def _call_stands(self, told: Mapping[str, Any]) -> None:
        """Take over how a call stood at the cursor."""
        id = told["tool_call"]
        call = self.tool_calls.setdefault(id, CallState(id, told["name"], told["message"]))
        call.status = told["status"]
        for name in CALL_FIELDS:
            if told.get(name) is not None and (name != "attempt" or call.status != "requested"):
                setattr(call, name, told[name])

    def _call(self, type: str, event: Event) -> None:
        data = event.data
        id = data["tool_call"]
        call = self.tool_calls.get(id)
        if call is None:
            call = self.tool_calls[id] = CallState(id, data.get("name", ""), data.get("message", ""))
        call.status = CALL_STATUS.get(type, call.status)
        # What the attempt before has left.
        if type == "tool_call.started":
            call.fraction = call.note = None
        if type in ("tool_call.started", "tool_call.settled"):
            call.error = call.by = None
        for name in CALL_FIELDS:
            if name in data:
                setattr(call, name, data[name])

    def _run(self, type: str, event: Event) -> None:
        self.status = cast(RunStatus, RUN_STATUS[type])
        data = event.data
        if self.status in ENDED:
            self.stop_reason, self.output = data.get("stop_reason"), data.get("output")
            self.error, self.usage = data.get("error"), data.get("usage")
        elif superseded := data.get("superseded"):
            self._remove(superseded)  # a retry does this step again


def fold(events: Iterable[Event], snapshot: Messages | Iterable[Message] = ()) -> Transcript:
    """Return what these events make of a snapshot, or of nothing."""
    return Transcript(snapshot).take_all(events)
