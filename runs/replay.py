"""A run as its event log tells it, and nothing else: the fold that every reader of the log could make.

    told = replay(event.as_dict() for event in run.events())
    told.status, told.output, told.messages, told.calls, told.legs, told.usage

The rule, event by event, in the order of `seq`:

- `run.*` sets the status. A claim shows as `leg.started` or, where a lingering leg claims again, as the `message.created` of
  its next turn: the run is running then. The last event is the terminal one, with stop reason, output, error and usage.
- `message.created` opens an assistant's message. Its deltas are its text so far. `message.completed` gives the content that
  counts (`partial`: what a cancel cut), `message.discarded` takes it away, with the calls that it had begun; with the
  reason `rolled_back` it was completed before, and its calls were made. Any other message comes with its `message.completed`
  alone. Messages stand in the order of their first event.
- A completed assistant message with a step, that is not partial, is a step of the run.
- `tool_call.created` makes a call, in the order of its message's calls. `started` opens an attempt; `retrying`, `unknown`
  and `settled` end it: as given_back, lost or released where their error says so. Settled is final. `progress` is how far it
  was when it last said so.
- `leg.started` and `leg.ended` are the legs. Each `usage` event is one model call; the run's usage is their sum, those of
  discarded messages included.

A `resume_gap` says that the log begins later: what was before is not known, and what the rest tells is no fault for lack of it.

What a log may not say (a gap, an event after the end, a text that is not the sum of its deltas, a call settled twice) is
kept in `faults`. Pure: no database, no Django.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Any

TERMINAL = ("completed", "failed", "cancelled")
# What ended an attempt, by the code of its error.
ENDED_BY = {"worker_lost": "lost", "given_back": "given_back", "released": "released"}
CENTS = Decimal("1e-9")  # a cost is kept to so much


@dataclass(slots=True)
class MessageTold:
    """`content` is None where the log does not tell it (pending, or discarded): see `text` then. `""` client_id: none."""

    id: str
    role: str
    step: int | None
    status: str  # pending, completed, partial, discarded, rolled_back
    content: list[dict[str, Any]] | None = None
    client_id: str | None = None  # None: not told
    text: dict[str, str] = field(default_factory=dict)  # streamed, by kind of part: text, reasoning


@dataclass(slots=True)
class AttemptTold:
    number: int
    worker: str
    outcome: str = ""  # "" while it is open; success, failed, cancelled, denied, retrying, lost, given_back, released


@dataclass(slots=True)
class CallTold:
    id: str
    name: str
    message: str
    step: int | None
    index: int
    arguments: Any
    status: str = "requested"
    attempt: int = 1  # the current one, or the one that is asked for
    outcome: str = ""
    result: Any = None
    stored: Any = None  # what of the result stands apart
    error: Mapping[str, Any] | None = None
    attempts: list[AttemptTold] = field(default_factory=list)
    progress: dict[str, Any] | None = None  # what was told last: fraction, note


@dataclass(slots=True)
class LegTold:
    number: int
    epoch: int
    worker: str
    reason: str = ""  # "" while it is open


@dataclass(frozen=True, slots=True)
class UsageTold:
    """One model call: tokens, and its cost in the currency of PRICES (None: no price)."""

    message: str
    model: str
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    cost: Decimal | None
    discarded: bool


@dataclass(slots=True)
class Replay:
    """What the events so far have told."""

    seq: int = 0
    events: int = 0
    removed: int = 0  # events up to here were removed, so nothing that they told is here
    status: str = ""
    stop_reason: str = ""
    output: Any = None
    error: Mapping[str, Any] | None = None
    steps: int = 0
    messages: dict[str, MessageTold] = field(default_factory=dict)  # by id, in their order
    calls: dict[str, CallTold] = field(default_factory=dict)
    legs: dict[int, LegTold] = field(default_factory=dict)
    usage: list[UsageTold] = field(default_factory=list)
    total: Mapping[str, Any] | None = None  # the usage that the terminal event tells
    faults: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.status in TERMINAL

    @property
    def transcript(self) -> list[MessageTold]:
        """The messages that a provider may be shown: completed and partial ones, in order."""
        return [message for message in self.messages.values() if message.status in ("completed", "partial")]

    @property
    def pending(self) -> list[MessageTold]:
        return [message for message in self.messages.values() if message.status == "pending"]

    @property
    def input_tokens(self) -> int:
        return sum(each.input_tokens for each in self.usage)

    @property
    def output_tokens(self) -> int:
        return sum(each.output_tokens for each in self.usage)

    @property
    def cost(self) -> Decimal:
        return sum((each.cost for each in self.usage if each.cost is not None), Decimal(0)).quantize(CENTS)

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take the next event, in its flat form (`RunEvent.as_dict()`; only seq, type and the type's own fields count)."""
        kind = str(event["type"])
        if kind == "resume_gap":
            self.seq = self.removed = int(event["to"])
            return
        seq = int(event["seq"])
        if int(event.get("from_seq") or seq) != self.seq + 1:
            self.faults.append(f"event {seq}: follows {self.seq}: there is a gap, or an event twice")
        if self.finished:
            self.faults.append(f"event {seq}: {kind} after the end")
        self.seq = seq
        self.events += 1
        noun, _, verb = kind.partition(".")
        match noun:
            case "run":
                self._run(verb, event)
            case "leg":
                self._leg(seq, verb, event)
            case "message":
                self._message(seq, verb, event)
            case "text" | "reasoning":
                self._delta(seq, noun, event)
            case "tool_call":
                self._call(seq, verb, event)
            case "usage":
                self._usage(event)
            case _:  # data, error: facts of their own, which change nothing
                pass

    def _fault(self, seq: int, what: str) -> None:
        if not self.removed:  # else it is what was removed that is missing
            self.faults.append(f"event {seq}: {what}")

    def _run(self, verb: str, event: Mapping[str, Any]) -> None:
        self.status = "running" if verb == "started" else verb
        if verb in TERMINAL:
            self.stop_reason = str(event.get("stop_reason") or "")
            self.output, self.error, self.total = event.get("output"), event.get("error"), event.get("usage")

    def _leg(self, seq: int, verb: str, event: Mapping[str, Any]) -> None:
        number = int(event["leg"])
        if verb == "started":
            if number != len(self.legs) + 1:
                self._fault(seq, f"leg {number} starts after {len(self.legs)} legs")
            self.legs[number] = LegTold(number, int(event["epoch"]), str(event.get("worker", "")))
            self.status = "running"
            return
        leg = self.legs.get(number)
        if leg is None or leg.reason:
            self._fault(seq, f"leg {number} ends, and was not open")
            return
        leg.epoch, leg.reason = int(event["epoch"]), str(event.get("reason", ""))

    def _message(self, seq: int, verb: str, event: Mapping[str, Any]) -> None:
        id, step = str(event["message"]), event.get("step")
        known = self.messages.get(id)
        if known is not None and known.status in ("completed", "partial") and event.get("reason") == "rolled_back":
            known.status = "rolled_back"
            return
        if known is not None and (verb == "created" or known.status != "pending"):
            self._fault(seq, f"message.{verb} of message {id}, which was {known.status}")
        message = known or MessageTold(id, str(event.get("role", "")), step, "pending")
        self.messages[id] = message
        if "client_id" in event:
            message.client_id = str(event["client_id"] or "")
        match verb:
            case "created":
                self.status = "running"
            case "completed":
                message.status = "partial" if event.get("partial") else "completed"
                message.content = list(event.get("content") or [])
                if known is not None:
                    self._streamed(seq, message)
                if message.role == "assistant" and step is not None and message.status == "completed":
                    self.steps += 1
                    if step != self.steps:
                        self._fault(seq, f"step {step} is committed as number {self.steps}")
            case "discarded":
                message.status, message.content = "discarded", None

    def _streamed(self, seq: int, message: MessageTold) -> None:
        for kind in ("text", "reasoning"):
            kept = "".join(part["text"] for part in message.content or [] if part.get("type") == kind)
            said = message.text.get(kind, "")
            if said != kept:
                self._fault(seq, f"{len(said)} characters of {kind} were streamed, {len(kept)} are kept or differ")

    def _delta(self, seq: int, kind: str, event: Mapping[str, Any]) -> None:
        message = self.messages.get(str(event["message"]))
        if message is None or message.status != "pending":
            self._fault(seq, f"a delta of message {event['message']}, which is not open")
            return
        message.text[kind] = message.text.get(kind, "") + str(event.get("text", ""))

    def _call(self, seq: int, verb: str, event: Mapping[str, Any]) -> None:
        id = str(event["tool_call"])
        if verb == "arguments_delta":
            return  # a call is one when it is created: a discarded message, or a last step, takes what was begun along
        call = self.calls.get(id)
        if verb == "created":
            message = str(event["message"])
            said = self.messages.get(message)
            index = sum(each.message == message for each in self.calls.values())
            if call is not None or said is None or said.status != "completed":
                self._fault(seq, f"call {id} is created twice, or by a message that is not complete")
            step = said.step if said is not None else None
            self.calls[id] = CallTold(id, str(event.get("name", "")), message, step, index, event.get("arguments"))
            return
        if call is None or call.status == "settled":
            self._fault(seq, f"tool_call.{verb} of call {id}, which {'is settled' if call else 'nobody made'}")
            return
        attempt = call.attempts[-1] if call.attempts else None
        match verb:
            case "started":
                call.status, call.attempt = "running", int(event["attempt"])
                call.attempts.append(AttemptTold(call.attempt, str(event.get("worker", ""))))
            case "retrying":
                code = (event.get("error") or {}).get("code")
                call.status, call.attempt = "retrying", int(event["attempt"])
                if attempt is not None:
                    attempt.outcome = ENDED_BY.get(str(code), "retrying")
            case "unknown":
                call.status = "unknown"
                if attempt is not None:
                    attempt.outcome = "lost"
            case "settled":
                call.status, call.outcome = "settled", str(event.get("outcome", ""))
                call.result, call.error = event.get("result"), event.get("error")
                call.stored = event.get("stored")
                # A late result ends an attempt that was taken for lost; a person's answer and a cancel do not.
                late = call.outcome != "cancelled" and "by" not in event
                if attempt is not None and attempt.outcome in ("", *(["lost"] if late else [])):
                    attempt.outcome = call.outcome
            case "approval_requested":
                call.status = "awaiting_approval"
            case "approved":
                call.status, call.arguments = "requested", event.get("arguments", call.arguments)
            case "awaiting_result" | "awaiting_child":
                call.status = verb
            case "progress":
                call.progress = {"fraction": event.get("fraction"), "note": event.get("note")}
            case _:  # extended, assigned, denied (settled follows): no change of what is kept here
                pass

    def _usage(self, event: Mapping[str, Any]) -> None:
        self.usage.append(
            UsageTold(
                message=str(event.get("message", "")),
                model=str(event.get("model", "")),
                input_tokens=int(event.get("input_tokens") or 0),
                output_tokens=int(event.get("output_tokens") or 0),
                cached_tokens=int(event.get("cached_tokens") or 0),
                reasoning_tokens=int(event.get("reasoning_tokens") or 0),
                cost=money(event.get("cost")),
                discarded=bool(event.get("discarded")),
            )
        )


def replay(events: Iterable[Mapping[str, Any]]) -> Replay:
    """Fold a run's events, from the first on and in order."""
    told = Replay()
    for event in events:
        told.apply(event)
    return told


def money(cost: Any) -> Decimal | None:
    """Return a cost as its column keeps it: rounded to nine places, half away from zero. None for none, or for no number."""
    if cost is None:
        return None
    try:
        return Decimal(str(cost)).quantize(CENTS, ROUND_HALF_UP)
    except InvalidOperation:
        return None
