"""A run in a terminal: the same events as a drawing of 80 columns and as plain lines."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from runs.terminal import Canvas, RunView, console_on, drawing, draws, follow, harmless, seconds

BEGIN = datetime(2026, 11, 21, 7, 0, tzinfo=UTC)
RUN = "0199f000-0000-7000-8000-000000000001"


@dataclass
class Recorded:
    """An event as `Run.events()` yields it."""

    flat: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return dict(self.flat)


def record(*told: tuple[float, str, Mapping[str, Any]]) -> list[Recorded]:
    """Make events of (seconds after the begin, type, fields)."""
    return [
        Recorded({"seq": seq, "type": kind, "run": RUN, "at": (BEGIN + timedelta(seconds=after)).isoformat(), **fields})
        for seq, (after, kind, fields) in enumerate(told, start=1)
    ]


def turn(number: int, after: float, text: str = "Testing.") -> list[tuple[float, str, Mapping[str, Any]]]:
    """One step that says `text` and calls the test tool with its number."""
    message, call = f"m{number}", f"c{number}"
    content = [{"type": "text", "text": text}]
    said = {"message": message, "role": "assistant", "step": number}
    of = {"tool_call": call, "name": "test_tool", "message": message}
    return [
        (after, "message.created", said),
        (after + 0.1, "text.delta", {"message": message, "text": text}),
        (after + 0.2, "tool_call.created", {**of, "arguments": {"number": number}}),
        (after + 0.2, "message.completed", {**said, "content": content}),
        (after + 0.2, "run.waiting", {"tool_calls": [call]}),
        (after + 0.3, "tool_call.started", {**of, "attempt": 1, "worker": "tools-1@host"}),
        (after + 0.5, "tool_call.settled", {**of, "outcome": "success", "result": {"number": number}}),
        (after + 0.5, "run.queued", {"reason": "tools"}),
    ]


KILLED = record(
    (0.0, "run.queued", {"reason": "start"}),
    (0.1, "run.started", {}),
    (0.1, "leg.started", {"leg": 1, "epoch": 1, "worker": "agents-1@host"}),
    *turn(1, 0.2),
    (1.0, "leg.ended", {"leg": 1, "epoch": 2, "worker": "agents-1@host", "reason": "budget"}),
    (1.0, "run.queued", {"reason": "budget"}),
    (1.1, "leg.started", {"leg": 2, "epoch": 3, "worker": "agents-1@host"}),
    (1.2, "message.created", {"message": "m2", "role": "assistant", "step": 2}),
    (1.3, "text.delta", {"message": "m2", "text": "I was just ab"}),
    (1.8, "message.discarded", {"message": "m2", "role": "assistant", "step": 2, "reason": "lost"}),
    (1.8, "leg.ended", {"leg": 2, "epoch": 3, "worker": "agents-1@host", "reason": "lost"}),
    (1.8, "run.queued", {"reason": "lost"}),
    (1.9, "leg.started", {"leg": 3, "epoch": 5, "worker": "agents-2@host"}),
    *turn(2, 2.0, "Again, number 2."),
    (3.0, "message.created", {"message": "m3", "role": "assistant", "step": 3}),
    (3.1, "text.delta", {"message": "m3", "text": "The total"}),
    (3.2, "text.delta", {"message": "m3", "text": " is 3."}),
    (3.3, "message.completed", {"message": "m3", "role": "assistant", "step": 3, "content": "The total is 3."}),
    (3.3, "leg.ended", {"leg": 3, "epoch": 6, "worker": "agents-2@host", "reason": "finished"}),
    (3.3, "run.completed", {"stop_reason": "end_turn", "output": "The total is 3.", "error": None, "usage": {}}),
)


def lines_of(events: list[Recorded]) -> list[str]:
    view = RunView(RUN, agent="tester")
    return [line for event in events for line in view.apply(event.as_dict())]


def drawn(view: RunView, width: int = 80, height: int = 24, encoding: str = "utf-8") -> list[str]:
    """Return the lines of a drawing, which must fit."""

    class Stream(io.StringIO):
        @property
        def encoding(self) -> str:  # type: ignore[override]
            return encoding

    console = Console(
        file=Stream(), width=width, height=height, force_terminal=True, color_system=None, legacy_windows=False
    )
    with console.capture() as capture:
        console.print(view)
    lines = capture.get().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert len(lines) < max(height, 18)
    return lines


def test_a_run_with_a_kill_is_told_in_lines() -> None:
    assert lines_of(KILLED) == [
        f"    0.00 s  run {RUN} is queued (start)",
        "    0.10 s  leg 1 starts on agents-1",
        "    0.40 s  | Testing.",
        '    0.70 s  test_tool(number=1) -> {"number": 1} after 0.20 s on tools-1',
        "    1.00 s  leg 1 ends: its time is up, the next leg goes on",
        "    1.10 s  leg 2 starts on agents-1",
        "    1.80 s  | I was just ab",
        "    1.80 s  the message that was cut is discarded: its worker died",
        "    1.80 s  leg 2 ends: its worker died",
        "    1.90 s  leg 3 starts on agents-2",
        "    2.20 s  | Again, number 2.",
        '    2.50 s  test_tool(number=2) -> {"number": 2} after 0.20 s on tools-1',
        "    3.30 s  | The total is 3.",
        "    3.30 s  leg 3 ends: the run is finished",
        "    3.30 s  run completed (end_turn)",
    ]


def test_the_drawing_shows_legs_steps_calls_text_and_what_happened() -> None:
    # Given a run in the middle of its second step, after a kill
    view = RunView(RUN, agent="tester", expected=50)
    for event in KILLED[:-8]:
        view.apply(event.as_dict())
    # When it is drawn
    lines = drawn(view)
    # Then all of it is in sight
    text = "\n".join(lines)
    assert "tester" in lines[0]
    assert "waiting" in lines[0]
    assert "1 budget → 2 lost → 3 on agents-2" in text
    assert "steps    2/50" in text
    assert "● test_tool(number=2)" in text
    assert "running on tools-1  0.00 s" in text
    assert "Again, number 2." in text
    assert "the message that was cut is discarded: its worker died" in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 24), (120, 40), (80, 10)])
def test_no_moment_of_the_drawing_is_wider_or_higher_than_its_terminal(width: int, height: int) -> None:
    view = RunView(RUN, agent="a-rather-long-name-of-an-agent" * 2, expected=50)
    long = record(*[each for number in range(1, 30) for each in turn(number, number, "word 字 " * 60)])
    legs = record(*[(n, "leg.started", {"leg": n, "epoch": n, "worker": "agents-1@host"}) for n in range(1, 40)])
    for number, event in enumerate([*KILLED[:12], *long, *legs]):
        view.apply(event.as_dict())
        if number % 5 == 0:
            drawn(view, width, height)  # which sees to it
    for number in range(20):
        view.note(f"note {number} " + "long " * 40)
        lines = drawn(view, width, height)
    # And what is most worth to be seen is seen, whatever else there is
    assert any("39 on agents-1" in line for line in lines)
    assert any("note 19" in line for line in lines)


def test_of_a_long_chain_only_the_legs_that_may_fit_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture is drawn ten times a second, of a run that may have a thousand legs."""
    tried: list[int] = []
    flow = Canvas.flow

    def counting(canvas: Canvas, label: str, items: Any, between: Any) -> Any:
        tried.append(len(items))
        return flow(canvas, label, items, between)

    monkeypatch.setattr(Canvas, "flow", counting)
    view = RunView(RUN, agent="tester")
    for n in range(1, 501):
        for kind, fields in (("leg.started", {}), ("leg.ended", {"reason": "lost"})):
            view.apply({"type": kind, "leg": n, "epoch": n, "worker": "a@host", **fields})
    for width in (60, 120):
        text = "\n".join(drawn(view, width))
        assert "500 lost" in text
        assert re.search(r"\(4\d\d earlier\)", text)
    assert sum(tried) < 1000


def test_whatever_models_and_tools_say_is_one_line() -> None:
    # Given calls with arguments that are no JSON object, or have line breaks everywhere, and errors of several lines
    error = {"code": "tool_failed", "message": "1 error\n  number\n    is missing"}
    view = RunView(RUN, agent="tester")
    told = []
    for event in record(
        (0, "tool_call.created", {"tool_call": "a", "name": "look", "arguments": "{bad\njson"}),
        (0, "tool_call.created", {"tool_call": "b", "name": "look\nup", "arguments": {"at\nonce": "one\ntwo"}}),
        (1, "tool_call.started", {"tool_call": "b", "name": "look\nup", "attempt": 1, "worker": "tools-1@host"}),
        (1, "tool_call.progress", {"tool_call": "b", "fraction": 0.5, "note": "half\nof it"}),
        (2, "tool_call.retrying", {"tool_call": "b", "attempt": 2, "error": error}),
        (3, "tool_call.settled", {"tool_call": "a", "name": "look", "outcome": "failed", "error": error}),
        (4, "error", {"error": error}),
        (5, "run.failed", {"stop_reason": "model_error", "error": error}),
    ):
        told += view.apply(event.as_dict())
        assert not [line for line in drawn(view) if line.startswith((" is missing", "up(", "json"))]
    # Then each is told in a line of its own
    assert not [line for line in told if "\n" in line]
    assert [line[12:] for line in told] == [
        'look up(at once="one\\ntwo") will be tried again: 1 error number is missing',
        "look({bad json) failed: 1 error number is missing",
        "error: tool_failed: 1 error number is missing",
        "run failed (model_error): tool_failed: 1 error number is missing",
    ]


def test_what_was_drawn_does_not_jump_when_calls_come_and_go() -> None:
    view = RunView(RUN, agent="tester")
    heights = []
    for event in record(*[each for number in range(1, 15) for each in turn(number, number)]):
        view.apply(event.as_dict())
        heights.append(len(drawn(view)))
    assert heights == sorted(heights)


def test_an_encoding_without_the_marks_gets_plain_ones() -> None:
    view = RunView(RUN, agent="tester", expected=50)
    for event in KILLED[:-8]:
        view.apply(event.as_dict())
    text = "\n".join(drawn(view, encoding="ascii"))
    assert text.isascii()
    assert "1 budget > 2 lost > 3 on agents-2" in text


ASKED = [{"type": "tool_call", "tool_call": f"p{n}", "name": "look", "arguments": {"at": n}} for n in range(1, 5)]
PARALLEL = record(
    (0.0, "run.queued", {"reason": "start"}),
    (0.1, "leg.started", {"leg": 1, "epoch": 1, "worker": "agents-1@host"}),
    (0.2, "message.created", {"message": "m", "role": "assistant", "step": 1}),
    *[
        (0.3, "tool_call.created", {"tool_call": f"p{n}", "name": "look", "message": "m", "arguments": {"at": n}})
        for n in range(1, 5)
    ],
    (0.3, "message.completed", {"message": "m", "role": "assistant", "step": 1, "content": ASKED}),
    (0.3, "run.waiting", {"tool_calls": ["p1", "p2", "p3", "p4"]}),
    (0.4, "tool_call.started", {"tool_call": "p1", "name": "look", "attempt": 1, "worker": "tools-1@host"}),
    (0.5, "tool_call.started", {"tool_call": "p3", "name": "look", "attempt": 1, "worker": "tools-2@host"}),
    (0.9, "tool_call.settled", {"tool_call": "p1", "name": "look", "outcome": "success", "result": 7}),
    (1.0, "tool_call.started", {"tool_call": "p2", "name": "look", "attempt": 1, "worker": "tools-1@host"}),
)


def test_calls_that_run_at_once_are_seen_at_once_and_keep_their_places() -> None:
    # Given four calls of one step, of which one is settled, two run, and one waits
    at = [BEGIN + timedelta(seconds=1)]
    view = RunView(RUN, agent="tester", since=BEGIN, clock=lambda: at[0])
    told = [line for event in PARALLEL for line in view.apply(event.as_dict())]
    # Then they are told together, and drawn each with what it does, in the order that they were asked for
    assert "    0.30 s  4 tool calls at once: 4 look" in told
    lines = drawn(view)
    first = next(n for n, line in enumerate(lines) if "tool calls" in line and line.startswith("──"))
    assert "tool calls: 2 running, 1 waiting" in lines[first]
    shown = [re.sub(" {2,}", "  ", line) for line in lines[first + 1 : first + 5]]
    assert shown == [
        "✓ look(at=1) → 7  0.50 s on tools-1",
        "● look(at=2)  running on tools-1  0.00 s",
        "● look(at=3)  running on tools-2  0.50 s",
        "○ look(at=4)  waits for a worker",
    ]
    # And time passes on the screen though nothing happens
    at[0] += timedelta(seconds=2)
    assert any("running on tools-2  2.5 s" in line for line in drawn(view))


def test_of_more_calls_than_there_is_room_for_the_running_ones_are_seen() -> None:
    view = RunView(RUN, agent="tester")
    many = range(1, 41)
    for event in record(
        *[(0, "tool_call.created", {"tool_call": f"c{n}", "name": "look", "arguments": {"at": n}}) for n in many],
        (1, "tool_call.started", {"tool_call": "c39", "name": "look", "attempt": 1, "worker": "tools-1@host"}),
    ):
        view.apply(event.as_dict())
    text = "\n".join(drawn(view))
    assert "● look(at=39)" in text
    assert re.search(r"and 31 more", text), text


def test_a_run_that_has_ended_shows_the_time_of_its_end() -> None:
    view = RunView(RUN, agent="tester", since=BEGIN, clock=lambda: BEGIN + timedelta(hours=1))
    for event in KILLED:
        view.apply(event.as_dict())
    assert drawn(view)[0].endswith("completed  3.3 s")


def test_text_is_told_line_by_line_as_it_streams() -> None:
    view = RunView(RUN)
    told = [
        view.apply({"seq": 1, "type": "text.delta", "message": "m", "at": None, "text": word + " "})
        for word in ("alpha " * 20).split()
    ]
    first = next(index for index, lines in enumerate(told) if lines)
    assert first < 15
    assert told[first] == ["    0.00 s  | " + " ".join(["alpha"] * 11)]


def test_a_view_that_begins_in_the_middle_shows_what_comes() -> None:
    """`follow_run --after`: no start of the leg, no beginning of the message."""
    events = [event for event in KILLED if event.flat["seq"] > 14]
    lines = lines_of(events)
    assert lines[0].endswith("| I was just ab")
    assert lines[-1].endswith("run completed (end_turn)")


def test_a_message_whose_deltas_were_before_the_cursor_is_told_whole() -> None:
    said = {"message": "m1", "role": "assistant", "step": 1, "content": "All of it."}
    assert lines_of(record((1, "message.completed", said))) == ["    0.00 s  | All of it."]


def test_a_failed_call_a_retry_and_a_failed_run_are_told_with_their_reasons() -> None:
    of = {"tool_call": "c1", "name": "charge", "message": "m1"}
    error = {"code": "auth", "message": "no"}
    lines = lines_of(
        record(
            (0, "tool_call.created", {**of, "arguments": {"amount": "3.50"}}),
            (0, "tool_call.started", {**of, "attempt": 1, "worker": "tools-1@a"}),
            (1, "tool_call.retrying", {**of, "attempt": 2, "error": {"code": "worker_lost"}, "delay_seconds": 0}),
            (2, "tool_call.started", {**of, "attempt": 2, "worker": "tools-2@a"}),
            (3, "tool_call.settled", {**of, "outcome": "failed", "error": {"code": "x", "message": "no card"}}),
            (4, "error", {"code": "rate_limited", "message": "slow down", "retryable": True}),
            (5, "run.failed", {"stop_reason": "model_error", "output": None, "error": error}),
        )
    )
    assert lines == [
        '    1.00 s  charge(amount="3.50") will be tried again: its worker died',
        '    2.00 s  charge(amount="3.50") starts again on tools-2, attempt 2',
        '    3.00 s  charge(amount="3.50") failed: no card',
        "    4.00 s  error: rate_limited: slow down",
        "    5.00 s  run failed (model_error): auth: no",
    ]


def test_no_type_of_event_is_too_much_for_the_view() -> None:
    """Every type of API.md's list, and one that does not exist yet."""
    of = {"tool_call": "c1", "name": "t", "message": "m1"}
    verbs = "created arguments_delta started progress retrying approval_requested approved denied awaiting_result"
    verbs += " awaiting_child unknown extended assigned settled"
    events = record(
        *[(0, f"run.{verb}", {}) for verb in ("held", "queued", "started", "waiting", "requires_action")],
        *[(0, f"tool_call.{verb}", of) for verb in verbs.split()],
        (0, "reasoning.delta", {"message": "m2", "text": "hm"}),
        (0, "usage", {"input_tokens": 3}),
        (0, "data", {"data": {"a": 1}}),
        (0, "resume_gap", {"from": 1, "to": 4}),
        (0, "something.new", {}),
    )
    view = RunView(RUN)
    for event in events:
        view.apply(event.as_dict())
        drawn(view)


def test_a_model_cannot_write_to_the_terminal_what_the_terminal_would_obey() -> None:
    evil = "ok\x1b[2J\x1b]0;title\x07\r\x9b31m\u202egnp.exe"
    assert harmless(evil) == "ok[2J]0;title31mgnp.exe"
    of = {"tool_call": "c", "name": evil, "message": "m"}
    events = record(
        (0, "message.created", {"message": "m", "role": "assistant", "step": 1}),
        (0, "text.delta", {"message": "m", "text": evil}),
        (0, "tool_call.created", {**of, "arguments": {"a": evil}}),
        (0, "tool_call.settled", {**of, "outcome": "success", "result": evil}),
    )
    view = RunView(RUN)
    for event in events[:3]:
        view.apply(event.as_dict())
    assert "\x1b" not in "".join(drawn(view))
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set("".join(lines_of(events)))


def console(terminal: bool, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Console:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)

    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    return console_on(Stream())


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {"NO_COLOR": "1"}, False),
    ],
    ids=["terminal", "pipe", "no-color", "dumb", "no-color-pipe"],
)
def test_only_a_terminal_is_drawn_on_and_without_colours_where_none_are_wanted(
    terminal: bool, environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = console(terminal, monkeypatch, **environment)
    assert draws(made) is expected
    follow(KILLED, RunView(RUN, agent="tester"), made)
    written = made.file.getvalue()  # type: ignore[attr-defined]
    assert ("\x1b" in written) is expected
    coloured = re.findall(r"\x1b\[(?:\d+;)*(?:3[0-7]|38|9[0-7])(?:;\d+)*m", written)
    assert bool(coloured) is (expected and "NO_COLOR" not in environment)
    if not expected:
        assert written.splitlines() == lines_of(KILLED)


def test_every_picture_on_a_terminal_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a terminal wait for the end of a picture takes no room in it."""
    made = console(True, monkeypatch, COLUMNS="80", LINES="24")
    view = RunView(RUN, agent="tester", since=BEGIN, clock=lambda: BEGIN + timedelta(seconds=9))
    with drawing(view, made):
        for event in PARALLEL:
            view.apply(event.as_dict())
        begun = len(made.file.getvalue())  # type: ignore[attr-defined]
        made.print()  # draws anew
        written = made.file.getvalue()[begun:]  # type: ignore[attr-defined]
    plain = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", written)
    assert "waiting  9.0 s" in plain
    assert written.count("\x1b[?2026h") == written.count("\x1b[?2026l") >= 1


def test_a_long_line_is_not_broken_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    made = console(False, monkeypatch)
    follow(record((0, "data", {"data": "[bold]" + "x" * 90})), RunView(RUN), made)
    assert made.file.getvalue().count("\n") == 1  # type: ignore[attr-defined]
    assert '"[bold]xxx' in made.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("span", "expected"), [(0.2567, "0.26 s"), (-1, "0.00 s"), (12.34, "12.3 s"), (185, "3 min 5 s")]
)
def test_a_span_of_time_is_told_as_exactly_as_a_reader_can_use(span: float, expected: str) -> None:
    assert seconds(timedelta(seconds=span)) == expected
