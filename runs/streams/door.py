"""Lets readers in through Django, its middleware and its view, in one go on one of a few threads.

Django's own ASGI handler makes a thread, and a database connection's wrapper in it, for each request, and takes the request
from the loop to the thread and back for every middleware that knows no coroutines. That is most of what it costs to let a
reader in, and when a thousand come back at once it is what they wait for. Here the middleware is the same, in its
synchronous form, which Django keeps for WSGI.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar, cast

from django.core import signals
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIHandler, get_script_prefix
from django.core.handlers.base import BaseHandler
from django.http import HttpResponseBase
from django.urls import Resolver404, resolve, set_script_prefix

from runs.streams import replies

if TYPE_CHECKING:
    from runs.streams.app import Application, Message, Receive, Scope, Send

logger = logging.getLogger("longhaul.streams")

AT_ONCE = 8  # threads; more of them take the processor from the streams that are open
LINE_SECONDS = 5.0  # a line that has not moved for so long is left: the host's policy may hang, and the threads with it
ENDS_WITH = "/stream"

R = TypeVar("R")
Work = tuple[contextvars.Context, Callable[[], Any], "asyncio.Future[Any]", asyncio.AbstractEventLoop]


class Threads:
    """A few threads that do what loops ask them to. None of them keeps the process from ending."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._work: SimpleQueue[Work] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._alive = 0

    async def do(self, work: Callable[[], R]) -> R:
        """Return what the work returns, or raise what it raises."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[R] = loop.create_future()
        with self._lock:
            self._idle -= 1
            if self._idle < 0 and self._alive < self._most:
                self._alive += 1
                self._idle += 1
                threading.Thread(target=self._run, name="longhaul-door", daemon=True).start()
        self._work.put((contextvars.copy_context(), work, answer, loop))
        return await answer

    def _run(self) -> None:
        while True:
            context, work, answer, loop = self._work.get()
            found, error = replies.tried(partial(context.run, work))
            with self._lock:
                self._idle += 1
            try:
                loop.call_soon_threadsafe(replies.fill, answer, found, error)
            except RuntimeError:
                pass  # the loop was closed


class Door(ASGIHandler):
    """Django's handler, with its middleware for threads."""

    threads = Threads(AT_ONCE)  # of the process

    def __init__(self, application: ASGIHandler) -> None:
        BaseHandler.__init__(self)
        self.load_middleware(is_async=False)
        self._application: Application = application
        self._turns: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}
        self._let_in = 0

    @classmethod
    def beside(cls, application: Application) -> Door | None:
        """Return the door for readers; None beside an application of the host's own, which must see all requests."""
        return cls(application) if type(application) is ASGIHandler else None

    def leads_to(self, scope: Scope) -> bool:
        """Return whether this request asks for a stream, by the address alone."""
        path: str = scope["path"]
        if not path.endswith(ENDS_WITH):
            return False
        try:
            found = resolve(path.removeprefix(scope.get("root_path", "")))
        except Resolver404:
            return False
        return getattr(getattr(found.func, "cls", None), "streams", False)

    async def let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request; by Django's own way when the line is long and does not move."""
        try:
            body_file = await self.read_body(receive)
        except RequestAborted:
            return
        try:
            # A turn is for the threads alone: none waits with it for a client, who may be slow.
            turn = self._turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE))
            if not await self._comes(turn):
                await self._application(scope, _once_more(body_file, receive), send)
                return
            try:
                response = await self.threads.do(lambda: self._respond(scope, body_file))
            finally:
                self._let_in += 1
                turn.release()
            await self.send_response(response, cast("Any", send))
            if response.streaming:
                await self.threads.do(response.close)
        finally:
            body_file.close()

    async def _comes(self, turn: asyncio.Semaphore) -> bool:
        """Wait for a turn, as long as the line moves. False: it does not."""
        while True:
            before = self._let_in
            try:
                async with asyncio.timeout(LINE_SECONDS):
                    await turn.acquire()
            except TimeoutError:
                if self._let_in == before:
                    return False
            else:
                return True

    def _respond(self, scope: Scope, body_file: Any) -> HttpResponseBase:
        set_script_prefix(get_script_prefix(scope))
        signals.request_started.send(sender=ASGIHandler, scope=scope)
        request, refused = self.create_request(scope, body_file)
        try:
            response = cast(HttpResponseBase, refused if request is None else self.get_response(request))
        except BaseException:  # Django answers for all others
            signals.request_finished.send(sender=ASGIHandler)
            raise
        response._handler_class = ASGIHandler  # type: ignore[attr-defined]
        if not response.streaming:
            response.close()  # here, where its connection to the database is
        return response


def _once_more(body_file: Any, receive: Receive) -> Receive:
    """Return a `receive` that begins with the body that was read."""
    read: list[Message] = [{"type": "http.request", "body": body_file.read(), "more_body": False}]

    async def again() -> Message:
        return read.pop() if read else await receive()

    return again
