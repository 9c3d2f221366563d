"""Readers that are cut and come back, and look at each cut whether what they hold is what the server says at that moment."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.streams.folding import Folded
from tests.streams.outside import Connection

OVER = ("run.completed", "run.failed", "run.cancelled")
Place = tuple[str, int]  # a run, and the seq of an event of it


@dataclass
class Snapshot:
    """What `GET /messages` said, and the place in the log at which it stood."""

    run: str
    seq: int
    messages: list[dict[str, Any]]

    def of(self, run: str | None) -> list[dict[str, Any]]:
        """The messages of one run, or all; without those that wait for their place: they are told when they get it."""
        return [each for each in self.messages if each["status"] != "waiting" and run in (None, each["run"])]


@dataclass
class Site:
    """The servers that readers go to: `ports` for streams, through what cuts, and `direct` for all else."""

    key: str
    ports: list[int]
    direct: list[int]
    refused: Counter[int] = field(default_factory=Counter)  # answers of the server that were errors, by status
    checks: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.client = httpx2.AsyncClient(headers={"Authorization": f"Bearer {self.key}"}, timeout=30)
        self._waiting: dict[str, asyncio.Task[Snapshot]] = {}
        self._loading: set[asyncio.Task[Snapshot]] = set()
        self._turns: dict[str, asyncio.Lock] = {}

    async def get(self, path: str) -> Any:
        """Return what any of the processes answers."""
        tries = 0
        while True:
            tries += 1
            try:
                found = await self.client.get(f"http://127.0.0.1:{self.direct[tries % len(self.direct)]}{path}")
            except httpx2.TransportError:
                await asyncio.sleep(0.1)  # a client's backoff, for a process that is not there
                continue
            if found.status_code == 200:
                return found.json()
            self.refused[found.status_code] += 1
            assert found.status_code in (500, 503), (found.status_code, found.text)
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        for each in self._loading:
            each.cancel()
        await asyncio.gather(*self._loading, return_exceptions=True)
        await self.client.aclose()

    async def snapshot(self, thread: str) -> Snapshot:
        """Load the messages: one request for all who ask meanwhile, begun after each of them has asked."""
        if thread not in self._waiting:
            made = self._waiting[thread] = asyncio.create_task(self._load(thread))
            self._loading.add(made)
            made.add_done_callback(self._loading.discard)
        return await asyncio.shield(self._waiting[thread])

    async def _load(self, thread: str) -> Snapshot:
        async with self._turns.setdefault(thread, asyncio.Lock()):
            del self._waiting[thread]
            found = await self.get(f"/api/threads/{thread}/messages?limit=100")
        return Snapshot(found["cursor"]["run"] or "", found["cursor"]["seq"], found["results"])

    async def events(self, run: str, after: int) -> list[dict[str, Any]]:
        found = await self.get(f"/api/runs/{run}/events?after={after}&limit=1000")
        told: list[dict[str, Any]] = found["results"]
        return told


class Reader:
    """Follows a run, or a thread up to the end of so many runs. Cut, it comes back with the last id that it has.

    With `start` it begins by the request that starts the run, and may send that again in place of a cursor: then all that it
    had comes anew, byte by byte. With `forgets` it does as a page that was loaded anew: it takes the messages, and streams
    from their cursor.
    """

    def __init__(
        self, site: Site, chance: random.Random, *, thread: str, run: str = "", runs: int = 1, forgets: bool = False,
        start: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.site, self.chance, self.thread, self.run, self.runs = site, chance, thread, run, runs
        self.start, self.forgets = start, forgets
        self.whole = not run and start is None  # the whole thread
        self.frames: list[bytes] = []
        self.begun: Place | None = None  # where its frames begin, if not at the beginning
        self.past: list[tuple[Place | None, list[bytes]]] = []  # what it had, and forgot
        self.fold = Folded()
        self.twin: Folded | None = None  # made of a snapshot, and what came since
        self.at: Place | None = None
        self.ended = 0  # runs
        self.cuts = 0
        self._due: list[Snapshot] = []
        self.connection: Connection | None = None

    @property
    def over(self) -> bool:
        return self.ended >= self.runs

    async def follow(self) -> None:
        while not self.over:
            await self._read()
            if not self.over:
                self.cuts += 1
                await self._look()
        # What was due at places that it never came to would be a gap; only a later run's are not for it.
        assert not [each for each in self._due if self.whole or each.run == self.run], "a place was never reached"
        if self.twin is not None:
            self._same(self.twin, "snapshot and stream")

    async def _read(self) -> None:
        port = self.chance.choice(self.site.ports)
        again: list[bytes] = []  # that it has, and is told again
        try:
            if self.start is not None and (not self.frames or self.chance.random() < 0.3):
                again = list(self.frames)
                key = str(self.start["client_id"])
                path = f"/api/threads/{self.thread}/runs"
                opened = await Connection.open(
                    port, path, self.site.key, body=self.start, headers={"Idempotency-Key": f'"{key}"'}
                )
            else:
                opened = await self._resume(port)
        except OSError:
            await asyncio.sleep(0.05)  # a client's backoff, for a process that is not there
            return
        self.connection = opened
        try:
            if opened.status == 204:
                raise AssertionError("nobody asks after the end")
            if opened.status != 200:
                self.site.refused[opened.status] += 1
                # 409: the same start is being done for another reader.
                assert opened.status in (409, 500, 503), opened.head
                await asyncio.sleep(0.1)
                return
            async for frame in opened.frames():
                if again:
                    assert frame == again.pop(0), "told again, it is the same"
                else:
                    self._take(frame)
                if self.over:
                    return
        finally:
            opened.close()

    async def _resume(self, port: int) -> Connection:
        stem, name = (
            (f"/api/threads/{self.thread}", "after") if self.whole else (f"/api/runs/{self.run}", "starting_after")
        )
        path, key = f"{stem}/stream", self.site.key
        if self.at is None:
            return await Connection.open(port, path, key)
        cursor = f"{self.at[0]}:{self.at[1]}" if self.whole else str(self.at[1])
        kind = self.chance.choice(["header", "query", "body" if not self.whole else "query"])
        if kind == "header":
            return await Connection.open(port, path, key, cursor)
        if kind == "query":
            return await Connection.open(port, f"{path}?{name}={cursor}&batch_size={self.chance.randint(1, 50)}", key)
        return await Connection.open(port, path, key, body={name: int(cursor)})

    def _take(self, frame: bytes) -> None:
        id, kind, data = frame.decode().removesuffix("\n\n").split("\n")
        event = json.loads(data.removeprefix("data: "))
        if not self.run and self.start is not None:
            self.run = event["run"]
        place = (event["run"], event["seq"])
        assert id == (f"id: {place[0]}:{place[1]}" if self.whole else f"id: {place[1]}")
        assert kind == f"event: {event['type']}"
        assert place[1] == (self.at[1] + 1 if self.at is not None and self.at[0] == place[0] else 1), (
            "no gap, none twice"
        )
        self.frames.append(frame)
        self.at = place
        self.fold.take(event)
        if self.twin is not None:
            self.twin.take(event)
        if event["type"] in OVER:
            self.ended += 1
        self._compare()

    async def _look(self) -> None:
        """Compare what it holds with the messages as they are now: here, or when it has come to where they stand."""
        found = await self.site.snapshot(self.thread)
        if not found.run:
            return
        if self.forgets:
            self.past.append((self.begun, self.frames))
            self.frames, self.begun, self.at = [], (found.run, found.seq), (found.run, found.seq)
            self.fold, self.twin = Folded(found.of(None)), None
            self._due.clear()
            if self.ended:
                self.ended = 0
            self.ended = await self._ended_before(found)
            self.site.checks["begun anew"] += 1
            return
        if not self.whole and found.run != self.run:
            return
        self._due.append(found)
        self._compare()
        if self.at is not None and self.at[0] == found.run and self.chance.random() < 0.25:
            await self._go_ahead(found, self.at[1])

    async def _go_ahead(self, found: Snapshot, after: int) -> None:
        """Bring a copy of what it holds to the snapshot by `/events`, and on to where the run's tool calls were read."""
        last = f"/api/runs/{found.run}"
        before = (await self.site.get(last))["last_seq"]
        calls = (await self.site.get(f"{last}/tool-calls?limit=100"))["results"]
        known = (await self.site.get(last))["last_seq"] == before  # then nothing changed while they were read
        ahead = copy.deepcopy(self.fold)
        for event in await self.site.events(found.run, after):
            if event["seq"] <= before:
                ahead.take(event)
            if event["seq"] == found.seq:
                self._agree(ahead, found)
                self.site.checks["by events"] += 1
        if known and not self.forgets:
            expected = {each["id"]: each for each in calls}
            told = {id: each for id, each in ahead.calls.items() if not self.whole or id in expected}
            assert set(told) == set(expected)
            for id, call in told.items():
                assert call == {name: expected[id][name] for name in call}
                self.site.checks["calls"] += 1

    async def _ended_before(self, found: Snapshot) -> int:
        """How many of the thread's runs were over where the snapshot stands."""
        page = await self.site.get(f"/api/runs?thread={self.thread}&limit=100")
        earlier = [each["id"] for each in page["results"] if each["id"] < found.run]
        last = await self.site.events(found.run, found.seq - 1)
        return len(earlier) + (last[0]["type"] in OVER)

    def _compare(self) -> None:
        """Compare with the snapshots that stand where it stands now."""
        due = [each for each in self._due if (each.run, each.seq) == self.at]
        for each in due:
            self._due.remove(each)
            self._agree(self.fold, each)
            self.site.checks["at its place"] += 1
            if self.twin is not None:
                self._same(self.twin, "snapshot and stream")
            self.twin = Folded(each.of(None if self.whole else self.run))

    def _agree(self, fold: Folded, snapshot: Snapshot) -> None:
        told = Folded(snapshot.of(None if self.whole else self.run)).messages
        assert fold.messages == told, (self.thread, snapshot.run, snapshot.seq)

    def _same(self, other: Folded, why: str) -> None:
        assert other.messages == self.fold.messages, (why, self.thread, self.at)
        self.site.checks[why] += 1
