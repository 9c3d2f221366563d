"""How a run comes to be, and how its message gets out.

A run that has a slot keeps it; any other goes out when there is room and nothing waits before it, or waits for its turn in
Postgres, until `release` sends it. A message is only a hint: it is published after the commit, and the sweep publishes again
what stays queued.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from django.db import IntegrityError, transaction

from runs import agents, bells, lifecycle, occupant
from runs.conf import settings
from runs.exceptions import (
    BadInput,
    IdempotencyConflict,
    InputTooLarge,
    NothingToDo,
    ThreadBusy,
    TooManyHeld,
)
from runs.gates import gates_of, lane_of
from runs.models import OCCUPYING, Run, Status, StopReason
from threads import clock, database, logs, transcript
from threads.content import Part, clean, parts_of
from threads.exceptions import within
from threads.models import Message, MessageStatus, Role, Thread
from tools import redelivery

logger = logging.getLogger("longhaul.runs")

SAVE_MODES = ("prompt_and_output", "all", "none")
BUSY = ("enqueue", "steer", "interrupt", "rollback", "reject")
FIRST_REPUBLISH = timedelta(seconds=1)
BEGINS = 5  # of one start, when others take the thread between its look and its insert


def start(
    agent: agents.Agent,
    input: str | Sequence[Mapping[str, Any]] | None = None,
    *,
    owner: Any = None,
    thread: Thread | None = None,
    message: Message | None = None,
    messages: Sequence[Mapping[str, Any]] = (),
    save: str = "prompt_and_output",
    busy: str = "enqueue",
    priority: int = 0,
    model: str | None = None,
    instructions: str | None = None,
    tools: Sequence[Any] | None = None,
    tool_choice: str | None = None,
    parallel_tool_calls: bool | None = None,
    limits: Mapping[str, Any] | None = None,
    context: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    output_schema: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    client_id: str = "",
    idempotency_key: str | None = None,
    parent: Run | None = None,
    origin: str = "start",
    told: Mapping[str, Any] | None = None,
) -> Run:
    """Make a run of `agent`, to be dispatched when the surrounding transaction commits.

    input: a text or a list of parts, saved as the user's message; or `message`, one that is saved already; with neither
    the run goes on from the thread's last state. messages: extra ones, shown to the model before the input.
    save: what later runs of the thread see of this one: prompt_and_output, all (`messages` too), none.
    busy: what happens when a run occupies the thread: enqueue (held until it ends), steer (that run takes the input in at its
        next step boundary, and is returned), interrupt (it is cancelled, this one starts), rollback (and what it was given and
        has said is taken out of the thread), reject. docs/busy.md has the transcripts.
    output_schema: a JSON schema of the final answer; the run's output is then the value, and no text.
    idempotency_key: the same key of the same owner and the same request give the same run.

    Raises BadInput and its kind, ThreadBusy; the database is as before then.
    """
    if input is not None and message is not None:
        raise BadInput("Give input or message, not both.")
    if save not in SAVE_MODES:
        raise BadInput(f"save must be one of {', '.join(SAVE_MODES)}; it is {save!r}.", attr="save")
    if busy not in BUSY:
        raise BadInput(f"busy must be one of {', '.join(BUSY)}; it is {busy!r}.", attr="busy")
    if isinstance(priority, bool) or not isinstance(priority, int) or not -32768 <= priority <= 32767:
        raise BadInput("priority must be a whole number from -32768 to 32767.", attr="priority")
    client_id = transcript.name_of(client_id, "client_id")
    if idempotency_key is not None and not (idempotency_key := transcript.name_of(idempotency_key, "idempotency_key")):
        raise BadInput("idempotency_key is empty. Give a key, or leave it out.")
    metadata = transcript.metadata_of(metadata)
    with within("input"):
        parts = _input_parts(input)
    overrides = agents.check_overrides(
        {
            "model": model,
            "instructions": instructions,
            "tools": tools,
            "tool_choice": tool_choice,
            "parallel_tool_calls": parallel_tool_calls,
            "limits": limits,
            "context": context,
            "options": options,
            "output_schema": output_schema,
        }
    )
    thread, owner_id = _thread_of(agent, thread, message, owner)
    definition = agents.define(agent, thread.overrides, overrides)
    agents.check_named_model(definition.model)
    if message is not None and idempotency_key is None:
        idempotency_key = f"message:{message.pk}"
    with within("messages"):
        drafts = transcript.drafts(thread, messages)
    for extra in drafts:
        _refuse_size("A message", extra.content)
    fingerprint = _fingerprint(agent.name, parts, thread, message, list(messages), save, overrides, metadata, client_id)
    fields = {
        "owner_id": owner_id,
        "agent": agent.name,
        "origin": origin,
        "parent": parent,
        "busy": busy,
        "priority": priority,
        "overrides": overrides,
        "save_mode": save,
        "metadata": metadata,
        "idempotency_key": idempotency_key,
        "fingerprint": fingerprint,
    }
    for extra in drafts:
        extra.shown = save == "all"
    if parts is not None:
        drafts.append(Message(thread=thread, role=Role.USER, content=parts, client_id=client_id, shown=save != "none"))
    keyed = (owner_id, idempotency_key or "", fingerprint)
    given = _Given(drafts, message, parts is not None, agent, definition, told or {}, keyed)
    begins = 0
    while True:
        begins += 1
        try:
            with transaction.atomic():
                if idempotency_key is not None and (known := _known(busy, *keyed)):
                    return known
                return _insert(Run(**fields), thread, given)
        except (IntegrityError, ThreadBusy, NothingToDo) as error:
            # Somebody used the key between our look and our lock or insert; anything else goes on.
            if idempotency_key is not None and (known := _known(busy, *keyed)):
                return known
            if begins == BEGINS or not _taken_meanwhile(error):
                raise


@dataclass(frozen=True, slots=True)
class _Given:
    """What a run starts with. `drafts` are its messages, the input last. `key`: owner, idempotency key ("": none), fingerprint."""

    drafts: list[Message]
    message: Message | None
    has_input: bool
    agent: agents.Agent
    definition: agents.Definition
    told: Mapping[str, Any]
    key: tuple[Any, str, str]


def _taken_meanwhile(error: Exception) -> bool:
    """Whether another run has come to occupy the thread, which was free when we looked."""
    return isinstance(error, IntegrityError) and "longhaul_one_run_occupies_a_thread" in str(error)


def _insert(run: Run, thread: Thread, given: _Given) -> Run:
    """Insert the run and its messages, held or queued, and return it; or the live run, which was steered. In a transaction."""
    drafts, message, has_input = given.drafts, given.message, given.has_input
    agent, told, replaced = given.agent, given.told, None
    left: list[Message] = []
    for draft in drafts:
        draft.status, draft.position = MessageStatus.COMPLETED, None
    new_thread = thread._state.adding
    if new_thread:
        thread.save()
        occupied = False
    else:
        occupied = transcript.lock_occupant(thread.pk)
    if occupied and run.busy == "steer":
        return occupant.steer(thread, drafts, message, key=given.key)
    if run.busy == "steer" and message is not None and (steered := occupant.steered_with(message)):
        return steered
    if occupied and run.busy in occupant.REPLACES:
        run.parent = run.parent or occupant.of(thread)
        replaced, left = occupant.replace(run.parent, run.pk, run.busy)
        told, occupied = {"after": str(run.parent.pk), **told}, False
    if occupied:
        _admit_held(run, thread)
    elif not has_input and message is None and not drafts and not left:
        _something_to_do(thread)
    moment = clock.now()
    run.thread = thread
    run.created_at = moment
    deadline = given.definition.limits.deadline
    run.deadline = moment + deadline if deadline else None
    for draft in drafts:
        draft.run_id = run.pk
    if has_input:
        run.input_message_id = drafts[-1].pk
    elif message is not None:
        run.input_message_id = message.pk
    run.entered_at = None if occupied else moment
    if occupied:
        run.status = Status.HELD
        for draft in drafts:
            draft.status = MessageStatus.WAITING
    else:
        run.status = Status.QUEUED
        run.dispatch_seq = 1
        run.publishes = 1
        run.queued_at = moment
        run.next_publish_at = moment + FIRST_REPUBLISH
        for each in left:
            each.status = MessageStatus.COMPLETED
        transcript.place(thread.pk, [*left, *drafts], last=0 if new_thread else None)
        if left:
            Message.objects.bulk_update(left, ["status", "position"])
    placed = [] if occupied else [*left, *drafts]
    if message is not None:
        saved = Message.objects.select_for_update(no_key=True).filter(pk=message.pk).first()
        if saved is None:
            raise BadInput(f"There is no message {message.pk} any more. Save it again, or give an input.")
        Message.objects.filter(pk=message.pk, run_id=None).update(run_id=run.pk)
        if saved.status != MessageStatus.WAITING:  # else it is told when it gets its place
            placed.insert(0, saved)
    log: list[tuple[str, Mapping[str, Any]]] = [_said(each) for each in placed]
    if occupied:
        log.insert(0, ("run.held", {}))
    else:
        log.append(("run.queued", {"reason": "start", **told}))
    run.max_dispatched = settings().max_dispatched
    run.gates = gates_of(agent, thread.owner_id)
    run.lane = lane_of(agent.queue or "", run.gates)
    run.last_seq = len(log)
    run.save(force_insert=True)
    Message.objects.bulk_create(drafts, batch_size=transcript.BATCH)
    entered = lifecycle.enter(run.pk, moment, log)
    if not occupied and not entered["out"]:
        run.refresh_from_db(fields=["turn", "publishes", "next_publish_at"])
    run_id = run.pk

    def after_commit() -> None:
        if replaced is not None and run.parent is not None:
            _log("cancelled", run.parent.pk, run.parent.agent, thread.pk)
            announce(replaced)
        if not new_thread:
            bells.ring([bells.thread_channel(thread.pk)])
        if not occupied:
            _log("queued", run_id, agent.name, thread.pk)
        # Between the commit and the publish a death costs a republish interval: the row says when it is due.
        if entered["out"]:
            publish(run_id, 1, agent.name)
        elif entered.get("release"):
            release()

    # One callback a run: people's tests count them.
    transaction.on_commit(after_commit)
    return run


def _log(what: str, run_id: UUID, agent: str, thread_id: UUID) -> None:
    # Bound, and not `extra`: a log record has a `thread` of its own there, and refuses another.
    with logs.context(run=run_id, agent=agent, thread=thread_id):
        logger.info("Run %s of %s %s", run_id, agent, what, extra={"action": f"run.{what}"})


def tell(run: Run, message: Message) -> None:
    """Say in the run's log what was said to it: who reads the log alone must see it. The caller holds the run, in a transaction."""
    lifecycle.record(run.pk, *_said(message))


def _said(message: Message) -> tuple[str, dict[str, Any]]:
    said = {
        "message": str(message.pk),
        "role": message.role,
        "content": message.content,
        "client_id": message.client_id,
    }
    return "message.completed", said if message.shown else {**said, "shown": False}


def _admit_held(run: Run, thread: Thread) -> None:
    live = Run.objects.filter(thread=thread, status__in=OCCUPYING).values_list("pk", flat=True).first()
    if run.busy == "reject":
        raise ThreadBusy(f"The thread has a live run, {live}. Wait for it, cancel it, or start with busy='enqueue'.")
    if Run.objects.filter(thread=thread, status=Status.HELD).count() >= settings().max_held:
        raise TooManyHeld(f"{settings().max_held} runs wait for this thread already. Try again when some have ended.")


def _something_to_do(thread: Thread) -> None:
    last = (
        Message.objects.filter(thread=thread, status__in=[MessageStatus.COMPLETED, MessageStatus.PARTIAL], shown=True)
        .order_by("-position")
        .first()
    )
    if last is None:
        raise NothingToDo("The thread is empty. Give an input.")
    if last.role == Role.ASSISTANT and last.status == MessageStatus.COMPLETED:
        raise NothingToDo


def _thread_of(agent: agents.Agent, thread: Thread | None, message: Message | None, owner: Any) -> tuple[Thread, Any]:
    owner_id = None if owner is None else owner.pk
    if not isinstance(message, Message | None) or not isinstance(thread, Thread | None):
        raise BadInput("thread and message are rows: a Thread and a Message.")
    if message is not None:
        if thread is not None and thread.pk != message.thread_id:
            raise BadInput("The message is not of this thread.", attr="message")
        if message._state.adding or message.role not in (Role.USER, Role.SYSTEM):
            raise BadInput(
                "message must be one of the user (or the system) that is saved in its thread.", attr="message"
            )
        thread = message.thread
    if thread is None:
        return Thread(owner=owner, agent=agent.name), owner_id
    if thread._state.adding:
        raise BadInput("Save the thread first.")
    if owner is not None and thread.owner_id != owner_id:
        raise BadInput("The thread belongs to somebody else.")
    return thread, thread.owner_id


def _input_parts(input: str | Sequence[Mapping[str, Any]] | None) -> list[Part] | None:
    if input is None:
        return None
    parts = parts_of(input)
    if not any(part["type"] != "text" or part["text"].strip() for part in parts):
        raise BadInput("The input is empty. Give a text, or leave input out to go on from the thread's last state.")
    _refuse_size("The input", parts)
    return parts


def _refuse_size(what: str, parts: Sequence[Part]) -> None:
    """Raises InputTooLarge. A part that is no text counts as the JSON that is stored of it."""
    size = sum(len(part["text"] if part["type"] == "text" else database.dumps(part)) for part in parts)
    if size > settings().max_input_chars:
        raise InputTooLarge(
            f"{what} has {size:,} characters, {settings().max_input_chars:,} are allowed (LONGHAUL['MAX_INPUT_CHARS'])."
        )


def _fingerprint(*request: Any) -> str:
    plain = [
        (str(each.pk) if not each._state.adding else None) if isinstance(each, Thread | Message) else each
        for each in request
    ]
    return hashlib.sha256(database.dumps(plain).encode()).hexdigest()


def _known(busy: str, owner_id: Any, key: str, fingerprint: str) -> Run | None:
    if busy == "steer" and (steered := occupant.steered((owner_id, key, fingerprint))):
        return steered
    known = Run.objects.filter(owner_id=owner_id, idempotency_key=key).first()
    if known is not None and known.fingerprint != fingerprint:
        raise IdempotencyConflict(
            f"The idempotency key {key!r} was used for another request (run {known.pk}). Use a new key."
        )
    return known


def cancel(run: Run, reason: str = "") -> Run:
    """Cancel a live run, at once and for good; a finished one is left as it is. Returns the run as it is now."""
    error = {"code": "cancelled", "message": clean(reason), "retryable": False} if reason else None
    with transaction.atomic():
        answer = lifecycle.cancel(run.pk, error=error)
        if answer is not None:
            transaction.on_commit(partial(_log, "cancelled", run.pk, run.agent, run.thread_id))
            transaction.on_commit(lambda: announce(answer))
    run.refresh_from_db()
    return run


def vacate(thread_id: UUID) -> None:
    """Cancel every live run of a thread that is about to be deleted. In a transaction.

    Locks the run that occupies it first, as the end of that run would, and keeps it till the held ones are cancelled: none
    is queued behind our back, and none is added.
    """
    occupied(thread_id, True)
    live = Run.objects.filter(thread_id=thread_id, status__in=[Status.HELD, *OCCUPYING])
    held = list(live.filter(status=Status.HELD).order_by("created_at", "id").values_list("pk", flat=True))
    occupying = list(live.exclude(status=Status.HELD).values_list("pk", flat=True))
    for run_id in [*held, *occupying]:
        answer = lifecycle.cancel(run_id, StopReason.THREAD_DELETED)
        if answer is not None:
            transaction.on_commit(partial(announce, answer))


def occupied(thread_id: UUID, lock: bool) -> bool:
    """Return whether a run occupies the thread; with `lock`, hold it for the rest of the transaction."""
    occupying = Run.objects.filter(thread_id=thread_id, status__in=OCCUPYING)
    if not lock:
        return occupying.exists()
    # The row may have ended between the look and the lock: Postgres then looks at it again and leaves it out.
    while True:
        if occupying.select_for_update(no_key=True, of=("self",)).first() is not None:
            return True
        if not occupying.exists():
            return False


def take_from_absent(run_id: UUID) -> int | None:
    """Reclaim a run that came back from the broker, when its holder's lock is free: the broker's word was the first look.

    Returns the dispatch_seq by which the receiver claims it: it has a message in its hands, so none is sent. None: there was
    nothing to take, or the run ended by it.
    """
    found = redelivery.absent_holder(
        "SELECT epoch, holder, longhaul_worker_locked(holder) FROM longhaul_runs_run WHERE id = %s AND status = 'running'",
        run_id,
    )
    if found is None:
        return None
    epoch, holder = found
    answer = lifecycle.reclaim(run_id, epoch, holder)
    if answer is None:
        return None
    told = {"action": "run.reclaimed", "run": run_id, "epoch": epoch, "life": holder}
    logger.warning("Run %s came back from the broker, reclaimed from a worker that is gone", run_id, extra=told)
    dispatch_seq: int | None = answer.get("dispatch_seq")
    announce({**answer, "dispatch_seq": None})
    return dispatch_seq


def publish(run_id: UUID, dispatch_seq: int, agent: str = "") -> None:
    """Send a run's message to the queue of its agent. Losing it costs a republish interval."""
    from runs import tasks

    tasks.publish(run_id, dispatch_seq, agent)


def release() -> int:
    """Send the runs whose turn it is, and return how many. In no transaction of a run's; the watcher does it 4 times a second."""
    released = lifecycle.release()
    for run_id, dispatch_seq, agent in released:
        publish(run_id, dispatch_seq, agent)
    return len(released)


def announce(answer: Mapping[str, Any], *, ring: bool = True) -> None:
    """After the commit: publish and ring what a SQL function's answer says.

    `{"run", "status", "agent", "dispatch_seq", "lingering", "released": [run, dispatch_seq, agent], "release": runs wait that
    may go now, "publish_call": [call, attempt, timeout in seconds, queue, tool], "parked": calls wait that may have room now}`
    """
    from tools import tasks as tool_tasks

    run_id = answer.get("run")
    channels = []
    if run_id is not None:
        status = answer.get("status")
        if answer.get("lingering"):
            # Its leg goes on at once, and rings for its readers with its next batch: one publish, not two.
            channels.append(bells.leg_channel(run_id))
        elif ring:
            channels.append(bells.run_channel(run_id))
        if status in ("cancelled", "failed"):
            channels.append(bells.leg_channel(run_id))
        if channels:
            bells.ring(channels)
        if answer.get("dispatch_seq") is not None and not answer.get("lingering"):
            publish(UUID(run_id), answer["dispatch_seq"], answer.get("agent", ""))
    if released := answer.get("released"):
        bells.ring([bells.run_channel(released[0])])
        publish(UUID(released[0]), released[1], released[2])
    if answer.get("release"):
        release()
    if call := answer.get("publish_call"):
        tool_tasks.publish(
            UUID(call[0]), call[1], timedelta(seconds=call[2]), call[3], call[4], run_id or "", answer.get("agent", "")
        )
    if answer.get("parked"):
        tool_tasks.let_out()
