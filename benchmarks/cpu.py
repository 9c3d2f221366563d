"""CPU time of processes, read from Linux's /proc: user plus system, in seconds, to a hundredth.

A process that ended is not lost: its time passes to its parent with the wait for it. So a tree is its root's time, the
time of the children it has waited for, and the same of every child that lives.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True)
class _Stat:
    name: str
    parent: int
    own: float
    waited_for: float


class ProcessTable:
    """The processes of this machine at one moment."""

    def __init__(self) -> None:
        self._stats: dict[int, _Stat] = {}
        self._children: dict[int, list[int]] = {}
        for entry in _PROC.iterdir():
            if not entry.name.isdigit():
                continue
            try:
                text = (entry / "stat").read_text()
            except OSError:
                continue  # it ended while we looked; its parent has its time, or will have it
            # The name, in parentheses, may itself contain spaces and parentheses.
            before, _, after = text.rpartition(")")
            fields = after.split()
            user, system, waited_user, waited_system = (int(field) / _TICKS_PER_SECOND for field in fields[11:15])
            pid, parent = int(entry.name), int(fields[1])
            self._stats[pid] = _Stat(before.partition("(")[2], parent, user + system, waited_user + waited_system)
            self._children.setdefault(parent, []).append(pid)

    def name(self, pid: int) -> str | None:
        """Return the name of the program that runs under `pid`, None when none does."""
        return self._stats[pid].name if pid in self._stats else None

    def parent(self, pid: int) -> int:
        """Return the pid of the parent. Raises KeyError when nobody runs under `pid`."""
        return self._stats[pid].parent

    def own(self, pid: int) -> float:
        """Return the CPU seconds of this one process, without its children; 0 when it is gone."""
        return self._stats[pid].own if pid in self._stats else 0.0

    def tree(self, root: int, without: Collection[int] = ()) -> float:
        """Return the CPU seconds of a process and all its descendants, but for the live ones named in `without`.

        Raises KeyError when nobody runs under `root`.
        """
        stat = self._stats[root]
        children = (child for child in self._children.get(root, ()) if child not in without)
        return stat.own + stat.waited_for + sum(self.tree(child, without) for child in children)


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds by role between two readings."""
    return {role: after[role] - before[role] for role in after}
