"""Tool calls and their attempts in the admin: read, never edited."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet, TextField
from django.db.models.functions import Cast, Left
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import path, reverse

from runs import access, flower
from runs.admin import answer
from runs.admin.followed import Followed, Section, is_page
from runs.admin.run_page import attempt_shown, contents
from runs.http.download import download
from runs.models import Run
from threads.admin import marks
from threads.admin.listing import Before, Created, belonging, by_id, choosing, in_window, latest
from threads.models import Message
from tools.models import CallStatus, Outcome, ToolAttempt, ToolCall, Worker

ATTEMPTS = 100  # on the page of a call


@admin.register(ToolCall)
class ToolCallAdmin(Followed):
    change_form_template = "admin/longhaul_tools/toolcall/change_form.html"
    list_display = ("id", "name", "state", "outcome_", "begins", "run_link", "step", "tries", "created", "took")
    list_filter = (
        belonging("run", "run_id"),
        Before,
        Created,
        choosing("status", [(each, each.replace("_", " ")) for each in CallStatus.values]),
        choosing("outcome", [(each, each) for each in Outcome.values]),
    )
    within = {"run": ("-step", "-index")}
    search_fields = ("name",)
    search_help_text = (
        "By id of the call, its run or its Celery task, or the beginning of it, or a part of the tool's name."
    )
    fieldsets = (
        (None, {"fields": ("name", "state", "outcome_", "arguments_", "result_", "stored_", "error_")}),
        ("Belongs to", {"fields": ("id", "run_link", "message_link", "step", "index", "child")}),
        (
            "Tries",
            {
                "fields": (
                    "tries",
                    "rules",
                    "timeout",
                    "created",
                    "claimed",
                    "settled",
                    "took",
                    "timeout_at_",
                    "progress_",
                )
            },
        ),
        (
            "Claim and dispatch",
            {
                "classes": ("collapse",),
                "fields": ("holder", "queue", "publishes", "next_publish_at_", "not_before_", "idempotency_key"),
            },
        ),
        (
            "Waiting for people",
            {"classes": ("collapse",), "fields": ("deferred", "deadline_", "assignee")},
        ),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows: QuerySet[Any] = super().get_queryset(request)
        if is_page(request):
            return rows
        given = Left(Cast("arguments", TextField()), 100)
        annotated: QuerySet[Any] = rows.defer("arguments", "result", "stored", "error", "progress").annotate(
            given=given
        )
        return annotated

    def readings(self, rows: QuerySet[Any], term: str) -> Any:
        yield by_id(rows, "pk", term)
        yield by_id(rows, "run_id", term)
        task = flower.row_of(term)
        yield latest(rows.filter(pk=task[1])) if task is not None and task[0] == "tool_call" else []
        yield in_window(rows, name__icontains=term)

    def sections(self, request: HttpRequest, row: ToolCall) -> list[Section]:
        if not self.sees(request, ToolAttempt):
            return []
        rows = list(ToolAttempt.objects.filter(call=row).order_by("-number")[:ATTEMPTS])
        shown = [attempt_shown(each) for each in reversed(rows)]
        more = marks.list_url(self.admin_site, ToolAttempt, call=row.pk)
        return [Section("Attempts", "admin/longhaul_tools/attempts.html", shown, more)]

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **options: Any) -> Any:
        call = context.get("original")
        if call is not None:
            seen = access.visible(Run, request.user).filter(parent_call_id=call.pk)
            call._child = seen.values_list("pk", flat=True).first()
            if answer.open_to(request, call):
                context["answer_url"] = self._url("answer", call.pk)
        return super().render_change_form(request, context, *args, **options)

    # --- what people say of a call whose worker died

    def get_urls(self) -> list[Any]:
        view, content = self.admin_site.admin_view(self.answer_view), self.admin_site.admin_view(self.content_view)
        return [
            path("<uuid:call_id>/answer/", view, name="longhaul_tools_toolcall_answer"),
            path("<uuid:call_id>/content/<int:number>/", content, name="longhaul_tools_toolcall_content"),
            *super().get_urls(),
        ]

    def content_view(self, request: HttpRequest, call_id: UUID, number: int) -> HttpResponse:
        """Return what of a call's result stands apart, as an attachment."""
        call = self.get_queryset(request).filter(pk=call_id).first()
        if call is None or not self.has_view_permission(request, call):
            raise Http404
        try:
            return download(call.content(number))
        except LookupError:
            raise Http404 from None

    def answer_view(self, request: HttpRequest, call_id: UUID) -> HttpResponse:
        """Ask (GET), then say (POST) what became of an unknown call."""
        call = self.get_queryset(request).filter(pk=call_id).first()
        if call is None or not self.has_view_permission(request, call):
            raise Http404
        if not answer.allowed(request, call):
            raise PermissionDenied
        page = self._url("change", call.pk)
        form = answer.AnswerForm(request.POST if request.method == "POST" else None)
        if call.status != CallStatus.UNKNOWN:
            self.message_user(request, f"The call waits for no answer: it is {call.status}.", messages.WARNING)
            return HttpResponseRedirect(page)
        if request.method == "POST" and form.is_valid():
            answer.answer(request, self, call, form)
            return HttpResponseRedirect(page)
        return answer.ask(request, self, call, form, back=page)

    def _url(self, page: str, pk: UUID) -> str:
        return reverse(f"admin:longhaul_tools_toolcall_{page}", args=(pk,), current_app=self.admin_site.name)

    @admin.display(description="outcome")
    def outcome_(self, call: ToolCall) -> str:
        return marks.state(call.outcome) if call.outcome else marks.NOTHING

    @admin.display(description="arguments")
    def begins(self, call: Any) -> str:
        return marks.code(call.given)

    @admin.display(description="arguments")
    def arguments_(self, call: ToolCall) -> str:
        return marks.pretty(call.arguments)

    @admin.display(description="result")
    def result_(self, call: ToolCall) -> str:
        return marks.pretty(call.result)

    @admin.display(description="kept apart")
    def stored_(self, call: ToolCall) -> str:
        return contents(self.admin_site, call)

    @admin.display(description="error")
    def error_(self, call: ToolCall) -> str:
        return marks.pretty(call.error)

    @admin.display(description="progress")
    def progress_(self, call: ToolCall) -> str:
        return marks.pretty(call.progress)

    @admin.display(description="message")
    def message_link(self, call: ToolCall) -> str:
        return marks.link(self.admin_site, Message, call.message_id)

    @admin.display(description="child run")
    def child(self, call: Any) -> str:
        return marks.link(self.admin_site, Run, getattr(call, "_child", None))

    @admin.display(description="attempt")
    def tries(self, call: ToolCall) -> str:
        return f"{call.attempt} of {call.max_attempts}"

    @admin.display(description="rules")
    def rules(self, call: ToolCall) -> str:
        if call.atomic:
            return "atomic: its effect is there exactly when it is settled"
        if call.idempotent is None:
            return "runs again when its worker is surely gone"
        return "idempotent: may run again at once" if call.idempotent else "starts at most once"

    @admin.display(description="claimed")
    def claimed(self, call: ToolCall) -> str:
        return marks.moment(call.claimed_at)

    @admin.display(description="settled")
    def settled(self, call: ToolCall) -> str:
        return marks.moment(call.settled_at)

    @admin.display(description="took")
    def took(self, call: ToolCall) -> str:
        return marks.took(call.created_at, call.settled_at)

    @admin.display(description="timeout at")
    def timeout_at_(self, call: ToolCall) -> str:
        return marks.moment(call.timeout_at)

    @admin.display(description="next publish")
    def next_publish_at_(self, call: ToolCall) -> str:
        return marks.moment(call.next_publish_at)

    @admin.display(description="not before")
    def not_before_(self, call: ToolCall) -> str:
        return marks.moment(call.not_before)

    @admin.display(description="deadline")
    def deadline_(self, call: ToolCall) -> str:
        return marks.moment(call.deadline)


@admin.register(ToolAttempt)
class ToolAttemptAdmin(Followed):
    list_display = ("id", "call_link", "number", "outcome_", "worker_link", "task", "started", "ended", "took")
    list_select_related = ("call",)
    list_filter = (belonging("call"), Before, Created, choosing("outcome", [(each, each) for each in Outcome.values]))
    within = {"call": ("-number",)}
    search_fields = ("id",)
    search_help_text = "By id of the attempt, its tool call or its Celery task, or the beginning of it."
    fields = (
        *("id", "call_link", "number", "outcome_", "error_", "worker_link", "task", "backend_pid"),
        *("started", "ended", "took", "next_try"),
    )

    def readings(self, rows: QuerySet[Any], term: str) -> Any:
        yield by_id(rows, "pk", term)
        yield by_id(rows, "call_id", term)
        task = flower.row_of(term)
        yield by_id(rows, "call_id", str(task[1])) if task is not None and task[0] == "tool_call" else []

    @admin.display(description="tool call")
    def call_link(self, attempt: ToolAttempt) -> str:
        return marks.link(self.admin_site, ToolCall, attempt.call_id, attempt.call.name)

    @admin.display(description="outcome")
    def outcome_(self, attempt: ToolAttempt) -> str:
        return marks.state(attempt.outcome or "open")

    @admin.display(description="error")
    def error_(self, attempt: ToolAttempt) -> str:
        return marks.pretty(attempt.error)

    @admin.display(description="worker")
    def worker_link(self, attempt: ToolAttempt) -> str:
        return marks.link(self.admin_site, Worker, attempt.worker_id, attempt.worker or "worker")

    @admin.display(description="next try")
    def next_try(self, attempt: ToolAttempt) -> str:
        return marks.moment(attempt.retry_at)

    @admin.display(description="took")
    def took(self, attempt: ToolAttempt) -> str:
        return marks.took(attempt.started_at, attempt.ended_at)
