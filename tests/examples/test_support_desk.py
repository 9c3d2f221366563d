"""The example project's own tests, run as its owner runs them: in its folder, with its settings, by both runners.

They get the session's Postgres, and a broker and a Redis that nobody can reach.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from agents_project import embedded
from agents_project.settings import database_from_url
from tests.docs import console
from tests.docs.page import ROOT, blocks, words

README = "examples/support_desk/README.md"
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
        PYTEST_ADDOPTS="-p no:cacheprovider",
    )


COMMANDS = [command for block in blocks(README) if block.kind == "console" for command, _ in block.commands]


def _run(shell: dict[str, str], command: str) -> str:
    done = subprocess.run(
        words(command), cwd=FOLDER, env=shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}"
    return done.stdout


def test_the_example_passes_its_own_tests_by_pytest_without_broker_worker_or_model(shell: dict[str, str]) -> None:
    said = _run(shell, COMMANDS[0])
    assert re.search(r"\d\d passed in", said), said


def test_its_test_cases_pass_by_djangos_runner_where_pytest_is_not_installed(
    shell: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "pytest.py").write_text("raise ImportError('it is not installed here')")
    said = _run(shell | {"PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "error"}, COMMANDS[1])
    assert re.search(r"Ran \d\d tests in .*\n\nOK\n", said), said
