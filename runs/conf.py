"""The `LONGHAUL` dict of Django's settings, read into one frozen value.

`settings()` reads leniently: a key that is absent, unknown or of a wrong type leaves the default, for the system checks
(`runs.checks`) are where a wrong dict is told, with a hint, before anything runs. Times end in `_SECONDS`,
`_MILLISECONDS` or `_DAYS` in the dict and are `timedelta` here, without the unit in their name.
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

from tools.gates import MAX_DISPATCHED_CALLS
from tools.queues import DEFAULTS
from tools.results import DEFAULTS as RESULTS
from tools.results import LEAST

Price = Mapping[str, float]  # {"input": ..., "output": ...}, currency units per million tokens
ModelLimits = Mapping[str, int]  # {"requests_per_minute": ..., "tokens_per_minute": ..., "max_concurrency": ...}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of `LONGHAUL`: its default, what a value of it must be, and what it means, as docs/settings.md says it.

    `unit` is the length of one unit for a key that is a time, and None for any other. `least` is the lowest value.
    `nullable` allows None. `form` is the pattern that a text must have, and that in words.
    """

    default: Any
    kind: type | tuple[type, ...]
    meaning: str
    unit: timedelta | None = None
    least: float | None = None
    nullable: bool = False
    form: tuple[str, str] | None = None

    def problem(self, value: object) -> str | None:
        """Return what is wrong with a value, as the end of a sentence ("must be ..."), or None."""
        if value is None and self.nullable:
            return None
        # True is an int to Python, and never a number of seconds.
        if isinstance(value, bool) != (self.kind is bool) or not isinstance(value, self.kind):
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
            words = f"a number of {_UNITS[self.unit]}"
        else:
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
DAY = timedelta(days=1)
LONGEST = timedelta(days=3650)  # a time that is longer is a mistake, and one in the wrong unit may not fit a timedelta
_UNITS: Mapping[timedelta, str] = {SECOND: "seconds", MILLISECOND: "milliseconds", DAY: "days"}
_WORDS: Mapping[type, str] = {
    bool: "True, False",
    int: "a whole number",
    str: "a string",
    dict: "a dict",
    float: "a number",
    type: "a class",
}


def _time(default: float, meaning: str, least: float = 0, unit: timedelta = SECOND) -> Key:
    return Key(default, (int, float), meaning, unit=unit, least=least)


def _kept(default: float | None, meaning: str, none: str = "for ever") -> Key:
    return Key(default, (int, float), f"{meaning}; None: {none}", unit=DAY, least=1, nullable=True)


def _count(default: int, meaning: str, least: int = 1) -> Key:
    return Key(default, int, meaning, least=least)


def _most(default: int | None, meaning: str) -> Key:
    return Key(default, int, f"{meaning}; None: as many as come", least=1, nullable=True)


def _rate(example: str, meaning: str) -> Key:
    return Key(None, str, meaning, nullable=True, form=(r"[1-9]\d*/(s|min|h|d)", f"a rate like {example!r}"))


def _queue(default: str, meaning: str) -> Key:
    return Key(default, str, meaning)


# docs/settings.md is written from this, a table a group: `python -m tests.docs.settings` after a change.
GROUPS: Mapping[str, Mapping[str, Key]] = {
    "Runs": {
        "LEG_BUDGET_SECONDS": _time(240, "a leg that is older hands over at its next step", least=0.1),
        "PREPARE_TIMEOUT_SECONDS": _time(
            60, "from a claim to the question to the model; then the run is taken back", least=1
        ),
        "LINGER_SECONDS": _time(2, "how long a leg waits for its tool calls before it ends; 0 is never"),
        "MAX_STEPS": _count(50, "model turns of a run, where the agent says nothing"),
        "MAX_HELD": _count(100, "runs that may wait for one thread", least=0),
        "MAX_DISPATCHED": _count(
            100,
            "queued runs of a queue that are with the broker at once; the others wait in Postgres, and owners take turns",
        ),
        "RUNS_PER_OWNER": _most(None, "runs of one owner that are at work at once; the others wait"),
        "RUN_RATE_PER_OWNER": _rate("100/h", "runs of one owner that start in any such time; None: as many as come"),
        "MAX_INPUT_CHARS": _count(1_000_000, "length of one input"),
        "POISON_LIMIT": _count(5, "times that a run is taken back without a committed step, then it fails"),
        "BAD_CALLS_LIMIT": _count(5, "steps in a row with nothing but invalid calls, then the run fails"),
        "CONTEXT_MESSAGES": _count(100, "messages that the model sees, where the agent says nothing"),
        "FLUSH_MILLISECONDS": _time(25, "how often streamed text is committed", least=1, unit=MILLISECOND),
    },
    "Results of tools": {
        "MAX_RESULT_CHARS": _count(
            RESULTS["MAX_RESULT_CHARS"],
            "characters of a result that the model, events and messages carry; a longer one is kept apart, and cut for them",
            least=LEAST["MAX_RESULT_CHARS"],
        ),
        "MAX_RESULT_BYTES": _count(
            RESULTS["MAX_RESULT_BYTES"],
            "size of a result with its files; a larger one is refused, and the call fails",
            least=LEAST["MAX_RESULT_BYTES"],
        ),
    },
    "Models": {
        "DEFAULT_MODEL": Key(None, str, "the model of agents that name none", nullable=True),
        "MODEL_TIMEOUT_SECONDS": _time(600, "one model call in all", least=0.1),
        "MODEL_SILENCE_SECONDS": _time(120, "the longest pause between two chunks of an answer", least=0.1),
        "MODEL_TRIES": _count(8, "tries of one model turn"),
        "MODEL_RETRY_TOTAL_SECONDS": _time(3600, "all tries of one model turn together"),
        "MODEL_LIMITS": Key(
            {},
            dict,
            'model, or a pattern like `openai:*`, to `{"requests_per_minute": ..., "tokens_per_minute": ...,'
            ' "max_concurrency": ...}`, over all workers; see [Models](agents.md#limits-of-a-models-calls)',
        ),
        "PRICES": Key({}, dict, 'model to `{"input": ..., "output": ...}` a million tokens; for `max_cost`'),
    },
    "Limits": {
        "MAX_DISPATCHED_CALLS": _count(
            MAX_DISPATCHED_CALLS, "tool calls of a queue that are sent and not yet begun; the others wait in Postgres"
        ),
        "CALLS_PER_OWNER": _most(None, "tool calls of one owner that run at once"),
        "CALL_RATE_PER_OWNER": _rate("100/min", "tool calls of one owner that start in a time"),
    },
    "HTTP and the admin": {
        "ACCESS": Key(
            None,
            (str, type),
            "a policy class, `threads.access.Policy` or your own: who sees and may do what",
            nullable=True,
        ),
        "API_RATE": _rate("600/min", "requests that a key, or a signed-in user, may make over HTTP"),
        "START_RATE": _rate(
            "20/min", "those of them that create a thread, a message or a run, counted beside `API_RATE`"
        ),
        "MAX_BODY_BYTES": _count(8_000_000, "size of a request's body over HTTP", least=1000),
        "IDEMPOTENCY_KEY_SECONDS": _time(
            86400, "how long a request over HTTP that is sent again gets its first answer", least=60
        ),
        "MAX_STREAMS": _most(10_000, "streams that one web process keeps open; who comes then is answered 503"),
        "STREAMS_PER_OWNER": _most(
            None, "those of them that one user may have, by all keys and sessions together; then 429"
        ),
        "FLOWER_URL": Key(
            None,
            str,
            "where people open Flower; the admin links to a task there",
            nullable=True,
            form=(r"https?://.+", "an address that begins with http:// or https://"),
        ),
    },
    "Postgres": {
        "DIRECT_DATABASE": Key(
            None,
            str,
            "a database of `DATABASES` by which workers reach the same Postgres past a pooler, to be missed at once when"
            " they die; None: `default`",
            nullable=True,
        ),
        "SESSION_LOCKS": Key(
            None,
            bool,
            "whether a connection there is a session that keeps its locks; None: look, for a pooler shows itself",
            nullable=True,
        ),
    },
    "Housekeeping": {
        "COMPACT_AFTER_DAYS": _kept(
            30,
            "how long after a run's end the deltas of its log are folded into fewer, without a change of its text",
            none="never",
        ),
        "EVENT_RETENTION_DAYS": _kept(
            None,
            "how long the event log of a run is kept after its end; its terminal event stays, and so does the rest",
        ),
        "THREAD_RETENTION_DAYS": _kept(
            None,
            "how long a thread without a live run is kept after its last run and message, with all that hangs on it",
        ),
        "WORKER_RETENTION_DAYS": _kept(7, "how long the row of a worker is kept after its end, to tell what ran where"),
    },
    "Workers": {
        "AGENTS_QUEUE": _queue(DEFAULTS["AGENTS_QUEUE"], "the queue of runs"),
        "TOOLS_QUEUE": _queue(DEFAULTS["TOOLS_QUEUE"], "the queue of tool calls"),
        "CONTROL_QUEUE": _queue(DEFAULTS["CONTROL_QUEUE"], "whoever consumes it sweeps"),
        "QUEUE_TYPE": Key(
            "quorum",
            str,
            "what these three are on RabbitMQ; with `classic` they are what Celery makes of them. Redis has no types",
            form=("quorum|classic", "quorum or classic"),
        ),
        "DRAIN_GRACE_SECONDS": _time(5, "how long streams go on after SIGTERM"),
        "CANCEL_GRACE_SECONDS": _time(
            30, "how long a tool may run on once its call is cancelled; then it is interrupted, and 5 s later killed"
        ),
        "PRESENCE_TTL_SECONDS": _time(12, "a worker that is silent for longer is dead", least=6),
    },
}
KEYS: Mapping[str, Key] = MappingProxyType({name: key for keys in GROUPS.values() for name, key in keys.items()})


def attribute(key: str) -> str:
    """Name the attribute of `Settings` that a key fills: `LEG_BUDGET_SECONDS` fills `leg_budget`.

    `FLUSH_MILLISECONDS` would leave a verb, so it fills `flush_interval`.
    """
    if key == "FLUSH_MILLISECONDS":
        return "flush_interval"
    return key.removesuffix("_SECONDS").removesuffix("_DAYS").lower()


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
    max_dispatched: int  # runs of a queue that are sent and not claimed
    runs_per_owner: int | None  # at work
    run_rate_per_owner: str | None  # starts, "100/h"
    max_input_chars: int  # of one input
    poison_limit: int  # reclaims without a committed step, then the run fails
    model_tries: int
    model_retry_total: timedelta
    drain_grace: timedelta  # how long streams may run on after SIGTERM
    cancel_grace: timedelta  # how long a tool may run on once its call is cancelled
    max_result_chars: int  # these two are read by tools.results
    max_result_bytes: int
    bad_calls_limit: int
    context_messages: int
    flush_interval: timedelta
    default_model: str | None
    max_dispatched_calls: int  # of a queue
    calls_per_owner: int | None
    call_rate_per_owner: str | None
    access: str | type | None
    api_rate: str | None  # requests a client, "600/min"
    start_rate: str | None  # those of them that create something
    max_body_bytes: int
    max_streams: int | None  # of a web process
    streams_per_owner: int | None  # of those
    idempotency_key: timedelta  # how long a request that is sent again is known
    compact_after: timedelta | None  # a run's end
    event_retention: timedelta | None  # after a run's end; None is for ever, here and below
    thread_retention: timedelta | None
    worker_retention: timedelta | None
    agents_queue: str
    tools_queue: str
    control_queue: str
    queue_type: str
    presence_ttl: timedelta  # a beat older than this is a death; a claim needs a beat younger than half of 12 s
    flower_url: str | None
    direct_database: str | None  # an alias of DATABASES; read by tools.presence
    session_locks: bool | None
    prices: Mapping[str, Price] = field(default_factory=dict)
    model_limits: Mapping[str, ModelLimits] = field(default_factory=dict)  # read by runs.quotas


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
