"""The only writer of messages, beside the SQL functions of a run.

Who gives out a place in a thread holds the lock of the run that occupies it or, when none does, the thread's row. Which
runs there are is not known here: `runs` installs what locks the occupying run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from django.db import transaction
from django.db.models import Max

from threads.content import parts_of
from threads.exceptions import BadInput
from threads.models import Message, MessageStatus, Role, Thread

ROLES = {Role.USER, Role.SYSTEM, Role.ASSISTANT}
FIELDS = {"role", "content", "metadata", "client_id"}

# Says whether a run occupies a thread, and locks it (for the rest of the transaction) when asked to. `runs` sets it.
occupied: Callable[[UUID, bool], bool] = lambda thread_id, lock: False  # noqa: E731
# Cancels the live runs of a thread that is about to be deleted. `runs` sets it.
vacate: Callable[[UUID], None] = lambda thread_id: None  # noqa: E731


def save_messages(thread: Thread, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Save messages `{role, content, metadata?, client_id?}` in order, all or none, and run nothing.

    While a run occupies the thread they wait, and are appended at its next step boundary or its end, never between a
    call and its result. Raises BadInput.
    """
    drafts = [draft(thread, message) for message in messages]
    with transaction.atomic():
        if lock_occupant(thread.pk):
            for message in drafts:
                message.status = MessageStatus.WAITING
        else:
            place(thread.pk, drafts)
        return Message.objects.bulk_create(drafts)


def draft(thread: Thread, message: Mapping[str, Any]) -> Message:
    """Return an unsaved, placeless message. Raises BadInput."""
    if unknown := set(message) - FIELDS:
        raise BadInput(f"A message has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(FIELDS))}.")
    role = message.get("role", Role.USER)
    if role not in ROLES:
        raise BadInput(f"role must be one of {', '.join(sorted(ROLES))}; it is {role!r}.")
    return Message(
        thread=thread,
        role=role,
        content=parts_of(message.get("content")),
        metadata=dict(message.get("metadata") or {}),
        client_id=message.get("client_id") or "",
    )


def place(thread_id: UUID, messages: Sequence[Message]) -> None:
    """Give the messages the next places. The caller holds the occupying run, or the thread's row."""
    last = Message.objects.filter(thread_id=thread_id).aggregate(last=Max("position"))["last"] or 0
    for number, message in enumerate(messages, start=last + 1):
        message.position = number


def lock_occupant(thread_id: UUID) -> bool:
    """Lock the run that occupies the thread and return True, or lock the thread's row and return False.

    Runs come before threads in the lock order, so a run that shows up after the thread was locked means: begin again.
    Must be called in a transaction. Raises BadInput when the thread is gone.
    """
    while True:
        if occupied(thread_id, True):
            return True
        with transaction.atomic():  # its savepoint gives the thread's lock back
            if not Thread.objects.select_for_update(no_key=True).filter(pk=thread_id).exists():
                raise BadInput(f"There is no thread {thread_id}.")
            if not occupied(thread_id, False):
                return False
            transaction.set_rollback(True)
