"""The folding rule of docs/streams.md, as a client would write it from the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CALL_STATES = {
    "tool_call.created": "requested",
    "tool_call.started": "running",
    "tool_call.retrying": "retrying",
    "tool_call.unknown": "unknown",
    "tool_call.settled": "settled",
}


class Folded:
    """A thread as an interface shows it: messages by id, in the order in which they came, and how tool calls stand."""

    def __init__(self, messages: Iterable[dict[str, Any]] = ()) -> None:
        self.messages: dict[str, dict[str, Any]] = {
            each["id"]: {
                "status": each["status"],
                "role": each["role"],
                "content": list(each["content"]),
                "shown": True,
            }
            for each in messages
        }
        self.calls: dict[str, dict[str, Any]] = {}

    def take(self, event: dict[str, Any]) -> None:
        id: str = event.get("message", "")
        shown = self.messages[id]["shown"] if id in self.messages else event.get("shown", True)
        match event["type"]:
            case "message.created":
                self.messages[id] = {"status": "pending", "role": event["role"], "content": [], "shown": shown}
            case "text.delta" | "reasoning.delta":
                kind = event["type"].partition(".")[0]
                # What has begun before the snapshot and is not in it, the thread does not show.
                begun = {"status": "pending", "role": "assistant", "content": [], "shown": False}
                parts = self.messages.setdefault(id, begun)["content"]
                if parts and parts[-1]["type"] == kind:
                    parts[-1] = {**parts[-1], "text": parts[-1]["text"] + event["text"]}
                else:
                    parts.append({"type": kind, "text": event["text"]})
            case "message.completed":
                status = "partial" if event.get("partial") else "completed"
                said = {"status": status, "role": event["role"], "content": event["content"]}
                self.messages[id] = {**said, "shown": shown}
            case "message.discarded":
                self._remove(id)
            case "run.queued" if "superseded" in event:
                self._remove(event["superseded"])
        if event["type"] in CALL_STATES:
            call = self.calls.setdefault(event["tool_call"], {"message": id, "outcome": None, "result": None})
            call["status"] = CALL_STATES[event["type"]]
            call |= {name: event[name] for name in ("outcome", "result") if name in event}

    def _remove(self, id: str) -> None:
        self.messages.pop(id, None)
        self.calls = {call: each for call, each in self.calls.items() if each["message"] != id}


def folded(events: Iterable[dict[str, Any]], snapshot: Iterable[dict[str, Any]] = ()) -> dict[str, dict[str, Any]]:
    made = Folded(snapshot)
    for event in events:
        made.take(event)
    return made.messages
