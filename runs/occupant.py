"""What a start does to the run that occupies its thread, other than wait for it: steer it, or take its place.

Each is one transaction, under the lock of that run. `steer` saves the input as waiting messages of the live run, which takes
them in at its next step boundary. `replace` cancels the live run for another one, which the caller inserts: what it has said
stays (interrupt), or is taken out of later context (rollback).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from runs import lifecycle
from runs.conf import settings
from runs.exceptions import IdempotencyConflict, NothingToDo, TooManyHeld
from runs.models import OCCUPYING, Run, StopReason
from threads.models import IdempotencyKey, Message, MessageStatus, Thread
from tools.models import ToolCall

REPLACES = {"interrupt": StopReason.INTERRUPTED, "rollback": StopReason.ROLLED_BACK}
# How an attempt ended that has done nothing: a person said so. One that was given back may have begun: its tool may do that itself.
HARMLESS = {"released"}


def of(thread: Thread) -> Run:
    """Return the run that occupies the thread. The caller holds it."""
    return Run.objects.get(thread=thread, status__in=OCCUPYING)


def steer(thread: Thread, drafts: Sequence[Message], message: Message | None, *, key: tuple[Any, str, str]) -> Run:
    """Save the input for the run that occupies the thread, and return that run. The caller holds it, in a transaction.

    key: owner, idempotency key ("": none) and fingerprint of the request. Raises IntegrityError for a key that is in use.
    """
    live = of(thread)
    if message is not None and (known := steered_with(message)):
        return known
    if message is None and not drafts:
        raise NothingToDo(f"Run {live.pk} occupies the thread, and there is no input to steer it with.")
    waiting = Message.objects.filter(thread=thread, run_id=live.pk, status=MessageStatus.WAITING).count()
    if waiting + len(drafts) > settings().max_held:
        raise TooManyHeld(f"{waiting} messages wait for run {live.pk} already. Try again when it has taken them in.")
    for draft in drafts:
        draft.run_id = live.pk
        draft.status = MessageStatus.WAITING
        draft.shown = draft.shown and live.save_mode != "none"
    Message.objects.bulk_create(drafts)
    if message is not None:
        # One that has its place already was shown to the live run at a boundary, or will be at its next.
        Message.objects.filter(pk=message.pk, status=MessageStatus.WAITING).update(run_id=live.pk)
        return live  # the message itself is the key
    owner_id, name, fingerprint = key
    if name:
        IdempotencyKey.objects.create(
            owner_id=owner_id, key=_key(name), fingerprint=fingerprint, answer={"message": str(drafts[-1].pk)}
        )
    return live


def steered_with(message: Message) -> Run | None:
    """Return the run that a saved message was given to already."""
    given = Message.objects.filter(pk=message.pk, run_id__isnull=False).values_list("run_id", flat=True)
    return Run.objects.filter(pk__in=given).first()


def steered(key: tuple[Any, str, str]) -> Run | None:
    """Return the run that has, or takes in, what was said with this key. Raises IdempotencyConflict."""
    owner_id, name, fingerprint = key
    known = IdempotencyKey.objects.filter(owner_id=owner_id, key=_key(name)).first()
    if known is None:
        return None
    if known.fingerprint != fingerprint or known.answer is None:
        raise IdempotencyConflict(f"The idempotency key {name!r} was used for another request. Use a new key.")
    said = Message.objects.filter(pk=known.answer["message"]).values_list("run_id", flat=True)
    return Run.objects.filter(pk__in=said).first()


def _key(name: str) -> str:
    """The name of a key beside those of HTTP requests, and no longer than they may be."""
    return "steer:" + hashlib.sha256(name.encode()).hexdigest()


def replace(live: Run, by: UUID, busy: str) -> tuple[Any, list[Message]]:
    """Cancel the run that occupies the thread; the caller inserts the run `by` in its place, in this transaction.

    Returns the answer that is to be announced, and the messages that steered the old run and were not taken in: they are
    the new run's, and have no place yet. Those of a run that is rolled back are taken back with it.
    """
    answer = lifecycle.cancel(live.pk, REPLACES[busy], by=by)
    if answer is None:
        raise AssertionError(f"run {live.pk} has ended, though it was held")
    left = Message.objects.filter(thread=live.thread_id, run_id=by, status=MessageStatus.WAITING)
    return answer, list(left.order_by("created_at", "id"))


def effects(run: Run) -> list[dict[str, Any]]:
    """Return the calls of a run whose effect is there (`effect: taken`) or may be (`possible`), in their order.

    `{"id", "name", "arguments", "outcome", "effect"}`. Left out are calls that never began, those that a person said did
    nothing, and atomic ones that were not settled: what they wrote is not there.
    """
    found = []
    for call in ToolCall.objects.filter(run_id=run.pk).order_by("step", "index").prefetch_related("attempts"):
        taken = call.outcome == "success"
        began = any(attempt.outcome not in HARMLESS for attempt in call.attempts.all())
        if taken or (began and not call.atomic):
            effect = "taken" if taken else "possible"
            found.append(
                {
                    "id": str(call.pk),
                    "name": call.name,
                    "arguments": call.arguments,
                    "outcome": call.outcome,
                    "effect": effect,
                }
            )
    return found


def rolled_back(run: Run) -> dict[str, Any] | None:
    """Return what a run with busy="rollback" has taken back, `{"run": id, "tool_calls": [...]}`: see `effects`."""
    if run.busy != "rollback" or run.parent_id is None or run.origin != "start":
        return None
    before = Run.objects.filter(pk=run.parent_id, stop_reason=StopReason.ROLLED_BACK).first()
    return None if before is None else {"run": str(before.pk), "tool_calls": effects(before)}
