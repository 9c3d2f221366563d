"""The limits of a model's calls (`LONGHAUL["MODEL_LIMITS"]`), and the pauses that its service asks for.

What was used and who waits are rows, and `sql/0005_models.sql` decides: exactly, over all workers. This is what a leg brings along:
the key of its model, and what is known of its limits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Any
from uuid import UUID

from runs.conf import settings
from runs.providers.port import RatesReported
from threads import database

logger = logging.getLogger("longhaul.models")

# As they are called in the settings, and in the rows.
FIELDS: Mapping[str, str] = {
    "requests_per_minute": "requests",
    "tokens_per_minute": "tokens",
    "max_concurrency": "concurrency",
}
MINUTE = timedelta(seconds=60)
# A leg that was given leave sends its request within this time, or not at all. Uses count for as much longer: so there are
# never more requests than allowed in a minute at the other end either, however long a worker stood still.
SEND_WITHIN = timedelta(seconds=2)
TYPICAL_ANSWER = 500  # tokens, where the request names no bound
LONGEST_PAUSE = timedelta(hours=1)  # a service that means longer says it again
LONGEST_KEY = 293  # characters: with "tokens:" before it, what a column holds


@dataclass(frozen=True, slots=True)
class Quota:
    """What bounds the calls of one model. `limits`: {"requests", "tokens", "concurrency"}, None where nothing is set."""

    model: str
    limits: Mapping[str, int] | None

    @property
    def key(self) -> str:
        return f"model:{self.model}"[:LONGEST_KEY]

    @property
    def rows(self) -> dict[str, Any] | None:
        """The limits as `longhaul_model_ask` takes them."""
        if self.limits is None:
            return None
        return {**self.limits, "seconds": (MINUTE + SEND_WITHIN).total_seconds()}

    def ask(self, size: int, options: Mapping[str, Any]) -> str:
        """Return what a leg asks at a boundary, as JSON. `size`: bytes that it knows of the request already."""
        if self.limits is None:
            return database.dumps({"key": self.key})
        bound = options.get("max_completion_tokens") or options.get("max_tokens")
        answer = bound if isinstance(bound, int) else TYPICAL_ANSWER
        return database.dumps({"key": self.key, "limits": self.rows, "bytes": size, "answer": answer})


def quota(model: str) -> Quota:
    """Return what bounds a model: the limits under its own name, or else those of the longest pattern that it matches."""
    given = settings().model_limits
    found = given.get(model)
    if found is None:
        patterns = [name for name in given if "*" in name and fnmatchcase(model, name)]
        found = given[max(patterns, key=len)] if patterns else None
    limits = {FIELDS[name]: int(value) for name, value in (found or {}).items() if not problem(name, value)}
    seen = _seen.get(model)
    if limits and seen is not None:
        limits = {name: min(value, seen.get(name, value)) for name, value in limits.items()}
    return Quota(model, limits or None)


def problem(name: object, value: object) -> str | None:
    """Return what is wrong with one limit, or None."""
    if name not in FIELDS:
        return f"{name!r} is no limit; there are {', '.join(FIELDS)}"
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**62:
        return f"{name!r} must be a whole number of at least 1; it is {value!r}"
    return None


_seen: dict[str, dict[str, int]] = {}  # what services said of their limits a minute, to this process


def hear(model: str, rates: RatesReported) -> None:
    """Lower what is known of a model's limits to what its service says. Other processes hear it with their own answers."""
    if quota(model).limits is None:
        return
    for name, rate in (("requests", rates.requests), ("tokens", rates.tokens)):
        said = None if rate is None else rate.a_minute
        known = (quota(model).limits or {}).get(name)
        if said is None or known is None or said >= known:
            continue
        logger.warning(
            "%s allows %s %s a minute, less than the %s that LONGHAUL['MODEL_LIMITS'] says",
            model,
            said,
            name,
            known,
            extra={"action": "model.limit_lowered", "model": model, "limit": said},
        )
        _seen.setdefault(model, {})[name] = said


def forget() -> None:
    """Forget what services said."""
    _seen.clear()


def pause(quota: Quota, time: timedelta, reason: str, run: UUID | None = None) -> None:
    """Let nobody ask the model for so long. `run`: a running one that was refused so, which then waits in the line."""
    time = min(time, LONGEST_PAUSE)
    database.call(
        "SELECT longhaul_model_pause(%s::text, %s::interval, %s::text, %s::uuid, %s::jsonb)",
        (quota.key, time, reason, run, None if quota.rows is None else database.dumps(quota.rows)),
    )
    logger.warning(
        "%s is not asked for %.1f s (%s)",
        quota.model,
        time.total_seconds(),
        reason,
        extra={"action": "model.paused", "model": quota.model, "seconds": time.total_seconds()},
    )


def release() -> int:
    """Let go the runs whose turn it is to ask their models again; they are due at once. Returns how many."""
    return int(database.call("SELECT longhaul_models_release()") or 0)
