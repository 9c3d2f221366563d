"""What a run leaves behind, in the admin: legs, steps, events, usage. Read, never edited."""

from __future__ import annotations

from typing import Any, get_args

from django.contrib import admin
from django.db.models import QuerySet, TextField
from django.db.models.functions import Cast, Left
from django.http import HttpRequest
from django.utils.html import format_html_join
from django.utils.safestring import SafeString

from runs import compaction, flower
from runs.admin.followed import Followed, is_page
from runs.http.events import FORMS, LegEnd
from runs.models import Event, Leg, Step, Usage
from threads.admin import marks
from threads.admin.listing import Before, Created, belonging, by_id, choosing, in_window
from threads.models import Message
from tools.models import Worker

SHOWN = 50  # messages of a step's context


class OfRun(Followed):
    """Rows of a run, found by its id."""

    search_fields = ("id",)
    search_help_text = "By id of the row, its run, or the Celery task of a leg of it; the beginning of an id is enough."

    def readings(self, rows: QuerySet[Any], term: str) -> Any:
        yield by_id(rows, "pk", term)
        yield by_id(rows, "run_id", self.run_named(term))

    @staticmethod
    def run_named(term: str) -> str:
        """Return the id of the run that a task's id leads to, or the term itself."""
        task = flower.row_of(term)
        return str(task[1]) if task is not None and task[0] == "run" else term


@admin.register(Leg)
class LegAdmin(OfRun):
    list_display = ("id", "run_link", "number", "why_ended", "worker", "task", "started", "ended", "took")
    list_filter = (belonging("run"), Before, Created, choosing("reason", [(each, each) for each in get_args(LegEnd)]))
    within = {"run": ("-number",)}
    fields = ("id", "run_link", "number", "why_ended", "worker_link", "epoch", "task", "started", "ended", "took")

    def readings(self, rows: QuerySet[Any], term: str) -> Any:
        yield from super().readings(rows, term)
        yield in_window(rows, worker__icontains=term)

    @admin.display(description="ended by")
    def why_ended(self, leg: Leg) -> str:
        return marks.state(leg.reason or "open")

    @admin.display(description="worker")
    def worker_link(self, leg: Leg) -> str:
        return marks.link(self.admin_site, Worker, leg.worker_id, leg.worker)

    @admin.display(description="took")
    def took(self, leg: Leg) -> str:
        return marks.took(leg.started_at, leg.ended_at)


@admin.register(Step)
class StepAdmin(OfRun):
    list_display = ("id", "run_link", "number", "model", "tools", "message_link", "created")
    list_filter = (belonging("run"), Before, Created)
    within = {"run": ("-number",)}
    fieldsets = (
        (None, {"fields": ("run_link", "number", "model", "message_link", "created")}),
        ("What the model was sent", {"fields": ("instructions_", "shown", "tools", "options_", "schema_digest")}),
        ("Fence", {"classes": ("collapse",), "fields": ("id", "leg_link", "epoch", "context_")}),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows: QuerySet[Any] = super().get_queryset(request)
        return rows.select_related("run") if is_page(request) else rows.defer("instructions", "options", "context")

    @admin.display(description="tools")
    def tools(self, step: Step) -> str:
        return ", ".join(step.tool_names) or marks.NOTHING

    @admin.display(description="message")
    def message_link(self, step: Step) -> str:
        return marks.link(self.admin_site, Message, step.message_id)

    @admin.display(description="leg")
    def leg_link(self, step: Step) -> str:
        return marks.link(self.admin_site, Leg, step.leg_id)

    @admin.display(description="instructions")
    def instructions_(self, step: Step) -> str:
        return marks.text(step.instructions) if step.instructions else marks.NOTHING

    @admin.display(description="messages shown")
    def shown(self, step: Step) -> str:
        rows = step.shown().values_list("pk", "role", "position")[: SHOWN + 1]
        links = [(marks.link(self.admin_site, Message, pk, f"{role} {place}"),) for pk, role, place in rows]
        told = format_html_join(", ", "{}", links[:SHOWN])
        return told + SafeString(" and more") if len(links) > SHOWN else told

    @admin.display(description="options")
    def options_(self, step: Step) -> str:
        return marks.pretty(step.asked())

    @admin.display(description="context")
    def context_(self, step: Step) -> str:
        return marks.pretty(step.context)


@admin.register(Event)
class EventAdmin(OfRun):
    list_display = ("id", "run_link", "seq", "type", "begins", "at_")
    list_filter = (belonging("run"), Before, choosing("type", [(each, each) for each in FORMS]))
    within = {"run": ("-seq",)}
    search_help_text = "By id of the run or of the Celery task of a leg of it; the beginning of an id is enough."
    fields = ("id", "run_link", "seq", "type", "at_", "epoch", "message_link", "ordinal", "payload_")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows: QuerySet[Any] = super().get_queryset(request)
        if is_page(request):
            return rows
        annotated: QuerySet[Any] = rows.defer("payload").annotate(first=Left(Cast("payload", TextField()), 140))
        return annotated

    def readings(self, rows: QuerySet[Any], term: str) -> Any:
        if term.isascii() and term.isdigit() and len(term) < 19:
            yield list(rows.filter(pk=int(term)).values_list("pk", flat=True))
        yield by_id(rows, "run_id", self.run_named(term))

    @admin.display(description="payload")
    def begins(self, event: Any) -> str:
        return marks.code(event.first)

    @admin.display(description="at")
    def at_(self, event: Event) -> str:
        return marks.moment(event.at)

    @admin.display(description="message")
    def message_link(self, event: Event) -> str:
        return marks.link(self.admin_site, Message, event.message_id)

    @admin.display(description="payload")
    def payload_(self, event: Event) -> str:
        return marks.pretty(compaction.told(event.payload, 0))


@admin.register(Usage)
class UsageAdmin(OfRun):
    list_display = ("id", "run_link", "step", "model", "input_tokens", "output_tokens", "cost", "discarded", "created")
    list_filter = (belonging("run"), Before, Created)
    fields = (
        *("id", "run_link", "step", "epoch", "message_link", "model"),
        *("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens", "cost", "discarded", "created"),
    )

    @admin.display(description="message")
    def message_link(self, usage: Usage) -> str:
        return marks.link(self.admin_site, Message, usage.message_id)
