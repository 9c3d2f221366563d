"""What bounds how many calls run at once, or start in a time: rates, and the gates that a call's row carries.

`gates_of` gives what stands in `ToolCall.gates`; tools/sql/0002_gates.sql is what reads it. A call without gates waits for
nothing but room in its queue.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.registry import Tool

MAX_DISPATCHED_CALLS = 32
UNITS = {"s": timedelta(seconds=1), "min": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}
RATE = re.compile(r"([1-9]\d*)/(s|min|h|d)")
MOST = 1_000_000  # more than that is no bound


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `count` in any stretch of `time`."""

    count: int
    time: timedelta

    @classmethod
    def parse(cls, text: object) -> Rate:
        """Read "10/s", "100/min", "1000/h" or "5000/d". Raises ValueError, whose text says what was expected.

        >>> Rate.parse("100/min")
        Rate(count=100, time=datetime.timedelta(seconds=60))
        """
        found = RATE.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(
                f"a rate is a whole number above 0, a slash and s, min, h or d, like '100/min'; got {text!r}"
            )
        return cls(int(found[1]), UNITS[found[2]])


def gate(most: int | None, rate: Rate | None) -> dict[str, Any]:
    """Return what bounds one key, as the row carries it; empty: nothing does."""
    bounds: dict[str, Any] = {} if most is None else {"most": min(most, MOST)}
    if rate is not None:
        bounds |= {"count": min(rate.count, MOST), "seconds": rate.time.total_seconds()}
    return bounds


def gates_of(
    tool: Tool, owner: str | None, *, per_owner: int | None = None, rate_per_owner: str | None = None
) -> dict[str, Any] | None:
    """Return the gates of a call of this tool, for this owner (None: nobody's); None when nothing bounds it."""
    gates = {f"tool:{tool.name}": gate(tool.max_concurrency, tool.rate)}
    if owner is not None:
        rate = None if rate_per_owner is None else Rate.parse(rate_per_owner)
        gates[f"calls_of:{owner}"] = gate(per_owner, rate)
    return {key: bounds for key, bounds in gates.items() if bounds} or None


def window() -> int:
    """Return how many calls of a queue may be sent and not claimed."""
    from django.conf import settings  # a module of tools needs no Django to be imported

    given = getattr(settings, "LONGHAUL", {}).get("MAX_DISPATCHED_CALLS")
    # As runs.conf reads it: what is no such number leaves the default.
    return given if isinstance(given, int) and not isinstance(given, bool) and given >= 1 else MAX_DISPATCHED_CALLS
