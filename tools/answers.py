"""What people say about a call: its result, that it failed, that it may run again, that it is not wanted any more.

Each is a transition under the run's lock, exactly once: whoever comes second, or late, is told so and has changed nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from django.db import transaction

from threads.content import clean
from threads.exceptions import BadInput
from tools import lifecycle, run_log
from tools.exceptions import AlreadySettled, NotAwaited
from tools.models import CallStatus, Outcome, ToolCall
from tools.results import keep

logger = logging.getLogger("longhaul.tools")

ANSWERED: Sequence[CallStatus] = (CallStatus.UNKNOWN,)
OPEN: Sequence[CallStatus] = tuple(each for each in CallStatus if each != CallStatus.SETTLED)


def succeed(call: ToolCall, result: Any = None, *, by: Any = None) -> ToolCall:
    """Settle an `unknown` call with the result that a person knows. Raises AlreadySettled, NotAwaited, BadInput."""
    try:
        kept = keep(result, call.pk)
    except TypeError as error:
        raise BadInput(f"The result cannot be kept: {error}", attr="result") from error
    return _said(call, "settled", lambda: lifecycle.answer(
        call.pk, Outcome.SUCCESS, among=ANSWERED, result=kept, by=_name(by)
    ))  # fmt: skip


def fail(call: ToolCall, message: str, *, retryable: bool = False, by: Any = None) -> ToolCall:
    """Settle an `unknown` call as failed; or, `retryable`, run it again. Raises as `succeed` does."""
    told = clean(message)
    if not told.strip():
        raise BadInput("Say in the message what happened: the model reads it.", attr="message")
    if retryable:
        error = {"code": "released", "message": told}
        return _said(call, "released", lambda: lifecycle.release(call.pk, error=error, by=_name(by)))
    error = {"code": "tool_failed", "message": told}
    return _said(call, "settled", lambda: lifecycle.answer(
        call.pk, Outcome.FAILED, among=ANSWERED, error=error, by=_name(by)
    ))  # fmt: skip


def cancel(call: ToolCall, reason: str = "", *, by: Any = None) -> ToolCall:
    """Settle any open call as cancelled; its run goes on. A settled one stays as it is."""
    error = {"code": "cancelled", "message": clean(reason) or "The call was cancelled."}
    try:
        return _said(call, "cancelled", lambda: lifecycle.answer(
            call.pk, Outcome.CANCELLED, among=OPEN, error=error, by=_name(by)
        ))  # fmt: skip
    except AlreadySettled:
        return call


def _said(call: ToolCall, what: str, transition: Any) -> ToolCall:
    with transaction.atomic():
        answer = transition()
        refused = answer.get("refused") if answer is not None else None
        if answer is not None and refused is None:
            told = {"action": f"call.{what}", "run": call.run_id, "tool_call": call.pk}

            def after_commit() -> None:
                logger.info("Call %s %s by a person", call.pk, what, extra=told)
                run_log.current().announce(answer)

            transaction.on_commit(after_commit)
    call.refresh_from_db()
    if answer is None:
        raise AlreadySettled(f"The call is settled already ({call.outcome}). Nothing was changed.")
    if refused is not None:
        raise NotAwaited(f"The call waits for no answer: it is {refused}. Nothing was changed.")
    return call


def _name(user: Any) -> str | None:
    return None if user is None else str(user.pk)
