"""Runs in the admin: nothing of them is edited, for the protocol owns them; they can be cancelled."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import path, reverse

from runs import agents, explain, flower
from runs.admin import cancel, run_page
from runs.admin.agents import agents_page
from runs.admin.followed import Followed, Section, is_page
from runs.models import LIVE, OCCUPYING, TERMINAL, Run, Status
from threads.admin import marks
from threads.admin.listing import (
    WINDOW,
    Before,
    Choices,
    Created,
    Filter,
    belonging,
    by_id,
    by_owner,
    choosing,
    in_window,
    latest,
)
from threads.models import Message, Thread
from tools.models import ToolCall

ORIGINS = ("start", "resume", "retry", "fork", "child", "handoff")


class ByStatus(Filter):
    """Live runs are found by the indexes that the protocol has for them, unless very many live; completed ones, which are
    most, in the list's window."""

    title = "status"
    parameter_name = "status"

    def __init__(self, request: HttpRequest, params: dict[str, Any], model: type[Run], model_admin: Any) -> None:
        super().__init__(request, params, model, model_admin)
        self._request: Any = request
        self._rows = model_admin.get_queryset

    def lookups(self, request: HttpRequest, model_admin: Any) -> Choices:
        return [("live", "live (any of the next five)"), *((each, each.replace("_", " ")) for each in Status.values)]

    @property
    def indexed(self) -> bool:  # type: ignore[override] # it depends on the value
        if self.value() in (Status.FAILED, Status.CANCELLED):
            return True
        return self.value() in (*LIVE, "live") and self._live() is not None

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        value = self.value()
        if value is None:
            return queryset
        if value not in (*LIVE, "live"):
            return queryset.filter(status=value)
        live = self._live()
        if live is not None:
            return queryset.filter(pk__in=[pk for pk, status in live if value in ("live", status)])
        return queryset.filter(status__in=LIVE if value == "live" else [value])

    def _live(self) -> list[tuple[UUID, str]] | None:
        """Return (id, status) of the live runs; None when there are WINDOW of them. Read once a request.

        In the order of their partial indexes, so that the planner cannot choose to walk all runs for them.
        """
        if not hasattr(self._request, "longhaul_live"):
            rows = self._rows(self._request).values_list("pk", "status")
            occupying = list(rows.filter(status__in=OCCUPYING).order_by("thread_id")[:WINDOW])
            held = list(rows.filter(status=Status.HELD).order_by("thread_id", "pk")[:WINDOW])
            live = [*occupying, *held]
            self._request.longhaul_live = live if len(live) < WINDOW else None
        found: list[tuple[UUID, str]] | None = self._request.longhaul_live
        return found


def _agents() -> list[tuple[str, str]]:
    return [(name, name) for name in agents.registry.all()]


@admin.register(Run)
class RunAdmin(Followed):
    list_display = ("id", "state", "agent", "thread_link", "owner", "steps", "created", "took")
    list_select_related = ("thread", "owner")
    list_filter = (
        belonging("thread"),
        Before,
        Created,
        ByStatus,
        choosing("agent", _agents),
        choosing("origin", [(each, each) for each in ORIGINS]),
    )
    search_fields = ("id",)
    search_help_text = (
        "By id of the run, its thread or its Celery task (the beginning is enough), the owner's username,"
        " or a part of the agent's name or of the thread's title."
    )
    actions = ("cancel_selected",)
    change_form_template = "admin/longhaul_runs/run/change_form.html"
    fieldsets = (
        (None, {"fields": ("status_", "why", "mend", "error_", "output_")}),
        ("What runs", {"fields": ("agent", "thread_link", "owner", "origin", "parent_link", "input_", "successors")}),
        ("So far", {"fields": ("progress", "tokens", "cost", "events_", "lost")}),
        ("Times", {"fields": ("created", "queued", "started", "finished_", "deadline_", "took")}),
        (
            "As asked for",
            {"classes": ("collapse",), "fields": ("overrides_", "metadata_", "busy", "priority", "save_mode")},
        ),
        (
            "Claim and dispatch",
            {
                "classes": ("collapse",),
                "fields": (
                    *("epoch", "holder", "leg_deadline_", "linger_until_", "dispatch_seq", "publishes"),
                    *("next_publish_at_", "not_before_", "model_tries", "bad_calls", "idempotency_key"),
                ),
            },
        ),
    )

    # --- the list

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows = super().get_queryset(request)
        if is_page(request):
            return rows.select_related("thread", "owner")
        return rows.defer("output", "error", "overrides", "metadata")

    def readings(self, rows: QuerySet[Any], term: str) -> Any:
        yield by_id(rows, "pk", term)
        yield by_id(rows, "thread_id", term)
        yield self._of_task(rows, term)
        yield by_owner(rows, term)
        yield in_window(rows, agent__icontains=term)
        threads = in_window(Thread.objects.all(), title__icontains=term)
        yield latest(rows.filter(thread_id__in=threads)) if threads else []

    def _of_task(self, rows: QuerySet[Any], term: str) -> list[Any]:
        match flower.row_of(term):
            case ("run", run_id):
                return latest(rows.filter(pk=run_id))
            case ("tool_call", call_id):
                of_call = list(ToolCall.objects.filter(pk=call_id).values_list("run_id", flat=True))
                return latest(rows.filter(pk__in=of_call))
            case _:
                return []

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> Any:
        url = reverse("admin:longhaul_runs_agents", current_app=self.admin_site.name)
        return super().changelist_view(request, {"longhaul_tools": [(url, "Agents")], **(extra_context or {})})

    # --- the page

    def sections(self, request: HttpRequest, row: Run) -> list[Section]:
        return run_page.sections(self, request, row)

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **options: Any) -> HttpResponse:
        run = context.get("original")
        if run is not None and not run.finished and cancel.allowed(request, run):
            context["cancel_url"] = self._url("cancel", run.pk)
        return super().render_change_form(request, context, *args, **options)

    @admin.display(description="status")
    def status_(self, run: Run) -> str:
        said = marks.state(run.status)
        return said if run.stop_reason in ("", run.status) else said + marks.code(run.stop_reason)

    @admin.display(description="why")
    def why(self, run: Run) -> str:
        return self._explained(run).why

    @admin.display(description="what mends it")
    def mend(self, run: Run) -> str:
        told = self._explained(run).mend
        return marks.code(told) if told else marks.NOTHING

    def _explained(self, run: Any) -> explain.Explanation:
        told: explain.Explanation | None = getattr(run, "_explained", None)
        if told is None:
            told = run._explained = explain.explain(run)  # once a page
        return told

    @admin.display(description="error")
    def error_(self, run: Run) -> str:
        return marks.pretty(run.error)

    @admin.display(description="output")
    def output_(self, run: Run) -> str:
        return marks.text(run.output) if isinstance(run.output, str) else marks.pretty(run.output)

    @admin.display(description="parent")
    def parent_link(self, run: Run) -> str:
        return marks.link(self.admin_site, Run, run.parent_id)

    @admin.display(description="went on in")
    def successors(self, run: Run) -> str:
        return run_page.successors(self.admin_site, run)

    @admin.display(description="input")
    def input_(self, run: Run) -> str:
        return marks.link(self.admin_site, Message, run.input_message_id)

    @admin.display(description="steps")
    def progress(self, run: Run) -> str:
        return f"{run.steps} in {run.legs} leg{'' if run.legs == 1 else 's'}"

    @admin.display(description="tokens in, out")
    def tokens(self, run: Run) -> str:
        return f"{run.input_tokens:,}, {run.output_tokens:,}"

    @admin.display(description="events")
    def events_(self, run: Run) -> str:
        return f"{run.last_seq:,}"

    @admin.display(description="took")
    def took(self, run: Run) -> str:
        return marks.took(run.created_at, run.finished_at)

    @admin.display(description="queued")
    def queued(self, run: Run) -> str:
        return marks.moment(run.queued_at)

    @admin.display(description="finished")
    def finished_(self, run: Run) -> str:
        return marks.moment(run.finished_at)

    @admin.display(description="deadline")
    def deadline_(self, run: Run) -> str:
        return marks.moment(run.deadline)

    @admin.display(description="leg deadline")
    def leg_deadline_(self, run: Run) -> str:
        return marks.moment(run.leg_deadline)

    @admin.display(description="linger until")
    def linger_until_(self, run: Run) -> str:
        return marks.moment(run.linger_until)

    @admin.display(description="next publish")
    def next_publish_at_(self, run: Run) -> str:
        return marks.moment(run.next_publish_at)

    @admin.display(description="not before")
    def not_before_(self, run: Run) -> str:
        return marks.moment(run.not_before)

    @admin.display(description="overrides")
    def overrides_(self, run: Run) -> str:
        return marks.pretty(run.overrides)

    @admin.display(description="metadata")
    def metadata_(self, run: Run) -> str:
        return marks.pretty(run.metadata)

    # --- cancelling

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return cancel.allowed(request)

    @admin.action(description="Cancel the selected runs", permissions=["cancel"])
    def cancel_selected(self, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        """Ask, then cancel. However many are selected, at most AT_ONCE live ones of them are taken."""
        form = cancel.ReasonForm(request.POST if "confirmed" in request.POST else None)
        chosen = queryset.select_related("thread", "owner")
        # In the order of the live runs' own indexes: among 100,000 runs a few that live are not looked for one by one.
        occupying = chosen.filter(status__in=OCCUPYING).order_by("thread_id")[: cancel.AT_ONCE + 1]
        held = chosen.filter(status=Status.HELD).order_by("thread_id", "pk")[: cancel.AT_ONCE + 1]
        live = [*occupying, *held]
        # Parents first, as the protocol locks them.
        taken = sorted(live[: cancel.AT_ONCE], key=lambda run: (run.depth, run.pk))
        across = request.POST.get("select_across") == "1"
        ended = [] if across else list(chosen.filter(status__in=TERMINAL)[: cancel.AT_ONCE])
        if "confirmed" in request.POST and form.is_valid():
            cancel.cancel(request, self, [*taken, *ended], form.cleaned_data["reason"])
            return None
        if not live:
            self.message_user(request, "These runs have all ended: they are unchanged.", messages.WARNING)
            return None
        return cancel.ask(
            request,
            self,
            taken,
            form,
            back=request.get_full_path(),
            action="cancel_selected",
            unchanged=len(ended),
            more=len(live) > cancel.AT_ONCE,
        )

    def cancel_view(self, request: HttpRequest, run_id: UUID) -> HttpResponse:
        """Ask (GET), then cancel (POST) one run."""
        run = self.get_queryset(request).select_related("thread", "owner").filter(pk=run_id).first()
        if run is None or not self.has_view_permission(request, run):
            raise Http404
        if not cancel.allowed(request, run):
            raise PermissionDenied
        page = self._url("change", run.pk)
        form = cancel.ReasonForm(request.POST if request.method == "POST" else None)
        if request.method == "POST" and form.is_valid():
            cancel.cancel(request, self, [run], form.cleaned_data["reason"])
            return HttpResponseRedirect(page)
        if run.finished:
            self.message_user(request, f"The run has ended ({run.status}): it is unchanged.", messages.WARNING)
            return HttpResponseRedirect(page)
        return cancel.ask(request, self, [run], form, back=page)

    # --- URLs

    def get_urls(self) -> list[Any]:
        view = self.admin_site.admin_view
        return [
            path("agents/", view(self.agents_view), name="longhaul_runs_agents"),
            path("task/<str:task_id>/", view(self.task_view), name="longhaul_runs_task"),
            path("<uuid:run_id>/cancel/", view(self.cancel_view), name="longhaul_runs_run_cancel"),
            *super().get_urls(),
        ]

    def agents_view(self, request: HttpRequest) -> HttpResponse:
        if not self.has_view_permission(request):
            raise PermissionDenied
        return agents_page(request, self)

    def task_view(self, request: HttpRequest, task_id: str) -> HttpResponse:
        """Redirect from a task's id, as Flower shows it, to the page of its run or tool call."""
        found = flower.row_of(task_id)
        if found is None:
            raise Http404("No run and no tool call has such a task.")
        kind, pk = found
        model = Run if kind == "run" else ToolCall
        if not self.sees(request, model):
            raise PermissionDenied
        name = f"admin:{model._meta.app_label}_{model._meta.model_name}_change"
        return HttpResponseRedirect(reverse(name, args=(pk,), current_app=self.admin_site.name))

    def _url(self, page: str, pk: UUID) -> str:
        return reverse(f"admin:longhaul_runs_run_{page}", args=(pk,), current_app=self.admin_site.name)
