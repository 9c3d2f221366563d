"""One attempt at one call, from its claim to its settlement.

User code runs with no transaction open, but for an atomic tool: its body and its settlement are ONE transaction, the run's
lock taken last. The settlement is repeated until it is answered; a crash between the body and the settlement is what
`idempotent` is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from celery.exceptions import SoftTimeLimitExceeded
from django.db import DatabaseError, InterfaceError, OperationalError, connection, transaction

from threads import database, logs
from threads.redaction import redact
from tools import interrupts, lifecycle, run_log
from tools.context import ToolContext
from tools.exceptions import InvalidArguments, InvalidResult, Problem, ToolError, ToolNotAvailable, WorkerLeaving
from tools.layers import call_within
from tools.lifecycle import NOTHING
from tools.models import Outcome, ToolCall
from tools.presence import Presence
from tools.registry import Tool
from tools.results import Kept, cut, limits
from tools.retry import RetryPolicy
from tools.schema import storable_text

logger = logging.getLogger("longhaul.tools")

P = ParamSpec("P")
R = TypeVar("R")

PROGRESS = "tool_call.progress"
PROGRESS_SECONDS = 1.0
# When what offers a tool is asked again, after the database did not answer. How often is said by the tool's own policy.
ASKED_AGAIN = RetryPolicy(attempts=1_000_000)
# Of a tool that starts at most once, and did not come to its end.
NOBODY_KNOWS = (
    " Whether it has taken effect is not known. Do not call it again for the same purpose unless you have made sure that it"
    " has not."
)
# An author may have put one into the text for the model.
_TRACE = "Traceback (most recent call last):"


class SettlementLost(Exception):
    """Somebody else settled this call, or its run has ended: an atomic body is rolled back."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """What the claim of a call answered."""

    call_id: UUID
    run_id: UUID
    attempt: int
    attempt_id: UUID
    worker: UUID
    answer: Mapping[str, Any]
    leaving: Callable[[], bool] = lambda: False  # whether its worker shuts down

    @property
    def name(self) -> str:
        return str(self.answer["name"])


def execute(call_id: UUID, attempt: int, *, presence: Presence, task_id: str = "", alone: bool = False) -> None:
    """Claim the call by attempt, run its tool and settle it. A doubled or late message does nothing.

    `alone`: this process runs one call at a time (prefork), so whatever else names it is lost and given back first.
    """
    interrupted = interrupts.delivered(prefork=alone) if presence.interrupts else contextlib.nullcontext()
    with interrupted, presence.register.entry("call", call_id) as registered:
        claimed = _claim(call_id, attempt, presence=presence, task_id=task_id, alone=alone)
        if claimed is None:
            return
        registered(claimed.attempt)
        # No bell: the readers know of the call since its step, and look once a second.
        answer = claimed.answer
        with logs.context(
            run=claimed.run_id,
            tool_call=call_id,
            attempt=attempt,
            agent=answer["agent"],
            tool=claimed.name,
            thread=answer["thread"],
        ):
            logger.info("Call %s of %s claimed", call_id, claimed.name, extra={"action": "call.claimed"})
            _run(claimed)


def _run(claimed: Claimed) -> None:
    try:
        tool = run_log.current().tool(claimed.answer)
        arguments = tool.validate(claimed.answer["arguments"])
    except ToolError as error:
        _settle(claimed, Outcome.FAILED, error=described_error(error))
        return
    except (OperationalError, InterfaceError) as error:  # no fault of what offers the tool: it is asked again
        logger.warning("Call %s: what offers %s could not be asked", claimed.call_id, claimed.name, exc_info=error)
        left = claimed.attempt < claimed.answer["max_attempts"]
        told = ToolNotAvailable(f"{claimed.name} is not available: the database did not answer.")
        return _again(claimed, described_error(told), ASKED_AGAIN.delay(claimed.attempt) if left else None)
    except Exception as error:  # a validator of the user's own
        logger.warning("The arguments of call %s could not be checked", claimed.call_id, exc_info=error)
        refused = InvalidArguments(claimed.name, [{"path": "", "message": f"not checked: {type(error).__name__}"}])
        _settle(claimed, Outcome.FAILED, error=described_error(refused))
        return
    if tool.atomic:
        _execute_atomic(claimed, tool, arguments)
    else:
        _execute(claimed, tool, arguments)


def _claim(call_id: UUID, attempt: int, *, presence: Presence, task_id: str, alone: bool) -> Claimed | None:
    while True:
        worker = presence.id
        answer = lifecycle.claim(
            call_id, attempt, worker=worker, worker_name=presence.name, task_id=task_id, alone=alone
        )
        if answer is None:
            return None  # another worker got there first, or the run ended
        if answer.get("absent"):
            logger.warning("Call %s is left to others: this worker has not beaten", call_id)
            return None
        if not answer.get("orphans"):
            if answer.get("parked"):
                run_log.current().announce({"parked": True})
            return Claimed(
                call_id=call_id,
                run_id=UUID(answer["run"]),
                attempt=attempt,
                attempt_id=UUID(answer["attempt_id"]),
                worker=worker,
                answer=answer,
                leaving=lambda: presence.draining,
            )
        for orphan, number in answer["orphans"]:  # lost in this process: an answer that never came
            began = not presence.register.unbegun("call", UUID(orphan), number)
            given_back = lifecycle.reclaim(UUID(orphan), number, holder=worker, began=began)
            presence.register.forget("call", UUID(orphan), number)
            if given_back is not None:
                run_log.current().announce(given_back)


def _execute(claimed: Claimed, tool: Tool, arguments: dict[str, Any]) -> None:
    try:
        result = tool.keep(_call(claimed, tool, arguments), claimed.call_id)
    # An async tool has its loop for itself, so what cancels it comes from within: an error like others.
    except (Exception, asyncio.CancelledError) as error:
        _after_error(claimed, tool, error)
    else:
        _settle(claimed, Outcome.SUCCESS, result=result)


def _execute_atomic(claimed: Claimed, tool: Tool, arguments: dict[str, Any]) -> None:
    """Body and settlement in one transaction: the effect is there exactly when the settlement is.

    What the body tells the run's readers is written just before the settlement, for it takes the run's lock: held
    from then to a slow body's end, it would stop whoever wants to change the run.
    """
    told: list[tuple[str, dict[str, Any]]] = []
    try:
        with transaction.atomic():
            # By this name a later attempt ends this backend, should it outlive its worker with rows locked.
            database.rows_of("SELECT set_config('application_name', %s, true)", (f"longhaul {claimed.attempt_id}",))
            result = tool.keep(_call(claimed, tool, arguments, told), claimed.call_id)
            for type, payload in told:
                _write(claimed, type, payload)
            answer = _settled_within(claimed, tool, result)
            if answer is None:
                raise SettlementLost
    except SettlementLost:
        # As after a cancel: no fault of anybody's.
        logger.info(
            "Call %s attempt %s came too late; its effect is rolled back",
            claimed.call_id,
            claimed.attempt,
            extra={"action": "call.late"},
        )
    except (OperationalError, InterfaceError) as error:
        # Whether COMMIT took effect is unknown. Never run again from here: ask for another attempt under the same
        # guard, which finds the call settled when the commit did take effect.
        _after_error(claimed, tool, error)
    except Exception as error:
        _after_error(claimed, tool, error)
    else:
        _say(claimed, "settled", Outcome.SUCCESS)
        run_log.current().announce(answer)


def _settled_within(claimed: Claimed, tool: Tool, result: Kept) -> Any:
    """Settle in the body's transaction. Raises InvalidResult for a result that Postgres does not take: all is rolled back."""
    try:
        return lifecycle.settle(
            claimed.call_id, claimed.attempt, worker=claimed.worker, outcome=Outcome.SUCCESS, result=result
        )
    except DatabaseError as error:
        if database.refused(error):
            raise tool.lost("the database refuses it.") from error
        raise


def _call(
    claimed: Claimed, tool: Tool, arguments: dict[str, Any], told: list[tuple[str, dict[str, Any]]] | None = None
) -> Any:
    around = (*run_log.current().hooks(claimed.answer), *tool.hooks)
    if not around and tool.context_parameter is not None:
        arguments[tool.context_parameter] = context_of(claimed, told)
    seconds = claimed.answer.get("seconds")
    gives_back = tool.on_deploy == "give_back"
    with (
        database.transactions_kept(),
        interrupts.body(claimed.call_id, claimed.attempt, seconds, gives_back=gives_back) as body,
    ):
        try:
            if around:
                return call_within(around, tool, arguments, context_of(claimed, told), body)
            if tool.is_async:
                return asyncio.run(body.bounded(tool.function(**arguments)))
            return tool.function(**arguments)
        except (Exception, asyncio.CancelledError) as error:
            if body.reason is None or isinstance(error, (ToolError, SoftTimeLimitExceeded)):
                raise
            raise body.error() from error  # what it raised while it cleaned up is no error to be tried again


def _after_error(claimed: Claimed, tool: Tool, error: BaseException) -> None:
    """Settle as failed, or ask for another attempt, as the error's class and the tool's policy say."""
    if isinstance(error, SoftTimeLimitExceeded):
        late = "The tool did not finish in time." + (NOBODY_KNOWS if tool.idempotent is False else "")
        return _settle(claimed, Outcome.FAILED, error={"code": "timed_out", "message": late})
    if isinstance(error, WorkerLeaving) and tool.idempotent is not False:
        return _until_answered(
            claimed,
            lambda: lifecycle.reclaim(claimed.call_id, claimed.attempt, holder=claimed.worker, began=False),
            "given back",
        )
    if isinstance(error, ToolError):
        if isinstance(error, InvalidResult):  # only here stands what a serializer of the user's raised
            logger.warning("The result of call %s cannot be JSON", claimed.call_id, exc_info=error)
        return _settle(claimed, Outcome.FAILED, error=described_error(error))
    logger.warning(
        "Tool %s, call %s, attempt %s failed", claimed.name, claimed.call_id, claimed.attempt, exc_info=error
    )
    # The class only: the text of a foreign exception may carry what neither model nor log may see.
    described = {"code": "error", "message": f"The tool failed with {type(error).__name__}."}
    # One that was given back is none of the policy's attempts: its call may have one more for each.
    given_back = max(claimed.answer["max_attempts"] - tool.retry.attempts, 0)
    tried = max(claimed.attempt - given_back, 1)
    delay = tool.retry.delay(tried, error) if claimed.attempt < claimed.answer["max_attempts"] else None
    _again(claimed, described, delay)


def _again(claimed: Claimed, error: Mapping[str, Any], delay: timedelta | None) -> None:
    """Ask for another attempt after `delay`; None: there is none, and the call has failed."""
    if delay is None:
        return _settle(claimed, Outcome.FAILED, error=error)
    _until_answered(
        claimed,
        lambda: lifecycle.retry(claimed.call_id, claimed.attempt, worker=claimed.worker, error=error, delay=delay),
        "retried",
    )


def described_error(error: ToolError) -> dict[str, str]:
    """Return what a call keeps of an error, without secrets.

    The name of an argument is no part of what is looked through: of `password: Field required` a secret would be seen in
    the second word, and the model would not learn what to mend.
    """
    if isinstance(error, InvalidArguments):
        problems = [Problem(path=each["path"], message=redact(each["message"])) for each in error.problems]
        return {"code": error.code, "message": _bounded(str(InvalidArguments(error.tool, problems)))}
    # Cut when it is masked: half of a secret would not be known.
    return {"code": error.code, "message": _bounded(redact(storable_text(_without_trace(str(error)))))}


def _without_trace(text: str) -> str:
    """Return the text as far as it says something to others than programmers: up to a traceback, and its last line."""
    said, found, trace = text.partition(_TRACE)
    if not found:
        return text
    return "\n".join(each for each in (said.strip(), trace.strip().rpartition("\n")[2].strip()) if each)


def _bounded(text: str) -> str:
    return cut(storable_text(text), limits().chars)


def _settle(
    claimed: Claimed, outcome: Outcome, *, result: Kept = NOTHING, error: Mapping[str, Any] | None = None
) -> None:
    _until_answered(
        claimed,
        lambda: lifecycle.settle(
            claimed.call_id, claimed.attempt, worker=claimed.worker, outcome=outcome, result=result, error=error
        ),
        "settled",
        outcome,
    )


def _until_answered(claimed: Claimed, transition: Callable[[], Any], what: str, outcome: Outcome | None = None) -> None:
    """Repeat a guarded transition until Postgres answers: a result must not be lost to an outage."""
    pause = 0.05
    while True:
        try:
            answer = transition()
        except DatabaseError as error:
            if database.refused(error):
                # What nobody has foreseen of a result: say so instead.
                logger.warning("Call %s: its result cannot be stored", claimed.call_id, exc_info=error)
                refused = InvalidResult(
                    "The tool ran, and what it does is done, but its result is lost: the database refuses it."
                )
                return _settle(claimed, Outcome.FAILED, error=described_error(refused))
            if connection.in_atomic_block:
                raise
            logger.warning("Call %s: its settlement was not answered, trying again", claimed.call_id, exc_info=error)
            connection.close()
            time.sleep(pause)
            pause = min(pause * 2, 5.0)
        else:
            break
    if answer is None:
        logger.info(
            "Call %s attempt %s came too late; nothing was changed",
            claimed.call_id,
            claimed.attempt,
            extra={"action": "call.late"},
        )
    else:
        _say(claimed, what, outcome)
        run_log.current().announce(answer)


def _say(claimed: Claimed, what: str, outcome: Outcome | None) -> None:
    logger.info(
        "Call %s %s%s",
        claimed.call_id,
        what,
        f" ({outcome.value})" if outcome else "",
        extra={"action": f"call.{what}", "outcome": outcome},
    )


def _write(claimed: Claimed, type: str, payload: Mapping[str, Any]) -> bool:
    """Lock the live run and append an event to it; progress goes to the call's row too. False when the run has ended."""
    if not run_log.current().record(claimed.run_id, type, payload):
        return False
    if type == PROGRESS:
        database.rows_of(
            "UPDATE longhaul_tools_toolcall SET progress = jsonb_build_object('fraction', %s::float, 'note', %s::text,"
            " 'attempt', attempt, 'at', to_char(longhaul_now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'))"
            " WHERE id = %s AND attempt = %s AND status IN ('running', 'unknown') RETURNING 1",
            (payload["fraction"], payload["note"], claimed.call_id, claimed.attempt),
        )
    return True


def context_of(claimed: Claimed, told: list[tuple[str, dict[str, Any]]] | None = None) -> ToolContext:
    """Build what the tool is handed. Rows are read only when it asks for them.

    With a list `told`, what the tool tells the run's readers is put there, to be written later.
    """
    answer = claimed.answer
    log = run_log.current()

    def wanted() -> bool:
        """Whether this attempt may settle the call: also one whose worker was taken for dead, while nobody knows of it."""
        still = ToolCall.objects.filter(pk=claimed.call_id, attempt=claimed.attempt, status__in=("running", "unknown"))
        return still.exists()

    def tell(type: str, payload: dict[str, Any]) -> None:
        if told is not None:
            told.append((type, payload))
            return
        with transaction.atomic():
            # Looked at under the run's lock, which whoever takes or settles the call needs: after that it says nothing more.
            if not (_write(claimed, type, payload) and wanted()):
                transaction.set_rollback(True)

    thread_id = UUID(answer["thread"])
    last = [0.0]

    def report(fraction: float | None, note: str) -> None:
        moment = time.monotonic()
        if fraction != 1.0 and moment - last[0] < PROGRESS_SECONDS:
            return  # at most one a second: each takes the run's lock
        last[0] = moment
        tell(
            PROGRESS,
            {
                "tool_call": str(claimed.call_id),
                "name": claimed.name,
                "message": answer["message"],
                "fraction": fraction,
                "note": note,
            },
        )

    def emit(data: Any) -> None:
        tell("data", {"data": data})

    def owner() -> Any:
        from django.contrib.auth import get_user_model

        return get_user_model()._default_manager.filter(pk=answer["owner"]).first() if answer["owner"] else None

    return ToolContext(
        tool_call=ToolCall(
            id=claimed.call_id,
            run_id=claimed.run_id,
            message_id=answer["message"],
            step=answer["step"],
            name=claimed.name,
            arguments=answer["arguments"],
            attempt=claimed.attempt,
            status="running",
            idempotency_key=answer["idempotency_key"],
            atomic=answer["atomic"],
            timeout=timedelta(0),
        ),
        attempt=claimed.attempt,
        idempotency_key=answer["idempotency_key"],
        deadline=datetime.fromisoformat(answer["timeout_at"]),
        run_id=claimed.run_id,
        thread_id=thread_id,
        owner_id=answer["owner"],
        load_run=_beside_a_loop(lambda: log.run(claimed.run_id)),
        load_thread=_beside_a_loop(lambda: log.thread(thread_id)),
        load_owner=_beside_a_loop(owner),
        report_progress=_beside_a_loop(report),
        emit_data=_beside_a_loop(emit),
        check_cancelled=_beside_a_loop(lambda: not wanted()),
        check_stopping=claimed.leaving,
    )


def _beside_a_loop(work: Callable[P, R]) -> Callable[P, R]:
    """Let an async tool call this too, on its worker's own connection.

    Django refuses database work wherever a loop runs, for it would block what else the loop serves. The loop of an
    async tool serves its call alone.
    """

    @functools.wraps(work)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        loop = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        try:
            return work(*args, **kwargs)
        finally:
            asyncio._set_running_loop(loop)

    return call
