"""What Postgres and Valkey count themselves: WAL, commands, and, by the statement log, round trips and transactions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import redis


def wal_position(connection: psycopg.Connection[Any]) -> int:
    """Return the bytes of WAL that were ever written."""
    row = connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn").fetchone()
    assert row is not None
    return int(row[0])


def valkey_commands(client: redis.Redis) -> Counter[str]:
    """Return how often each command was called since the server's start; a subcommand counts under its command."""
    stats: dict[str, dict[str, Any]] = client.info("commandstats")
    calls: Counter[str] = Counter()
    for name, values in stats.items():
        calls[name.removeprefix("cmdstat_").partition("|")[0]] += int(values["calls"])
    return calls


@dataclass(frozen=True)
class Traffic:
    """What clients asked of Postgres. A round trip is a simple query or one execution of a prepared statement.

    psycopg sends parse, bind and execute of one statement together, so each execution is one trip; the extra trip of
    the fifth use, which prepares, is not seen. `transactions` counts autocommit statements too.
    """

    round_trips: int
    transactions: int
    statements: Counter[str]


class StatementLog:
    """Postgres's own log, told to name every statement that a client sends; what functions do inside is not named.

    It slows the server down, so it is on only for runs that are not timed. Needs a superuser and the log's file, whose
    lines begin with `... [pid]`, as those of the embedded server do.
    """

    _LINE = re.compile(r"^[^\[]*\[(?P<pid>\d+)\] LOG:  (?:statement|execute [^:]*): (?P<text>.*)$")

    def __init__(self, connection: psycopg.Connection[Any], path: Path) -> None:
        self._connection = connection
        self._path = path

    def __enter__(self) -> StatementLog:
        self._start = self._path.stat().st_size
        self._connection.execute("ALTER SYSTEM SET log_statement = 'all'")
        self._connection.execute("SELECT pg_reload_conf()")
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.execute("ALTER SYSTEM RESET log_statement")
        self._connection.execute("SELECT pg_reload_conf()")

    def mark(self) -> None:
        """Count from here."""
        self._start = self._path.stat().st_size

    def read(self, backends: Callable[[int], bool]) -> Traffic:
        """Return what was asked since the mark of the backends whose pid `backends` takes."""
        with self._path.open("rb") as file:
            file.seek(self._start)
            text = file.read().decode(errors="replace")
        transactions = 0
        statements: Counter[str] = Counter()
        within: set[int] = set()  # the backends inside of a transaction that their client began
        for line in text.splitlines():
            found = self._LINE.match(line)
            if found is None or not backends(int(found["pid"])):
                continue
            pid, statement = int(found["pid"]), found["text"]
            statements[_shape(statement)] += 1
            verb = statement.partition(" ")[0].upper().rstrip(";")
            if verb in ("BEGIN", "START"):
                within.add(pid)
            elif verb in ("COMMIT", "END", "ROLLBACK") and pid in within:
                within.discard(pid)
                transactions += 1
            elif pid not in within:
                transactions += 1
        return Traffic(statements.total(), transactions, statements)


def _shape(statement: str) -> str:
    """Return a statement without its values, short enough for a table."""
    text = re.sub(r"'[^']*'", "'?'", statement)
    text = re.sub(r"\"s\d+_x\d+\"", "?", text)  # Django names a savepoint by its thread
    return re.sub(r"\b\d+\b", "?", text)[:100]
