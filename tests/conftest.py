"""What every test may use, and what counts as a failure here."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery
from celery._state import get_current_app

from agents_project import embedded
from tests.programs import NEEDS

if TYPE_CHECKING:
    from tests.protocol.rows import World


@pytest.fixture(scope="session")
def servers() -> embedded.Servers:
    """The servers of this session. Tests use a database of their own there, which Django's settings name."""
    here = embedded.urls()
    return embedded.Servers(
        database_url=os.environ["DATABASE_URL"],
        redis_url=os.environ["REDIS_URL"],
        broker_url=os.environ.get("CELERY_BROKER_URL", os.environ["REDIS_URL"]),
        folder=here.folder,
    )


def pytest_configure(config: pytest.Config) -> None:
    """Say which marks there are for what a test needs; and let its processes hear Ctrl-C.

    A shell that has started pytest in the background has made it deaf to it.
    """
    for mark, need in NEEDS.items():
        config.addinivalue_line("markers", f"{mark}: {need.what}; skipped where it is not there")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs something that is not here."""
    missing = {
        mark: pytest.mark.skip(reason=f"needs {need.what}") for mark, need in NEEDS.items() if not need.is_there()
    }
    for item in items:
        for mark, skip in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(skip)


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI a skipped test is a failed one: there everything that a test could want is there."""
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not accept: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.fixture(scope="session", autouse=True)
def flushed_again_after_a_deadlock() -> Iterator[None]:
    """The flush after a test takes table by table; a worker that lives on may look at two of them the other way round."""
    from django.core.management import CommandError
    from django.core.management.commands import flush
    from psycopg.errors import DeadlockDetected

    once = flush.Command.handle

    def handle(self: flush.Command, **options: Any) -> None:
        for tries_left in (4, 3, 2, 1, 0):
            try:
                return once(self, **options)
            except CommandError as error:
                cause = error.__cause__ and error.__cause__.__cause__
                if not tries_left or not isinstance(cause, DeadlockDetected):
                    raise
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flush.Command, "handle", handle)
        yield


@pytest.fixture
def world(transactional_db: None) -> Iterator[World]:
    """A second session on the test database, beside Django's, with the transitions of the protocol by name."""
    from django.db import connection

    from tests.protocol.rows import Database, World

    connection.ensure_connection()
    db = Database(connection.connection.info.dsn)
    yield World(db)
    db.connection.close()


@pytest.fixture
def no_broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A broker that refuses connections, as one that was stopped does."""
    present = get_current_app()
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")  # wins over what an app is told
    Celery("away").set_current()
    yield
    present.set_current()


@pytest.fixture(autouse=True)
def _no_broker_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that let one test wait in vain is another one in the next test, or answers again."""
    messages = sys.modules.get("tools.messages")
    if messages is not None:
        monkeypatch.setattr(messages, "_hang", None)
