"""The ASGI application around Django's, and how a view hands a reader over to it.

The view has signed the reader in, asked the policy and checked the cursor; nothing of that is done twice. It leaves a `Plan`
in the `Handover` that this application put into the request's scope, and answers 200 without a body. The answer carries a
word that was made up for this one request, so what comes out at the other end of the host's middleware is known to be the
view's answer, even copied, and not another that took its place. No client sees the word, and none can know it beforehand.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Container, Hashable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from runs.streams import departure, seats

if TYPE_CHECKING:
    from runs.streams.broadcast import Broadcast, Plan, Reader
    from runs.streams.door import Door
    from runs.streams.seats import Seat

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]

# What is sent before the first event lets a client, and a proxy, know that the stream stands. A browser whose stream ended comes
# back after a second.
OPENING = b": longhaul\nretry: 1000\n\n"
PING = {False: b": ping\n\n", True: b"event: ping\ndata: {}\n\n"}
IN_SCOPE = "longhaul.streams"
HEADER = "X-Longhaul-Stream"
_HEADER = HEADER.lower().encode()
# Of the view's own answer, which had no body.
_OF_THE_BODY = frozenset({b"content-length", b"content-encoding", b"transfer-encoding", b"etag", _HEADER})


class Handover:
    """Where the view of one request leaves its plan."""

    __slots__ = ("over", "plan", "seat", "turned_away", "word")

    def __init__(self) -> None:
        self.over = False
        self.plan: Plan | None = None
        self.seat: Seat | None = None
        self.turned_away = False
        self.word = b""

    def sit(self, owner: Hashable) -> None:
        """Take a seat for this request's stream, once. It is given up with the request. Raises NoSeat."""
        if self.seat is None:
            self.seat = seats.here.take(owner)
        if self.over:  # its client has left meanwhile, and the thread of its view has not heard of it
            self.seat.leave()

    def end(self) -> None:
        """The request is over: give up its seat, also one that is still to be taken."""
        self.over = True
        if self.seat is not None:
            self.seat.leave()

    def turn_away(self) -> None:
        """Note that this client should go elsewhere, and so not come back on this connection."""
        self.turned_away = True

    def take(self, plan: Plan) -> Mapping[str, str]:
        """Take the plan; return the header that the view's answer must carry."""
        self.plan = plan
        word = secrets.token_urlsafe(16)
        self.word = word.encode()
        return {HEADER: word}

    def agreed(self, start: Message) -> bool:
        """Return whether this answer is the one whose view took the plan."""
        said = [bytes(value) for name, value in start.get("headers", ()) if bytes(name).lower() == _HEADER]
        return self.plan is not None and start["status"] == 200 and said == [self.word]


def handover_of(request: Any) -> Handover | None:
    """Return where a view leaves its plan; None where no `with_streams` is around Django."""
    found = getattr(request, "scope", {}).get(IN_SCOPE)
    return found if isinstance(found, Handover) else None


def with_streams(application: Application) -> Application:
    """Return an ASGI application that serves streams itself and leaves all else to this one."""

    listens = False
    door: Door | None = None

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal listens, door
        if scope["type"] != "http":
            return await application(scope, receive, send)
        if not listens:
            # Not with the first stream only: that one may come when the process was asked to end already.
            listens = True
            departure.hear()
            from runs.streams.door import Door

            door = Door.beside(application)
        handover = Handover()
        held: list[Message] = []
        gone = False

        async def heard() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def answer(message: Message) -> None:
            if held:
                return  # the rest of the view's answer, which is empty
            if message["type"] == "http.response.start":
                if handover.agreed(message):
                    held.append(message)
                    return
                message = {**message, "headers": [*_without(message, (_HEADER,)), *elsewhere()]}
            await send(message)

        def elsewhere() -> list[tuple[bytes, bytes]]:
            # Of HTTP/1 only: later ones have no such header, and must not.
            return [(b"Connection", b"close")] if handover.turned_away and scope["http_version"] < "2" else []

        asked = {**scope, IN_SCOPE: handover}
        try:
            if door is not None and door.leads_to(scope):
                await door.let_in(asked, heard, answer)
            else:
                await application(asked, heard, answer)
            # Only here, when Django has let go of the request: its own handler keeps a thread for each that is open.
            if held and handover.plan is not None and not gone:
                start = {**held[0], "headers": [*_without(held[0], _OF_THE_BODY), *elsewhere()]}
                await _stream(handover.plan, start, receive, send)
        finally:
            handover.end()

    return serve


def _without(message: Message, names: Container[bytes]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in message.get("headers", ()) if bytes(name).lower() not in names]


async def _stream(plan: Plan, start: Message, receive: Receive, send: Send) -> None:
    from runs.streams.broadcast import here

    headers = [*start["headers"], (b"Content-Encoding", b"identity")]
    broadcast = here()
    reader = broadcast.enter(plan)
    listening = asyncio.create_task(_listen(receive, broadcast, reader))
    try:
        await send({**start, "headers": headers})
        await send({"type": "http.response.body", "body": OPENING, "more_body": True})
        while piece := await reader.next():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if not reader.cut:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    except asyncio.CancelledError:
        if not reader.cut or _cancelled_by_others():
            raise
        await _abort(send)
    finally:
        listening.cancel()
        broadcast.leave(reader)


def _cancelled_by_others() -> bool:
    task = asyncio.current_task()
    return task is None or task.uncancel() > 0


async def _listen(receive: Receive, broadcast: Broadcast, reader: Reader) -> None:
    """Wait until the client has gone. Nothing is cancelled with it but its own stream."""
    while (await receive())["type"] != "http.disconnect":
        pass
    reader.cut_off()


async def _abort(send: Send) -> None:
    """Close the connection of a client that does not read, with what it has not read.

    ASGI has no word for that; a server that only closes it keeps the connection until the client reads on. So uvicorn's is
    looked for where uvicorn keeps it; with another server, or a wrapped `send`, the connection is the server's to end.
    """
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is not None and hasattr(transport, "abort"):
        transport.abort()
        await asyncio.sleep(0)  # the server hears that the connection is lost
        await asyncio.sleep(0)
