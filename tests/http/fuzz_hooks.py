"""What schemathesis may not know of: its requests are bounded in time, and name agents that there are."""

from __future__ import annotations

from itertools import count
from typing import Any
from uuid import UUID

import schemathesis

AGENT = "worker_test"
COUNT = count()
TOOLS = ["plain", "idempotent"]  # of this agent's
SECONDS = 0.2  # /wait: a server that waits is no news


@schemathesis.hook
def before_load_schema(context: schemathesis.HookContext, raw_schema: dict[str, Any]) -> None:
    """Let it check the frames of streams too: of a stream it reads the schema as that of one frame."""
    for methods in raw_schema["paths"].values():
        for said in methods.values():
            for answer in said["responses"].values():
                stream = answer.get("content", {}).get("text/event-stream")
                if stream is not None:
                    stream["schema"] = stream.pop("x-itemSchema")


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Say what there is where something valid is said: what is refused for a name alone shows nothing else.

    What breaks the schema stays as it is, but that nobody waits for long.
    """
    query: Any = case.query
    if isinstance(query, dict):
        _wait_briefly(query)
    if case.meta is None or case.meta.generation.mode.is_negative:
        return
    if isinstance(query, dict):
        for name in ("cursor", "after", "starting_after"):
            query.pop(name, None)  # places that only an answer names
    headers: Any = case.headers
    if headers is not None:
        if "Last-Event-ID" in headers:
            headers["Last-Event-ID"] = "" if case.path.startswith("/api/threads/") else "0"
        if "Idempotency-Key" in headers:  # one for each request: one that comes again with another body is a conflict
            headers["Idempotency-Key"] = f"key {next(COUNT)}"
    _meant(case.body)


def _wait_briefly(query: dict[str, Any]) -> None:
    try:
        if SECONDS < float(query.get("timeout_seconds", 0)) <= 300:
            query["timeout_seconds"] = SECONDS
    except (TypeError, ValueError, OverflowError):
        pass  # no number: the server should say so


def _is_id(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


def _meant(body: Any) -> None:
    if not isinstance(body, dict):
        return
    for name, known in {"agent": AGENT, "model": "openai:test", "tool_choice": "auto"}.items():
        if isinstance(body.get(name), str):
            body[name] = known
    if isinstance(body.get("tools"), list):
        body["tools"] = TOOLS[: len(body["tools"])]
    for name in ("after_step", "starting_after"):
        if body.get(name):
            body[name] = 0
    if isinstance(body.get("message"), str) and _is_id(body["message"]):
        del body["message"]  # of the thread, and without an input
    _meant(body.get("overrides"))
