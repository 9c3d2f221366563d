"""The log of a run, as its readers see it: history in batches, then live. Every surface is a projection of this."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID
from weakref import WeakKeyDictionary

from runs import bells, compaction
from runs.models import Event
from threads import database

BATCH = 1000
LOOK_SECONDS = 1.0  # how often a reader looks though no bell rang
LOOKS_AT_ONCE = 8  # of the readers of one event loop; Django's pool is often not much larger
RESUME_GAP = "resume_gap"
TERMINAL_TYPES = frozenset({"run.completed", "run.failed", "run.cancelled"})


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One event. `seq` counts from 1 without gaps; `payload` are the type's own fields (API.md, Events).

    A `resume_gap` is no event of the log: it stands for those that a retention setting has removed, `from` and `to` of its
    payload. Its `seq` is `to`, so that a cursor goes on behind it; `as_dict` leaves it out.
    """

    seq: int
    type: str
    run: UUID
    at: datetime
    payload: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The event as readers get it: flat, the time in RFC 3339 UTC."""
        if self.type == RESUME_GAP:
            return {"type": self.type, **self.payload}
        at = self.at.astimezone(UTC).isoformat().replace("+00:00", "Z")
        return {"seq": self.seq, "type": self.type, "run": str(self.run), "at": at, **self.payload}

    @property
    def terminal(self) -> bool:
        return self.type in TERMINAL_TYPES


def read(run_id: UUID, after: int = 0, limit: int = BATCH) -> list[RunEvent]:
    """Return the events after the cursor, at most `limit`, in order; before them a `resume_gap` where some were removed."""
    rows = Event.objects.filter(run_id=run_id, seq__gt=after).order_by("seq")[:limit]
    found = [
        RunEvent(seq, type, run_id, at, compaction.told(payload, after))
        for seq, type, at, payload in rows.values_list("seq", "type", "at", "payload")
    ]
    # A log is written without gaps, so what is missing was removed, and always from its beginning.
    if found and (first := int(found[0].payload.get("from_seq") or found[0].seq)) > after + 1:
        gap = {"from": after + 1, "to": first - 1}
        return [RunEvent(first - 1, RESUME_GAP, run_id, found[0].at, gap), *found]
    return found


def spoken(run_id: UUID, message_id: UUID) -> list[dict[str, Any]]:
    """Return the parts that a pending message has so far, folded from its deltas. Reads backwards to where it begins."""
    deltas: list[tuple[str, str]] = []
    before: dict[str, int] = {}
    begun = False
    while not begun:
        rows = Event.objects.filter(run_id=run_id, **before).order_by("-seq")
        batch = list(rows.values_list("seq", "type", "payload")[:BATCH])
        for seq, type, payload in batch:
            before = {"seq__lt": seq}
            if payload.get("message") != str(message_id):
                continue
            if type == "message.created":
                begun = True
            elif type in ("text.delta", "reasoning.delta"):
                deltas.append((type.partition(".")[0], payload["text"]))
        begun = begun or len(batch) < BATCH
    parts: list[dict[str, Any]] = []
    for kind, text in reversed(deltas):
        if parts and parts[-1]["type"] == kind:
            parts[-1]["text"] += text
        else:
            parts.append({"type": kind, "text": text})
    return parts


def follow(run_id: UUID, after: int = 0) -> Iterator[RunEvent]:
    """Yield the events after the cursor, and those to come, until the terminal one. Ends also when the run is deleted.

    Subscribes first, then reads, so nothing falls into the seam.
    """
    with bells.ear().listen(bells.run_channel(run_id)) as wake:
        while True:
            wake.clear()
            batch = read(run_id, after)
            for event in batch:
                yield event
                after = event.seq
                if event.terminal:
                    return
            if len(batch) >= BATCH:
                continue
            if not batch and _over(run_id, after):
                return
            database.release()
            wake.wait(LOOK_SECONDS)


def _over(run_id: UUID, after: int) -> bool:
    """Return whether nothing can follow: the run is gone, or ended and read to its end."""
    from runs.models import TERMINAL, Run

    row = Run.objects.filter(pk=run_id).values_list("status", "last_seq").first()
    return row is None or (row[0] in TERMINAL and after >= row[1])


async def afollow(run_id: UUID, after: int = 0) -> AsyncIterator[RunEvent]:
    """`follow`, from async code."""
    async with contextlib.aclosing(abatches(run_id, after)) as batches:
        async for batch in batches:
            for event in batch:
                yield event


Looked = TypeVar("Looked")
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


async def _look(at: Callable[..., Looked], *args: Any) -> Looked:
    """Ask the database in a thread. Few at once: readers who are woken together would want every connection there is."""
    async with _turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(LOOKS_AT_ONCE)):
        return await database.apart(at)(*args)


async def abatches(run_id: UUID, after: int = 0, size: int = BATCH) -> AsyncGenerator[list[RunEvent], None]:
    """Yield the events after the cursor in batches, and those to come, until the terminal one or the run's deletion.

    An empty batch says about once a second that nothing came. Holds no connection while it waits.
    """
    async with bells.ear().alisten(bells.run_channel(run_id)) as rung:
        while True:
            rung.clear()
            batch = await _look(read, run_id, after, size)
            yield batch
            if batch:
                after = batch[-1].seq
                if batch[-1].terminal:
                    return
            elif await _look(_over, run_id, after):
                return
            if len(batch) < size:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(rung.wait(), LOOK_SECONDS)


async def await_status(run_id: UUID, statuses: Container[str], timeout_seconds: float) -> bool:
    """Wait until the run has one of these, or is gone, at most so long. Returns whether it came to that."""
    until = time.monotonic() + timeout_seconds
    async with bells.ear().alisten(bells.run_channel(run_id)) as rung:
        while True:
            rung.clear()
            status = await _look(_status, run_id)
            if status is None or status in statuses:
                return True
            remaining = until - time.monotonic()
            if remaining <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(rung.wait(), min(LOOK_SECONDS, remaining))


def _status(run_id: UUID) -> str | None:
    from runs.models import Run

    return Run.objects.filter(pk=run_id).values_list("status", flat=True).first()


def wait(run_id: UUID, timeout_seconds: float) -> bool:
    """Wait until the run has ended, at most so long. Returns whether it has."""
    from runs.models import TERMINAL, Run

    until = time.monotonic() + timeout_seconds
    with bells.ear().listen(bells.run_channel(run_id)) as wake:
        while True:
            wake.clear()
            status = Run.objects.filter(pk=run_id).values_list("status", flat=True).first()
            if status is None or status in TERMINAL:
                return True
            remaining = until - time.monotonic()
            if remaining <= 0:
                return False
            database.release()
            wake.wait(min(LOOK_SECONDS, remaining))
