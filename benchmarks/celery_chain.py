"""What a team would write without Longhaul: a step is a Celery task, a tool call is a Celery task, each hands on.

Each task is one Postgres transaction of an insert and an update, on a connection that its process keeps. The tasks
make up the conversation so far from the step's number, where a real chain would read it back: that favours the chain.
It also has no fence, no events, no retry, no cancel, and a worker's death at the wrong moment runs a tool twice.

The driver stands in `step_cost`, for a worker imports this module.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from celery import Celery

from benchmarks import model_calls

SCHEMA = """
CREATE TABLE chain_run (id bigserial PRIMARY KEY, step integer NOT NULL DEFAULT 0, finished_at timestamptz);
CREATE TABLE chain_message (
    id bigserial PRIMARY KEY, run_id bigint NOT NULL REFERENCES chain_run, step integer NOT NULL, role text NOT NULL,
    body jsonb NOT NULL, created_at timestamptz NOT NULL DEFAULT clock_timestamp());
"""

BROKER = os.environ.get("CELERY_BROKER_URL", "")

app = Celery("celery_chain", broker=BROKER or None, set_as_current=False)
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    task_serializer="json",
    worker_prefetch_multiplier=1,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
    # On RabbitMQ as safe as Longhaul is there: quorum queues, and publishing with confirmations.
    task_create_missing_queue_type="quorum",
    broker_transport_options=(
        {"confirm_publish": True} if BROKER.startswith("amqp") else {"socket_timeout": 10, "socket_keepalive": True}
    ),
)


@functools.cache
def _connection() -> psycopg.Connection[Any]:
    return psycopg.connect(os.environ["DATABASE_URL"])


@contextmanager
def transaction() -> Iterator[psycopg.Connection[Any]]:
    """One transaction on the connection that this process keeps."""
    connection = _connection()
    try:
        yield connection
        connection.commit()
    except BaseException:
        connection.rollback()
        raise


def _conversation(prompt: str, answered: int) -> list[dict[str, Any]]:
    """Return the messages of a run whose first `answered` calls have their results."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": model_calls.INSTRUCTIONS},
        {"role": "user", "content": prompt},
    ]
    for number in range(1, answered + 1):
        call = {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": "take", "arguments": json.dumps({"number": number})},
        }
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": str(number)})
    return messages


@app.task(name="chain.step", queue="chain.steps")
def step(run: int, answered: int, prompt: str) -> None:
    """One model turn: ask, store the answer, hand on to the tool or end."""
    message = model_calls.ask("httpx2", _conversation(prompt, answered))
    calls = message.get("tool_calls") or []
    with transaction() as connection:
        connection.execute(
            "INSERT INTO chain_message (run_id, step, role, body) VALUES (%s, %s, 'assistant', %s)",
            [run, answered + 1, json.dumps(message)],
        )
        connection.execute(
            "UPDATE chain_run SET step = %s, finished_at = CASE WHEN %s THEN clock_timestamp() END WHERE id = %s",
            [answered + 1, not calls, run],
        )
    for call in calls:
        call_tool.apply_async((run, answered + 1, call["function"]["arguments"], prompt))


@app.task(name="chain.call_tool", queue="chain.tools")
def call_tool(run: int, number: int, arguments: str, prompt: str) -> None:
    """One tool call: run it, store its result, hand on to the next step."""
    result = json.loads(arguments)["number"]
    with transaction() as connection:
        connection.execute(
            "INSERT INTO chain_message (run_id, step, role, body) VALUES (%s, %s, 'tool', %s)",
            [run, number, json.dumps({"result": result})],
        )
        connection.execute("UPDATE chain_run SET step = %s WHERE id = %s", [number, run])
    step.apply_async((run, number, prompt))
