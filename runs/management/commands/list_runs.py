"""`manage.py list_runs`: which runs there are, and which are stuck."""

from __future__ import annotations

import json as json_module
from argparse import ArgumentParser
from typing import Any

from django.core.management import BaseCommand, CommandError
from django.db import ProgrammingError
from django.db.models import QuerySet
from rich.table import Table
from rich.text import Text

from runs import explain
from runs.models import LIVE, Run
from runs.terminal import console_on, harmless
from threads import clock


class Command(BaseCommand):
    help = "Lists runs, the latest first. --stuck: those that wait for what is not there."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--active", action="store_true", help="only runs that have not ended")
        parser.add_argument("--stuck", action="store_true", help="only runs that nothing moves on as things are")
        parser.add_argument("--limit", type=int, default=50, help="at most so many (50)")
        parser.add_argument("--json", action="store_true", help="one JSON line a run")

    def handle(self, *, active: bool, stuck: bool, limit: int, json: bool, **_: Any) -> None:
        if limit < 1:
            raise CommandError("--limit is at least 1.")
        runs: QuerySet[Run] = Run.objects.order_by("-created_at", "-pk")
        if active or stuck:
            runs = runs.filter(status__in=LIVE)
        try:
            rows = []
            for run in runs.iterator(200) if stuck else runs[: limit + 1]:
                told = explain.explain(run)
                if not stuck or told.stuck:
                    rows.append((run, told))
                if len(rows) > limit:
                    break
            now = clock.now()
        except ProgrammingError as error:
            raise CommandError(f"The database has no tables of Longhaul yet: manage.py migrate. ({error})") from error
        for run, told in rows[:limit] if json else []:
            self.stdout.write(json_module.dumps(as_json(run, told)))
        if json:
            return
        stream: Any = getattr(self.stdout, "_out", self.stdout)
        if not rows:
            what = "No run is stuck." if stuck else "No run is active." if active else "There are no runs."
            self.stdout.write(what)
            return
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        # The id stays whole, for it is what the next command is given; the reason takes what is left.
        table.add_column("run", no_wrap=True, overflow="ignore", min_width=36)
        table.add_column("age", no_wrap=True, justify="right", min_width=5)
        table.add_column("agent and why", overflow="fold", ratio=1)
        for run, told in rows[:limit]:
            text = Text(f"{harmless(run.agent)}: ", style="bold").append(Text(harmless(told.why), style=""))
            table.add_row(str(run.pk), explain.span(now - run.created_at), text)
        console_on(stream).print(table)
        if len(rows) > limit:
            self.stdout.write(f"There are more: --limit {limit * 2}")


def as_json(run: Run, told: explain.Explanation) -> dict[str, Any]:
    """Return a run as scripts read it."""
    return {
        "run": str(run.pk),
        "thread": str(run.thread_id),
        "agent": run.agent,
        "status": run.status,
        "stop_reason": run.stop_reason,
        "steps": run.steps,
        "legs": run.legs,
        "last_seq": run.last_seq,
        "created_at": run.created_at.isoformat(),
        "finished_at": run.finished_at and run.finished_at.isoformat(),
        "why": told.why,
        "mend": told.mend,
    }
