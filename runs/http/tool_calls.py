"""Tool calls: what the model asked for, what became of it, and what people say about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal
from uuid import UUID

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.http import Http404, HttpResponse
from pydantic import Field
from rest_framework.request import Request
from rest_framework.response import Response

from runs.access import visible
from runs.http import answers, forms
from runs.http.download import download
from runs.http.etags import tagged
from runs.http.idempotency import Answer, once
from runs.http.pages import Page, Paged, paged
from runs.http.query import Text
from runs.http.view import SIGNED_IN, View, may, operation, sees
from tools.models import CallStatus, ToolCall
from tools.results import ANYTHING

NEEDS = {
    "approval": CallStatus.AWAITING_APPROVAL,
    "result": CallStatus.AWAITING_RESULT,
    "decision": CallStatus.UNKNOWN,
}

FILE = ((ANYTHING, bytes), ("*/*", bytes))  # of whatever type its tool says; a generated client knows the first


class CallList(Paged):
    status: list[answers.CallStatus] = []
    run: UUID | None = None
    name: Annotated[list[Text], Field(description="calls of these tools only")] = []
    assignee: Annotated[Text | None, Field(description="the key of the user whom it is assigned to")] = None
    needs: Annotated[
        Literal["approval", "result", "decision"] | None, Field(description="what the call waits for from a person")
    ] = None


class ToolCallPage(Page[answers.ToolCall]):
    """One page of tool calls."""


class ToolCalls(View):
    @operation(SIGNED_IN, name="list_tool_calls", query=CallList, answers={200: ToolCallPage, 304: None})
    def get(self, request: Request, query: CallList) -> Response:
        """List the tool calls of your runs, the newest first."""
        rows = visible(ToolCall, request.user).prefetch_related("attempts")
        if query.status:
            rows = rows.filter(status__in=query.status)
        if query.run is not None:
            rows = rows.filter(run_id=query.run)
        if query.name:
            rows = rows.filter(name__in=query.name)
        if query.assignee is not None:
            rows = _assigned(rows, query.assignee)
        if query.needs is not None:
            rows = rows.filter(status=NEEDS[query.needs])
        return paged(request, rows, query, answers.tool_calls)


def _assigned(rows: QuerySet[ToolCall], key: str) -> QuerySet[ToolCall]:
    try:
        return rows.filter(assignee=get_user_model()._meta.pk.to_python(key))
    except (ValidationError, ValueError, OverflowError):
        return rows.none()  # no user can have such a key


class Result(View):
    @operation(may("answer", ToolCall), name="give_result", body=forms.CallResult, creates=True, raises=(409,),
               answers={200: answers.ToolCall})  # fmt: skip
    def post(self, request: Request, toolcall: ToolCall, body: forms.CallResult) -> Response:
        """Settle an `unknown` call with its result: somebody has seen that it took effect. The run goes on."""
        return _answered(self, request, lambda: toolcall.succeed(body.result, by=request.user))


class Error(View):
    @operation(may("answer", ToolCall), name="give_error", body=forms.CallError, creates=True, raises=(409,),
               answers={200: answers.ToolCall})  # fmt: skip
    def post(self, request: Request, toolcall: ToolCall, body: forms.CallError) -> Response:
        """Settle an `unknown` call as failed or, with `retryable: true`, run it again. The run goes on."""
        return _answered(self, request, lambda: toolcall.fail(body.message, retryable=body.retryable, by=request.user))


class CallCancelled(View):
    @operation(may("cancel", ToolCall), name="cancel_tool_call", body=forms.Cancel, answers={200: answers.ToolCall})
    def post(self, request: Request, toolcall: ToolCall, body: forms.Cancel) -> Response:
        """Cancel one open call; its run goes on. A settled call is answered as it is, unchanged."""
        return Response(answers.tool_call(toolcall.cancel(body.reason or "", by=request.user)))


def _answered(view: View, request: Request, work: Callable[[], ToolCall]) -> Response:
    done = once(request, view.body, lambda: Answer(200, answers.tool_call(work())))
    return Response(done.data, done.status)


class Whole(View):
    @operation(sees(ToolCall), name="get_whole_result", raises=(404,), answers={200: FILE})
    def get(self, request: Request, toolcall: ToolCall) -> HttpResponse:
        """Return what the tool returned, whole, as an attachment: JSON, a text, or the file that is all of it."""
        return _content(toolcall, 0)


class Content(View):
    @operation(sees(ToolCall), name="get_result_content", raises=(404,), answers={200: FILE})
    def get(self, request: Request, toolcall: ToolCall, number: int) -> HttpResponse:
        """Return one content of a result as an attachment: a file within it (from 1), or its whole (0)."""
        return _content(toolcall, number)


def _content(call: ToolCall, number: int) -> HttpResponse:
    try:
        return download(call.content(number))
    except LookupError:
        raise Http404 from None


class OneToolCall(View):
    @operation(sees(ToolCall), name="get_tool_call", answers={200: answers.ToolCall, 304: None})
    def get(self, request: Request, toolcall: ToolCall) -> Response:
        """Show a tool call with its attempts."""
        return tagged(request, answers.tool_call(toolcall))
