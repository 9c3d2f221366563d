"""What schemathesis may not know of: its requests are bounded in time, and name agents that there are."""

from __future__ import annotations

from typing import Any

import schemathesis

AGENT = "worker_test"
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
    """Name the agent that there is where a valid name stands: what is refused for that alone shows nothing else."""
    if isinstance(body, dict) and isinstance(body.get("agent"), str) and 0 < len(body["agent"]) <= 200:
        body["agent"] = AGENT
    return body
