"""Server-sent events out of bytes, as the HTML standard has them, at any cut of the bytes. Knows no connection.

A frame counts when its empty line has come. What is left of one when a connection ends is forgotten with the parser.
"""

from __future__ import annotations

from typing import NamedTuple

MOST_BYTES = 64 * 1024 * 1024  # of one frame: an answer without an end is none


class Frame(NamedTuple):
    """One frame. `comment` is what a frame of nothing but comments says, else None; `data` is UTF-8."""

    type: str
    data: bytes
    id: str
    comment: str | None = None


class TooLong(ValueError):
    """A frame has no end."""


class Parser:
    """Feed it what comes, as it comes: `feed` returns the frames that are whole now."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        self._held: list[bytes] = []  # what came since the last line's end, then its beginning: searched for no frame
        self._size = 0
        self._begun = False
        self._after_cr = False

    def feed(self, piece: bytes) -> list[Frame]:
        """Raises TooLong, and UnicodeDecodeError for what is not UTF-8."""
        if not self._begun or self._after_cr or b"\r" in piece:
            piece = self._plain(piece)
        self._held.append(piece)
        self._size += len(piece)
        if b"\n" not in piece:
            if self._size > self._most:
                raise TooLong(f"a frame of more than {self._most} bytes")
            return []
        *whole, rest = b"".join(self._held).split(b"\n\n")
        if len(rest) > self._most:
            raise TooLong(f"a frame of more than {self._most} bytes")
        self._held = [rest]
        self._size = len(rest)
        return [frame for block in whole if block and (frame := _read(block)) is not None]

    def _plain(self, piece: bytes) -> bytes:
        """Return the piece with LF for each line's end, and without the mark that a text may begin with."""
        if self._after_cr and piece:
            piece = piece.removeprefix(b"\n")
            self._after_cr = False
        if not self._begun and piece:
            # The mark may come in halves.
            piece = b"".join(self._held) + piece
            self._held, self._size = [], 0
            if len(piece) < 3 and b"\xef\xbb\xbf".startswith(piece):
                return piece
            self._begun = True
            piece = piece.removeprefix(b"\xef\xbb\xbf")
        if b"\r" in piece:
            self._after_cr = piece.endswith(b"\r")
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return piece


def _read(block: bytes) -> Frame | None:
    if block.startswith(b"id: "):  # as Longhaul writes them all, read in a third of the time
        id, _, rest = block[4:].partition(b"\nevent: ")
        kind, _, said = rest.partition(b"\ndata: ")
        if said and b"\n" not in said and b"\n" not in kind and b"\n" not in id and b"\0" not in id:
            return Frame(kind.decode(), said, id.decode())
    return _read_lines(block)


def _read_lines(block: bytes) -> Frame | None:
    type = id = ""
    data: bytes | None = None
    comment: str | None = None
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        if value[:1] == b" ":
            value = value[1:]
        if name == b"data":
            data = value if data is None else data + b"\n" + value
        elif name == b"event":
            type = value.decode()
        elif name == b"id":
            id = "" if b"\0" in value else value.decode()
        elif not name and line:
            comment = value.decode(errors="replace")
    if data is None:
        return Frame("", b"", "", comment) if comment is not None else None
    return Frame(type or "message", data, id)
