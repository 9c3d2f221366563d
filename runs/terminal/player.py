"""Playing a run again: its events in the rhythm in which they came, slower, faster or at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta

from runs.events import RunEvent
from runs.terminal.words import seconds

LONGEST_PAUSE = timedelta(seconds=2)  # that a reader waits between two events; what is cut is told


class Player:
    """Yields events when they are due by their `at`, `speed` times as fast; 0 is at once.

    A wait of more than `pause` is cut to it, and `told` gets a line that says what was left out. The events of a live run come
    when they come. `clock` is the time of the run as it plays, for what is drawn between two events.
    """

    def __init__(
        self,
        events: Iterable[RunEvent],
        speed: float,
        told: Callable[[str], None],
        pause: timedelta = LONGEST_PAUSE,
    ) -> None:
        self._events = events
        self._speed = speed
        self._told = told
        self._pause = pause.total_seconds()
        self._at: datetime | None = None  # the last event's time
        self._shown = 0.0  # when it was due, monotonic

    def clock(self) -> datetime:
        if self._at is None:  # a view that has seen no event knows its own begin
            return datetime.min.replace(tzinfo=UTC)
        return self._at + timedelta(seconds=(time.monotonic() - self._shown) * self._speed)

    def __iter__(self) -> Iterator[RunEvent]:
        for event in self._events:
            if self._speed:
                self._await(event.at)
            yield event

    def _await(self, at: datetime) -> None:
        now = time.monotonic()
        if self._at is None:
            self._at, self._shown = at, now
            return
        span = max(at - self._at, timedelta())
        due = self._shown + span.total_seconds() / self._speed
        if due - now > self._pause:
            self._told(f"nothing happens for {seconds(span)}; {self._pause:g} s of it are waited for")
            due = now + self._pause
        if due > now:
            time.sleep(due - now)
        # What is late by more than a moment (a live run's next event, a slow terminal) is not caught up by haste.
        self._at, self._shown = at, max(due, time.monotonic() - 0.05)
