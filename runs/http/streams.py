"""What waits: the event stream of a run, and the long poll for its end. Neither holds a connection while it waits.

Around Django, `runs.streams` takes a stream over as soon as its reader was let in here. Without it Django's ASGI handler sends
it, and keeps a thread for each that is open, asleep. Its ORM is used in that one, so none waits for another's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from functools import cache
from typing import Annotated, Any, Literal
from uuid import UUID

from django.core.handlers.asgi import ASGIRequest
from django.http import Http404, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.urls import reverse
from pydantic import Field
from rest_framework.request import Request
from rest_framework.response import Response

from runs import events
from runs.events import RunEvent
from runs.http import answers
from runs.http.body import WHOLE, Body, Given, provided
from runs.http.errors import BadField, Refused
from runs.http.json import dumps
from runs.http.query import Query
from runs.http.schema import STREAM
from runs.http.view import AsyncView, operation, sees
from runs.models import TERMINAL, Run, Status
from runs.streams.app import handover_of
from runs.streams.visitors import Visitor
from threads.database import apart

logger = logging.getLogger("longhaul.streams")

PING_SECONDS = 15.0
CHECK_SECONDS = 15.0  # how long a stream, or a wait, goes on for who may no longer see its run
# A proxy that gathers or compresses what passes makes a stream stand still.
HEADERS = {
    "Cache-Control": "no-cache, no-transform",
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


class StreamBody(Given):
    """The same, for clients that send JSON. What the query says counts first."""

    starting_after: After = 0
    batch_size: Batch = 1000
    include_pings: Pings = False


class WaitQuery(Query):
    timeout_seconds: Annotated[float, Field(ge=0, le=300, allow_inf_nan=False)] = 30
    until: Literal["finished", "requires_action"] = "finished"


class StreamOfRun(AsyncView):
    @operation(sees(Run), name="stream_run", query=StreamQuery, answers={200: ((STREAM, str),)}, raises=(413, 415, 501))
    async def get(self, request: Request, run: Run, query: StreamQuery) -> HttpResponseBase:
        """Follow a run: its events after the cursor, then live ones, to its last.

        A `Last-Event-ID` header wins over `starting_after`, so a browser's EventSource resumes by itself.
        """
        return self._stream(request, run, query, Body.read(request._request).form(StreamBody))

    @operation(
        sees(Run), name="stream_run_by_post", query=StreamQuery, body=StreamBody, answers={200: ((STREAM, str),)},
        raises=(501,),
    )  # fmt: skip
    async def post(self, request: Request, run: Run, query: StreamQuery, body: StreamBody) -> HttpResponseBase:
        """Follow a run, with the parameters in the body."""
        return self._stream(request, run, query, body)

    def _stream(self, request: Request, run: Run, query: StreamQuery, body: StreamBody) -> HttpResponseBase:
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
        return stream_of(request, run, after=after, batch=told.batch_size, pings=told.include_pings)


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
    said: dict[str, Any] = {"content_type": STREAM, "headers": {**HEADERS, **named, **(headers or {})}}
    if request.method == "HEAD":  # its answer has no body, and must not wait for the run's end to say so
        return HttpResponse(**said)
    handover = handover_of(request._request)
    if handover is None:
        _tell_what_it_costs()
        return StreamingHttpResponse(_frames(request, run.pk, after, batch, pings), **said)
    from runs.streams.broadcast import Plan

    plan = Plan(visitor=Visitor.of(request), run=run.pk, after=after, batch=batch, pings=pings, known=run.last_seq)
    said["headers"] |= handover.take(plan)
    return HttpResponse(**said)


@cache
def _tell_what_it_costs() -> None:
    logger.warning(
        "Django's own handler sends the streams of this process, each with a thread. In asgi.py: application ="
        " with_streams(get_asgi_application())"
    )


async def _frames(request: Request, run_id: UUID, after: int, batch: int, pings: bool) -> AsyncIterator[bytes]:
    sent = checked = time.monotonic()
    # What is sent before the first event lets a client, and a proxy, know that the stream stands.
    yield b": longhaul\n\n"
    async with aclosing(events.abatches(run_id, after, batch)) as batches:
        async for found in batches:
            if time.monotonic() - checked >= CHECK_SECONDS:
                if not await apart(still_sees)(request, run_id):
                    return  # who comes back is told why
                checked = time.monotonic()
            if found:
                yield b"".join(map(frame, found))
            elif time.monotonic() - sent < PING_SECONDS:
                continue
            else:
                yield b"event: ping\ndata: {}\n\n" if pings else b": ping\n\n"
            sent = time.monotonic()


def still_sees(request: Request, run_id: UUID) -> bool:
    """Return whether the gate would let the request in again, as key, user and run are now."""
    return run_id in Visitor.of(request).sees({Run: [run_id]})


def frame(event: RunEvent) -> bytes:
    """One event as a server-sent one; its JSON has no line breaks. A gap is no place to come back to, and has no id."""
    if event.type == events.RESUME_GAP:
        return b"event: %b\ndata: %b\n\n" % (event.type.encode(), dumps(event.as_dict()))
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event.seq, event.type.encode(), dumps(event.as_dict()))


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
