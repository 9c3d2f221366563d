"""Calls that are kept out of later context, each with its result, so that the transcript stays valid.

A call of a tool with `in_context="run"` or `"step"` says so in its part of the assistant's message: `in_context`, and the
`run` that made it. The first is shown to that run and to those that go on with its work (resume, retry, fork); the second
to them too, until the model has spoken again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any
from uuid import UUID

from threads import database

Part = dict[str, Any]


def work_of(run_id: UUID | str) -> frozenset[str]:
    """Return the ids of the run and of those whose work it goes on with."""
    rows = database.rows_of(
        "WITH RECURSIVE work AS ("
        " SELECT id, parent_id, origin FROM longhaul_runs_run WHERE id = %s"
        " UNION SELECT r.id, r.parent_id, r.origin FROM longhaul_runs_run r JOIN work ON r.id = work.parent_id"
        " WHERE work.origin IN ('resume', 'retry', 'fork')) SELECT id FROM work",
        (str(run_id),),
    )
    return frozenset(str(id) for (id,) in rows)


def mark(in_context: str, run_id: UUID) -> Part:
    """Return what the part of a call says of how long it is shown; nothing of one that always is."""
    return {} if in_context == "thread" else {"in_context": in_context, "run": str(run_id)}


class Hidden:
    """Leaves out what is not shown, message by message in their order. `work` is asked for when a call is met that it matters to."""

    def __init__(self, work: Callable[[], Collection[str]]) -> None:
        self._asked = work
        self._calls: set[str] = set()  # whose results are left out too
        self._passing: set[str] = set()  # shown until the model speaks again

    @cached_property
    def _work(self) -> Collection[str]:
        return self._asked()

    def shown(self, content: Sequence[Part]) -> Sequence[Part]:
        """Return the parts that are shown: the same object when all are."""
        kept = [part for part in content if self._is_shown(part)]
        return content if len(kept) == len(content) else kept

    def passes(self, content: Sequence[Part]) -> bool:
        """Return whether something of it is shown until the model speaks again."""
        return any(part.get("tool_call") in self._passing for part in content)

    def spoken(self) -> None:
        """The model has spoken again: what was shown until then goes."""
        self._calls |= self._passing
        self._passing.clear()

    def _is_shown(self, part: Part) -> bool:
        call = part.get("tool_call")
        if call is None or call in self._calls:
            return call is None
        if part.get("in_context") is not None and part["type"] == "tool_call":
            if part.get("run") not in self._work:
                self._calls.add(call)
                return False
            if part["in_context"] == "step":
                self._passing.add(call)
        return True
