"""Rows for the protocol tests: runs brought to a state by the SQL functions themselves, and looks at what they left.

`Database` is one connection in autocommit; a race takes two of them. `World` builds on one. Whatever has no function
(threads, workers, a run's start, a message saved by hand) is plain SQL here.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from typing import Any, TypeAlias
from uuid import UUID

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from threads.ids import new_id

TABLES = (
    "longhaul_threads_clock",
    "longhaul_runs_event",
    "longhaul_runs_usage",
    "longhaul_runs_step",
    "longhaul_runs_leg",
    "longhaul_runs_leave",
    "longhaul_tools_toolattempt",
    "longhaul_tools_toolcall",
    "longhaul_tools_worker",
    "longhaul_tools_rateuse",
    "longhaul_tools_pause",
    "longhaul_threads_message",
    "longhaul_runs_run",
    "longhaul_threads_thread",
)
SECOND = timedelta(seconds=1)
PREPARE = timedelta(seconds=60)
MODEL_TIME = timedelta(seconds=600)
POISON = 5

Row: TypeAlias = dict[str, Any]
_lock_keys = itertools.count(1)


class Database:
    """One connection in autocommit. `with db.transaction():` keeps what it locks until its end."""

    def __init__(self, url: str) -> None:
        # Whoever waits so long for a lock waits for a test that has failed with it.
        waits = "-c lock_timeout=20s"
        self.connection = psycopg.connect(url, autocommit=True, row_factory=dict_row, options=waits)
        self.transaction = self.connection.transaction

    def rows(self, query: str, *values: Any) -> list[Row]:
        return self.connection.execute(query, values or None).fetchall()

    def execute(self, query: str, *values: Any) -> None:
        self.connection.execute(query, values or None)

    def one(self, query: str, *values: Any) -> Any:
        [row] = self.rows(query, *values)
        [value] = row.values()
        return value

    def call(self, function: str, **arguments: Any) -> Any:
        """Call a function by the names of its arguments and return its value (of a void one, the empty string)."""
        return self.one(*_call(function, arguments))

    def call_rows(self, function: str, **arguments: Any) -> list[Row]:
        query, *values = _call(function, arguments)
        return self.rows(query.replace("SELECT ", "SELECT * FROM ", 1), *values)

    def pid(self) -> int:
        return self.connection.info.backend_pid

    def in_background(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Background:
        """Run `work`, which uses this connection, in a thread of its own."""
        return Background(lambda: work(*arguments, **options))


def _call(function: str, arguments: Row) -> list[Any]:
    names = ", ".join(f"{name} => %s" for name in arguments)
    values = [Jsonb(value) if isinstance(value, dict) else value for value in arguments.values()]
    return [f"SELECT {function}({names})", *values]


class Background:
    """Work in a thread, whose answer or error `result` gives."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._answer: Any = None
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._answer = work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def result(self) -> Any:
        self._thread.join(20)  # seconds; a deadlock that Postgres does not see must not hang the tests
        assert not self._thread.is_alive(), "still blocked"
        if self._error is not None:
            raise self._error
        return self._answer

    def is_done(self) -> bool:
        return not self._thread.is_alive()


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """Look until the condition holds. The sleep is only the pace of looking."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.002)
    return value


@dataclass(frozen=True)
class Claim:
    """What a leg holds: its run, its fence, and the message it speaks."""

    run: UUID
    worker: UUID
    leg: UUID
    epoch: int
    message: UUID | None = None


@dataclass(frozen=True)
class Call:
    """What a tool task holds."""

    id: UUID
    attempt: int
    worker: UUID


class World:
    def __init__(self, db: Database) -> None:
        self.db = db

    # --- looks

    def run(self, run: UUID) -> Row:
        [row] = self.db.rows("SELECT * FROM longhaul_runs_run WHERE id = %s", run)
        return row

    def tool_call(self, call: UUID) -> Row:
        [row] = self.db.rows("SELECT * FROM longhaul_tools_toolcall WHERE id = %s", call)
        return row

    def message(self, message: UUID | None) -> Row:
        [row] = self.db.rows("SELECT * FROM longhaul_threads_message WHERE id = %s", message)
        return row

    def messages(self, thread: UUID) -> list[Row]:
        """The thread as a reader sees it: by place."""
        return self.db.rows(
            "SELECT * FROM longhaul_threads_message WHERE thread_id = %s AND position IS NOT NULL ORDER BY position",
            thread,
        )

    def attempts(self, call: UUID) -> list[Row]:
        return self.db.rows("SELECT * FROM longhaul_tools_toolattempt WHERE call_id = %s ORDER BY number", call)

    def legs(self, run: UUID) -> list[Row]:
        return self.db.rows("SELECT * FROM longhaul_runs_leg WHERE run_id = %s ORDER BY number", run)

    def events(self, run: UUID, after: int = 0) -> list[Row]:
        return self.db.rows("SELECT * FROM longhaul_runs_event WHERE run_id = %s AND seq > %s ORDER BY seq", run, after)

    def types(self, run: UUID, after: int = 0) -> list[str]:
        return [event["type"] for event in self.events(run, after)]

    def calls(self, run: UUID) -> list[UUID]:
        query = "SELECT id FROM longhaul_tools_toolcall WHERE run_id = %s ORDER BY step, index"
        return [row["id"] for row in self.db.rows(query, run)]

    def dump(self) -> dict[str, list[str]]:
        """Every row of every table: equal dumps mean that nothing was changed."""
        return {
            table: [row["row"] for row in self.db.rows(f"SELECT to_jsonb(t)::text AS row FROM {table} t ORDER BY 1")]
            for table in TABLES
        }

    # --- what has no function

    def worker(self, name: str = "agents@a", *, silent_for: timedelta = timedelta(), gone: bool = False) -> UUID:
        worker = new_id()
        self.db.execute(
            "INSERT INTO longhaul_tools_worker"
            " (id, name, kind, host, pid, lock_key, started_at, beat_at, draining, gone_at)"
            " VALUES (%s, %s, 'agents', 'here', 1, %s, longhaul_now(), longhaul_now() - %s, false,"
            " CASE WHEN %s THEN longhaul_now() END)",
            worker, name, next(_lock_keys), silent_for, gone,
        )  # fmt: skip
        return worker

    def thread(self) -> UUID:
        thread = new_id()
        self.db.execute(
            "INSERT INTO longhaul_threads_thread (id, agent, title, summary, metadata, overrides, created_at)"
            " VALUES (%s, 'echo', '', '', '{}', '{}', longhaul_now())",
            thread,
        )
        return thread

    def start(
        self, thread: UUID | None = None, *, status: str = "queued", run: UUID | None = None, save_mode: str = "all",
        text: str = "hello",
    ) -> UUID:  # fmt: skip
        """A run with its input, as admission leaves it: queued and sent once, or held."""
        run = run or new_id()
        thread = thread or self.thread()
        held = status == "held"
        self.db.execute(
            "INSERT INTO longhaul_runs_run (id, thread_id, agent, status, stop_reason, origin, depth, busy, priority,"
            " overrides, save_mode, metadata, fingerprint, epoch, dispatch_seq, publishes, next_publish_at, last_seq,"
            " steps, legs, lost, bad_calls, model_tries, input_tokens, output_tokens, cost, created_at, queued_at)"
            " VALUES (%s, %s, 'echo', %s, '', 'start', 0, 'enqueue', 0, '{}', %s, '{}', '', 0, %s, %s,"
            " CASE WHEN %s THEN NULL ELSE longhaul_now() + interval '1 second' END, 0, 0, 0, 0, 0, 0, 0, 0, 0,"
            " longhaul_now(), CASE WHEN %s THEN NULL ELSE longhaul_now() END)",
            run, thread, status, save_mode, 0 if held else 1, 0 if held else 1, held, held,
        )  # fmt: skip
        self.say(thread, text, run=run, waiting=held)
        self.db.call("longhaul_run_record", p_run=run, p_type=f"run.{status}", p_payload={"reason": "start"})
        return run

    def say(self, thread: UUID, text: str, *, run: UUID | None = None, waiting: bool = False) -> UUID:
        """A user's message: with a place or, saved while the thread is busy, waiting for one."""
        message = new_id()
        place = "(SELECT coalesce(max(position), 0) + 1 FROM longhaul_threads_message WHERE thread_id = %s)"
        self.db.execute(
            "INSERT INTO longhaul_threads_message"
            " (id, thread_id, run_id, role, status, position, content, metadata, client_id, shown, created_at)"
            f" VALUES (%s, %s, %s, 'user', %s, CASE WHEN %s THEN NULL ELSE {place} END, %s,"
            " '{}', '', true, longhaul_now())",
            message, thread, run, "waiting" if waiting else "completed", waiting, thread,
            Jsonb([{"type": "text", "text": text}]),
        )  # fmt: skip
        return message

    def ahead(self, by: timedelta) -> None:
        """Move the database's clock."""
        self.db.execute("DELETE FROM longhaul_threads_clock")
        self.db.execute("INSERT INTO longhaul_threads_clock (ahead) VALUES (%s)", by)

    def beat(self, worker: UUID) -> None:
        self.db.execute("UPDATE longhaul_tools_worker SET beat_at = longhaul_now() WHERE id = %s", worker)

    # --- a leg's life

    def claim(self, run: UUID, worker: UUID | None = None, dispatch: int | None = None) -> Claim:
        worker = worker or self.worker()
        leg = new_id()
        answer = self.try_claim(run, worker, dispatch, leg)
        assert answer is not None
        assert "absent" not in answer
        return Claim(run, worker, leg, answer["epoch"])

    def try_claim(self, run: UUID, worker: UUID, dispatch: int | None = None, leg: UUID | None = None) -> Row | None:
        answer: Row | None = self.db.call(
            "longhaul_run_claim", p_run=run, p_dispatch=self.run(run)["dispatch_seq"] if dispatch is None else dispatch,
            p_worker=worker, p_worker_name="agents@a", p_task="task", p_leg=leg or new_id(), p_prepare=PREPARE,
        )  # fmt: skip
        return answer

    def try_turn(self, claim: Claim, message: UUID, **changes: Any) -> Row | None:
        arguments = {
            "p_run": claim.run, "p_epoch": claim.epoch, "p_worker": claim.worker, "p_message": message,
            "p_model_time": MODEL_TIME, "p_after": 0, "p_limit": 100, "p_max_steps": 2_000, "p_max_tokens": 10**9,
            "p_max_cost": Decimal(1000),
        }  # fmt: skip
        answer: Row | None = self.db.call("longhaul_turn_open", **arguments | changes)
        return answer

    def turn(self, claim: Claim, **changes: Any) -> Claim:
        message = new_id()
        answer = self.try_turn(claim, message, **changes)
        assert answer is not None
        assert "limit" not in answer
        return replace(claim, message=message)

    def speak(self, claim: Claim, *texts: str, kind: str = "text.delta", first: int = 1) -> list[Row]:
        return self.write_deltas(claim.worker, [(claim, text, first + i) for i, text in enumerate(texts)], kind)

    def write_deltas(
        self,
        worker: UUID,
        deltas: Sequence[tuple[Claim, str, int]],
        kind: str = "text.delta",
        db: Database | None = None,
    ) -> list[Row]:
        return (db or self.db).call_rows("longhaul_deltas_write", **delta_arguments(worker, deltas, kind))

    def try_commit(
        self, claim: Claim, calls: Sequence[Row] | None = None, end: Row | None = None, linger: timedelta | None = None,
        bad: bool = False, events: Sequence[Any] = (), usage: Row | None = None, window: int | None = None,
        content: Sequence[Row] | None = None,
    ) -> Row | None:  # fmt: skip
        said = [{"type": "text", "text": "said"}] if content is None else list(content)
        step_row = {
            "model": "echo", "instructions": "", "tool_names": [], "schema_digest": "", "options": {}, "context": {},
        }  # fmt: skip
        answer: Row | None = self.db.call(
            "longhaul_step_commit", p_run=claim.run, p_epoch=claim.epoch, p_worker=claim.worker,
            p_message=claim.message, p_leg=claim.leg, p_content=Jsonb(said),
            p_events=Jsonb([
                *events,
                ["message.completed", None, {"message": str(claim.message), "role": "assistant", "content": said}],
            ]),
            p_step_row=step_row, p_usage=usage, p_calls=None if calls is None else Jsonb(list(calls)), p_bad=bad,
            p_end=end, p_linger=timedelta() if linger is None else linger, p_window=window,
        )  # fmt: skip
        return answer

    def commit(self, claim: Claim, calls: Sequence[Row] | None = None, **options: Any) -> Row:
        answer = self.try_commit(claim, calls, **options)
        assert answer is not None
        return answer

    def end(self, claim: Claim) -> Row:
        return self.commit(
            claim, end={"status": "completed", "stop_reason": "end_turn", "output": "said", "error": None}
        )

    def requeue(self, claim: Claim, reason: str = "budget", delay: timedelta = timedelta(), **more: Any) -> Row | None:
        answer: Row | None = self.db.call(
            "longhaul_run_requeue", p_run=claim.run, p_epoch=claim.epoch, p_worker=claim.worker, p_reason=reason,
            p_delay=delay, p_error=more.get("error"), p_usage=more.get("usage"),
        )  # fmt: skip
        return answer

    def finish(self, claim: Claim, status: str = "failed", stop_reason: str = "model_error") -> Row | None:
        answer: Row | None = self.db.call(
            "longhaul_run_finish", p_run=claim.run, p_epoch=claim.epoch, p_worker=claim.worker, p_status=status,
            p_stop_reason=stop_reason, p_error={"code": "server"}, p_output=None,
        )  # fmt: skip
        return answer

    def cancel(self, run: UUID, status: str = "cancelled", stop_reason: str = "cancelled") -> Row | None:
        answer: Row | None = self.db.call(
            "longhaul_run_cancel", p_run=run, p_status=status, p_stop_reason=stop_reason, p_error=None
        )
        return answer

    def reclaim(self, claim: Claim) -> Row | None:
        answer: Row | None = self.db.call(
            "longhaul_run_reclaim", p_run=claim.run, p_epoch=claim.epoch, p_holder=claim.worker, p_poison=POISON
        )
        return answer

    def linger_claim(self, claim: Claim, *, opens: bool = True) -> Row:
        answer: Row = self.db.call("longhaul_linger_claim", **linger_arguments(claim, opens))
        return answer

    def linger_end(self, claim: Claim) -> Row:
        answer: Row = self.db.call("longhaul_linger_end", p_run=claim.run, p_leg=claim.leg, p_reason="tools")
        return answer

    # --- a call's life

    def try_call_claim(
        self, call: UUID, attempt: int | None = None, worker: UUID | None = None, alone: bool = False,
        window: int | None = None,
    ) -> Row | None:  # fmt: skip
        answer: Row | None = self.db.call(
            "longhaul_call_claim", p_call=call, p_worker=worker or self.worker("tools@a"), p_worker_name="tools@a",
            p_attempt=self.tool_call(call)["attempt"] if attempt is None else attempt, p_task="task", p_alone=alone,
            p_window=window,
        )  # fmt: skip
        return answer

    def call_claim(self, call: UUID, worker: UUID | None = None) -> Call:
        worker = worker or self.worker("tools@a")
        answer = self.try_call_claim(call, worker=worker)
        assert answer is not None
        assert "call" in answer
        return Call(call, answer["attempt"], worker)

    def settle(
        self, call: Call, outcome: str = "success", result: Any = None, db: Database | None = None
    ) -> Row | None:
        answer: Row | None = (db or self.db).call("longhaul_call_settle", **settle_arguments(call, outcome, result))
        return answer

    def retry(self, call: Call, delay: timedelta = timedelta()) -> Row | None:
        answer: Row | None = self.db.call(
            "longhaul_call_retry", p_call=call.id, p_attempt=call.attempt, p_worker=call.worker,
            p_error={"code": "exception"}, p_delay=delay,
        )  # fmt: skip
        return answer

    def call_reclaim(self, call: Call, *, began: bool = True) -> Row | None:
        answer: Row | None = self.db.call(
            "longhaul_call_reclaim", p_call=call.id, p_attempt=call.attempt, p_holder=call.worker, p_began=began
        )
        return answer

    def answer(
        self,
        call: UUID,
        outcome: str = "success",
        result: Any = None,
        *,
        among: Sequence[str] = ("unknown",),
        by: str = "7",
    ) -> Row | None:
        """What a person says of a call."""
        error = None if outcome == "success" else {"code": outcome}
        answer: Row | None = self.db.call(
            "longhaul_call_answer", p_call=call, p_from=list(among), p_outcome=outcome, p_result=Jsonb(result),
            p_error=error, p_by=by,
        )  # fmt: skip
        return answer

    def release(self, call: UUID, by: str = "7") -> Row | None:
        answer: Row | None = self.db.call(
            "longhaul_call_release", p_call=call, p_error={"code": "released", "message": "It is not there."}, p_by=by
        )
        return answer

    # --- a run in a state

    def running(self, thread: UUID | None = None) -> Claim:
        return self.turn(self.claim(self.start(thread)))

    def waiting(self, *calls: Row, linger: timedelta | None = None) -> Claim:
        claim = self.running()
        self.commit(claim, calls or [a_call()], linger=linger)
        return claim

    def requires_action(self) -> Claim:
        claim = self.waiting(a_call(idempotent=False))
        [call] = self.calls(claim.run)
        self.call_reclaim(self.call_claim(call))
        return claim

    def in_status(self, status: str) -> UUID:
        """A run in this status. It has its thread to itself, or waits for one that runs."""
        match status:
            case "held":
                thread = self.thread()
                self.claim(self.start(thread))
                return self.start(thread, status="held")
            case "queued":
                return self.start()
            case "running":
                return self.running().run
            case "waiting":
                return self.waiting().run
            case "requires_action":
                return self.requires_action().run
            case "completed":
                claim = self.running()
                self.end(claim)
                return claim.run
            case "failed":
                claim = self.running()
                self.finish(claim)
                return claim.run
            case "cancelled":
                run = self.start()
                self.cancel(run)
                return run
        raise AssertionError(status)

    def call_in_status(self, status: str) -> UUID:
        """A call in this status, of a live run. Those that wait for later issues are put there by hand."""
        claim = self.waiting(a_call(max_attempts=3, **{"idempotent": False} if status == "unknown" else {}))
        [call] = self.calls(claim.run)
        match status:
            case "requested":
                pass
            case "running":
                self.call_claim(call)
            case "retrying":
                self.retry(self.call_claim(call))
            case "unknown":
                self.call_reclaim(self.call_claim(call))
            case "settled":
                self.settle(self.call_claim(call))
            case _:
                self.db.execute("UPDATE longhaul_tools_toolcall SET status = %s WHERE id = %s", status, call)
                self.db.call("longhaul_calls_changed", p_run=claim.run)
        return call


def a_call(index: int = 0, **changes: Any) -> Row:
    """A call as a step's commit hands it over."""
    return {"id": str(new_id()), "index": index, "name": f"tool_{index}", "arguments": {"n": index}} | changes


def settle_arguments(call: Call, outcome: str = "success", result: Any = None) -> Row:
    error = {"code": "exception"} if outcome == "failed" else None
    return {
        "p_call": call.id, "p_attempt": call.attempt, "p_worker": call.worker, "p_outcome": outcome,
        "p_result": Jsonb(result), "p_error": error,
    }  # fmt: skip


def linger_arguments(claim: Claim, opens: bool) -> Row:
    return {
        "p_run": claim.run, "p_leg": claim.leg, "p_worker": claim.worker, "p_prepare": PREPARE, "p_open": opens,
        "p_message": new_id(), "p_model_time": MODEL_TIME, "p_after": 0, "p_limit": 100, "p_max_steps": 2_000,
        "p_max_tokens": 10**9, "p_max_cost": Decimal(1000),
    }  # fmt: skip


def delta_arguments(worker: UUID, deltas: Sequence[tuple[Claim, str, int]], kind: str = "text.delta") -> Row:
    return {
        "p_worker": worker,
        "p_runs": [claim.run for claim, _, _ in deltas],
        "p_epochs": [claim.epoch for claim, _, _ in deltas],
        "p_messages": [claim.message for claim, _, _ in deltas],
        "p_types": [kind for _ in deltas],
        "p_ordinals": [ordinal for _, _, ordinal in deltas],
        "p_payloads": [Jsonb({"message": str(claim.message), "text": text}) for claim, text, _ in deltas],
    }


def violations(db: Database) -> dict[str, list[Any]]:
    """What the rows show of DESIGN.md's invariants: a query a rule, and the runs that break it."""
    return {rule: found for rule, query in _RULES.items() if (found := [row["run"] for row in db.rows(query)])}


_RULES = {
    "seq is contiguous from 1": """
        SELECT r.id AS run FROM longhaul_runs_run r LEFT JOIN longhaul_runs_event e ON e.run_id = r.id GROUP BY r.id
        HAVING count(e.seq) <> r.last_seq OR coalesce(min(e.seq), 1) <> 1 OR coalesce(max(e.seq), 0) <> r.last_seq""",
    "a run ends in exactly one terminal event, the last": """
        SELECT r.id AS run FROM longhaul_runs_run r
        JOIN longhaul_runs_event e ON e.run_id = r.id AND e.type IN ('run.completed', 'run.failed', 'run.cancelled')
        GROUP BY r.id HAVING count(*) <> 1 OR max(e.seq) <> r.last_seq OR max(e.type) <> 'run.' || r.status
        UNION ALL SELECT r.id FROM longhaul_runs_run r WHERE r.status IN ('completed', 'failed', 'cancelled')
        AND NOT EXISTS (SELECT 1 FROM longhaul_runs_event e WHERE e.run_id = r.id AND e.type = 'run.' || r.status)""",
    "a pending message is that of its running run": """
        SELECT m.run_id AS run FROM longhaul_threads_message m JOIN longhaul_runs_run r ON r.id = m.run_id
        WHERE m.status = 'pending' AND (r.status <> 'running' OR r.pending_message_id IS DISTINCT FROM m.id)""",
    "a run's pending message is pending": """
        SELECT r.id AS run FROM longhaul_runs_run r WHERE r.pending_message_id IS NOT NULL AND NOT EXISTS (
            SELECT 1 FROM longhaul_threads_message m WHERE m.id = r.pending_message_id AND m.status = 'pending')""",
    "an open call implies that the run waits": """
        SELECT r.id AS run FROM longhaul_runs_run r JOIN longhaul_tools_toolcall c ON c.run_id = r.id
        WHERE c.status <> 'settled' AND r.status NOT IN ('waiting', 'requires_action')""",
    "a waiting run has an open call": """
        SELECT r.id AS run FROM longhaul_runs_run r WHERE r.status IN ('waiting', 'requires_action') AND NOT EXISTS (
            SELECT 1 FROM longhaul_tools_toolcall c WHERE c.run_id = r.id AND c.status <> 'settled')""",
    "every call is answered, but in the last step of a waiting run": """
        SELECT c.run_id AS run FROM longhaul_tools_toolcall c JOIN longhaul_runs_run r ON r.id = c.run_id
        WHERE (r.status NOT IN ('waiting', 'requires_action') OR c.step <> r.steps) AND 1 <> (
            SELECT count(*) FROM longhaul_threads_message m
            WHERE m.run_id = c.run_id AND m.step = c.step AND m.role = 'tool'
            AND m.content->0->>'tool_call' = c.id::text)""",
    "a leg is open only while it runs or lingers": """
        SELECT l.run_id AS run FROM longhaul_runs_leg l JOIN longhaul_runs_run r ON r.id = l.run_id
        WHERE l.ended_at IS NULL AND r.status <> 'running' AND r.linger_until IS NULL""",
    "a run lingers only while it waits, or was joined meanwhile": """
        SELECT id AS run FROM longhaul_runs_run
        WHERE linger_until IS NOT NULL AND status NOT IN ('waiting', 'requires_action', 'queued')""",
    "no delta after its message's end": """
        SELECT d.run_id AS run FROM longhaul_runs_event d JOIN longhaul_runs_event e
        ON e.run_id = d.run_id AND e.type IN ('message.completed', 'message.discarded') AND e.seq < d.seq
        AND e.payload->>'message' = d.message_id::text WHERE d.type LIKE '%.delta'""",
    "epochs of legs never fall": """
        SELECT run_id AS run FROM (
            SELECT run_id, epoch, max(epoch) OVER (PARTITION BY run_id ORDER BY seq) AS seen
            FROM longhaul_runs_event WHERE epoch IS NOT NULL) e WHERE epoch < seen""",
    "an attempt is open only while its call runs under it": """
        SELECT c.run_id AS run FROM longhaul_tools_toolattempt a JOIN longhaul_tools_toolcall c ON c.id = a.call_id
        WHERE (a.ended_at IS NULL) <> (c.status = 'running' AND c.attempt = a.number)""",
    "a live thread without an occupant holds nobody": """
        SELECT h.id AS run FROM longhaul_runs_run h WHERE h.status = 'held' AND NOT EXISTS (
            SELECT 1 FROM longhaul_runs_run r WHERE r.thread_id = h.thread_id
            AND r.status IN ('queued', 'running', 'waiting', 'requires_action'))""",
    "what is ready is due to be published": """
        SELECT id AS run FROM longhaul_runs_run WHERE status = 'queued' AND (next_publish_at IS NULL) <> (turn IS NOT NULL)
        UNION ALL SELECT run_id FROM longhaul_tools_toolcall
        WHERE status IN ('requested', 'retrying') AND (next_publish_at IS NULL) <> (turn IS NOT NULL)""",
    "what waits for its turn is to be run": """
        SELECT id AS run FROM longhaul_runs_run WHERE turn IS NOT NULL AND (status <> 'queued' OR publishes > 0)
        UNION ALL SELECT run_id FROM longhaul_tools_toolcall
        WHERE turn IS NOT NULL AND (status NOT IN ('requested', 'retrying') OR publishes > 0)""",
}
