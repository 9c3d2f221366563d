"""The loop that everyone writes first: the `openai` client's objects, the tool called in line, nothing stored.

A process of this module takes orders from a Valkey list, `{"runs", "prompt"}`, runs so many loops at once, a thread
each, and answers on another with `{"calls", "seconds"}`. It serves until it is killed.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import redis

from benchmarks.model_calls import INSTRUCTIONS, ask_openai

ORDERS = "longhaul-bench:bare:orders"
ANSWERS = "longhaul-bench:bare:answers"


def take(number: int) -> int:
    return number


def converse(client: openai.OpenAI, prompt: str) -> int:
    """Run the loop to the model's final text; return how many tools were called."""
    messages: list[Any] = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": prompt}]
    called = 0
    while True:
        message = ask_openai(client, messages)
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
