"""A proxy that cuts: between a client and a server of this machine, at the level of TCP.

It passes every byte on as it is, also half of a connection that was closed, until it cuts. Each connection gets its
kind of cut and its place from the seed and its number, so a run with the same seed cuts at the same bytes:

    refuse      reset at once: the server hears nothing of it
    unanswered  the request is passed on and takes effect; reset before the first byte of its answer
    reset       reset (RST) after some bytes of answers: also within the head, within a frame or a character
    close       closed in order (FIN) after some bytes, as a proxy does that has waited too long
    hang        after some bytes nothing comes any more, in both directions; reset after `hang`

How many bytes is drawn for each connection, exponentially, `mean_bytes` in the middle. With `share` less than 1 that
part of the connections is cut, the others never.

In Python, in a thread of its own:

    with CuttingProxy(web.port, seed=7, mean_bytes=2000, kinds=["reset", "unanswered"]) as proxy:
        ... proxy.url, proxy.port
        proxy.pause(); proxy.go_on()        # no cuts in between
        proxy.cut_all()                     # reset all that is open, now
        assert sum(proxy.cuts.values()) > 100       # how many, by kind

For others, in a process of its own, until its standard input ends:

    python -m tests.streams.cutting --to PORT --seed 7 --mean-bytes 2000 --kinds reset,close

prints `{"port": ..., "url": ..., "seed": ...}`. Then each line of its input is an order (`pause`, `go_on`, `cut_all`,
`down`, `back`, `stand_still`, `cuts`), answered by one line: `{"cuts": {"reset": 3, ...}, "open": 2}`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from typing import Any, Self

KINDS = ("refuse", "unanswered", "reset", "close", "hang")
PIECE = 65536  # bytes


class CuttingProxy:
    """A port that leads to another one of this machine, or to a unix socket by its path.

    Beside the cuts by chance it may be `down` (nobody listens), or `stand_still` with all that is open; then `back`.
    Without kinds it cuts nothing by itself.
    """

    def __init__(
        self,
        target: int | str,
        *,
        seed: int = 0,
        mean_bytes: float = 2000,
        kinds: Sequence[str] = KINDS,
        share: float = 1.0,
        hang: timedelta = timedelta(seconds=2),
    ) -> None:
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"no such kinds: {sorted(unknown)}; there are {KINDS}")
        self.target, self.seed = target, seed
        self.cuts: Counter[str] = Counter()
        self._mean, self._kinds, self._share, self._hang = mean_bytes, tuple(kinds), share, hang
        self._number = 0
        self._cutting = True
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._open: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, ...]] = {}
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = 0
        self._do(self._back())
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def open(self) -> int:
        """How many connections there are."""
        return len(self._open)

    def pause(self) -> None:
        """Cut nothing more, until `go_on`. What was cut before stays so, also what hangs."""
        self._cutting = False

    def go_on(self) -> None:
        self._cutting = True

    def cut_all(self) -> None:
        """Reset each connection that is open."""
        self._do(self._cut_all())

    def stand_still(self) -> None:
        """Let nothing through, with everything open, until `back`."""
        self._do(self._stand_still())

    def down(self) -> None:
        """Reset each connection and listen no more, until `back`."""
        self._do(self._down())

    def back(self) -> None:
        """Be there again, on the same port."""
        self._do(self._back())

    def close(self) -> None:
        self._do(self._down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _back(self) -> None:
        self._flows.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1000)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _stand_still(self) -> None:
        self._flows.clear()

    async def _cut_all(self) -> None:
        cut = list(self._open)
        self.cuts["all"] += len(cut)
        for task in cut:
            task.cancel()
        await asyncio.gather(*cut, return_exceptions=True)

    async def _down(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._flows.set()
        cut = list(self._open)
        for task in cut:
            task.cancel()
        await asyncio.gather(*cut, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Lead one connection until its end."""
        task = asyncio.current_task()
        assert task is not None
        self._number += 1
        chance = random.Random(f"{self.seed}:{self._number}")
        cut = ""
        if self._kinds and chance.random() < self._share:
            cut = chance.choice(self._kinds)
        after = 0 if cut == "unanswered" else 1 + int(chance.expovariate(1 / self._mean))
        ends: tuple[asyncio.StreamWriter, ...] = (writer,)
        self._open[task] = ends
        try:
            if cut == "refuse" and self._cutting:
                self.cuts[cut] += 1
                return
            answers, requests = await self._reach()
            self._open[task] = ends = (writer, requests)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._flow(reader, requests))
                both.create_task(self._answer(answers, writer, cut, after))
        except* (OSError, asyncio.CancelledError):
            pass  # one side went away, or was cut
        finally:
            del self._open[task]
            for each in ends:
                _reset(each)

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self.target, str):
            return await asyncio.open_unix_connection(self.target)
        return await asyncio.open_connection("127.0.0.1", self.target)

    async def _flow(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        while piece := await source.read(PIECE):
            await self._flows.wait()
            to.write(piece)
            await to.drain()
        await self._flows.wait()
        to.write_eof()

    async def _answer(self, source: asyncio.StreamReader, to: asyncio.StreamWriter, cut: str, after: int) -> None:
        """Pass on what the server says, up to the cut. Raises ConnectionResetError to cut both sides."""
        passed = 0
        while piece := await source.read(PIECE):
            await self._flows.wait()
            if cut and self._cutting and passed + len(piece) > after:
                to.write(piece[: max(after - passed, 0)])
                await self._cut(to, cut)
            passed += len(piece)
            to.write(piece)
            await to.drain()
        await self._flows.wait()
        to.write_eof()

    async def _cut(self, to: asyncio.StreamWriter, cut: str) -> None:
        self.cuts[cut] += 1
        await to.drain()
        if cut == "hang":
            await asyncio.sleep(self._hang.total_seconds())
        elif cut == "close":
            to.close()
            await to.wait_closed()
        raise ConnectionResetError


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset; one that was closed in order stays so."""
    wire: socket.socket | None = writer.get_extra_info("socket")
    if wire is not None and wire.fileno() >= 0 and not writer.is_closing():
        if wire.family != socket.AF_UNIX:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


def main() -> None:
    own = argparse.ArgumentParser(
        prog="python -m tests.streams.cutting", description=(__doc__ or "").partition("\n")[0]
    )
    own.add_argument("--to", required=True, help="the port of the server, or the path of its socket")
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--mean-bytes", type=float, default=2000)
    own.add_argument("--kinds", default=",".join(KINDS), help=f"of {','.join(KINDS)}")
    own.add_argument("--share", type=float, default=1.0, help="of the connections that are cut")
    own.add_argument("--hang-seconds", type=float, default=2.0)
    given = own.parse_args()
    with CuttingProxy(
        int(given.to) if given.to.isdigit() else given.to,
        seed=given.seed,
        mean_bytes=given.mean_bytes,
        kinds=[kind for kind in given.kinds.split(",") if kind],
        share=given.share,
        hang=timedelta(seconds=given.hang_seconds),
    ) as proxy:
        print(json.dumps({"port": proxy.port, "url": proxy.url, "seed": proxy.seed}), flush=True)
        orders = {each.__name__: each for each in (proxy.pause, proxy.go_on, proxy.cut_all)}
        orders |= {each.__name__: each for each in (proxy.down, proxy.back, proxy.stand_still)}
        for line in sys.stdin:
            if (order := line.strip()) in orders:
                orders[order]()
            elif order != "cuts":
                print(json.dumps({"error": f"no such order: {order}"}), flush=True)
                continue
            print(json.dumps({"cuts": dict(proxy.cuts), "open": proxy.open}), flush=True)


if __name__ == "__main__":
    main()
