"""When a failed attempt is tried again: a value, without clock, database or state."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from tools.exceptions import ToolError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Up to `attempts` tries, with exponential waits between them.

    After attempt n the wait is at most `initial_seconds * factor ** (n - 1)`, never more than `max_seconds`:

    >>> policy = RetryPolicy(attempts=5, initial_seconds=1, factor=4, max_seconds=30, jitter=False)
    >>> [wait and wait.total_seconds() for wait in map(policy.delay, range(1, 6))]
    [1.0, 4.0, 16.0, 30.0, None]

    With `jitter` (full jitter) the wait is drawn evenly between zero and that, so that calls which failed
    together do not come back together. What the other side has said of when it will answer takes the place of both: a
    `retry_after` of the error (seconds or timedelta), or the header Retry-After (seconds, or a date) of its
    `response.headers`, as the errors of httpx, requests and openai carry it, or of its `headers`, as urllib's; else
    that of the error that it was raised from. It too is capped by `max_seconds`.

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
    """Return the seconds that the error, or the one that it was raised from, asks to wait; None where neither says so."""
    seconds = _asked(error)
    return _asked(error.__cause__) if seconds is None and error.__cause__ is not None else seconds


def _asked(error: BaseException) -> float | None:
    """As `_retry_after`, of this error alone. Its class is foreign: its attributes may be anything, and may raise."""
    try:
        asked = getattr(error, "retry_after", None)
        if asked is None:
            headers = getattr(getattr(error, "response", error), "headers", None)
            said = None if headers is None else _in_headers(headers)
        else:
            said = asked.total_seconds() if isinstance(asked, timedelta) else _number(asked)
    except Exception:
        return None
    return said if said is not None and said >= 0 else None


def _in_headers(headers: Mapping[str, object]) -> float | None:
    """Return what a response asks for, in seconds; a date counts from the response's own clock, where it tells it."""
    told = {str(name).lower(): str(headers[name]) for name in headers if str(name).lower() in ("retry-after", "date")}
    asked = told.get("retry-after")
    if asked is None:
        return None
    try:
        return _number(float(asked))
    except ValueError:
        pass
    try:
        now = _date(told["date"])
    except (KeyError, TypeError, ValueError, IndexError):
        now = datetime.now(UTC)
    return max((_date(asked) - now).total_seconds(), 0.0)


def _date(text: str) -> datetime:
    """Read a date of HTTP, which is in GMT. Raises ValueError and others for what is none."""
    date = parsedate_to_datetime(text)
    return date if date.tzinfo else date.replace(tzinfo=UTC)
