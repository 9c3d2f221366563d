"""The same work on absurd: a run is a task, each model call and each tool call is a checkpointed step of it.

A process of this module imports all, then forks; each child is a worker of absurd, which claims tasks from its queue in
Postgres and runs each in a thread, all on one connection, as absurd's `start_worker` does it. A child takes orders from
a Valkey list: at "work" it starts its worker, at "rest" it stops it, so that nobody asks Postgres for work while others
are measured. It serves until it is killed.

The driver stands in `step_cost`.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from typing import Any

import redis
from absurd_sdk import Absurd

from agents_project.processes import die_with_parent
from benchmarks import model_calls


def take(number: int) -> int:
    return number


def converse(params: dict[str, Any], context: Any) -> int:
    """Run the loop to the model's final text; return how many tools were called."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": model_calls.INSTRUCTIONS},
        {"role": "user", "content": params["prompt"]},
    ]
    called = 0
    while True:
        message = context.step("ask", lambda: model_calls.ask(params["client"], messages))
        calls = message.get("tool_calls") or []
        if not calls:
            return called
        messages.append({"role": "assistant", "content": message.get("content"), "tool_calls": calls})
        for call in calls:
            result = context.step("take", functools.partial(take, **json.loads(call["function"]["arguments"])))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)})
            called += 1


def serve(parent: int, queue: str, orders: str, concurrency: int) -> None:
    """Be one worker, at work or at rest."""
    die_with_parent(parent)
    worker = Absurd(os.environ["DATABASE_URL"], queue_name=queue)
    worker.register_task("converse")(converse)
    valkey = redis.Redis.from_url(os.environ["REDIS_URL"], socket_timeout=None)  # an order may be long in coming
    while True:
        if _order(valkey, orders) == "work":
            # Its polling interval is absurd's own: the tasks stand in the queue before the order comes.
            at_work = threading.Thread(
                target=worker.start_worker, kwargs={"worker_id": orders, "concurrency": concurrency}
            )
            at_work.start()
            while _order(valkey, orders) != "rest":
                pass
            worker.stop_worker()
            at_work.join()


def _order(valkey: Any, orders: str) -> str:
    order = valkey.blpop([orders])
    assert order is not None  # without a timeout it waits for one
    word: bytes = order[1]
    return word.decode()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.absurd_steps", description=__doc__)
    parser.add_argument("queue", help="absurd's queue")
    parser.add_argument("orders", help="the lists of orders; a number follows, from 0")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=1, help="runs at once of one process, a thread each")
    given = parser.parse_args()
    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(target=serve, args=(os.getpid(), given.queue, f"{given.orders}:{number}", given.concurrency))
        for number in range(given.processes)
    ]
    for child in children:
        child.start()
    multiprocessing.connection.wait([child.sentinel for child in children])
    raise SystemExit("a worker ended")


if __name__ == "__main__":
    main()
