"""Tool calls, to read: what the model asked for, and what became of it."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from pydantic import Field
from rest_framework.request import Request
from rest_framework.response import Response

from runs.access import visible
from runs.http import answers
from runs.http.etags import tagged
from runs.http.pages import Page, Paged, paged
from runs.http.query import Text
from runs.http.view import SIGNED_IN, View, operation, sees
from tools.models import CallStatus, ToolCall

NEEDS = {
    "approval": CallStatus.AWAITING_APPROVAL,
    "result": CallStatus.AWAITING_RESULT,
    "decision": CallStatus.UNKNOWN,
}


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


class OneToolCall(View):
    @operation(sees(ToolCall), name="get_tool_call", answers={200: answers.ToolCall, 304: None})
    def get(self, request: Request, toolcall: ToolCall) -> Response:
        """Show a tool call with its attempts."""
        return tagged(request, answers.tool_call(toolcall))
