"""The addresses of the API: `path("", include("runs.http.urls"))`. Their names begin with `longhaul:`."""

from __future__ import annotations

import re
from uuid import UUID

from django.urls import path, register_converter

from runs.http import catalogue, runs, service, streams, threads, tool_calls

app_name = "longhaul"
WRITTEN = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
NOBODYS = UUID(int=0)


class RowId:
    """An id in a URL. What is no UUID is no row's, and so answers as an id does that there is not: 404, as JSON."""

    regex = "[^/]+"

    def to_python(self, text: str) -> UUID:
        return UUID(text) if WRITTEN.fullmatch(text) else NOBODYS

    def to_url(self, value: object) -> str:
        return str(value)


register_converter(RowId, "row_id")

urlpatterns = [
    path("api/threads", threads.Threads.as_view(), name="threads"),
    path("api/threads/<row_id:id>", threads.OneThread.as_view(), name="thread"),
    path("api/threads/<row_id:id>/messages", threads.Messages.as_view(), name="messages"),
    path("api/threads/<row_id:id>/runs", runs.RunsOfThread.as_view(), name="thread-runs"),
    path("api/threads/<row_id:id>/stream", streams.StreamOfThread.as_view(), name="thread-stream"),
    path("api/messages/<row_id:id>", threads.OneMessage.as_view(), name="message"),
    path("api/runs", runs.Runs.as_view(), name="runs"),
    path("api/runs/<row_id:id>", runs.OneRun.as_view(), name="run"),
    path("api/runs/<row_id:id>/events", runs.EventsOfRun.as_view(), name="run-events"),
    path("api/runs/<row_id:id>/stream", streams.StreamOfRun.as_view(), name="run-stream"),
    path("api/runs/<row_id:id>/wait", streams.WaitForRun.as_view(), name="run-wait"),
    path("api/runs/<row_id:id>/steps", runs.StepsOfRun.as_view(), name="run-steps"),
    path("api/runs/<row_id:id>/legs", runs.LegsOfRun.as_view(), name="run-legs"),
    path("api/runs/<row_id:id>/messages", runs.MessagesOfRun.as_view(), name="run-messages"),
    path("api/runs/<row_id:id>/tool-calls", runs.CallsOfRun.as_view(), name="run-tool-calls"),
    path("api/runs/<row_id:id>/cancel", runs.Cancelled.as_view(), name="run-cancel"),
    path("api/runs/<row_id:id>/resume", runs.Resumed.as_view(), name="run-resume"),
    path("api/runs/<row_id:id>/retry", runs.Retried.as_view(), name="run-retry"),
    path("api/runs/<row_id:id>/fork", runs.Forked.as_view(), name="run-fork"),
    path("api/tool-calls", tool_calls.ToolCalls.as_view(), name="tool-calls"),
    path("api/tool-calls/<row_id:id>", tool_calls.OneToolCall.as_view(), name="tool-call"),
    path("api/tool-calls/<row_id:id>/content", tool_calls.Whole.as_view(), name="tool-call-content"),
    path(
        "api/tool-calls/<row_id:id>/content/<int:number>", tool_calls.Content.as_view(), name="tool-call-content-part"
    ),
    path("api/tool-calls/<row_id:id>/result", tool_calls.Result.as_view(), name="tool-call-result"),
    path("api/tool-calls/<row_id:id>/error", tool_calls.Error.as_view(), name="tool-call-error"),
    path("api/tool-calls/<row_id:id>/cancel", tool_calls.CallCancelled.as_view(), name="tool-call-cancel"),
    path("api/agents", catalogue.Agents.as_view(), name="agents"),
    path("api/tools", catalogue.Tools.as_view(), name="tools"),
    path("api/usage", catalogue.UsageOverview.as_view(), name="usage"),
    path("api/schema", service.SchemaDocument.as_view(), name="schema"),
    path("api/docs", service.Docs.as_view(), name="docs"),
    path("api/docs/<str:name>", service.DocsAsset.as_view(), name="docs-asset"),
    path("healthz", service.Health.as_view(), name="healthz"),
    path("readyz", service.Readiness.as_view(), name="readyz"),
]
