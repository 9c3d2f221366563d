"""A message as a person reads it: its parts, each by its type, all of it escaped."""

from __future__ import annotations

from typing import Any

from django.contrib.admin import AdminSite
from django.utils.html import format_html

from threads.admin import marks
from threads.models import Message
from tools.models import ToolCall


def shown(site: AdminSite, message: Message) -> dict[str, Any]:
    """Return what a template needs of a message."""
    return {
        "role": message.role,
        "state": marks.state(message.status) if message.status != "completed" else "",
        "step": message.step,
        "link": marks.link(site, Message, message.pk),
        "at": marks.moment(message.created_at),
        "parts": [part(site, each) for each in message.content],
    }


def part(site: AdminSite, given: Any) -> str:
    """Return one part. What it points at is not loaded: an image is its description."""
    kind = given.get("type") if isinstance(given, dict) else None
    match kind:
        case "text":
            return marks.text(str(given.get("text", "")))
        case "reasoning":
            return marks.reasoning(str(given.get("text", "")))
        case "tool_call":
            name = marks.link(site, ToolCall, given.get("tool_call"), given.get("name"))
            return format_html('<p class="lh-part">calls {}</p>{}', name, marks.pretty(given.get("arguments")))
        case "tool_result":
            call = marks.link(site, ToolCall, given.get("tool_call"), "tool call")
            outcome = marks.state(str(given.get("outcome", "")))
            result = given.get("result") or given.get("error")
            return format_html('<p class="lh-part">result of the {}: {}</p>{}', call, outcome, marks.pretty(result))
        case _:
            return format_html('<p class="lh-part">{}</p>{}', kind or "part", marks.pretty(given))
