"""Threads and their messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal
from uuid import UUID

from django.db import transaction
from django.db.models import Q, QuerySet
from django.urls import reverse
from pydantic import BaseModel, Field
from rest_framework.request import Request
from rest_framework.response import Response

from runs import agents, events
from runs.access import visible
from runs.http import answers, forms
from runs.http.errors import BadField
from runs.http.etags import tagged
from runs.http.idempotency import Answer, once
from runs.http.pages import BY_ID, NEWEST_FIRST, Page, Paged, Places, number, paged
from runs.http.query import Text
from runs.http.view import SIGNED_IN, View, may, operation, sees
from runs.invariants import snapshot
from runs.models import OCCUPYING, Run
from threads import clock, transcript
from threads.content import clean
from threads.exceptions import BadInput, within
from threads.models import Message, MessageStatus, Role, Thread

OVERRIDES = ("model", "instructions", "tools", "tool_choice", "parallel_tool_calls", "limits", "context")


class ThreadList(Paged):
    agent: Annotated[list[Text], Field(description="of these agents only")] = []
    archived: Annotated[bool, Field(description="those that were archived, in place of those that were not")] = False
    order: Annotated[Literal["asc", "desc"], Field(description="by the time they were made")] = "desc"


class MessageList(Paged):
    status: Annotated[
        list[answers.MessageStatus],
        Field(description="default: all that the thread shows (waiting, pending, completed, partial)"),
    ] = []
    kind: Annotated[
        Literal["text", "tool"] | None, Field(description="tool: tool calls and their results; text: all others")
    ] = None
    after: Annotated[UUID | None, Field(description="a message of the thread: those that come after it")] = None
    order: Annotated[Literal["asc", "desc"], Field(description="as they stand in the thread, or backwards")] = "asc"


class ThreadPage(Page[answers.Thread]):
    """One page of threads."""


class MessagePage(Page[answers.Message]):
    """One page of messages, and the place in the log of the live run, or of the last one, at which they were read."""

    cursor: answers.Cursor
    tool_calls: list[answers.StandingCall]


class SavedMessages(BaseModel):
    results: list[answers.Message]


class Threads(View):
    @operation(SIGNED_IN, name="list_threads", query=ThreadList, answers={200: ThreadPage, 304: None})
    def get(self, request: Request, query: ThreadList) -> Response:
        """List your threads, the newest first."""
        rows = visible(Thread, request.user).filter(archived_at__isnull=not query.archived)
        if query.agent:
            rows = rows.filter(agent__in=query.agent)
        places = BY_ID if query.order == "asc" else NEWEST_FIRST
        return paged(request, answers.with_run(rows), query, answers.threads, places)

    @operation(may("create"), name="create_thread", body=forms.NewThread, creates=True, answers={201: answers.Thread})
    def post(self, request: Request, body: forms.NewThread) -> Response:
        """Make a thread, with messages if there are some already. Runs nothing."""

        def work() -> Answer:
            thread = Thread(owner_id=request.user.pk)
            with transaction.atomic():
                _write(thread, body)
                if body.messages:
                    with within("messages"):
                        thread.save_many(said(body.messages))
            shown: Any = thread
            shown.run_id = shown.run_status = None  # it has no run yet, nobody needs to look
            return Answer(201, answers.thread(shown), {"Location": _address(thread)})

        return answered(once(request, self.body, work))


class OneThread(View):
    @operation(sees(Thread), name="get_thread", answers={200: answers.Thread, 304: None})
    def get(self, request: Request, thread: Thread) -> Response:
        """Show a thread, with the status of its live run or of its last one."""
        return tagged(request, _shown(thread))

    @operation(may("change", Thread), name="update_thread", body=forms.ThreadChange, answers={200: answers.Thread})
    def patch(self, request: Request, thread: Thread, body: forms.ThreadChange) -> Response:
        """Change a thread. What is left out stays as it is; null takes an override away."""
        with transaction.atomic():
            thread = answers.with_run(Thread.objects.select_for_update(no_key=True)).get(pk=thread.pk)
            _write(thread, body)
        return Response(answers.thread(thread))

    @operation(may("delete", Thread), name="delete_thread", answers={204: None})
    def delete(self, request: Request, thread: Thread) -> Response:
        """Delete a thread with all that hangs on it. Its live runs are cancelled first."""
        thread.delete()
        return Response(status=204)


def _write(thread: Thread, body: forms.NewThread | forms.ThreadChange) -> None:
    """Save the thread as the body says. Raises BadField, BadInput."""
    given = body.model_dump(exclude_unset=True, exclude={"messages", "archived"})
    for field in ("title", "summary", "agent"):
        if field in given:
            setattr(thread, field, clean(given[field] or ""))
    if "metadata" in given:
        thread.metadata = transcript.metadata_of(given["metadata"])
    overrides = {**thread.overrides, **{key: given[key] for key in OVERRIDES if key in given}}
    for key in ("limits", "context"):
        if overrides.get(key) is not None:
            overrides[key] = {name: value for name, value in overrides[key].items() if value is not None}
    thread.overrides = agents.check_overrides(overrides)
    if thread.agent:
        agents.define(agents.get(thread.agent), thread.overrides)
    if isinstance(body, forms.ThreadChange) and body.archived is not None:
        thread.archived_at = (thread.archived_at or clock.now()) if body.archived else None
    thread.save()


def _shown(thread: Thread) -> dict[str, Any]:
    return answers.thread(answers.with_run(Thread.objects.filter(pk=thread.pk)).get())


def _address(thread: Thread) -> str:
    return reverse("longhaul:thread", args=[thread.pk])


class Messages(View):
    @classmethod
    def as_view(cls, **initkwargs: Any) -> Any:
        # A host's ATOMIC_REQUESTS would open a transaction that sees more than one moment: text and cursor would part.
        return transaction.non_atomic_requests(super().as_view(**initkwargs))

    @operation(sees(Thread), name="list_messages", query=MessageList, answers={200: MessagePage, 304: None})
    def get(self, request: Request, thread: Thread, query: MessageList) -> Response:
        """List the messages of a thread.

        A pending message carries its text so far. Stream the run of `cursor` after its `seq`, or the thread after `RUN:SEQ`:
        nothing is missed, and no text is shown twice. `tool_calls`: how those of the live run's last step stand there.
        """
        with snapshot():
            rows = Message.objects.filter(thread=thread)
            if not query.status:
                rows = rows.filter(shown=True)
            return page_of_messages(request, rows, query, **_place(request, thread))

    @operation(
        may("save", Thread), name="save_messages", body=forms.NewMessages, creates=True,
        answers={201: SavedMessages},
    )  # fmt: skip
    def post(self, request: Request, thread: Thread, body: forms.NewMessages) -> Response:
        """Save one message or a list of them, all or none. Runs nothing.

        While a run occupies the thread they wait, and get their places at its next step or its end.
        """

        def work() -> Answer:
            given = body.root if isinstance(body.root, list) else [body.root]
            try:
                saved = thread.save_many(said(given))
            except BadInput as error:
                if error.attr and not isinstance(body.root, list):
                    error.attr = error.attr.partition(".")[2]  # the client sent no list
                raise
            stored = Message.objects.in_bulk([message.pk for message in saved])
            return Answer(201, {"results": answers.messages(stored[message.pk] for message in saved)})

        return answered(once(request, self.body, work))


def _place(request: Request, thread: Thread) -> dict[str, Any]:
    """Return where the thread's stream stands: in its live run, or behind its last one, of those that are theirs to see.

    With it how the calls of a live run stand there, of which the messages say no more than that they were made.
    """
    runs = visible(Run, request.user).filter(thread=thread).only("pk", "last_seq", "steps")
    run = runs.filter(status__in=OCCUPYING).first()
    calls = [] if run is None or not run.steps else answers.standing(run)
    if run is None:
        # By the database's clock; ids are of the clocks of many machines, and a held run may have been overtaken.
        run = runs.filter(entered_at__isnull=False).order_by("-entered_at", "-pk").first()
    cursor = {"run": None, "seq": 0} if run is None else {"run": str(run.pk), "seq": run.last_seq}
    return {"cursor": cursor, "tool_calls": calls}


class OneMessage(View):
    @operation(may("delete_message", Message), name="delete_message", answers={204: None}, raises=(409,))
    def delete(self, request: Request, message: Message) -> Response:
        """Delete a message. Not while a run occupies its thread, and no tool call or result: a model needs both."""
        transcript.delete_message(message)
        return Response(status=204)


class PlacesInThread(Places):
    """As the messages stand in their thread: by position, and those that have none yet after all others, by id."""

    def __init__(self, *, descending: bool = False) -> None:
        super().__init__("position", number, descending=descending)

    def of(self, row: Message) -> str:
        return f"w{row.pk}" if row.position is None else str(row.position)

    def ordering(self, *, backwards: bool) -> tuple[str, ...]:
        # Postgres puts nulls last, and first in a descending order: where they belong.
        return ("-position", "-id") if self.descending != backwards else ("position", "id")

    def beyond(self, place: str, *, backwards: bool, itself: bool) -> Q:
        placeless = Q(position__isnull=True)
        before = self.descending != backwards
        if not place.startswith("w"):
            found = super().beyond(place, backwards=backwards, itself=itself)
            return found if before else found | placeless
        side = ("lt" if before else "gt") + ("e" if itself else "")
        found = placeless & Q(**{f"id__{side}": UUID(place.removeprefix("w"))})
        return found | Q(position__isnull=False) if before else found


def page_of_messages(request: Request, rows: QuerySet[Message], query: MessageList, **more: Any) -> Response:
    """Answer with a page of messages as they stand in their thread; pending ones with their text so far."""
    gone = (MessageStatus.DISCARDED, MessageStatus.SUPERSEDED, MessageStatus.ROLLED_BACK)
    base = rows
    rows = rows.filter(status__in=query.status) if query.status else rows.exclude(status__in=gone)
    places = PlacesInThread(descending=query.order == "desc")
    if query.kind is not None:
        tools = Q(role=Role.TOOL) | Q(content__contains=[{"type": "tool_call"}])
        rows = rows.filter(tools if query.kind == "tool" else ~tools)
    if query.after is not None:
        after = base.filter(pk=query.after).first()
        if after is None:
            raise BadField("after", "There is no such message here.")
        rows = rows.filter(places.beyond(places.of(after), backwards=False, itself=False))
    return paged(request, rows, query, _with_text, places, **more)


def _with_text(rows: Iterable[Message]) -> list[dict[str, Any]]:
    rows = list(rows)
    for row in rows:
        if row.status == MessageStatus.PENDING and row.run_id is not None:
            row.content = events.spoken(row.run_id, row.pk)
    return answers.messages(rows)


def said(messages: list[forms.NewMessage]) -> list[dict[str, Any]]:
    """Return messages as the core takes them."""
    return [
        {key: value for key, value in message.model_dump(exclude_unset=True).items() if value is not None}
        for message in messages
    ]


def answered(answer: Answer) -> Response:
    return Response(answer.data, answer.status, headers=answer.headers)
