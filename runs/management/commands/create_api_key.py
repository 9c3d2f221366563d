"""`manage.py create_api_key --user U`: make a key of the HTTP API."""

from __future__ import annotations

import json as json_module
from argparse import ArgumentParser, ArgumentTypeError
from datetime import timedelta
from typing import Any

from django.core.management import BaseCommand, CommandError
from django.views.decorators.debug import sensitive_variables

from runs.http.json import time
from runs.management.commands.run_agent import user_named
from runs.terminal import database_there, harmless
from threads.authentication import create_key
from threads.models import ApiKey

LONGEST = 36_500  # days


def days(given: str) -> int:
    """Read a number of days. Raises ArgumentTypeError."""
    try:
        read = int(given)
    except ValueError:
        read = 0
    if not 1 <= read <= LONGEST:
        raise ArgumentTypeError(f"give a whole number of days from 1 to {LONGEST:,}, not {given!r}")
    return read


class Command(BaseCommand):
    help = "Makes a key of the HTTP API for a user, and prints it: this once, for only its digest is stored."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--user", required=True, help="the user's name, as they sign in: the key acts for them")
        parser.add_argument("--name", default="", help="what it is for; people know it by that")
        parser.add_argument("--expires", type=days, metavar="DAYS", help="after how many days it is no longer taken")
        parser.add_argument("--json", action="store_true", help="one JSON line: the key and what is known of it")

    @sensitive_variables("key")
    def handle(self, *, user: str, name: str, expires: int | None, json: bool, **_: Any) -> None:
        longest = ApiKey._meta.get_field("name").max_length or 0
        for said in (user, name):
            if "\0" in said or not said.isprintable():
                raise CommandError("A name holds printable characters only.")
        if len(name) > longest:
            raise CommandError(f"The key's name has {len(name)} characters; it may have {longest}.")
        with database_there():
            owner = user_named(user)
            if not owner.is_active:
                raise CommandError(f"The user {user!r} is not active: no key of theirs is taken.")
            row, key = create_key(owner, name, lasts=None if expires is None else timedelta(days=expires))
            row.refresh_from_db()
        if json:
            told = {"key": key, "id": str(row.pk), "user": owner.get_username(), "name": row.name}
            self.stdout.write(json_module.dumps({**told, "expires_at": time(row.expires_at)}))
            return
        until = "" if row.expires_at is None else f", until {row.expires_at:%Y-%m-%d %H:%M} UTC"
        self.stderr.write(f"A key for {harmless(owner.get_username())}{until}. It is not shown again:")
        self.stdout.write(key)
