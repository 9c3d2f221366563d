"""The shortest way to Longhaul's SQL functions: one round trip on Django's own connection.

The hot path is one function a transition, called in autocommit (or inside the caller's transaction). Django's cursor
wrapper and its ORM cost a multiple of the call itself, so the psycopg connection below it is used directly, with a
server-side prepared statement. Errors come out as Django's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import orjson
from asgiref.sync import sync_to_async
from django.db import DatabaseError, InterfaceError, OperationalError, connection, connections
from psycopg import Cursor, errors

P = ParamSpec("P")
R = TypeVar("R")


def call(statement: str, parameters: Sequence[Any] = ()) -> Any:
    """Run `SELECT function(...)` and return its only column, JSON decoded. None for NULL or no row."""
    rows = rows_of(statement, parameters)
    value = rows[0][0] if rows else None
    return orjson.loads(value) if isinstance(value, str) else value


def rows_of(statement: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
    """Run a statement and return all its rows. JSON columns come as text.

    Where Django keeps a pool and this thread holds no connection, one is borrowed for this statement alone: making
    Django's own wrapper hold it, and let go of it before the next wait, costs as much as the statement.
    """
    pool = None
    if connection.connection is None and not connection.in_atomic_block:
        pool = getattr(connection, "pool", None)  # Django's own, of psycopg_pool
    if pool is None:
        connection.ensure_connection()
        connection.validate_no_broken_transaction()
        with connection.wrap_database_errors:
            return _execute(connection.connection, statement, parameters)
    with connection.wrap_database_errors:
        if pool.closed:
            pool.open()  # as Django does: not before its first use
        borrowed = pool.getconn()  # in autocommit, as Django configures it
        try:
            return _execute(borrowed, statement, parameters)
        finally:
            pool.putconn(borrowed)


def _execute(raw: Any, statement: str, parameters: Sequence[Any] | Mapping[str, Any]) -> list[tuple[Any, ...]]:
    # Prepared only where the host allows it: behind a pooler in transaction mode the threshold stays None.
    with Cursor(raw) as cursor:
        cursor.execute(statement, parameters, prepare=True)
        return cursor.fetchall()


def refused(error: BaseException) -> bool:
    """Return whether Postgres has looked at what it was sent and will not take it: sent again, it would be refused again.

    Not so an outage, nor a shortage that passes. Django says OperationalError for these, and for a bound that is exceeded too.
    """
    cause = error.__cause__
    if isinstance(cause, errors.ProgramLimitExceeded | errors.StatementTooComplex):
        return True
    return isinstance(error, DatabaseError) and not isinstance(error, OperationalError | InterfaceError)


def dumps(value: Any) -> str:
    """JSON text for a jsonb parameter."""
    return orjson.dumps(value, default=str).decode()


def release() -> None:
    """Give the connection back before waiting for anything but Postgres. Inside a transaction it stays."""
    if not connection.in_atomic_block:
        connection.close()


@contextlib.contextmanager
def transactions_kept() -> Generator[None]:
    """Leave this thread's transactions as the block found them: one that the block has left open is rolled back.

    An exception out of a signal may come in the middle of Django's `atomic`. What is written next would never be
    committed then, nor anything that this process writes later.
    """
    found = {
        each.alias: (len(each.savepoint_ids), len(each.atomic_blocks))
        for each in connections.all(initialized_only=True)
        if each.in_atomic_block
    }
    try:
        yield
    finally:
        for each in connections.all(initialized_only=True):
            if each.alias in found:
                savepoints, blocks = found[each.alias]
                del each.savepoint_ids[savepoints:]
                del each.atomic_blocks[blocks:]
            elif each.in_atomic_block or (
                each.connection is not None and each.autocommit != each.settings_dict["AUTOCOMMIT"]
            ):
                each.in_atomic_block = each.closed_in_transaction = False
                each.close()


def apart(function: Callable[P, R]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Return an async form of a function that asks the database: in a thread, which then gives its connection back."""

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        finally:
            release()

    return sync_to_async(alone)
