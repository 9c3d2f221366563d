"""`manage.py follow_run RUN`: watch a run, live or afterwards, from any of its events on."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management import BaseCommand, CommandError

from runs.management.commands.run_agent import absent_workers, show
from runs.models import TERMINAL
from runs.terminal import database_there, run_named


class Command(BaseCommand):
    help = "Shows a run until it ends; exit 1 when it does not complete."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("run", help="the run's id, or a part of it that no other run has")
        parser.add_argument(
            "--after", type=int, default=0, metavar="SEQ", help="begin after this event (0: from the first)"
        )
        parser.add_argument("--json", action="store_true", help="one JSON line an event")

    def handle(self, *, run: str, after: int, json: bool, **_: Any) -> None:
        if after < 0:
            raise CommandError("--after is the seq of the last event you have seen: 0 or more.")
        with database_there():
            found = run_named(run)
            if found.status not in TERMINAL:
                self.stderr.write(absent_workers(["agents", "control"]), ending="")
        if found.status in TERMINAL and after >= found.last_seq:
            raise CommandError(
                f"The run has {found.status}, and its last event is {found.last_seq}: nothing comes after."
            )
        if after > found.last_seq:
            raise CommandError(
                f"The run's last event so far is {found.last_seq}: --after is the seq of the last event you have seen."
            )
        show(self, found, after=after, json_lines=json)
