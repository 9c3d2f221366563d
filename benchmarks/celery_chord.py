"""The same calls as a chord of Celery's: a group of tasks, and a callback that gets their results, by way of Redis.

Nothing of a call is stored in Postgres before the callback, which stores all results in one transaction. The result
backend is Redis, the one that Celery counts a chord in with a counter; and the broker too; results are kept for a day, as by default.

The driver stands in `fan_out`, for a worker imports this module.
"""

from __future__ import annotations

import json
from typing import Any

from celery import Celery, chord

from benchmarks.celery_chain import BROKER, transaction
from benchmarks.celery_counter import CONFIGURATION, ask_for_answer, ask_for_calls

SCHEMA = """
CREATE TABLE chord_run (
    id bigserial PRIMARY KEY, prompt text NOT NULL, called_at timestamptz, joined_at timestamptz, answer text,
    finished_at timestamptz);
CREATE TABLE chord_call (
    run_id bigint NOT NULL REFERENCES chord_run, index integer NOT NULL, call_id text NOT NULL, result jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(), PRIMARY KEY (run_id, index));
"""

app = Celery("celery_chord", broker=BROKER or None, backend=BROKER or None, set_as_current=False)
app.conf.update(**CONFIGURATION)


@app.task(name="chord.begin", queue="chord.steps", ignore_result=True)
def begin(run: int, prompt: str) -> None:
    """Ask the model and send the chord."""
    calls = ask_for_calls(prompt)
    with transaction() as connection:
        connection.execute("UPDATE chord_run SET called_at = clock_timestamp() WHERE id = %s", [run])
    header = [call_tool.s(call["id"], call["function"]["arguments"]) for call in calls]
    chord(header, app=app)(go_on.s(run, prompt))


@app.task(name="chord.call_tool", queue="chord.tools")
def call_tool(call: str, arguments: str) -> tuple[str, Any]:
    """Run the tool; Celery stores its result and counts."""
    return call, json.loads(arguments)["number"]


@app.task(name="chord.go_on", queue="chord.steps", ignore_result=True)
def go_on(results: list[tuple[str, Any]], run: int, prompt: str) -> None:
    """Store the results, tell the model all of them, and store its answer."""
    with transaction() as connection:
        connection.execute("UPDATE chord_run SET joined_at = clock_timestamp() WHERE id = %s", [run])
        connection.cursor().executemany(
            "INSERT INTO chord_call (run_id, index, call_id, result) VALUES (%s, %s, %s, %s)",
            [[run, index, call, json.dumps(result)] for index, (call, result) in enumerate(results)],
        )
    answer = ask_for_answer(prompt, results)
    with transaction() as connection:
        connection.execute(
            "UPDATE chord_run SET answer = %s, finished_at = clock_timestamp() WHERE id = %s", [answer, run]
        )
