"""An ASGI client of an application in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson

from runs.streams.app import Application
from tests.http import frames
from tests.http.frames import Frame


class Answer:
    """What comes back: `status` and `headers` at once, the rest as it is sent. `holds` blocks sending, as a slow client does."""

    def __init__(self, application: Application, scope: dict[str, Any], body: bytes) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.left = asyncio.Event()
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.ended = False  # by the server, in order
        self._asked = False
        self._body = body
        self._sent: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._started = asyncio.Event()
        self.task = asyncio.create_task(self._run(application, scope))
        opened.add(self)
        self.task.add_done_callback(lambda _: opened.discard(self))

    async def _run(self, application: Application, scope: dict[str, Any]) -> None:
        try:
            await application(scope, self._receive, self._send)
        finally:
            self._started.set()
            self._sent.put_nowait(None)

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.may_send.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
            self._started.set()
            return
        self._sent.put_nowait(message.get("body", b""))
        self.ended = not message.get("more_body", False)

    async def started(self) -> Answer:
        await asyncio.wait_for(self._started.wait(), 20)
        if not self.status and self.task.done():
            self.task.result()
        return self

    async def pieces(self) -> AsyncIterator[bytes]:
        while (piece := await asyncio.wait_for(self._sent.get(), 20)) is not None:
            yield piece

    def frames(self) -> AsyncIterator[Frame]:
        return frames.frames(self.pieces())

    async def whole(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> list[Frame]:
        """Read to the end, without comments."""
        return await frames.events(self.pieces())

    async def leave(self) -> None:
        """Hang up, and wait until the application has noticed."""
        self.left.set()
        await asyncio.wait_for(asyncio.shield(self.task), 20)


opened: set[Answer] = set()


async def ask(
    application: Application, method: str, address: str, key: str = "", body: Any = None, **headers: str
) -> Answer:
    """Send a request; return when its answer has begun."""
    path, _, query = address.partition("?")
    sent = b"" if body is None else orjson.dumps(body)
    said = {"host": "testserver", "content-type": "application/json", "content-length": str(len(sent)), **headers}
    if key:
        said["authorization"] = f"Bearer {key}"
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": query.encode(), "scheme": "http", "server": ("testserver", 80),
        "client": ("127.0.0.1", 1), "headers": [(name.encode(), value.encode()) for name, value in said.items()],
    }  # fmt: skip
    return await Answer(application, scope, sent).started()
