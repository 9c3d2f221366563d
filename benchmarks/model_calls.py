"""The model calls of the other forms, by the client that is named: what a user would write, and the least that would do.

`openai`: streamed by the `openai` package. `httpx2`: raw and unstreamed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import httpx2

if TYPE_CHECKING:
    import openai

INSTRUCTIONS = "Call the tool until you have enough."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "take",
            "description": "Take a number.",
            "parameters": {
                "type": "object",
                "properties": {"number": {"type": "integer", "description": "the number"}},
                "required": ["number"],
                "additionalProperties": False,
            },
        },
    }
]
CLIENTS = ("openai", "httpx2")


@functools.cache
def _openai() -> openai.OpenAI:
    import openai  # only here: the processes of the chain have no use for it

    return openai.OpenAI(max_retries=0)


@functools.cache
def _httpx2() -> httpx2.Client:
    return httpx2.Client(
        base_url=os.environ["OPENAI_BASE_URL"],
        headers={"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
        timeout=60,
    )


def ask(client: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the model's answer as a message. Raises ValueError for a client that is none of CLIENTS."""
    if client == "openai":
        return ask_openai(_openai(), messages)
    if client == "httpx2":
        response = _httpx2().post("chat/completions", json={"model": "bench", "messages": messages, "tools": TOOLS})
        response.raise_for_status()
        message: dict[str, Any] = response.json()["choices"][0]["message"]
        return message
    raise ValueError(f"There is no client {client!r}.")


def ask_openai(client: openai.OpenAI, messages: Sequence[Any]) -> dict[str, Any]:
    """Stream one answer; return it as the message that the next request holds."""
    tools: list[Any] = TOOLS
    text = ""
    calls: dict[int, dict[str, Any]] = {}
    stream = client.chat.completions.create(
        model="bench",
        messages=list(messages),
        tools=tools,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            for part in choice.delta.tool_calls or ():
                call = calls.setdefault(
                    part.index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
                )
                call["id"] += part.id or ""
                if part.function is not None:
                    call["function"]["name"] += part.function.name or ""
                    call["function"]["arguments"] += part.function.arguments or ""
    said: dict[str, Any] = {"role": "assistant", "content": text or None}
    return {**said, "tool_calls": list(calls.values())} if calls else said
