"""Workers in Django's admin. Tool calls show something of a run, so they stand in `runs.admin`."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import DurationField, ExpressionWrapper, F, QuerySet
from django.http import HttpRequest

from threads.admin import marks
from threads.admin.listing import Before, Created, Listed, by_id, choosing, in_window
from threads.clock import Now
from tools.models import Worker
from tools.presence import FRESH


def _there(rows: QuerySet[Any], state: str) -> QuerySet[Any]:
    return rows.filter(gone_at=None) if state == "present" else rows.exclude(gone_at=None)


@admin.register(Worker)
class WorkerAdmin(Listed):
    """One row a life of a worker process."""

    list_display = ("name", "kind", "state", "host", "pid", "beat", "started", "gone")
    list_filter = (
        choosing("state", [("present", "Not gone"), ("gone", "Gone")], narrow=_there),
        choosing("kind", [("agents", "agents"), ("tools", "tools"), ("control", "control")]),
        Created,
        Before,
    )
    search_fields = ("name",)
    search_help_text = "By id or the beginning of it, or a part of the name."
    fields = (
        "id",
        "name",
        "kind",
        "state",
        "host",
        "pid",
        "parent_",
        "beat",
        "started",
        "gone",
        "draining",
        "lock_key",
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        since = ExpressionWrapper(Now() - F("beat_at"), output_field=DurationField())
        rows: QuerySet[Any] = super().get_queryset(request)
        annotated: QuerySet[Any] = rows.annotate(since_beat=since)
        return annotated

    def readings(self, rows: QuerySet[Any], term: str) -> Any:
        yield by_id(rows, "pk", term)
        yield in_window(rows, name__icontains=term)

    @admin.display(description="state")
    def state(self, worker: Any) -> str:
        if worker.gone_at is not None:
            return marks.state("gone")
        if worker.since_beat > FRESH:
            return marks.state("silent", title=f"no beat for {marks.span(worker.since_beat)}")
        return marks.state("draining" if worker.draining else "present")

    @admin.display(description="last beat")
    def beat(self, worker: Any) -> str:
        return f"{marks.span(worker.since_beat)} ago"

    @admin.display(description="started")
    def started(self, worker: Worker) -> str:
        return marks.moment(worker.started_at)

    @admin.display(description="gone")
    def gone(self, worker: Worker) -> str:
        return marks.moment(worker.gone_at)

    @admin.display(description="parent")
    def parent_(self, worker: Worker) -> str:
        return marks.link(self.admin_site, Worker, worker.parent_id)
