"""Which errors of Postgres pass when one waits, and which are about what was asked, and come again however often it is.

A stream waits out an outage, however long. It does not wait for a column that is not there, or a permission that nobody has:
whoever asked for what cannot be read is sent away, and the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import psycopg

logger = logging.getLogger("longhaul.streams")

ERRORS = (psycopg.Error, OSError, TimeoutError)
# SQLSTATE classes: lost connection, rolled back for another's sake, no room, locked, shut down or cancelled, a disk's error.
_PASSING = ("08", "40", "53", "55", "57", "58")
_ALONE = 3  # asked for by itself; when all of them fail, it is the question

T = TypeVar("T")
R = TypeVar("R")


def passes(error: BaseException) -> bool:
    """Return whether it is worth while to ask again later."""
    if not isinstance(error, psycopg.Error):
        return isinstance(error, ERRORS)
    if error.sqlstate is not None:
        return error.sqlstate.startswith(_PASSING)
    # The client's own: of a connection, or of what it was given.
    return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)


async def apart(ask: Callable[[Sequence[T]], Awaitable[list[R]]], asked: Sequence[T]) -> list[R | None]:
    """Ask for all in one statement; where that fails for good, for each by itself. Who is the cause of it gets None.

    Raises one of ERRORS when nobody can be told anything now.
    """
    try:
        return list(await ask(asked))
    except psycopg.Error as error:
        if passes(error):
            raise
        logger.exception("What streams ask for cannot be read")
    found: list[R | None] = []
    for each in asked:  # on a new connection: it may have been what was prepared on the old one
        if len(found) == _ALONE and not any(one is not None for one in found):
            return [None] * len(asked)
        try:
            found += await ask([each])
        except psycopg.Error as error:
            if passes(error):
                raise
            found.append(None)
    return found
