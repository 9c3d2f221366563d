"""Log lines that say which run, leg and tool call they belong to, without secrets.

A record is one line of JSON. For people it is one line too, and its traceback on lines below, which are indented: no text that
somebody has sent begins a line.

    LOGGING = {
        "formatters": {"json": {"()": "threads.logs.JSONFormatter"}},
        "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "json"}},
        ...
    }

A leg and an attempt at a tool call bind their ids to the context (`contextvars`), so that whatever is logged in between, by
Longhaul, by a tool or by a library, carries them. A thread that a tool starts has a context of its own:
`contextvars.copy_context().run` takes it along.
"""

from __future__ import annotations

import logging
import logging.config
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

import orjson

from threads.redaction import MASK, is_secret_name, redact

# In the order in which they are written.
IDS = ("run", "leg", "epoch", "tool_call", "attempt", "agent", "tool", "thread", "worker", "request_id")
LONGEST_MESSAGE = 8 * 1024  # characters
LONGEST_TEXT = 2 * 1024  # characters of a field
LONGEST_TRACEBACK = 16 * 1024  # characters: of a longer one the begin and the end
MOST_ITEMS = 50  # of a list, or of a mapping
DEEPEST = 4

_bound: ContextVar[Mapping[str, Any]] = ContextVar("longhaul_log", default={})  # noqa: B039 (never changed in place)
_everywhere: dict[str, Any] = {}

_OF_A_RECORD = frozenset(
    {*vars(logging.LogRecord("", 0, "", 0, "", (), None)), "message", "asctime", "taskName", "color_message"}
)
# All that ends a line somewhere, and what a terminal obeys.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
_OURS = frozenset({"time", "level", "logger", "message", "exception", "stack"})


def bind(**ids: Any) -> Token[Mapping[str, Any]]:
    """Add to what each line says from here on, in this thread, greenlet or asyncio task. `release` takes it back.

    Costs less than a microsecond: values are kept as they are, and become text in lines that are written.
    """
    return _bound.set({**_bound.get(), **ids})


def release(token: Token[Mapping[str, Any]]) -> None:
    _bound.reset(token)


@contextmanager
def context(**ids: Any) -> Iterator[None]:
    """`bind` for the block. A host's middleware may bind a `request_id`."""
    token = bind(**ids)
    try:
        yield
    finally:
        release(token)


def everywhere(**ids: Any) -> None:
    """Add to what each line of this process says, and of those that it forks; what is bound wins."""
    _everywhere.update(ids)


def bound() -> Mapping[str, Any]:
    """Return what a line would say here."""
    return {**_everywhere, **_bound.get()}


def configure(config: dict[str, Any]) -> None:
    """A LOGGING_CONFIG of Django's: as its own, and Python's warnings are log lines too."""
    logging.config.dictConfig(config)
    logging.captureWarnings(True)


class JSONFormatter(logging.Formatter):
    """A JSON object a line: `time`, `level`, `logger`, `message`, the ids, the record's `extra`, `exception`.

    Never raises: what cannot be written is said by its type.
    """

    def format(self, record: logging.LogRecord) -> str:
        try:
            return _dumps(self.fields(record))
        except Exception as error:
            lost = {
                "level": "ERROR",
                "logger": __name__,
                "message": f"A record could not be written: {type(error).__name__}",
            }
            return _dumps({"time": _time(record), **lost, "of": str(_plain(record.name))})

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        said = {**bound(), **_extra(record)}
        for name in IDS:
            value = said.pop(name, None)
            if value is not None and value != "":
                fields[name] = _plain(value)
        for name, value in said.items():
            fields[f"{name}_" if name in _OURS else name] = MASK if is_secret_name(name) else _plain(value)
        if record.exc_info or record.exc_text:
            fields["exception"] = _exception(record)
        if record.stack_info:
            fields["stack"] = _bounded(redact(str(record.stack_info)), LONGEST_TRACEBACK)
        return fields


class LineFormatter(logging.Formatter):
    """Lines for people, with the ids at the end, the long ones by their last eight characters. Tracebacks follow, indented.

    What would end a line in a message, or move a terminal's cursor, is written as Python writes it: `\\n`. Never raises.
    """

    def __init__(self, fmt: str = "%(asctime)s %(levelname)s %(name)s: %(message)s", **options: Any) -> None:
        super().__init__(fmt, **options)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _in_a_line(_message(record))
        said = {**_bound.get(), **_extra(record)}
        ids = " ".join(f"{name}={_in_a_line(_short(said[name]))}" for name in IDS if said.get(name) not in (None, ""))
        line = super().formatMessage(record)
        return f"{line} [{ids}]" if ids else line

    def format(self, record: logging.LogRecord) -> str:
        try:
            return _indented(redact(super().format(record)))
        except Exception as error:
            said = f"{_plain(record.levelname)} {_plain(record.name)}: {_message(record)} ({type(error).__name__})"
            return _in_a_line(said)

    def formatException(self, ei: Any) -> str:
        return _traceback(ei)


def _short(value: Any) -> str:
    text = str(_plain(value))
    return text[-8:] if isinstance(value, UUID) or (len(text) == 36 and text.count("-") == 4) else text


def _in_a_line(text: str) -> str:
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def _indented(text: str) -> str:
    """Return a record for people: below its line only indented ones, however a line ends."""
    return "\n  ".join(map(_in_a_line, text.splitlines())) if _CONTROL.search(text) else text


def _time(record: logging.LogRecord) -> str:
    try:
        time = datetime.fromtimestamp(record.created, UTC)
    except Exception:  # no time of this world; the record comes from somewhere else
        time = datetime.now(UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    try:
        if _is_access(record):
            client, method, path, version, status = record.args  # type: ignore[misc]
            text = f'{client} - "{method} {_path(path)} HTTP/{version}" {status}'
        else:
            text = record.getMessage()
    except Exception as error:  # a wrong number of arguments, a __str__ that raises: what was meant is still there
        text = f"{record.msg if isinstance(record.msg, str) else type(record.msg).__name__} (its arguments: {type(error).__name__})"
    return _bounded(redact(text), LONGEST_MESSAGE)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    extra = {name: value for name, value in vars(record).items() if name not in _OF_A_RECORD}
    if record.name.startswith("celery."):
        # Celery's `data` holds the arguments of any task: a host's may be private.
        data = extra.pop("data", None)
        if isinstance(data, Mapping):
            extra.update(
                {ours: data[theirs] for theirs, ours in (("id", "task_id"), ("name", "task")) if theirs in data}
            )
    request = extra.get("request")
    if request is not None:
        # Django's: its path without the query, which is the client's own.
        extra.pop("request")
        if isinstance(path := getattr(request, "path", None), str):
            extra |= {"method": getattr(request, "method", None), "path": path}
    if _is_access(record):
        _, extra["method"], path, _, extra["status_code"] = record.args  # type: ignore[misc]
        extra["path"] = _path(path)
    return extra


def _is_access(record: logging.LogRecord) -> bool:
    return record.name == "uvicorn.access" and isinstance(record.args, tuple) and len(record.args) == 5


def _path(url: object) -> str:
    """Return an URL's path: its query is the client's own."""
    return str(url).partition("?")[0]


def _plain(value: Any, depth: int = 0) -> Any:
    """Return what JSON can hold of a value, bounded and without secrets."""
    try:
        match value:
            case None | bool() | float():
                return value
            case int():
                return value if -(2**53) < value < 2**53 else str(value)
            case Enum():
                return _plain(value.value, depth)
            case str():
                return _bounded(redact(value), LONGEST_TEXT)
            case UUID() | Decimal() | datetime() | date() | time() | PurePath():
                return str(value)
            case timedelta():
                return value.total_seconds()
            case bytes() | bytearray() | memoryview():
                return f"<{len(value)} bytes>"
            case Mapping() if depth < DEEPEST:
                return {
                    str(key)[:100]: MASK if is_secret_name(str(key)) else _plain(inner, depth + 1)
                    for key, inner in list(value.items())[:MOST_ITEMS]
                }
            case list() | tuple() | set() | frozenset() if depth < DEEPEST:
                return [_plain(inner, depth + 1) for inner in list(value)[:MOST_ITEMS]]
            case BaseException():
                return _bounded(redact(f"{type(value).__name__}: {value}"), LONGEST_TEXT)
            case _:
                return _bounded(redact(str(value)), LONGEST_TEXT)
    except Exception as error:
        return f"<{type(value).__name__} that cannot be written: {type(error).__name__}>"


def _exception(record: logging.LogRecord) -> dict[str, Any]:
    if not record.exc_info or record.exc_info[0] is None:
        return {"traceback": _bounded(redact(str(record.exc_text or "")), LONGEST_TRACEBACK)}
    return {"type": record.exc_info[0].__name__, "traceback": _traceback(record.exc_info)}


def _traceback(exc_info: Any) -> str:
    try:
        text = "".join(traceback.format_exception(*exc_info))
    except Exception as error:  # a __str__ that raises other than Exception, a cycle
        text = f"{getattr(exc_info[0], '__name__', '')} (its traceback: {type(error).__name__})"
    return _bounded(redact(text.rstrip("\n")), LONGEST_TRACEBACK)


def _bounded(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} ... {len(text) - longest} more ... {text[-half:]}"


def _dumps(fields: Mapping[str, Any]) -> str:
    try:
        line = orjson.dumps(fields).decode()
    except (TypeError, ValueError):  # halves of surrogate pairs
        line = orjson.dumps(_mended(fields)).decode()
    # JSON allows them in a text, and some readers of lines take them for ends of a line.
    return line.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_mended(key): _mended(inner) for key, inner in value.items()}
    return [_mended(inner) for inner in value] if isinstance(value, list) else value
