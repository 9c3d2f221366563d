"""The demo's live view: the run, the processes that carry it, and what happened to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from rich.console import Console, RenderableType
from rich.markdown import Markdown
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from agents_project.demo.verdict import Verdict, milliseconds
from runs.terminal import RunView, draws, harmless, tell


class DemoView(RunView):
    """The demo's run, with its processes below the head. `processes` says for each name whether it is ready."""

    def __init__(self, run: UUID | str, *, agent: str, since: datetime | None, expected: int | None) -> None:
        super().__init__(run, agent=agent, since=since, expected=expected)
        self.processes: dict[str, bool] = {}
        self.dead: dict[str, int] = {}  # killed on purpose -> its pid
        self._resuming: list[tuple[datetime, str, str]] = []  # of each kill: when, whose event ends the wait, in words

    def killed(self, kind: str, worker: str, pid: int, at: datetime, doing: str, successor: str) -> list[str]:
        """Tell a kill; its recovery is told by the event that shows it."""
        with self._lock:
            self.dead[worker] = pid
            self.processes.pop(worker, None)
            if kind == "agents":
                self._resuming.append((at, "leg.started", "the run goes on with"))
            else:
                self._resuming.append((at, "tool_call.started", "tools run again on"))
        lines = self.note(f"kill -9 {worker} (process {pid}) {doing}", "bold red", at)
        return [*lines, *self.note(f"{successor} takes its place", "yellow", at)]

    def apply(self, event: Mapping[str, Any]) -> list[str]:
        with self._lock:
            lines = super().apply(event)
            for awaited in list(self._resuming):
                at, kind, words = awaited
                if event["type"] == kind and self.now is not None and self.now > at:
                    self._resuming.remove(awaited)
                    where = str(event.get("worker", "")).partition("@")[0]
                    lines += self.note(
                        f"{words} {where}, {milliseconds(self.now - at)} ms after the kill", "bold green", self.now
                    )
            return lines

    def _extra(self, width: int) -> Iterator[RenderableType]:
        line = Text("where  ", overflow="fold")
        for name, ready in self.processes.items():
            holds = name == self.holder
            line.append("* " if holds else "  " if ready else "~ ", "bold cyan")
            line.append(name, "bold cyan" if holds else "default" if ready else "dim yellow")
            line.append(" ")
        for name in self.dead:
            line.append(f" x {name}", "red")
        yield line


def summarize(console: Console, verdict: Verdict) -> None:
    """Print every claim with what the database says."""
    figures = verdict.figures
    if not draws(console):
        tell(console, ["", "What the database says:"])
        tell(console, (f"  {'yes' if c.true else 'NO '}  {c.text} ({c.found})" for c in verdict.claims))
        return
    console.print()
    console.print(Rule("What the database says", style="dim"))
    grid = Table.grid(padding=(0, 1))
    for claim in verdict.claims:
        mark = Text("yes", "bold green") if claim.true else Text("NO", "bold red")
        grid.add_row(mark, Text(claim.text), Text(claim.found, style="dim"))
    console.print(grid)
    if "legs_by_reason" in figures:
        legs = ", ".join(f"{count} {reason or 'open'}" for reason, count in figures["legs_by_reason"].items())
        said = f"{figures['steps']} steps in {figures['legs']} legs ({legs}), {figures['duration_s']} s"
    else:
        said = f"{figures['steps']} steps, {figures['tool_calls']} calls, {figures['duration_s']} s"
    console.print(Text(said, style="dim"))


def show_report(console: Console, verdict: Verdict) -> None:
    """Print the audit's report as a page; in a pipe its lines have been told as they came."""
    if draws(console):
        console.print()
        console.print(Markdown(harmless(verdict.figures["report"])), width=min(console.width, 100))
