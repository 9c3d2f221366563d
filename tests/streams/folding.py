"""The folding rule of docs/streams.md, as a client would write it from the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Folded:
    """A thread as an interface shows it: messages by id, in the order in which they came."""

    def __init__(self, messages: Iterable[dict[str, Any]] = ()) -> None:
        self.messages: dict[str, dict[str, Any]] = {
            each["id"]: {"status": each["status"], "role": each["role"], "content": list(each["content"])}
            for each in messages
        }

    def take(self, event: dict[str, Any]) -> None:
        id: str = event.get("message", "")
        match event["type"]:
            case "message.created":
                self.messages[id] = {"status": "pending", "role": event["role"], "content": []}
            case "text.delta" | "reasoning.delta":
                kind = event["type"].partition(".")[0]
                parts = self.messages[id]["content"]
                if parts and parts[-1]["type"] == kind:
                    parts[-1] = {**parts[-1], "text": parts[-1]["text"] + event["text"]}
                else:
                    parts.append({"type": kind, "text": event["text"]})
            case "message.completed":
                status = "partial" if event.get("partial") else "completed"
                self.messages[id] = {"status": status, "role": event["role"], "content": event["content"]}
            case "message.discarded":
                self.messages.pop(id, None)


def folded(events: Iterable[dict[str, Any]], snapshot: Iterable[dict[str, Any]] = ()) -> dict[str, dict[str, Any]]:
    made = Folded(snapshot)
    for event in events:
        made.take(event)
    return made.messages
