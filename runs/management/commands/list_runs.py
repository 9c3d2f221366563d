"""`manage.py list_runs`: which runs there are, and which are stuck."""

from __future__ import annotations

import json as json_module
from argparse import ArgumentParser
from typing import Any

from django.core.management import BaseCommand, CommandError
from django.db.models import QuerySet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runs import explain
from runs.models import LIVE, Run, Status
from runs.terminal import console_on, database_there, harmless, one_line, tell, unread_is_no_error
from threads import clock


class Command(BaseCommand):
    help = "Lists runs, the latest first. --stuck: those that wait for what is not there."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--active", action="store_true", help="only runs that have not ended")
        parser.add_argument("--stuck", action="store_true", help="only runs that nothing moves on as things are")
        parser.add_argument("--agent", action="append", metavar="A", help="only runs of this agent; may be repeated")
        parser.add_argument(
            "--status", action="append", choices=Status.values, help="only runs of this status; may be repeated"
        )
        parser.add_argument("--limit", type=int, default=50, help="at most so many (50)")
        parser.add_argument("--json", action="store_true", help="one JSON line a run")

    def handle(
        self,
        *,
        active: bool,
        stuck: bool,
        agent: list[str] | None,
        status: list[str] | None,
        limit: int,
        json: bool,
        **_: Any,
    ) -> None:
        if limit < 1:
            raise CommandError("--limit is at least 1.")
        runs: QuerySet[Run] = Run.objects.order_by("-created_at", "-pk")
        if active or stuck:
            runs = runs.filter(status__in=LIVE)
        if agent:
            runs = runs.filter(agent__in=agent)
        if status:
            runs = runs.filter(status__in=status)
        with database_there():
            rows = []
            for run in runs.iterator(200) if stuck else runs[: limit + 1]:
                told = explain.explain(run)
                if not stuck or told.stuck:
                    rows.append((run, told))
                if len(rows) > limit:
                    break
            now = clock.now()
        stream: Any = getattr(self.stdout, "_out", self.stdout)
        with unread_is_no_error(stream):
            if json:
                for run, told in rows[:limit]:
                    self.stdout.write(json_module.dumps(as_json(run, told)))
            elif rows:
                shown = [
                    (str(run.pk), explain.span(now - run.created_at), run.agent, told.why) for run, told in rows[:limit]
                ]
                _show(console_on(stream), shown)
                if len(rows) > limit:
                    self.stdout.write(f"There are more: --limit {limit * 2}")
            elif agent or status:
                self.stdout.write("No run is like that.")
            else:
                self.stdout.write(
                    "No run is stuck." if stuck else "No run is active." if active else "There are no runs."
                )


def _show(console: Console, rows: list[tuple[str, str, str, str]]) -> None:
    """Print id, age, agent and why of each run: a line a run for `grep`, a table of the terminal's width for people."""
    if not console.is_terminal:
        wide = max(5, *(len(age) for _, age, _, _ in rows))
        tell(console, [f"{'run':36}  {'age':>{wide}}  agent and why"])
        tell(console, (f"{id:36}  {age:>{wide}}  {one_line(f'{agent}: {why}')}" for id, age, agent, why in rows))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    # The id stays whole, for it is what the next command is given; the reason takes what is left.
    table.add_column("run", no_wrap=True, overflow="ignore", min_width=36)
    table.add_column("age", no_wrap=True, justify="right", min_width=5)
    table.add_column("agent and why", overflow="fold", ratio=1)
    for id, age, agent, why in rows:
        text = Text(f"{harmless(agent)}: ", style="bold").append(Text(harmless(why), style=""))
        table.add_row(id, age, text)
    console.print(table)


def as_json(run: Run, told: explain.Explanation) -> dict[str, Any]:
    """Return a run as scripts read it. Its output is left out: `follow_run RUN --json` ends with it."""
    return {
        "run": str(run.pk),
        "thread": str(run.thread_id),
        "agent": run.agent,
        "status": run.status,
        "stop_reason": run.stop_reason,
        "error": run.error,
        "origin": run.origin,
        "parent": run.parent_id and str(run.parent_id),
        "priority": run.priority,
        "steps": run.steps,
        "legs": run.legs,
        "last_seq": run.last_seq,
        "usage": {"input_tokens": run.input_tokens, "output_tokens": run.output_tokens, "cost": float(run.cost)},
        "created_at": run.created_at.isoformat(),
        "started_at": run.started_at and run.started_at.isoformat(),
        "finished_at": run.finished_at and run.finished_at.isoformat(),
        "why": told.why,
        "mend": told.mend,
        "stuck": told.stuck,
    }
