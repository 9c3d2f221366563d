"""What a run's page shows below its fields: a few rows of each kind, however many the run has.

Messages, steps and tool calls are paged together, `STEPS` steps a page; events by their seq. Lists show the rest.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from django.contrib.admin import AdminSite
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html_join
from django.utils.safestring import SafeString, mark_safe

from runs import access, compaction
from runs.admin import parts
from runs.admin.followed import Section, task_link
from runs.models import Event, Leg, Run, Step, Usage
from threads.admin import marks
from threads.models import Message
from tools.models import ToolAttempt, ToolCall

if TYPE_CHECKING:
    from runs.admin.runs import RunAdmin

STEPS = 10  # a page
ROWS = 100  # of one kind in the steps of a page, or of legs and usage
EVENTS = 50
AFTER = 200  # later runs of a thread among which a run's successors are looked for


def sections(page: RunAdmin, request: HttpRequest, run: Run) -> list[Section]:
    site = page.admin_site
    last = _number(request, "steps_to", run.steps + 1)
    first = max(last - STEPS + 1, 1)
    turn = {
        "older": f"?steps_to={first - 1}#messages" if first > 1 else "",
        "newer": f"?steps_to={last + STEPS}#messages" if last < run.steps else "",
        "note": f"Steps {first} to {min(last, run.steps)} of {run.steps}." if run.steps > STEPS else "",
    }
    found = []
    if page.sees(request, Message):
        found.append(_messages(site, request, run, first, last, turn))
    if page.sees(request, ToolCall):
        found.append(_calls(site, request, run, first, last, turn, attempts=page.sees(request, ToolAttempt)))
    if page.sees(request, Leg):
        found.append(_legs(site, run))
    if page.sees(request, Step):
        found.append(_steps(site, run, first, last, turn))
    if page.sees(request, Usage):
        found.append(_usage(site, run))
    if page.sees(request, Event):
        found.append(_events(site, request, run))
    return found


def _template(name: str) -> str:
    return f"admin/longhaul_runs/run/{name}.html"


def _number(request: HttpRequest, parameter: str, default: int) -> int:
    try:
        return min(max(int(request.GET[parameter]), 1), 2**31 - STEPS - 1)
    except (KeyError, ValueError):
        return default


def _messages(site: AdminSite, request: HttpRequest, run: Run, first: int, last: int, turn: dict[str, str]) -> Section:
    rows = access.visible(Message, request.user).filter(run_id=run.pk)
    given = list(rows.filter(step=None).order_by("pk")[:ROWS]) if first == 1 else []
    said = list(rows.filter(step__range=(first, last)).order_by("step", "position", "pk")[:ROWS])
    ordered = sorted([*given, *said], key=lambda each: (each.position is None, each.position or 0))
    shown = [parts.shown(site, each) for each in ordered]
    return Section("Messages", _template("messages"), shown, marks.list_url(site, Message, run=run.pk), **turn)


def _calls(
    site: AdminSite, request: HttpRequest, run: Run, first: int, last: int, turn: dict[str, str], *, attempts: bool
) -> Section:
    calls = access.visible(ToolCall, request.user).filter(run_id=run.pk, step__range=(first, last))
    calls = calls.order_by("step", "index")[:ROWS]
    ids = [call.pk for call in calls]
    tried: dict[Any, list[dict[str, Any]]] = {}
    if attempts:
        rows = list(ToolAttempt.objects.filter(call_id__in=ids).order_by("call_id", "number")[: 5 * ROWS])
        tried = {
            call: [attempt_shown(each) for each in group]
            for call, group in groupby(rows, key=lambda each: each.call_id)
        }
    visible = access.visible(Run, request.user).filter(parent_call_id__in=ids)
    children = dict(visible.values_list("parent_call_id", "pk"))
    shown = [
        {
            "name": marks.link(site, ToolCall, call.pk, call.name),
            "step": call.step,
            "state": marks.state(call.outcome or call.status),
            "arguments": marks.pretty(call.arguments),
            "result": marks.pretty(call.result) if call.result is not None or not call.error else "",
            "stored": contents(site, call) if call.stored else "",
            "error": marks.pretty(call.error) if call.error else "",
            "attempts": tried.get(call.pk, []),
            "child": marks.link(site, Run, children[call.pk]) if call.pk in children else "",
        }
        for call in calls
    ]
    return Section("Tool calls", _template("calls"), shown, marks.list_url(site, ToolCall, run=run.pk), **turn)


def contents(site: AdminSite, call: ToolCall) -> str:
    """Return links to what of a call's result stands apart: its whole, and its files."""
    if not call.stored:
        return marks.NOTHING
    return format_html_join(
        SafeString("<br>"),
        '<a href="{}">{}</a> ({}, {} bytes)',
        (
            (
                reverse("admin:longhaul_tools_toolcall_content", args=(call.pk, each["number"]), current_app=site.name),
                each["name"],
                each["content_type"],
                f"{each['size']:,}",
            )
            for each in call.stored
        ),
    )


def attempt_shown(attempt: ToolAttempt) -> dict[str, Any]:
    return {
        "number": attempt.number,
        "outcome": attempt.outcome or "open",
        "worker": attempt.worker or str(attempt.worker_id),
        "task": task_link(attempt.task_id),
        "started": marks.moment(attempt.started_at),
        "took": marks.took(attempt.started_at, attempt.ended_at),
        "next": marks.moment(attempt.retry_at),
        "error": marks.pretty(attempt.error) if attempt.error else "",
    }


def _legs(site: AdminSite, run: Run) -> Section:
    legs = list(Leg.objects.filter(run=run).order_by("-number")[: ROWS + 1])
    shown = [
        {
            "number": marks.link(site, Leg, leg.pk, leg.number),
            "reason": leg.reason or "open",
            "worker": leg.worker,
            "epoch": leg.epoch,
            "task": task_link(leg.task_id),
            "started": marks.moment(leg.started_at),
            "took": marks.took(leg.started_at, leg.ended_at),
        }
        for leg in reversed(legs[:ROWS])
    ]
    note = f"The last {ROWS} legs." if len(legs) > ROWS else ""
    return Section("Legs", _template("legs"), shown, marks.list_url(site, Leg, run=run.pk), note)


def _steps(site: AdminSite, run: Run, first: int, last: int, turn: dict[str, str]) -> Section:
    rows = Step.objects.filter(run=run, number__range=(first, last)).order_by("number")
    shown = [
        {
            "number": marks.link(site, Step, step.pk, step.number),
            "model": step.model,
            "tools": ", ".join(step.tool_names),
            "message": marks.link(site, Message, step.message_id),
            "at": marks.moment(step.created_at),
        }
        for step in rows.defer("instructions", "options", "context")
    ]
    return Section("Steps", _template("steps"), shown, marks.list_url(site, Step, run=run.pk), **turn)


def _usage(site: AdminSite, run: Run) -> Section:
    # By the index of the run: the order of the primary key would lead through the table.
    rows = sorted(Usage.objects.filter(run=run)[:ROWS], key=lambda each: each.pk)
    shown = [
        {
            "step": each.step,
            "model": each.model,
            "input": f"{each.input_tokens:,}",
            "output": f"{each.output_tokens:,}",
            "cached": f"{each.cached_tokens:,}",
            "reasoning": f"{each.reasoning_tokens:,}",
            "cost": marks.NOTHING if each.cost is None else f"{each.cost:f}",
            "discarded": "discarded" if each.discarded else "",
        }
        for each in rows
    ]
    note = f"{ROWS} of its model calls." if len(rows) == ROWS else ""
    return Section("Usage", _template("usage"), shown, marks.list_url(site, Usage, run=run.pk), note)


def _events(site: AdminSite, request: HttpRequest, run: Run) -> Section:
    last = _number(request, "events_to", run.last_seq)
    rows = list(Event.objects.filter(run=run, seq__lte=last).order_by("-seq")[:EVENTS])
    shown = [
        {
            "seq": marks.link(site, Event, event.pk, event.seq),
            "type": event.type,
            "at": marks.moment(event.at),
            "payload": marks.compact(compaction.told(event.payload, 0)),
        }
        for event in reversed(rows)
    ]
    first = rows[-1].seq if rows else 1
    note = f"{first:,} to {rows[0].seq:,} of {run.last_seq:,}." if rows else ""
    if run.events_removed_through:
        note += f" Events 1 to {run.events_removed_through:,} were removed (EVENT_RETENTION_DAYS)."
    return Section(
        "Events",
        _template("events"),
        shown,
        marks.list_url(site, Event, run=run.pk),
        note.strip(),
        older=f"?events_to={first - 1}#events" if first > run.events_removed_through + 1 else "",
        newer=f"?events_to={last + EVENTS}#events" if rows and rows[0].seq < run.last_seq else "",
    )


def successors(site: AdminSite, run: Run) -> str:
    """Return links to the runs that went on where this one ended, among the next runs of its thread."""
    next_ones = Run.objects.filter(thread=run.thread_id, pk__gt=run.pk).order_by("pk")
    later = list(next_ones.values_list("pk", flat=True)[:AFTER])
    found = Run.objects.filter(pk__in=later, parent=run).order_by("pk").only("pk", "origin", "status")[:20]
    rows = [(marks.link(site, Run, each.pk), each.origin, each.status) for each in found]
    return format_html_join(mark_safe("<br>"), "{} ({}, {})", rows) or marks.NOTHING
