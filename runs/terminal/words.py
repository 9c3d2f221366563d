"""How the terminal writes what models and tools say, and times and names: in one line, and without what it would obey."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Any

# Why a leg ended, in words. The keys are the reasons of `leg.ended`.
ENDS = {
    "budget": "its time is up, the next leg goes on",
    "tools": "nothing to do until its tool calls are settled",
    "person": "a person or an outside system is asked",
    "limited": "its model's limits leave no room now",
    "retry": "the model call failed and is tried again",
    "drained": "its worker shuts down",
    "lost": "its worker died",
    "cancelled": "the run was cancelled",
    "failed": "the run failed",
    "finished": "the run is finished",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Return text of a model or tool without what a terminal would obey: escapes, controls, changes of direction."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\t", " "))


def one_line(text: str) -> str:
    """Return harmless text without its line breaks: what tools and models say of a failure often has some."""
    return " ".join(harmless(text).split())


def short(value: Any, limit: int = 100) -> str:
    """Return a JSON value as one line of at most `limit` characters."""
    text = harmless(json.dumps(value, ensure_ascii=False, default=str)).replace("\n", " ")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def seconds(span: timedelta) -> str:
    """Return `0.26 s`, `12.3 s`, `3 min 5 s`: as exact as a reader can use."""
    total = max(span.total_seconds(), 0.0)
    if total < 1:
        return f"{total:.2f} s"
    if total < 120:
        return f"{total:.1f} s"
    return f"{int(total // 60)} min {int(total % 60)} s"


def place(worker: str) -> str:
    """Return a worker's name without its host: `agents-1` of `agents-1@web3`."""
    return harmless(worker).partition("@")[0]


def text_of(content: Any) -> str:
    """Return the text of a message: of its text parts, joined."""
    if isinstance(content, str):
        return harmless(content)
    return harmless("".join(part.get("text", "") for part in content or [] if part.get("type") == "text"))
