"""Does the event log tell what the tables hold? Rebuilds runs from their events alone (`runs.replay`), and compares.

    report = verify(run)                 # report.differences is empty
    for report in verify_all(): ...      # every run of the database, in bounded batches

Compared are: the status, stop reason, output, error, counts of steps and legs, last seq and usage of the run; every message of
it and every one that was saved by hand into it (role, step, status, content, client_id, order); every tool call with its
attempts; legs; rows of usage; what is pending. A batch is read in one snapshot, so a run in flight gives no false alarm.

Allowed, and told in `since`, is what may happen after the log has ended: a message that was deleted, and one that a later
run marked `superseded` or `rolled_back`. The log of an ended run cannot know of it. What the log never tells is not
compared: metadata of messages, and the content of discarded ones. Where a retention setting has removed the log, or a part
of it (`Report.removed`), what the terminal event says is compared, and no more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.db.models import Q

from runs.events import RESUME_GAP
from runs.invariants import snapshot
from runs.models import TERMINAL, Event, Leg, Run, Status, Step, Usage
from runs.replay import Replay, money
from threads.models import Message, MessageStatus
from tools.models import ToolAttempt, ToolCall, Worker

BATCH = 100  # runs that are read in one snapshot
CHUNK = 2000  # events that are in memory at once
LATER = (MessageStatus.SUPERSEDED, MessageStatus.ROLLED_BACK)


@dataclass(frozen=True, slots=True)
class Difference:
    """`what` differs: what the log tells, and what the table holds."""

    what: str
    log: Any
    table: Any

    def __str__(self) -> str:
        if self.log is None and self.table is None:  # the log contradicts itself
            return self.what
        return f"{self.what}: the log tells {_said(self.log)}, the table holds {_said(self.table)}"


@dataclass(slots=True)
class Report:
    """The outcome for one run. `since` are allowed changes that came after what the log tells.

    `removed`: events up to this seq were removed by a retention setting, so little could be compared.
    """

    run: UUID
    events: int = 0
    removed: int = 0
    differences: list[Difference] = field(default_factory=list)
    since: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """`{"run", "differences": [{"what", "log", "table"}], "events", "since": [...]}`, and "removed" where it is not 0."""
        differences = [{"what": each.what, "log": each.log, "table": each.table} for each in self.differences]
        found = {"run": str(self.run), "differences": differences, "events": self.events, "since": self.since}
        return found | ({"removed": self.removed} if self.removed else {})

    def compare(self, what: str, log: Any, table: Any) -> None:
        if log != table:
            self.differences.append(Difference(what, log, table))


@dataclass(slots=True)
class _Rows:
    """What the tables hold of one run."""

    messages: list[Message] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    attempts: dict[UUID, list[ToolAttempt]] = field(default_factory=lambda: defaultdict(list))
    legs: list[Leg] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    usage: list[Usage] = field(default_factory=list)


def verify(run: Run | UUID) -> Report:
    """Compare the log of a run with its rows. Raises Run.DoesNotExist."""
    id = run.pk if isinstance(run, Run) else run
    with snapshot():
        return _verify_batch([Run.objects.get(pk=id)])[0]


def verify_all(batch: int = BATCH) -> Iterator[Report]:
    """Compare every run, the oldest first, `batch` of them in a snapshot. Runs that come meanwhile may be left out."""
    after = None
    while True:
        with snapshot():
            runs = Run.objects.order_by("pk")
            runs = runs if after is None else runs.filter(pk__gt=after)
            some = list(runs[:batch])
            reports = _verify_batch(some)
        yield from reports
        if len(some) < batch:
            return
        after = some[-1].pk


def _verify_batch(runs: Sequence[Run]) -> list[Report]:
    told = _told(runs)
    rows, workers, named = _rows(runs, told)
    reports = []
    for run in runs:
        report = Report(run.pk, told[run.pk].events, run.events_removed_through)
        (_compare_end if report.removed else _compare)(report, run, told[run.pk], rows[run.pk], workers, named)
        reports.append(report)
    return reports


def _told(runs: Sequence[Run]) -> dict[UUID, Replay]:
    """Fold each run's log; of one that is not whole the last event alone."""
    told = {run.pk: Replay() for run in runs}
    wanted = Q(run__in=[run.pk for run in runs if not run.events_removed_through])
    for run in runs:
        if run.events_removed_through:
            told[run.pk].apply({"type": RESUME_GAP, "to": run.last_seq - 1})
            wanted |= Q(run=run, seq=run.last_seq)
    events = Event.objects.filter(wanted).order_by("run_id", "seq").values_list("run_id", "seq", "type", "payload")
    for id, seq, type, payload in events.iterator(CHUNK):
        told[id].apply({**payload, "seq": seq, "type": type})
    return told


def _rows(
    runs: Sequence[Run], told: Mapping[UUID, Replay]
) -> tuple[dict[UUID, _Rows], dict[UUID, str], dict[str, Message]]:
    """Return the rows by run, the names of workers, and all the messages that the logs name by their id."""
    ids = [run.pk for run in runs]
    rows = {id: _Rows() for id in ids}
    fields = ("id", "run_id", "thread_id", "role", "step", "status", "content", "client_id", "position")
    for message in Message.objects.filter(run_id__in=ids).only(*fields).order_by("position", "id"):
        rows[message.run_id].messages.append(message)  # type: ignore[index]
    named = {str(message.pk): message for each in rows.values() for message in each.messages}
    others = [id for each in told.values() for id in each.messages if id not in named and _is_id(id)]
    named |= {str(message.pk): message for message in Message.objects.filter(pk__in=others).only(*fields)}
    for call in ToolCall.objects.filter(run_id__in=ids).order_by("step", "index"):
        rows[call.run_id].calls.append(call)
    owner = {call.pk: call.run_id for each in rows.values() for call in each.calls}
    attempts = list(ToolAttempt.objects.filter(call__in=list(owner)).order_by("number"))
    for attempt in attempts:
        rows[owner[attempt.call_id]].attempts[attempt.call_id].append(attempt)
    workers = dict(Worker.objects.filter(pk__in={each.worker_id for each in attempts}).values_list("pk", "name"))
    for leg in Leg.objects.filter(run__in=ids).order_by("number"):
        rows[leg.run_id].legs.append(leg)
    for run, number in Step.objects.filter(run__in=ids).order_by("number").values_list("run_id", "number"):
        rows[run].steps.append(number)
    for usage in Usage.objects.filter(run__in=ids).order_by("id"):
        rows[usage.run_id].usage.append(usage)
    return rows, workers, named


def _compare_end(report: Report, run: Run, told: Replay, *_: Any) -> None:
    report.differences += [Difference(fault, None, None) for fault in told.faults]
    _end(report, run, told)
    _total(report, told, _sums(run.input_tokens, run.output_tokens, run.cost))


def _end(report: Report, run: Run, told: Replay) -> None:
    report.compare("last seq", told.seq, run.last_seq)
    report.compare("stop_reason", told.stop_reason, run.stop_reason)
    report.compare("output", told.output, run.output)
    report.compare("error", told.error, run.error)


def _compare(
    report: Report, run: Run, told: Replay, rows: _Rows, workers: Mapping[UUID, str], named: Mapping[str, Message]
) -> None:
    for fault in told.faults:
        report.differences.append(Difference(fault, None, None))
    # A lingering leg claims again, and may use its time up before it opens a turn: that no event tells.
    unseen = run.status == Status.RUNNING and told.status in (Status.QUEUED, Status.RUNNING)
    if not unseen:
        report.compare("status", told.status, run.status)
    _end(report, run, told)
    report.compare("steps", told.steps, run.steps)
    report.compare("rows of steps", list(range(1, told.steps + 1)), rows.steps)
    _messages(report, run, told, rows, named)
    _calls(report, told, rows, workers)
    _legs(report, run, told, rows)
    _usage(report, run, told, rows)


def _messages(report: Report, run: Run, told: Replay, rows: _Rows, named: Mapping[str, Message]) -> None:
    place = 0
    for said in told.messages.values():
        message = named.get(said.id)
        what = f"message {said.id} ({said.role})"
        if message is None:
            if said.status == "pending":
                report.compare(what, "pending", None)
            else:
                report.since.append(f"{what} was deleted")
            continue
        report.compare(f"{what} role", said.role, message.role)
        report.compare(f"{what} step", said.step, message.step)
        if message.status in LATER and said.status in ("completed", "partial") and run.status in TERMINAL:
            report.since.append(f"{what} was marked {message.status}")
        else:
            report.compare(f"{what} status", said.status, message.status)
        if said.content is not None:
            report.compare(f"{what} content", said.content, message.content)
        if said.client_id is not None:
            report.compare(f"{what} client_id", said.client_id, message.client_id)
        if message.position is not None:
            if message.position <= place:
                report.compare(f"{what} place in the thread", f"after {place}", message.position)
            place = max(place, message.position)
    for message in rows.messages:
        # What waits for a held run has no place yet, and the run's log begins to tell of it when it gets one.
        if str(message.pk) not in told.messages and not (
            message.status == MessageStatus.WAITING and run.status == Status.HELD
        ):
            report.compare(f"message {message.pk} ({message.role})", None, message.status)
    pending = [str(message.pk) for message in rows.messages if message.status == MessageStatus.PENDING]
    report.compare("pending messages", [each.id for each in told.pending], pending)
    held = None if run.pending_message_id is None else str(run.pending_message_id)
    report.compare("pending_message_id", next((each.id for each in told.pending), None), held)


def _calls(report: Report, told: Replay, rows: _Rows, workers: Mapping[UUID, str]) -> None:
    stored = {str(call.pk): call for call in rows.calls}
    report.compare("tool calls, in order", list(told.calls), list(stored))
    for said in told.calls.values():
        call = stored.get(said.id)
        if call is None:
            continue
        what = f"tool call {said.id} ({said.name})"
        report.compare(f"{what} name", said.name, call.name)
        report.compare(f"{what} message", said.message, str(call.message_id))
        report.compare(f"{what} step and index", [said.step, said.index], [call.step, call.index])
        report.compare(f"{what} arguments", said.arguments, call.arguments)
        report.compare(f"{what} status", said.status, call.status)
        report.compare(f"{what} attempt", said.attempt, call.attempt)
        report.compare(f"{what} outcome", said.outcome, call.outcome)
        if said.status == "settled":
            report.compare(f"{what} result", said.result, call.result)
            report.compare(f"{what} contents apart", said.stored, call.stored)
            report.compare(f"{what} error", said.error, call.error)
        if not told.removed:  # else what it said last may be among that
            kept = call.progress and {each: call.progress.get(each) for each in ("fraction", "note")}
            report.compare(f"{what} progress", said.progress, kept)
        attempts = rows.attempts.get(call.pk, [])
        report.compare(
            f"{what} attempts",
            [[each.number, each.worker] for each in said.attempts],
            [[each.number, workers.get(each.worker_id, _worker(said, each.number))] for each in attempts],
        )
        for tried, row in zip(said.attempts, attempts, strict=False):
            # A call whose last attempt was lost settles as failed: the log tells the call's outcome.
            lost = tried.outcome == "failed" and row.outcome in ("lost", "given_back")
            if not lost:
                report.compare(f"{what} attempt {row.number} outcome", tried.outcome, row.outcome)


def _worker(said: Any, number: int) -> str:
    """The name that the log tells, for the row of a worker may be gone."""
    return next((str(each.worker) for each in said.attempts if each.number == number), "")


def _legs(report: Report, run: Run, told: Replay, rows: _Rows) -> None:
    report.compare("legs", len(told.legs), run.legs)
    report.compare(
        "legs, how they ended",
        [[each.number, each.worker, each.reason] for each in told.legs.values()],
        [[each.number, each.worker, each.reason] for each in rows.legs],
    )
    for leg in rows.legs:
        said = told.legs.get(leg.number)
        if said is not None and said.reason:  # the epoch of an open one rises with claims that no event tells
            report.compare(f"leg {leg.number} epoch", said.epoch, leg.epoch)


def _usage(report: Report, run: Run, told: Replay, rows: _Rows) -> None:
    table = _sums(run.input_tokens, run.output_tokens, run.cost)
    report.compare("usage", _sums(told.input_tokens, told.output_tokens, told.cost), table)
    _total(report, told, table)
    report.compare(
        "rows of usage",
        [
            [u.message, u.model, u.input_tokens, u.output_tokens, u.cached_tokens, u.reasoning_tokens, _cost(u.cost),
             u.discarded]
            for u in told.usage
        ],
        [
            [str(u.message_id), u.model, u.input_tokens, u.output_tokens, u.cached_tokens, u.reasoning_tokens,
             _cost(u.cost), u.discarded]
            for u in rows.usage
        ],
    )  # fmt: skip


def _total(report: Report, told: Replay, table: Sequence[Any]) -> None:
    if told.total is not None:
        total = told.total
        cost = money(total.get("cost")) or Decimal(0)
        said = _sums(total.get("input_tokens", 0), total.get("output_tokens", 0), cost)
        report.compare("usage that the terminal event tells", said, table)


def _sums(tokens_in: int, tokens_out: int, cost: Decimal) -> list[Any]:
    return [tokens_in, tokens_out, str(cost.normalize() + 0)]


def _cost(cost: Decimal | None) -> str | None:
    return None if cost is None else str(cost.normalize() + 0)


def _is_id(id: str) -> bool:
    try:
        UUID(id)
    except ValueError:
        return False
    return True


def _said(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 300 else text[:297] + "..."
