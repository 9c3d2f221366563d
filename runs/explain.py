"""Why a run stands where it stands, in a sentence for a person, and the command that would mend it.

Reads rows only, and takes the time from the database. A run moves while it is explained, so nothing here is more than a look.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property, reduce
from operator import or_
from textwrap import shorten
from typing import Any, NamedTuple
from uuid import UUID

import orjson
from celery import current_app
from django.db.models import Q

from runs.conf import settings
from runs.models import OCCUPYING, Leave, Leg, Run, Status, StopReason
from runs.sweep import SOMEBODY_SWEEPS, SWEEP_LOCK, SWEPT_WITHIN
from threads import clock, database
from threads.models import Message
from tools.models import CallStatus, Pause, ToolCall, Worker

SHOWN = 5  # calls
# A message that nobody took was sent again by now, where there is a control worker.
UNHEARD = timedelta(seconds=3)

# What brought a run into the queue: the reasons of `run.queued`.
QUEUED_BY = {
    "start": "new",
    "tools": "its tool calls are settled",
    "budget": "its last leg used up its time",
    "limited": "its model's limits leave no room",
    "retry": "the model call failed",
    "lost": "its worker died",
    "drained": "its worker shut down",
    "released": "the run before it has ended",
}
# The runs that go on where another one ended, which they name as their parent.
GOES_ON = Q(origin__in=["resume", "retry", "steer"]) | Q(origin="start", busy__in=["interrupt", "rollback"])
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
    return explain_all([run])[run.pk]


def explain_all(runs: Iterable[Run]) -> dict[UUID, Explanation]:
    """Explain runs as the given rows have them, by id. The number of queries does not grow with theirs."""
    runs = list(runs)
    facts = Facts(runs)
    return {run.pk: _explain(run, facts) for run in runs}


class Facts:
    """What explaining some runs takes, each fact read at most once for all of them, and only when it is asked for."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = list(runs)
        if held := [run for run in self.runs if run.status == Status.HELD]:
            self.runs += Run.objects.filter(thread_id__in={run.thread_id for run in held}, status__in=OCCUPYING)

    def _of(self, *statuses: Status) -> list[Run]:
        return [run for run in self.runs if run.status in statuses]

    @cached_property
    def now(self) -> datetime:
        return clock.now()

    @cached_property
    def swept(self) -> bool:
        return swept(self.now)

    @cached_property
    def present(self) -> frozenset[str]:
        """The kinds of workers of which one is present."""
        alive = Worker.objects.filter(gone_at=None, beat_at__gt=_floor(self.now))
        return frozenset(alive.values_list("kind", flat=True).distinct())

    @cached_property
    def occupants(self) -> dict[UUID, Run]:
        return {run.thread_id: run for run in self._of(*OCCUPYING)}

    @cached_property
    def ahead(self) -> dict[UUID, list[datetime]]:
        """When the held runs of each thread were made."""
        found: dict[UUID, list[datetime]] = {}
        held = Run.objects.filter(thread_id__in={run.thread_id for run in self._of(Status.HELD)}, status=Status.HELD)
        for thread, made in held.values_list("thread_id", "created_at"):
            found.setdefault(thread, []).append(made)
        return found

    @cached_property
    def reasons(self) -> dict[UUID, str]:
        """Why each queued run is queued."""
        queued = self._of(Status.QUEUED)
        # Nobody need be asked about a run that was queued as it was made and not again: all that are just started.
        new = {run.pk: "start" for run in queued if run.dispatch_seq == 1 and run.queued_at == run.created_at}
        told = _last_events([run.pk for run in queued if run.pk not in new], "run.queued")
        return {**new, **{run: str(event.payload.get("reason", "")) for run, event in told.items()}}

    @cached_property
    def errors(self) -> dict[UUID, str]:
        """What the model said last, of runs that ask it again."""
        told = _last_events([run.pk for run in self._of(Status.QUEUED) if run.not_before is not None], "error")
        return {run: _error_in_words(event.payload.get("error") or {}) for run, event in told.items()}

    @cached_property
    def leaves(self) -> dict[UUID, Leave]:
        """The place of each queued run that waits in the line of its model."""
        timed = [run.pk for run in self._of(Status.QUEUED) if run.not_before is not None]
        return (
            {leave.run_id: leave for leave in Leave.objects.filter(run_id__in=timed, message_id=None)} if timed else {}
        )

    @cached_property
    def pauses(self) -> dict[str, Pause]:
        """The pauses of the models that some wait for."""
        keys = {leave.key for leave in self.leaves.values()}
        return {pause.key: pause for pause in Pause.objects.filter(key__in=keys, until__gt=self.now)} if keys else {}

    @cached_property
    def legs(self) -> dict[UUID, Leg]:
        running = [run.pk for run in self._of(Status.RUNNING)]
        return {leg.run_id: leg for leg in Leg.objects.filter(run_id__in=running, ended_at=None)}

    @cached_property
    def speaking(self) -> dict[UUID, Message]:
        """The pending messages, by id."""
        ids = [run.pending_message_id for run in self._of(Status.RUNNING) if run.pending_message_id]
        return Message.objects.in_bulk(ids) if ids else {}

    @cached_property
    def heard(self) -> dict[UUID, datetime]:
        """When each run that streams was last heard: its last delta, when that belongs to the pending message."""
        speaking = {run.pk: run.pending_message_id for run in self._of(Status.RUNNING) if run.pending_message_id}
        told = _last_events(list(speaking), "%.delta")
        return {run: event.at for run, event in told.items() if event.message == speaking[run]}

    @cached_property
    def calls(self) -> dict[UUID, list[ToolCall]]:
        """The calls of each waiting run's last step, in order."""
        found: dict[UUID, list[ToolCall]] = {}
        waiting = self._of(Status.WAITING, Status.REQUIRES_ACTION)
        if waiting:
            steps = reduce(or_, (Q(run_id=run.pk, step=run.steps) for run in waiting))
            for call in ToolCall.objects.filter(steps).order_by("index"):
                found.setdefault(call.run_id, []).append(call)
        return found

    @cached_property
    def waits(self) -> dict[UUID, Wait]:
        """What the calls that are told, and wait for their turn, wait for."""
        told = [call for calls in self.calls.values() for call in _open(calls)[:SHOWN] if call.turn is not None]
        rows = database.rows_of(
            "SELECT call_id, kind, key, used, bound, seconds, until, ahead FROM longhaul_calls_waits(%s::uuid[], %s::int)",
            ([call.pk for call in told], settings().max_dispatched_calls),
        ) if told else []  # fmt: skip
        return {row[0]: Wait(*row[1:]) for row in rows}

    @cached_property
    def turns(self) -> dict[UUID, Wait]:
        """What the runs that wait for their turn wait for."""
        parked = [run.pk for run in self._of(Status.QUEUED) if run.turn is not None]
        rows = database.rows_of(
            "SELECT run_id, kind, key, used, bound, seconds, until, ahead FROM longhaul_runs_waits(%s::uuid[], %s::int)",
            (parked, settings().max_dispatched),
        ) if parked else []  # fmt: skip
        return {row[0]: Wait(*row[1:]) for row in rows}

    @cached_property
    def successors(self) -> dict[UUID, UUID]:
        """The last run that goes on after each failed or cancelled one."""
        ended = [run.pk for run in self._of(Status.FAILED, Status.CANCELLED)]
        after = Run.objects.filter(GOES_ON, parent_id__in=ended).order_by("pk")
        return {parent: run for parent, run in after.values_list("parent_id", "pk") if parent is not None}

    @cached_property
    def workers(self) -> dict[UUID | None, tuple[str, bool]]:
        """(name, present) by id of those that hold something here, have a row and were not found dead."""
        ids = {run.holder for run in self._of(Status.RUNNING)}
        ids |= {call.holder for calls in self.calls.values() for call in calls}
        return _workers([id for id in ids if id is not None], self.now)


class Wait(NamedTuple):
    """What a parked call or run waits for, as longhaul_calls_waits and longhaul_runs_waits tell it."""

    kind: str
    key: str | None
    used: int
    bound: int
    seconds: float | None
    until: datetime | None
    ahead: int

    def in_words(self, queue: str, what: str = "calls") -> str:
        of, _, name = (self.key or "").partition(":")
        whose = f"of {name}" if of in ("tool", "agent") else "of its owner"
        before = f", {'1,000 or more' if self.ahead >= 1000 else self.ahead} before it" if self.ahead else ""
        at_work = "run" if what == "calls" else "are at work"
        match self.kind:
            case "most":
                return f"waits for its turn: {self.used} of {self.bound} {what} {whose} {at_work}{before}"
            case "rate":
                unit = {1: "s", 60: "min", 3600: "h"}.get(int(self.seconds or 0), "d")
                return f"waits for the rate {whose}, {self.bound}/{unit}{before}"
            case "pause":
                return f"waits until {self.until:%H:%M:%S} UTC, for {what} {whose} are paused{before}"
            case _ if self.used >= self.bound:
                return f"waits for room: {self.used} {what} of {queue} are out{before}"
        return f"waits for its turn, which has come{before}"


class LastEvent(NamedTuple):
    at: datetime
    message: UUID | None
    payload: dict[str, Any]


def _last_events(runs: list[UUID], type: str) -> dict[UUID, LastEvent]:
    """Return each run's last event of a type (a pattern), found from the end of its log."""
    if not runs:
        return {}
    rows = database.rows_of(
        "SELECT r.id, e.at, e.message_id, e.payload"
        " FROM unnest(%s::uuid[]) AS r(id) CROSS JOIN LATERAL (SELECT at, message_id, payload"
        " FROM longhaul_runs_event WHERE run_id = r.id AND type LIKE %s ORDER BY seq DESC LIMIT 1) AS e",
        (runs, type),
    )
    return {run: LastEvent(at, message, orjson.loads(payload)) for run, at, message, payload in rows}


def _explain(run: Run, facts: Facts) -> Explanation:
    match run.status:
        case Status.QUEUED:
            return _queued(run, facts)
        case Status.HELD:
            return _held(run, facts)
        case Status.RUNNING:
            return _running(run, facts)
        case Status.WAITING | Status.REQUIRES_ACTION:
            return _waiting(run, facts)
        case _:
            return _ended(run, facts)


def _queued(run: Run, facts: Facts) -> Explanation:
    now = facts.now
    reason = facts.reasons.get(run.pk, "")
    leave = facts.leaves.get(run.pk)
    # Of a model that failed there is more to say, until it may be asked again.
    its_turn = reason == "limited" or (run.not_before is not None and run.not_before <= now)
    if leave is not None and its_turn and now < (run.next_publish_at or now):
        return _limited(run, leave, facts)
    since = now - (run.queued_at or run.created_at)
    said = f"queued for {span(since)} ({QUEUED_BY.get(reason, reason) or 'new'})"
    if run.not_before is not None and run.not_before > now:
        error = facts.errors.get(run.pk, "")
        said += f", to be claimed in {span(run.not_before - now)}"
        if reason == "retry":
            said += f": the model is asked again, try {run.model_tries + 1} of {settings().model_tries}"
            said += f", after {error}" if error else ""
        return Explanation(said)
    if run.linger_until is not None and run.linger_until > now:
        return Explanation(f"{said}; the leg that lingers takes it")
    queue = run.lane.partition("\n")[0]
    if run.turn is not None:
        wait = facts.turns.get(run.pk)  # None: it was let out meanwhile
        said += f", {wait.in_words(queue or settings().agents_queue, 'runs') if wait else 'waits for its turn'}"
        if since < UNHEARD:
            return Explanation(said)
        if "agents" not in facts.present:
            return Explanation(f"{said}; no agents worker is present", start("agents", queue), True)
        stuck = not facts.swept
        return Explanation(said + _unswept(stuck), start("control") if stuck else None, stuck)
    due = run.next_publish_at
    said += f", published {times(run.publishes)}"
    said += "" if due is None else f", again in {span(due - now)}" if due > now else f", again since {span(now - due)}"
    if due is None:
        return Explanation(f"{said}, and never again", _violated(run), True)
    if since < UNHEARD or "agents" in facts.present:
        overdue = now - due > UNHEARD and not facts.swept
        return Explanation(said + _unswept(overdue), start("control") if overdue else None, overdue)
    return Explanation(f"{said}; no agents worker is present", start("agents", queue), True)


def _limited(run: Run, leave: Leave, facts: Facts) -> Explanation:
    """It waits in the line of its model. The time is about when: who is before it, and what others use, may change it."""
    now = facts.now
    said = f"waits for {leave.key.removeprefix('model:')}: "
    pause = facts.pauses.get(leave.key)
    if pause is not None:
        said += f"its service is left alone for {span(pause.until - now)} more ({pause.reason})"
        if run.model_tries:
            said += f", try {run.model_tries + 1} of {settings().model_tries}"
    else:
        said += leave.reason
        due = run.not_before
        said += f", next in {span(due - now)}" if due is not None and due > now else ", its turn is near"
    return Explanation(said + _unswept(not facts.swept), None if facts.swept else start("control"), not facts.swept)


def _held(run: Run, facts: Facts) -> Explanation:
    occupant = facts.occupants.get(run.thread_id)
    if occupant is None:
        return Explanation("held, though its thread is free", _violated(run), True)
    before = sum(made < run.created_at for made in facts.ahead.get(run.thread_id, ()))
    since = span(facts.now - run.created_at)
    said = f"held for {since} behind run {occupant.pk} of {occupant.agent} ({occupant.status})"
    if before:
        said += f" and {before} more"
    theirs = _explain(occupant, facts)
    return Explanation(said, theirs.mend if theirs.stuck else None, theirs.stuck)


def _running(run: Run, facts: Facts) -> Explanation:
    now = facts.now
    leg = facts.legs.get(run.pk)
    where = f"running on {leg.worker} in leg {leg.number} for {span(now - leg.started_at)}" if leg else "running"
    message = facts.speaking.get(run.pending_message_id) if run.pending_message_id else None
    if message is None:
        doing = f"prepares step {run.steps + 1}"
    else:
        last = facts.heard.get(run.pk)
        asked = f"the model speaks step {message.step} since {span(now - message.created_at)}"
        doing = asked + (f", last heard {span(now - last)} ago" if last else ", nothing heard yet")
    worker = facts.workers.get(run.holder) if run.holder else None
    if worker is not None and worker[1]:
        return Explanation(f"{where}: {doing}")
    late = run.leg_deadline is not None and run.leg_deadline < now
    gone = "its worker is gone" if worker is None else "its worker is silent"
    if late:
        gone += f" and its time was up {span(now - (run.leg_deadline or now))} ago"
    stuck = not facts.swept
    said = f"{where}: {doing}; {gone}{_unswept(stuck) or ', and the sweep takes it over'}"
    return Explanation(said, start("control") if stuck else None, stuck)


def _waiting(run: Run, facts: Facts) -> Explanation:
    now = facts.now
    calls = facts.calls.get(run.pk, [])
    still = _open(calls)
    if not still:
        fresh = _fresh(run)
        if fresh.status != run.status:
            return explain(fresh)  # it was joined meanwhile
        return Explanation(f"{run.status}, though every call is settled", _violated(run), True)
    workers = facts.workers
    told = [_call(call, facts, now) for call in still[:SHOWN]]
    more = f", and {len(still) - SHOWN} more" if len(still) > SHOWN else ""
    verb = "waiting for" if run.status == Status.WAITING else "waiting for people at"
    said = f"{verb} {len(still)} of {len(calls)} tool call{'' if len(calls) == 1 else 's'}: {', '.join(told)}{more}"
    ready = [call for call in still if call.status in (CallStatus.REQUESTED, CallStatus.RETRYING)]
    unheard = [call for call in ready if _due_since(call, now) > UNHEARD or call.publishes > 2]
    parked = [call for call in ready if call.turn is not None and now - call.created_at > UNHEARD]
    if (unheard or parked) and "tools" not in facts.present:
        own = sorted({call.queue for call in [*unheard, *parked] if call.queue})
        return Explanation(f"{said}; no tools worker is present", start("tools", *own), True)
    lost = any(call.status == CallStatus.RUNNING and not workers.get(call.holder, ("", False))[1] for call in still)
    if (unheard or lost or parked) and not facts.swept:
        return Explanation(said + _unswept(True), start("control"), True)
    # Last, for a person's answer helps nothing while the calls beside it stand still.
    if unknown := [call for call in still if call.status == CallStatus.UNKNOWN]:
        call = unknown[0]
        return Explanation(
            said,
            f"see whether {call.name} took effect, then say so: POST /api/tool-calls/{call.pk}/result, or /error"
            f" (retryable: true runs it again), or {_of_call(call)}.succeed(result), .fail(message),"
            f" .fail(message, retryable=True). To give up: {in_shell(run, 'cancel()')}",
        )
    return Explanation(said)


def _open(calls: list[ToolCall]) -> list[ToolCall]:
    return [call for call in calls if call.status != CallStatus.SETTLED]


def _due_since(call: ToolCall, now: datetime) -> timedelta:
    return now - call.next_publish_at if call.next_publish_at else timedelta(0)


def _call(call: ToolCall, facts: Facts, now: datetime) -> str:
    workers = facts.workers
    tried = f"attempt {call.attempt} of {call.max_attempts}"
    match call.status:
        case CallStatus.RUNNING:
            name, present = workers.get(call.holder, ("a worker that is gone", False))
            silent = "" if present or call.holder not in workers else ", which is silent"
            since = span(now - call.claimed_at) if call.claimed_at else "?"
            return f"{call.name} (running on {name}{silent}, {since}, {tried}{_progress(call)})"
        case CallStatus.REQUESTED | CallStatus.RETRYING:
            if call.not_before is not None and call.not_before > now:
                code = (call.error or {}).get("code", "it failed")
                return f"{call.name} (again in {span(call.not_before - now)} after {code}, {tried})"
            if call.turn is not None and (wait := facts.waits.get(call.pk)) is not None:
                return f"{call.name} ({wait.in_words(call.queue or settings().tools_queue)}, {tried})"
            return f"{call.name} ({call.status}, published {times(call.publishes)}, {tried})"
        case CallStatus.UNKNOWN:
            return f"{call.name} (unknown: its worker died, and it must not run twice)"
        case CallStatus.AWAITING_CHILD:
            child = Run.objects.filter(parent_call_id=call.pk).values_list("pk", flat=True).first()
            return f"{call.name} (run {child})"
        case _:
            until = f", until {call.deadline:%Y-%m-%d %H:%M} UTC" if call.deadline else ""
            return f"{call.name} ({call.get_status_display().lower()}{until})"


def _progress(call: ToolCall) -> str:
    """How far the current attempt says that it is: `, 40%: part 2 of 5`."""
    told = call.progress or {}
    if told.get("attempt") != call.attempt:
        return ""
    fraction, note = told.get("fraction"), shorten(str(told.get("note") or ""), 80, placeholder="...")
    said = [each for each in ("" if fraction is None else f"{fraction:.0%}", note) if each]
    return f", {': '.join(said)}" if said else ""


def _ended(run: Run, facts: Facts) -> Explanation:
    said = f"{run.status} ({run.stop_reason}) after {run.steps} step{'' if run.steps == 1 else 's'}"
    if run.error:
        said += ": " + _error_in_words(run.error)
    if run.status == Status.COMPLETED:
        return Explanation(said)
    if run.pk in facts.successors:
        return Explanation(f"{said}; it went on in run {facts.successors[run.pk]}")
    first = {
        StopReason.CONFIGURATION: "correct what it says, restart the agents workers, then go on with a new run: ",
        StopReason.POISON: "look into the logs of its workers for what killed them, then go on with a new run: ",
        StopReason.TOOL_UNKNOWN: "see whether the tool took effect, for the model is told that nobody knows, then go on with a new run: ",
        StopReason.MODEL_ERROR: "when the model service is well, go on with a new run: ",
    }.get(StopReason(run.stop_reason), "go on with a new run: ")
    if run.error and run.error.get("code") == "auth":
        first = "give the agents workers a key that is valid, restart them, then go on with a new run: "
    return Explanation(said, first + in_shell(run, "resume()"))


def _error_in_words(error: Mapping[str, Any]) -> str:
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
    return bool(database.rows_of(SOMEBODY_SWEEPS, (SWEEP_LOCK, SWEPT_WITHIN))[0][0])


def _unswept(stuck: bool) -> str:
    return "; no control worker is present to see to it" if stuck else ""


def _workers(ids: Iterable[UUID | None], now: datetime) -> dict[UUID | None, tuple[str, bool]]:
    """Return (name, present) by id of those that have a row and were not found dead."""
    rows = Worker.objects.filter(pk__in=list(ids), gone_at=None).values_list("pk", "name", "beat_at")
    return {id: (name, beat_at > _floor(now)) for id, name, beat_at in rows}


# --- commands -------------------------------------------------------------------------------------------------------


def start(kind: str, *own: str) -> str:
    """Return the command that starts a worker of this kind, which consumes the queues of single tools or agents too ("": none)."""
    queues = {"agents": settings().agents_queue, "tools": settings().tools_queue, "control": settings().control_queue}
    consumed = ",".join([queues[kind], *filter(None, own)])
    return f"{celery()} -A {current_app.main or 'PROJECT'} worker -Q {consumed} {POOLS[kind]} -n {kind}@%h"


def celery() -> str:
    """Return how Celery is called here: by its name where the shell finds it, else by this Python."""
    return "celery" if shutil.which("celery") else f"{sys.executable} -m celery"


def in_shell(run: Run, method: str) -> str:
    """Return the command that calls a method of this run."""
    return f"manage.py shell -c \"from runs import Run; Run.objects.get(pk='{run.pk}').{method}\""


def _of_call(call: ToolCall) -> str:
    return f"ToolCall.objects.get(pk='{call.pk}')"


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
