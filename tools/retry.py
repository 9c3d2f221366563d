"""When a failed attempt is tried again: a value, without clock, database or state."""

import math
import random
from dataclasses import dataclass
from datetime import timedelta

from tools.exceptions import ToolError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Up to `attempts` tries, with exponential waits between them.

    After attempt n the wait is at most `initial_seconds * factor ** (n - 1)`, never more than `max_seconds`:

    >>> policy = RetryPolicy(attempts=5, initial_seconds=1, factor=4, max_seconds=30, jitter=False)
    >>> [wait and wait.total_seconds() for wait in map(policy.delay, range(1, 6))]
    [1.0, 4.0, 16.0, 30.0, None]

    With `jitter` (full jitter) the wait is drawn evenly between zero and that, so that calls which failed
    together do not come back together. A `retry_after` (seconds or timedelta) that the error carries takes
    the place of both: the other side has said when it will answer. It too is capped by `max_seconds`.

    `give_up_on` wins over `retry_on`. The errors of `tools.exceptions` are never retried: `ModelRetry`,
    `ToolFailed` and `ApprovalRequired` are answers, not accidents.
    """

    attempts: int = 3
    initial_seconds: float = 1.0
    factor: float = 2.0
    max_seconds: float = 60.0
    jitter: bool = True
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    give_up_on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        if not _is_whole(self.attempts) or self.attempts < 1:
            raise ValueError(f"attempts counts the first try too, so it is an integer from 1; got {self.attempts!r}.")
        for name, least in (("initial_seconds", 0.0), ("factor", 1.0), ("max_seconds", 0.0)):
            value = getattr(self, name)
            if _number(value) is None or value < least:
                raise ValueError(f"{name} must be a finite number from {least:g}; got {value!r}.")
        if self.max_seconds < self.initial_seconds:
            raise ValueError(
                f"max_seconds ({self.max_seconds:g}) caps every wait, so it cannot be below"
                f" initial_seconds ({self.initial_seconds:g})."
            )
        if self.max_seconds > timedelta.max.total_seconds():
            raise ValueError(f"max_seconds is longer than any timedelta; got {self.max_seconds!r}.")
        if not isinstance(self.jitter, bool):
            raise ValueError(f"jitter is True or False; got {self.jitter!r}.")
        for name in ("retry_on", "give_up_on"):
            classes = getattr(self, name)
            if not isinstance(classes, tuple) or not all(
                isinstance(each, type) and issubclass(each, BaseException) for each in classes
            ):
                raise ValueError(f"{name} must be a tuple of exception classes, like (OSError,); got {classes!r}.")

    def delay(self, attempt: int, error: BaseException | None = None) -> timedelta | None:
        """Return how long to wait before the attempt after `attempt`, the one that just failed (from 1).

        None means that there is no further attempt. Without an error (a lost worker, say) only the attempts count.
        """
        if attempt < 1:
            raise ValueError(f"attempt counts from 1; got {attempt!r}.")
        if attempt >= self.attempts:
            return None
        if error is not None:
            if isinstance(error, (ToolError, *self.give_up_on)) or not isinstance(error, self.retry_on):
                return None
            asked = _retry_after(error)
            if asked is not None:
                return timedelta(seconds=min(asked, self.max_seconds))
        return timedelta(seconds=random.uniform(0, self._ceiling(attempt)) if self.jitter else self._ceiling(attempt))  # noqa: S311

    def _ceiling(self, attempt: int) -> float:
        try:
            return float(min(self.initial_seconds * self.factor ** (attempt - 1), self.max_seconds))
        except OverflowError:  # the power outgrew a float long after it passed the cap
            return float(self.max_seconds if self.initial_seconds else 0)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _retry_after(error: BaseException) -> float | None:
    """Return the seconds that the error asks to wait; None where it says nothing usable (foreign classes: anything)."""
    asked = getattr(error, "retry_after", None)
    seconds = asked.total_seconds() if isinstance(asked, timedelta) else _number(asked)
    return seconds if seconds is not None and seconds >= 0 else None
