"""The only writer of a call's status: its edges as data, and the SQL functions beside it (`sql/`) by name.

Every function here is one round trip and, in autocommit, one commit. What the answers mean stands above the functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from threads import database
from tools import gates, redelivery
from tools.models import CallStatus, Outcome
from tools.results import Kept

NOTHING = Kept(None)

REQUESTED, RUNNING, RETRYING = CallStatus.REQUESTED, CallStatus.RUNNING, CallStatus.RETRYING
AWAITING_APPROVAL, AWAITING_RESULT = CallStatus.AWAITING_APPROVAL, CallStatus.AWAITING_RESULT
AWAITING_CHILD, UNKNOWN, SETTLED = CallStatus.AWAITING_CHILD, CallStatus.UNKNOWN, CallStatus.SETTLED

TRANSITIONS: dict[CallStatus, set[CallStatus]] = {
    REQUESTED: {
        RUNNING,  # claimed by a worker
        SETTLED,  # cancelled, by itself or with its run
    },
    RETRYING: {RUNNING, SETTLED},  # as requested
    RUNNING: {
        SETTLED,  # success, failed, timed out, cancelled, no attempt left, or unknown and the model is told
        RETRYING,  # its policy grants another attempt, or its worker is gone
        UNKNOWN,  # idempotent=False, and its worker is gone
        AWAITING_APPROVAL,  # the tool asks for a person (later)
        AWAITING_RESULT,  # deferred (later)
        AWAITING_CHILD,  # a child run answers it (later)
    },
    AWAITING_APPROVAL: {REQUESTED, SETTLED},
    AWAITING_RESULT: {SETTLED},
    AWAITING_CHILD: {SETTLED},
    UNKNOWN: {
        SETTLED,  # a person, its policy, or the original's late result
        RETRYING,  # on a person's word
    },
    SETTLED: set(),
}


def claim(call_id: UUID, attempt: int, *, worker: UUID, worker_name: str, task_id: str, alone: bool) -> Any:
    """Claim a call by attempt. None: another worker got there first, or the run ended. See longhaul_call_claim."""
    return database.call(
        "SELECT longhaul_call_claim(%s::uuid, %s::int, %s::uuid, %s::text, %s::text, %s::bool, %s::int)",
        (call_id, attempt, worker, worker_name, task_id, alone, gates.window()),
    )


def settle(
    call_id: UUID,
    attempt: int,
    *,
    worker: UUID,
    outcome: Outcome,
    result: Kept = NOTHING,
    error: Mapping[str, Any] | None = None,
) -> Any:
    """Settle a call exactly once. None: somebody else did, or its run ended; nothing changed."""
    apart, contents = _apart(result)
    return database.call(
        f"SELECT longhaul_call_settle(%s::uuid, %s::int, %s::uuid, %s::text, %s::jsonb, %s::jsonb{apart})",
        (
            call_id,
            attempt,
            worker,
            str(outcome),
            None if result.result is None else database.dumps(result.result),
            None if error is None else database.dumps(error),
            *contents,
        ),
    )


def _apart(result: Kept) -> tuple[str, tuple[Any, ...]]:
    """Return what else a settlement is given of a result that does not stand in its call alone, in the same round trip."""
    if result.stored is None:
        return "", ()
    return ", %s::jsonb, %b::bytea[]", (database.dumps(result.stored), list(result.contents))


def retry(call_id: UUID, attempt: int, *, worker: UUID, error: Mapping[str, Any], delay: timedelta) -> Any:
    """Request the call again after `delay`. None as for settle."""
    return database.call(
        "SELECT longhaul_call_retry(%s::uuid, %s::int, %s::uuid, %s::jsonb, %s::interval)",
        (call_id, attempt, worker, database.dumps(error), delay),
    )


def reclaim(call_id: UUID, attempt: int, *, holder: UUID, began: bool = True) -> Any:
    """Take a running call from a holder that is gone. None: it ended, or somebody else took it."""
    return database.call(
        "SELECT longhaul_call_reclaim(%s::uuid, %s::int, %s::uuid, %s::bool)", (call_id, attempt, holder, began)
    )


def answer(
    call_id: UUID,
    outcome: Outcome,
    *,
    among: Sequence[CallStatus],
    result: Kept = NOTHING,
    error: Mapping[str, Any] | None = None,
    by: str | None = None,
) -> Any:
    """Settle an open call for a person. None: it is settled already. {"refused": status}: it is in none of `among`."""
    apart, contents = _apart(result)
    return database.call(
        f"SELECT longhaul_call_answer(%s::uuid, %s::text[], %s::text, %s::jsonb, %s::jsonb, %s::text{apart})",
        (
            call_id,
            [str(each) for each in among],
            str(outcome),
            None if result.result is None else database.dumps(result.result),
            None if error is None else database.dumps(error),
            by,
            *contents,
        ),
    )


def release(call_id: UUID, *, error: Mapping[str, Any], by: str | None = None) -> Any:
    """Request an `unknown` call again, on a person's word. Answers as `answer` does."""
    return database.call(
        "SELECT longhaul_call_release(%s::uuid, %s::jsonb, %s::text)", (call_id, database.dumps(error), by)
    )


def take_from_absent(call_id: UUID) -> Any:
    """Reclaim a call that came back from the broker, when its holder's lock is free: the broker's word was the first look.

    Only a call that may run again at once; any other is left to the watcher. None: there was nothing to take.
    """
    found = redelivery.absent_holder(
        "SELECT attempt, holder, longhaul_worker_locked(holder) FROM longhaul_tools_toolcall"
        " WHERE id = %s AND status = 'running' AND (atomic OR idempotent)",
        call_id,
    )
    return None if found is None else reclaim(call_id, found[0], holder=found[1])


@dataclass(frozen=True, slots=True)
class Due:
    """A call whose message is to be sent now. `agent` is told by `let_out` only."""

    call_id: UUID
    attempt: int
    timeout: timedelta
    queue: str
    name: str
    run_id: UUID
    agent: str = ""


def due(limit: int = 200) -> list[Due]:
    """Return the calls whose message is to be sent now, and raise their next_publish_at."""
    rows = database.rows_of(
        "SELECT call_id, attempt, timeout, queue, name, run_id FROM longhaul_calls_due(%s::int, %s::int)",
        (limit, gates.window()),
    )
    return [Due(*row) for row in rows]


def let_out() -> list[Due]:
    """Return the calls that waited for their turn and are to be sent now. In autocommit, never within a transition.

    Empty too when another process is at it: it, or the watcher, lets out what is left.
    """
    rows = database.rows_of(
        "SELECT call_id, attempt, timeout, queue, name, run_id, agent FROM longhaul_calls_release(%s::int)",
        (gates.window(),),
    )
    return [Due(*row) for row in rows]
