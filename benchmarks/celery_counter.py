"""What a team would write for calls in parallel: a task each, and a counter in Postgres that says which one was the last.

Each call is one Postgres transaction on a connection that its process keeps: the result is stored, the run's counter goes
down by one. Who brings it to 0 sends the task that goes on. It has no fence, no events, no retry, no cancel; a message that
comes twice counts a call twice, and one that is lost leaves the run where it is.

The driver stands in `fan_out`, for a worker imports this module.
"""

from __future__ import annotations

import json
from typing import Any

from celery import Celery

from benchmarks import model_calls
from benchmarks.celery_chain import BROKER, transaction

SCHEMA = """
CREATE TABLE counter_run (
    id bigserial PRIMARY KEY, prompt text NOT NULL, remaining integer NOT NULL DEFAULT 0, called_at timestamptz,
    joined_at timestamptz, answer text, finished_at timestamptz);
CREATE TABLE counter_call (
    run_id bigint NOT NULL REFERENCES counter_run, index integer NOT NULL, call_id text NOT NULL, result jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(), PRIMARY KEY (run_id, index));
"""

CONFIGURATION: dict[str, Any] = {
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "task_serializer": "json",
    "worker_prefetch_multiplier": 1,
    "worker_send_task_events": False,
    "broker_connection_retry_on_startup": True,
    "broker_transport_options": {"socket_timeout": 10, "socket_keepalive": True},
}

app = Celery("celery_counter", broker=BROKER or None, set_as_current=False)
app.conf.update(task_ignore_result=True, **CONFIGURATION)


def ask_for_calls(prompt: str) -> list[dict[str, Any]]:
    """Return the calls that the model asks for."""
    calls: list[dict[str, Any]] = model_calls.ask("httpx2", _asked(prompt))["tool_calls"]
    return calls


def ask_for_answer(prompt: str, results: list[tuple[str, Any]]) -> str:
    """Return what the model says to the results, each with the id of its call, in the order of the calls."""
    calls = [
        {"id": call, "type": "function", "function": {"name": "take", "arguments": json.dumps({"number": number})}}
        for call, number in results
    ]
    said = {"role": "assistant", "content": None, "tool_calls": calls}
    answers = [{"role": "tool", "tool_call_id": call, "content": json.dumps(result)} for call, result in results]
    return str(model_calls.ask("httpx2", [*_asked(prompt), said, *answers])["content"])


def _asked(prompt: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": model_calls.INSTRUCTIONS}, {"role": "user", "content": prompt}]


@app.task(name="counter.begin", queue="counter.steps")
def begin(run: int, prompt: str) -> None:
    """Ask the model, say how many calls are open, send them."""
    calls = ask_for_calls(prompt)
    with transaction() as connection:
        connection.execute(
            "UPDATE counter_run SET remaining = %s, called_at = clock_timestamp() WHERE id = %s", [len(calls), run]
        )
    for index, call in enumerate(calls):
        call_tool.apply_async((run, index, call["id"], call["function"]["arguments"]))


@app.task(name="counter.call_tool", queue="counter.tools")
def call_tool(run: int, index: int, call: str, arguments: str) -> None:
    """Run the tool, store its result, count; the last one hands on."""
    result = json.loads(arguments)["number"]
    with transaction() as connection:
        connection.execute(
            "INSERT INTO counter_call (run_id, index, call_id, result) VALUES (%s, %s, %s, %s)",
            [run, index, call, json.dumps(result)],
        )
        row = connection.execute(
            "UPDATE counter_run SET remaining = remaining - 1, joined_at = CASE WHEN remaining = 1 THEN clock_timestamp() END"
            " WHERE id = %s RETURNING remaining",
            [run],
        ).fetchone()
    if row is not None and row[0] == 0:
        go_on.apply_async((run,))


@app.task(name="counter.go_on", queue="counter.steps")
def go_on(run: int) -> None:
    """Tell the model all results, in call order, and store its answer."""
    with transaction() as connection:
        row = connection.execute("SELECT prompt FROM counter_run WHERE id = %s", [run]).fetchone()
        results = connection.execute(
            "SELECT call_id, result FROM counter_call WHERE run_id = %s ORDER BY index", [run]
        ).fetchall()
    assert row is not None
    answer = ask_for_answer(row[0], results)
    with transaction() as connection:
        connection.execute(
            "UPDATE counter_run SET answer = %s, finished_at = clock_timestamp() WHERE id = %s", [answer, run]
        )
