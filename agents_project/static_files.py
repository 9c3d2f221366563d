"""The static files of the admin and the API docs, served by the ASGI application itself, beside Django and before it.

Not as a middleware: WhiteNoise's is a synchronous one, and would take each request of the API through two more threads.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.http import HttpRequest, HttpResponse, HttpResponseBase, HttpResponseNotFound, StreamingHttpResponse
from whitenoise.middleware import WhiteNoiseMiddleware  # type: ignore[import-untyped]

Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class StaticFiles(ASGIHandler):
    """Answers requests for static files, and 404 for any other; no middleware, no session, no database."""

    def load_middleware(self, is_async: bool = False) -> None:
        self._files = WhiteNoiseMiddleware(lambda request: HttpResponseNotFound())
        self._middleware_chain = sync_to_async(self._respond, thread_sensitive=False)

    def _respond(self, request: HttpRequest) -> HttpResponseBase:
        found: HttpResponseBase = self._files(request)
        if not isinstance(found, StreamingHttpResponse):
            return found
        # As a whole: under ASGI Django reads a file that is streamed into memory too, and warns.
        whole = HttpResponse(b"".join(cast(Iterable[bytes], found.streaming_content)), status=found.status_code)
        found.close()
        del whole["Content-Type"]
        for name, value in found.items():
            whole[name] = value
        return whole


def before(application: Asgi) -> Asgi:
    """Return an application that serves STATIC_URL itself and leaves all else to this one."""
    files = StaticFiles()
    prefix = "/" + settings.STATIC_URL.lstrip("/")

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        static = scope["type"] == "http" and scope["path"].startswith(prefix)
        await (files if static else application)(scope, receive, send)

    return serve
