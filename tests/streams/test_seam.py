"""The seam between history and live, over interleavings of a writer, readers, lost bells, compaction, retention and an absent Postgres.

The broadcast is the real one; its log is one in memory, whose answers are what was there when it was asked, and come later.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runs.streams import broadcast
from runs.streams.broadcast import Broadcast, Plan
from runs.streams.log import Fresh, Page
from runs.streams.visitors import Visitor

NOBODY = Visitor(user=None, key=None, session=None)


def frame(prefix: str, seq: int, first: int) -> bytes:
    return f"id: {prefix}{seq}\nevent: data\ndata: {first}\n\n".encode()


def gap(first: int, to: int) -> bytes:
    return f"event: resume_gap\ndata: {first} {to}\n\n".encode()


class Story:
    """Some runs, and who writes and reads them, as a seed says."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.written: dict[UUID, int] = {}
        self.ended: set[UUID] = set()
        self.rows: dict[
            UUID, list[tuple[int, int]]
        ] = {}  # the log: of each row the seqs that it stands for, first and last
        self.length = {uuid4(): self.chance.randint(1, 60) for _ in range(self.chance.randint(1, 3))}

    async def pause(self, most: int = 6) -> None:
        for _ in range(self.chance.randint(0, most)):
            await asyncio.sleep(0)

    async def write(self, run: UUID, now: Broadcast) -> None:
        while self.written.get(run, 0) < self.length[run]:
            before = self.written.get(run, 0)
            self.written[run] = min(before + self.chance.choice([1, 1, 2, 7, 40]), self.length[run])
            self.rows.setdefault(run, []).extend((seq, seq) for seq in range(before + 1, self.written[run] + 1))
            if self.written[run] == self.length[run]:
                self.ended.add(run)
            if self.chance.random() < 0.7:  # else it is lost
                now.rang(run)
            await self.pause(12)
        while self.chance.random() < 0.7:
            self.keep_house(run)
            await self.pause(12)

    def keep_house(self, run: UUID) -> None:
        """Fold some rows, or remove the oldest: never the last one."""
        rows = self.rows[run]
        a, b = sorted(self.chance.choices(range(len(rows)), k=2))
        if self.chance.random() < 0.2:
            self.rows[run] = rows[a:]
        elif a < b:
            self.rows[run] = [*rows[:a], (rows[a][0], rows[b - 1][1]), *rows[b:]]

    async def read(self, run: UUID, now: Broadcast) -> None:
        """Read to the end, cut and come back as often as chance will have it; miss nothing, get nothing twice."""
        await self.pause(30)
        at = self.chance.randint(0, self.written.get(run, 0))
        while at < self.length[run]:
            reader = now.enter(
                Plan(visitor=NOBODY, run=run, after=at, batch=self.chance.choice([1, 3, 1000]), known=at)
            )
            try:
                while piece := await reader.next():
                    for each in piece.split(b"\n\n"):
                        said = dict(
                            line.split(b": ") for line in each.split(b"\n") if line and not line.startswith(b":")
                        )
                        if said.get(b"event") == b"resume_gap":
                            first, to = map(int, said[b"data"].split())
                            assert first == at + 1 <= to < self.rows[run][0][0]
                            at = to
                        elif b"id" in said:
                            assert int(said[b"data"]) == at + 1 <= int(said[b"id"])
                            at = int(said[b"id"])
                    await self.pause()
                    if self.chance.random() < 0.1:
                        break
                else:
                    assert at == self.length[run], "a stream ends only with its run"
            finally:
                now.leave(reader)
            await self.pause()


class Memory:
    """The log in memory."""

    story: Story

    def __init__(self, name: str) -> None:
        pass

    async def _away(self) -> None:
        await self.story.pause()
        if self.story.chance.random() < 0.05:
            raise TimeoutError

    async def live(self, after: Sequence[tuple[UUID, int]]) -> dict[int, list[Fresh]]:
        rows, ended = copy.deepcopy(self.story.rows), set(self.story.ended)
        await self._away()
        return {
            place: [
                Fresh(last, run in ended and last == rows[run][-1][1], frame("", last, first), first)
                for first, last in self._behind(rows, run, at)
            ]
            for place, (run, at) in enumerate(after)
            if self._behind(rows, run, at)
        }

    def _behind(self, rows: dict[UUID, list[tuple[int, int]]], run: UUID, at: int) -> list[tuple[int, int]]:
        return [(max(first, at + 1), last) for first, last in rows.get(run, []) if last > at]

    async def pages(self, wanted: Sequence[tuple[UUID, int, int, str]]) -> list[Page]:
        there, ended, rows = dict(self.story.written), set(self.story.ended), copy.deepcopy(self.story.rows)
        await self._away()
        found = []
        for run, after, most, prefix in wanted:
            behind = self._behind(rows, run, after)[:most]
            last = behind[-1][1] if behind else after
            body = b"".join(frame(prefix, seq, first) for first, seq in behind)
            if behind and behind[0][0] > after + 1:
                body = gap(after + 1, behind[0][0] - 1) + body
            over = run in ended and last == there[run]
            found.append(Page(True, last, len(behind), body, over, there.get(run, 0)))
        return found

    async def there(self, runs: Sequence[UUID]) -> set[UUID]:
        return set(runs)

    async def next_runs(self, of: Sequence[Any]) -> list[Any]:
        return []

    async def close(self) -> None:
        pass


class Deaf:
    """An ear that hears nothing by itself: the story rings."""

    def add(self, *_: Any) -> None: ...
    def remove(self, *_: Any) -> None: ...


async def told(seed: int) -> None:
    story = Memory.story = Story(seed)
    now = Broadcast()
    readers = [run for run in story.length for _ in range(story.chance.randint(1, 6))]
    async with asyncio.timeout(30):
        await asyncio.gather(
            *(story.write(run, now) for run in story.length), *(story.read(run, now) for run in readers)
        )
        assert not now.readers
        assert not now.tails
        if now._work is not None:
            await now._work


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_is_written_at_the_seam_comes_once(seed: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(broadcast, "Log", Memory)
        patched.setattr("runs.bells.ear", Deaf)
        patched.setattr("runs.streams.departure.listen", lambda tell: None)
        for name, value in (
            ("LOOK_SECONDS", 0.005),
            ("GATHER_SECONDS", 0.0),
            ("IDLE_SECONDS", 0.0),
            ("_PAUSE_SECONDS", 0.0),
        ):
            patched.setattr(broadcast, name, value)
        patched.setattr(broadcast, "KEPT", random.Random(seed).choice([0, 2, 64]))
        asyncio.run(told(seed))
