"""`keep_house`: the housekeeping by hand, for a deployment without beat, or after a retention setting was made shorter."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from runs import housekeeping
from runs.housekeeping import Pass, Removed
from runs.terminal import console_on, database_there, draws

WORDS = {
    "idempotency_keys": "idempotency keys",
    "workers": "workers",
    "logs": "logs of runs",
    "events": "events",
    "threads": "threads",
}


class Command(BaseCommand):
    help = (
        "Remove what the retention settings say is due: idempotency keys, workers, event logs, threads; then compact old logs."
        " Beat asks for a bounded pass of it once an hour; this goes on until nothing is due. It may be stopped at any moment."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="say what is due, and remove nothing")
        parser.add_argument("--json", action="store_true", help="print one line of JSON")

    def handle(self, *args: Any, dry_run: bool, json: bool, **options: Any) -> None:
        try:
            with database_there():
                removed = housekeeping.due() if dry_run else self._clear()
        except KeyboardInterrupt:
            self.stderr.write("\nStopped. What is left stays for the next time.")
            sys.exit(130)
        if json:
            self.stdout.write(jsonlib.dumps(housekeeping.told(removed)))
            return
        found = [f"{getattr(removed, kind):,} {words}" for kind, words in WORDS.items() if getattr(removed, kind)]
        verb = "Due to be removed" if dry_run else "Removed"
        said = [f"{verb}: {', '.join(found)}."] if found else []
        if removed.compacted:
            logs = f"{removed.compacted:,} logs of runs"
            said.append(
                f"Due to be compacted: {logs}." if dry_run else f"Compacted: {logs}, {removed.deltas:,} deltas folded."
            )
        self.stdout.write(" ".join(said) or "Nothing is due.")

    def _clear(self) -> Removed:
        with self._bar() as told:
            doing = Pass(None, told)
            while doing.run().more:
                pass
            return doing.removed

    @contextmanager
    def _bar(self) -> Iterator[Any]:
        """Yield what draws how far it is, where a person watches."""
        stream: Any = getattr(self.stderr, "_out", self.stderr)
        console = console_on(stream)
        if not draws(console):
            yield None
            return
        due = housekeeping.due()
        total = due.idempotency_keys + due.workers + due.events + due.threads + due.compacted
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("housekeeping", total=total)

            def told(removed: Removed) -> None:
                done = removed.idempotency_keys + removed.workers + removed.events + removed.threads + removed.compacted
                words = f"{removed.events:,} events, {removed.threads:,} threads removed, {removed.compacted:,} logs compacted"
                progress.update(task, completed=done, description=words)

            yield told
