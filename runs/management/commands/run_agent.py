"""`manage.py run_agent AGENT "input"`: start a run, and perhaps watch it."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from contextlib import suppress
from typing import IO, Any, cast
from uuid import UUID

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.core.management import BaseCommand, CommandError
from django.db import InterfaceError, OperationalError

from runs import agents, explain
from runs.exceptions import LonghaulError
from runs.models import Run
from runs.terminal import (
    RunView,
    console_on,
    database_clock,
    database_there,
    draws,
    follow,
    leave_broken_pipe,
    patient,
    tell,
    unread_is_no_error,
)
from runs.terminal.naming import SHOWN, listed
from runs.terminal.reader import first_line
from threads import clock
from threads.models import Thread

WITHOUT = {
    "agents": "the run waits",
    "tools": "its tool calls wait",
    "control": "what a dying worker leaves is not taken up",
}


class Command(BaseCommand):
    help = "Starts a run of an agent. With --follow shows it until it ends; exit 1 when it does not complete."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("agent", help="the agent's name")
        parser.add_argument("input", help="what the user says")
        parser.add_argument("--user", help="the owner's user name; without it the run is the system's")
        parser.add_argument("--thread", help="the id of a thread to go on with; a new one without it")
        parser.add_argument("--follow", action="store_true", help="show the run until it ends")
        parser.add_argument("--json", action="store_true", help="one JSON line for the run, with --follow one an event")

    def handle(
        self, *, agent: str, input: str, user: str | None, thread: str | None, follow: bool, json: bool, **_: Any
    ) -> None:
        try:
            definition = agents.get(agent)
            options: dict[str, Any] = {}
            with database_there():
                if user is not None:
                    options["owner"] = user_named(user)
                if thread is not None:
                    options["thread"] = thread_of(thread)
                run = definition.start(input, **options)
        except LonghaulError as error:
            raise CommandError(str(error)) from error
        with suppress(OperationalError, InterfaceError):  # the run is there, and is shown when the database is back
            missing = absent_workers(["agents", "control", *(["tools"] if definition.tools else [])])
            self.stderr.write(missing, ending="")
        if follow:
            show(self, run, after=0, json_lines=json)
            return
        with unread_is_no_error(getattr(self.stdout, "_out", cast("IO[str]", self.stdout))):
            if json:
                self.stdout.write(_json({"run": run.pk, "thread": run.thread_id, "agent": agent, "status": run.status}))
            else:
                self.stdout.write(f"Run {run.pk} on thread {run.thread_id} is {run.status}.")
                self.stdout.write(f"Watch it: manage.py follow_run {run.pk}")


def user_named(name: str) -> Any:
    """Return the user. Raises CommandError that names some who exist."""
    users = get_user_model()
    try:
        return users._default_manager.get_by_natural_key(name)
    except users.DoesNotExist:
        some = users._default_manager.order_by("pk").values_list(users.USERNAME_FIELD, flat=True)[: SHOWN + 1]
        raise CommandError(f"There is no user {name!r}; there {listed(some, 'manage.py createsuperuser')}") from None


def thread_of(id: str) -> Thread:
    """Return the thread. Raises CommandError that names the latest ones."""
    try:
        return Thread.objects.get(pk=id)
    except (Thread.DoesNotExist, ValidationError, ValueError):
        latest = Thread.objects.order_by("-created_at")[: SHOWN + 1]
        some = [f"{each.pk} {each.title}".rstrip() for each in latest]
        raise CommandError(f"There is no thread {id!r}; there {listed(some, 'leave out --thread')}") from None


def absent_workers(kinds: Iterable[str]) -> str:
    """Say which kinds of workers are not there, and how to start them; empty when all are."""
    now = clock.now()
    lines = []
    for kind in kinds:
        if not explain.present(kind, now):
            lines.append(f"No {kind} worker is present: {WITHOUT[kind]}. Start one:\n  {explain.start(kind)}\n")
    return "".join(lines)


def show(command: BaseCommand, run: Run, *, after: int, json_lines: bool) -> None:
    """Show the run on the command's stdout until it ends.

    Exits 1 when it does not complete, 130 on Ctrl-C, 141 when nobody reads stdout any more. Raises CommandError when the
    database stays away.
    """
    stream: Any = getattr(command.stdout, "_out", command.stdout)  # without Django's newline after each write
    console = console_on(stream)
    # Of a run that has ended only its events tell the time.
    clock = None if run.finished else database_clock()
    view = RunView(run.pk, agent=run.agent, since=run.created_at, clock=clock)
    view.seq = after

    def told(lines: list[str]) -> None:
        if json_lines:
            for line in lines:
                command.stderr.write(line.strip())
        elif not draws(console):
            tell(console, lines)

    events = patient(lambda seen: run.events(after=seen, follow=True), view, told)
    goes_on = f"manage.py follow_run {run.pk} --after"
    try:
        if json_lines:
            for event in events:
                flat = event.as_dict()
                view.apply(flat)
                stream.write(_json(flat) + "\n")
                stream.flush()
        else:
            follow(events, view, console)
    except KeyboardInterrupt:
        command.stderr.write(f"\nThe run goes on without you. Watch it again: {goes_on} {view.seq}")
        sys.exit(130)
    except BrokenPipeError:
        leave_broken_pipe(stream)
    except (OperationalError, InterfaceError) as error:
        raise CommandError(
            f"The database is away: {first_line(error)}. The run goes on when it is back. Watch it again: {goes_on} {view.seq}"
        ) from error
    if not view.finished:  # its events ended without an end
        command.stderr.write(f"The run {run.pk} was deleted.")
    if view.status != "completed":
        sys.exit(1)


def _json(value: Any) -> str:
    def plain(other: Any) -> str:
        return (
            str(other) if isinstance(other, UUID) else other.isoformat() if hasattr(other, "isoformat") else str(other)
        )

    return json.dumps(value, default=plain, ensure_ascii=False)
