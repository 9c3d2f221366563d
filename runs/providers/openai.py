"""OpenAI's chat completions, streamed; any service that speaks the same protocol is reached by its base URL.

The `openai` package knows the address, the key and the headers, and brings the client. Its typed layer is left out: it
costs 13 ms of CPU a call and grows with the conversation, raw requests less than one. So the body of a request is joined
from rendered messages, and the stream is split and decoded here. What is the same in every request it makes once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import ssl
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache, cached_property
from time import monotonic
from typing import Any, NoReturn

import httpx2
import orjson
from openai import DefaultHttpxClient, OpenAI

from runs.providers.port import (
    ErrorCode,
    Finished,
    FinishReason,
    ModelEvent,
    ModelRequest,
    ProviderError,
    Rate,
    RatesReported,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolSpec,
    UsageReported,
    clean_json,
)

CONNECT = timedelta(seconds=10)
DRAIN = timedelta(milliseconds=200)  # after the answer's end: for the last bytes, without which a connection is lost
ERROR_BODY = timedelta(seconds=5)
LARGEST_ERROR_BODY = 64 * 1024  # bytes
LARGEST_EVENT = 16 * 1024 * 1024  # bytes
LONGEST_QUOTE = 500  # characters of a service's own words in an error
LONGEST_RETRY_AFTER = timedelta(days=1)
SHORTEST_SECRET = 8  # characters: a key like "none" is a word of many messages
IDLE_LINES = 1_000  # connections kept for the next calls of this process; an idle one costs a socket and 4 KiB

DONE = b"[DONE]"

# Fields of a request's body that are this module's.
OWN_FIELDS = frozenset({"model", "messages", "tools", "tool_choice", "stream"})

FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "tool_calls": "tool_calls",
    "length": "length",
    "max_tokens": "length",
    "content_filter": "content_filter",
}

# What services write into `code` or `type` of an error. The first say more than any HTTP status that comes with them;
# the others count where there is no status: in the middle of a stream.
TELLING_CODES: dict[str, ErrorCode] = {
    "insufficient_quota": "quota",
    "billing_hard_limit_reached": "quota",
    "billing_not_active": "quota",
    "context_length_exceeded": "context_overflow",
    "rate_limit_exceeded": "rate_limited",
    "invalid_api_key": "auth",
}
OTHER_CODES: dict[str, ErrorCode] = {
    "rate_limit_error": "rate_limited",
    "overloaded": "overloaded",
    "overloaded_error": "overloaded",
    "authentication_error": "auth",
    "permission_error": "auth",
    "invalid_request_error": "invalid_request",
    "model_not_found": "invalid_request",
}
STATUS_CODES: dict[int, ErrorCode] = {
    401: "auth",
    402: "quota",
    403: "auth",
    408: "server",
    409: "server",
    413: "context_overflow",
    425: "server",
    429: "rate_limited",
    503: "overloaded",
    529: "overloaded",
}
OVERFLOW_WORDS = ("maximum context length", "context length exceeded", "exceeds the context window")


@cache
def _tls() -> ssl.SSLContext:
    """Return what all connections of this process verify services with: 70 ms to make, so made once."""
    return httpx2.create_ssl_context()


class _Kept(BaseException):
    """A request was made, and is not sent. Not an Exception: the client makes errors of its own out of those."""


class OpenAIProvider:
    """A client of one base URL, shared by all runs of a process.

    Without arguments OPENAI_API_KEY and OPENAI_BASE_URL count, and what else the `openai` package reads. A service of
    one's own may want no key; OpenAI's own does, and a call without one fails as `auth`.
    """

    name = "openai"

    def __init__(self, api_key: str | None = None, base_url: str | None = None) -> None:
        self._key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        self._refusal = _refusal(self._key, base_url)
        self._client = OpenAI(
            api_key=(self._key or "none") if self._refusal is None else "none",
            base_url=base_url if self._refusal is None else "http://127.0.0.1",
            max_retries=0,
            http_client=DefaultHttpxClient(verify=_tls()),
        )
        self._idle: list[_Line] = []

    def warm(self) -> None:
        """Make what all calls share, for which the client forks to ask who the operating system is, and a first line."""
        self._give_back(self._take())

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()
        self._client.close()

    # --- what goes out ----------------------------------------------------------------------------------------------

    @cached_property
    def _form(self) -> httpx2.Request:
        """The request that the `openai` package makes, without a body: made for each call it costs 0.4 ms of CPU."""
        made: list[httpx2.Request] = []

        def keep(request: httpx2.Request) -> httpx2.Response:
            made.append(request)
            raise _Kept  # an answer would be logged, as if the service had been called

        with (
            DefaultHttpxClient(transport=httpx2.MockTransport(keep)) as nowhere,
            contextlib.suppress(_Kept),
        ):
            self._client.with_options(http_client=nowhere).post(
                "/chat/completions",
                cast_to=httpx2.Response,
                content=b"",
                options={"headers": {"X-Stainless-Raw-Response": "stream"}},
            )
        form = made[0]
        for header in ("content-length", "x-stainless-read-timeout"):  # those of a body, and of a time, that it has not
            form.headers.pop(header, None)
        return form

    def render(self, message: Mapping[str, Any]) -> bytes:
        """Return the message as JSON objects with commas between them; b"" when nothing of it is shown.

        A result is a message of its own here. Reasoning is not shown again, nor `data` that the assistant emitted.
        """
        role = message["role"]
        parts: Sequence[Mapping[str, Any]] = message["content"]
        rendered: list[bytes] = []
        texts: list[str] = []
        calls: list[dict[str, Any]] = []
        for part in parts:
            match part["type"]:
                case "text":
                    texts.append(part["text"])
                case "tool_call":
                    function = {"name": part["name"], "arguments": _arguments_text(part.get("arguments"))}
                    calls.append({"id": str(part["tool_call"]), "type": "function", "function": function})
                case "tool_result":
                    content = _result_text(part)
                    rendered.append(
                        _dumps({"role": "tool", "tool_call_id": str(part["tool_call"]), "content": content})
                    )
                case "data" if role != "assistant":
                    texts.append(_dumps(part.get("data")).decode())
                case "image" | "file" as kind:
                    texts.append(f"[{kind}: {part.get('name') or part.get('url') or 'not shown'}]")
                case _:
                    pass
        if role == "assistant":
            said: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts) or None}
            if calls:
                said["tool_calls"] = calls
            if texts or calls:
                rendered.insert(0, _dumps(said))
        elif role != "tool" and (texts or not rendered):
            rendered.append(_dumps({"role": role, "content": "\n".join(texts)}))
        return b",".join(rendered)

    def render_tools(self, tools: Sequence[ToolSpec]) -> bytes:
        """Return the tools as a JSON array; b"" for none."""
        if not tools:
            return b""
        return _dumps(
            [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": tool.parameters,
                        **({"strict": True} if tool.strict else {}),
                    },
                }
                for tool in tools
            ]
        )

    def schema_options(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """Return what asks for an answer of the schema. Not `strict`, for that takes a part of JSON schema only."""
        asked = {"name": "output", "schema": dict(schema), "strict": False}
        return {"response_format": {"type": "json_schema", "json_schema": asked}}

    def body(self, request: ModelRequest) -> bytes:
        """Return the body of the request, byte for byte what `stream` sends. Raises ProviderError for bad options."""
        options = dict(request.options)
        if own := OWN_FIELDS & options.keys():
            raise ProviderError("invalid_request", f"Model options may not hold {', '.join(sorted(own))}.")
        options.setdefault("stream_options", {"include_usage": True})
        if options["stream_options"] is None:  # a service that refuses the field
            del options["stream_options"]
        if request.tools and request.tool_choice != "auto":
            named = request.tool_choice not in ("none", "required")
            options["tool_choice"] = (
                {"type": "function", "function": {"name": request.tool_choice}} if named else request.tool_choice
            )
        if request.tools and request.parallel_tool_calls is not None:
            options["parallel_tool_calls"] = request.parallel_tool_calls
        try:
            head = _dumps({"model": request.model, "stream": True, **options})
        except TypeError as error:
            raise ProviderError("invalid_request", f"Model options are not JSON: {error}") from None
        messages = [message for message in request.messages if message]
        if request.instructions:
            messages.insert(0, _dumps({"role": "system", "content": request.instructions}))
        tools = b'],"tools":%b}' % request.tools if request.tools else b"]}"
        return b"".join((head[:-1], b',"messages":[', b",".join(messages), tools))

    # --- what comes back --------------------------------------------------------------------------------------------

    def stream(self, request: ModelRequest) -> Iterator[ModelEvent]:
        """Ask the model, and yield its answer as it comes; `Finished` is last. Raises ProviderError.

        A generator: closing it closes the connection, so that the service stops.
        """
        if self._refusal is not None:
            raise ProviderError(*self._refusal)
        body = self.body(request)
        timeout, silence = request.timeout.total_seconds(), request.silence.total_seconds()
        answer = _Answer()
        line = self._take()
        failure: ProviderError | None = None
        try:
            with closing(line.ask(body, timeout, silence)) as read:
                for data in read:
                    if line.rates is not None:
                        yield line.rates
                        line.rates = None
                    yield from answer.take(data)
        except ProviderError as error:
            failure = error
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
            if not answer.complete:
                failure = _transport_failure(error, line, timeout, silence)
        finally:
            self._give_back(line)
        if answer.usage is not None:
            yield answer.usage  # of a discarded answer too: it was paid
        if failure is not None:
            # Raised outside of the handlers: the client's own exceptions hold the request with its headers.
            raise ProviderError(failure.code, self._redacted(failure.message), retry_after=failure.retry_after)
        yield answer.end()

    def _redacted(self, message: str) -> str:
        return message.replace(self._key, "[key]") if len(self._key) >= SHORTEST_SECRET else message

    def _take(self) -> _Line:
        try:
            return self._idle.pop()  # the one that was used last, whose connection is least likely to be closed
        except IndexError:
            return _Line(self._form)

    def _give_back(self, line: _Line) -> None:
        if line.sound and len(self._idle) < IDLE_LINES:
            self._idle.append(line)
        else:
            line.close()


class _Line:
    """A client with one connection, for one call at a time.

    Not one pool for all: at each request a pool looks at every idle socket, which under gevent costs 33 us a socket
    (3 ms a call with 100 of them), and at every open one. A client of its own costs 0.1 ms and 4 KiB, once.
    """

    def __init__(self, form: httpx2.Request) -> None:
        limits = httpx2.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=30)
        hooks = {"response": [self._answered]}
        self._client = DefaultHttpxClient(verify=_tls(), limits=limits, event_hooks=hooks)
        self._form = form
        self.deadline = math.inf  # by the monotonic clock: no read lasts longer
        self.sound = True  # the connection stands between two calls, or there is none
        self.rates: RatesReported | None = None  # what the answer's headers say, until it was told

    def ask(self, body: bytes, timeout: float, silence: float) -> Generator[bytes, None, None]:
        """Send the request and yield the data of each event, until the stream ends.

        `timeout` and `silence` are seconds. Raises ProviderError, and what httpx2 raises.
        """
        self.sound = False
        self.rates = None
        self.deadline = monotonic() + timeout
        quiet = min(silence, timeout)
        times = httpx2.Timeout(quiet, connect=min(quiet, CONNECT.total_seconds()))
        request = httpx2.Request(
            self._form.method,
            self._form.url,
            headers=self._form.headers,
            content=body,
            extensions={"timeout": times.as_dict()},
        )
        response = self._client.send(request, stream=True)
        try:
            kind = response.headers.get("content-type", "")
            if kind.startswith(("application/json", "text/html")):
                raise self._no_stream(response, kind)
            for data in self._split(response.iter_bytes()):
                yield data
                if data == DONE:
                    self.deadline = min(self.deadline, monotonic() + DRAIN.total_seconds())
            self.sound = True
        finally:
            response.close()

    def _split(self, reads: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the data of each server-sent event. A line may be cut anywhere, also within a character."""
        rest = b""
        data: list[bytes] = []
        for read in reads:
            if monotonic() > self.deadline:
                raise httpx2.ReadTimeout("the time is up")
            lines = (rest + read).split(b"\n")
            rest = lines.pop()
            if len(rest) > LARGEST_EVENT:
                raise ProviderError("server", "The model service sent an event without an end.")
            for line in lines:
                if line.endswith(b"\r"):
                    line = line[:-1]
                if line.startswith(b"data:"):
                    data.append(line[6:] if line.startswith(b"data: ") else line[5:])
                elif not line and data:
                    yield data[0] if len(data) == 1 else b"\n".join(data)
                    data = []
        if rest.startswith(b"data:"):
            data.append(rest[5:].strip())
        if data and (last := b"\n".join(data)) == DONE:
            yield last  # a service that ends without the blank line; anything else may be cut

    def _answered(self, response: httpx2.Response) -> None:
        """Bound every later read of this connection by the deadline; raise for a status that is an error."""
        connection = response.extensions.get("network_stream")
        if connection is not None and "read" not in vars(connection):
            # A read timeout is fixed when the body begins, so one who trickles and then falls silent would outlast it.
            plain = connection.read

            def read(size: int, timeout: float | None = None) -> bytes:
                left = max(self.deadline - monotonic(), 0.001)
                data: bytes = plain(size, left if timeout is None or left < timeout else timeout)
                return data

            connection.read = read
        if response.status_code >= 400:
            body = self._read(response)
            raise _refused(response.status_code, response.headers, body)
        self.rates = _rates(response.headers)

    def _read(self, response: httpx2.Response) -> bytes:
        """Return what an error says: its beginning, as far as it comes soon."""
        body = b""
        self.deadline = min(self.deadline, monotonic() + ERROR_BODY.total_seconds())
        try:
            for read in response.iter_bytes():
                body += read
                if len(body) > LARGEST_ERROR_BODY or monotonic() > self.deadline:
                    return body
            self.sound = True
        except httpx2.HTTPError:
            pass  # the status says enough
        return body

    def _no_stream(self, response: httpx2.Response, kind: str) -> ProviderError:
        body = self._read(response)
        if b'"error"' in body:
            return _refused(0, response.headers, body)
        return ProviderError("server", f"The model service answered with {kind} in place of a stream.")

    def close(self) -> None:
        self._client.close()


class _Answer:
    """What is known of an answer that is being read."""

    def __init__(self) -> None:
        self.usage: UsageReported | None = None
        self.complete = False  # the service has said that this is all
        self._reason: FinishReason = "stop"
        self._said = False
        self._calls: list[_Call] = []

    def take(self, data: bytes) -> Sequence[ModelEvent]:
        """Return the events that one event of the service means. Raises ProviderError."""
        if data == DONE:
            self.complete = True
            return ()
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            chunk = _lenient(data)
        try:
            if error := chunk.get("error"):
                raise _refused(0, {}, {"error": error})
            if usage := chunk.get("usage"):
                self.usage = _usage(usage)
            choices = chunk.get("choices")
            if not choices:
                return ()
            choice = choices[0]
            if reason := choice.get("finish_reason"):
                self.complete = True
                self._reason = FINISH_REASONS.get(reason, "stop")
            delta = choice.get("delta")
            return self._events(delta) if delta else ()
        except (AttributeError, LookupError, TypeError, ValueError):
            _garbage(data)

    def _events(self, delta: Mapping[str, Any]) -> list[ModelEvent]:
        events: list[ModelEvent] = []
        if text := _text(delta.get("reasoning_content") or delta.get("reasoning")):
            events.append(ReasoningDelta(text))
        if text := _text(delta.get("content") or delta.get("refusal")):
            self._said = True
            events.append(TextDelta(text))
        for piece in delta.get("tool_calls") or ():
            function = piece.get("function") or {}
            name = _text(function.get("name"))
            call = self._call(piece.get("index"), piece.get("id") or "", name)
            call.name = call.name or name
            arguments = function.get("arguments") or ""
            call.held += _text(arguments if isinstance(arguments, str) else _dumps(arguments).decode())
            if call.name and (call.held or not call.begun):
                events.append(ToolCallDelta(call.index, call.id, call.name, call.held))
                call.begun, call.held = True, ""
        return events

    def _call(self, given: object, key: str, name: str) -> _Call:
        """Return the call that a piece belongs to.

        The index says so, but for services that give none, or the same to all: there each call begins with its name
        and an id of its own. Others give a new id with each piece; those pieces have no name.
        """
        for call in reversed(self._calls):
            begins = name and call.name and (key != call.id if key else given is None)
            if call.given == given and not begins:
                call.id = call.id or key
                return call
        call = _Call(len(self._calls), given, key)
        self._calls.append(call)
        return call

    def end(self) -> Finished:
        """Return the last event of a stream that has ended. Raises ProviderError when it was not a whole answer."""
        if not self.complete:
            raise ProviderError("network", "The model's answer was cut off.")
        if any(not call.begun for call in self._calls):
            raise ProviderError("server", "The model called a tool without a name.")
        if self._reason not in ("stop", "tool_calls"):
            return Finished(self._reason)
        if not self._said and not self._calls:
            raise ProviderError("server", "The model gave an empty answer.")
        return Finished("tool_calls" if self._calls else "stop")


class _Call:
    """A call of a tool, of which pieces come."""

    __slots__ = ("begun", "given", "held", "id", "index", "name")

    def __init__(self, index: int, given: object, key: str) -> None:
        self.index = index
        self.given = given  # the index that the service gives
        self.id = key
        self.name = ""
        self.held = ""  # arguments that came before the name
        self.begun = False


def _refusal(key: str, base_url: str | None) -> tuple[ErrorCode, str] | None:
    """Return why no call can be made with this key at this address; None when one can."""
    if not key and base_url is None:
        return "auth", "OPENAI_API_KEY is not set."
    if not (key.isascii() and key.isprintable()):  # no header takes it
        return "auth", "OPENAI_API_KEY holds characters that no key has."
    if base_url is not None and not _is_address(base_url):
        return "invalid_request", "OPENAI_BASE_URL is no address such as https://api.openai.com/v1."
    return None


def _is_address(url: str) -> bool:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


def _dumps(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:  # halves of surrogate pairs, numbers beyond 64 bits
        return json.dumps(clean_json(value), ensure_ascii=False).encode()


def _arguments_text(arguments: object) -> str:
    """Return the arguments as the text of a JSON object: some services parse it, and refuse a conversation without."""
    if isinstance(arguments, str):
        try:
            if isinstance(orjson.loads(arguments), dict):
                return arguments
        except orjson.JSONDecodeError:
            pass
        arguments = {"invalid_arguments": arguments} if arguments.strip() else {}
    return _dumps(arguments or {}).decode()


def _result_text(part: Mapping[str, Any]) -> str:
    result, error = part.get("result"), part.get("error") or {}
    text = result if isinstance(result, str) else _dumps(result).decode()
    if part.get("outcome", "success") == "success":
        return text
    detail = error.get("message") or ("" if result is None else text)
    match part["outcome"]:
        case "denied":
            return f"A person denied this call; it did not run. {detail}".strip()
        case "cancelled":
            return f"This call was cancelled. {detail}".strip()
    code = f" ({error['code']})" if error.get("code") else ""
    return f"The call failed{code}: {detail or 'no reason is known.'}"


def _text(value: Any) -> str:
    """Return the text of a field, or of the text parts that it lists, without NUL, which Postgres cannot hold."""
    if value is None:
        return ""
    if isinstance(value, list):
        value = "".join(part.get("text") or "" for part in value)
    if not isinstance(value, str):
        raise TypeError("no text")
    return value.replace("\x00", "") if "\x00" in value else value


def _usage(usage: Mapping[str, Any]) -> UsageReported:
    return UsageReported(
        input_tokens=int(usage.get("prompt_tokens") or 0),
        output_tokens=int(usage.get("completion_tokens") or 0),
        cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
        reasoning_tokens=int((usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0),
    )


def _lenient(data: bytes) -> Any:
    """Decode what orjson refuses: halves of surrogate pairs. Raises ProviderError."""
    try:
        return clean_json(json.loads(data))
    except (ValueError, RecursionError):
        _garbage(data)


def _garbage(data: bytes) -> NoReturn:
    quote = data[:80].decode("utf-8", "replace")
    raise ProviderError("server", f"The model service sent what is not of its protocol: {quote!r}") from None


def _refused(status: int, headers: Mapping[str, str], body: bytes | Mapping[str, Any]) -> ProviderError:
    """Return what an error document means; `status` is 0 where it came without one."""
    document: Any = body
    if isinstance(body, bytes):
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            document = body.decode("utf-8", "replace")
    error = document.get("error", document) if isinstance(document, Mapping) else document
    said = error if isinstance(error, Mapping) else {"message": error}
    message = str(said.get("message") or said.get("detail") or "").strip()[:LONGEST_QUOTE]
    names = [str(said.get(field) or "") for field in ("code", "type")]
    if not status and names[0].isdigit():
        status = int(names[0])  # some services put it there
    code: ErrorCode = "server"
    if telling := next((TELLING_CODES[name] for name in names if name in TELLING_CODES), None):
        code = telling
    elif status in STATUS_CODES:
        code = STATUS_CODES[status]
    elif 300 <= status < 500:
        code = "invalid_request"
    elif not status:
        code = next((OTHER_CODES[name] for name in names if name in OTHER_CODES), "server")
    if code == "invalid_request" and any(words in message.lower() for words in OVERFLOW_WORDS):
        code = "context_overflow"
    answered = f"The model service answered {status}" if status else "The model service answered with an error"
    wait = _retry_after(headers)
    if wait is None and code == "rate_limited":
        rates = _rates(headers)
        wait = _time(headers.get("x-rate-limit-reset-tokens", "")) if rates is None else rates.wait
    return ProviderError(code, f"{answered}: {message or 'no reason given'}", retry_after=wait)


# A time as OpenAI writes it, and Go: "6m0s", "1h0m30s", "20ms", "2m59.56s". Azure writes whole seconds; others the moment itself.
_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")
_UNITS = (86400.0, 3600.0, 60.0, 1.0, 0.001)
_MOMENT = 1_000_000_000  # seconds since 1970: no wait is so long


def _time(value: str) -> timedelta | None:
    """Return how long a reset is away; None for what cannot be read, or is past."""
    value = value.strip()
    seconds = math.nan
    try:
        seconds = float(value)
        if seconds >= _MOMENT:
            seconds -= datetime.now(UTC).timestamp()
    except ValueError:
        found = _TIME.fullmatch(value) if value else None
        if found is not None:
            seconds = sum(float(part) * unit for part, unit in zip(found.groups(), _UNITS, strict=True) if part)
        else:
            with contextlib.suppress(ValueError, TypeError):
                seconds = (datetime.fromisoformat(value) - datetime.now(UTC)).total_seconds()
    if not 0 <= seconds < math.inf:
        return None
    return timedelta(seconds=min(seconds, LONGEST_RETRY_AFTER.total_seconds()))


def _rates(headers: Mapping[str, str]) -> RatesReported | None:
    """Return what the headers of an answer say of the service's rates; None when they say nothing."""
    requests, tokens = _rate(headers, "requests"), _rate(headers, "tokens")
    return None if requests is None and tokens is None else RatesReported(requests, tokens)


def _rate(headers: Mapping[str, str], what: str) -> Rate | None:
    left = headers.get(f"x-ratelimit-remaining-{what}")
    if left is None:
        return None
    limit, reset = headers.get(f"x-ratelimit-limit-{what}", ""), headers.get(f"x-ratelimit-reset-{what}", "")
    return Rate(_whole(limit), _whole(left), _time(reset))


def _whole(value: str) -> int | None:
    """Return a number of what is there; None for none. Some services say -1 for what they do not count."""
    return int(value) if value.isascii() and value.isdigit() and len(value) < 19 else None


def _retry_after(headers: Mapping[str, str]) -> timedelta | None:
    """Return the wait that the headers ask for: in milliseconds, in seconds, or until a date by the service's clock."""
    seconds = math.nan
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif "retry-after" in headers:
            seconds = float(headers["retry-after"])
    except ValueError:
        try:
            until = parsedate_to_datetime(headers.get("retry-after", ""))
            now = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
            seconds = max(0.0, (until - now).total_seconds())
        except (TypeError, ValueError):
            pass  # no form that means anything
    if math.isnan(seconds) or seconds < 0:
        return None
    return timedelta(seconds=min(seconds, LONGEST_RETRY_AFTER.total_seconds()))


def _transport_failure(cause: Exception, line: _Line, timeout: float, silence: float) -> ProviderError:
    if isinstance(cause, httpx2.ConnectTimeout):
        return ProviderError("network", "The model service could not be reached in time.")
    if isinstance(cause, httpx2.TimeoutException):
        if monotonic() >= line.deadline:
            return ProviderError("server", f"The model did not finish within {timeout:g} s.")
        return ProviderError("network", f"The model service was silent for {min(silence, timeout):g} s.")
    if isinstance(cause, httpx2.ConnectError):
        return ProviderError("network", f"The model service could not be reached: {cause}")
    if isinstance(cause, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError | httpx2.InvalidURL):
        return ProviderError("invalid_request", "The request cannot be sent. Is the base URL right?")
    if isinstance(cause, httpx2.TransportError | httpx2.StreamError | httpx2.DecodingError):
        return ProviderError("network", f"The connection to the model service broke: {type(cause).__name__}")
    return ProviderError("invalid_request", f"The model service cannot be used: {type(cause).__name__}")
