"""The relay that most people build, beside which `benchmarks.streams` measures Longhaul: chunks through a Redis stream.

    python -m benchmarks.relay                   the producer
    uvicorn benchmarks.relay:application         the web process

The producer asks the model server, gathers what a stream says for a few milliseconds and XADDs it to a Redis stream of its
own; all that are due go in one pipeline. A reader's request waits in XREAD and is sent what comes as server-sent events, with
Redis's own id as the cursor. Nothing is stored but in Redis; who dies takes the run with it; nobody is asked who may read.

It gets the better of each doubt: asyncio throughout, the same uvicorn, one pool of connections a process, no framework, raw chunks
by httpx2 and orjson instead of the `openai` package's objects.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httpx2
import orjson
import redis.asyncio

PLAN = "relay:plan"  # a list: the producer takes from it what it is to produce
BLOCK_MS = 15_000  # then a ping
MOST = 500  # entries of one read
CONNECTIONS = 5000

Message = MutableMapping[str, Any]
_DONE: Any = {"type": "done", "data": "{}"}


def stream_key(run: str) -> str:
    return f"relay:{run}"


def _event(text: str) -> Any:
    return {"type": "text.delta", "data": orjson.dumps({"text": text})}


def _redis() -> redis.asyncio.Redis:
    pool: redis.asyncio.ConnectionPool = redis.asyncio.ConnectionPool.from_url(
        os.environ["REDIS_URL"], max_connections=CONNECTIONS, socket_timeout=None, protocol=2
    )
    return redis.asyncio.Redis(connection_pool=pool)


# --- the producer ---------------------------------------------------------------------------------------------------------------


class Producer:
    """Asks the model, and relays what it says. `gather`: seconds; 0 is one XADD a chunk, at once."""

    def __init__(self, gather: float) -> None:
        self._gather = gather
        self._redis = _redis()
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._model = httpx2.AsyncClient(timeout=httpx2.Timeout(600.0), limits=limits)
        self._said: dict[str, list[str]] = {}
        self._over: set[str] = set()
        self._work = asyncio.Event()

    async def produce(self) -> None:
        flushing = asyncio.create_task(self._flush()) if self._gather else None
        tasks = set()
        while flushing is None or not flushing.done():
            taken: Any = await self._redis.blpop([PLAN], timeout=1)
            if taken is None:
                continue
            plan = json.loads(taken[1])
            for run in plan["runs"]:
                task = asyncio.create_task(self._speak(run, plan["prompt"]))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        await flushing

    async def _speak(self, run: str, prompt: str) -> None:
        body = {"model": "bench", "messages": [{"role": "user", "content": prompt}], "stream": True}
        url = f"{os.environ['OPENAI_BASE_URL']}/chat/completions"
        async with self._model.stream("POST", url, content=orjson.dumps(body)) as response:
            rest = b""
            async for read in response.aiter_bytes():
                lines = (rest + read).split(b"\n")
                rest = lines.pop()
                for line in lines:
                    if line.startswith(b"data: {"):
                        choices = orjson.loads(line[6:])["choices"]
                        if choices and (text := choices[0]["delta"].get("content")):
                            await self._say(run, text)
        if self._gather:  # behind what it has said
            self._over.add(run)
            self._work.set()
        else:
            await self._redis.xadd(stream_key(run), _DONE)

    async def _say(self, run: str, text: str) -> None:
        if self._gather:
            self._said.setdefault(run, []).append(text)
            self._work.set()
        else:
            await self._redis.xadd(stream_key(run), _event(text))

    async def _flush(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            await asyncio.sleep(self._gather)
            pipeline = self._redis.pipeline(transaction=False)
            said, self._said = self._said, {}
            over, self._over = self._over, set()
            for run, texts in said.items():
                pipeline.xadd(stream_key(run), _event("".join(texts)))
            for run in over:
                pipeline.xadd(stream_key(run), _DONE)
            await pipeline.execute()


# --- the web process ------------------------------------------------------------------------------------------------------------

_web: redis.asyncio.Redis | None = None


async def application(
    scope: Any, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    """`GET /{run}`: the run's stream, from `Last-Event-ID` on."""
    global _web
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if _web is None:
        _web = _redis()
    run = scope["path"].rpartition("/")[2]
    after = dict(scope["headers"]).get(b"last-event-id", b"0-0")
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b": relay\n\n", "more_body": True})
    if not run:
        return await send({"type": "http.response.body", "body": b"", "more_body": False})
    reading = asyncio.create_task(_read(_web, run, after, send))
    listening = asyncio.create_task(_gone(receive))
    done, left = await asyncio.wait([reading, listening], return_when=asyncio.FIRST_COMPLETED)
    for each in left:
        each.cancel()
    for each in done:
        each.result()


async def _gone(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(
    client: redis.asyncio.Redis, run: str, after: bytes, send: Callable[[Message], Awaitable[None]]
) -> None:
    key = stream_key(run)
    over = False
    while not over:
        found: Any = await client.xread({key: after}, count=MOST, block=BLOCK_MS)
        frames = []
        for _, entries in found or []:
            for after, fields in entries:
                frames.append(b"id: %b\nevent: %b\ndata: %b\n\n" % (after, fields[b"type"], fields[b"data"]))
                over = over or fields[b"type"] == b"done"
        await send({"type": "http.response.body", "body": b"".join(frames) or b": ping\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _produce() -> None:
    await Producer(float(os.environ.get("LONGHAUL_BENCH_GATHER_MS", "5")) / 1000).produce()


if __name__ == "__main__":
    asyncio.run(_produce())
