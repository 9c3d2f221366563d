"""The example project's own tests, run as its owner runs them: in its folder, with its settings, by both runners.

They get the session's Postgres, and a broker and a Redis that nobody can reach.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from typing import TypeAlias

import pytest

from agents_project import embedded
from agents_project.settings import database_from_url
from tests.docs import console
from tests.docs.page import ROOT, blocks, words

pytestmark = pytest.mark.slow

README = "examples/support_desk/README.md"
FOLDER = ROOT / "examples" / "support_desk"
Started: TypeAlias = tuple[str, "subprocess.Popen[str]"]
CLOSED = "redis://127.0.0.1:1/0"  # nothing listens on port 1
COMMANDS = [command for block in blocks(README) if block.kind == "console" for command, _ in block.commands]


@pytest.fixture(scope="module")
def started(servers: embedded.Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Started]]:
    """The commands of the example's page, begun at once; the second one where pytest is not installed."""
    here = database_from_url(servers.database_url)
    variables = {"PGHOST": "HOST", "PGPORT": "PORT", "PGUSER": "USER", "PGPASSWORD": "PASSWORD"}
    shell = console.environment(
        **{name: str(here[key]) for name, key in variables.items() if here[key]},
        REDIS_URL=CLOSED,
        CELERY_BROKER_URL=CLOSED,
        PYTEST_ADDOPTS="-p no:cacheprovider",
    )
    no_pytest = tmp_path_factory.mktemp("no_pytest")
    (no_pytest / "pytest.py").write_text("raise ImportError('it is not installed here')")
    more = [{}, {"PYTHONPATH": str(no_pytest), "PYTHONWARNINGS": "error"}]
    begun = []
    for number, (command, own) in enumerate(zip(COMMANDS, more, strict=True)):
        environment = {**shell, **own, "PGDATABASE": f"desk_{os.getpid()}_{number}"}
        process = subprocess.Popen(
            words(command), cwd=FOLDER, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        begun.append((command, process))
    yield begun
    for _, process in begun:
        process.kill()
        process.communicate()


def _said(started: Started) -> str:
    command, process = started
    said, _ = process.communicate(timeout=110)
    assert process.returncode == 0, f"$ {command}\n{said}"
    return said


def test_the_example_passes_its_own_tests_by_pytest_without_broker_worker_or_model(started: list[Started]) -> None:
    said = _said(started[0])
    assert re.search(r"\d\d passed in", said), said


def test_its_test_cases_pass_by_djangos_runner_where_pytest_is_not_installed(started: list[Started]) -> None:
    said = _said(started[1])
    assert re.search(r"Ran \d\d tests in .*\n\nOK\n", said), said
