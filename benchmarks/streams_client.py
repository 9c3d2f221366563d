"""The readers of `benchmarks.streams`, in a process of their own: each follows one run to its end, over all cuts.

Reads a plan from stdin, one line of JSON: `{"port", "key", "runs": [id, ...], "readers", "cut": mean seconds between two TCP
resets of a reader, or null}`. Prints `{"open": n}` when all readers have read something, and at the end one line of what they
saw. A chunk of the model's text is `NUMBER@NANOSECONDS `, by the clock that all processes of a machine share, so its age when
it comes is known. The latencies are those of readers that were not cut within the last second.
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
import time
from typing import Any

CHUNK = re.compile(rb"(\d+)@(\d+) ")
ID = re.compile(rb"id: (\d+)\n")
CAUGHT_UP = 1.0  # seconds after a cut
GIVE_UP = 120.0  # seconds without a byte: a stream has a ping every 15


class Reader:
    """One reader of one run."""

    def __init__(self, run: str, plan: dict[str, Any], chance: random.Random) -> None:
        self.run, self.plan, self.chance = run, plan, chance
        self.next = 0  # the number that the next chunk has
        self.lost = self.doubled = self.cuts = self.frames = 0
        self.last = 0
        self.digest = hashlib.blake2b(digest_size=16)
        self.ages: list[int] = []
        self.begun = asyncio.Event()
        self.ended = False

    async def follow(self) -> None:
        while not self.ended:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.plan["port"], limit=2**18)
            except OSError:
                await asyncio.sleep(0.2)
                continue
            try:
                await self._read(reader, writer)
            except (asyncio.IncompleteReadError, OSError):
                pass  # cut: it comes back
            finally:
                writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = [
            f"GET /api/runs/{self.run}/stream HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {self.plan['key']}",
            *([f"Last-Event-ID: {self.last}"] if self.last else []), "", "",
        ]  # fmt: skip
        writer.write("\r\n".join(lines).encode())
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"The server answered {head!r}")
        timely = time.monotonic() + CAUGHT_UP
        cutting = None
        if self.plan["cut"] is not None:
            after = self.chance.expovariate(1 / self.plan["cut"])
            cutting = asyncio.get_running_loop().call_later(after, self._reset, writer)
        rest = b""
        try:
            while True:
                async with asyncio.timeout(GIVE_UP):
                    size = int(await reader.readuntil(b"\r\n"), 16)
                    piece = await reader.readexactly(size + 2)
                if size == 0:
                    return
                rest += piece[:-2]
                whole, found, rest = rest.rpartition(b"\n\n")
                if found:
                    self._take(whole + found, timely)
        finally:
            if cutting is not None:
                cutting.cancel()

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        wire = writer.get_extra_info("socket")
        if wire.fileno() >= 0:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.cuts += 1
        writer.transport.abort()

    def _take(self, frames: bytes, timely: float) -> None:
        now, clock = time.monotonic_ns(), time.monotonic()
        for frame in frames.split(b"\n\n"):
            if not frame.startswith(b"id: "):
                continue
            self.digest.update(frame)
            self.frames += 1
            self.last = int(frame[4 : frame.index(b"\n")])
            if b"\nevent: text.delta\n" in frame:
                for number, sent in CHUNK.findall(frame):
                    self._chunk(int(number), now - int(sent) if clock > timely else None)
            elif b"\nevent: run.completed\n" in frame or b"\nevent: run.failed\n" in frame:
                self.ended = True
        self.begun.set()

    def _chunk(self, number: int, age: int | None) -> None:
        if number < self.next:
            self.doubled += 1
            return
        self.lost += number - self.next
        self.next = number + 1
        if age is not None:
            self.ages.append(age)


async def follow(plan: dict[str, Any]) -> dict[str, Any]:
    chance = random.Random(plan.get("seed", 1))
    runs = plan["runs"]
    readers = [Reader(runs[number % len(runs)], plan, chance) for number in range(plan["readers"])]
    tasks = [asyncio.create_task(each.follow()) for each in readers]
    for each in readers:
        await each.begun.wait()
    print(json.dumps({"open": len(readers)}), flush=True)
    begun, cpu = time.monotonic(), time.process_time()
    await asyncio.gather(*tasks)
    digests: dict[str, set[bytes]] = {}
    for each in readers:
        digests.setdefault(each.run, set()).add(each.digest.digest())
    ages = sorted(age for each in readers for age in each.ages)
    return {
        "lost": sum(each.lost + plan["chunks"] - each.next for each in readers),
        "doubled": sum(each.doubled for each in readers),
        "mismatched": sum(len(each) - 1 for each in digests.values()),
        "cuts": sum(each.cuts for each in readers),
        "frames": sum(each.frames for each in readers),
        "timed": len(ages),
        "p50_ms": _percentile(ages, 50),
        "p99_ms": _percentile(ages, 99),
        "wall": time.monotonic() - begun,
        "cpu": time.process_time() - cpu,
    }


def _percentile(ages: list[int], percent: int) -> float:
    return round(ages[min(len(ages) * percent // 100, len(ages) - 1)] / 1e6, 1) if ages else 0.0


def main() -> int:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(json.dumps(asyncio.run(follow(json.loads(sys.stdin.readline())))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
