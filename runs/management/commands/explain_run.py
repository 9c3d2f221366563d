"""`manage.py explain_run RUN`: why a run stands where it stands, and what would mend it."""

from __future__ import annotations

import json as json_module
from argparse import ArgumentParser
from typing import Any

from django.core.management import BaseCommand

from runs import explain
from runs.management.commands.list_runs import as_json
from runs.terminal import database_there, harmless, run_named, unread_is_no_error
from threads import clock


class Command(BaseCommand):
    help = "Says why a run stands where it stands, with the command that would mend it."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("run", help="the run's id, or a part of it that no other run has")
        parser.add_argument("--json", action="store_true", help="one JSON line")

    def handle(self, *, run: str, json: bool, **_: Any) -> None:
        with database_there():
            found = run_named(run)
            told = explain.explain(found)
            now = clock.now()
        stream: Any = getattr(self.stdout, "_out", self.stdout)
        with unread_is_no_error(stream):
            if json:
                self.stdout.write(json_module.dumps(as_json(found, told)))
                return
            self.stdout.write(f"Run {found.pk} of {harmless(found.agent)} on thread {found.thread_id}")
            self.stdout.write(
                f"{found.status} after {found.steps} step{'' if found.steps == 1 else 's'} in {found.legs}"
                f" leg{'' if found.legs == 1 else 's'}, begun {explain.span(now - found.created_at)} ago"
            )
            self.stdout.write(f"Why: {harmless(told.why)}")
            if told.mend:
                self.stdout.write(f"To mend it: {harmless(told.mend)}")
