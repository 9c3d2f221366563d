"""The same work on DBOS: a run is a workflow, each model call and each tool call is a step of it.

A process of this module launches DBOS, says so on a Valkey list, takes orders from another one,
`{"runs": [workflow id, ...], "prompt"}`, and starts those workflows, a thread each. It serves until it is killed.

The driver stands in `step_cost`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from typing import Any

import httpx2
import redis
from dbos import DBOS, DBOSConfig, SetWorkflowID

from benchmarks.celery_chain import INSTRUCTIONS, TOOLS


@functools.cache
def _client() -> httpx2.Client:
    return httpx2.Client(
        base_url=os.environ["OPENAI_BASE_URL"],
        headers={"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
        timeout=60,
    )


@DBOS.step(name="ask")
def ask(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """One model call; its answer is what DBOS stores."""
    response = _client().post("chat/completions", json={"model": "bench", "messages": messages, "tools": TOOLS})
    response.raise_for_status()
    message: dict[str, Any] = response.json()["choices"][0]["message"]
    return message


@DBOS.step(name="take")
def take(number: int) -> int:
    """One tool call."""
    return number


@DBOS.workflow(name="converse")
def converse(prompt: str) -> int:
    """Run the loop to the model's final text; return how many tools were called."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": prompt},
    ]
    called = 0
    while True:
        message = ask(messages)
        calls = message.get("tool_calls") or []
        if not calls:
            return called
        messages.append({"role": "assistant", "content": message.get("content"), "tool_calls": calls})
        for call in calls:
            result = take(**json.loads(call["function"]["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)})
            called += 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dbos_steps", description=__doc__)
    parser.add_argument("orders", help="the list of this process's orders; also its name as an executor")
    parser.add_argument("launched", help="the list on which it says that it has launched DBOS")
    given = parser.parse_args()
    config: DBOSConfig = {
        "name": "longhaul-bench",
        "system_database_url": os.environ["DATABASE_URL"],
        "executor_id": given.orders,
        "application_version": "bench",
        "log_level": "WARNING",
        "db_engine_kwargs": {"pool_pre_ping": False},  # its default asks before each use if the connection still lives
    }
    DBOS(config=config)
    DBOS.launch()
    valkey = redis.Redis.from_url(os.environ["REDIS_URL"], socket_timeout=None)  # an order may be long in coming
    valkey.rpush(given.launched, given.orders)
    while True:
        order = valkey.blpop([given.orders])
        assert order is not None  # without a timeout it waits for one
        asked = json.loads(order[1])
        for run in asked["runs"]:
            with SetWorkflowID(run):
                DBOS.start_workflow(converse, asked["prompt"])


if __name__ == "__main__":
    main()
