"""Runs: start, look, cancel, and the runs that follow one."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Annotated, Any
from uuid import UUID

import orjson
from django.db.models import Q
from django.http import Http404, HttpResponseBase
from django.urls import reverse
from pydantic import ConfigDict, Field, model_validator
from rest_framework.exceptions import PermissionDenied
from rest_framework.request import Request
from rest_framework.response import Response

from runs import admission, agents, events, occupant
from runs.access import visible
from runs.http import answers, forms
from runs.http.errors import BadField
from runs.http.etags import tagged
from runs.http.idempotency import Answer, once
from runs.http.pages import BY_ID, BY_NUMBER, Page, Paged, paged
from runs.http.query import Query, Text, storable
from runs.http.streams import can_stream, make_room, needs_asgi, stream_of
from runs.http.threads import MessageList, answered, page_of_messages, said
from runs.http.tool_calls import ToolCallPage
from runs.http.view import SIGNED_IN, View, may, operation, sees
from runs.models import LIVE, OCCUPYING, TERMINAL, Leg, Run, Step
from threads import access
from threads.exceptions import BadInput
from threads.models import Message, Thread
from tools.models import ToolCall

OVERRIDES = ("model", "instructions", "tools", "tool_choice", "parallel_tool_calls", "output_schema")
NO_RUN = UUID(int=0)
STARTED: dict[int, Any] = {202: answers.Run, 200: (("text/event-stream", str),)}


class RunList(Paged):
    model_config = ConfigDict(extra="allow")

    active: Annotated[bool | None, Field(description="true: those that have not ended; false: those that have")] = None
    status: list[answers.RunStatus] = []
    agent: Annotated[list[Text], Field(description="of these agents only")] = []
    thread: UUID | None = None

    @model_validator(mode="after")
    def _only_metadata(self) -> RunList:
        for name, value in (self.model_extra or {}).items():
            if not name.startswith("metadata.") or name == "metadata.":
                raise BadField(name, "There is no such field.", "unknown_field")
            try:
                storable(name + value)
            except ValueError as error:
                raise BadField(name, str(error)) from error
        return self

    @property
    def metadata(self) -> dict[str, str]:
        return {name.removeprefix("metadata."): value for name, value in (self.model_extra or {}).items()}


class EventList(Query):
    after: Annotated[int, Field(ge=0, le=2**63 - 1, description="the last seq that you have seen")] = 0
    limit: Annotated[int, Field(ge=1, le=1000)] = 1000


class RunPage(Page[answers.Run]):
    """One page of runs."""


class StepPage(Page[answers.Step]):
    """One page of steps."""


class LegPage(Page[answers.Leg]):
    """One page of legs."""


class RunMessagePage(Page[answers.Message]):
    """One page of a run's messages."""


class RunsOfThread(View):
    @operation(may("start", Thread), name="start_run", body=forms.NewRun, creates=True, answers=STARTED, raises=(501,))
    def post(self, request: Request, thread: Thread, body: forms.NewRun) -> HttpResponseBase:
        """Start a run on a thread.

        With `stream: true` the answer is the run's events from the first on, and its headers name the run.
        """
        return _started(self, request, body, lambda: _start(request, body, thread))


class Runs(View):
    @operation(SIGNED_IN, name="list_runs", query=RunList, answers={200: RunPage, 304: None})
    def get(self, request: Request, query: RunList) -> Response:
        """List your runs, the newest first.

        `metadata.KEY=VALUE` picks those whose metadata say so. `active=true` finds what is still going on, after a restart.
        """
        rows = visible(Run, request.user).select_related("thread")
        if query.active is not None:
            rows = rows.filter(status__in=LIVE if query.active else TERMINAL)
        if query.status:
            rows = rows.filter(status__in=query.status)
        if query.agent:
            rows = rows.filter(agent__in=query.agent)
        if query.thread is not None:
            rows = rows.filter(thread=query.thread)
        for key, value in query.metadata.items():
            rows = rows.filter(_says(key, value))
        return paged(request, rows, query, answers.runs)

    @operation(
        may("start"), name="start_run_on_new_thread", body=forms.FirstRun, creates=True, answers=STARTED, raises=(501,)
    )
    def post(self, request: Request, body: forms.NewRun) -> HttpResponseBase:
        """Start a run on a new thread.

        With `stream: true` the answer is the run's events from the first on, and its headers name the run.
        """
        return _started(self, request, body, lambda: _start(request, body, None))


def _says(key: str, value: str) -> Q:
    """Metadata hold JSON, a query text: `3` picks 3 and "3"."""
    found = Q(metadata__contains={key: value})
    try:
        read = orjson.loads(value)
    except orjson.JSONDecodeError:
        return found
    unusable = isinstance(read, str | dict | list) or (isinstance(read, float) and not isfinite(read))
    return found if unusable else found | Q(metadata__contains={key: read})


def _started(view: View, request: Request, body: forms.NewRun, start: Callable[[], Run]) -> HttpResponseBase:
    if body.stream and not can_stream(request):
        # There is no run yet, and so no id.
        wait = reverse("longhaul:run-wait", args=[NO_RUN]).replace(str(NO_RUN), "{id}")
        raise needs_asgi(wait, first="leave `stream` out, and ")
    if body.stream:
        make_room(request)
    started: list[Run] = []

    def work() -> Answer:
        started.append(start())
        return run_answer(started[0], 202)

    answer = once(request, view.body, work)
    if body.stream:
        id = UUID(answer.data["id"])
        # The first answer is told again, but a stream shows what the run says now: it may be gone, or somebody else's.
        run = started[0] if started else visible(Run, request.user).filter(pk=id).first()
        if run is None:
            raise Http404
        return stream_of(request, run, headers=answer.headers)
    return answered(answer)


def run_answer(run: Run, status: int) -> Answer:
    return Answer(
        status, answers.run(run), {"Location": reverse("longhaul:run", args=[run.pk]), "X-Run-Id": str(run.pk)}
    )


def _start(request: Request, body: forms.NewRun, thread: Thread | None) -> Run:
    name = body.agent or (thread.agent if thread is not None else "")
    if not name:
        raise BadField("agent", "This field is required: the thread names no agent.", "required")
    if thread is not None and body.busy in occupant.REPLACES:
        live = Run.objects.filter(thread=thread, status__in=OCCUPYING).first()
        if live is not None and not access.may(request.user, "cancel", live):
            raise PermissionDenied
    return admission.start(
        agents.get(name),
        content(body.input),
        # Who starts a run on somebody else's thread, as staff may, starts it for them.
        owner=request.user if thread is None else None,
        thread=thread,
        message=_message(body.message, thread),
        messages=said(body.messages or []),
        save=body.save,
        busy=body.busy,
        priority=body.priority,
        metadata=body.metadata,
        client_id=body.client_id or "",
        **overrides_of(body),
    )


def _message(id: UUID | None, thread: Thread | None) -> Message | None:
    if id is None:
        return None
    found = None if thread is None else Message.objects.filter(pk=id, thread=thread).first()
    if found is None:
        raise BadField("message", "There is no such message in this thread.")
    return found


def content(given: Any) -> Any:
    """Return an input as the core takes it."""
    if isinstance(given, list):
        return [part.model_dump(exclude_unset=True) for part in given]
    return given


def overrides_of(body: Any) -> dict[str, Any]:
    """Return what the body overrides, as the core takes it: without what is null."""
    found = {name: getattr(body, name) for name in OVERRIDES if getattr(body, name) is not None}
    for name in ("limits", "context"):
        given = getattr(body, name)
        if given is not None:
            found[name] = given.model_dump(exclude_none=True)
    return found


class OneRun(View):
    @operation(sees(Run), name="get_run", answers={200: answers.Run, 304: None})
    def get(self, request: Request, run: Run) -> Response:
        """Show a run as it is now.

        The `ETag` changes whenever the run does, and whenever `why` says something else than another time.
        """
        return tagged(request, answers.run(run))


class EventsOfRun(View):
    @operation(sees(Run), name="list_events", query=EventList, answers={200: answers.Events})
    def get(self, request: Request, run: Run, query: EventList) -> Response:
        """Read a run's events after the last seq that you have seen."""
        if query.after > run.last_seq:
            raise BadField("after", f"The run's last event so far is {run.last_seq}.")
        found = events.read(run.pk, query.after, query.limit)
        last = max(run.last_seq, found[-1].seq if found else 0)
        return Response({"results": [event.as_dict() for event in found], "last_seq": last, "finished": run.finished})


class StepsOfRun(View):
    @operation(sees(Run), name="list_steps", query=Paged, answers={200: StepPage, 304: None})
    def get(self, request: Request, run: Run, query: Paged) -> Response:
        """List the committed model turns of a run, in order."""
        rows = Step.objects.filter(run=run)
        return paged(request, rows, query, answers.steps, BY_NUMBER)


class LegsOfRun(View):
    @operation(sees(Run), name="list_legs", query=Paged, answers={200: LegPage, 304: None})
    def get(self, request: Request, run: Run, query: Paged) -> Response:
        """List the legs of a run: the Celery tasks that took it on, one after another."""
        return paged(request, Leg.objects.filter(run=run), query, answers.legs, BY_NUMBER)


class MessagesOfRun(View):
    @operation(sees(Run), name="list_run_messages", query=MessageList, answers={200: RunMessagePage, 304: None})
    def get(self, request: Request, run: Run, query: MessageList) -> Response:
        """List what a run was given and what it said, also what its thread does not show."""
        return page_of_messages(request, Message.objects.filter(run_id=run.pk), query)


class CallsOfRun(View):
    @operation(sees(Run), name="list_run_tool_calls", query=Paged, answers={200: ToolCallPage, 304: None})
    def get(self, request: Request, run: Run, query: Paged) -> Response:
        """List the tool calls of a run, in the order in which they were made."""
        rows = ToolCall.objects.filter(run_id=run.pk).prefetch_related("attempts")
        return paged(request, rows, query, answers.tool_calls, BY_ID)


class Cancelled(View):
    @operation(may("cancel", Run), name="cancel_run", body=forms.Cancel, answers={200: answers.Run})
    def post(self, request: Request, run: Run, body: forms.Cancel) -> Response:
        """Cancel a run, at once and for good. A finished run is answered as it is, unchanged."""
        return Response(answers.run(run.cancel(body.reason or "")))


class Resumed(View):
    @operation(may("resume", Run), name="resume_run", body=forms.Resume, creates=True, answers={202: answers.Run})
    def post(self, request: Request, run: Run, body: forms.Resume) -> Response:
        """Start a new run that goes on where a cancelled or failed one ended, on the same thread."""
        return answered(once(request, self.body, lambda: run_answer(run.resume(content(body.input)), 202)))


class Retried(View):
    @operation(may("retry", Run), name="retry_run", body=forms.Retry, creates=True, answers={202: answers.Run})
    def post(self, request: Request, run: Run, body: forms.Retry) -> Response:
        """Start a new run that does the last step of a finished one again, on the same thread."""
        return answered(once(request, self.body, lambda: run_answer(run.retry(), 202)))


class Forked(View):
    @operation(may("fork", Run), name="fork_run", body=forms.Fork, creates=True, answers={202: answers.Run})
    def post(self, request: Request, run: Run, body: forms.Fork) -> Response:
        """Copy the thread up to a step of the run onto a new thread, and start a new run there."""
        overrides = overrides_of(body.overrides) if body.overrides is not None else {}

        def work() -> Answer:
            try:
                new = run.fork(after_step=body.after_step, **overrides)
            except BadInput as error:
                if error.attr and error.attr.partition(".")[0] in forms.ForkOverrides.model_fields:
                    error.attr = f"overrides.{error.attr}"
                raise
            return run_answer(new, 202)

        return answered(once(request, self.body, work))
