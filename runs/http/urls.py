"""The addresses of the API: `path("", include("runs.http.urls"))`. Their names begin with `longhaul:`."""

from __future__ import annotations

from django.urls import path

from runs.http import catalogue, runs, service, streams, threads, tool_calls

app_name = "longhaul"

urlpatterns = [
    path("api/threads", threads.Threads.as_view(), name="threads"),
    path("api/threads/<uuid:id>", threads.OneThread.as_view(), name="thread"),
    path("api/threads/<uuid:id>/messages", threads.Messages.as_view(), name="messages"),
    path("api/threads/<uuid:id>/runs", runs.RunsOfThread.as_view(), name="thread-runs"),
    path("api/messages/<uuid:id>", threads.OneMessage.as_view(), name="message"),
    path("api/runs", runs.Runs.as_view(), name="runs"),
    path("api/runs/<uuid:id>", runs.OneRun.as_view(), name="run"),
    path("api/runs/<uuid:id>/events", runs.EventsOfRun.as_view(), name="run-events"),
    path("api/runs/<uuid:id>/stream", streams.StreamOfRun.as_view(), name="run-stream"),
    path("api/runs/<uuid:id>/wait", streams.WaitForRun.as_view(), name="run-wait"),
    path("api/runs/<uuid:id>/steps", runs.StepsOfRun.as_view(), name="run-steps"),
    path("api/runs/<uuid:id>/legs", runs.LegsOfRun.as_view(), name="run-legs"),
    path("api/runs/<uuid:id>/messages", runs.MessagesOfRun.as_view(), name="run-messages"),
    path("api/runs/<uuid:id>/tool-calls", runs.CallsOfRun.as_view(), name="run-tool-calls"),
    path("api/runs/<uuid:id>/cancel", runs.Cancelled.as_view(), name="run-cancel"),
    path("api/runs/<uuid:id>/resume", runs.Resumed.as_view(), name="run-resume"),
    path("api/runs/<uuid:id>/retry", runs.Retried.as_view(), name="run-retry"),
    path("api/runs/<uuid:id>/fork", runs.Forked.as_view(), name="run-fork"),
    path("api/tool-calls", tool_calls.ToolCalls.as_view(), name="tool-calls"),
    path("api/tool-calls/<uuid:id>", tool_calls.OneToolCall.as_view(), name="tool-call"),
    path("api/agents", catalogue.Agents.as_view(), name="agents"),
    path("api/tools", catalogue.Tools.as_view(), name="tools"),
    path("api/usage", catalogue.UsageOverview.as_view(), name="usage"),
    path("api/schema", service.SchemaDocument.as_view(), name="schema"),
    path("api/docs", service.Docs.as_view(), name="docs"),
    path("api/docs/<str:name>", service.DocsAsset.as_view(), name="docs-asset"),
    path("healthz", service.Health.as_view(), name="healthz"),
    path("readyz", service.Readiness.as_view(), name="readyz"),
]
