"""What waits: the event stream of a run, and the long poll for its end. Neither holds a connection while it waits.

Around Django, `runs.streams` takes a stream over as soon as its reader was let in here. Without it Django's ASGI handler sends
it, and keeps a thread for each that is open, asleep. Its ORM is used in that one, so none waits for another's.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from functools import cache, partial
from typing import Annotated, Any, Literal
from uuid import UUID

from django.core.handlers.asgi import ASGIRequest
from django.db.models import Q
from django.http import Http404, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.urls import reverse
from pydantic import Field
from rest_framework.request import Request
from rest_framework.response import Response

from runs import events
from runs.access import visible
from runs.events import RunEvent
from runs.http import answers
from runs.http.body import WHOLE, Body, Given, provided
from runs.http.errors import BadField, Refused
from runs.http.json import dumps
from runs.http.query import Query
from runs.http.schema import STREAM, THREAD_CURSOR
from runs.http.view import AsyncView, View, operation, sees
from runs.models import TERMINAL, Run, Status
from runs.streams import departure
from runs.streams.app import OPENING, PING, handover_of
from runs.streams.seats import NoSeat
from runs.streams.visitors import Visitor
from threads.database import apart, release
from threads.models import Thread

logger = logging.getLogger("longhaul.streams")

PING_SECONDS = 15.0
CHECK_SECONDS = 15.0  # how long a stream, or a wait, goes on for who may no longer see its run
# A proxy that gathers or compresses what passes makes a stream stand still.
HEADERS = {
    # Private, too: Django 5.2 at first kept what is only not to be cached, and the view's answer has no body.
    "Cache-Control": "private, no-cache, no-transform",
    "X-Accel-Buffering": "no",
    "Content-Encoding": "identity",  # else Django's GZipMiddleware keeps what it compresses until it has enough
}

After = Annotated[int, Field(ge=0, le=2**63 - 1, description="the last seq that you have seen"), WHOLE]
Batch = Annotated[int, Field(ge=1, le=1000, description="events that are read at once"), WHOLE]
Pings = Annotated[bool, Field(description="send pings as events of type ping, not as comments")]


class StreamQuery(Query):
    starting_after: After = 0
    batch_size: Batch = 1000
    include_pings: Pings = False


class ThreadStreamQuery(Query):
    after: Annotated[
        str | None,
        Field(description="RUN:SEQ, the id of the last frame that you have seen", pattern=f"^{THREAD_CURSOR}$"),
    ] = None
    batch_size: Batch = 1000
    include_pings: Pings = False


class StreamBody(Given):
    """The same, for clients that send JSON. What the query says counts first."""

    starting_after: After = 0
    batch_size: Batch = 1000
    include_pings: Pings = False


class TurnedAway(Refused):
    """A stream that this process does not begin now. `wait`: seconds, the Retry-After."""

    def __init__(self, detail: str, code: str, status_code: int, wait: int) -> None:
        super().__init__(detail, code, status_code)
        self.wait = wait


class WaitQuery(Query):
    timeout_seconds: Annotated[float, Field(ge=0, le=300, allow_inf_nan=False)] = 30
    until: Literal["finished", "requires_action"] = "finished"


class StreamOfRun(View):
    streams = True

    @operation(
        sees(Run),
        name="stream_run",
        query=StreamQuery,
        answers={200: ((STREAM, str),), 204: None},
        raises=(413, 415, 501),
    )
    def get(self, request: Request, run: Run, query: StreamQuery) -> HttpResponseBase:
        """Follow a run: its events after the cursor, then live ones, to its last.

        A `Last-Event-ID` header wins over `starting_after`, so a browser's EventSource resumes by itself. When it names the last
        event of a run that has ended, the answer is 204, and an EventSource stops.
        """
        return self._answer(request, run, query, Body.read(request._request).form(StreamBody))

    @operation(
        sees(Run), name="stream_run_by_post", query=StreamQuery, body=StreamBody, answers={200: ((STREAM, str),), 204: None},
        raises=(501,),
    )  # fmt: skip
    def post(self, request: Request, run: Run, query: StreamQuery, body: StreamBody) -> HttpResponseBase:
        """Follow a run, with the parameters in the body."""
        return self._answer(request, run, query, body)

    def _answer(self, request: Request, run: Run, query: StreamQuery, body: StreamBody) -> HttpResponseBase:
        if not can_stream(request):
            raise needs_asgi(reverse("longhaul:run-wait", args=[run.pk]))
        told = body.model_copy(update=provided(query))
        after = told.starting_after
        seen = request.headers.get("Last-Event-ID", "")
        if seen:
            if not seen.isascii() or not seen.isdigit() or len(seen) > 18:
                raise BadField("Last-Event-ID", "This is not the seq of an event: a whole number, 0 or more.")
            after = int(seen)
        if after > run.last_seq:
            name = "Last-Event-ID" if seen else "starting_after"
            raise BadField(name, f"The run's last event so far is {run.last_seq}.")
        if seen and run.finished and after == run.last_seq:
            return HttpResponse(status=204)
        return stream_of(request, run, after=after, batch=told.batch_size, pings=told.include_pings)


class StreamOfThread(View):
    streams = True

    @operation(
        sees(Thread), name="stream_thread", query=ThreadStreamQuery, answers={200: ((STREAM, str),)}, raises=(501,)
    )
    def get(self, request: Request, thread: Thread, query: ThreadStreamQuery) -> HttpResponseBase:
        """Follow a thread: the events of its runs, one run after another, and of those to come.

        A frame's id is `RUN:SEQ`; as `after`, or as the `Last-Event-ID` header, which wins, it is where the stream goes on. The
        cursor of the thread's messages is one too. Without any the stream begins with the thread's first run. It has no end.
        """
        if not can_stream(request):
            raise Refused(
                "This server speaks WSGI, which cannot stream: use /events or /wait of a run.", "needs_asgi", 501
            )
        name, cursor = "after", query.after or ""
        if seen := request.headers.get("Last-Event-ID", ""):
            name, cursor = "Last-Event-ID", seen
            if not re.fullmatch(THREAD_CURSOR, seen):
                raise BadField(name, "This is not the id of a frame of this stream: RUN:SEQ.")
        run, after = _place(request, thread, name, cursor)
        return stream_of_thread(request, thread, run, after=after, batch=query.batch_size, pings=query.include_pings)


def _place(request: Request, thread: Thread, name: str, cursor: str) -> tuple[Run | None, int]:
    """Return the run and the seq that a cursor names. Raises BadField."""
    if not cursor:
        return None, 0
    id, _, seq = cursor.partition(":")
    run = visible(Run, request.user).filter(pk=id, thread=thread).first()
    if run is None:
        raise BadField(name, "The thread has no such run.")
    if int(seq) > run.last_seq:
        raise BadField(name, f"The run's last event so far is {run.last_seq}.")
    return run, int(seq)


def make_room(request: Request) -> None:
    """Take a seat for the stream that is to come, before anything is made for it. Raises TurnedAway."""
    handover = handover_of(request._request)
    if handover is None:
        return  # Django's own handler sends it, and a thread for each is bound enough
    # A browser's EventSource gives up for good at anything but 200: it gets one that ends at once, and comes back.
    if departure.leaving():
        handover.turn_away()
        if STREAM not in request.headers.get("Accept", ""):
            raise TurnedAway("This server is about to end: another one streams.", "leaving", 503, 1)
    try:
        handover.sit(Visitor.of(request).owner)
    except NoSeat as full:
        if full.own:
            told = f"You have {full.most} streams open here, the most that you may have. Close one of them."
            raise TurnedAway(told, "too_many_streams", 429, 5) from full
        raise TurnedAway("This server has as many streams open as it may.", "streams_full", 503, 5) from full


def can_stream(request: Request) -> bool:
    return isinstance(request._request, ASGIRequest)


def needs_asgi(wait: str, first: str = "") -> Refused:
    """Say what to do where streams cannot be. `wait` is the address that waits for the run's end."""
    told = f"This server speaks WSGI, which cannot stream: {first}wait for the run at {wait}, or read its /events."
    return Refused(told, "needs_asgi", 501)


def stream_of(
    request: Request, run: Run, *, after: int = 0, batch: int = 1000, pings: bool = False,
    headers: Mapping[str, str] | None = None,
) -> HttpResponseBase:  # fmt: skip
    """Answer with the run's events after the cursor, as server-sent events."""
    named = {"Location": reverse("longhaul:run", args=[run.pk]), "X-Run-Id": str(run.pk)}
    plan = {"run": run.pk, "after": after, "known": run.last_seq}
    frames = partial(_frames, request, run.pk, after, batch, pings)
    return _stream(request, {**named, **(headers or {})}, frames, batch=batch, pings=pings, **plan)


def stream_of_thread(
    request: Request, thread: Thread, run: Run | None, *, after: int = 0, batch: int = 1000, pings: bool = False
) -> HttpResponseBase:
    """Answer with the events of the thread's runs after the cursor, and of those to come."""
    plan: dict[str, Any] = {"thread": thread.pk}
    if run is not None:
        plan |= {"run": run.pk, "after": after, "known": run.last_seq}
    frames = partial(_frames_of_thread, request, thread.pk, None if run is None else run.pk, after, batch, pings)
    headers = {"Location": reverse("longhaul:thread", args=[thread.pk])}
    return _stream(request, headers, frames, batch=batch, pings=pings, **plan)


def _stream(
    request: Request, headers: Mapping[str, str], frames: Callable[[], AsyncIterator[bytes]], **plan: Any
) -> HttpResponseBase:
    said: dict[str, Any] = {"content_type": STREAM, "headers": {**HEADERS, **headers}}
    if request.method == "HEAD":  # its answer has no body, and must not wait for the run's end to say so
        return HttpResponse(**said)
    make_room(request)
    handover = handover_of(request._request)
    if handover is None:
        _tell_what_it_costs()
        release()  # it would be kept to the stream's end
        return StreamingHttpResponse(frames(), **said)
    from runs.streams.broadcast import Plan

    said["headers"] |= handover.take(Plan(visitor=Visitor.of(request), **plan))
    return HttpResponse(**said)


@cache
def _tell_what_it_costs() -> None:
    logger.warning(
        "Django's own handler sends the streams of this process, each with a thread. In asgi.py: application ="
        " with_streams(get_asgi_application())"
    )


async def _frames(
    request: Request, run_id: UUID, after: int, batch: int, pings: bool, prefix: str = ""
) -> AsyncIterator[bytes]:
    sent = checked = time.monotonic()
    if not prefix:
        yield OPENING
    async with aclosing(events.abatches(run_id, after, batch)) as batches:
        async for found in batches:
            if time.monotonic() - checked >= CHECK_SECONDS:
                if not await apart(still_sees)(request, run_id):
                    return  # who comes back is told why
                checked = time.monotonic()
            if found:
                yield b"".join(frame(event, prefix) for event in found)
            elif time.monotonic() - sent < PING_SECONDS:
                continue
            else:
                yield PING[pings]
            sent = time.monotonic()


async def _frames_of_thread(
    request: Request, thread_id: UUID, run_id: UUID | None, after: int, batch: int, pings: bool
) -> AsyncIterator[bytes]:
    sent = time.monotonic()
    yield OPENING
    before = None
    while True:
        if run_id is not None:
            async with aclosing(_frames(request, run_id, after, batch, pings, f"{run_id}:")) as told:  # type: ignore[type-var]
                async for piece in told:
                    yield piece
            sent = time.monotonic()
            before, run_id, after = run_id, None, 0
        found = await apart(_next_run)(request, thread_id, before)
        if found is None:
            return
        if isinstance(found, UUID):
            run_id = found
            continue
        if time.monotonic() - sent >= PING_SECONDS:
            yield PING[pings]
            sent = time.monotonic()
        await asyncio.sleep(events.LOOK_SECONDS)


def _next_run(request: Request, thread_id: UUID, before: UUID | None) -> UUID | Literal["none yet"] | None:
    """Return the thread's run after this one, as they came to stand in it; None when the thread is not theirs to see any more."""
    visitor = Visitor.of(request)
    if not visitor.sees({Thread: [thread_id]}):
        return None
    runs = Run.objects.filter(thread=thread_id, entered_at__isnull=False).order_by("entered_at", "pk")
    if before is not None:
        since = Run.objects.filter(pk=before).values_list("entered_at", flat=True).first()
        later = Q(entered_at__gt=since) | Q(entered_at=since, pk__gt=before) if since is not None else Q(pk__gt=before)
        runs = runs.filter(later)
    ids = list(runs.values_list("pk", flat=True))
    seen = visitor.sees({Run: ids})
    return next((id for id in ids if id in seen), "none yet")


def still_sees(request: Request, run_id: UUID) -> bool:
    """Return whether the gate would let the request in again, as key, user and run are now."""
    return run_id in Visitor.of(request).sees({Run: [run_id]})


def frame(event: RunEvent, prefix: str = "") -> bytes:
    """One event as a server-sent one; its JSON has no line breaks. A gap is no place to come back to, and has no id."""
    if event.type == events.RESUME_GAP:
        return b"event: %b\ndata: %b\n\n" % (event.type.encode(), dumps(event.as_dict()))
    id = f"{prefix}{event.seq}".encode()
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (id, event.type.encode(), dumps(event.as_dict()))


class WaitForRun(AsyncView):
    @operation(sees(Run), name="wait_for_run", query=WaitQuery, answers={200: answers.Run})
    async def get(self, request: Request, run: Run, query: WaitQuery) -> Response:
        """Wait until the run has ended, or waits for a person, at most so long. Answers with the run as it is then."""
        enough = {*TERMINAL, *([Status.REQUIRES_ACTION] if query.until == "requires_action" else [])}
        begun = time.monotonic()
        await events.await_status(run.pk, enough, query.timeout_seconds)
        if time.monotonic() - begun >= CHECK_SECONDS and not await apart(still_sees)(request, run.pk):
            raise Http404  # they were let in minutes ago
        shown: Any = await apart(_shown)(run)
        return Response(shown)


def _shown(run: Run) -> dict[str, Any]:
    """Raises Http404 for a run that was deleted meanwhile."""
    found = Run.objects.select_related("thread").filter(pk=run.pk).first()
    if found is None:
        raise Http404
    return answers.run(found)
