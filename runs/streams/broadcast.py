"""All streams of one process: each event is read once, and its bytes are handed to all who follow its run.

A `Reader` begins with history, a page at a time, no page asked for before the last was sent. When it has read up to its run's
`Tail` it joins it, in one move of the event loop, so that nothing falls between; from then on the tail's events are put into
its queue. A queue that grows over its bound is a reader that does not read: it is cut off, and can come back.

The tail is what was read last of a run that somebody follows live. A bell makes it due, and so does a second without one,
for Redis may be away; all that are due are read in one query. Bells are heard on the process's one subscription (`bells`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from django.db import InterfaceError, OperationalError
from django.db.models import Model

from runs import bells
from runs.models import Run
from runs.streams import departure, outage
from runs.streams.app import PING
from runs.streams.log import MOST_A_TAIL, Fresh, Log, Page
from runs.streams.questions import Questions
from runs.streams.visitors import Visitor
from threads.authentication import holding
from threads.models import Thread

logger = logging.getLogger("longhaul.streams")

PING_SECONDS = 15.0
CHECK_SECONDS = 30.0  # how long a stream goes on for who may no longer see what it shows
UNCHECKED_SECONDS = 120.0  # the same, while nobody can say who may see what
LOOK_SECONDS = 1.0  # how often a tail is read though no bell rang
GATHER_SECONDS = 0.01  # between two rounds, in which runs ring
MOST_TAILS = 500  # of a round
MOST_QUEUED = 256 * 1024  # bytes that wait for a reader who does not take them
SEND_SECONDS = 60.0  # that a reader may take for one piece
DEPART_SECONDS = 1.0  # for the last pieces of those who read slowly, when the process ends
PAGE_ROWS = 2000  # events of all pages of one statement, as far as can be foreseen
PAGES = 100  # of one statement
SHORT = 100  # events: a page of no more goes before those of long histories
IDLE_SECONDS = 5.0  # without a reader, then the connections are closed
AGAIN_SECONDS = 60.0  # until a question is asked again that Postgres refuses
QUIET_SECONDS = 5.0  # then it is asked whether the run is there at all
KEPT, KEPT_BYTES = 64, 16 * 1024  # of a tail: its newest events, for readers whose history ended just before them
_TICK_SECONDS = 0.25
_PAUSE_SECONDS = 1.0  # after a question that Postgres did not answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a reader was let in for: a run, or a thread from some run of it on. `known` is the run's last seq as the view saw it."""

    visitor: Visitor
    run: UUID | None = None
    thread: UUID | None = None
    after: int = 0
    batch: int = 1000
    pings: bool = False
    known: int = 0


class Reader:
    """One open stream."""

    __slots__ = (
        "asked", "at", "batch", "before", "broadcast", "checked", "cut", "joined", "led", "over", "pieces", "ping", "run", "sending", "sent",
        "size", "task", "thread", "visitor", "wake", "wanted",
    )  # fmt: skip

    def __init__(self, broadcast: Broadcast, plan: Plan) -> None:
        self.broadcast = broadcast
        self.visitor = plan.visitor
        self.thread = plan.thread
        self.run = plan.run
        self.before: UUID | None = None  # of a thread: the run that was last, between two
        self.at = plan.after  # the last seq that was queued
        self.batch = plan.batch
        self.ping = PING[plan.pings]
        self.wanted = max(plan.known - plan.after, 0) + SHORT // 4  # events that its next page will have, about
        self.asked = False  # for a page, or the next run
        self.joined = False
        self.led = False  # it is asked whether it may see its thread's next run
        self.over = False  # what is queued is the last
        self.cut = False  # and not even that is to be sent
        self.pieces: deque[bytes] = deque()
        self.size = 0
        self.wake = asyncio.Event()
        self.task = asyncio.current_task()
        self.sending = True
        self.sent = self.checked = time.monotonic()

    @property
    def prefix(self) -> str:
        """What stands before the seq in a frame's id: in a thread's stream its run."""
        return "" if self.thread is None else f"{self.run}:"

    async def next(self) -> bytes:
        """Return what is to be sent next; nothing when the stream is over. What was returned before has been sent."""
        self.sending = False
        self.sent = time.monotonic()
        while not self.pieces:
            if self.over or self.cut:
                self.sending = True  # the end of the answer
                return b""
            if not self.joined and not self.asked:
                self.broadcast.want(self)
            self.wake.clear()
            await self.wake.wait()
        if self.cut:
            return b""
        piece = self.pieces.popleft() if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces.clear()
        self.size = 0
        self.sending = True
        self.sent = time.monotonic()
        return piece

    def push(self, piece: bytes) -> None:
        """Queue what came live. With a piece that is too much the reader is cut off."""
        if self.over or self.cut:
            return
        if self.size and self.size + len(piece) > MOST_QUEUED:
            logger.info("A reader of run %s does not read, and is cut off", self.run)
            self.cut_off()
            return
        self.size += len(piece)
        self._queue(piece)

    def page(self, page: bytes) -> None:
        """Queue a page of history. It counts for nothing: it is here because all before it was sent."""
        if page and not self.over and not self.cut:
            self._queue(page)

    def _queue(self, piece: bytes) -> None:
        self.pieces.append(piece)
        self.wake.set()

    def finish(self, *, unsent: bool = True) -> None:
        """End the stream behind what is queued, or, without what is unsent, at once."""
        if not unsent:
            self.pieces.clear()
            self.size = 0
        self.over = True
        self.wake.set()

    def cut_off(self) -> None:
        """End the stream as it is, also in the middle of a piece that the client does not take."""
        if self.cut:
            return
        self.cut = True
        self.pieces.clear()
        self.wake.set()
        if self.sending and self.task is not None:
            self.task.cancel()


@dataclass(slots=True)
class Tail:
    """The end of a run's log, as far as it was read for those who follow it live."""

    bell: _Bell
    readers: int = 0  # of the run, joined or still with its history
    joined: set[Reader] = field(default_factory=set)
    at: int = -1  # up to here all who joined have it; -1: nobody has
    looked: float = 0.0
    quiet: float = 0.0  # since when nothing came, or it was seen that the run is there still
    kept: deque[Fresh] = field(default_factory=deque)
    kept_bytes: int = 0

    def keep(self, fresh: list[Fresh]) -> None:
        for each in fresh:
            self.kept.append(each)
            self.kept_bytes += len(each.frame)
        while self.kept and (len(self.kept) > KEPT or self.kept_bytes > KEPT_BYTES):
            self.kept_bytes -= len(self.kept.popleft().frame)

    def since(self, seq: int) -> list[Fresh] | None:
        """Return what was kept behind this seq; None when that is not all there was."""
        if seq >= self.at:
            return []
        if not self.kept or self.kept[0].seq > seq + 1:
            return None
        return [each for each in self.kept if each.seq > seq]

    def forget(self) -> None:
        self.at, self.kept_bytes = -1, 0
        self.kept.clear()


class _Bell:
    """What the bell of a run or thread sets, from the ear's thread."""

    __slots__ = ("broadcast", "id")

    def __init__(self, broadcast: Broadcast, id: UUID) -> None:
        self.broadcast = broadcast
        self.id = id

    def set(self) -> None:
        self.broadcast.rang(self.id)

    def hang(self, channel: str) -> None:
        """Listen to the channel from now on. What it rang for before is looked for after."""
        _ear().submit(bells.ear().add, channel, self).add_done_callback(lambda _: self.set())

    def take_down(self, channel: str) -> None:
        _ear().submit(bells.ear().remove, channel, self)


class Broadcast:
    """Serves the streams of one event loop. All its methods but `rang` are called in that loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.readers: set[Reader] = set()
        self.tails: dict[UUID, Tail] = {}
        self._due: dict[UUID, None] = {}  # of the tails those that are to be read, who was first rung for first
        self._due_now = asyncio.Event()
        self._short: deque[Reader] = deque()  # who want a page
        self._long: deque[Reader] = deque()
        self._wanted = asyncio.Event()
        self._between: dict[UUID, set[Reader]] = {}  # of threads, those whose run has ended
        self._thread_bells: dict[UUID, _Bell] = {}
        self._go_now = asyncio.Event()
        self._rung: deque[UUID] = deque()
        self._told = False  # that something rang
        self._work: asyncio.Task[None] | None = None
        self._questions, self._of_keys = Questions(), Questions()  # a policy that hangs holds up no question after keys
        self._asking: set[asyncio.Task[None]] = set()
        self._empty_since = time.monotonic()
        departure.listen(self)

    # --- readers ----------------------------------------------------------------------------------------------------

    def enter(self, plan: Plan) -> Reader:
        """Begin a stream for the task that runs now. `leave` ends it."""
        reader = Reader(self, plan)
        self.readers.add(reader)
        if reader.run is not None:
            self._begin(reader.run)
        if departure.leaving():
            reader.finish()  # it came with a connection that was open: it is sent on at once
        if self._work is None or self._work.done():
            self._work = self.loop.create_task(self._serve())
        return reader

    def leave(self, reader: Reader) -> None:
        """End a stream, and free all that it held."""
        reader.cut = True
        self.readers.discard(reader)
        self._no_longer_between(reader)
        if reader.run is not None:
            self._end(reader, reader.run)
        if not self.readers:
            self._empty_since = time.monotonic()

    def _begin(self, run: UUID) -> None:
        tail = self.tails.get(run)
        if tail is None:
            tail = self.tails[run] = Tail(_Bell(self, run))
            tail.bell.hang(bells.run_channel(run))
        tail.readers += 1

    def _end(self, reader: Reader, run: UUID) -> None:
        tail = self.tails[run]
        tail.readers -= 1
        tail.joined.discard(reader)
        reader.joined = False
        if not tail.joined:
            tail.forget()
        if not tail.readers:
            del self.tails[run]
            self._due.pop(run, None)
            tail.bell.take_down(bells.run_channel(run))

    def want(self, reader: Reader) -> None:
        """Get the reader its next page, or, in a thread, its next run."""
        reader.asked = True
        if reader.run is not None:
            (self._short if reader.wanted <= SHORT else self._long).append(reader)
            self._wanted.set()
            return
        assert reader.thread is not None
        waiting = self._between.setdefault(reader.thread, set())
        waiting.add(reader)
        if reader.thread not in self._thread_bells:
            bell = self._thread_bells[reader.thread] = _Bell(self, reader.thread)
            bell.hang(bells.thread_channel(reader.thread))
        self._go_now.set()

    def _no_longer_between(self, reader: Reader) -> None:
        waiting = self._between.get(reader.thread) if reader.thread is not None else None
        if reader.thread is None or waiting is None:
            return
        waiting.discard(reader)
        if not waiting:
            del self._between[reader.thread]
            self._thread_bells.pop(reader.thread).take_down(bells.thread_channel(reader.thread))

    def _join(self, reader: Reader) -> bool:
        """Let a reader follow live, if nothing is missing between what it has and its run's tail."""
        assert reader.run is not None
        tail = self.tails[reader.run]
        if not tail.joined:
            tail.at = reader.at
            tail.looked = tail.quiet = time.monotonic()
            self._make_due(reader.run)  # what came while its page was on the way
        missing = tail.since(reader.at)
        if missing is None:
            return False
        reader.joined = True
        tail.joined.add(reader)
        self._give(reader, missing, {})
        return True

    def _part(self, reader: Reader, tail: Tail) -> None:
        """Let a reader follow no more, but read its history again."""
        tail.joined.discard(reader)
        reader.joined = False
        if not tail.joined:
            tail.forget()
        reader.wake.set()

    def _give(self, reader: Reader, fresh: list[Fresh], made: dict[tuple[str, int], bytes]) -> None:
        """Queue events; `made` keeps what all who need the same are given."""
        if not fresh or fresh[-1].seq <= reader.at:
            return
        begin = reader.at if fresh[0].seq <= reader.at else 0
        key = (reader.prefix, begin)
        piece = made.get(key)
        if piece is None:
            prefix = b"id: " + reader.prefix.encode() if reader.prefix else b""
            frames = (prefix + each.frame[4:] if prefix else each.frame for each in fresh if each.seq > begin)
            piece = made[key] = b"".join(frames)
        reader.at = fresh[-1].seq
        reader.push(piece)
        if fresh[-1].terminal:
            self._run_over(reader)

    def _run_over(self, reader: Reader) -> None:
        """Go on after a run's last event."""
        if reader.thread is None:
            reader.finish()
            return
        assert reader.run is not None
        self._end(reader, reader.run)
        reader.before, reader.run = reader.run, None

    # --- bells ------------------------------------------------------------------------------------------------------

    def rang(self, id: UUID) -> None:
        """Note that a run has something new, or a thread a run. Called from any thread."""
        self._rung.append(id)
        if not self._told:
            self._told = True
            try:
                self.loop.call_soon_threadsafe(self._hear)
            except RuntimeError:
                pass  # the loop was closed, and all readers with it

    def _hear(self) -> None:
        self._told = False  # before the first is taken: what rings from now on tells again
        while self._rung:
            id = self._rung.popleft()
            if id in self.tails:
                self._make_due(id)
            elif id in self._between:
                self._go_now.set()

    def _make_due(self, run: UUID) -> None:
        if run in self.tails:  # else its last reader was led on by its last event
            self._due[run] = None
            self._due_now.set()

    # --- work -------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Work as long as there are readers, and a while longer."""
        live, history = Log("longhaul streams"), Log("longhaul history")
        jobs = (self._follow(live), self._page(history), self._go_on(history), self._admit())
        tasks = [self.loop.create_task(each) for each in jobs]
        try:
            # Here and in no task: between its last look at who is there and what follows nobody can come.
            await self._look(tasks)
        except Exception:
            # Not to be foreseen: readers come back, and find the work begun anew.
            logger.exception("The streams of this process are closed")
            for reader in list(self.readers):
                reader.finish()
        finally:
            if self._work is asyncio.current_task():
                self._work = None  # who comes from now on begins it anew
            tasks += self._asking
            for each in tasks:
                each.cancel()
            try:
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:  # also when the loop itself ends meanwhile
                await live.close()
                await history.close()

    async def _follow(self, log: Log) -> None:
        """Read what is new of all runs that are due, round by round."""
        last = 0.0
        while True:
            await self._due_now.wait()
            await asyncio.sleep(max(0.0, last + GATHER_SECONDS - time.monotonic()))
            due = [run for run in self._due if self.tails[run].joined][:MOST_TAILS]
            if len(due) < MOST_TAILS:
                self._due.clear()  # who has nobody live yet is read by who comes
                self._due_now.clear()
            else:
                for run in due:
                    del self._due[run]
            if not due:
                continue
            last = time.monotonic()
            cursors = [(run, self.tails[run].at) for run in due]
            try:
                found = await outage.apart(partial(_live, log), cursors)
            except outage.ERRORS as error:
                await self._pause(error)
                for run in due:
                    if run in self.tails:
                        self._make_due(run)
                continue
            now = time.monotonic()
            for (run, after), fresh in zip(cursors, found, strict=True):
                if fresh is None:
                    self._give_up(run)
                else:
                    self._tell(run, after, fresh, now)

    def _give_up(self, run: UUID) -> None:
        """Close the streams of a run whose log cannot be read. Who comes back may find that it can."""
        tail = self.tails.get(run)
        if tail is None:
            return
        for reader in list(tail.joined):
            reader.finish()
            self._part(reader, tail)

    def _tell(self, run: UUID, after: int, fresh: list[Fresh], now: float) -> None:
        """Give a tail's new events to all who follow it."""
        tail = self.tails.get(run)
        if tail is None or tail.at != after:
            if tail is not None and tail.joined:
                self._make_due(run)  # all left and somebody came while it was read
            return
        tail.looked = now
        if not fresh:
            return
        if fresh[0].first != after + 1 or any(each.first != each.seq for each in fresh):
            # Shortened or compacted meanwhile. A reader may stand ahead of the tail, within a range: each reads on from where it is.
            for reader in list(tail.joined):
                self._part(reader, tail)
            return
        tail.at, tail.quiet = fresh[-1].seq, now
        tail.keep(fresh)
        made: dict[tuple[str, int], bytes] = {}
        for reader in list(tail.joined):
            self._give(reader, fresh, made)
        if len(fresh) == MOST_A_TAIL:
            self._make_due(run)

    async def _page(self, log: Log) -> None:
        """Read pages of history, and the next runs of threads. Short ones first, and each time a long one, too."""
        while True:
            await self._wanted.wait()
            readers = self._turn()
            if not self._short and not self._long:
                self._wanted.clear()
            if not readers:
                continue
            wanted = [(reader.run, reader.at, reader.batch, reader.prefix) for reader in readers if reader.run]
            try:
                pages = await outage.apart(log.pages, wanted)
            except outage.ERRORS as error:
                await self._pause(error)
                for reader in readers:
                    self.want(reader)
                continue
            for reader, page in zip(readers, pages, strict=True):
                if page is None:
                    reader.finish()
                elif not reader.cut:
                    self._turned(reader, page)

    def _turn(self) -> list[Reader]:
        taken: list[Reader] = []
        rows = 0
        if self._long:
            taken.append(self._long.popleft())
            rows = taken[0].batch
        while self._short and len(taken) < PAGES and rows < PAGE_ROWS:
            taken.append(self._short.popleft())
            rows += min(taken[-1].wanted, taken[-1].batch)
        while self._long and len(taken) < PAGES and rows < PAGE_ROWS:
            taken.append(self._long.popleft())
            rows += taken[-1].batch
        return [reader for reader in taken if not reader.cut]

    def _turned(self, reader: Reader, page: Page) -> None:
        """Give a reader its page; one that has come to the end of its history follows live from here."""
        reader.asked = False
        reader.wanted = max(page.last_seq - page.last, 0) + SHORT // 4
        reader.at = page.last
        reader.page(page.body)
        if page.over or not page.there:
            self._run_over(reader)
        elif page.last >= page.last_seq:
            self._join(reader)
        reader.wake.set()

    async def _look(self, work: Sequence[asyncio.Task[None]]) -> None:
        """Once in a while: what nobody rang for, pings, and readers who stand still. Ends when nobody was there for long.

        The work beside it has no end. What it raises is raised here.
        """
        while self.readers or time.monotonic() - self._empty_since < IDLE_SECONDS:
            tick = min(_TICK_SECONDS, LOOK_SECONDS)
            done, _ = await asyncio.wait(work, timeout=tick, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
            now = time.monotonic()
            for run, tail in self.tails.items():
                if tail.joined and now - tail.looked >= LOOK_SECONDS:
                    self._make_due(run)
            for reader in list(self.readers):
                if reader.sending:
                    if now - reader.sent >= SEND_SECONDS:
                        reader.cut_off()
                elif now - reader.sent >= PING_SECONDS and not reader.pieces:
                    reader.push(reader.ping)

    async def _go_on(self, log: Log) -> None:
        """Lead the streams of threads on to the next run; close those of runs that were deleted."""
        looked = 0.0
        while True:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._go_now.wait()
            except TimeoutError:
                pass
            self._go_now.clear()
            try:
                await self._lead_on(log)
                if time.monotonic() - looked >= LOOK_SECONDS:
                    looked = time.monotonic()
                    await self._close_deleted(log)
            except outage.ERRORS as error:
                if not outage.passes(error):
                    logger.exception("Runs that were deleted cannot be looked for")
                    looked += AGAIN_SECONDS
                await self._pause(error)

    async def _close_deleted(self, log: Log) -> None:
        now = time.monotonic()
        quiet = [run for run, tail in self.tails.items() if tail.joined and now - tail.quiet >= QUIET_SECONDS]
        if not quiet:
            return
        there = await log.there(quiet)
        for run in quiet:
            tail = self.tails.get(run)
            if tail is None:
                continue
            tail.quiet = now
            for reader in list(tail.joined) if run not in there else ():
                self._run_over(reader)
                reader.wake.set()

    async def _lead_on(self, log: Log) -> None:
        """Begin the next run of each thread's reader who waits for it, or pass it over if it is not theirs to see."""
        waiting = [reader for readers in self._between.values() for reader in readers if not reader.led]
        asked = [(reader.thread, reader.before) for reader in waiting if reader.thread]
        found = await outage.apart(log.next_runs, asked)
        groups: dict[Any, list[tuple[Reader, UUID]]] = {}
        for reader, next_run in zip(waiting, found, strict=True):
            there, run = next_run or (False, None)
            if not there:
                self._no_longer_between(reader)
                reader.finish()
            elif run is not None:
                groups.setdefault(reader.visitor.same, []).append((reader, run))
        for led in groups.values():
            for reader, _ in led:
                reader.led = True
            self._begin_to_ask(self._lead(led))

    async def _lead(self, led: list[tuple[Reader, UUID]]) -> None:
        """Lead the readers of one visitor on, if they may see the run."""
        try:
            seen = await self._seen(led[0][0].visitor, {Run: {run for _, run in led}})
        finally:
            for reader, _ in led:
                reader.led = False
        for reader, run in led if seen is not None else ():
            if not reader.cut:
                self._lead_to(reader, run, run in (seen or ()))

    def _lead_to(self, reader: Reader, run: UUID, seen: bool) -> None:
        reader.before = run
        if not seen:
            self._go_now.set()
            return
        self._no_longer_between(reader)
        reader.run, reader.at, reader.asked = run, 0, False
        reader.wanted = SHORT // 4
        self._begin(run)
        reader.wake.set()

    async def _admit(self) -> None:
        """Ask again whether readers may see what they are shown: keys all at once, then what the policy says of each visitor.

        A policy that hangs for one visitor holds up nobody else's question, and not the end of a key.
        """
        asking: set[Hashable] = set()

        async def ask(readers: list[Reader]) -> None:
            try:
                await self._ask_again(readers)
            finally:
                asking.discard(readers[0].visitor.same)

        while True:
            await asyncio.sleep(min(1.0, CHECK_SECONDS / 4) or 0.01)
            now = time.monotonic()
            due = [reader for reader in self.readers if now - reader.checked >= CHECK_SECONDS]
            groups: dict[Any, list[Reader]] = {}
            for reader in due:
                if now - reader.checked >= UNCHECKED_SECONDS:
                    # What the policy asks may be away alone, another database or a pool, while the log is read and shown.
                    reader.finish(unsent=False)
                else:
                    groups.setdefault(reader.visitor.same, []).append(reader)
            if groups:
                await self._end_revoked(groups.values())
            for same, readers in groups.items():
                if same not in asking:
                    asking.add(same)
                    self._begin_to_ask(ask(readers))

    async def _end_revoked(self, groups: Iterable[list[Reader]]) -> None:
        keys = {readers[0].visitor.key: readers for readers in groups if readers[0].visitor.key is not None}
        if not keys:
            return
        try:
            held = await self._of_keys.ask("keys", partial(holding, [key for key in keys if key is not None]))
        except (InterfaceError, OperationalError):
            return
        for key, readers in keys.items() if held is not None else ():
            for reader in readers if key not in (held or ()) else ():
                reader.finish(unsent=False)

    def _begin_to_ask(self, question: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(question)
        self._asking.add(task)
        task.add_done_callback(self._asked)

    def _asked(self, task: asyncio.Task[None]) -> None:
        self._asking.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("Who may see what could not be asked", exc_info=error)

    async def _ask_again(self, readers: list[Reader]) -> None:
        shown: dict[type[Model], set[UUID]] = {
            Run: {reader.run for reader in readers if reader.run is not None},
            Thread: {reader.thread for reader in readers if reader.thread is not None},
        }
        asked = [(reader, {reader.run, reader.thread}) for reader in readers]
        seen = await self._seen(readers[0].visitor, {model: ids for model, ids in shown.items() if ids})
        if seen is None:
            return
        now = time.monotonic()
        for reader, about in asked:
            # A run that it was led on to meanwhile was asked about then.
            if {id for id in about & {reader.run, reader.thread} if id is not None} <= seen:
                reader.checked = now
            else:
                reader.finish(unsent=False)  # who comes back is told why

    async def _seen(self, visitor: Visitor, rows: dict[type[Model], set[UUID]]) -> set[UUID] | None:
        """Return what of this the visitor may see; None while nobody can say."""
        try:
            return await self._questions.ask(visitor.same, partial(visitor.sees, rows))
        except (InterfaceError, OperationalError):
            return None
        except Exception:
            logger.exception("A policy that raises shows nothing")
            return set()

    async def _pause(self, error: BaseException) -> None:
        logger.warning("Streams wait for Postgres: %s", str(error).partition("\n")[0] or type(error).__name__)
        await asyncio.sleep(_PAUSE_SECONDS)

    # --- the end ----------------------------------------------------------------------------------------------------

    def depart(self) -> None:
        """Close all streams, so that their clients go on elsewhere. Called from a signal's handler."""
        try:
            self.loop.call_soon_threadsafe(self._close)
        except RuntimeError:
            pass  # the loop was closed

    def _close(self) -> None:
        for reader in list(self.readers):
            reader.finish()
        self.loop.call_later(DEPART_SECONDS, self._cut_all)

    def _cut_all(self) -> None:
        for reader in list(self.readers):
            reader.cut_off()


async def _live(log: Log, cursors: Sequence[tuple[UUID, int]]) -> list[list[Fresh]]:
    found = await log.live(cursors)
    return [found.get(place, []) for place in range(len(cursors))]


@cache
def _ear() -> ThreadPoolExecutor:
    """One thread, so that a channel is given up after it was taken. A Redis that hangs holds up nobody else."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="longhaul-streams-ear")


_broadcasts: WeakKeyDictionary[asyncio.AbstractEventLoop, Broadcast] = WeakKeyDictionary()


def here() -> Broadcast:
    """Return the broadcast of the running event loop."""
    loop = asyncio.get_running_loop()
    found = _broadcasts.get(loop)
    if found is None:
        # Each knows its loop, so neither goes by itself.
        for closed in [each for each in _broadcasts if each.is_closed()]:
            del _broadcasts[closed]
        found = _broadcasts[loop] = Broadcast()
    return found
