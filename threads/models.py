"""Conversations, and who may touch them. The lowest floor: imports nothing of ours.

`run_id` on a message is a plain UUID, for runs stand above threads; `runs` deletes its messages with the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from django.conf import settings
from django.db import models, transaction

from threads.clock import Now
from threads.exceptions import BadInput
from threads.ids import new_id


class Clock(models.Model):
    """At most one row: how far `longhaul_now()` is ahead. Only the test plugin writes it."""

    ahead = models.DurationField()

    class Meta:
        verbose_name_plural = "clock"

    def __str__(self) -> str:
        return f"ahead by {self.ahead}"


class Thread(models.Model):
    """A conversation. What its runs may override stands in `overrides`: model, instructions, tools, limits, context."""

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="longhaul_threads",
        db_index=False,
    )
    agent = models.CharField(max_length=200, blank=True, default="")
    title = models.CharField(max_length=500, blank=True, default="")
    summary = models.TextField(blank=True, default="")
    metadata = models.JSONField(default=dict, blank=True)
    overrides = models.JSONField(default=dict, blank=True)
    archived_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        indexes: ClassVar = [models.Index(fields=["owner", "id"], name="longhaul_thread_of_owner")]

    def __str__(self) -> str:
        return self.title or str(self.id)

    def save(self, *args: Any, role: str | None = None, content: Any = None, **options: Any) -> Any:
        """Save the row or, with `role` and `content`, a message into the thread: runs nothing, returns the message.

        See `threads.transcript.save_messages` for its options (`metadata`, `client_id`).
        """
        if role is None:
            return super().save(*args, **options)
        return self.save_many([{"role": role, "content": content, **options}])[0]

    def delete(self, *args: Any, **options: Any) -> tuple[int, dict[str, int]]:
        """Cancel the thread's live runs, then delete it with all that hangs on it."""
        from threads import transcript

        with transaction.atomic():
            try:
                # The run that occupies the thread, or the thread itself: none starts between here and the end.
                transcript.lock_occupant(self.pk)
            except BadInput:
                pass  # it is gone already
            transcript.vacate(self.pk)
            return super().delete(*args, **options)

    def save_many(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """Save several messages at once, in order, atomically; runs nothing."""
        from threads import transcript

        return transcript.save_messages(self, messages)


class Role(models.TextChoices):
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    SYSTEM = "system"


class MessageStatus(models.TextChoices):
    WAITING = "waiting"  # accepted, no place in the thread yet
    PENDING = "pending"  # the model is speaking it, only while its run is running under its epoch
    COMPLETED = "completed"
    PARTIAL = "partial"  # cut by a cancel; its text is kept, its calls are dropped
    DISCARDED = "discarded"
    SUPERSEDED = "superseded"
    ROLLED_BACK = "rolled_back"


class Message(models.Model):
    """One entry of a thread. `content` is a list of parts (`threads.content`).

    `position` orders a thread. It is given out under the lock of the run that occupies the thread or, when none does,
    of the thread's row; a waiting message has none. `shown` says whether later runs see it (a run sees its own always).
    """

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    thread = models.ForeignKey(Thread, on_delete=models.CASCADE, related_name="messages", db_index=False)
    run_id = models.UUIDField(null=True, blank=True)
    step = models.IntegerField(null=True, blank=True)
    role = models.CharField(max_length=16, choices=Role.choices)
    status = models.CharField(max_length=16, choices=MessageStatus.choices, default=MessageStatus.COMPLETED)
    position = models.BigIntegerField(null=True, blank=True)
    content = models.JSONField(default=list, blank=True)
    metadata = models.JSONField(default=dict, blank=True)
    client_id = models.CharField(max_length=200, blank=True, default="")
    shown = models.BooleanField(default=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["thread", "position"], name="longhaul_one_message_a_position"),
            models.CheckConstraint(
                condition=models.Q(status="waiting", position__isnull=True) | ~models.Q(status="waiting"),
                name="longhaul_a_waiting_message_has_no_place",
            ),
        ]
        indexes: ClassVar = [
            models.Index(
                fields=["run_id", "step"], name="longhaul_message_of_run", condition=models.Q(run_id__isnull=False)
            ),
            models.Index(
                # not by status: an update of an indexed column, or of a predicate's, is never a cheap (HOT) one
                fields=["thread"],
                name="longhaul_message_waiting",
                condition=models.Q(position__isnull=True),
            ),
        ]

    def __str__(self) -> str:
        return f"{self.role} message {self.id}"

    @property
    def text(self) -> str:
        """The message's text parts, joined."""
        return "".join(part.get("text", "") for part in self.content if part.get("type") == "text")


class ApiKey(models.Model):
    """A key of the HTTP API. Only its SHA-256 is stored; the key itself is shown once."""

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="longhaul_api_keys")
    name = models.CharField(max_length=200, blank=True, default="")
    prefix = models.CharField(max_length=16)
    digest = models.CharField(max_length=64, unique=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        verbose_name = "API key"

    def __str__(self) -> str:
        return f"{self.name or 'key'} {self.prefix}..."


class IdempotencyKey(models.Model):
    """A creating request that was answered: the same key and body get the same answer again."""

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, null=True, related_name="longhaul_idempotency_keys"
    )
    key = models.CharField(max_length=200)
    fingerprint = models.CharField(max_length=64)
    status = models.SmallIntegerField(null=True)
    answer = models.JSONField(null=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["owner", "key"], nulls_distinct=False, name="longhaul_one_answer_an_idempotency_key"
            )
        ]

    def __str__(self) -> str:
        return self.key
