"""The loop that everyone writes first: the `openai` client's objects, the tool called in line, nothing stored.

A process of this module takes orders from a Valkey list, `{"runs", "prompt"}`, runs so many loops at once, a thread
each, and answers on another with `{"calls", "seconds"}`. It serves until it is killed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import redis

from benchmarks.celery_chain import INSTRUCTIONS, TOOLS

ORDERS = "longhaul-bench:bare:orders"
ANSWERS = "longhaul-bench:bare:answers"


def take(number: int) -> int:
    return number


def ask(client: openai.OpenAI, messages: Sequence[Any]) -> dict[str, Any]:
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


def converse(client: openai.OpenAI, prompt: str) -> int:
    """Run the loop to the model's final text; return how many tools were called."""
    messages: list[Any] = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": prompt}]
    called = 0
    while True:
        message = ask(client, messages)
        if "tool_calls" not in message:
            return called
        messages.append(message)
        for call in message["tool_calls"]:
            result = take(**json.loads(call["function"]["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)})
            called += 1


def main() -> None:
    valkey = redis.Redis.from_url(os.environ["REDIS_URL"], socket_timeout=None)  # an order may be long in coming
    client = openai.OpenAI(max_retries=0)
    with ThreadPoolExecutor(max_workers=64) as threads:
        while True:
            order = valkey.blpop([ORDERS])
            assert order is not None  # without a timeout it waits for one
            asked = json.loads(order[1])
            started = time.monotonic()
            loops = [threads.submit(converse, client, asked["prompt"]) for _ in range(asked["runs"])]
            calls = sum(loop.result() for loop in loops)
            valkey.lpush(ANSWERS, json.dumps({"calls": calls, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()
