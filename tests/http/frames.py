"""What a client reads of an event stream."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from typing import Any

import orjson


@dataclass(frozen=True)
class Frame:
    """One server-sent event; a comment has only `comment`."""

    id: int | None = None
    event: str | None = None
    data: Any = None
    comment: str | None = None


async def frames(pieces: AsyncIterable[bytes]) -> AsyncIterator[Frame]:
    """Cut a stream into its frames, wherever its pieces end."""
    rest = b""
    async for piece in pieces:
        rest += piece
        while b"\n\n" in rest:
            text, _, rest = rest.partition(b"\n\n")
            yield frame(text.decode())
    assert rest == b"", "the stream ended in the middle of a frame"


def frame(text: str) -> Frame:
    if text.startswith(":"):
        return Frame(comment=text[1:].strip())
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        name, colon, value = line.partition(": ")
        assert colon, line
        assert name not in fields, line
        fields[name] = value
    assert set(fields) <= {"id", "event", "data"}
    return Frame(
        id=int(fields["id"].rpartition(":")[2]) if "id" in fields else None,
        event=fields["event"],
        data=orjson.loads(fields["data"]),
    )


async def events(pieces: AsyncIterable[bytes]) -> list[Frame]:
    """Read to the end, without comments."""
    return [each async for each in frames(pieces) if each.comment is None]
