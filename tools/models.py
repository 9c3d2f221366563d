"""Tool calls, their attempts, and the worker processes that are present."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.conf import settings
from django.db import models

from threads.clock import Now
from threads.ids import new_id
from threads.indexes import Gin

if TYPE_CHECKING:
    from tools.results import File


class CallStatus(models.TextChoices):
    REQUESTED = "requested"
    AWAITING_APPROVAL = "awaiting_approval"
    RUNNING = "running"
    RETRYING = "retrying"  # `requested` from the second attempt on
    AWAITING_RESULT = "awaiting_result"
    AWAITING_CHILD = "awaiting_child"
    UNKNOWN = (
        "unknown"  # idempotent=False, and its worker died: open until a person, a policy or a late result settles it
    )
    SETTLED = "settled"


class Outcome(models.TextChoices):
    SUCCESS = "success"
    FAILED = "failed"
    DENIED = "denied"
    CANCELLED = "cancelled"


class ToolCall(models.Model):
    """The model's request to run a tool. Only `tools.lifecycle` and `tools/sql` write its status.

    `attempt` is raised by whoever makes the call requested again; `holder` is the worker's life (`Worker.id`).
    """

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    run_id = models.UUIDField()
    message_id = models.UUIDField()
    step = models.IntegerField()
    index = models.IntegerField()
    name = models.CharField(max_length=200)
    arguments = models.JSONField(default=dict)
    status = models.CharField(max_length=20, choices=CallStatus.choices, default=CallStatus.REQUESTED)
    outcome = models.CharField(max_length=16, choices=Outcome.choices, blank=True, default="")
    result = models.JSONField(null=True)  # as the model reads it: what is too large, and files, are in `contents`
    # What of its result stands apart: [{"number", "name", "content_type", "size"}], as StoredContent has it; None: nothing.
    stored = models.JSONField(null=True)
    error = models.JSONField(null=True)
    attempt = models.IntegerField(default=1)
    max_attempts = models.IntegerField(default=1)
    idempotency_key = models.CharField(max_length=100)
    idempotent = models.BooleanField(null=True)
    atomic = models.BooleanField(default=False)
    # What becomes of an idempotent=False call whose worker died: ask (it is `unknown`), tell_model, fail.
    on_unknown = models.CharField(max_length=10, default="ask", db_default="ask")
    deferred = models.BooleanField(default=False)
    timeout = models.DurationField()
    queue = models.CharField(max_length=200, blank=True, default="")  # "" is the tools queue
    holder = models.UUIDField(null=True)
    claimed_at = models.DateTimeField(null=True)
    timeout_at = models.DateTimeField(null=True)
    not_before = models.DateTimeField(null=True)
    next_publish_at = models.DateTimeField(null=True)
    publishes = models.IntegerField(default=0)
    # What bounds how many like it run at once, or start in a time: {key: {"most", "count", "seconds"}}; None: nothing does.
    gates = models.JSONField(null=True)
    priority = models.SmallIntegerField(default=0, db_default=0)  # its run's
    turn_of = models.CharField(
        max_length=100, blank=True, default="", db_default=""
    )  # the owner who takes turns with others
    # Those with the same queue and gates; by its bytes, so that the lanes of a queue are a range.
    lane = models.CharField(max_length=1000, blank=True, default="", db_default="", db_collation="C")
    turn = models.BigIntegerField(null=True)  # its place among those that wait to be sent; None: it waits for nobody
    deadline = models.DateTimeField(null=True)
    assignee = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="longhaul_assigned_calls",
        db_index=False,
    )
    progress = models.JSONField(null=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    settled_at = models.DateTimeField(null=True)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["run_id", "step", "index"], name="longhaul_one_call_a_place"),
            models.CheckConstraint(
                condition=models.Q(status="settled") ^ models.Q(outcome=""),
                name="longhaul_a_settled_call_has_an_outcome",
            ),
            models.CheckConstraint(
                condition=models.Q(status="running", holder__isnull=False) | ~models.Q(status="running"),
                name="longhaul_a_running_call_has_a_holder",
            ),
            models.CheckConstraint(
                condition=~models.Q(atomic=True, idempotent__isnull=False), name="longhaul_atomic_excludes_idempotent"
            ),
        ]
        indexes: ClassVar = [
            models.Index(
                fields=["next_publish_at"],
                name="longhaul_call_due",
                condition=models.Q(status__in=["requested", "retrying"]),
            ),
            models.Index(
                fields=["lane", "-priority", "turn", "id"],
                name="longhaul_call_in_lane",
                condition=models.Q(turn__isnull=False),
            ),
            models.Index(
                fields=["turn_of", "lane", "priority", "-turn"],
                name="longhaul_call_turn_of",
                condition=models.Q(turn__isnull=False),
            ),
            Gin(
                fields=["gates"],
                name="longhaul_call_gated",
                condition=models.Q(
                    gates__isnull=False, turn__isnull=True, status__in=["requested", "retrying", "running"]
                ),
            ),
            models.Index(fields=["holder"], name="longhaul_call_held", condition=models.Q(status="running")),
            models.Index(
                fields=["id"],
                name="longhaul_call_needs_a_person",
                condition=models.Q(status__in=["awaiting_approval", "awaiting_result", "unknown"]),
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} {self.id}"

    def succeed(self, result: Any = None, *, by: Any = None) -> ToolCall:
        """Settle an `unknown` call with its result, for a person who knows it; `by` is that user. Returns the call as it is now.

        Raises AlreadySettled when somebody was first (nothing was changed), NotAwaited when it waits for no answer,
        BadInput for what is no JSON.
        """
        from tools import answers

        return answers.succeed(self, result, by=by)

    def fail(self, message: str, *, retryable: bool = False, by: Any = None) -> ToolCall:
        """Settle an `unknown` call as failed: the model reads the message. `retryable`: run it again, on this person's word.

        Returns the call as it is now. Raises as `succeed` does.
        """
        from tools import answers

        return answers.fail(self, message, retryable=retryable, by=by)

    def cancel(self, reason: str = "", *, by: Any = None) -> ToolCall:
        """Settle the call as cancelled, whatever it waits for; its run goes on. One that is settled stays as it is.

        A tool that runs is told by `is_cancelled()`; what it returns is refused. Returns the call as it is now.
        """
        from tools import answers

        return answers.cancel(self, reason, by=by)

    def content(self, number: int = 0) -> File:
        """Return what the tool returned, whole: 0 is the whole result, or the file that is all of it; files in it count from 1.

        Raises LookupError when there is none of that number, and for a call without a result.
        """
        from tools import results

        return results.content(self, number)


class ToolAttempt(models.Model):
    """One claim of a call: inserted by the claim, closed by whoever ends the attempt."""

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    # Written beside an update of its call: a constraint would cost a look-up and show nothing.
    call = models.ForeignKey(
        ToolCall, on_delete=models.CASCADE, related_name="attempts", db_index=False, db_constraint=False
    )
    number = models.IntegerField()
    worker_id = models.UUIDField()
    # Its worker's name: the row of that life may be removed before this one.
    worker = models.CharField(max_length=200, blank=True, default="", db_default="")
    task_id = models.CharField(max_length=100, blank=True, default="")
    started_at = models.DateTimeField(db_default=Now())
    ended_at = models.DateTimeField(null=True)
    outcome = models.CharField(
        max_length=20, blank=True, default=""
    )  # an Outcome, or retrying, lost, given_back, released
    error = models.JSONField(null=True)
    retry_at = models.DateTimeField(null=True)  # of one that is tried again: when the next one may begin
    backend_pid = models.IntegerField(null=True)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["call", "number"], name="longhaul_one_claim_an_attempt"),
        ]

    def __str__(self) -> str:
        return f"attempt {self.number} of {self.call_id}"


class StoredContent(models.Model):
    """What of a call's result stands apart: number 0 is the whole of one that was cut, or the file that is all of it.

    Files within a result count from 1. Written by the settlement, in its transaction, and deleted with the call.
    """

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    # Written beside an update of its call, as an attempt is.
    call = models.ForeignKey(
        ToolCall, on_delete=models.CASCADE, related_name="contents", db_index=False, db_constraint=False
    )
    number = models.IntegerField()
    name = models.CharField(max_length=200)
    content_type = models.CharField(max_length=200)
    size = models.BigIntegerField()  # bytes
    content = models.BinaryField()
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["call", "number"], name="longhaul_one_content_a_number"),
        ]

    def __str__(self) -> str:
        return f"content {self.number} of {self.call_id}"


class Approval(models.Model):
    """A person's decision on a call (written by a later issue)."""

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    call = models.OneToOneField(ToolCall, on_delete=models.CASCADE, related_name="approval")
    decided_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="longhaul_approvals"
    )
    approved = models.BooleanField(null=True)
    note = models.TextField(blank=True, default="")
    arguments = models.JSONField(null=True)
    created_at = models.DateTimeField(db_default=Now())
    decided_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"approval of {self.call_id}"


class Worker(models.Model):
    """One life of one worker process. It holds the session advisory lock `lock_key` and beats every 2 s.

    A prefork child names its parent, which beats for it. `gone_at` is set when the process left or was found dead:
    a process that finds it set begins a new life under a new row.
    """

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    name = models.CharField(max_length=200)
    kind = models.CharField(max_length=16)
    host = models.CharField(max_length=200)
    pid = models.IntegerField()
    # The first life of the parent's process. No constraint: a parent that begins anew leaves its children where they are.
    parent = models.ForeignKey(
        "self", on_delete=models.CASCADE, null=True, related_name="children", db_constraint=False
    )
    lock_key = models.BigIntegerField(unique=True, null=True)  # None behind a pooler without sessions: only beats count
    started_at = models.DateTimeField(db_default=Now())
    beat_at = models.DateTimeField(db_default=Now())
    draining = models.BooleanField(default=False)
    gone_at = models.DateTimeField(null=True)

    class Meta:
        indexes: ClassVar = [
            models.Index(fields=["beat_at"], name="longhaul_worker_present", condition=models.Q(gone_at__isnull=True))
        ]

    def __str__(self) -> str:
        return self.name


class RateUse(models.Model):
    """What was used of a rate: one start, or so many tokens. Rows older than the rate's time are removed."""

    id = models.BigAutoField(primary_key=True)
    key = models.CharField(max_length=300)  # "tool:refund", "model:openai:gpt-5-mini", ...
    at = models.DateTimeField()
    amount = models.BigIntegerField(default=1, db_default=1)

    class Meta:
        indexes: ClassVar = [models.Index(fields=["key", "at"], name="longhaul_rate_used")]

    def __str__(self) -> str:
        return f"{self.amount} of {self.key}"


class Pause(models.Model):
    """Until when nothing of this key starts, for the other side has said so (`Retry-After`)."""

    key = models.CharField(max_length=300, primary_key=True)
    until = models.DateTimeField()
    reason = models.CharField(max_length=200, blank=True, default="")

    def __str__(self) -> str:
        return f"{self.key} until {self.until}"
