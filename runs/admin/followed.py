"""Lists and pages of rows that follow a run or a thread: who sees what is asked of `runs.access`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.contrib import admin
from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponse

from runs import access, flower
from runs.models import Run
from threads.admin import marks
from threads.admin.listing import Listed
from threads.models import Thread


@dataclass(frozen=True)
class Section:
    """A part of a page below the row's own fields. `more` is the URL of a list of all its rows."""

    title: str
    template: str
    rows: Sequence[Any]
    more: str = ""
    note: str = ""
    older: str = ""
    newer: str = ""


class Followed(Listed):
    """A page whose rows the user may see by the policy, beside the model's permission."""

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return access.visible(self.model, request.user)

    def sections(self, request: HttpRequest, row: Any) -> list[Section]:
        return []

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **options: Any) -> HttpResponse:
        row = context.get("original")
        context["longhaul_sections"] = self.sections(request, row) if row is not None else []
        return super().render_change_form(request, context, *args, **options)

    def sees(self, request: HttpRequest, model: type[Model]) -> bool:
        """Return whether the user may view rows of another model, as its own page asks."""
        registered = self.admin_site._registry.get(model)
        return registered is not None and registered.has_view_permission(request)

    # --- columns that several have

    @admin.display(description="run")
    def run_link(self, row: Any) -> str:
        return marks.link(self.admin_site, Run, row.run_id)

    @admin.display(description="thread")
    def thread_link(self, row: Any) -> str:
        return marks.link(self.admin_site, Thread, row.thread_id, row.thread.title or "untitled")

    @admin.display(description="created")
    def created(self, row: Any) -> str:
        return marks.moment(row.created_at)

    @admin.display(description="started")
    def started(self, row: Any) -> str:
        return marks.moment(row.started_at)

    @admin.display(description="ended")
    def ended(self, row: Any) -> str:
        return marks.moment(row.ended_at)

    @admin.display(description="status")
    def state(self, row: Any) -> str:
        return marks.state(row.status)

    @admin.display(description="task")
    def task(self, row: Any) -> str:
        return task_link(row.task_id)


def is_page(request: HttpRequest) -> bool:
    """Return whether one row's page is asked for, and no list."""
    match = request.resolver_match
    return match is not None and "object_id" in match.kwargs


def task_link(task_id: str) -> str:
    return marks.outside(flower.task_url(task_id), task_id)
