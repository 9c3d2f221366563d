"""How long to wait before the next try: full jitter, so that a thousand clients that were cut together do not come back together."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

RETRIED = frozenset({408, 425, 429, *range(500, 600)} - {501})  # statuses that may be others in a moment
LONGEST_ASKED = 3600.0  # seconds, of a Retry-After: whoever says more is asked after an hour


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits of 0 to `first` seconds, then to twice that, and so on, to `most`: 0.25, 0.5, 1, 2, 4, 8, 8, ..."""

    first: float = 0.25
    most: float = 8.0
    chance: Callable[[], float] = field(default=random.random, repr=False)

    def delay(self, failure: int, at_least: float = 0.0) -> float:
        """Return seconds. `failure` counts from 1; `at_least` is what a Retry-After asked for."""
        ceiling = min(self.most, self.first * 2.0 ** min(failure - 1, 30))
        return at_least + self.chance() * ceiling


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that an answer asks to wait, at most LONGEST_ASKED; 0 when it asks for none."""
    said = headers.get("retry-after", "").strip()
    if not said:
        return 0.0
    try:
        asked = float(said) if said.isdigit() else _until(parsedate_to_datetime(said))
    except (ValueError, OverflowError):
        return 0.0
    return min(asked, LONGEST_ASKED)


def _until(when: datetime) -> float:
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
