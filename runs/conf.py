"""The `LONGHAUL` dict of Django's settings, read into one frozen value.

`settings()` reads leniently: a key that is absent, unknown or of a wrong type leaves the default, for the system checks
(`runs.checks`) are where a wrong dict is told, with a hint, before anything runs. Times end in `_SECONDS` or
`_MILLISECONDS` in the dict and are `timedelta` here, without the unit in their name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from types import MappingProxyType
from typing import Any

from django.conf import settings as django_settings
from django.core.signals import setting_changed

Price = Mapping[str, float]  # {"input": ..., "output": ...}, currency units per million tokens


@dataclass(frozen=True, slots=True)
class Key:
    """One key of `LONGHAUL`: its default, and what a value of it must be.

    `unit` is the length of one unit for a key that is a time, and None for any other. `least` is the lowest value.
    `nullable` allows None. `form` is the pattern that a text must have, and that in words.
    """

    default: Any
    kind: type | tuple[type, ...]
    unit: timedelta | None = None
    least: float | None = None
    nullable: bool = False
    form: tuple[str, str] | None = None

    def problem(self, value: object) -> str | None:
        """Return what is wrong with a value, as the end of a sentence ("must be ..."), or None."""
        if value is None and self.nullable:
            return None
        # True is an int to Python, and never a number of seconds.
        if isinstance(value, bool) or not isinstance(value, self.kind):
            return f"must be {self.expected}; it is {value!r}"
        if self.least is not None and isinstance(value, int | float) and not self.least <= value < float("inf"):
            return f"must be at least {self.least:g}; it is {value!r}"
        if self.unit is not None and isinstance(value, int | float) and value > LONGEST / self.unit:
            return f"must be at most {LONGEST / self.unit:g}; it is {value!r}"
        if isinstance(value, str) and not value:
            return "must not be empty"
        if isinstance(value, str) and self.form and not re.fullmatch(self.form[0], value):
            return f"must be {self.form[1]}; it is {value!r}"
        return None

    @property
    def expected(self) -> str:
        """Name the type in words: `a number of seconds`, `a whole number`, `a dict`."""
        if self.unit is not None:
            return "a number of seconds" if self.unit == SECOND else "a number of milliseconds"
        kinds = self.kind if isinstance(self.kind, tuple) else (self.kind,)
        words = " or ".join(_WORDS.get(kind, kind.__name__) for kind in kinds)
        return f"{words} or None" if self.nullable else words

    def read(self, value: object) -> Any:
        """Return the value as `Settings` keeps it: times as timedelta."""
        if self.unit is not None and isinstance(value, int | float):
            return value * self.unit
        return MappingProxyType(value) if isinstance(value, dict) else value


SECOND = timedelta(seconds=1)
MILLISECOND = timedelta(milliseconds=1)
LONGEST = timedelta(days=3650)  # a time that is longer is a mistake, and one in the wrong unit may not fit a timedelta
_WORDS: Mapping[type, str] = {
    int: "a whole number",
    str: "a string",
    dict: "a dict",
    float: "a number",
    type: "a class",
}


def _time(default: float, least: float = 0, unit: timedelta = SECOND) -> Key:
    return Key(default, (int, float), unit=unit, least=least)


def _count(default: int, least: int = 1) -> Key:
    return Key(default, int, least=least)


def _rate(example: str) -> Key:
    return Key(None, str, nullable=True, form=(r"[1-9]\d*/(s|min|h|d)", f"a rate like {example!r}"))


def _queue(default: str) -> Key:
    return Key(default, str)


KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "LEG_BUDGET_SECONDS": _time(240, least=0.1),
        "MODEL_TIMEOUT_SECONDS": _time(600, least=0.1),
        "MODEL_SILENCE_SECONDS": _time(120, least=0.1),
        "PREPARE_TIMEOUT_SECONDS": _time(60, least=1),
        "LINGER_SECONDS": _time(2),
        "MAX_STEPS": _count(50),
        "MAX_HELD": _count(100, least=0),
        "MAX_INPUT_CHARS": _count(1_000_000),
        "POISON_LIMIT": _count(5),
        "MODEL_TRIES": _count(8),
        "MODEL_RETRY_TOTAL_SECONDS": _time(3600),
        "DRAIN_GRACE_SECONDS": _time(5),
        "BAD_CALLS_LIMIT": _count(5),
        "CONTEXT_MESSAGES": _count(100),
        "FLUSH_MILLISECONDS": _time(25, least=1, unit=MILLISECOND),
        "PRICES": Key({}, dict),
        "DEFAULT_MODEL": Key(None, str, nullable=True),
        "ACCESS": Key(None, (str, type), nullable=True),
        "API_RATE": _rate("600/min"),
        "START_RATE": _rate("20/min"),
        "MAX_BODY_BYTES": _count(8_000_000, least=1000),
        "IDEMPOTENCY_KEY_SECONDS": _time(86400, least=60),
        "AGENTS_QUEUE": _queue("longhaul.agents"),
        "TOOLS_QUEUE": _queue("longhaul.tools"),
        "CONTROL_QUEUE": _queue("longhaul.control"),
        "PRESENCE_TTL_SECONDS": _time(12, least=6),
        "FLOWER_URL": Key(
            None, str, nullable=True, form=(r"https?://.+", "an address that begins with http:// or https://")
        ),
    }
)


def attribute(key: str) -> str:
    """Name the attribute of `Settings` that a key fills: `LEG_BUDGET_SECONDS` fills `leg_budget`.

    `FLUSH_MILLISECONDS` would leave a verb, so it fills `flush_interval`.
    """
    if key == "FLUSH_MILLISECONDS":
        return "flush_interval"
    return key.removesuffix("_SECONDS").lower()


@dataclass(frozen=True, slots=True)
class Settings:
    """Longhaul's settings. One attribute a key of `KEYS`; see `attribute` for the names."""

    leg_budget: timedelta  # a leg older than this hands over at its next step boundary
    model_timeout: timedelta  # one model call, total wall time
    model_silence: timedelta  # between two chunks of a stream
    prepare_timeout: timedelta  # from the claim to the pending message
    linger: timedelta  # how long a leg waits for its tool calls; zero is never
    max_steps: int
    max_held: int  # held runs a thread
    max_input_chars: int  # of one input
    poison_limit: int  # reclaims without a committed step, then the run fails
    model_tries: int
    model_retry_total: timedelta
    drain_grace: timedelta  # how long streams may run on after SIGTERM
    bad_calls_limit: int
    context_messages: int
    flush_interval: timedelta
    default_model: str | None
    access: str | type | None
    api_rate: str | None  # requests a client, "600/min"
    start_rate: str | None  # those of them that create something
    max_body_bytes: int
    idempotency_key: timedelta  # how long a request that is sent again is known
    agents_queue: str
    tools_queue: str
    control_queue: str
    presence_ttl: timedelta  # a beat older than this is a death; a claim needs a beat younger than half of 12 s
    flower_url: str | None
    prices: Mapping[str, Price] = field(default_factory=dict)


@cache
def settings() -> Settings:
    """Return Longhaul's settings as they are now. Cached until Django tells that `LONGHAUL` was changed (in tests)."""
    given = getattr(django_settings, "LONGHAUL", None)
    given = given if isinstance(given, Mapping) else {}
    values = {}
    for name, key in KEYS.items():
        value = given.get(name, key.default)
        values[attribute(name)] = key.read(key.default if key.problem(value) else value)
    return Settings(**values)


def _forget(*, setting: str, **_: object) -> None:
    if setting == "LONGHAUL":
        settings.cache_clear()


setting_changed.connect(_forget, dispatch_uid="longhaul.runs.conf")
