"""The last messages of a thread, whole turns only, kept rendered while a leg lives.

A leg reads the thread once and afterwards only what is new, so a step costs what it adds, not what the thread holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from runs.context.hidden import Hidden


@dataclass(frozen=True, slots=True)
class Shown:
    """One message of the window."""

    id: str
    position: int
    role: str
    rendered: bytes


Row = list[Any]  # [id, position, role, content, run], as longhaul_context_read gives it


class Window:
    """At most `size` of the thread's last messages, and before them what is pinned: the run's own input.

    A last turn with more results than that is kept whole.

    It never begins with a tool's result whose call lies further back. `render` is the provider's.
    """

    def __init__(self, size: int, render: Callable[[Mapping[str, Any]], bytes], hidden: Hidden | None = None) -> None:
        self.size = size
        self._hidden = hidden or Hidden(lambda: ())
        self._passing: dict[str, Row] = {}  # by id: what is shown until the model speaks again
        self.last = 0  # the highest place that was read
        self._render = render
        self._run: str | None = None
        self._pinned: list[Shown] = []
        self._shown: deque[Shown] = deque()
        self._own_input: dict[str, Shown] = {}

    def pin(self, rows: Iterable[Row]) -> None:
        """Take in what stays shown though the window has moved on."""
        self._pinned = [self._read(row) for row in rows]

    def extend(self, rows: Iterable[Row], *, run: str) -> None:
        """Take in the messages after `last`, in their order. Those of `run` that nobody spoke in a step are its input."""
        for row in rows:
            if row[2] == "assistant" and self._passing:
                self._pass()
            message = self._read(row)
            self._shown.append(message)
            if row[4] == run and message.role in ("user", "system"):
                self._own_input[message.id] = message
        if self._shown:
            self.last = max(self.last, self._shown[-1].position)
        self._trim()

    def _read(self, row: Row) -> Shown:
        content = self._hidden.shown(row[3])
        if self._hidden.passes(content):
            self._passing[row[0]] = row
        return Shown(row[0], row[1], row[2], self._rendered(row, content))

    def _rendered(self, row: Row, content: Any) -> bytes:
        # A message of which all was left out is not shown; one that has no parts is as the provider says.
        return self._render({"role": row[2], "content": content}) if content or not row[3] else b""

    def _pass(self) -> None:
        """Leave out what was shown until the model spoke again."""
        passing, self._passing = self._passing, {}
        self._hidden.spoken()
        for place, each in enumerate(self._shown):
            if (row := passing.get(each.id)) is not None:
                self._shown[place] = replace(each, rendered=self._rendered(row, self._hidden.shown(row[3])))

    def _trim(self) -> None:
        last_turn = next((n for n, each in enumerate(reversed(self._shown), 1) if each.role != "tool"), 0)
        while len(self._shown) > max(self.size, last_turn) or (self._shown and self._shown[0].role == "tool"):
            dropped = self._shown.popleft()
            if dropped.id in self._own_input:
                self._pinned.append(dropped)

    def messages(self) -> list[bytes]:
        """Return the rendered messages, in order, for a request."""
        return [message.rendered for message in (*self._pinned, *self._shown) if message.rendered]

    def described(self) -> dict[str, Any]:
        """Return what a Step keeps, enough to rebuild the request: see `runs.models.Step`."""
        first, last = (self._shown[0].position, self._shown[-1].position) if self._shown else (0, 0)
        return {
            "pinned": [message.position for message in self._pinned],
            "first": first,
            "last": last,
            "skipped": list(self._skipped()) if last - first >= len(self._shown) else [],
        }

    def _skipped(self) -> Iterator[tuple[int, int]]:
        for before, after in pairwise(message.position for message in self._shown):
            if after - before > 1:
                yield before + 1, after - 1
