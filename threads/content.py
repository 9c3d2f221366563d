"""The parts that a message is made of (their forms stand in API.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from threads.exceptions import BadInput

Part: TypeAlias = dict[str, Any]

# type of part -> the fields it must have, and their types
REQUIRED: dict[str, dict[str, type]] = {
    "text": {"text": str},
    "reasoning": {"text": str},
    "image": {},
    "file": {},
    "tool_call": {"tool_call": str, "name": str},
    "tool_result": {"tool_call": str, "outcome": str},
    "data": {},
}


def parts_of(content: object) -> list[Part]:
    """Return `content` as a list of parts; a string is one text part. Raises BadInput that names the part."""
    if isinstance(content, str):
        return [{"type": "text", "text": clean(content)}]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise BadInput("content must be a string or a list of parts like {'type': 'text', 'text': '...'}.")
    parts: list[Part] = []
    for place, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") not in REQUIRED:
            raise BadInput(f"content[{place}] must be a part with a type of: {', '.join(REQUIRED)}.")
        for field, kind in REQUIRED[part["type"]].items():
            if not isinstance(part.get(field), kind):
                raise BadInput(f"content[{place}].{field} must be a {kind.__name__}.")
        parts.append({key: clean(value) if isinstance(value, str) else value for key, value in part.items()})
    return parts


def clean(text: str) -> str:
    """Return the text as Postgres can hold it: without NUL, and without halves of surrogate pairs."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()


def text_of(parts: Sequence[Mapping[str, Any]]) -> str:
    """Return the text parts, joined."""
    return "".join(part["text"] for part in parts if part["type"] == "text")
