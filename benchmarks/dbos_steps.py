"""The same work on DBOS: a run is a workflow, each model call and each tool call is a step of it.

A process of this module launches DBOS, says so on a Valkey list, takes orders from another one,
`{"runs": [workflow id, ...], "client", "prompt"}`, and starts those workflows, a thread each. It serves until it is killed.

The driver stands in `step_cost`.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import redis
from dbos import DBOS, DBOSConfig, SetWorkflowID

from benchmarks import model_calls


@DBOS.step(name="ask")
def ask(client: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """One model call; its answer is what DBOS stores."""
    return model_calls.ask(client, messages)


@DBOS.step(name="take")
def take(number: int) -> int:
    """One tool call."""
    return number


@DBOS.workflow(name="converse")
def converse(client: str, prompt: str) -> int:
    """Run the loop to the model's final text; return how many tools were called."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": model_calls.INSTRUCTIONS},
        {"role": "user", "content": prompt},
    ]
    called = 0
    while True:
        message = ask(client, messages)
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
                DBOS.start_workflow(converse, asked["client"], asked["prompt"])


if __name__ == "__main__":
    main()
