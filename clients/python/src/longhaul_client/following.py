"""One stream over as many connections as it takes: where it stands, what to ask next, what to make of what comes, how long to wait.

Knows no socket and sleeps by itself never; what has a connection asks it:

    while not following.over:
        ask = following.ask()                       # send this
        following.answered(status, headers)         # True: a stream follows; else its body goes to `refused`
        for event in following.take(piece): ...     # for each piece of bytes
        pause = following.lost(error)               # the connection has ended, however: wait so long, begin again
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from longhaul_client import errors
from longhaul_client.answers import TERMINAL, Event, Run
from longhaul_client.backoff import RETRIED, Backoff, retry_after
from longhaul_client.calls import Call, Params
from longhaul_client.errors import ApiError, ConnectionLost, StreamBroken
from longhaul_client.frames import Parser, TooLong

logger = logging.getLogger("longhaul_client")

STALL_SECONDS = 40.0  # without a byte; the server pings every 15 s
FAULTS = 3  # in a row, of what is no stream; the connection may be to blame for one
STREAM = "text/event-stream"
Patience: TypeAlias = float | Literal[False] | None  # seconds; None: without end; False: the client's


@dataclass(frozen=True, slots=True)
class Ask:
    """The next request of a stream."""

    method: str
    path: str
    params: Params
    headers: Mapping[str, str]
    content: bytes | None = field(default=None, repr=False)


class Following:
    """The protocol of one reader. `run` and `seq` are the last event's that came; of a thread None and 0 before the first."""

    def __init__(
        self,
        *,
        run: str | None = None,
        thread: str | None = None,
        start: Call[Run] | None = None,
        seq: int = 0,
        backoff: Backoff | None = None,
        give_up_after: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.thread, self.seq = run, thread, seq
        self.over = False
        self.connections = 0
        self.fault: StreamBroken | None = None  # what came was no stream: this connection is of no use
        self._start = start
        self._backoff = backoff or Backoff()
        self._give_up_after = give_up_after
        self._clock = clock
        self._parser = Parser()
        self._gap = False  # what follows may begin further on
        self._failures = self._faults = 0
        self._failing_since: float | None = None
        self._later = 0.0  # seconds that the server asked for

    def __repr__(self) -> str:
        return f"<Following {self._name}>"

    @property
    def _name(self) -> str:
        what = f"thread {self.thread}" if self.thread is not None else f"run {self.run or 'that is starting'}"
        return f"{what} after {self.cursor or 0}"

    @property
    def cursor(self) -> str:
        """What goes on behind the last event that came; empty before the first."""
        if self.thread is None:
            return str(self.seq) if self.seq else ""
        return "" if self.run is None else f"{self.run}:{self.seq}"

    def ask(self) -> Ask:
        headers = {"Accept": STREAM, "Cache-Control": "no-store", "Accept-Encoding": "identity"}
        if self.thread is None and self.run is None:
            assert self._start is not None
            call = self._start
            return Ask(call.method, call.path, call.params, {**call.headers, **headers}, call.content)
        # The header beside the query: only by it a run that has ended says at its end that nothing can follow.
        cursor = self.cursor
        if cursor:
            headers["Last-Event-ID"] = cursor
        if self.thread is not None:
            params: Params = (("after", cursor),) if cursor else ()
            return Ask("GET", f"/api/threads/{self.thread}/stream", params, headers)
        return Ask("GET", f"/api/runs/{self.run}/stream", (("starting_after", str(self.seq)),), headers)

    def answered(self, status: int, headers: Mapping[str, str]) -> bool:
        """Return whether a stream follows. If not, and it is not `over`, what the answer says goes to `refused`."""
        self._parser = Parser()
        self.fault = None
        if status == 204:
            self.over = True
            return False
        if status != 200:
            return False
        if headers.get("content-type", "").partition(";")[0].strip().lower() != STREAM:
            self.fault = StreamBroken("The answer is no event stream: something else answers at this address.")
            return False
        if self.thread is None and self.run is None:
            self.run = headers.get("x-run-id") or None
        self.connections += 1
        return True

    def refused(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception:
        """Return what was wrong, when it may be another time; raise it when it will not."""
        if self.fault is not None:
            return self.fault
        ask = self.ask()
        error = errors.refusal(status, body, f"{ask.method} {ask.path}")
        starting = self.run is None and self._start is not None and self._start.own_key
        if status not in RETRIED and not (starting and error.code == "idempotency_conflict"):
            raise error
        self._later = retry_after(headers)
        return error

    def take(self, piece: bytes) -> list[Event]:
        """Return the events that are whole with this piece, but for those that came before. Then look at `fault` and `over`."""
        found: list[Event] = []
        try:
            for frame in self._parser.feed(piece):
                if frame.comment is not None:
                    if frame.comment == "ping":
                        self._progress()
                    continue
                if frame.type == "ping":
                    self._progress()
                    continue
                event = self._event(frame.id, frame.data, json.loads(str(frame.data, "utf-8")))
                if event is not None:
                    found.append(event)
                    self._progress()
                if self.over:
                    break
        except StreamBroken as fault:
            self.fault = fault
        except (ValueError, LookupError, TypeError) as error:
            what = str(error) if isinstance(error, TooLong) else type(error).__name__
            self.fault = StreamBroken(f"Something in the stream is no event: {what}.")
        return found

    def _event(self, id: str, raw: bytes, data: Mapping[str, object]) -> Event | None:
        """Return the event, and stand behind it; None when it came before. Raises StreamBroken when others are missing."""
        type = str(data["type"])
        if type == "resume_gap":
            to = data["to"]
            assert isinstance(to, int)
            if self.thread is not None:
                self._gap = True  # of which run, the next frame says
            elif to <= self.seq:
                return None
            else:
                self.seq = to
            return Event(type, None, "" if self.thread is not None else self.run or "", data, self.cursor, raw)
        seq, run = data["seq"], self.run
        if not isinstance(seq, int):
            raise TypeError
        if self.thread is not None:
            run = id.rpartition(":")[0]
        elif run is None:
            run = self.run = str(data["run"])
        before = self.seq if run == self.run else 0
        if seq <= before:
            return None
        first = data.get("from_seq", seq)
        # A range that begins before the cursor cannot be taken in part: the server cuts it when it is asked from there.
        if first != before + 1 and not self._gap:
            raise StreamBroken(f"The stream of run {run} goes on with event {first} after {before}.")
        self._gap = False
        self.run, self.seq = run, seq
        if type in TERMINAL and self.thread is None:
            self.over = True
        return Event(type, seq, run or "", data, id, raw)

    def _progress(self) -> None:
        self._failures = self._faults = 0
        self._failing_since = None

    def lost(self, error: Exception | None) -> float:
        """Return the seconds to wait before the next connection. Raises ConnectionLost, or StreamBroken, when that is enough.

        None is an end in order, without a last event: the server sends its readers to another process.
        """
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        self._failures += 1
        if isinstance(error, StreamBroken):
            self._faults += 1
            if self._faults >= FAULTS:
                raise error
        pause = self._backoff.delay(self._failures, self._later)
        self._later = 0.0
        failing = now - self._failing_since
        if self._give_up_after is not None and failing + pause > self._give_up_after:
            raise ConnectionLost(
                f"The stream of {self._name} could not be had for {failing:.0f} s: {_said(error)}"
            ) from error
        level = logging.INFO if self._failures <= 2 else logging.WARNING
        logger.log(level, "The stream of %s is cut (%s); on again in %.1f s", self._name, _said(error), pause)
        return pause


def _said(error: Exception | None) -> str:
    """Name an error without what it may quote: a client's own text is known to have no secret, others' is not."""
    if error is None:
        return "it ended before its end"
    return str(error) if isinstance(error, ApiError | StreamBroken) else type(error).__name__


def place(after: int | str | Event | None) -> tuple[str | None, int]:
    """Read a cursor: a seq, `RUN:SEQ`, an event that was handled. Return the run, if it names one, and the seq."""
    if isinstance(after, Event):
        after = after.id
    if after is None or after == "":
        return None, 0
    run, _, seq = str(after).rpartition(":")
    if not seq.isdigit():
        raise ValueError(f"{after!r} is no cursor: a seq, or RUN:SEQ.")
    return run or None, int(seq)
