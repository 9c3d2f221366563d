"""What the tests of the benchmarks share: a user's environment, and what a benchmark leaves behind in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agents_project import embedded
from tests.processes import of_purpose

Quick = Callable[..., dict[str, Any]]


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """The environment of a user who set nothing: the benchmark brings its own servers, and leaves none of them."""
    purpose = f"bench-test-{os.getpid()}"
    foreign = ("DATABASE_URL", "REDIS_URL", "CELERY_BROKER_URL", "DJANGO_SETTINGS_MODULE")
    given = {name: value for name, value in os.environ.items() if name not in foreign}
    made = {**given, "LONGHAUL_PURPOSE": purpose}
    yield made
    deadline = time.monotonic() + 10
    while (left := started_by(made)) and time.monotonic() < deadline:
        time.sleep(0.05)  # the keeper of the servers ends a moment after them
    assert left == []
    assert embedded.remove(purpose), "the servers of the benchmark are still in use after its end"


def started_by(environment: dict[str, str]) -> list[str]:
    """Return the commands of the living processes that have this environment's purpose."""
    return [process.command for process in of_purpose(environment["LONGHAUL_PURPOSE"])]


@pytest.fixture
def quick(environment: dict[str, str]) -> Quick:
    """Run the quick form of a benchmark; return the one line of JSON that it prints."""

    def run(module: str, *options: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--json", *options],
            cwd=embedded.PROJECT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        found: dict[str, Any] = json.loads(done.stdout)
        assert found["benchmark"] == module
        return found

    return run
