"""What every test may use, and what counts as a failure here."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator

import pytest

from agents_project import embedded


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


def pytest_configure() -> None:
    """Let the processes of the tests hear Ctrl-C where a shell has started pytest in the background, and so deaf to it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
