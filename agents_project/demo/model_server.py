"""A real HTTP server that speaks OpenAI's streaming chat completions, and says what a script tells it to say.

    with ModelServer(scripts.sequential(total=5)) as server:          # in a thread, for tests
        client = OpenAI(base_url=server.url, api_key="any")

    python -m agents_project.demo.model_server --port 0 --script agents_project.demo.scripts:demo
    {"url": "http://127.0.0.1:40123/v1"}                              # on stdout, once it listens

A script is a function from a `ModelCall` to a reply: a sequence of actions. It must decide from the messages of the
call alone, for a leg that was killed asks again. A client that does not stream gets the same reply in one piece.

HTTP is parsed by hand, for benchmarks share their cores with this server: only what clients of chat completions send.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import signal
import socket
import stat
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self, TypeAlias, cast

import orjson

LARGEST_HEAD = 64 * 1024  # bytes
LARGEST_BODY = 64 * 1024 * 1024  # bytes
CALLS_KEPT = 1000
CHARACTERS_PER_TOKEN = 4  # what usage is reckoned with, where the script reports none


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One request: its JSON `body`, its `number` at this server from 1, its headers under lower-case names."""

    body: Mapping[str, Any]
    number: int
    headers: Mapping[str, str]

    @property
    def messages(self) -> list[dict[str, Any]]:
        return cast("list[dict[str, Any]]", self.body.get("messages") or [])

    @property
    def tools(self) -> list[str]:
        """The names of the offered tools; empty where the client forbids their use."""
        if self.body.get("tool_choice") == "none":
            return []
        return [tool["function"]["name"] for tool in self.body.get("tools") or []]


# Actions that say something


@dataclass(frozen=True, slots=True)
class Text:
    """Text in chunks of `chunk_chars` (0: one chunk), `delay` seconds between them."""

    text: str
    chunk_chars: int = 0
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Thinking; services differ in the `field` that carries it: reasoning_content or reasoning."""

    text: str
    chunk_chars: int = 0
    delay: float = 0.0
    field: str = "reasoning_content"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call; several in one reply are parallel. `arguments` given as text go out as they are, JSON or not.

    With `chunk_chars` the arguments come in pieces, `delay` seconds between them, those of neighbouring calls by turns.
    """

    name: str
    arguments: Mapping[str, Any] | str = field(default_factory=dict)
    chunk_chars: int = 0
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens to report in place of the reckoned ones."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """The reason to finish with, in place of "stop" or "tool_calls". None leaves it out, `done` false the [DONE]."""

    reason: str | None
    done: bool = True


@dataclass(frozen=True, slots=True)
class Empty:
    """An answer that says nothing: a role, then the end."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait. What was said before goes out first, so that the client reads it by itself."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Headers:
    """Headers of the streamed answer, as that of a rate that is left. The first action, if at all."""

    headers: Mapping[str, str]


# Actions that go wrong. After Status, Cut and Silence nothing more is played.


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes in place of the server's own events."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Garbage:
    """An event whose data is this text: no JSON, or another JSON than the protocol's."""

    text: str


@dataclass(frozen=True, slots=True)
class Cut:
    """End the connection: by a reset, or (`reset` false) as if all had been said."""

    reset: bool = True


@dataclass(frozen=True, slots=True)
class Silence:
    """Say nothing more and keep the connection, until the client leaves. As the first action: not even a status."""


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with an HTTP status and no stream. The first action, if at all."""

    code: int
    body: Mapping[str, Any] | str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


Action: TypeAlias = (
    Text | Reasoning | ToolCall | Usage | Finish | Empty | Pause | Headers | Raw | Garbage | Cut | Silence | Status
)
Reply: TypeAlias = Sequence[Action]
Script: TypeAlias = Callable[[ModelCall], Reply]


class ScriptError(Exception):
    """The script, or what was asked of it, is wrong."""


# A reply becomes a sequence of these: bytes to send, seconds to wait, or an action that ends the connection's speech.
_Play: TypeAlias = bytes | float | Cut | Silence

_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_LAST_CHUNK = b"0\r\n\r\n"


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(data: bytes) -> bytes:
    return _framed(b"data: %b\n\n" % data)


def _pieces(text: str, length: int) -> list[str]:
    return [text[start : start + length] for start in range(0, len(text), length)] if length else [text]


def _arguments(call: ToolCall) -> str:
    return call.arguments if isinstance(call.arguments, str) else orjson.dumps(call.arguments).decode()


def _ending(reply: Reply) -> Finish:
    given = next((action for action in reply if isinstance(action, Finish)), None)
    return given or Finish("tool_calls" if any(isinstance(action, ToolCall) for action in reply) else "stop")


def _usage(call: ModelCall, size: int, reply: Reply) -> dict[str, Any]:
    usage = next((action for action in reply if isinstance(action, Usage)), None)
    if usage is None:
        said = sum(
            len(_arguments(action)) if isinstance(action, ToolCall) else len(action.text)
            for action in reply
            if isinstance(action, Text | Reasoning | ToolCall)
        )
        usage = Usage(size // CHARACTERS_PER_TOKEN, said // CHARACTERS_PER_TOKEN)
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _headers(said: Headers) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in said.headers.items()).encode()


def _streamed(call: ModelCall, size: int, reply: Reply) -> Iterator[_Play]:
    """Yield what the reply is on the wire: bytes, waits between them, perhaps a bad end."""
    if reply and isinstance(reply[0], Silence | Cut):
        yield reply[0]
        return
    head = b'{"id":"chatcmpl-%d","object":"chat.completion.chunk","created":%d,"model":%b,' % (
        call.number,
        1_760_000_000 + call.number,
        orjson.dumps(call.body.get("model", "")),
    )

    def chunk(delta: bytes, reason: bytes = b"null") -> bytes:
        return _event(b'%b"choices":[{"index":0,"delta":%b,"finish_reason":%b}]}' % (head, delta, reason))

    yield _STREAM_HEAD[:-2] + _headers(reply[0]) + b"\r\n" if reply and isinstance(reply[0], Headers) else _STREAM_HEAD
    if not reply or not isinstance(reply[0], Raw):
        yield chunk(b'{"role":"assistant","content":""}')
    calls: list[ToolCall] = []
    spoken = 0  # calls that are out

    def call_chunks() -> Iterator[_Play]:
        nonlocal spoken
        waiting = []
        for index in range(spoken, len(calls)):
            one = calls[index]
            pieces = _pieces(_arguments(one), one.chunk_chars)
            opening = {
                "index": index,
                "id": f"call_{call.number}_{index}",
                "type": "function",
                "function": {"name": one.name, "arguments": "" if one.chunk_chars else pieces.pop()},
            }
            yield chunk(b'{"tool_calls":[%b]}' % orjson.dumps(opening))
            waiting.append((index, one.delay, pieces[::-1]))
        spoken = len(calls)
        while any(pieces for _, _, pieces in waiting):
            for index, delay, pieces in waiting:
                if pieces:
                    if delay:
                        yield delay
                    piece = {"index": index, "function": {"arguments": pieces.pop()}}
                    yield chunk(b'{"tool_calls":[%b]}' % orjson.dumps(piece))

    for action in reply:
        if isinstance(action, ToolCall):
            calls.append(action)  # spoken with its neighbours
            continue
        yield from call_chunks()
        match action:
            case Text() | Reasoning():
                name = b"content" if isinstance(action, Text) else action.field.encode()
                for number, piece in enumerate(_pieces(action.text, action.chunk_chars)):
                    if number and action.delay:
                        yield action.delay
                    yield chunk(b'{"%b":%b}' % (name, orjson.dumps(piece)))
            case Pause():
                yield action.seconds
            case Garbage():
                yield _event(action.text.encode())
            case Raw():
                yield _framed(action.data)
            case Cut() | Silence():
                yield action
                return
            case Status():
                raise ScriptError("Status must be the only action of its reply.")
            case Usage() | Finish() | Empty() | Headers():
                pass  # said at the end
    yield from call_chunks()
    ending = _ending(reply)
    if ending.reason is not None:
        yield chunk(b"{}", orjson.dumps(ending.reason))
    if (call.body.get("stream_options") or {}).get("include_usage"):
        yield _event(b'%b"choices":[],"usage":%b}' % (head, orjson.dumps(_usage(call, size, reply))))
    yield (_event(b"[DONE]") if ending.done else b"") + _LAST_CHUNK


def _whole(call: ModelCall, size: int, reply: Reply) -> Iterator[_Play]:
    """Yield the reply for a client that does not stream: the waits, then one JSON document."""
    calls: list[dict[str, Any]] = []
    for action in reply:
        match action:
            case Cut() | Silence():
                yield action
                return
            case Pause():
                yield action.seconds
            case Text() | Reasoning() if action.delay:
                yield action.delay * (len(_pieces(action.text, action.chunk_chars)) - 1)
            case ToolCall():
                function = {"name": action.name, "arguments": _arguments(action)}
                calls.append({"id": f"call_{call.number}_{len(calls)}", "type": "function", "function": function})
            case _:
                pass
    text = "".join(action.text for action in reply if isinstance(action, Text))
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    if calls:
        message["tool_calls"] = calls
    document = {
        "id": f"chatcmpl-{call.number}",
        "object": "chat.completion",
        "created": 1_760_000_000 + call.number,
        "model": call.body.get("model", ""),
        "choices": [{"index": 0, "message": message, "finish_reason": _ending(reply).reason}],
        "usage": _usage(call, size, reply),
    }
    yield _plain(200, orjson.dumps(document))


def _plain(code: int, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
    known = HTTPStatus.__members__.values()
    phrase = next((status.phrase for status in known if status == code), "Unknown")
    lines = [f"HTTP/1.1 {code} {phrase}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _problem(code: int, message: str) -> bytes:
    return _plain(code, orjson.dumps({"error": {"message": message, "type": "invalid_request_error", "code": None}}))


def _of_status(action: Status) -> bytes:
    body = action.body.encode() if isinstance(action.body, str) else orjson.dumps(action.body)
    return _plain(action.code, body, action.headers)


class _Desk:
    """What all connections of a server share."""

    def __init__(self, script: Script, keep: int) -> None:
        self.script = script
        self.calls: deque[ModelCall] = deque(maxlen=keep)
        self.number = 0
        self.open_streams = 0
        self.connections: set[_Connection] = set()


class _Connection(asyncio.Protocol):
    """One client's connection: reads a request, plays the reply, reads the next."""

    def __init__(self, desk: _Desk, loop: asyncio.AbstractEventLoop) -> None:
        self._desk = desk
        self._loop = loop
        self._received = bytearray()
        self._head: tuple[str, str, dict[str, str], int] | None = None  # method, path, headers, length of the body
        self._playing: Iterator[_Play] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._desk.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._desk.connections.discard(self)
        self._stop()

    def eof_received(self) -> bool:
        return False  # a client that has left reads no more: asyncio closes, and the reply ends

    def data_received(self, data: bytes) -> None:
        self._received += data
        while self._playing is None and self._take_request():
            pass

    def close(self) -> None:
        self._transport.abort()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._playing is not None:
            self._playing = None
            self._desk.open_streams -= 1

    def _take_request(self) -> bool:
        """Answer the next whole request that has come; return whether there was one."""
        received = self._received
        if self._head is None:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                if len(received) > LARGEST_HEAD:
                    self._refuse(431, "The request's head is too large.")
                return False
            first, *lines = received[:end].decode("latin-1").split("\r\n")
            words = first.split(" ")
            headers = {
                name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            length = headers.get("content-length", "0")
            if len(words) != 3 or "transfer-encoding" in headers or not length.isdigit():
                self._refuse(400, "Send HTTP/1.1 with a Content-Length.")
                return False
            if int(length) > LARGEST_BODY:
                self._refuse(413, "The request's body is too large.")
                return False
            if headers.get("expect", "").lower() == "100-continue":
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            del received[: end + 4]
            self._head = (words[0], words[1], headers, int(length))
        method, path, headers, size = self._head
        if len(received) < size:
            return False
        body = bytes(received[:size])
        del received[:size]
        self._head = None
        self._answer(method, path.partition("?")[0], headers, body)
        return not self._transport.is_closing()

    def _refuse(self, code: int, message: str) -> None:
        self._transport.write(_problem(code, message))
        self._transport.close()

    def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        if method == "GET" and path.endswith("/models"):
            self._transport.write(_plain(200, b'{"object":"list","data":[{"id":"demo","object":"model"}]}'))
            return
        if method != "POST" or not path.endswith("/chat/completions"):
            self._transport.write(_problem(404, f"There is no {method} {path} here."))
            return
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            self._transport.write(_problem(400, f"The body is not JSON: {error}"))
            return
        if not isinstance(document, dict):
            self._transport.write(_problem(400, "The body is not a JSON object."))
            return
        self._desk.number += 1
        call = ModelCall(document, self._desk.number, headers)
        self._desk.calls.append(call)
        try:
            reply = self._desk.script(call)
            if reply and isinstance(reply[0], Status):
                self._transport.write(_of_status(reply[0]))
                return
        except Exception as error:  # a script's mistake must show at the client, not hang it
            print(f"The script failed on call {call.number}: {error!r}", file=sys.stderr)
            self._transport.write(_problem(500, f"The script failed: {error!r}"))
            return
        self._desk.open_streams += 1
        self._playing = (_streamed if document.get("stream") else _whole)(call, len(body), reply)
        self._play()

    def _play(self) -> None:
        """Send what needs no waiting in one write, then wait for what does, or begin with the next request."""
        self._timer = None
        if self._playing is None:
            return
        ready: list[bytes] = []
        for play in self._playing:
            if isinstance(play, bytes):
                ready.append(play)
            elif isinstance(play, float | int):
                self._transport.write(b"".join(ready))
                self._timer = self._loop.call_later(play, self._play)
                return
            else:
                self._transport.write(b"".join(ready))
                if isinstance(play, Cut):
                    self._cut(play.reset)
                return  # silent: the stream stays open until the client goes
        self._transport.write(b"".join(ready))
        self._stop()
        if self._received:
            self._loop.call_soon(self.data_received, b"")

    def _cut(self, reset: bool) -> None:
        if not reset:
            self._transport.close()
            return
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            # linger for no time: the kernel sends RST in place of FIN
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


class ModelServer:
    """The server in a thread of this process. A context manager; `url` is what OPENAI_BASE_URL takes.

    `script` may be replaced while it runs. `calls` are the last requests, `open_streams` the replies that are being
    played now. Not for a process under gevent's patches, whose threads are none: start the module there.
    """

    def __init__(self, script: Script, port: int = 0) -> None:
        self._desk = _Desk(script, CALLS_KEPT)
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="model server", daemon=True)
        self._started = threading.Event()
        self._failure: OSError | None = None
        self.url = ""

    @property
    def script(self) -> Script:
        return self._desk.script

    @script.setter
    def script(self, script: Script) -> None:
        self._desk.script = script

    @property
    def calls(self) -> list[ModelCall]:
        return list(self._desk.calls)

    @property
    def open_streams(self) -> int:
        return self._desk.open_streams

    def start(self) -> Self:
        """Listen. Raises OSError when the port is taken."""
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def stop(self) -> None:
        """Stop listening, and cut what is being said."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            server = self._loop.run_until_complete(_listen(self._loop, self._desk, self._port))
        except OSError as error:
            self._failure = error
            self._started.set()
            self._loop.close()
            return
        self.url = _url(server)
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(_end(server, self._desk))
        self._loop.close()


async def _listen(loop: asyncio.AbstractEventLoop, desk: _Desk, port: int) -> asyncio.Server:
    return await loop.create_server(lambda: _Connection(desk, loop), "127.0.0.1", port, backlog=4096)


async def _end(server: asyncio.Server, desk: _Desk) -> None:
    server.close()
    for connection in list(desk.connections):
        connection.close()
    await asyncio.sleep(0)  # lets the connections hear that they are lost


def _url(server: asyncio.Server) -> str:
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


def load(name: str, options: Mapping[str, Any] | None = None) -> Script:
    """Return the script `module:attribute`; with options the attribute is a function that makes one of them."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ScriptError(f"A script is named module:attribute, and {name!r} is not.")
    try:
        script = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ScriptError(f"There is no script {name!r}: {error}") from error
    return cast("Script", script if options is None else script(**options))


async def serve(script: Script, port: int) -> None:
    """Serve until SIGTERM, SIGINT, or the end of the process that started this one."""
    loop = asyncio.get_running_loop()
    desk = _Desk(script, keep=0)
    server = await _listen(loop, desk, port)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    mode = os.fstat(0).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):  # whoever holds the other end is gone when it closes

        def look() -> None:
            if not os.read(0, 65536):
                loop.remove_reader(0)
                ended.set()

        loop.add_reader(0, look)
    print(json.dumps({"url": _url(server)}), flush=True)
    parent = os.getppid()
    while not ended.is_set() and os.getppid() == parent:
        try:
            await asyncio.wait_for(ended.wait(), timeout=1)
        except TimeoutError:
            pass  # time to look for the parent again
    await _end(server, desk)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m agents_project.demo.model_server", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--port", type=int, default=0, help="0 for a free one")
    parser.add_argument("--script", default="agents_project.demo.scripts:demo", help="module:attribute")
    parser.add_argument("--options", type=json.loads, help="JSON object: the script's attribute is called with it")
    given = parser.parse_args()
    # Under the name by which scripts import this module, so that their actions are of the classes that are served.
    module = importlib.import_module("agents_project.demo.model_server")
    try:
        asyncio.run(module.serve(module.load(given.script, given.options), given.port))
    except (OSError, module.ScriptError) as error:
        sys.exit(f"model server: {error}")


if __name__ == "__main__":
    main()
