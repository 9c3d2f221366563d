"""The only writer of a run's status: its edges as data, and the SQL functions beside it (`sql/`) by name.

Every function here is one round trip and, in autocommit, one commit. What the answers mean stands above the functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from runs.conf import settings
from runs.exceptions import FenceLost
from runs.models import Status, StopReason
from threads import database

HELD, QUEUED, RUNNING, WAITING = Status.HELD, Status.QUEUED, Status.RUNNING, Status.WAITING
REQUIRES_ACTION = Status.REQUIRES_ACTION
COMPLETED, FAILED, CANCELLED = Status.COMPLETED, Status.FAILED, Status.CANCELLED

TRANSITIONS: dict[Status, set[Status]] = {
    HELD: {
        QUEUED,  # the run before it ended
        CANCELLED,
        FAILED,  # its deadline passed
    },
    QUEUED: {
        RUNNING,  # claimed by dispatch_seq
        CANCELLED,
        FAILED,  # its deadline passed
    },
    RUNNING: {
        QUEUED,  # budget, limited, retry, drained, or lost
        WAITING,  # a step with tool calls
        COMPLETED,  # end of turn, or max_steps
        FAILED,  # a limit, the model, the configuration, poison
        CANCELLED,
    },
    WAITING: {
        QUEUED,  # the last call was settled: joined
        REQUIRES_ACTION,  # every open call waits for a person or an outside system
        CANCELLED,
        FAILED,  # its deadline passed
    },
    REQUIRES_ACTION: {QUEUED, WAITING, CANCELLED, FAILED},
    COMPLETED: set(),
    FAILED: set(),
    CANCELLED: set(),
}


def claim(run_id: UUID, dispatch_seq: int, *, worker: UUID, worker_name: str, task_id: str, leg: UUID) -> Any:
    """queued -> running. None: another worker got there first, or it is not due."""
    return database.call(
        "SELECT longhaul_run_claim(%s::uuid, %s::int, %s::uuid, %s::text, %s::text, %s::uuid, %s::interval)",
        (run_id, dispatch_seq, worker, worker_name, task_id, leg, settings().prepare_timeout),
    )


def _fenced(answer: Any) -> Any:
    if answer is None:
        raise FenceLost
    return answer


def open_turn(run_id: UUID, epoch: int, worker: UUID, turn: Sequence[Any], ask: str | None = None) -> Any:
    """A step boundary. `turn` is `engine.Opening`'s row, `ask` what `Quota.ask` gave. Raises FenceLost."""
    return _fenced(
        database.call(
            "SELECT longhaul_turn_open(%s::uuid, %s::int, %s::uuid, %s::uuid, %s::interval, %s::bigint, %s::int,"
            " %s::int, %s::bigint, %s::numeric, %s::jsonb)",
            (run_id, epoch, worker, *turn, ask),
        )
    )


def claim_lingering(
    run_id: UUID, leg: UUID, worker: UUID, *, opens: bool, turn: Sequence[Any], ask: str | None = None
) -> Any:
    """The leg that lingered looks, and claims when the join has queued its run."""
    return database.call(
        "SELECT longhaul_linger_claim(%s::uuid, %s::uuid, %s::uuid, %s::interval, %s::bool, %s::uuid, %s::interval,"
        " %s::bigint, %s::int, %s::int, %s::bigint, %s::numeric, %s::jsonb)",
        (run_id, leg, worker, settings().prepare_timeout, opens, *turn, ask),
    )


def end_lingering(run_id: UUID, leg: UUID, reason: str) -> Any:
    """The lingerer gives up. Returns what is to be published, if the join came meanwhile."""
    return database.call("SELECT longhaul_linger_end(%s::uuid, %s::uuid, %s::text)", (run_id, leg, reason))


def commit_step(
    run_id: UUID,
    epoch: int,
    worker: UUID,
    *,
    message: UUID,
    leg: UUID,
    content: Any,
    events: Any,
    step: Any,
    usage: Any,
    calls: Any,
    bad: bool,
    end: Any,
    linger: timedelta,
) -> Any:
    """Commit a step. Raises FenceLost."""
    return _fenced(
        database.call(
            "SELECT longhaul_step_commit(%s::uuid, %s::int, %s::uuid, %s::uuid, %s::uuid, %s::jsonb, %s::jsonb,"
            " %s::jsonb, %s::jsonb, %s::jsonb, %s::bool, %s::jsonb, %s::interval, %s::int)",
            (
                run_id,
                epoch,
                worker,
                message,
                leg,
                database.dumps(content),
                database.dumps(events),
                database.dumps(step),
                None if usage is None else database.dumps(usage),
                None if not calls else database.dumps(calls),
                bad,
                None if end is None else database.dumps(end),
                linger,
                settings().max_dispatched_calls,
            ),
        )
    )


def requeue(
    run_id: UUID,
    epoch: int,
    worker: UUID,
    reason: str,
    *,
    delay: timedelta = timedelta(0),
    error: Mapping[str, Any] | None = None,
    usage: Mapping[str, Any] | None = None,
) -> Any:
    """running -> queued by the leg itself: budget, limited, retry, drained. Raises FenceLost."""
    return _fenced(
        database.call(
            "SELECT longhaul_run_requeue(%s::uuid, %s::int, %s::uuid, %s::text, %s::interval, %s::jsonb, %s::jsonb)",
            (
                run_id,
                epoch,
                worker,
                reason,
                delay,
                None if error is None else database.dumps(error),
                None if usage is None else database.dumps(usage),
            ),
        )
    )


def finish(
    run_id: UUID,
    epoch: int,
    worker: UUID,
    status: Status,
    stop_reason: StopReason,
    *,
    error: Mapping[str, Any] | None = None,
    output: Any = None,
    usage: Mapping[str, Any] | None = None,
) -> Any:
    """running -> its end, outside of a step's commit. Raises FenceLost."""
    return _fenced(
        database.call(
            "SELECT longhaul_run_finish("
            "%s::uuid, %s::int, %s::uuid, %s::text, %s::text, %s::jsonb, %s::jsonb, %s::jsonb)",
            (
                run_id,
                epoch,
                worker,
                str(status),
                str(stop_reason),
                None if error is None else database.dumps(error),
                None if output is None else database.dumps(output),
                None if usage is None else database.dumps(usage),
            ),
        )
    )


def cancel(
    run_id: UUID,
    stop_reason: StopReason = StopReason.CANCELLED,
    *,
    status: Status = CANCELLED,
    error: Mapping[str, Any] | None = None,
    by: UUID | None = None,
) -> Any:
    """Any live run -> cancelled (or failed, by a deadline). None: it had ended, and is as it was.

    by: the run that takes its place in the thread. The caller inserts it in the same transaction.
    """
    return database.call(
        "SELECT longhaul_run_cancel(%s::uuid, %s::text, %s::text, %s::jsonb, %s::uuid)",
        (run_id, str(status), str(stop_reason), None if error is None else database.dumps(error), by),
    )


def reclaim(run_id: UUID, epoch: int, holder: UUID) -> Any:
    """running -> queued without its leg (or failed as poison). None: it ended, or somebody else took it."""
    return database.call(
        "SELECT longhaul_run_reclaim(%s::uuid, %s::int, %s::uuid, %s::int)",
        (run_id, epoch, holder, settings().poison_limit),
    )


def record(run_id: UUID, type: str, payload: Mapping[str, Any]) -> None:
    """Append an event. The caller holds the run, in a transaction."""
    database.call("SELECT longhaul_run_record(%s::uuid, %s::text, %s::jsonb)", (run_id, type, database.dumps(payload)))


def enter(run_id: UUID, at: datetime, events: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    """Write the first events of a run, from seq 1 on, in the transaction that inserts it with so many in `last_seq`.

    Returns `{"out": bool, "release": bool}`: whether it goes out now, or waits for its turn; and whether to `release` then.
    """
    return database.call(
        "SELECT longhaul_run_enter(%s::uuid, %s::timestamptz, %s::jsonb)", (run_id, at, database.dumps(events))
    )


def due(limit: int = 200) -> list[tuple[UUID, int, str]]:
    """Return (run, dispatch_seq, agent) of the queued runs whose message is to be sent now; raises their next_publish_at."""
    rows = database.rows_of("SELECT run_id, dispatch_seq, agent FROM longhaul_runs_due(%s::int)", (limit,))
    return [(row[0], row[1], row[2]) for row in rows]


def release() -> list[tuple[UUID, int, str]]:
    """Return (run, dispatch_seq, agent) of the runs whose turn has come: they are to be sent now. Never in a transition."""
    rows = database.rows_of(
        "SELECT run_id, dispatch_seq, agent FROM longhaul_runs_release(%s::int)", (settings().max_dispatched,)
    )
    return [(row[0], row[1], row[2]) for row in rows]


UNLIMITED_TOKENS = 2**62
UNLIMITED_COST = Decimal("1e12")
