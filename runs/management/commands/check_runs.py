"""`manage.py check_runs`: count the violations of each invariant."""

from __future__ import annotations

import json as json_module
import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management import BaseCommand, CommandError
from django.db import ProgrammingError

from runs import invariants
from runs.terminal import harmless, run_named


class Command(BaseCommand):
    help = "Counts the violations of each invariant over the database, or of one run. Exit 1 when there is any."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--run", help="only this run: its id, or a part of it that no other run has")
        parser.add_argument("--json", action="store_true", help='{"violations": {"1": 0, ..., "8": 0}, "runs": n}')

    def handle(self, *, run: str | None, json: bool, **_: Any) -> None:
        try:
            report = invariants.check(None if run is None else run_named(run).pk)
        except ProgrammingError as error:
            raise CommandError(f"The database has no tables of Longhaul yet: manage.py migrate. ({error})") from error
        if json:
            self.stdout.write(json_module.dumps({"violations": report.violations, "runs": report.runs}))
        else:
            self._tell(report)
        if not report.clean:
            sys.exit(1)

    def _tell(self, report: invariants.Report) -> None:
        runs = f"{report.runs} run{'' if report.runs == 1 else 's'}"
        if report.clean:
            self.stdout.write(f"{runs}, no invariant violated.")
            return
        told = ""
        for found in report.findings:
            if told != found["rule"]:
                told = found["rule"]
                self.stdout.write(f"Invariant {found['invariant']}: {told}")
            self.stdout.write(f"  run {found['run'] or '(of none)'}: {harmless(found['what'])}")
        total = sum(report.violations.values())
        more = total - len(report.findings)
        if more:
            self.stdout.write(f"  and {more} more of the same kinds")
        broken = ", ".join(f"{count} of invariant {number}" for number, count in report.violations.items() if count)
        self.stdout.write(f"{runs}, {total} violation{'' if total == 1 else 's'}: {broken}.")
