"""Examples that the OpenAPI document shows. Tests send the requests, and compare the answers' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RUN_ID = "019aa1f2-7c3e-7b54-9f0a-3d1c5e8b2a61"
THREAD_ID = "019aa1f2-7c3b-7d10-8e55-6f2b9c4d7e08"

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
FRAMES = f"""\
: longhaul

id: 1
event: run.queued
data: {{"seq":1,"type":"run.queued","run":"{RUN_ID}","at":"2026-11-21T12:00:00.104512Z","reason":"start"}}

"""
