"""Runs, their legs, steps and events. `runs.lifecycle` and `runs/sql` are the only writers of a run's status."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

import orjson
from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import models

from threads.clock import Now
from threads.ids import new_id
from threads.indexes import Gin
from threads.models import Message, Thread

if TYPE_CHECKING:
    from runs.events import RunEvent


class Status(models.TextChoices):
    HELD = "held"
    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    REQUIRES_ACTION = "requires_action"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


OCCUPYING = (Status.QUEUED, Status.RUNNING, Status.WAITING, Status.REQUIRES_ACTION)
LIVE = (Status.HELD, *OCCUPYING)
TERMINAL = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


# Events of a run that one transaction of the housekeeping removes. A longer log takes several, so the mark of a log of which only
# a part was removed is never less: the index of the runs that have a log yet builds on that.
REMOVED_AT_ONCE = 100_000


class StopReason(models.TextChoices):
    END_TURN = "end_turn"
    MAX_STEPS = "max_steps"
    TOKEN_BUDGET = "token_budget"  # noqa: S105 (a reason to stop, not a secret)
    COST_BUDGET = "cost_budget"
    DEADLINE = "deadline"
    MODEL_ERROR = "model_error"
    POISON = "poison"
    TOOL_UNKNOWN = "tool_unknown"
    CONFIGURATION = "configuration"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    ROLLED_BACK = "rolled_back"
    THREAD_DELETED = "thread_deleted"
    PARENT_ENDED = "parent_ended"


class Run(models.Model):
    """One execution of an agent over a thread.

    `epoch` rises with every claim and reclaim, `holder` is the claiming worker's life (`tools.Worker.id`): together
    they are the fence. `dispatch_seq` rises whenever the run becomes queued; a task's message carries it.
    `steps` and `legs` count; `lost` counts reclaims since the last committed step.
    """

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    thread = models.ForeignKey(Thread, on_delete=models.CASCADE, related_name="runs", db_index=False)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="longhaul_runs",
        db_index=False,
    )
    agent = models.CharField(max_length=200)
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.QUEUED)
    stop_reason = models.CharField(max_length=16, choices=StopReason.choices, blank=True, default="")
    origin = models.CharField(max_length=16, default="start")  # start, resume, retry, fork, steer, child, handoff
    parent = models.ForeignKey("self", on_delete=models.SET_NULL, null=True, related_name="children", db_index=False)
    parent_call_id = models.UUIDField(null=True)
    depth = models.SmallIntegerField(default=0)
    busy = models.CharField(max_length=16, default="enqueue")
    priority = models.SmallIntegerField(default=0)
    overrides = models.JSONField(default=dict, blank=True)  # model, instructions, tools, limits, context, ...
    save_mode = models.CharField(max_length=20, default="prompt_and_output")
    metadata = models.JSONField(default=dict, blank=True)
    input_message_id = models.UUIDField(null=True)
    idempotency_key = models.CharField(max_length=200, null=True)
    fingerprint = models.CharField(max_length=64, blank=True, default="")
    # the claim
    epoch = models.IntegerField(default=0)
    holder = models.UUIDField(null=True)
    dispatch_seq = models.IntegerField(default=0)
    pending_message_id = models.UUIDField(null=True)
    pending_ordinal = models.IntegerField(default=0, db_default=0)  # of its last delta that is a row
    leg_deadline = models.DateTimeField(null=True)
    linger_until = models.DateTimeField(null=True)
    # dispatch
    not_before = models.DateTimeField(null=True)
    next_publish_at = models.DateTimeField(null=True)
    publishes = models.IntegerField(default=0)
    gates = models.JSONField(null=True)  # as of a ToolCall, and so the next two; a lane begins with the run's own queue
    lane = models.CharField(max_length=1000, blank=True, default="", db_default="")
    turn = models.BigIntegerField(null=True)
    max_dispatched = models.IntegerField(
        default=100, db_default=100
    )  # of its queue, as the settings said when it was made
    # counters
    last_seq = models.BigIntegerField(default=0)
    # What became of the event log after the end: events up to here were removed by a retention setting (0: none), and since
    # when a finished message's deltas stand as one.
    events_removed_through = models.BigIntegerField(default=0, db_default=0)
    compacted_at = models.DateTimeField(null=True)
    steps = models.IntegerField(default=0)
    legs = models.IntegerField(default=0)
    lost = models.IntegerField(default=0)
    bad_calls = models.IntegerField(default=0)  # steps in a row in which the model made only bad calls
    model_tries = models.IntegerField(default=0)
    retry_since = models.DateTimeField(null=True)
    input_tokens = models.BigIntegerField(default=0)
    output_tokens = models.BigIntegerField(default=0)
    cost = models.DecimalField(max_digits=18, decimal_places=9, default=0)
    # the end
    output = models.JSONField(null=True)
    error = models.JSONField(null=True)
    deadline = models.DateTimeField(null=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    # Since when it stands in its thread: not while it is held. The order of a thread's runs: a held one may be overtaken.
    entered_at = models.DateTimeField(null=True, db_default=Now())
    queued_at = models.DateTimeField(null=True)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    class Meta:
        permissions: ClassVar = [("cancel_run", "Can cancel run")]
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["thread"],
                condition=models.Q(status__in=["queued", "running", "waiting", "requires_action"]),
                name="longhaul_one_run_occupies_a_thread",
            ),
            models.UniqueConstraint(
                fields=["owner", "idempotency_key"],
                nulls_distinct=False,
                condition=models.Q(idempotency_key__isnull=False),
                name="longhaul_one_run_an_idempotency_key",
            ),
            models.UniqueConstraint(
                fields=["parent_call_id"],
                condition=models.Q(parent_call_id__isnull=False),
                name="longhaul_one_child_a_call",
            ),
            models.CheckConstraint(
                condition=models.Q(status="running", holder__isnull=False)
                | (~models.Q(status="running") & models.Q(holder__isnull=True)),
                name="longhaul_only_a_running_run_has_a_holder",
            ),
            models.CheckConstraint(
                condition=models.Q(status="running") | models.Q(pending_message_id__isnull=True),
                name="longhaul_only_a_running_run_has_a_pending_message",
            ),
            models.CheckConstraint(
                condition=models.Q(status__in=["completed", "failed", "cancelled"]) ^ models.Q(stop_reason=""),
                name="longhaul_an_ended_run_has_a_stop_reason",
            ),
        ]
        indexes: ClassVar = [
            models.Index(fields=["owner", "id"], name="longhaul_run_of_owner"),
            models.Index(fields=["thread", "id"], name="longhaul_run_of_thread"),
            models.Index(fields=["thread", "entered_at", "id"], name="longhaul_run_in_thread"),
            # The runs that follow one, and what its deletion sets free.
            models.Index(fields=["parent"], name="longhaul_run_of_parent", condition=models.Q(parent__isnull=False)),
            models.Index(
                fields=["status", "id"],
                name="longhaul_run_not_completed",
                condition=models.Q(status__in=["failed", "cancelled"]),
            ),
            models.Index(fields=["next_publish_at"], name="longhaul_run_due", condition=models.Q(status="queued")),
            models.Index(fields=["holder"], name="longhaul_run_running", condition=models.Q(status="running")),
            models.Index(
                fields=["lane", "-priority", "turn", "id"],
                name="longhaul_run_in_lane",
                condition=models.Q(turn__isnull=False),
            ),
            models.Index(
                fields=["lane", "owner", "priority", "turn"],
                name="longhaul_run_turn_of_owner",
                condition=models.Q(turn__isnull=False),
            ),
            Gin(
                fields=["gates"],
                name="longhaul_run_gated",
                condition=models.Q(gates__isnull=False, status__in=["queued", "running", "waiting", "requires_action"]),
            ),
            # Which logs are due to be removed. Not by last_seq: it rises with each event, and that must stay a cheap (HOT) update.
            models.Index(
                fields=["finished_at"],
                name="longhaul_run_with_log",
                condition=models.Q(finished_at__isnull=False)
                & (models.Q(events_removed_through=0) | models.Q(events_removed_through__gte=REMOVED_AT_ONCE)),
            ),
            models.Index(
                fields=["finished_at"],
                name="longhaul_run_to_compact",
                condition=models.Q(finished_at__isnull=False, compacted_at__isnull=True),
            ),
            models.Index(fields=["thread", "id"], name="longhaul_run_held", condition=models.Q(status="held")),
            models.Index(
                fields=["deadline"],
                name="longhaul_run_deadline",
                condition=models.Q(
                    deadline__isnull=False, status__in=["held", "queued", "running", "waiting", "requires_action"]
                ),
            ),
        ]

    def __str__(self) -> str:
        return f"{self.agent} {self.id}"

    @property
    def finished(self) -> bool:
        return self.status in TERMINAL

    def wait(self, timeout_seconds: float = 30) -> Self:
        """Wait until the run has ended, at most so long; returns it as it is then (see `finished`)."""
        from runs import events

        events.wait(self.pk, timeout_seconds)
        self.refresh_from_db()
        return self

    async def await_finished(self, timeout_seconds: float = 30) -> Self:
        """`wait`, from async code."""
        return await sync_to_async(self.wait)(timeout_seconds)

    def events(self, after: int = 0, follow: bool = False) -> Iterator[RunEvent]:
        """Yield the events after the cursor `after` (a seq); with `follow` also those to come, until the run's end."""
        from runs import events

        if follow:
            yield from events.follow(self.pk, after)
            return
        while batch := events.read(self.pk, after):
            yield from batch
            after = batch[-1].seq

    async def aevents(self, after: int = 0, follow: bool = True) -> AsyncIterator[RunEvent]:
        """`events`, from async code."""
        from runs import events

        if follow:
            async for event in events.afollow(self.pk, after):
                yield event
            return
        while batch := await sync_to_async(events.read)(self.pk, after):
            for event in batch:
                yield event
            after = batch[-1].seq

    @property
    def rolled_back(self) -> dict[str, Any] | None:
        """What a run that was started with busy="rollback" has taken back: `{"run": id, "tool_calls": [...]}`.

        The calls are those that had taken effect, or may have: that is not undone. None for any other run.
        """
        from runs import occupant

        return occupant.rolled_back(self)

    def why(self) -> str:
        """Say why the run stands where it stands, for a person to read."""
        from runs import explain

        return explain.why(self)

    def cancel(self, reason: str = "") -> Self:
        """Cancel the run, at once and for good; a finished one stays as it is. Returns it as it is now."""
        from runs import admission

        admission.cancel(self, reason)
        return self

    def resume(self, input: str | None = None) -> Run:
        """Start a new run that goes on where this cancelled or failed one ended. Raises BadInput for another one."""
        from runs import successors

        return successors.resume(self, input)

    def retry(self, **overrides: Any) -> Run:
        """Start a new run that does this finished one's last step again, on the same thread.

        Its last answer is marked `superseded`. overrides: model, instructions, tools, limits, ... laid over this run's.
        Raises NotLast when a later run has spoken in the thread, ThreadBusy while one lives there, NothingToDo, BadInput.
        """
        from runs import successors

        return successors.retry(self, **overrides)

    async def aretry(self, **overrides: Any) -> Run:
        """`retry`, from async code."""
        return await sync_to_async(self.retry)(**overrides)

    def fork(self, after_step: int | None = None, **overrides: Any) -> Run:
        """Copy the thread up to a committed step (0: the input, None: the last one), and start a new run on the copy.

        overrides: model, instructions, tools, limits, ... laid over this run's.
        Raises NothingToDo after the step that ended a run, BadInput for a step that is not there or not answered yet.
        """
        from runs import successors

        return successors.fork(self, after_step, **overrides)

    async def afork(self, after_step: int | None = None, **overrides: Any) -> Run:
        """`fork`, from async code."""
        return await sync_to_async(self.fork)(after_step, **overrides)


class Leave(models.Model):
    """A run's leave to ask a model that has limits, or its place among the runs that wait for a model.

    It waits while `message_id` is null; then it was let go, and has asked for as long as the run's pending message is that one.
    A row that says neither of its run means nothing, and is removed when it is met. Only `runs/sql/0005_models.sql` writes it.
    """

    run_id = models.UUIDField(primary_key=True)
    key = models.CharField(max_length=300)  # "model:openai:gpt-5-mini", as of a Pause and a RateUse
    priority = models.SmallIntegerField()
    turn_of = models.CharField(max_length=100)  # the owner who takes turns with others
    turn = models.BigIntegerField()
    since = models.DateTimeField()  # when it began to wait, or asked
    released_at = models.DateTimeField(null=True)  # since when it may ask again
    limits = models.JSONField(null=True)  # as its leg had them
    tokens = models.BigIntegerField(default=0)  # what its call is thought to take
    reason = models.CharField(max_length=200, blank=True, default="")  # why it waits, in words
    message_id = models.UUIDField(null=True)
    use_id = models.BigIntegerField(null=True)  # the RateUse of its tokens, which the reported usage corrects

    class Meta:
        indexes: ClassVar = [
            models.Index(
                fields=["key", "-priority", "turn", "run_id"],
                name="longhaul_leave_in_line",
                condition=models.Q(message_id__isnull=True),
            ),
            models.Index(fields=["key"], name="longhaul_leave_asked", condition=models.Q(message_id__isnull=False)),
            models.Index(fields=["since"], name="longhaul_leave_old", condition=models.Q(message_id__isnull=False)),
        ]

    def __str__(self) -> str:
        return f"leave of {self.run_id} to ask {self.key}"


class Leg(models.Model):
    """One Celery task's stretch of a run. `epoch` is that of its last claim. At most one leg of a run is open."""

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="leg_set", db_index=False)
    number = models.IntegerField()
    epoch = models.IntegerField()
    worker_id = models.UUIDField()
    worker = models.CharField(max_length=200)
    task_id = models.CharField(max_length=100, blank=True, default="")
    started_at = models.DateTimeField(db_default=Now())
    ended_at = models.DateTimeField(null=True)
    # budget, limited, tools, person, retry, drained, lost, cancelled, failed, finished
    reason = models.CharField(max_length=16, blank=True, default="")

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["run", "number"], name="longhaul_legs_are_a_chain"),
            models.UniqueConstraint(
                fields=["run"], condition=models.Q(ended_at__isnull=True), name="longhaul_one_open_leg_a_run"
            ),
        ]

    def __str__(self) -> str:
        return f"leg {self.number} of {self.run_id}"


class Step(models.Model):
    """One committed model turn, with enough to rebuild the exact request that was sent.

    `context` says by their places which messages of the thread the model was shown: `{"pinned": [place, ...], "first": place,
    "last": place, "skipped": [[place, place], ...]}` is the pinned ones, and from first to last all but the skipped stretches,
    whose ends belong to them. `shown()` reads them. `options` is JSON text, for jsonb keeps no order and models heed that of a
    schema; it holds the `tool_choice` too, and `asked()` reads it.
    """

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="step_set", db_index=False, db_constraint=False)
    number = models.IntegerField()
    leg_id = models.UUIDField()
    epoch = models.IntegerField()
    message_id = models.UUIDField()
    model = models.CharField(max_length=200)
    instructions = models.TextField(blank=True, default="")
    tool_names = models.JSONField(default=list)
    schema_digest = models.CharField(max_length=64, blank=True, default="")
    options = models.TextField(default="{}")
    context = models.JSONField(default=dict)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["run", "number"], name="longhaul_one_commit_a_step")]

    def __str__(self) -> str:
        return f"step {self.number} of {self.run_id}"

    def asked(self) -> dict[str, Any]:
        """Return the options of the request and its `tool_choice`, in the order in which they were sent."""
        options: dict[str, Any] = orjson.loads(self.options)
        return options

    def shown(self) -> models.QuerySet[Message]:
        """Return the messages that the model was shown in this step, in their order, whatever became of them since."""
        within = models.Q(position__range=(self.context["first"], self.context["last"]))
        for stretch in self.context["skipped"]:
            within &= ~models.Q(position__range=stretch)
        pinned = models.Q(position__in=self.context["pinned"])
        return Message.objects.filter(within | pinned, thread=self.run.thread_id).order_by("position")


class Event(models.Model):
    """An append-only fact of a run. `seq` is gap-free from 1. `epoch` is set on what a leg wrote.

    A delta names its message and the ordinal of its last chunk. The run has no foreign key constraint here: each
    event would pay for the check, and its writer holds the run's row already.
    """

    id = models.BigAutoField(primary_key=True)
    run = models.ForeignKey(
        Run, on_delete=models.CASCADE, related_name="event_set", db_index=False, db_constraint=False
    )
    seq = models.BigIntegerField()
    type = models.CharField(max_length=40)
    at = models.DateTimeField()
    epoch = models.IntegerField(null=True)
    message_id = models.UUIDField(null=True)
    ordinal = models.IntegerField(null=True)
    payload = models.JSONField(default=dict)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["run", "seq"], name="longhaul_one_event_a_seq")]

    def __str__(self) -> str:
        return f"{self.seq} {self.type}"


class Usage(models.Model):
    """One model call that reported usage, of a discarded message too."""

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="usage_set", db_constraint=False)
    step = models.IntegerField()
    epoch = models.IntegerField()
    message_id = models.UUIDField()
    model = models.CharField(max_length=200)
    input_tokens = models.BigIntegerField(default=0)
    output_tokens = models.BigIntegerField(default=0)
    cached_tokens = models.BigIntegerField(default=0)
    reasoning_tokens = models.BigIntegerField(default=0)
    cost = models.DecimalField(max_digits=18, decimal_places=9, null=True)
    discarded = models.BooleanField(default=False)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        verbose_name_plural = "usage"

    def __str__(self) -> str:
        return f"usage of {self.message_id}"
