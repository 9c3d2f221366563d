"""The demo's live view: the run, the processes that carry it, and what happened to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.markdown import Markdown
from rich.rule import Rule
from rich.text import Text

from agents_project.demo.verdict import Verdict, milliseconds
from runs.terminal import Canvas, Note, RunView, draws, harmless, place, tell


@dataclass
class _Wait:
    """What a kill has stopped: whose event ends the wait, and the words for it."""

    at: datetime
    ends: str  # the type of event
    words: str
    note: Note


class DemoView(RunView):
    """The demo's run, with its processes below the head. `processes` says for each name whether it is ready."""

    def __init__(
        self,
        run: UUID | str,
        *,
        agent: str,
        since: datetime | None,
        expected: int | None,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        super().__init__(run, agent=agent, since=since, expected=expected, clock=clock)
        self.processes: dict[str, bool] = {}
        self.dead: list[str] = []  # killed on purpose
        self._waits: list[_Wait] = []

    def killed(self, kind: str, worker: str, pid: int, at: datetime, doing: str, successor: str) -> list[str]:
        """Tell a kill; its recovery is told by the event that shows it."""
        with self._lock:
            self.dead.append(worker)
            self.processes.pop(worker, None)
            self.since = self.since or at
            note = Note(
                self._age(at), f"kill -9 {worker} {doing.replace('in the middle of', 'in')}", "bold red", open=True
            )
            self.notes.append(note)
            ends, words = ("leg.started", "the run goes on with")
            if kind == "tools":
                ends, words = ("tool_call.started", "tools run again on")
            self._waits.append(_Wait(at, ends, words, note))
            return [
                self._timed(f"kill -9 {worker} (process {pid}) {doing}", at),
                self._timed(f"{successor} takes its place", at),
            ]

    def apply(self, event: Mapping[str, Any]) -> list[str]:
        with self._lock:
            lines = super().apply(event)
            for wait in list(self._waits):
                if event["type"] == wait.ends and self.now is not None and self.now > wait.at:
                    self._waits.remove(wait)
                    where = place(str(event.get("worker", "")))
                    after = f"{milliseconds(self.now - wait.at)} ms"
                    wait.note.open, wait.note.outcome = False, f"on {where} after {after}"
                    lines.append(self._timed(f"{wait.words} {where}, {after} after the kill"))
            return lines

    def _extra(self, canvas: Canvas) -> Iterator[Text]:
        busy = Counter(call.worker for call in self.calls.values() if call.status == "running")
        line = Text("workers")
        for name, ready in self.processes.items():
            if name == self.holder:
                line.append(f"  {name} {'has the run' if self.status == 'running' else 'waits'}", "bold cyan")
            elif name in busy:
                line.append(f"  {name} {busy[name]} call{'' if busy[name] == 1 else 's'}", "cyan")
            else:
                line.append(f"  {name}{'' if ready else ' starts'}", "default" if ready else "yellow")
        for name in reversed(self.dead):
            if line.cell_len + len(name) + 9 <= canvas.width:
                line.append(f"  {name} killed", "red")
        yield canvas.line(line)


def summarize(console: Console, verdict: Verdict) -> None:
    """Print every claim with what the database says."""
    figures = verdict.figures
    if not draws(console):
        tell(console, ["", "What the database says:"])
        tell(console, (f"  {'yes' if c.true else 'NO '}  {c.text} ({c.found})" for c in verdict.claims))
        return
    console.print()
    console.print(Rule("What the database says", style="dim"))
    canvas = Canvas.of(console)
    for claim in verdict.claims:
        left = Text("yes  ", "bold green") if claim.true else Text("NO   ", "bold red")
        console.print(canvas.line(left.append(claim.text, "default"), Text(claim.found, "dim")))
    if "legs_by_reason" in figures:
        legs = ", ".join(f"{count} {reason or 'open'}" for reason, count in figures["legs_by_reason"].items())
        said = f"{figures['steps']} steps in {figures['legs']} legs ({legs}), {figures['duration_s']} s"
    else:
        said = f"{figures['steps']} steps in {figures['legs']} legs, {figures['duration_s']} s"
    console.print(Text(said, style="dim"))


def show_report(console: Console, verdict: Verdict) -> None:
    """Print the audit's report as a page; in a pipe its lines have been told as they came."""
    if draws(console):
        console.print()
        console.print(Markdown(harmless(verdict.figures["report"])), width=min(console.width, 100))
