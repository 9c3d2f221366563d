"""What a reader has seen of a run, folded from its events and from nothing else: the same live, late or played again.

On a terminal it draws itself, again and again, from 80 columns and 24 lines on; in a pipe it is told as plain lines, one a
fact, the model's text as it fills a line.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from runs.terminal.canvas import WIDTH, Canvas
from runs.terminal.words import ENDS, harmless, one_line, place, seconds, short, text_of

LONGEST_ROW = 200  # characters of a line that begins as a table's row does
_CALLS = 10  # that are in sight, where there is room
_NOTES = 16
_RECENT = 200  # calls that are remembered, to be shown settled
_CHAIN_LINES = 2
_SHORTEST_LINK = 9  # cells of the chain: `1 lost` and an arrow
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


@dataclass
class LegSeen:
    number: int
    worker: str
    reason: str = ""  # empty while it is open


@dataclass
class CallSeen:
    name: str
    arguments: Mapping[str, Any] | str = field(default_factory=dict)  # a text: what the model wrote is no JSON object
    status: str = "requested"
    attempt: int = 1
    worker: str = ""
    started: datetime | None = None
    note: str = ""
    outcome: str = ""  # once it is settled
    result: str = ""  # in short, or why it failed
    took: timedelta = timedelta()

    def __str__(self) -> str:
        given = self.arguments
        inner = given if isinstance(given, str) else ", ".join(f"{k}={short(v, 40)}" for k, v in given.items())
        return one_line(f"{self.name}({inner[:120]})")


@dataclass
class Note:
    """A remark that stays in sight. While it is `open` the time since it is shown, then its `outcome`."""

    age: timedelta  # of the run, when it happened
    text: str
    style: str = ""
    open: bool = False
    outcome: str = ""


class RunView:
    """What a reader has seen of a run so far.

    `apply` takes one event and returns the plain lines that tell it; rich draws the whole. Both may be called from
    threads of their own. `since` is the moment that times count from (the first event seen, if not given), `expected`
    the number of steps to come, if somebody knows it; `clock` gives the database's time, for what a drawing shows of a
    moment between two events (none: that of the last event).
    """

    def __init__(
        self,
        run: UUID | str,
        *,
        agent: str = "",
        since: datetime | None = None,
        expected: int | None = None,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self.run = str(run)
        self.agent = agent
        self.since = since
        self.expected = expected
        self.clock = clock
        self.seq = 0
        self.now = since
        self.status = ""
        self.stop_reason = ""
        self.steps = 0
        self.legs: list[LegSeen] = []
        self.calls: dict[str, CallSeen] = {}  # the open ones, by id
        self.recent: deque[CallSeen] = deque(maxlen=_RECENT)  # open and settled, in the order of their beginning
        self.settled = 0
        self.discarded = 0
        self.output: Any = None
        self.error: Mapping[str, Any] | None = None
        self.text = ""
        self.thinking = ""
        self.notes: deque[Note] = deque(maxlen=_NOTES)
        self._message = ""  # whose text is shown
        self._unsaid = ""  # of the text, what is not a whole line yet
        self._call_rows = self._chain_lines = 0  # drawn so far: they grow, so that what stands below does not jump
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
            at = at or self._present()
            if at is not None and self.since is None:
                self.since = at
            self.notes.append(Note(self._age(at), text, style))
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
                self._forget(list(self.calls))
                yield from self._rest_of_text()
                yield f"run {verb} ({self.stop_reason})" + (f": {self._why()}" if self.error else "")
            case _:
                return

    def note_only(self, text: str, style: str = "") -> Iterator[str]:
        """Add a remark from within the fold, whose caller adds the time."""
        self.notes.append(Note(self._age(None), text, style))
        yield text

    def _why(self) -> str:
        error = self.error or {}
        return one_line(f"{error.get('code', '')}: {error.get('message', '')}".strip(": "))

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
        yield from self.note_only(text, "red") if reason == "failed" else (text,)

    def _said(self, verb: str, event: Mapping[str, Any]) -> Iterator[str]:
        message = str(event.get("message", ""))
        if event.get("role") == "user" and verb == "completed":
            for line in text_of(event.get("content")).splitlines() or [""]:
                yield f"user: {line}"
        elif event.get("role") != "assistant":
            return
        elif verb == "discarded" and event.get("reason") == "rolled_back":
            return  # it was complete; the end of the run says why
        elif verb == "created":
            self.status = "running"  # also when a lingering leg has claimed again, which no event of its own tells
            self._listen(message)
        elif verb == "discarded":
            self.discarded += 1
            yield from self._rest_of_text()
            reason = ENDS.get(str(event.get("reason", "")), event.get("reason", ""))
            yield from self.note_only(f"the message that was cut is discarded: {reason}", "red")
            self._listen("")
            self._forget([key for key, call in self.calls.items() if call.status == "asked"])
        elif verb == "completed":
            if message != self._message:  # the cursor stands behind its deltas
                self._listen(message)
            if not self.text:
                yield from self._delta("delta", {"message": message, "text": text_of(event.get("content"))})
            yield from self._rest_of_text()
            if not event.get("partial"):
                self.steps = max(self.steps, int(event.get("step") or 0))
                yield from self._asked_at_once(event.get("content"))

    def _asked_at_once(self, content: Any) -> Iterator[str]:
        parts = [part for part in content if part.get("type") == "tool_call"] if isinstance(content, list) else []
        if len(parts) > 1:
            names = Counter(one_line(str(part.get("name", ""))) for part in parts)
            said = ", ".join(name if count == 1 else f"{count} {name}" for name, count in names.items())
            yield f"{len(parts)} tool calls at once: {said}"

    def _forget(self, keys: Iterable[str]) -> None:
        """Take calls out of sight that no settlement will end."""
        gone = {id(self.calls.pop(key)) for key in keys}
        if gone:
            self.recent = deque((call for call in self.recent if id(call) not in gone), _RECENT)

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
        call = self.calls.get(key)
        if call is None:
            call = self.calls[key] = CallSeen(str(event.get("name", "")))
            self.recent.append(call)
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
                fraction, said = event.get("fraction"), one_line(str(event.get("note") or ""))
                call.note = " ".join(filter(None, ("" if fraction is None else f"{fraction:.0%}", said)))
            case "retrying":
                call.status, call.attempt = "retrying", int(event.get("attempt", call.attempt + 1))
                error = event.get("error") or {}
                code = error.get("code", "failed")
                why = "its worker died" if code == "worker_lost" else one_line(str(error.get("message") or code))
                yield from self.note_only(f"{call} will be tried again: {why}", "red")
            case "settled":
                self.settled += 1
                self.calls.pop(key, None)
                call.status, call.outcome = "settled", str(event.get("outcome", ""))
                took = ""
                if self.now and call.started:
                    call.took = self.now - call.started
                    took = f" after {seconds(call.took)}"
                where = f" on {call.worker}" if call.worker else ""
                if call.outcome == "success":
                    call.result = short(event.get("result"))
                    yield f"{call} -> {call.result}{took}{where}"
                else:
                    error = event.get("error") or {}
                    why = call.result = one_line(str(error.get("message") or error.get("code") or ""))
                    yield from self.note_only(f"{call} {event.get('outcome')}: {why}".rstrip(": "), "red")
            case "denied" | "assigned" | "extended" | "approved":
                yield f"{call} {verb}"
            case _:
                call.status = verb
                yield from self.note_only(f"{call} is {verb.replace('_', ' ')}", "magenta")

    def _error(self, verb: str, event: Mapping[str, Any]) -> Iterator[str]:
        error = event.get("error") if isinstance(event.get("error"), Mapping) else event
        assert isinstance(error, Mapping)
        said = one_line(f"{error.get('code', '')}: {error.get('message', '')}".strip(": "))
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
            yield from self._draw(Canvas.of(console, options))

    def _draw(self, canvas: Canvas) -> Iterator[RenderableType]:
        head = [self._head(canvas), *self._extra(canvas), *self._chain(canvas), self._progress(canvas)]
        speech = self._speech(canvas)
        notes = list(self.notes)[-max(1, (canvas.height - len(head) - len(speech)) // 2 - 1) :]
        about_notes = 1 + len(notes) if notes else 0
        room = canvas.height - len(head) - len(speech) - 2 - about_notes
        yield from head
        yield self._rule(canvas, "the model says")
        yield from speech
        yield self._rule(canvas, self._about_calls())
        yield from self._calls_in_sight(canvas, max(1, min(room, _CALLS)))
        if notes:
            yield self._rule(canvas, "what happened")
            yield from (self._noted(canvas, note) for note in notes)

    def _extra(self, canvas: Canvas) -> Iterator[Text]:
        """What a view for more than the run adds below the head, in lines of the canvas's width at most."""
        yield from ()

    def _present(self) -> datetime | None:
        """Return the moment to draw: that of the clock while the run goes on, else that of the last event."""
        if self.clock is None or self.finished or self.now is None:
            return self.now
        return max(self.clock(), self.now)

    def _head(self, canvas: Canvas) -> Text:
        left = Text.assemble((self.agent or "run", "bold"), "  ", (self.run, "dim"))
        status = self.status.replace("_", " ") or "..."
        holder = f" on {self.holder}" if self.holder and self.status == "running" else ""
        right = Text.assemble(
            (status + holder, _STYLES.get(self.status, "")), f"  {seconds(self._age(self._present()))}"
        )
        return canvas.line(left, right)

    def _chain(self, canvas: Canvas) -> list[Text]:
        """Return the legs, each with how it ended; of a chain longer than two lines the last ones."""
        # More than so many do not fit: to try with all of a thousand legs, ten times a second, takes more than a core.
        least = max(0, len(self.legs) - _CHAIN_LINES * canvas.width // _SHORTEST_LINK)
        links: list[Text] = []
        for leg in self.legs[least:]:
            link = Text(f"{leg.number} ", "bold")
            if leg.reason:
                link.append(leg.reason, _STYLES.get(leg.reason, "default"))
            else:
                link.append(f"on {place(leg.worker)}", "bold cyan")
            links.append(link)
        if not self.finished and not self.holder:
            waits = {"": "not started"}.get(self.status, self.status.replace("_", " "))
            links.append(Text(f"({waits})", "yellow"))
        arrow = Text(f" {canvas.marks['then']} ", "dim")
        for first in range(least, len(self.legs) + 1):
            earlier = [Text(f"({first} earlier)", "dim")] if first else []
            lines = canvas.flow("legs     ", [*earlier, *links[first - least :]], arrow)
            if len(lines) <= _CHAIN_LINES:
                break
        self._chain_lines = max(self._chain_lines, len(lines))
        return [*lines, *[Text() for _ in range(self._chain_lines - len(lines))]]

    def _progress(self, canvas: Canvas) -> Text:
        line = Text("steps    ")
        steps = min(self.steps, self.expected or self.steps)  # the answer at the end may be one more
        line.append(f"{steps}" + (f"/{self.expected}" if self.expected else ""), "bold")
        if self.expected:
            cells = max(10, min(40, canvas.width - 40))
            done = round(cells * steps / self.expected)
            line.append("  ").append(canvas.marks["done"] * done, "green")
            line.append(canvas.marks["to do"] * (cells - done), "dim")
        line.append(f"  {self.settled} tool call{'' if self.settled == 1 else 's'} settled", "dim")
        return canvas.line(line)

    def _rule(self, canvas: Canvas, title: str) -> Text:
        dash = canvas.marks["rule"]
        line = Text(f"{dash * 2} ", "dim").append(title, "dim bold").append(" ")
        return canvas.line(line.append(dash * max(0, canvas.width - line.cell_len - 1), "dim"))

    def _about_calls(self) -> str:
        running = sum(call.status == "running" for call in self.calls.values())
        said = f"tool calls: {running} running" if running else "tool calls"
        others = len(self.calls) - running
        return f"{said}{',' if running else ':'} {others} waiting" if others else said

    def _calls_in_sight(self, canvas: Canvas, rows: int) -> Iterator[Text]:
        """Yield the open calls, and of the settled ones the latest, in the order that they were asked for."""
        waiting = [call for call in self.recent if call.status != "settled"]
        hidden = len(self.calls) - rows
        if hidden > 0:  # the running ones are those to see
            hidden += 1
            shown = sorted(self.calls.values(), key=lambda call: call.status != "running")[: rows - 1]
        else:
            fill = rows - len(waiting)
            settled = [call for call in self.recent if call.status == "settled"]
            kept = {id(call) for call in [*waiting, *(settled[-fill:] if fill else [])]}
            shown = [call for call in self.recent if id(call) in kept]
        lines = [self._call_line(canvas, call) for call in shown]
        if hidden > 0:
            lines.append(Text(f"  and {hidden} more", "dim"))
        self._call_rows = min(rows, max(self._call_rows, len(lines)))
        yield from lines
        yield from (Text() for _ in range(self._call_rows - len(lines)))

    def _call_line(self, canvas: Canvas, call: CallSeen) -> Text:
        name = str(call)
        tries = f", attempt {call.attempt}" if call.attempt > 1 else ""
        where = f" on {call.worker}" if call.worker else ""
        if call.status == "settled":
            good = call.outcome == "success"
            left = Text(f"{canvas.marks['good' if good else 'bad']} ", "green" if good else "bold red").append(name)
            left.append(f" {canvas.marks['then']} {call.result}" if call.result else "", "dim")
            return canvas.line(left, Text(f"{seconds(call.took)}{where}{tries}", "dim"))
        if call.status == "running":
            now = self._present()
            took = f"  {seconds(now - call.started)}" if now and call.started else ""
            note = f", {call.note}" if call.note else ""
            left = Text(f"{canvas.marks['runs']} ", "bold cyan").append(name, "bold")
            return canvas.line(left, Text(f"running{where}{tries}{note}{took}", "cyan"))
        words = {"asked": "being asked for", "requested": "waits for a worker", "retrying": "is tried again"}
        left = Text(f"{canvas.marks['waits']} ", "yellow").append(name)
        said = words.get(call.status, call.status.replace("_", " "))
        return canvas.line(left, Text(f"{said}{tries}", "yellow"))

    def _noted(self, canvas: Canvas, note: Note) -> Text:
        left = Text(f"{note.age.total_seconds():5.1f} s  ", "dim").append(note.text, note.style or "default")
        if not note.open:
            return canvas.line(left, Text(note.outcome, "bold green"))
        return canvas.line(left, Text(f"{seconds(self._age(self._present()) - note.age)} ...", "bold yellow"))

    def _speech(self, canvas: Canvas) -> list[Text]:
        """Return the end of what the model says, in a fixed number of lines, so that what stands below does not jump."""
        rows = 3 if canvas.height < 30 else 6
        said, style = (self.text, "default") if self.text or not self.thinking else (self.thinking, "dim italic")
        # Only the end can be in sight; wrapping a long answer ten times a second would cost more than the run.
        lines = canvas.wrapped(said[-canvas.width * (rows + 2) :])[-rows:]
        return [*(Text(line, style) for line in lines), *[Text() for _ in range(rows - len(lines))]]


def _moment(at: Any) -> datetime | None:
    return datetime.fromisoformat(at) if isinstance(at, str) else at
