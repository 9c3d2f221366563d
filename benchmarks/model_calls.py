"""The model calls of the peers' forms, by the client that is named: what a user would write, and the least that would do.

`openai`: streamed by the `openai` package, as the bare loop does it. `httpx2`: raw and unstreamed, as the Celery chain does it.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import httpx2
import openai

from benchmarks import bare_loop
from benchmarks.celery_chain import TOOLS

CLIENTS = ("openai", "httpx2")


@functools.cache
def _openai() -> openai.OpenAI:
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
        return bare_loop.ask(_openai(), messages)
    if client == "httpx2":
        response = _httpx2().post("chat/completions", json={"model": "bench", "messages": messages, "tools": TOOLS})
        response.raise_for_status()
        message: dict[str, Any] = response.json()["choices"][0]["message"]
        return message
    raise ValueError(f"There is no client {client!r}.")
