"""The example project's own tests, run as its owner runs them: in its folder, with its settings, by both runners.

They get the session's Postgres, and a broker and a Redis that nobody can reach.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from agents_project import embedded
from agents_project.settings import database_from_url
from tests.docs import console
from tests.docs.page import ROOT

FOLDER = ROOT / "examples" / "support_desk"
CLOSED = "redis://127.0.0.1:1/0"  # nothing listens on port 1


@pytest.fixture
def shell(servers: embedded.Servers) -> dict[str, str]:
    """The environment of the example's owner."""
    here = database_from_url(servers.database_url)
    variables = {"PGHOST": "HOST", "PGPORT": "PORT", "PGUSER": "USER", "PGPASSWORD": "PASSWORD"}
    return console.environment(
        **{name: str(here[key]) for name, key in variables.items() if here[key]},
        PGDATABASE=f"desk_{os.getpid()}",
        REDIS_URL=CLOSED,
        CELERY_BROKER_URL=CLOSED,
    )


def _run(shell: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=FOLDER,
        env=shell,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, f"$ python {' '.join(arguments)}\n{done.stdout}"
    return done.stdout


def test_the_example_passes_its_own_tests_by_pytest_without_broker_worker_or_model(shell: dict[str, str]) -> None:
    said = _run(shell, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert " passed" in said, said
    assert "skipped" not in said, said


# Django's runner, in an environment where pytest is not installed.
WITHOUT_PYTEST = "import runpy, sys; sys.modules['pytest'] = None; runpy.run_path('manage.py', run_name='__main__')"


def test_its_test_cases_pass_by_djangos_runner_where_pytest_is_not_installed(shell: dict[str, str]) -> None:
    said = _run(shell, "-W", "error", "-c", WITHOUT_PYTEST, "test", "--noinput", "desk.tests.test_agent")
    assert "\nOK" in said, said
    assert "Ran 0 tests" not in said, said
