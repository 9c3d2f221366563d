"""What an event costs this client, beside a bare reader of lines and httpx2's own: `python clients/python/cost.py`.

CPU of the reading process; the frames, as a server of ours sends them, come from another one, in pieces of this many bytes.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import httpx2

from longhaul_client import Longhaul, Transcript

RUN = "01a2004c-0fcf-75ff-a0f1-11f8e26e8ef3"
EVENTS = 30_000
ROUNDS = 5


def frames() -> list[bytes]:
    found = []
    for seq in range(1, EVENTS + 1):
        type = "run.completed" if seq == EVENTS else "text.delta" if seq > 1 else "message.created"
        said = {
            "seq": seq,
            "type": type,
            "run": RUN,
            "at": "2026-11-21T19:18:17.735102Z",
            "role": "assistant",
            "text": "token ",
        }
        data = json.dumps({**said, "message": RUN, "step": 1})
        found.append(f"id: {seq}\nevent: {type}\ndata: {data}\n\n".encode())
    return found


def serve(piece: int) -> None:
    whole = b": longhaul\nretry: 1000\n\n" + b"".join(frames())
    pieces = [whole[at : at + piece] for at in range(0, len(whole), piece)]
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    )
    body = b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in pieces) + b"0\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            wire, _ = server.accept()
            with wire:
                wire.recv(65536)
                try:
                    wire.sendall(head + body)
                except OSError:
                    pass  # who has its last event leaves


def lines(url: str) -> None:
    with httpx2.Client() as http, http.stream("GET", f"{url}/api/runs/{RUN}/stream") as response:
        assert sum(line.startswith("data: ") for line in response.iter_lines()) == EVENTS


def lines_and_json(url: str) -> None:
    with httpx2.Client() as http, http.stream("GET", f"{url}/api/runs/{RUN}/stream") as response:
        found = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert len(found) == EVENTS


def sse(url: str) -> None:
    with httpx2.Client() as http, http.sse(f"{url}/api/runs/{RUN}/stream") as source:
        assert len([each.json() for each in source if each.id]) == EVENTS


def ours(url: str) -> None:
    with Longhaul(url) as client:
        assert sum(1 for _ in client.stream(RUN)) == EVENTS


def folded(url: str) -> None:
    with Longhaul(url) as client:
        assert len(Transcript().take_all(client.stream(RUN)).text) == (EVENTS - 2) * len("token ")


def cost(read: Callable[[str], None], url: str) -> float:
    """Return us an event."""
    told = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        read(url)
        told.append((time.process_time() - begin) / EVENTS * 1e6)
    return statistics.median(told)


def main() -> None:
    if len(sys.argv) > 1:
        serve(int(sys.argv[1]))
    for piece in (65536, 1000, 240):
        with subprocess.Popen([sys.executable, __file__, str(piece)], stdout=subprocess.PIPE) as server:  # noqa: S603
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            readers = (lines, lines_and_json, sse, ours, folded)
            found = {each.__name__: cost(each, url) for each in readers}
            server.kill()
        told = ", ".join(f"{name} {each:.1f} us ({each / found['lines']:.2f}x)" for name, each in found.items())
        print(f"{piece} bytes a piece: {told}")


if __name__ == "__main__":
    main()
