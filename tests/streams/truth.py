"""A log as it was written, and what readers get of it later on every way there is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

import orjson

from runs import events
from runs.models import Event
from runs.streams.log import Log


class Truth:
    """What was written, by seq: type and payload. What a reader gets is held against it."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    @classmethod
    def of(cls, run: UUID) -> Truth:
        """The log of a run that nothing was done to yet."""
        truth = cls()
        rows = Event.objects.filter(run_id=run).order_by("seq").values_list("seq", "type", "payload")
        for seq, type, payload in rows:
            assert truth.add(type, payload) == seq
        return truth

    def add(self, type: str, payload: Mapping[str, Any]) -> int:
        self.events.append({"type": type, **payload})
        return len(self.events)

    def holds(self, got: Iterable[dict[str, Any]], after: int, *, removed: int = 0) -> int:
        """Assert that each seq after the cursor is told once, in order, and each with its own text.

        removed: up to here a retention setting may have removed events. Returns the last seq that was told.
        """
        at = after
        for event in got:
            if event["type"] == "resume_gap":
                assert event["from"] == at + 1 <= event["to"] <= removed
                at = event["to"]
                continue
            first = event.get("from_seq", event["seq"])
            assert first == at + 1 <= event["seq"], f"{first} to {event['seq']} follows {at}"
            stood = self.events[first - 1 : event["seq"]]
            said = {name: value for name, value in event.items() if name not in ("seq", "run", "at", "from_seq")}
            if "text" in said:
                assert said.pop("text") == "".join(each["text"] for each in stood)
            for each in stood:
                assert {name: value for name, value in each.items() if name != "text"} == said
            at = event["seq"]
        return at


def frames_of(body: bytes) -> list[dict[str, Any]]:
    """Return what frames say, without the comments between them."""
    found = []
    for frame in body.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in frame.split("\n") if line and not line.startswith(":"))
        if "data" in lines:
            event = orjson.loads(lines["data"])
            assert event["type"] == lines["event"]
            assert lines.get("id") == (str(event["seq"]) if "seq" in event else None)
            found.append(event)
    return found


async def tail(log: Log, run: UUID, after: int) -> tuple[bytes, int]:
    """Read as those do who follow live, and from where something is missing a page. Returns the frames, and the cursor after them."""
    fresh = (await log.live([(run, after)])).get(0, [])
    at = after
    for each in fresh:
        if each.first != at + 1:
            return await history(log, run, after, 1000)
        at = each.seq
    return b"".join(each.frame for each in fresh), fresh[-1].seq if fresh else after


async def history(log: Log, run: UUID, after: int, most: int) -> tuple[bytes, int]:
    """Read a page, as those do who have come. Returns its frames, and the cursor after them."""
    [page] = await log.pages([(run, after, most, "")])
    return page.body, page.last


def from_stream(run: UUID, after: int, most: int, *, live: bool) -> list[dict[str, Any]]:
    """Read as streams do: all that is there, page by page."""

    async def read() -> list[dict[str, Any]]:
        log, at, found = Log("test"), after, b""
        try:
            while True:
                page, last = await (tail(log, run, at) if live else history(log, run, at, most))
                if last == at:
                    return frames_of(found)
                at, found = last, found + page
        finally:
            await log.close()

    return asyncio.run(read())


def from_read(run: UUID, after: int, most: int) -> list[dict[str, Any]]:
    """Read all that is there in Python, so many events at a time."""
    found: list[dict[str, Any]] = []
    while batch := events.read(run, after, most):
        found += [event.as_dict() for event in batch]
        after = batch[-1].seq
    return found
