"""`manage.py cancel_run RUN`: end a run, at once and for good."""

from __future__ import annotations

import json as json_module
from argparse import ArgumentParser
from typing import Any

from django.core.management import BaseCommand

from runs import explain
from runs.management.commands.list_runs import as_json
from runs.terminal import database_there, harmless, run_named, unread_is_no_error


class Command(BaseCommand):
    help = "Cancels a run, at once and for good. One that has ended stays as it is, which is no error."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("run", help="the run's id, or a part of it that no other run has")
        parser.add_argument("--reason", default="", metavar="TEXT", help="why; it stands in the run's error")
        parser.add_argument("--json", action="store_true", help="one JSON line: the run as it is now")

    def handle(self, *, run: str, reason: str, json: bool, **_: Any) -> None:
        with database_there():
            found = run_named(run)
            before = found.status
            found.cancel(reason)
            told = explain.explain(found)
        stream: Any = getattr(self.stdout, "_out", self.stdout)
        with unread_is_no_error(stream):
            if json:
                self.stdout.write(json_module.dumps(as_json(found, told)))
            elif found.status == "cancelled" and before != "cancelled":
                self.stdout.write(f"Run {found.pk} of {harmless(found.agent)} is cancelled; it was {before}.")
            else:
                self.stdout.write(f"Run {found.pk} had ended before, nothing was changed: {harmless(told.why)}")
