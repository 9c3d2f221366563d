"""What Longhaul asks of a model service: a request goes in, Longhaul's own events come out.

The port knows no database and no Django. A provider is found by the prefix of a model's name: "openai:gpt-5-mini" is
the model "gpt-5-mini" of the provider "openai".

    ProviderError                 a model call failed; its `code` says how
    UnknownProvider (ValueError)  a model's name has a prefix that no provider goes by
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from typing import Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

import orjson

ErrorCode: TypeAlias = Literal[
    "network", "rate_limited", "overloaded", "server", "context_overflow", "auth", "invalid_request", "quota"
]
FinishReason: TypeAlias = Literal["stop", "tool_calls", "length", "content_filter"]

RETRYABLE: frozenset[ErrorCode] = frozenset({"network", "rate_limited", "overloaded", "server"})
DEEPEST = 200  # nested arguments: what is deeper may be read, and not written


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as the model sees it. `parameters` is the JSON schema of the object that the model sends."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False  # whether the service shall hold the model to the schema


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One model call.

    `messages` are what `Provider.render` gave, in the order of the conversation, and `tools` what `render_tools` gave,
    so that a leg renders each message once and a call joins bytes. `tool_choice` is "auto", "none", "required" or a
    tool's name. `parallel_tool_calls` says whether several calls may be asked for at once; None is the service's own way.
    `options` are extra fields of the request's body (temperature, ...).
    `timeout` bounds the whole call by the wall clock, `silence` the wait between two reads; what comes first counts. A
    model that thinks long before it speaks needs a longer `silence`.
    """

    model: str
    instructions: str
    messages: Sequence[bytes]
    tools: bytes = b""
    tool_choice: str = "auto"
    parallel_tool_calls: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout: timedelta = timedelta(minutes=10)
    silence: timedelta = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of the answer's text; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """The next piece of what the model shows of its thinking; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The next piece of a call's arguments, as JSON text; the first one of a call may be empty.

    `index` counts the calls of this answer from 0; calls may come interleaved. `provider_id` and `name` stand in every
    delta of a call, `provider_id` being empty where the service gives none.
    """

    index: int
    provider_id: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class UsageReported:
    """What the call cost, in tokens: `cached_tokens` are part of the input, `reasoning_tokens` of the output."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Rate:
    """What a service says of one of its rates: how many it allows, how many are left, and when all are there again."""

    limit: int | None
    left: int | None
    reset: timedelta | None

    @property
    def a_minute(self) -> int | None:
        """The limit, where it is one a minute: by the time that what is used takes to come back. None: it cannot be told.

        >>> Rate(60, 59, timedelta(seconds=1)).a_minute
        60
        >>> Rate(200, 199, timedelta(minutes=7, seconds=12)).a_minute  # a day
        """
        if not self.limit or self.left is None or self.reset is None or not 0 <= self.left < self.limit:
            return None
        window = self.reset * self.limit / (self.limit - self.left)
        return self.limit if timedelta(seconds=30) <= window <= timedelta(seconds=120) else None


@dataclass(frozen=True, slots=True)
class RatesReported:
    """What the service says of its rates with this answer; it comes before the answer's first piece. None: nothing."""

    requests: Rate | None = None
    tokens: Rate | None = None

    @property
    def wait(self) -> timedelta | None:
        """How long nothing is left, of either; None when there is something."""
        waits = [
            rate.reset for rate in (self.requests, self.tokens) if rate is not None and rate.left == 0 and rate.reset
        ]
        return max(waits, default=None)


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete. Always the last event; a stream without it has raised ProviderError."""

    reason: FinishReason


ModelEvent: TypeAlias = TextDelta | ReasoningDelta | ToolCallDelta | UsageReported | RatesReported | Finished


class ProviderError(Exception):
    """A model call failed.

    `code` is the class of the failure, `message` what a person reads (it never holds a key or a header), `retryable`
    whether the same request may succeed later. `retry_after` is the wait that the service asked for, None if none.
    """

    def __init__(self, code: ErrorCode, message: str, *, retry_after: timedelta | None = None) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.retryable = code in RETRYABLE
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class Provider(Protocol):
    """A client of one model service. One object serves all runs of a process at once, from greenlets or threads."""

    name: str

    def render(self, message: Mapping[str, Any]) -> bytes:
        """Return `{"role", "content": [parts]}` as this service wants it; b"" for a message that it is not shown.

        What comes out is for `ModelRequest.messages` only: one message may become several.
        """
        ...

    def render_tools(self, tools: Sequence[ToolSpec]) -> bytes:
        """Return the tools as this service wants them; b"" for none."""
        ...

    def stream(self, request: ModelRequest) -> Iterator[ModelEvent]:
        """Ask the model, and yield its answer as it comes; `Finished` is last. Raises ProviderError.

        A generator: closing it closes the connection, so that the service stops.
        """
        ...

    def warm(self) -> None:
        """Do what the first call would spend time on. Called once, when a worker starts."""
        ...

    def close(self) -> None:
        """Close what is kept open between calls. A call after it works."""
        ...


@runtime_checkable
class ShowsBody(Protocol):
    """A provider that can say what a request's body is. One that cannot is replayed in the port's own words."""

    def body(self, request: ModelRequest) -> bytes:
        """Return the body of the request, byte for byte what `stream` sends. Raises ProviderError for bad options."""
        ...


@runtime_checkable
class AsksForSchema(Protocol):
    """A provider whose service can be asked for an answer of a JSON schema. Of any other the answer is checked all the same."""

    def schema_options(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of a request that ask for it."""
        ...


class UnknownProvider(ValueError):
    """A model is named `provider:model`, and no provider goes by this name."""

    def __init__(self, model: str) -> None:
        known = ", ".join(f"'{prefix}:'" for prefix in sorted(_factories))
        super().__init__(f"Model {model!r} names no known provider. Write it as 'provider:model'; there are: {known}.")
        self.model = model


_factories: dict[str, Callable[[], Provider] | str] = {"openai": "runs.providers.openai:OpenAIProvider"}
_providers: dict[str, Provider] = {}


def register_provider(prefix: str, factory: Callable[[], Provider]) -> None:
    """Let models that are named `prefix:...` be asked through what `factory` makes; it is called once a process."""
    _factories[prefix] = factory
    _providers.pop(prefix, None)


def check_model(model: str) -> None:
    """Raises UnknownProvider for a model that no provider can be asked for; loads none."""
    prefix, _, name = model.partition(":")
    if not name or (prefix not in _providers and prefix not in _factories):
        raise UnknownProvider(model)


def get_provider(model: str) -> tuple[Provider, str]:
    """Return the provider of a model such as "openai:gpt-5-mini", and the model's own name. Raises UnknownProvider."""
    check_model(model)
    prefix, _, name = model.partition(":")
    provider = _providers.get(prefix)
    if provider is None:
        factory = _factories[prefix]
        if isinstance(factory, str):
            module, _, attribute = factory.partition(":")
            factory = cast("Callable[[], Provider]", getattr(import_module(module), attribute))
        provider = _providers.setdefault(prefix, factory())  # two greenlets may both come here; one client stays
    return provider, name


def forget_providers() -> None:
    """Close all providers, and let the next `get_provider` make its own anew, from the environment as it is then."""
    while _providers:
        _providers.popitem()[1].close()


def clean(text: str) -> str:
    """Return the text as Postgres can hold it: without NUL, and with U+FFFD for each half of a surrogate pair."""
    if "\x00" in text:
        text = text.replace("\x00", "")
    try:
        text.encode()
    except UnicodeEncodeError:
        # first through UTF-16, which joins two halves that belong together
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def parse_arguments(text: str) -> dict[str, Any] | str:
    r"""Return the arguments of a call as an object, or the text itself when it is not the JSON of one.

    NUL and halves of surrogate pairs may hide in escapes (`\u0000`) until now; jsonb refuses them, so they are
    removed as in `clean`. No text means no arguments.
    """
    if not text.strip():
        return {}
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return clean(text)
    if not isinstance(value, dict):
        return clean(text)
    try:
        if "\\u0000" in text:
            value = clean_json(value)
        if text.count("[") + text.count("{") > DEEPEST:
            orjson.dumps(value)  # it reads deeper than it writes
    except (RecursionError, orjson.JSONEncodeError):
        return clean(text)
    return cast("dict[str, Any]", value)


def clean_json(value: Any) -> Any:
    """Return a JSON value with every text in it cleaned."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [clean_json(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean_json(item) for key, item in value.items()}
    return value
