"""The readers of `benchmarks.streams`, in a process of their own: each follows one stream to its end, over all cuts.

The first line of stdin is a plan, in JSON:

    port, key       of the web process
    paths           the streams; reader number n follows paths[n % len(paths)]
    readers         how many
    chunks          of each stream; null: nobody knows
    cut             mean seconds between two TCP resets of a reader, or null
    opening         how many connect at once
    light           true: only the seqs of events are looked at, not what they say
    records         a file for what was measured, or null
    seed            of chance

Later lines are commands: `{"storm": seconds}` resets every reader within so many seconds, `{"stop": true}` ends all as they are.
It prints `{"open": n}` when all readers have been answered, `{"progress": {...}}` every few seconds, and last `{"seen": {...}}`.

A chunk of the model's text is `NUMBER@DUE+LATE `, in microseconds of the clock that all processes of a machine share, so its age
when it comes is known, from the moment at which it was due. `records` gets three 64-bit numbers a chunk: when it was due, when it
came (negative: in the second after its reader came back, in which it catches up), and how late the model server was.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import resource
import socket
import struct
import sys
import threading
import time
from array import array
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, cast

CHUNK = re.compile(rb"(\d+)@(\d+)\+(\d+) ")
FRAME = re.compile(rb"id: ([^\n]+)\nevent: ([^\n]+)\ndata: ([^\n]*)\n\n")
IDS = re.compile(rb"(?:\A|\n\n)id: (\d+)\n")
SPOKEN = b"text.delta"
LAST = (b"run.completed", b"run.failed", b"run.cancelled", b"done")
CAUGHT_UP_US = 1_000_000  # after a cut
GIVE_UP_SECONDS = 120.0  # without a byte: a stream has a ping every 15
AGAIN_SECONDS = 0.2  # after a connection that was refused
PROGRESS_SECONDS = 5.0


def now_us() -> int:
    return time.monotonic_ns() // 1000


class Reader:
    """What one reader has seen of one stream, whatever connections it came by."""

    def __init__(self, path: str, plan: dict[str, Any], records: array[int]) -> None:
        self.path = path
        self.light = bool(plan.get("light"))
        self.records = records
        self.next = 0  # the number that the next chunk has
        self.lost = self.doubled = self.cuts = self.frames = self.gaps = 0
        self.last = b""  # the cursor
        self.seq = 0  # of a light reader: the same as a number
        self.digest = hashlib.blake2b(digest_size=16)
        self.timely = 0  # from this moment on a chunk's age counts
        self.cut_at = self.caught_up = 0
        self.begun = self.done = 0  # when it first asked, and when it had all
        self.ended = False

    def take(self, frames: bytes) -> None:
        """Take whole frames, as they came."""
        now = now_us()
        if self.light:
            self._count(frames, now)
            return
        for id, event, data in FRAME.findall(frames):
            self.last = id
            self.frames += 1
            self.digest.update(b"%b %b %b\n" % (id, event, data))
            if event == SPOKEN:
                for number, due, late in CHUNK.findall(data):
                    self._chunk(int(number), int(due), int(late), now)
            elif event in LAST:
                self._end(now)
        if b"event: resume_gap\n" in frames:
            self.gaps += 1

    def _chunk(self, number: int, due: int, late: int, now: int) -> None:
        if number < self.next:
            self.doubled += 1
            return
        self.lost += number - self.next
        self.next = number + 1
        self.records.extend((due, now if now >= self.timely else -now, late))
        if self.cut_at and not self.caught_up and due > self.cut_at:
            self.caught_up = now

    def _count(self, frames: bytes, now: int) -> None:
        ids = [int(each) for each in IDS.findall(frames)]
        if not ids:
            return
        self.frames += len(ids)
        for seq in (ids[0],) if ids[-1] - ids[0] + 1 == len(ids) else ids:  # nearly always: one after another
            if seq <= self.seq:
                self.doubled += 1
            else:
                self.lost += seq - self.seq - 1
            self.seq = seq
        self.seq = ids[-1]
        self.last = b"%d" % self.seq
        if any(b"\nevent: %b\n" % last in frames for last in LAST):
            self._end(now)

    def _end(self, now: int) -> None:
        self.ended = True
        self.done = now
        if self.cut_at and not self.caught_up:
            self.caught_up = now

    def close(self, chunks: int | None) -> None:
        """Count what never came."""
        if chunks is not None and not self.light:
            self.lost += max(0, chunks - self.next)


class Line(asyncio.Protocol):
    """One connection of a reader. HTTP/1.1 with a chunked body is read by hand."""

    def __init__(self, crowd: Crowd, reader: Reader) -> None:
        self.crowd, self.reader = crowd, reader
        self.closed = crowd.loop.create_future()
        self.answered = crowd.loop.create_future()
        self.heard = time.monotonic()
        self._received = b""
        self._rest = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        reader = self.reader
        lines = [
            f"GET {reader.path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {self.crowd.plan['key']}",
            *([f"Last-Event-ID: {reader.last.decode()}"] if reader.last else []), "", "",
        ]  # fmt: skip
        reader.begun = reader.begun or now_us()
        self._transport.write("\r\n".join(lines).encode())

    def connection_lost(self, error: Exception | None) -> None:
        for each in (self.answered, self.closed):
            if not each.done():
                each.set_result(None)

    def reset(self) -> None:
        """Cut the connection: the kernel sends RST in place of FIN."""
        wire = self._transport.get_extra_info("socket")
        if wire is not None and wire.fileno() >= 0:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.reader.cuts += 1
        self.close()

    def close(self) -> None:
        self._transport.abort()
        self.connection_lost(None)  # at once: what is in its buffers is no longer ours

    def data_received(self, data: bytes) -> None:
        if self.closed.done():
            return
        self.heard = time.monotonic()
        received = self._received + data if self._received else data
        place = 0
        if not self.answered.done():
            end = received.find(b"\r\n\r\n")
            if end < 0:
                self._received = received
                return
            if not received.startswith(b"HTTP/1.1 200"):
                if received.startswith(b"HTTP/1.1 204"):  # its cursor was that of the last event
                    self.reader.ended = True
                else:
                    self.crowd.fail(f"The server answered {received[:400]!r}")
                self.close()
                return
            self.answered.set_result(None)
            place = end + 4
        pieces = []
        over = False
        while True:
            end = received.find(b"\r\n", place)
            if end < 0:
                break
            size = int(received[place:end], 16)
            if len(received) < end + 4 + size:
                break
            place = end + 4 + size
            if not size:
                over = True
                break
            pieces.append(received[end + 2 : place - 2])
        self._received = received[place:]
        if pieces:
            self._rest += b"".join(pieces)
            whole, found, self._rest = self._rest.rpartition(b"\n\n")
            if found:
                self.reader.take(whole + found)
        if over or self.reader.ended:
            self.close()


class Crowd:
    """All readers of this process."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.loop = asyncio.get_running_loop()
        self.chance = random.Random(plan.get("seed", 1))
        self.records: array[int] = array("q")
        paths = plan["paths"]
        self.readers = [Reader(paths[number % len(paths)], plan, self.records) for number in range(plan["readers"])]
        self.lines: dict[Reader, Line] = {}
        self.stopped = False
        self.failure: str | None = None
        self._opening = asyncio.Semaphore(plan.get("opening") or 64)
        self._tasks: list[asyncio.Task[None]] = []

    async def follow(self) -> dict[str, Any]:
        watch = self.loop.create_task(self._watch())
        opened = [self.loop.create_future() for _ in self.readers]
        self._tasks = [
            self.loop.create_task(self._follow(reader, ready))
            for reader, ready in zip(self.readers, opened, strict=True)
        ]
        work = asyncio.gather(*self._tasks)
        await asyncio.wait([work, asyncio.gather(*opened)], return_when=asyncio.FIRST_COMPLETED)
        if self.failure is None:
            tell({"open": len(self.readers)})
        await work
        watch.cancel()
        if self.failure is not None:
            raise SystemExit(self.failure)
        return self._seen()

    async def _follow(self, reader: Reader, ready: asyncio.Future[None]) -> None:
        again = False
        while not (reader.ended or self.stopped):
            try:
                if again:
                    line = await self._connect(reader)
                    reader.timely = now_us() + CAUGHT_UP_US
                else:
                    async with self._opening:
                        line = await self._connect(reader)
                        await line.answered
                    again = True
                    if not ready.done():
                        ready.set_result(None)
            except OSError:
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            cutting = None
            if self.plan.get("cut"):
                cutting = self.loop.call_later(self.chance.expovariate(1 / self.plan["cut"]), line.reset)
            await line.closed
            del self.lines[reader]
            if cutting is not None:
                cutting.cancel()
        if not ready.done():
            ready.set_result(None)

    async def _connect(self, reader: Reader) -> Line:
        _, line = await self.loop.create_connection(lambda: Line(self, reader), "127.0.0.1", self.plan["port"])
        self.lines[reader] = line
        if self.stopped:
            line.close()
        return line

    async def _watch(self) -> None:
        """Tell how it goes, and cut who hears nothing."""
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            over = sum(reader.ended for reader in self.readers)
            tell({"progress": {"frames": sum(reader.frames for reader in self.readers), "ended": over}})
            for reader, line in list(self.lines.items()):
                if time.monotonic() - line.heard > GIVE_UP_SECONDS:
                    self.fail(f"Nothing came on {reader.path} for {GIVE_UP_SECONDS:g} s.")

    def obey(self, command: dict[str, Any]) -> None:
        if command.get("stop"):
            self.stop()
        elif within := command.get("storm"):
            for reader in self.readers:
                self.loop.call_later(self.chance.uniform(0, within), self._storm, reader)

    def _storm(self, reader: Reader) -> None:
        line = self.lines.get(reader)
        if line is not None and not reader.ended:
            reader.cut_at = now_us()
            line.reset()

    def stop(self) -> None:
        self.stopped = True
        for line in list(self.lines.values()):
            line.close()

    def fail(self, why: str) -> None:
        self.failure = self.failure or why
        self.stop()

    def _seen(self) -> dict[str, Any]:
        streams: dict[str, set[str]] = {}
        for reader in self.readers:
            reader.close(None if self.stopped else self.plan["chunks"])
            streams.setdefault(reader.path, set()).add(reader.digest.hexdigest())
        if self.plan.get("records"):
            with Path(self.plan["records"]).open("wb") as file:
                self.records.tofile(file)
        cut = [reader for reader in self.readers if reader.cut_at]
        whole = [reader for reader in self.readers if reader.done]
        return {
            "lost": sum(reader.lost for reader in self.readers),
            "doubled": sum(reader.doubled for reader in self.readers),
            "gaps": sum(reader.gaps for reader in self.readers),
            "cuts": sum(reader.cuts for reader in self.readers),
            "frames": sum(reader.frames for reader in self.readers),
            "unfinished": sum(not reader.ended for reader in self.readers),
            "digests": {path: sorted(each) for path, each in streams.items()},
            "storm": [[reader.cut_at, reader.caught_up] for reader in cut],
            "whole": [[reader.begun, reader.done, reader.frames] for reader in whole],
            "begun_us": min((reader.begun for reader in self.readers), default=0),
            "ended_us": now_us(),
        }


def tell(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


async def follow(orders: FileIO) -> dict[str, Any]:
    crowd = Crowd(json.loads(orders.readline()))

    def listen() -> None:
        for line in orders:
            with suppress(RuntimeError):  # all is over
                crowd.loop.call_soon_threadsafe(crowd.obey, json.loads(line))

    threading.Thread(target=listen, daemon=True).start()
    return await crowd.follow()


def main() -> int:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # Unbuffered: a thread that waits in a buffered stdin would hang the end of the process.
    tell({"seen": asyncio.run(follow(FileIO(0, closefd=False)))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
