"""`sweep_runs`: one pass over what is overdue, by hand. The control workers do this all the time."""

from __future__ import annotations

import json as jsonlib
from typing import Any

import psycopg
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import ProgrammingError, transaction

from runs import sweep


class Command(BaseCommand):
    help = (
        "Move on what is overdue: publish queued runs and calls again, take runs and calls from workers that are gone, end what"
        " passed its deadline. Control workers do this by themselves; this is for a deployment that has none."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="say what a pass would move, and change nothing")
        parser.add_argument("--json", action="store_true", help="print one line of JSON")

    def handle(self, *args: Any, dry_run: bool, json: bool, **options: Any) -> None:
        try:
            done = self._rehearse() if dry_run else self._sweep()
        except (ProgrammingError, psycopg.ProgrammingError) as error:  # the watcher's session is psycopg's own
            raise CommandError(f"The database has no tables of Longhaul yet: manage.py migrate. ({error})") from error
        if json:
            self.stdout.write(jsonlib.dumps(done))
            return
        verb = "would move" if dry_run else "moved"
        moved = [f"{key.replace('_', ' ')}: {_count(value)}" for key, value in done.items() if _count(value)]
        self.stdout.write(f"The sweep {verb}: {', '.join(moved)}." if moved else "Nothing is overdue.")

    def _sweep(self) -> dict[str, Any]:
        passing = sweep.Sweep(patient=False)
        try:
            return dict(sweep.report(sweep.total(passing.look(), passing.sweep())))
        finally:
            passing.watcher.drop()

    def _rehearse(self) -> dict[str, Any]:
        passing = sweep.Sweep(patient=False, publishes=False)
        try:
            with transaction.atomic():
                done = sweep.total(passing.look(), passing.sweep())
                transaction.set_rollback(True)
        finally:
            passing.watcher.drop()
        return dict(sweep.report(done))


def _count(value: Any) -> int:
    return len(value) if isinstance(value, list) else int(value)
