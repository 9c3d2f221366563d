"""What the server answers, with types. Fields that this version does not know stay in `raw`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Generic, Literal, TypeAlias, TypedDict, TypeVar
from urllib.parse import parse_qs, urlsplit

RunStatus: TypeAlias = Literal[
    "held", "queued", "running", "waiting", "requires_action", "completed", "failed", "cancelled"
]
MessageStatus: TypeAlias = Literal[
    "waiting", "pending", "completed", "partial", "discarded", "superseded", "rolled_back"
]
CallStatus: TypeAlias = Literal[
    "requested", "awaiting_approval", "running", "retrying", "awaiting_result", "awaiting_child", "unknown", "settled"
]
Role: TypeAlias = Literal["user", "assistant", "tool", "system"]
ENDED = frozenset({"completed", "failed", "cancelled"})
Item = TypeVar("Item")


class Part(TypedDict, total=False):
    """One part of a message's content: which fields it has, its type says."""

    type: str  # text, reasoning, tool_call, tool_result, image, file, data
    text: str
    tool_call: str
    name: str
    arguments: Any
    outcome: str
    result: Any
    stored: list[dict[str, Any]]
    error: dict[str, Any]
    data: Any


class Limits(TypedDict, total=False):
    """What bounds a run. What is left out counts as the thread's, then the agent's, then the settings'."""

    max_steps: int | None
    max_total_tokens: int | None
    max_cost: float | None
    deadline_seconds: float | None
    leg_budget_seconds: float | None


class NewMessage(TypedDict, total=False):
    """A message to save, or to show to the model before the input."""

    role: Literal["user", "system", "assistant"]
    content: str | list[Part]
    metadata: dict[str, Any]
    client_id: str


@dataclass(slots=True)  # not frozen: that costs a microsecond for each
class Event:
    """A fact of a run's log. `event["text"]` is a field of its own; `data` holds all.

    `seq` counts from 1 within `run`; it is None of a `resume_gap`, and of nothing else. `id` is the cursor that goes on behind
    this event: of a run's stream its seq, of a thread's `RUN:SEQ`. `raw` is the JSON of `data` as it was sent, to be passed on.
    """

    type: str
    seq: int | None
    run: str
    data: Mapping[str, Any]
    id: str = ""
    raw: bytes = field(default=b"", repr=False, compare=False)

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.data.get(name, default)

    @property
    def at(self) -> datetime | None:
        return time(self.data.get("at"))

    @property
    def terminal(self) -> bool:
        """Whether it is the last one of its run."""
        return self.type in TERMINAL


TERMINAL = frozenset(f"run.{status}" for status in ENDED)


@dataclass(frozen=True, slots=True)
class Run:
    """One execution of an agent over a thread, as it was when it was asked for."""

    id: str
    thread: str
    agent: str
    status: RunStatus
    stop_reason: str | None
    why: str
    error: dict[str, Any] | None
    output: Any
    usage: dict[str, Any]
    limits: Limits | None
    legs: int
    steps: int
    epoch: int
    last_seq: int
    parent: str | None
    origin: str
    priority: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    metadata: dict[str, Any]
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def finished(self) -> bool:
        return self.status in ENDED

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Run:
        said: dict[str, Any] = {name: raw.get(name) for name in _names(cls)}
        for name in ("created_at", "started_at", "finished_at"):
            said[name] = time(raw.get(name))
        return cls(**said, raw=raw)


@dataclass(frozen=True, slots=True)
class Thread:
    """A conversation. `status` is that of its live run, or of its last one, which is `run`; both None before the first."""

    id: str
    agent: str | None
    title: str
    summary: str
    metadata: dict[str, Any]
    status: RunStatus | None
    run: str | None
    model: str | None
    instructions: str | None
    tools: list[str] | None
    limits: Limits | None
    context: dict[str, Any] | None
    archived: bool
    created_at: datetime
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Thread:
        said: dict[str, Any] = {name: raw.get(name) for name in _names(cls)}
        return cls(**{**said, "created_at": time(raw.get("created_at"))}, raw=raw)


@dataclass(slots=True)
class Message:
    """One entry of a thread. In a `Transcript` it changes while it is written.

    `thread` and `metadata` are empty where the log does not tell them; `created_at` is then the time of its first event.
    `shown` is false of what a run said or was given that its thread does not show, neither in its list nor to later runs.
    """

    id: str
    role: Role
    status: MessageStatus
    content: list[Part]
    run: str | None = None
    step: int | None = None
    client_id: str | None = None
    thread: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    created_at: datetime | None = None
    shown: bool = True

    @property
    def text(self) -> str:
        """What it says, without reasoning and calls."""
        return "".join(part["text"] for part in self.content if part["type"] == "text")

    @property
    def reasoning(self) -> str:
        return "".join(part["text"] for part in self.content if part["type"] == "reasoning")

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Message:
        said: dict[str, Any] = {name: raw.get(name) for name in _names(cls)}
        own = {"content": list(raw["content"]), "created_at": time(raw.get("created_at")), "shown": True}
        return cls(**{**said, **own})


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The model's request to run a tool, and what became of it."""

    id: str
    run: str
    message: str
    step: int
    name: str
    arguments: Any
    status: CallStatus
    outcome: str | None
    result: Any  # as the model read it: a long one is cut, with a note, and a file is described
    stored: list[dict[str, Any]] | None  # what of it stands apart: /api/tool-calls/{id}/content has it whole
    error: dict[str, Any] | None
    attempt: int
    progress: Any
    created_at: datetime
    settled_at: datetime | None
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> ToolCall:
        said: dict[str, Any] = {name: raw.get(name) for name in _names(cls)}
        for name in ("created_at", "settled_at"):
            said[name] = time(raw.get(name))
        return cls(**said, raw=raw)


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """Some rows of a list; `next` and `previous` are cursors, or None."""

    results: list[Item]
    next: str | None = None
    previous: str | None = None

    def __iter__(self) -> Iterator[Item]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


@dataclass(frozen=True, slots=True)
class Messages(Page[Message]):
    """Messages of a thread, and the place in the log at which they were read: `run` is None while the thread has none.

    `tool_calls`: how those of the live run's last step stood there, as `{"tool_call", "name", "message", "status", ...}`.
    """

    run: str | None = None
    seq: int = 0
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def cursor(self) -> str | None:
        """Where the thread's stream goes on behind them."""
        return None if self.run is None else f"{self.run}:{self.seq}"

    def upright(self) -> Messages:
        """Return a page that was read backwards, in the order of the thread."""
        return replace(self, results=self.results[::-1])


@dataclass(frozen=True, slots=True)
class Events:
    """Some of a run's log. `finished` says whether the run has ended; `last_seq` is that of its last event so far."""

    results: list[Event]
    last_seq: int
    finished: bool

    def __iter__(self) -> Iterator[Event]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


def page_of(make: Callable[[Mapping[str, Any]], Item]) -> Callable[[Any], Page[Item]]:
    """Return what reads a page of such rows."""
    return lambda raw: Page([make(each) for each in raw["results"]], *_sides(raw))


def _sides(raw: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the cursors of the pages beside. The server gives addresses, whose host is as the server knows itself."""
    found = [parse_qs(urlsplit(raw.get(side) or "").query).get("cursor") for side in ("next", "previous")]
    return (found[0][0] if found[0] else None, found[1][0] if found[1] else None)


def messages(raw: Mapping[str, Any]) -> Messages:
    cursor = raw.get("cursor") or {}
    rows = [Message.of(each) for each in raw["results"]]
    return Messages(rows, *_sides(raw), cursor.get("run"), cursor.get("seq") or 0, raw.get("tool_calls") or [])


def events_of(run: str) -> Callable[[Any], Events]:
    """Return what reads a page of this run's log."""
    return lambda raw: Events(
        [event(each, run, str(each.get("seq", ""))) for each in raw["results"]], raw["last_seq"], raw["finished"]
    )


def event(data: Mapping[str, Any], run: str, id: str) -> Event:
    """`run` is the one whose log it is; a payload may name another, a child's."""
    return Event(data["type"], data.get("seq"), run, data, id)


def time(text: Any) -> datetime | None:
    """Read RFC 3339."""
    return None if text is None else datetime.fromisoformat(text)


def _names(kind: Any) -> list[str]:
    return [name for name in kind.__dataclass_fields__ if name != "raw"]
