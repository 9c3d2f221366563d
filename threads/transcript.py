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

from threads import database
from threads.content import OF_RUNS, clean, parts_of, plain
from threads.exceptions import BadInput, PartOfAStep, ThreadBusy, ThreadGone, within
from threads.models import Message, MessageStatus, Role, Thread

ROLES = {Role.USER, Role.SYSTEM, Role.ASSISTANT}
LONGEST_NAME = 200
BATCH = 1000  # rows a statement, which takes 65,535 parameters
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
    saved = drafts(thread, messages)
    with transaction.atomic():
        if lock_occupant(thread.pk):
            for message in saved:
                message.status = MessageStatus.WAITING
        else:
            place(thread.pk, saved)
        return Message.objects.bulk_create(saved, batch_size=BATCH)


def drafts(thread: Thread, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return unsaved, placeless messages. Raises BadInput."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise BadInput("messages must be a list of dicts like {'role': 'user', 'content': '...'}.")
    found = []
    for place, message in enumerate(messages):
        with within(str(place)):
            found.append(draft(thread, message))
    return found


def draft(thread: Thread, message: Mapping[str, Any]) -> Message:
    """Return an unsaved, placeless message. Raises BadInput."""
    if not isinstance(message, Mapping):
        raise BadInput("A message must be a dict like {'role': 'user', 'content': '...'}.")
    if unknown := set(message) - FIELDS:
        raise BadInput(f"A message has no {', '.join(sorted(map(str, unknown)))}; it has {', '.join(sorted(FIELDS))}.")
    role = message.get("role", Role.USER)
    if not isinstance(role, str) or role not in ROLES:
        raise BadInput(f"role must be one of {', '.join(sorted(ROLES))}; it is {role!r}.", attr="role")
    with within("content"):
        content = parts_of(message.get("content"))
    return Message(
        thread=thread,
        role=role,
        content=content,
        metadata=metadata_of(message.get("metadata")),
        client_id=name_of(message.get("client_id"), "client_id"),
    )


def metadata_of(given: object) -> dict[str, Any]:
    """Return metadata as it is stored. Raises BadInput."""
    if given is not None and not isinstance(given, Mapping):
        raise BadInput("metadata must be a dict.", attr="metadata")
    with within("metadata"):
        metadata: dict[str, Any] = plain(dict(given or {}), "metadata")
    return metadata


def name_of(given: object, field: str) -> str:
    """Return a name that a client gave, "" for none. Raises BadInput."""
    if given is not None and not isinstance(given, str):
        raise BadInput(f"{field} must be a string.", attr=field)
    name = clean(given or "")
    if len(name) > LONGEST_NAME:
        raise BadInput(f"{field} has at most {LONGEST_NAME} characters.", attr=field)
    return name


def delete_message(message: Message) -> None:
    """Delete a message for good. Raises ThreadBusy while a run occupies the thread, PartOfAStep for a call or its result.

    A message that waits for a place has not been shown to any run; one that belongs to a held run goes with it.
    """
    with transaction.atomic():
        occupied = lock_occupant(message.thread_id)
        current = Message.objects.filter(pk=message.pk).first()
        if current is None:
            return
        if occupied and (current.position is not None or current.run_id is not None):
            raise ThreadBusy("A run occupies the thread of this message. Wait for its end, or cancel it.")
        if any(part.get("type") in OF_RUNS for part in current.content):
            raise PartOfAStep
        current.delete()


def place(thread_id: UUID, messages: Sequence[Message], *, last: int | None = None) -> None:
    """Give the messages the next places. The caller holds the occupying run, or the thread's row.

    last: the place of the thread's last message, for who knows it: 0 in a new thread.
    """
    if last is None:
        last = Message.objects.filter(thread_id=thread_id).aggregate(last=Max("position"))["last"] or 0
    for number, message in enumerate(messages, start=last + 1):
        message.position = number


def supersede(message: Message) -> None:
    """Let later context leave the message out: it stays where it stands. The caller holds the thread's row, or its occupant."""
    message.status = MessageStatus.SUPERSEDED
    message.save(update_fields=["status"])


def copy(thread_id: UUID, to: UUID, *, until: int, own: UUID) -> dict[UUID, UUID]:
    """Copy what the run `own` was shown of a thread, up to the place `until`, to an empty one, in one statement.

    The copies are nobody's: no run, no step, places from 1, shown to every run. Returns old id -> new id of what the user
    or the system said to that run: its input.
    """
    rows = database.rows_of(
        """
        WITH source AS (
            SELECT id AS old, longhaul_uuid7() AS new, row_number() OVER (ORDER BY position) AS place, role, status, content,
                   metadata, client_id, created_at,
                   coalesce(run_id = %(own)s::uuid AND step IS NULL, false) AND role IN ('user', 'system') AS input
            FROM longhaul_threads_message
            WHERE thread_id = %(thread)s::uuid AND position <= %(until)s::bigint AND status IN ('completed', 'partial')
              AND (shown OR run_id = %(own)s::uuid)),
        copied AS (
            INSERT INTO longhaul_threads_message (
                id, thread_id, role, status, position, content, metadata, client_id, shown, created_at)
            SELECT new, %(to)s::uuid, role, status, place, content, metadata, client_id, true, created_at FROM source)
        SELECT old, new FROM source WHERE input
        """,
        {"thread": thread_id, "to": to, "until": until, "own": own},
    )
    return dict(rows)


def lock_occupant(thread_id: UUID) -> bool:
    """Lock the run that occupies the thread and return True, or lock the thread's row and return False.

    Runs come before threads in the lock order, so a run that shows up after the thread was locked means: begin again.
    Must be called in a transaction. Raises ThreadGone.
    """
    while True:
        if occupied(thread_id, True):
            return True
        with transaction.atomic():  # its savepoint gives the thread's lock back
            if not Thread.objects.select_for_update(no_key=True).filter(pk=thread_id).exists():
                raise ThreadGone(f"There is no thread {thread_id}.")
            if not occupied(thread_id, False):
                return False
            transaction.set_rollback(True)
