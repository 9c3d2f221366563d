"""A run in a terminal.

`RunView` is folded from the run's events and from nothing else, so it shows the same live, late or played again. On a
terminal it draws itself, again and again, in at most 80 columns; in a pipe, with NO_COLOR, or on a dumb terminal it is
told as plain lines, one a fact, the model's text as it fills a line.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import IO, Any, NoReturn, Protocol
from uuid import UUID

from django.db import InterfaceError, OperationalError, connection
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

WIDTH = 80
BROKEN_PIPE = 141  # the status of a program that SIGPIPE ended, as shells tell it
PATIENCE = timedelta(minutes=5)  # how long a reader waits for a database that is away
LONGEST_ROW = 200  # characters of a line that begins as a table's row does
_AGAIN_SECONDS = 0.5
_TEXT_LINES = 3  # of the streaming text that are in sight; a fixed number, so that what stands below does not jump
_CALLS = 2
_NOTES = 10
_LEGS = 14  # the last ones of the chain

# Why a leg ended, in words. The keys are the reasons of `leg.ended`.
ENDS = {
    "budget": "its time is up, the next leg goes on",
    "tools": "nothing to do until its tool calls are settled",
    "person": "a person or an outside system is asked",
    "retry": "the model call failed and is tried again",
    "drained": "its worker shuts down",
    "lost": "its worker died",
    "cancelled": "the run was cancelled",
    "failed": "the run failed",
    "finished": "the run is finished",
}
_STYLES = {
    "running": "cyan",
    "waiting": "cyan",
    "queued": "yellow",
    "held": "yellow",
    "requires_action": "magenta",
    "completed": "green",
    "failed": "red",
    "cancelled": "red",
    "budget": "yellow",
    "lost": "bold red",
    "finished": "green",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Return text of a model or tool without what a terminal would obey: escapes, controls, changes of direction."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\t", " "))


def short(value: Any, limit: int = 100) -> str:
    """Return a JSON value as one line of at most `limit` characters."""
    text = harmless(json.dumps(value, ensure_ascii=False, default=str)).replace("\n", " ")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def seconds(span: timedelta) -> str:
    """Return `0.26 s`, `12.3 s`, `3 min 5 s`: as exact as a reader can use."""
    total = max(span.total_seconds(), 0.0)
    if total < 1:
        return f"{total:.2f} s"
    if total < 120:
        return f"{total:.1f} s"
    return f"{int(total // 60)} min {int(total % 60)} s"


def place(worker: str) -> str:
    """Return a worker's name without its host: `agents-1` of `agents-1@web3`."""
    return harmless(worker).partition("@")[0]


class SaysItself(Protocol):
    """An event, as `Run.events()` yields it."""

    def as_dict(self) -> dict[str, Any]: ...


@dataclass
class LegSeen:
    number: int
    worker: str
    reason: str = ""  # empty while it is open


@dataclass
class CallSeen:
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    status: str = "requested"
    attempt: int = 1
    worker: str = ""
    started: datetime | None = None
    note: str = ""

    def __str__(self) -> str:
        inner = ", ".join(f"{name}={short(value, 40)}" for name, value in self.arguments.items())
        return harmless(f"{self.name}({inner[:120]})")


class RunView:
    """What a reader has seen of a run so far.

    `apply` takes one event and returns the plain lines that tell it; rich draws the whole. Both may be called from
    threads of their own. `since` is the moment that times count from (the first event seen, if not given), `expected`
    the number of steps to come, if somebody knows it.
    """

    def __init__(
        self, run: UUID | str, *, agent: str = "", since: datetime | None = None, expected: int | None = None
    ) -> None:
        self.run = str(run)
        self.agent = agent
        self.since = since
        self.expected = expected
        self.seq = 0
        self.now = since
        self.status = ""
        self.stop_reason = ""
        self.steps = 0
        self.legs: list[LegSeen] = []
        self.calls: dict[str, CallSeen] = {}  # the open ones, by id
        self.settled = 0
        self.discarded = 0
        self.output: Any = None
        self.error: Mapping[str, Any] | None = None
        self.text = ""
        self.thinking = ""
        self.notes: deque[tuple[timedelta, str, str]] = deque(maxlen=_NOTES)
        self._message = ""  # whose text is shown
        self._unsaid = ""  # of the text, what is not a whole line yet
        self._lock = threading.RLock()

    @property
    def finished(self) -> bool:
        return self.status in ("completed", "failed", "cancelled")

    @property
    def holder(self) -> str:
        """The worker whose leg is open, without its host; empty when there is none."""
        return place(self.legs[-1].worker) if self.legs and not self.legs[-1].reason else ""

    def apply(self, event: Mapping[str, Any]) -> list[str]:
        """Take an event in its flat form (`Event.as_dict()`); return the lines that tell it, most often none."""
        with self._lock:
            at = _moment(event.get("at"))
            if at is not None:
                self.now = at
                self.since = self.since or at
            self.seq = event.get("seq") or self.seq
            kind, _, verb = str(event["type"]).partition(".")
            told = {
                "run": self._run,
                "leg": self._leg,
                "message": self._said,
                "text": self._delta,
                "reasoning": self._delta,
                "tool_call": self._call,
                "error": self._error,
                "data": self._data,
                "resume_gap": self._gap,
            }.get(kind)
            return [self._timed(line) for line in told(verb or kind, event)] if told else []

    def note(self, text: str, style: str = "", at: datetime | None = None) -> list[str]:
        """Add a remark that stays in sight; return the line that tells it."""
        with self._lock:
            if at is not None and self.since is None:
                self.since = at
            self.notes.append((self._age(at), text, style))
            return [self._timed(text, at)]

    # --- the fold ---------------------------------------------------------------------------------------------------

    def _run(self, verb: str, event: Mapping[str, Any]) -> Iterator[str]:
        self.status = "running" if verb == "started" else verb
        reason = str(event.get("reason", ""))
        match verb:
            case "queued" if reason in ("start", "released", "retry"):
                yield f"run {self.run} is queued ({reason})"
            case "held":
                yield f"run {self.run} waits for the thread's current run to end"
            case "requires_action":
                yield from self.note_only("waits for a person or an outside system", "magenta")
            case "completed" | "failed" | "cancelled":
                self.stop_reason = str(event.get("stop_reason", ""))
                self.output, self.error = event.get("output"), event.get("error")
                for call in self.calls.values():
                    call.status = "settled"
                self.calls.clear()
                yield from self._rest_of_text()
                yield f"run {verb} ({self.stop_reason})" + (f": {self._why()}" if self.error else "")
            case _:
                return

    def note_only(self, text: str, style: str = "") -> Iterator[str]:
        """Add a remark from within the fold, whose caller adds the time."""
        self.notes.append((self._age(None), text, style))
        yield text

    def _why(self) -> str:
        error = self.error or {}
        return harmless(f"{error.get('code', '')}: {error.get('message', '')}".strip(": "))

    def _leg(self, verb: str, event: Mapping[str, Any]) -> Iterator[str]:
        number, worker = int(event["leg"]), str(event.get("worker", ""))
        if verb == "started":
            self.status = "running"
            self.legs.append(LegSeen(number, worker))
            yield f"leg {number} starts on {place(worker)}"
            return
        reason = str(event.get("reason", ""))
        for leg in self.legs:
            if leg.number == number:
                leg.reason = reason
                break
        else:  # its start was before the cursor
            self.legs.append(LegSeen(number, worker, reason))
        text = f"leg {number} ends: {ENDS.get(reason, reason)}"
        yield from self.note_only(text, "red") if reason in ("lost", "failed") else (text,)

    def _said(self, verb: str, event: Mapping[str, Any]) -> Iterator[str]:
        message = str(event.get("message", ""))
        if event.get("role") == "user" and verb == "completed":
            for line in _text_of(event.get("content")).splitlines() or [""]:
                yield f"user: {line}"
        elif event.get("role") != "assistant":
            return
        elif verb == "created":
            self.status = "running"  # also when a lingering leg has claimed again, which no event of its own tells
            self._listen(message)
        elif verb == "discarded":
            self.discarded += 1
            yield from self._rest_of_text()
            reason = ENDS.get(str(event.get("reason", "")), event.get("reason", ""))
            yield from self.note_only(f"the message that was cut is discarded: {reason}", "red")
            self._listen("")
            self.calls = {key: call for key, call in self.calls.items() if call.status != "asked"}
        elif verb == "completed":
            if message != self._message:  # the cursor stands behind its deltas
                self._listen(message)
            if not self.text:
                yield from self._delta("delta", {"message": message, "text": _text_of(event.get("content"))})
            yield from self._rest_of_text()
            if not event.get("partial"):
                self.steps = max(self.steps, int(event.get("step") or 0))

    def _listen(self, message: str) -> None:
        self._message, self.text, self.thinking, self._unsaid = message, "", "", ""

    def _delta(self, verb: str, event: Mapping[str, Any]) -> Iterator[str]:
        message = str(event.get("message", ""))
        if message != self._message:  # its beginning was before the cursor
            yield from self._rest_of_text()
            self._listen(message)
        text = harmless(str(event.get("text", "")))
        if event.get("type") == "reasoning.delta":
            self.thinking += text
            return
        self.text += text
        self._unsaid += text
        while True:
            line, newline, rest = self._unsaid.partition("\n")
            if not newline:
                width = WIDTH - 14
                if len(line) <= (LONGEST_ROW if line.startswith("|") else width):  # a row of a table stays whole
                    return
                cut = line.rfind(" ", 0, width + 1)
                line, rest = (line[:cut], line[cut + 1 :]) if cut > 0 else (line[:width], line[width:])
            self._unsaid = rest
            yield f"| {line}"

    def _rest_of_text(self) -> Iterator[str]:
        rest, self._unsaid = self._unsaid, ""
        if rest.strip():
            yield f"| {rest}"

    def _call(self, verb: str, event: Mapping[str, Any]) -> Iterator[str]:
        key = str(event["tool_call"])
        call = self.calls.setdefault(key, CallSeen(str(event.get("name", ""))))
        match verb:
            case "arguments_delta":
                call.status = "asked"
            case "created":
                call.status, call.arguments = "requested", event.get("arguments") or {}
            case "started":
                call.status, call.attempt = "running", int(event.get("attempt", 1))
                call.worker, call.started, call.note = place(str(event.get("worker", ""))), self.now, ""
                if call.attempt > 1:
                    yield f"{call} starts again on {call.worker}, attempt {call.attempt}"
            case "progress":
                fraction, said = event.get("fraction"), harmless(str(event.get("note") or ""))
                call.note = " ".join(filter(None, ("" if fraction is None else f"{fraction:.0%}", said)))
            case "retrying":
                call.status, call.attempt = "retrying", int(event.get("attempt", call.attempt + 1))
                error = event.get("error") or {}
                code = error.get("code", "failed")
                why = "its worker died" if code == "worker_lost" else harmless(str(error.get("message") or code))
                yield from self.note_only(f"{call} will be tried again: {why}", "red")
            case "settled":
                self.settled += 1
                self.calls.pop(key, None)
                took = f" after {seconds(self.now - call.started)}" if self.now and call.started else ""
                where = f" on {call.worker}" if call.worker else ""
                if event.get("outcome") == "success":
                    yield f"{call} -> {short(event.get('result'))}{took}{where}"
                else:
                    error = event.get("error") or {}
                    why = harmless(str(error.get("message") or error.get("code") or ""))
                    yield from self.note_only(f"{call} {event.get('outcome')}: {why}".rstrip(": "), "red")
            case "denied" | "assigned" | "extended" | "approved":
                yield f"{call} {verb}"
            case _:
                call.status = verb
                yield from self.note_only(f"{call} is {verb.replace('_', ' ')}", "magenta")

    def _error(self, verb: str, event: Mapping[str, Any]) -> Iterator[str]:
        error = event.get("error") if isinstance(event.get("error"), Mapping) else event
        assert isinstance(error, Mapping)
        said = harmless(f"{error.get('code', '')}: {error.get('message', '')}".strip(": "))
        yield from self.note_only(f"error: {said}", "red")

    def _data(self, verb: str, event: Mapping[str, Any]) -> Iterator[str]:
        yield f"data: {short(event.get('data'))}"

    def _gap(self, verb: str, event: Mapping[str, Any]) -> Iterator[str]:
        yield f"events {event.get('from')} to {event.get('to')} are no longer kept"

    # --- lines ------------------------------------------------------------------------------------------------------

    def _age(self, at: datetime | None) -> timedelta:
        moment = at or self.now
        return moment - self.since if moment and self.since else timedelta()

    def _timed(self, line: str, at: datetime | None = None) -> str:
        return f"{max(self._age(at).total_seconds(), 0.0):8.2f} s  {line}"

    # --- the drawing ------------------------------------------------------------------------------------------------

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            yield from self._draw(console, min(options.max_width, 120))

    def _draw(self, console: Console, width: int) -> Iterator[RenderableType]:
        yield self._head()
        yield from self._extra(width)
        yield self._chain()
        yield self._progress(width)
        yield from self._in_flight()
        yield Rule("the model says", align="left", characters="-", style="dim")
        yield self._speech(console, width)
        yield Rule("what happened", align="left", characters="-", style="dim")
        for age, text, style in self.notes:
            line = Text(f"{age.total_seconds():6.1f} s  ", style="dim", no_wrap=True, overflow="ellipsis")
            line.append(text, style=style or "default")
            yield line

    def _extra(self, width: int) -> Iterator[RenderableType]:
        """What a view for more than the run adds below the head."""
        yield from ()

    def _head(self) -> RenderableType:
        grid = Table.grid(expand=True, padding=0)
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        grid.add_column(justify="right", no_wrap=True)
        left = Text.assemble((self.agent or "run", "bold"), "  ", (self.run, "dim"))
        status = self.status.replace("_", " ") or "..."
        right = Text.assemble((status, _STYLES.get(self.status, "")), f"  {seconds(self._age(None))}")
        grid.add_row(left, right)
        return grid

    def _chain(self) -> RenderableType:
        chain = Text("legs   ", overflow="fold")
        earlier = len(self.legs) - _LEGS
        if earlier > 0:
            chain.append(f"({earlier} earlier) ", "dim")
        for leg in self.legs[-_LEGS:]:
            if leg is not self.legs[max(earlier, 0)]:
                chain.append(" > ", "dim")
            chain.append(f"{leg.number}:", "bold")
            if leg.reason:
                chain.append(leg.reason, _STYLES.get(leg.reason, "dim"))
            else:
                chain.append(place(leg.worker), "bold cyan")
        if not self.finished and not self.holder:
            waits = {"queued": "queued", "": "not started"}.get(self.status, self.status.replace("_", " "))
            chain.append(f"{' > ' if self.legs else ''}({waits})", "yellow")
        return chain

    def _progress(self, width: int) -> RenderableType:
        grid = Table.grid(padding=0)
        done = min(self.steps, self.expected) if self.expected else self.steps
        label = Text(f"steps  {done}" + (f"/{self.expected}" if self.expected else ""), style="default")
        if self.expected:
            label.append("  ")
            bar = ProgressBar(total=self.expected, completed=done, width=min(40, width - 30))
            grid.add_row(label, bar, Text(f"  {self.settled} settled", style="dim"))
        else:
            grid.add_row(label, Text(f"  {self.settled} settled", style="dim"))
        return grid

    def _in_flight(self) -> Iterator[RenderableType]:
        calls = list(self.calls.values())
        for index in range(_CALLS):
            line = Text("calls  " if index == 0 else "       ", no_wrap=True, overflow="ellipsis")
            if index < len(calls):
                call = calls[index]
                line.append(str(call), "bold")
                where = f" on {call.worker}" if call.worker and call.status == "running" else ""
                tries = f", attempt {call.attempt}" if call.attempt > 1 else ""
                note = f", {call.note}" if call.note else ""
                line.append(f"  {call.status.replace('_', ' ')}{where}{tries}{note}", "cyan")
                more = len(calls) - _CALLS
                if index == _CALLS - 1 and more > 0:
                    line.append(f"  and {more} more", "dim")
            elif index == 0:
                line.append("none in flight", "dim")
            yield line

    def _speech(self, console: Console, width: int) -> RenderableType:
        said, style = (self.text, "default") if self.text or not self.thinking else (self.thinking, "dim italic")
        # Only the end can be in sight; wrapping a long answer ten times a second would cost more than the run.
        lines = Text(said[-width * (_TEXT_LINES + 2) :], style=style).wrap(console, width)[-_TEXT_LINES:]
        shown = Text("\n", style=style).join(lines)
        shown.append("\n" * (_TEXT_LINES - max(len(lines), 1)))
        return shown


def _moment(at: Any) -> datetime | None:
    return datetime.fromisoformat(at) if isinstance(at, str) else at


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return harmless(content)
    return harmless("".join(part.get("text", "") for part in content or [] if part.get("type") == "text"))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        leave_broken_pipe(self.file)


def console_on(stream: IO[str]) -> Console:
    """Return a console that writes to `stream`; what the stream's encoding does not know becomes `?`."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    return _Console(file=stream, highlight=False, markup=False, emoji=False)


def leave_broken_pipe(stream: IO[str]) -> NoReturn:
    """End without a word, for whoever read the stream has left (`| head`). Raises SystemExit, as if by SIGPIPE."""
    with suppress(OSError, ValueError, AttributeError):
        # What is still in the stream's buffer would fail again when Python flushes it at the end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    raise SystemExit(BROKEN_PIPE)


def draws(console: Console) -> bool:
    """Say whether the console is one to draw on, rather than to be told plain lines."""
    return console.is_terminal and not console.no_color and not console.is_dumb_terminal


def tell(console: Console, lines: Iterable[str]) -> None:
    """Print plain lines, at once and unchanged, however long."""
    for line in lines:
        console.print(line, soft_wrap=True, style=None)


def patient(
    read: Callable[[int], Iterable[SaysItself]],
    view: RunView,
    told: Callable[[list[str]], None],
    patience: timedelta = PATIENCE,
) -> Iterator[SaysItself]:
    """Yield the events of `read(after)`, and go on at the view's cursor when the database was away in between.

    The consumer applies each event to the view before it asks for the next one. `told` gets the lines that say it.
    Raises OperationalError or InterfaceError, Django's, when it was away for longer than `patience`.
    """
    since: float | None = None
    while True:
        try:
            for event in read(view.seq):
                if since is not None:
                    away = timedelta(seconds=time.monotonic() - since)
                    told(view.note(f"the database is back after {seconds(away)}", "green"))
                    since = None
                yield event
            return
        except (OperationalError, InterfaceError):
            now = time.monotonic()
            if since is None:
                since = now
                told(view.note("the database is away; its events are waited for", "red"))
            elif now - since > patience.total_seconds():
                raise
            with suppress(OperationalError, InterfaceError):
                connection.close()  # a broken one would be kept, and fail again
            time.sleep(_AGAIN_SECONDS)


@contextmanager
def unechoed() -> Iterator[None]:
    """Keep what is typed off the screen: an echoed ^C or Enter moves the lines under a drawing, which doubles its head.

    Keys still act as ever. Nothing happens where stdin is no terminal, or another process has it in the foreground.
    """
    try:
        import termios  # not everywhere
    except ImportError:
        yield
        return
    try:
        terminal = sys.stdin.fileno()
        if os.tcgetpgrp(terminal) != os.getpgrp():  # to set it from the background would stop us
            raise OSError
        before = termios.tcgetattr(terminal)
    except (OSError, ValueError, AttributeError, termios.error):
        yield
        return
    silent = before.copy()
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        with suppress(OSError, termios.error):
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@contextmanager
def drawing(view: RunView, console: Console) -> Iterator[None]:
    """Draw the view again and again while the body runs; its last picture stays."""
    with unechoed(), Live(view, console=console, refresh_per_second=10):
        yield


def follow(events: Iterable[SaysItself], view: RunView, console: Console) -> None:
    """Show the run until its events end. Raises what the iterator raises; KeyboardInterrupt leaves the last picture."""
    if not draws(console):
        for event in events:
            tell(console, view.apply(event.as_dict()))
        return
    last: list[str] = []
    with drawing(view, console):
        for event in events:
            last = view.apply(event.as_dict()) or last
    if view.finished:  # the picture shows only the end of a long answer
        said = (
            view.output if isinstance(view.output, str) else "" if view.output is None else short(view.output, 10_000)
        )
        tell(console, [*harmless(said).splitlines(), *last[-1:]])
