"""The calls of the API, as what is to be sent and how the answer is read. Knows no connection."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeAlias, TypedDict, TypeVar
from urllib.parse import quote
from uuid import uuid4

from longhaul_client import answers
from longhaul_client.answers import (
    CallStatus,
    Events,
    Limits,
    Message,
    Messages,
    MessageStatus,
    NewMessage,
    Page,
    Part,
    Run,
    RunStatus,
    Thread,
    ToolCall,
)

Answer = TypeVar("Answer", covariant=True)
Params: TypeAlias = "tuple[tuple[str, str], ...]"
Content: TypeAlias = "str | Sequence[Part]"
POLL_SECONDS = 30.0  # of one wait; proxies often end an answer that takes a minute


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """One request. With `key` the server does it once, however often it is sent; without, `again` says whether it may be sent twice."""

    method: str
    path: str
    read: Callable[[Any], Answer] = field(repr=False)
    params: Params = ()
    content: bytes | None = field(default=None, repr=False)
    key: str | None = None
    own_key: bool = False
    again: bool = True
    waits: float = 0.0  # seconds that the answer may take beside the usual

    @property
    def headers(self) -> dict[str, str]:
        said = {"Accept": "application/json"}
        if self.content is not None:
            said["Content-Type"] = "application/json"
        if self.key is not None:
            said["Idempotency-Key"] = self.key
        return said

    @property
    def asked(self) -> str:
        return f"{self.method} {self.path}"


class Overrides(TypedDict, total=False):
    """What a thread or a run says itself, nearer than its agent. Lists replace, they do not merge."""

    model: str
    instructions: str
    tools: Sequence[str]
    tool_choice: str
    parallel_tool_calls: bool
    limits: Limits
    context: Mapping[str, Any]


class ForkOptions(Overrides, total=False):
    output_schema: Mapping[str, Any]
    idempotency_key: str


class StartOptions(Overrides, total=False):
    """`message` is the id of one that was saved, in place of an input; `messages` are shown to the model before it.

    `busy` says what happens when a run occupies the thread; `save`, what later runs see of this one. `client_id` comes back in
    the event of the saved input. Without an `idempotency_key` the client makes one for each call.
    """

    message: Message | str
    messages: Sequence[NewMessage]
    save: Literal["prompt_and_output", "all", "none"]
    busy: Literal["enqueue", "steer", "interrupt", "rollback", "reject"]
    priority: int
    output_schema: Mapping[str, Any]
    metadata: Mapping[str, Any]
    client_id: str
    idempotency_key: str


class ThreadOptions(Overrides, total=False):
    agent: str
    title: str
    summary: str
    metadata: Mapping[str, Any]


class NewThread(ThreadOptions, total=False):
    messages: Sequence[NewMessage]
    idempotency_key: str


class ThreadChange(TypedDict, total=False):
    """What is left out stays as it is; None takes an override away."""

    model: str | None
    instructions: str | None
    tools: Sequence[str] | None
    tool_choice: str | None
    parallel_tool_calls: bool | None
    limits: Limits | None
    context: Mapping[str, Any] | None
    agent: str | None
    title: str | None
    summary: str | None
    metadata: Mapping[str, Any] | None
    archived: bool


def id_of(row: Run | Thread | Message | ToolCall | str) -> str:
    """Return the id, as a part of a path."""
    return quote(row if isinstance(row, str) else row.id, safe="")


def _post(
    path: str, read: Callable[[Any], Answer], body: Any, *, key: str | None = None, creates: bool = True
) -> Call[Answer]:
    content = json.dumps(body, ensure_ascii=False).encode()
    own = creates and key is None
    return Call("POST", path, read, content=content, key=str(uuid4()) if own else key, own_key=own)


def _params(**given: Any) -> Params:
    found: list[tuple[str, str]] = []
    for name, value in given.items():
        if value is None:
            continue
        many = [value] if isinstance(value, str) or not isinstance(value, Iterable) else value
        found += [(name, str(each).lower() if isinstance(each, bool) else str(each)) for each in many]
    return tuple(found)


# --- runs -----------------------------------------------------------------------------------------------------------


def start(
    agent: str | None,
    input: Content | None,
    thread: Thread | str | None,
    options: StartOptions,
    *,
    stream: bool = False,
) -> Call[Run]:
    body: dict[str, Any] = {**options}
    key = body.pop("idempotency_key", None)
    if agent is not None:
        body["agent"] = agent
    if input is not None:
        body["input"] = input
    if isinstance(message := body.get("message"), Message):
        body["message"] = message.id
    if stream:
        body["stream"] = True
    path = "/api/runs" if thread is None else f"/api/threads/{id_of(thread)}/runs"
    return _post(path, Run.of, body, key=key)


def get_run(run: Run | str) -> Call[Run]:
    return Call("GET", f"/api/runs/{id_of(run)}", Run.of)


def list_runs(
    active: bool | None, agent: str | Iterable[str] | None, status: RunStatus | Iterable[RunStatus] | None,
    thread: Thread | str | None, metadata: Mapping[str, str] | None, limit: int | None, cursor: str | None,
) -> Call[Page[Run]]:  # fmt: skip
    told = {f"metadata.{name}": value for name, value in (metadata or {}).items()}
    of = None if thread is None else id_of(thread)
    params = _params(active=active, agent=agent, status=status, thread=of, limit=limit, cursor=cursor, **told)
    return Call("GET", "/api/runs", answers.page_of(Run.of), params)


def wait_for_run(run: Run | str, seconds: float, until: str) -> Call[Run]:
    params = _params(timeout_seconds=f"{seconds:.3f}", until=until)
    return Call("GET", f"/api/runs/{id_of(run)}/wait", Run.of, params, waits=seconds)


def cancel_run(run: Run | str, reason: str | None) -> Call[Run]:
    # A run that was cancelled is answered as it is, so this may be sent twice.
    body = {} if reason is None else {"reason": reason}
    return _post(f"/api/runs/{id_of(run)}/cancel", Run.of, body, creates=False)


def resume_run(run: Run | str, input: Content | None, key: str | None) -> Call[Run]:
    body = {} if input is None else {"input": input}
    return _post(f"/api/runs/{id_of(run)}/resume", Run.of, body, key=key)


def retry_run(run: Run | str, key: str | None) -> Call[Run]:
    return _post(f"/api/runs/{id_of(run)}/retry", Run.of, {}, key=key)


def fork_run(run: Run | str, after_step: int | None, options: ForkOptions) -> Call[Run]:
    overrides: dict[str, Any] = {**options}
    key = overrides.pop("idempotency_key", None)
    body: dict[str, Any] = {"overrides": overrides} if overrides else {}
    if after_step is not None:
        body["after_step"] = after_step
    return _post(f"/api/runs/{id_of(run)}/fork", Run.of, body, key=key)


def list_events(run: Run | str, after: int, limit: int | None) -> Call[Events]:
    id = id_of(run)
    return Call("GET", f"/api/runs/{id}/events", answers.events_of(id), _params(after=after, limit=limit))


def list_run_messages(run: Run | str, limit: int | None, cursor: str | None) -> Call[Page[Message]]:
    params = _params(limit=limit, cursor=cursor)
    return Call("GET", f"/api/runs/{id_of(run)}/messages", answers.page_of(Message.of), params)


class Waiting:
    """A wait for a run, as long polls one after another. `run` is what was told last."""

    run: Run

    def __init__(self, run: Run | str, timeout: float | None, until: str) -> None:
        self._of, self._until = run, until
        self._end = None if timeout is None else time.monotonic() + timeout
        self._over = False

    def next(self) -> Call[Run] | None:
        """Return the next poll; None when the wait is over."""
        if self._over:
            return None
        left = POLL_SECONDS if self._end is None else self._end - time.monotonic()
        self._over = left <= POLL_SECONDS and self._end is not None
        return wait_for_run(self._of, min(max(left, 0.0), POLL_SECONDS), self._until)

    def told(self, run: Run) -> None:
        self.run = run
        self._over = self._over or run.finished or (self._until == "requires_action" and run.status == self._until)


# --- threads --------------------------------------------------------------------------------------------------------


def create_thread(options: NewThread) -> Call[Thread]:
    body: dict[str, Any] = {**options}
    return _post("/api/threads", Thread.of, body, key=body.pop("idempotency_key", None))


def get_thread(thread: Thread | str) -> Call[Thread]:
    return Call("GET", f"/api/threads/{id_of(thread)}", Thread.of)


def list_threads(
    agent: str | Iterable[str] | None, archived: bool | None, order: str | None, limit: int | None, cursor: str | None
) -> Call[Page[Thread]]:
    params = _params(agent=agent, archived=archived, order=order, limit=limit, cursor=cursor)
    return Call("GET", "/api/threads", answers.page_of(Thread.of), params)


def update_thread(thread: Thread | str, change: ThreadChange) -> Call[Thread]:
    content = json.dumps({**change}, ensure_ascii=False).encode()
    return Call("PATCH", f"/api/threads/{id_of(thread)}", Thread.of, content=content)


def delete_thread(thread: Thread | str) -> Call[None]:
    return Call("DELETE", f"/api/threads/{id_of(thread)}", _nothing)


def list_messages(
    thread: Thread | str, status: MessageStatus | Iterable[MessageStatus] | None, kind: str | None,
    after: Message | str | None, order: str | None, limit: int | None, cursor: str | None,
) -> Call[Messages]:  # fmt: skip
    behind = None if after is None else id_of(after)
    params = _params(status=status, kind=kind, after=behind, order=order, limit=limit, cursor=cursor)
    return Call("GET", f"/api/threads/{id_of(thread)}/messages", answers.messages, params)


def save_messages(thread: Thread | str, messages: Sequence[NewMessage], key: str | None) -> Call[list[Message]]:
    def read(raw: Any) -> list[Message]:
        return [Message.of(each) for each in raw["results"]]

    return _post(f"/api/threads/{id_of(thread)}/messages", read, list(messages), key=key)


def delete_message(message: Message | str) -> Call[None]:
    return Call("DELETE", f"/api/messages/{id_of(message)}", _nothing)


# --- tool calls, and the server itself ------------------------------------------------------------------------------


def list_tool_calls(
    run: Run | str | None, status: CallStatus | Iterable[CallStatus] | None, name: str | Iterable[str] | None,
    needs: str | None, limit: int | None, cursor: str | None,
) -> Call[Page[ToolCall]]:  # fmt: skip
    of = None if run is None else id_of(run)
    params = _params(run=of, status=status, name=name, needs=needs, limit=limit, cursor=cursor)
    return Call("GET", "/api/tool-calls", answers.page_of(ToolCall.of), params)


def get_tool_call(call: ToolCall | str) -> Call[ToolCall]:
    return Call("GET", f"/api/tool-calls/{id_of(call)}", ToolCall.of)


def health(path: str) -> Call[dict[str, Any]]:
    # What is not well answers 503, and is to be said, not asked again.
    return Call("GET", path, dict, again=False)


def _nothing(raw: Any) -> None:
    return None
