"""A model server that keeps time: each chunk is due at a moment, carries it, and is said then, whoever is slow to read.

    python -m benchmarks.metronome --port 8123
    POST /v1/chat/completions   the last message is `chunks COUNT RATE`; the stream opens, and waits
    GET  /state                 {"waiting": streams, "speaking": streams, "said": chunks, "late_us": the latest chunk since `/begin`}
    POST /begin                 {"at_us": t}: all that wait speak from t on, by CLOCK_MONOTONIC in microseconds
    POST /hold                  whoever comes from now on waits for the next /begin

A chunk is `NUMBER@DUE+LATE `: its number from 0, when it was due, and how much later it was said, in microseconds. So who reads it
measures from the moment at which it should have been said, and a generator that cannot keep up shows (no coordinated
omission). The streams' first chunks are spread over one period. Between requests nothing is kept; HTTP is parsed by hand and a
chunk costs one write, for the benchmark shares its cores with this server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from heapq import heappop, heappush
from typing import Any, cast

SPREAD = 0.6180339887498949  # of a period, from one stream's first chunk to the next one's: never two together
LEAD_US = 500_000  # from /begin to the first chunk
LONGEST_TURN_US = 5_000  # of speaking without a look at the sockets
KEEP_ALIVE_SECONDS = 10.0  # a stream that waits says a comment so often

_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def now_us() -> int:
    return time.monotonic_ns() // 1000


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Speech:
    """One stream: `count` chunks, one every `period` microseconds from `begin` on."""

    __slots__ = ("before", "begin", "connection", "count", "next", "period", "usage")

    def __init__(self, connection: Connection, number: int, count: int, rate: float, usage: bool) -> None:
        self.connection = connection
        self.count, self.period = count, 1e6 / rate
        self.next = 0
        self.begin = 0
        self.usage = usage
        self.before = (
            b'data: {"id":"chatcmpl-%d","object":"chat.completion.chunk","created":1760000000,"model":"bench","choices":'
            % number
        )

    @property
    def due(self) -> int:
        return self.begin + int(self.next * self.period)

    def open(self) -> None:
        role = b'[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
        self.connection.write(_HEAD + _framed(self.before + role))

    def say(self, now: int) -> None:
        """Say the next chunk; after the last one also that it was."""
        due = self.due
        text = b"%d@%d+%d " % (self.next, due, now - due)
        said = _framed(b'%b[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % (self.before, text))
        self.next += 1
        if self.next == self.count:
            said += _framed(self.before + b'[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n')
            if self.usage:
                used = b'{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":%d}' % (self.count, self.count + 9)
                said += _framed(self.before + b'[],"usage":' + used + b"}\n\n")
            said += _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        self.connection.write(said)


class Metronome:
    """What all connections share: who waits, and who speaks next."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.held = True
        self.waiting: list[Speech] = []
        self._due: list[tuple[int, int, Speech]] = []
        self._number = 0
        self._said = self._late = 0
        self._timer: asyncio.Handle | None = None

    def state(self) -> dict[str, int]:
        return {"waiting": len(self.waiting), "speaking": len(self._due), "said": self._said, "late_us": self._late}

    def take(self, connection: Connection, document: dict[str, Any]) -> None:
        word, count, rate = str(document["messages"][-1]["content"]).split()
        if word != "chunks" or int(count) < 1 or float(rate) <= 0:
            raise ValueError("chunks COUNT RATE")
        self._number += 1
        usage = bool((document.get("stream_options") or {}).get("include_usage"))
        speech = connection.speech = Speech(connection, self._number, int(count), float(rate), usage)
        speech.open()
        self.waiting.append(speech)
        if not self.held:
            self.begin()

    def begin(self) -> int:
        """Let all that wait speak. Returns when, in microseconds of the monotonic clock."""
        at = now_us() + LEAD_US
        self.held = False
        self._late = 0
        for place, speech in enumerate(self.waiting):
            speech.begin = at + int(place * SPREAD % 1 * speech.period)
            self._number += 1  # the heap never compares two speeches
            heappush(self._due, (speech.due, self._number, speech))
        self.waiting.clear()
        self._wait()
        return at

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._due:
            self._timer = self.loop.call_at(self._due[0][0] / 1e6, self._speak)

    def _speak(self) -> None:
        """Say all that is due."""
        self._timer = None
        begun = now = now_us()
        due = self._due
        while due and due[0][0] <= now:
            at, _, speech = heappop(due)
            if speech.connection.speech is speech:  # its client is there still
                self._late = max(self._late, now - at)
                speech.say(now)
                self._said += 1
                if speech.next < speech.count:
                    self._number += 1
                    heappush(due, (speech.due, self._number, speech))
                else:
                    speech.connection.speech = None
            now = now_us()
            if now - begun > LONGEST_TURN_US:
                self._timer = self.loop.call_soon(self._speak)
                return
        self._wait()

    def keep_alive(self) -> None:
        for speech in self.waiting:
            speech.connection.write(_framed(b": waiting\n\n"))
        self.loop.call_later(KEEP_ALIVE_SECONDS, self.keep_alive)


class Connection(asyncio.Protocol):
    """One client: a request, its answer, the next request."""

    def __init__(self, metronome: Metronome) -> None:
        self._metronome = metronome
        self._received = b""
        self.speech: Speech | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self.speech in self._metronome.waiting:
            self._metronome.waiting.remove(self.speech)
        self.speech = None

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = int(headers.get("content-length", 0))
        if len(rest) < size:
            return
        self._received = rest[size:]
        try:
            self._answer(first.split(" ")[1], rest[:size])
        except Exception as error:  # a mistake in what was asked must show at the client
            self._say(400, {"error": {"message": repr(error), "type": "invalid_request_error", "code": None}})

    def _answer(self, path: str, body: bytes) -> None:
        metronome = self._metronome
        if path.endswith("/chat/completions"):
            metronome.take(self, json.loads(body))
        elif path == "/state":
            self._say(200, metronome.state())
        elif path == "/begin":
            self._say(200, {"at_us": metronome.begin()})
        elif path == "/hold":
            metronome.held = True
            self._say(200, {})
        else:
            self._say(404, {"error": {"message": f"There is no {path} here."}})

    def _say(self, code: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.write(
            b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (code, len(body)) + body
        )


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    metronome = Metronome(loop)
    metronome.keep_alive()
    server = await loop.create_server(lambda: Connection(metronome), "127.0.0.1", port, backlog=4096)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metronome", description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    asyncio.run(serve(given.port))


if __name__ == "__main__":
    main()
