"""Runs that follow another one: resume, retry, fork. A finished run never changes, so each is a new run that names its parent.

resume goes on where a cancelled or failed run ended, on the same thread. retry asks the model for the last step once more,
on the same thread. fork copies the thread up to a step onto a new one, and goes on there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.db import transaction
from django.db.models import Max, Min, Q

from runs import admission, agents
from runs.exceptions import BadInput, NotLast, ThreadBusy
from runs.models import LIVE, OCCUPYING, Run, Status, StopReason
from threads import transcript
from threads.models import Message, MessageStatus, Role, Thread
from tools.models import ToolCall

SAID = (MessageStatus.COMPLETED, MessageStatus.PARTIAL)


def resume(run: Run, input: str | None = None) -> Run:
    """Start a new run that goes on where a cancelled or failed one ended, on the same thread.

    Of a run that was cancelled before it left `held`, the input never had a place in the thread: it is given again. So is
    that of a run that was rolled back.
    Raises BadInput for another run, and what `admission.start` raises.
    """
    run.refresh_from_db()
    if run.status not in (Status.CANCELLED, Status.FAILED):
        raise BadInput(f"Only a cancelled or failed run is resumed; this one is {run.status}.")
    if input is not None:
        return _again(run, "resume", run.overrides, input=input)
    if given := _never_placed(run):
        return _given_again(run, "resume", run.overrides, given)
    _refuse_unsaved(run, "resumed without an input")
    return _again(run, "resume", run.overrides if not run.steps else _unforced(run, run.overrides))


def retry(run: Run, **overrides: Any) -> Run:
    """Start a new run that does the last step of a finished one again, on the same thread.

    The answer that ended the run, or what a cancel has left of it, is marked `superseded`: later context leaves it out.
    Calls that were answered stay so, and their step is not asked for again: the run goes on from their results.
    overrides: as `admission.start` takes them, laid over those of the run.

    Raises NotLast when a later run has spoken in the thread, ThreadBusy while one lives there, NothingToDo, BadInput.
    """
    given_choice = overrides.get("tool_choice")
    overrides = overlay(run.overrides, overrides)
    with transaction.atomic():
        occupied = transcript.lock_occupant(run.thread_id)
        run.refresh_from_db()
        if run.status in LIVE:
            raise BadInput(f"Only a finished run is retried; this one is {run.status}. Wait for its end, or cancel it.")
        if occupied:
            live = Run.objects.filter(thread=run.thread_id, status__in=OCCUPYING).values_list("pk", flat=True).first()
            raise ThreadBusy(f"The thread has a live run, {live}. Wait for it, or cancel it.")
        if given := _never_placed(run):
            return _given_again(run, "retry", overrides, given)
        _refuse_unsaved(run, "retried")
        if later := _later_message(run):
            raise NotLast(f"Run {later.run_id} has spoken in the thread since. Fork this run instead.")
        own = Message.objects.filter(run_id=run.pk, status__in=SAID, position__isnull=False)
        last = own.order_by("-position").first()
        if last is not None and last.role == Role.ASSISTANT and not _calls(last):
            transcript.supersede(last)
        else:
            last = None
        told = {} if last is None else {"superseded": str(last.pk)}
        if given_choice is None and run.steps > (last is not None and last.step == 1):
            overrides = _unforced(run, overrides)
        return _again(run, "retry", overrides, busy="reject", told=told)


def fork(run: Run, after_step: int | None = None, **overrides: Any) -> Run:
    """Copy the thread up to a committed step of the run onto a new thread, and start a new run there.

    after_step: 0 copies up to the run's input, None up to its last committed step. Of a live run what is committed counts.
    The copies have places from 1 and are shown to all later runs. The run's own input is the new run's input.
    overrides: as `admission.start` takes them, laid over those of the run.

    Raises NothingToDo after the step that ended a run, BadInput for a step that is not there or not answered yet,
    ThreadGone.
    """
    given_choice = overrides.get("tool_choice")
    overrides = overlay(run.overrides, overrides)
    with transaction.atomic():
        # Its deletion with the thread waits: it would not know of the run that names it as its parent.
        transcript.lock_occupant(run.thread_id)
        run.refresh_from_db()
        until = _place_after(run, after_step)
        old = run.thread
        thread = Thread.objects.create(
            owner_id=old.owner_id,
            agent=old.agent,
            title=old.title,
            metadata=old.metadata,
            overrides=old.overrides,
        )
        inputs = transcript.copy(old.pk, thread.pk, until=until, own=run.pk)
        if given_choice is None and (run.steps if after_step is None else after_step):
            overrides = _unforced(run, overrides)
        new = _again(run, "fork", overrides, thread=thread)
        if inputs:
            # Its own input stays shown to a run though the window has moved on.
            Message.objects.filter(pk__in=inputs.values()).update(run_id=new.pk)
            for message in Message.objects.filter(pk__in=inputs.values()).order_by("position"):
                admission.tell(new, message)
            new.input_message_id = inputs.get(run.input_message_id) if run.input_message_id else None
            new.save(update_fields=["input_message_id"])
            new.refresh_from_db(fields=["last_seq"])  # whoever gets it reads on from here
        return new


def overlay(overrides: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Lay overrides over others as `agents.define` does: what is nearer wins, lists replace. Raises BadInput."""
    laid = {key: value for key, value in overrides.items() if key in agents.OVERRIDES}
    for key, value in agents.check_overrides(given).items():
        laid[key] = {**(laid.get(key) or {}), **value} if key in agents.MERGED else value
    return laid


def _again(run: Run, origin: str, overrides: Mapping[str, Any], *, thread: Thread | None = None, **given: Any) -> Run:
    return admission.start(
        agents.get(run.agent),
        thread=thread or run.thread,
        priority=run.priority,
        save=run.save_mode,
        metadata=run.metadata,
        parent=run,
        origin=origin,
        **{key: value for key, value in overrides.items() if key in agents.OVERRIDES},
        **given,
    )


def _unforced(run: Run, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides of a run that goes on after the first step of another one: a call was forced there."""
    said = overrides.get("tool_choice") or run.thread.overrides.get("tool_choice") or agents.get(run.agent).tool_choice
    return {**overrides, "tool_choice": "auto"} if agents.is_forced(said) else dict(overrides)


def _refuse_unsaved(run: Run, what: str) -> None:
    if run.save_mode == "none":
        raise BadInput(
            f"A run with save='none' cannot be {what}: later runs of its thread do not see what it said. Fork it instead."
        )


def _never_placed(run: Run) -> dict[str, Any]:
    """Return what a run was given, as `start` takes it, when none of it counts in the thread.

    That is one that was cancelled while it was held, whose input never had a place, and one that was rolled back.
    """
    given = Message.objects.filter(run_id=run.pk, status=MessageStatus.DISCARDED, position__isnull=True)
    if run.stop_reason == StopReason.ROLLED_BACK and run.input_message_id:
        said = Message.objects.filter(pk=run.input_message_id).values("created_at")
        # What steered it came later, and is not given again.
        given = Message.objects.filter(run_id=run.pk, step=None, status=MessageStatus.ROLLED_BACK, created_at__lte=said)
    elif run.dispatch_seq:
        return {}
    fields = ("role", "content", "metadata", "client_id")
    found: dict[str, Any] = {"messages": []}
    for message in given.order_by("created_at", "id"):
        if message.pk == run.input_message_id and message.role == Role.USER:
            found |= {"input": message.content, "client_id": message.client_id, "metadata": message.metadata}
        else:
            found["messages"].append({field: getattr(message, field) for field in fields})
    return found if found["messages"] or "input" in found else {}


def _given_again(run: Run, origin: str, overrides: Mapping[str, Any], given: dict[str, Any]) -> Run:
    metadata = given.pop("metadata", None)
    with transaction.atomic():
        new = _again(run, origin, overrides, **given)
        if metadata and new.input_message_id:
            Message.objects.filter(pk=new.input_message_id).update(metadata=metadata)
        return new


def _calls(message: Message) -> bool:
    return any(part.get("type") == "tool_call" for part in message.content)


def _later_message(run: Run) -> Message | None:
    """Return a message of a run that came to this one's thread after it, and stands in the thread."""
    later = Run.objects.filter(Q(entered_at__gt=run.entered_at) | Q(entered_at=run.entered_at, pk__gt=run.pk))
    return Message.objects.filter(
        thread=run.thread_id,
        status__in=SAID,
        position__isnull=False,
        run_id__in=later.filter(thread=run.thread_id).values("pk"),
    ).first()


def _place_after(run: Run, after_step: int | None) -> int:
    """Return the last place in the thread that a fork after the step copies. Raises BadInput."""
    if after_step is not None and (isinstance(after_step, bool) or not isinstance(after_step, int)):
        raise BadInput("after_step must be a whole number, or None for the last step.", attr="after_step")
    if after_step is not None and not 0 <= after_step <= run.steps:
        raise BadInput(
            f"after_step must be from 0 to {run.steps}, the steps that run {run.pk} has committed.", attr="after_step"
        )
    if not run.dispatch_seq:
        raise BadInput("The run never left `held`: nothing of it stands in its thread. Start one with its input.")
    if run.stop_reason == StopReason.ROLLED_BACK:
        raise BadInput(
            "The run was rolled back: nothing of it stands in its thread. Retry it, or start one with its input."
        )
    step = run.steps if after_step is None else after_step
    own = Message.objects.filter(run_id=run.pk, position__isnull=False)
    after: int | None = own.filter(role=Role.ASSISTANT, step__gt=step).aggregate(place=Min("position"))["place"]
    kept = own.filter(status__in=SAID).exclude(role=Role.ASSISTANT)
    if after is not None:
        kept = kept.filter(position__lt=after)
    if not step:
        place: int | None = kept.aggregate(place=Max("position"))["place"]
        if place is None:  # it began from the thread's last state
            later = _later_message(run)
            ends = [end for end in (after, later and later.position) if end]
            place = min(ends) - 1 if ends else run.thread.messages.aggregate(place=Max("position"))["place"]
        return place or 0
    said = (
        own.filter(role=Role.ASSISTANT, step=step).exclude(status=MessageStatus.DISCARDED).order_by("-position").first()
    )
    if said is None or said.position is None:
        raise BadInput(f"Step {step} of run {run.pk} has no message any more.")
    answered: int | None = kept.filter(position__gt=said.position).aggregate(place=Max("position"))["place"]
    if answered is None and ToolCall.objects.filter(run_id=run.pk, step=step).exists():
        raise BadInput(
            f"The calls of step {step} are not all answered yet. Wait for them, or fork after step {step - 1}."
        )
    return answered or said.position
