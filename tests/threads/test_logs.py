"""A record is one line that can be parsed, says whose it is, and never raises."""

from __future__ import annotations

import ast
import asyncio
import contextvars
import json
import logging
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from threads import logs
from threads.logs import JSONFormatter, LineFormatter

RUN = UUID("0199a3f0-6b1c-7cc4-9d2e-3c1f0a5b7e11")
CALL = UUID("0199a3f0-7d02-7f1a-8b55-90ad3e6c4f20")


def record(
    message: Any = "hello", *args: Any, name: str = "shop", exc_info: Any = None, **extra: Any
) -> logging.LogRecord:
    made = logging.LogRecord(name, logging.INFO, __file__, 1, message, args, exc_info)
    vars(made).update(extra)
    return made


def written(made: logging.LogRecord) -> dict[str, Any]:
    line = JSONFormatter().format(made)
    assert len(line.splitlines()) == 1
    fields: dict[str, Any] = json.loads(line)
    return fields


@pytest.fixture(autouse=True)
def nothing_everywhere() -> Iterator[None]:
    yield
    logs._everywhere.clear()


def test_a_line_says_when_what_and_whose_it_is() -> None:
    logs.everywhere(worker="agents@here")
    made = record("%s of %d", "one", 2, action="run.claimed", epoch=7)
    made.created = datetime(2026, 11, 21, 9, 30, 0, 123_456, tzinfo=UTC).timestamp()
    with logs.context(run=RUN, leg=2, epoch=3, agent="desk"):
        fields = written(made)
    assert list(fields.items()) == [
        ("time", "2026-11-21T09:30:00.123Z"),
        ("level", "INFO"),
        ("logger", "shop"),
        ("message", "one of 2"),
        ("run", str(RUN)),
        ("leg", 2),
        ("epoch", 7),  # what the record itself says counts
        ("agent", "desk"),
        ("worker", "agents@here"),
        ("action", "run.claimed"),
    ]


def test_people_read_the_same_with_short_ids() -> None:
    formatter = LineFormatter()
    with logs.context(run=RUN, leg=2, tool_call=CALL, attempt=1):
        line = formatter.format(record("hello %s", "there", name="longhaul.tools"))
    assert line.endswith(" INFO longhaul.tools: hello there [run=0a5b7e11 leg=2 tool_call=3e6c4f20 attempt=1]")
    assert formatter.format(record("hello")).endswith(" INFO shop: hello")
    # From the end of an id `explain_run` finds its run.
    assert str(RUN).endswith("0a5b7e11")


def test_a_context_is_its_threads_own_and_ends_with_its_block() -> None:
    seen: dict[str, Any] = {}

    def look(name: str) -> None:
        seen[name] = dict(logs.bound())

    with logs.context(run=RUN):
        with logs.context(tool_call=CALL):
            look("inner")
        plain = threading.Thread(target=look, args=("thread",))
        taken = threading.Thread(target=contextvars.copy_context().run, args=(look, "taken along"))
        for thread in (plain, taken):
            thread.start()
            thread.join()

        async def task() -> None:
            await asyncio.to_thread(look, "to_thread")

        asyncio.run(task())
    look("after")
    assert seen == {
        "inner": {"run": RUN, "tool_call": CALL},
        "thread": {},
        "taken along": {"run": RUN},
        "to_thread": {"run": RUN},
        "after": {},
    }


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


def test_nothing_that_is_logged_raises() -> None:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    fields = written(
        record(
            "two\nlines\r\x85\u2028of text",
            broken=Broken(),
            cyclic=cyclic,
            data=b"\x00\xff" * 10,
            half="\ud800 of a pair",
            nan=float("nan"),
            huge=2**100,
            price=Decimal("1.50"),
            wait=timedelta(seconds=1.5),
            path=Path("/srv"),
            many=list(range(1000)),
            long="x" * 100_000,
            set={1},
            table={1: "a", None: "b"},
            error=ValueError("why"),
            time="mine",
            message_="also mine",
        )
    )
    assert fields["message"] == "two\nlines\r\x85\u2028of text"
    assert fields["broken"] == "<Broken that cannot be written: RuntimeError>"
    assert fields["data"] == "<20 bytes>"
    assert fields["half"] == "\\ud800 of a pair"
    assert (fields["nan"], fields["huge"], fields["price"], fields["wait"]) == (None, str(2**100), "1.50", 1.5)
    assert (fields["path"], fields["set"], fields["table"]) == ("/srv", [1], {"1": "a", "None": "b"})
    assert len(fields["many"]) == 50
    assert len(fields["long"]) < 2200
    assert fields["error"] == "ValueError: why"
    assert fields["time_"] == "mine"


@pytest.mark.parametrize("message", ["%s %s", "%d", Broken(), "%(x)s", b"bytes", None])
def test_a_message_that_does_not_fit_its_arguments_is_written_still(message: Any) -> None:
    assert written(record(message, "one"))["level"] == "INFO"
    assert LineFormatter().format(record(message, "one"))
    assert written(record("%s", Broken()))["message"] == "%s (its arguments: RuntimeError)"


@pytest.mark.parametrize("created", [1e20, -1e20, float("nan"), None, "yesterday"])
def test_a_record_of_no_time_is_written_still(created: Any) -> None:
    made = record("hello")
    made.created = created
    fields = written(made)
    assert fields["message"] == "hello"
    assert datetime.fromisoformat(fields["time"]) <= datetime.now(UTC) + timedelta(seconds=1)
    made.name = Broken()  # type: ignore[assignment]
    made.levelname = object()  # type: ignore[assignment]
    assert "could not be written" in written(made)["message"]
    assert "hello" in LineFormatter().format(made)


def test_no_text_begins_a_line_for_people() -> None:
    forged = "x\n2026-11-21 09:30:00,000 INFO longhaul.engine: forged\r\x85\u2028\x1b[2Ktoo"
    formatter = LineFormatter()
    with logs.context(tool=forged):
        line = formatter.format(record("it said %s", forged))
    assert len(line.splitlines()) == 1
    assert "\\n2026-11-21" in line
    assert "\x1b" not in line
    assert len(formatter.format(record("it said %s %s", forged)).splitlines()) == 1  # written in another way
    try:
        raise ValueError(forged)
    except ValueError:
        first, *further = formatter.format(record("it failed", exc_info=sys.exc_info())).splitlines()
    assert first.endswith("shop: it failed")
    assert further[0] == "  Traceback (most recent call last):"
    assert [each for each in further if not each.startswith("  ")] == []
    assert formatter.format(record("a\ttab")).endswith("a\ttab")


def test_an_exception_is_a_field_with_its_chain_and_no_secret() -> None:
    try:
        try:
            raise KeyError("https://api.example/?api_key=canary-of-the-inner")
        except KeyError as inner:
            raise ValueError("postgresql://u:canary-of-the-outer@db/x is away") from inner
    except ValueError:
        made = record("it failed", exc_info=sys.exc_info())
    plain = LineFormatter().format(made)
    fields = written(made)
    assert fields["exception"]["type"] == "ValueError"
    assert "KeyError" in fields["exception"]["traceback"]
    assert "test_logs.py" in fields["exception"]["traceback"]
    for text in (plain, json.dumps(fields)):
        assert "canary" not in text
        assert "is away" in text
    assert written(record("none", exc_info=(None, None, None)))["exception"] == {"traceback": ""}


def test_a_field_whose_name_says_so_is_masked() -> None:
    fields = written(
        record(password="x", nested={"api_key": "y", "tokens": 3}, max_tokens=5, request_id="r1", author="z")
    )
    assert (fields["password"], fields["nested"]) == ("[masked]", {"api_key": "[masked]", "tokens": 3})
    assert (fields["max_tokens"], fields["request_id"], fields["author"]) == (5, "r1", "z")


def test_the_arguments_of_a_hosts_task_and_the_query_of_a_request_are_left_out() -> None:
    data = {"id": "abc", "name": "shop.mail", "args": "('private',)", "kwargs": "{}"}
    fields = written(record("Task %(name)s[%(id)s] received", data, name="celery.worker.strategy", data=data))
    assert (fields["task"], fields["task_id"]) == ("shop.mail", "abc")
    assert "private" not in json.dumps(fields)
    args = ("127.0.0.1:1", "GET", "/admin/?q=private", "1.1", 200)
    fields = written(record('%s - "%s %s HTTP/%s" %d', *args, name="uvicorn.access"))
    assert fields["message"] == '127.0.0.1:1 - "GET /admin/ HTTP/1.1" 200'
    assert (fields["method"], fields["path"], fields["status_code"]) == ("GET", "/admin/", 200)


def test_lines_of_a_run_cost_microseconds() -> None:
    """Binding and releasing happen in each leg and call, logged or not: 0.5 us where this was written."""
    import timeit

    def once() -> None:
        logs.release(logs.bind(run=RUN, leg=1, epoch=1, agent="desk", thread="x"))

    assert min(timeit.repeat(once, number=1000, repeat=5)) / 1000 < 20e-6  # s; the bound is for a busy machine


def test_no_line_of_ours_has_a_field_that_a_record_refuses() -> None:
    """A record raises for an `extra` of a name that it has itself, `thread` or `name`, and only where the level is on."""
    root = Path(__file__).resolve().parents[2]
    found = []
    for path in [path for app in ("threads", "tools", "runs", "agents_project") for path in (root / app).rglob("*.py")]:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if '"action"' in text else ():
            if isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                if "action" in keys or "life" in keys:
                    found.append((path.name, keys & (vars(record()).keys() | {"message", "asctime"})))
    assert len(found) > 10
    assert [each for each in found if each[1]] == []
