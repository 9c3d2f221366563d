"""Examples that the OpenAPI document shows. Tests send the requests, and compare the answers' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RUN_ID = "019aa1f2-7c3e-7b54-9f0a-3d1c5e8b2a61"
THREAD_ID = "019aa1f2-7c3b-7d10-8e55-6f2b9c4d7e08"


def _error(code: str, attr: str | None = None) -> dict[str, Any]:
    kind, detail = ERRORS[code]
    return {"type": kind, "errors": [{"code": "invalid" if attr else code, "detail": detail, "attr": attr}]}


ERRORS: Mapping[str, tuple[str, str]] = {
    "max_steps": ("validation_error", "Input should be greater than or equal to 1."),
    "not_authenticated": ("client_error", "Authentication credentials were not provided."),
    "permission_denied": ("client_error", "You do not have permission to perform this action."),
    "not_found": ("client_error", "Not found."),
    "thread_busy": ("client_error", "A run occupies this thread."),
    "too_large": ("client_error", "The body is larger than 8,000,000 bytes (LONGHAUL['MAX_BODY_BYTES'])."),
    "unsupported_media_type": ("client_error", "Send JSON, with Content-Type: application/json."),
    "throttled": ("client_error", "Request was throttled. Expected available in 12 seconds."),
    "needs_asgi": (
        "server_error",
        "This server speaks WSGI, which cannot stream: wait for the run at /api/runs/{id}/wait.",
    ),
    "unavailable": ("server_error", "The database cannot be reached. Try again."),
}
REQUESTS: Mapping[str, Mapping[str, Any]] = {
    "create_thread": {
        "empty": {},
        "with an agent and a history": {
            "agent": "support",
            "title": "Order 1042",
            "metadata": {"order": 1042},
            "messages": [{"role": "user", "content": "Where is order 1042?"}],
        },
    },
    "update_thread": {"archive": {"archived": True}, "another model": {"model": "openai:gpt-5-mini"}},
    "save_messages": {
        "one": {"role": "user", "content": "It was a birthday present."},
        "several": [
            {"role": "user", "content": [{"type": "text", "text": "It was a birthday present."}]},
            {"role": "assistant", "content": "I see."},
        ],
    },
    "start_run": {
        "ask": {"agent": "support", "input": "Where is order 1042?"},
        "go on from the thread's last state": {"agent": "support"},
        "with limits": {"agent": "support", "input": "Look it up.", "limits": {"max_steps": 10, "max_cost": 0.5}},
    },
    "start_run_on_new_thread": {
        "ask": {"agent": "support", "input": "Where is order 1042?"},
        "streamed": {"agent": "support", "input": "Where is order 1042?", "stream": True},
    },
    "cancel_run": {"with a reason": {"reason": "not needed any more"}},
    "give_result": {"what the tool would have returned": {"result": {"refunded": "20.00"}}},
    "give_error": {
        "it failed": {"message": "The bank refused the refund."},
        "it did not happen: run it again": {"message": "The bank knows of no refund.", "retryable": True},
    },
    "cancel_tool_call": {"with a reason": {"reason": "the customer has left"}},
    "resume_run": {"as it was": {}, "with an input": {"input": "Go on, and be brief."}},
    "fork_run": {"after the third step": {"after_step": 3, "overrides": {"model": "openai:gpt-5-mini"}}},
}
RUN: Mapping[str, Any] = {
    "id": RUN_ID,
    "thread": THREAD_ID,
    "agent": "support",
    "status": "completed",
    "stop_reason": "end_turn",
    "why": "completed after 2 steps",
    "error": None,
    "output": "Order 1042 was shipped yesterday.",
    "usage": {"input_tokens": 412, "output_tokens": 58, "cost": "0.000219"},
    "limits": {
        "max_steps": 50,
        "max_total_tokens": None,
        "max_cost": None,
        "deadline_seconds": None,
        "leg_budget_seconds": 300.0,
    },
    "legs": 1,
    "steps": 2,
    "epoch": 1,
    "last_seq": 14,
    "parent": None,
    "origin": "start",
    "priority": 0,
    "created_at": "2026-11-21T12:00:00.104512Z",
    "started_at": "2026-11-21T12:00:00.131207Z",
    "finished_at": "2026-11-21T12:00:04.822950Z",
    "metadata": {},
}
ANSWERS: Mapping[tuple[str, int], Any] = {
    ("get_run", 200): RUN,
    ("wait_for_run", 200): RUN,
}
# By status: the name of the component, what it means, and what such an answer looks like.
REFUSALS: Mapping[int, tuple[str, str, Any]] = {
    400: ("BadRequest", "What was sent is not what the operation takes.", _error("max_steps", "limits.max_steps")),
    401: ("Unauthorized", "No credentials, or none that are (still) good.", _error("not_authenticated")),
    403: (
        "Forbidden",
        "You see it, but may not do this; or a session came without its CSRF token.",
        _error("permission_denied"),
    ),
    404: ("NotFound", "There is no such thing, or you may not see it.", _error("not_found")),
    409: ("Conflict", "It cannot be done as things stand.", _error("thread_busy")),
    413: ("TooLarge", "The body, or an input in it, is larger than this server takes.", _error("too_large")),
    415: ("UnsupportedMediaType", "The body is not JSON in UTF-8, or is packed.", _error("unsupported_media_type")),
    429: ("TooManyRequests", "You have made more requests than this server allows.", _error("throttled")),
    501: ("NotImplemented", "This server speaks WSGI, which cannot stream.", _error("needs_asgi")),
    503: ("Unavailable", "The database cannot be reached. Try again.", _error("unavailable")),
}
FRAMES = f"""\
: longhaul
retry: 1000

id: 1
event: run.queued
data: {{"seq":1,"type":"run.queued","run":"{RUN_ID}","at":"2026-11-21T12:00:00.104512Z","reason":"start"}}

"""
THREAD_FRAMES = FRAMES.replace("id: ", f"id: {RUN_ID}:")
