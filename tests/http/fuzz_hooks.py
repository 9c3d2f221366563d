"""What schemathesis may not know of: its requests are bounded in time, and name agents that there are."""

from __future__ import annotations

from typing import Any

import schemathesis

AGENT = "worker_test"
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
def map_query(context: schemathesis.HookContext, query: Any) -> Any:
    if isinstance(query, dict) and "timeout_seconds" in query:
        try:
            if float(query["timeout_seconds"]) > SECONDS and float(query["timeout_seconds"]) <= 300:
                query["timeout_seconds"] = SECONDS
        except (TypeError, ValueError, OverflowError):
            pass  # no number: the server should say so
    return query


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Say what there is where something valid is said: what is refused for a name alone shows nothing else."""
    if not isinstance(body, dict):
        return body
    for name, known in {"agent": AGENT, "model": "openai:test", "tool_choice": "auto"}.items():
        if isinstance(body.get(name), str) and 0 < len(body[name]) <= 200:
            body[name] = known
    tools = body.get("tools")
    if isinstance(tools, list) and all(isinstance(each, str) and len(each) <= 200 for each in tools):
        body["tools"] = TOOLS[: len(tools)]
    if isinstance(body.get("message"), str) and "input" in body:
        del body["message"]  # one of both may be said
    map_body(context, body.get("overrides"))
    return body
