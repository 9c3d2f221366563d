"""Reading a run's events for as long as it takes, also where the database goes away in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar

from django.core.management import CommandError
from django.db import InterfaceError, OperationalError, ProgrammingError, connection

from runs.terminal.view import RunView
from runs.terminal.words import seconds
from threads import clock

PATIENCE = timedelta(minutes=5)  # how long a reader waits for a database that is away
STEADY = timedelta(seconds=2)  # of reading without an error: a reader looks once a second
_AGAIN_SECONDS = 0.5


@contextmanager
def database_there() -> Iterator[None]:
    """Raise CommandError with what to do where the body finds no database, or one without tables."""
    try:
        yield
    except ProgrammingError as error:
        raise CommandError(f"The database has no tables of Longhaul yet: manage.py migrate. ({error})") from error
    except (OperationalError, InterfaceError) as error:
        raise CommandError(f"The database is away: {first_line(error)}.") from error


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


class SaysItself(Protocol):
    """An event, as `Run.events()` yields it."""

    def as_dict(self) -> dict[str, Any]: ...


Said = TypeVar("Said", bound=SaysItself)


def database_clock() -> Callable[[], datetime]:
    """Return a clock that shows the database's time, asked for once; where it is away just now, this machine's."""
    ahead = timedelta()
    with suppress(OperationalError, InterfaceError):
        ahead = clock.now() - datetime.now(UTC)
    return lambda: datetime.now(UTC) + ahead


def patient(
    read: Callable[[int], Iterable[Said]],
    view: RunView,
    told: Callable[[list[str]], None],
    patience: timedelta = PATIENCE,
) -> Iterator[Said]:
    """Yield the events of `read(after)`, and go on at the view's cursor when the database was away in between.

    The consumer applies each event to the view before it asks for the next one. `told` gets the lines that say it.
    Raises OperationalError or InterfaceError, Django's, when it was away for longer than `patience`. An outage is over with
    the next event or, for a run may be silent for long, when the database answered and reading went on for STEADY.
    """
    since: float | None = None  # when this outage began
    answered: float | None = None  # when the database answered again, in this outage
    while True:
        try:
            for event in read(view.seq):
                since = answered = None
                yield event
            return
        except (OperationalError, InterfaceError):
            now = time.monotonic()
            if answered is not None and now - answered > STEADY.total_seconds():
                since = None
            if since is None:
                since, answered = now, None
                told(view.note("the database is away; its events are waited for", "red"))
            elif now - since > patience.total_seconds():
                raise
            _await_answer(since + patience.total_seconds())
            if answered is None:
                away = timedelta(seconds=time.monotonic() - since)
                told(view.note(f"the database is back after {seconds(away)}", "green"))
            answered = time.monotonic()


def _await_answer(until: float) -> None:
    """Wait until the database answers. Raises its error when it has not by `until`, monotonic."""
    while True:
        with suppress(OperationalError, InterfaceError):
            connection.close()  # a broken one would be kept, and fail again
        time.sleep(_AGAIN_SECONDS)
        try:
            clock.now()
        except (OperationalError, InterfaceError):
            if time.monotonic() > until:
                raise
        else:
            return
