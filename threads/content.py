"""The parts that a message is made of (their forms stand in API.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from threads import database
from threads.exceptions import BadInput, within

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

OF_RUNS = ("tool_call", "tool_result")
GIVEN = tuple(kind for kind in REQUIRED if kind not in OF_RUNS)


def parts_of(content: object) -> list[Part]:
    """Return `content` as a list of parts; a string is one text part. Raises BadInput that names the part.

    For what is given from outside: calls and their results are written by runs only, for one without the other is a
    transcript that no provider takes.
    """
    if isinstance(content, str):
        return [{"type": "text", "text": clean(content)}]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise BadInput("content must be a string or a list of parts like {'type': 'text', 'text': '...'}.")
    parts: list[Part] = []
    for place, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str) or part["type"] not in REQUIRED:
            raise BadInput(f"content[{place}] must be a part with a type of: {', '.join(GIVEN)}.", attr=str(place))
        if part["type"] in OF_RUNS:
            raise BadInput(
                f"content[{place}] is a {part['type']}, which only runs write; give: {', '.join(GIVEN)}.",
                attr=str(place),
            )
        for field, kind in REQUIRED[part["type"]].items():
            if not isinstance(part.get(field), kind):
                raise BadInput(f"content[{place}].{field} must be a {kind.__name__}.", attr=f"{place}.{field}")
        with within(str(place)):
            parts.append(plain(dict(part), f"content[{place}]"))
    return parts


def plain(value: object, name: str) -> Any:
    """Return the value as JSON that Postgres can hold, its texts cleaned. Raises BadInput that names it."""
    try:
        text = json.dumps(value, allow_nan=False)
        found = json.loads(text)
        # Only an escape can hide what Postgres refuses.
        cleaned = clean_json(found) if "\\u0000" in text or "\\ud" in text else found
        database.dumps(cleaned)  # its limits are narrower: integers of 64 bits, 254 levels
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"{name} must be JSON: {error}.") from error
    return cleaned


def clean_json(value: Any) -> Any:
    """Return a JSON value with every text in it cleaned."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [clean_json(each) for each in value]
    if isinstance(value, dict):
        return {clean(key): clean_json(each) for key, each in value.items()}
    return value


def clean(text: str) -> str:
    """Return the text as Postgres can hold it: without NUL, and without halves of surrogate pairs."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()


def text_of(parts: Sequence[Mapping[str, Any]]) -> str:
    """Return the text parts, joined."""
    return "".join(part["text"] for part in parts if part["type"] == "text")
