"""A pytest plugin: writes what became of each test to the file that MUTANT_REPORT names, for the workshop."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

OURS = ("runs", "tools", "threads", "agents_project", "tests")
_failures: list[dict[str, str]] = []
_ran: list[str] = []
_uncollected: list[str] = []


def _broken(error: BaseException) -> bool:
    """Return whether the code could not even be run: that is no test's merit."""
    import django.db
    import psycopg

    return isinstance(
        error, SyntaxError | ImportError | NameError | psycopg.ProgrammingError | django.db.ProgrammingError
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        _ran.append(item.nodeid)
    if report.failed and call.excinfo is not None:
        error = call.excinfo.value
        _failures.append(
            {
                "test": item.nodeid,
                "when": str(report.when),
                "error": f"{type(error).__name__}: {error}".partition("\n")[0][:300],
                "kind": "broken" if _broken(error) or report.when == "setup" else "failed",
            }
        )
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _uncollected.append(f"{report.nodeid}: {str(report.longrepr).splitlines()[-1][:300]}")


def pytest_sessionfinish() -> None:
    here = Path.cwd().resolve()
    foreign = [
        f"{name} from {file}"
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in OURS
        and (file := getattr(module, "__file__", None))
        and not Path(file).resolve().is_relative_to(here)
    ]
    report = {"failures": _failures, "ran": _ran, "uncollected": _uncollected, "foreign": foreign}
    Path(os.environ["MUTANT_REPORT"]).write_text(json.dumps(report))
