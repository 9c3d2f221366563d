"""Why a run stands where it stands, in a sentence for a person, and the command that would mend it.

Reads rows only, and takes the time from the database. A run moves while it is explained, so nothing here is more than a look.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from celery import current_app
from django.db import connection

from runs.conf import settings
from runs.models import OCCUPYING, Event, Leg, Run, Status, StopReason
from runs.sweep import SWEEP_LOCK
from threads import clock
from threads.models import Message
from tools.models import CallStatus, ToolCall, Worker

SHOWN = 5  # calls
# A message that nobody took was sent again by now, where there is a control worker.
UNHEARD = timedelta(seconds=3)

# What brought a run into the queue: the reasons of `run.queued`.
QUEUED_BY = {
    "start": "new",
    "tools": "its tool calls are settled",
    "budget": "its last leg used up its time",
    "retry": "the model call failed",
    "lost": "its worker died",
    "drained": "its worker shut down",
    "released": "the run before it has ended",
}
# How to start a worker of each kind, after `celery -A PROJECT worker -Q QUEUE`.
POOLS = {"agents": "-P gevent -c 1000", "tools": "-P prefork", "control": "-P threads -c 2"}


@dataclass(frozen=True, slots=True)
class Explanation:
    """`mend` is a command, with what it is for, or None. `stuck`: nothing moves the run on as things are."""

    why: str
    mend: str | None = None
    stuck: bool = False


def why(run: Run) -> str:
    """Say why the run stands where it stands, as the database has it now."""
    return explain(_fresh(run)).why


def mend(run: Run) -> str | None:
    """Return the command that would mend the run, and what it does; None when there is nothing to mend."""
    return explain(_fresh(run)).mend


def _fresh(run: Run) -> Run:
    return Run.objects.filter(pk=run.pk).first() or run


def explain(run: Run) -> Explanation:
    """Explain the run as the given row has it."""
    now = clock.now()
    match run.status:
        case Status.QUEUED:
            return _queued(run, now)
        case Status.HELD:
            return _held(run, now)
        case Status.RUNNING:
            return _running(run, now)
        case Status.WAITING | Status.REQUIRES_ACTION:
            return _waiting(run, now)
        case _:
            return _ended(run)


def _queued(run: Run, now: datetime) -> Explanation:
    told = Event.objects.filter(run=run, type="run.queued").order_by("-seq").values_list("payload", flat=True).first()
    reason = str((told or {}).get("reason", ""))
    since = now - (run.queued_at or run.created_at)
    said = f"queued for {span(since)} ({QUEUED_BY.get(reason, reason) or 'new'})"
    if run.not_before is not None and run.not_before > now:
        error = _last_error(run)
        said += f", to be claimed in {span(run.not_before - now)}"
        if reason == "retry":
            said += f": the model is asked again, try {run.model_tries + 1} of {settings().model_tries}"
            said += f", after {error}" if error else ""
        return Explanation(said)
    if run.linger_until is not None and run.linger_until > now:
        return Explanation(f"{said}; the leg that lingers takes it")
    due = run.next_publish_at
    said += f", published {times(run.publishes)}"
    said += "" if due is None else f", again in {span(due - now)}" if due > now else f", again since {span(now - due)}"
    if due is None:
        return Explanation(f"{said}, and never again", _violated(run), True)
    if since < UNHEARD or present("agents", now):
        overdue = now - due > UNHEARD and not swept(now)
        return Explanation(said + _unswept(overdue), start("control") if overdue else None, overdue)
    return Explanation(f"{said}; no agents worker is present", start("agents"), True)


def _held(run: Run, now: datetime) -> Explanation:
    occupant = Run.objects.filter(thread_id=run.thread_id, status__in=OCCUPYING).first()
    if occupant is None:
        return Explanation("held, though its thread is free", _violated(run), True)
    before = Run.objects.filter(thread_id=run.thread_id, status=Status.HELD, created_at__lt=run.created_at).count()
    said = f"held for {span(now - run.created_at)} behind run {occupant.pk} of {occupant.agent} ({occupant.status})"
    if before:
        said += f" and {before} more"
    theirs = explain(occupant)
    return Explanation(said, theirs.mend if theirs.stuck else None, theirs.stuck)


def _running(run: Run, now: datetime) -> Explanation:
    leg = Leg.objects.filter(run=run, ended_at=None).first()
    where = f"running on {leg.worker} in leg {leg.number} for {span(now - leg.started_at)}" if leg else "running"
    message = Message.objects.filter(pk=run.pending_message_id).first() if run.pending_message_id else None
    if message is None:
        doing = f"prepares step {run.steps + 1}"
    else:
        last = Event.objects.filter(run=run, message_id=message.pk, type__endswith="delta").order_by("-seq").first()
        asked = f"the model speaks step {message.step} since {span(now - message.created_at)}"
        heard = f", last heard {span(now - last.at)} ago" if last else ", nothing heard yet"
        doing = asked + heard
    worker = _workers([run.holder], now).get(run.holder) if run.holder else None
    if worker is not None and worker[1]:
        return Explanation(f"{where}: {doing}")
    late = run.leg_deadline is not None and run.leg_deadline < now
    gone = "its worker is gone" if worker is None else "its worker is silent"
    if late:
        gone += f" and its time was up {span(now - (run.leg_deadline or now))} ago"
    stuck = not swept(now)
    said = f"{where}: {doing}; {gone}{_unswept(stuck) or ', and the sweep takes it over'}"
    return Explanation(said, start("control") if stuck else None, stuck)


def _waiting(run: Run, now: datetime) -> Explanation:
    calls = list(ToolCall.objects.filter(run_id=run.pk, step=run.steps).order_by("index"))
    still = [call for call in calls if call.status != CallStatus.SETTLED]
    if not still:
        fresh = _fresh(run)
        if fresh.status != run.status:
            return explain(fresh)  # it was joined meanwhile
        return Explanation(f"{run.status}, though every call is settled", _violated(run), True)
    workers = _workers([call.holder for call in still if call.holder], now)
    told = [_call(call, workers, now) for call in still[:SHOWN]]
    more = f", and {len(still) - SHOWN} more" if len(still) > SHOWN else ""
    verb = "waiting for" if run.status == Status.WAITING else "waiting for people at"
    said = f"{verb} {len(still)} of {len(calls)} tool call{'' if len(calls) == 1 else 's'}: {', '.join(told)}{more}"
    ready = [call for call in still if call.status in (CallStatus.REQUESTED, CallStatus.RETRYING)]
    unheard = [call for call in ready if _due_since(call, now) > UNHEARD or call.publishes > 2]
    if unheard and not present("tools", now):
        own = sorted({call.queue for call in unheard if call.queue})
        return Explanation(f"{said}; no tools worker is present", start("tools", *own), True)
    lost = any(call.status == CallStatus.RUNNING and not workers.get(call.holder, ("", False))[1] for call in still)
    if (unheard or lost) and not swept(now):
        return Explanation(said + _unswept(True), start("control"), True)
    # Last, for a person's answer helps nothing while the calls beside it stand still.
    if any(call.status == CallStatus.UNKNOWN for call in still):
        return Explanation(
            said,
            "see whether the effect is there; its worker's late result would still settle the call. To give up: "
            + in_shell(run, "cancel()"),
        )
    return Explanation(said)


def _due_since(call: ToolCall, now: datetime) -> timedelta:
    return now - call.next_publish_at if call.next_publish_at else timedelta(0)


def _call(call: ToolCall, workers: dict[UUID | None, tuple[str, bool]], now: datetime) -> str:
    tried = f"attempt {call.attempt} of {call.max_attempts}"
    match call.status:
        case CallStatus.RUNNING:
            name, present = workers.get(call.holder, ("a worker that is gone", False))
            silent = "" if present or call.holder not in workers else ", which is silent"
            since = span(now - call.claimed_at) if call.claimed_at else "?"
            return f"{call.name} (running on {name}{silent}, {since}, {tried})"
        case CallStatus.REQUESTED | CallStatus.RETRYING:
            if call.not_before is not None and call.not_before > now:
                code = (call.error or {}).get("code", "it failed")
                return f"{call.name} (again in {span(call.not_before - now)} after {code}, {tried})"
            return f"{call.name} ({call.status}, published {times(call.publishes)}, {tried})"
        case CallStatus.UNKNOWN:
            return f"{call.name} (unknown: its worker died, and it must not run twice)"
        case CallStatus.AWAITING_CHILD:
            child = Run.objects.filter(parent_call_id=call.pk).values_list("pk", flat=True).first()
            return f"{call.name} (run {child})"
        case _:
            until = f", until {call.deadline:%Y-%m-%d %H:%M} UTC" if call.deadline else ""
            return f"{call.name} ({call.get_status_display().lower()}{until})"


def _ended(run: Run) -> Explanation:
    said = f"{run.status} ({run.stop_reason}) after {run.steps} step{'' if run.steps == 1 else 's'}"
    if run.error:
        said += ": " + ": ".join(str(run.error[key]) for key in ("code", "message") if run.error.get(key))
    if run.status == Status.COMPLETED:
        return Explanation(said)
    first = {
        StopReason.CONFIGURATION: "correct what it says, restart the agents workers, then go on with a new run: ",
        StopReason.POISON: "look into the logs of its workers for what killed them, then go on with a new run: ",
        StopReason.MODEL_ERROR: "when the model service is well, go on with a new run: ",
    }.get(StopReason(run.stop_reason), "go on with a new run: ")
    if run.error and run.error.get("code") == "auth":
        first = "give the agents workers a key that is valid, restart them, then go on with a new run: "
    return Explanation(said, first + in_shell(run, "resume()"))


def _last_error(run: Run) -> str:
    payload = Event.objects.filter(run=run, type="error").order_by("-seq").values_list("payload", flat=True).first()
    error = (payload or {}).get("error") or {}
    return ": ".join(str(error[key]) for key in ("code", "message") if error.get(key))


# --- who is there ---------------------------------------------------------------------------------------------------


def _floor(now: datetime) -> datetime:
    """The moment before which the last beat of a worker that lives cannot be."""
    return now - settings().presence_ttl


def present(kind: str, now: datetime) -> bool:
    return Worker.objects.filter(kind=kind, gone_at=None, beat_at__gt=_floor(now)).exists()


def swept(now: datetime) -> bool:
    """Whether somebody sweeps: a control worker is present, or a worker of more queues than one holds the sweep's lock."""
    if present("control", now):
        return True
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND granted"
            " AND (classid::bigint << 32) | objid::bigint = %s"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))",
            [SWEEP_LOCK],
        )
        row = cursor.fetchone()
    return bool(row and row[0])


def _unswept(stuck: bool) -> str:
    return "; no control worker is present to see to it" if stuck else ""


def _workers(ids: Iterable[UUID | None], now: datetime) -> dict[UUID | None, tuple[str, bool]]:
    """Return (name, present) by id of those that have a row and were not found dead."""
    rows = Worker.objects.filter(pk__in=list(ids), gone_at=None).values_list("pk", "name", "beat_at")
    return {id: (name, beat_at > _floor(now)) for id, name, beat_at in rows}


# --- commands -------------------------------------------------------------------------------------------------------


def start(kind: str, *queues_of_tools: str) -> str:
    """Return the command that starts a worker of this kind, which consumes the queues of single tools too."""
    queues = {"agents": settings().agents_queue, "tools": settings().tools_queue, "control": settings().control_queue}
    consumed = ",".join([queues[kind], *queues_of_tools])
    return f"{celery()} -A {current_app.main or 'PROJECT'} worker -Q {consumed} {POOLS[kind]} -n {kind}@%h"


def celery() -> str:
    """Return how Celery is called here: by its name where the shell finds it, else by this Python."""
    return "celery" if shutil.which("celery") else f"{sys.executable} -m celery"


def in_shell(run: Run, method: str) -> str:
    """Return the command that calls a method of this run."""
    return f"manage.py shell -c \"from runs import Run; Run.objects.get(pk='{run.pk}').{method}\""


def _violated(run: Run) -> str:
    return f"this breaks an invariant, see: manage.py check_runs --run {run.pk}"


# --- words ----------------------------------------------------------------------------------------------------------


def span(time: timedelta) -> str:
    """Return a length of time with its two leading units: `0.3 s`, `12 s`, `3 min 5 s`, `2 h 5 min`, `4 d 1 h`."""
    total = max(time.total_seconds(), 0.0)
    if total < 10:
        return f"{total:.1f} s"
    seconds = round(total)
    if seconds < 120:
        return f"{seconds} s"
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            rest = seconds % size // part
            return f"{seconds // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    raise AssertionError(seconds)


def times(count: int) -> str:
    """Return `once`, `twice`, `3 times`."""
    words: dict[int, str] = {0: "not yet", 1: "once", 2: "twice"}
    return words.get(count, f"{count} times")
