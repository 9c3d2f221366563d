"""Two connections to the test database, beside Django's: the transitions are functions, and races need two sessions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connection
from pytest_django.plugin import DjangoDbBlocker

from tests.protocol.rows import TABLES, Database, World, violations


@pytest.fixture(scope="session")
def database_url(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> str:
    with django_db_blocker.unblock(), connection.cursor():
        return connection.connection.info.dsn


@pytest.fixture(scope="session")
def connections(database_url: str) -> Iterator[tuple[Database, Database]]:
    both = Database(database_url), Database(database_url)
    yield both
    for each in both:
        each.connection.close()


@pytest.fixture
def db_a(connections: tuple[Database, Database]) -> Iterator[Database]:
    """The tests' connection. Afterwards the rows must keep every invariant that rows can show, and are removed."""
    here, other = connections
    yield here
    for each in connections:
        assert each.connection.info.transaction_status.name == "IDLE"
    other.connection.execute("RESET lock_timeout")
    found = violations(here)
    for table in TABLES:
        here.execute(f"DELETE FROM {table}")
    assert not found


@pytest.fixture
def db_b(db_a: Database, connections: tuple[Database, Database]) -> Database:
    """A second session, for whatever meets the first."""
    return connections[1]


@pytest.fixture
def world(db_a: Database) -> World:
    return World(db_a)
