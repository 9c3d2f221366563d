"""The clients of `benchmarks.http`, in a process of their own: N connections that are kept, each asking when it was answered.

Reads a plan from stdin, one line of JSON: `{"port", "connections", "headers", "requests": [[method, path, body or null,
{header: value}], ...], "expect": status}`. Prints one line: `{"seconds": [of each request], "wall": s, "cpu": s, "bytes": n}`.
Nothing but asyncio and the few lines of HTTP/1.1 that this server speaks, so that the clients cost a fraction of a request.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from typing import Any


class Refused(Exception):
    """The server answered something else than the plan expects."""


def wire(plan: dict[str, Any]) -> list[bytes]:
    """Return the requests as they are sent."""
    made = []
    for method, path, body, headers in plan["requests"]:
        content = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: 127.0.0.1",
            *(f"{k}: {v}" for k, v in {**plan["headers"], **headers}.items()),
        ]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        made.append("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content)
    return made


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read one answer: its status and its body, which the server gives a length. Raises Refused."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return status, await reader.readexactly(int(line[15:]))
    raise Refused(f"An answer without a length: {head!r}")


async def client(port: int, todo: Iterator[bytes], expect: int, seconds: list[float], sizes: list[int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for request in todo:
            begun = time.perf_counter()
            writer.write(request)
            status, body = await answer(reader)
            seconds.append(time.perf_counter() - begun)
            sizes.append(len(body))
            if status != expect:
                raise Refused(f"{status} instead of {expect} to {request!r}: {body[:500]!r}")
    finally:
        writer.close()


async def measure(plan: dict[str, Any]) -> dict[str, Any]:
    """Send the plan's requests; each connection takes the next one. Raises Refused, OSError."""
    todo = iter(wire(plan))
    seconds: list[float] = []
    sizes: list[int] = []
    begun, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(plan["connections"]):
            group.create_task(client(plan["port"], todo, plan["expect"], seconds, sizes))
    return {
        "seconds": seconds,
        "wall": time.perf_counter() - begun,
        "cpu": time.process_time() - cpu,
        "bytes": sum(sizes),
    }


def main() -> int:
    try:
        found = asyncio.run(measure(json.loads(sys.stdin.readline())))
    except ExceptionGroup as group:
        print(group.exceptions[0], file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
