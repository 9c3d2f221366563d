"""The benchmark itself: it says what it promises, in the time it promises, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents_project import embedded
from agents_project.processes import running

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parent.parent.parent
KEYS = {
    "steps_per_s",
    "cpu_ms_per_step",
    "cpu_ratio_vs_celery",
    "cpu_ratio_vs_bare_openai",
    "cpu_ratio_vs_dbos",
    "cpu_ratio_vs_absurd",
    "throughput_ratio_vs_celery",
    "throughput_ratio_vs_dbos",
    "throughput_ratio_vs_absurd",
    "round_trips_per_step",
    "transactions_per_step",
    "wal_bytes_per_step",
    "publishes_per_step",
}


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """The environment of a user who set nothing: the benchmark brings its own servers."""
    purpose = f"bench-test-{os.getpid()}"
    given = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DATABASE_URL", "REDIS_URL", "CELERY_BROKER_URL", "DJANGO_SETTINGS_MODULE")
    }
    yield {**given, "LONGHAUL_PURPOSE": purpose}
    assert embedded.remove(purpose), "the servers of the benchmark are still in use after its end"


def started_by(environment: dict[str, str]) -> list[str]:
    """Return the commands of the living processes that have this environment's purpose."""
    mark = f"LONGHAUL_PURPOSE={environment['LONGHAUL_PURPOSE']}".encode()
    found = []
    for process in running():
        try:
            variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended just now, or is another user's
        if mark in variables:
            found.append(process.command)
    return found


@pytest.mark.timeout(360)  # 75 s are promised on an idle machine
def test_the_quick_form_prints_one_line_of_json_with_every_figure(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step_cost", "--quick", "--json"],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    found = json.loads(lines[0])
    assert found.keys() >= KEYS
    assert all(found[key] > 0 for key in KEYS)
    assert found["n"] >= 1
    assert found["forms"].keys() == {"longhaul", "celery", "dbos", "absurd", "bare_openai"}
    # A chain's step is two tasks, each one transaction; a first task a run is published by the driver.
    assert 2.0 <= found["forms"]["celery"]["transactions_per_step"] <= 2.1
    assert 2.0 <= found["forms"]["celery"]["publishes_per_step"] <= 2.1
    # Two steps of theirs, a model call and a tool call, each looked up and then written: absurd in one statement each,
    # DBOS in a transaction each. What a process asks beside its work is in it too.
    assert 4.0 <= found["forms"]["absurd"]["transactions_per_step"] <= 6.0
    assert 4.0 <= found["forms"]["dbos"]["transactions_per_step"] <= 6.0
    assert found["forms"]["absurd"]["publishes_per_step"] is None
    assert started_by(environment) == []


@pytest.mark.timeout(240)  # the workers need seconds to start on a busy machine
def test_ctrl_c_in_the_middle_ends_everything_that_was_started(environment: dict[str, str]) -> None:
    benchmark = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.step_cost", "--quick", "--only", "celery,dbos,absurd"],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert benchmark.stderr is not None
    for line in benchmark.stderr:
        if "steps/s" in line:
            break
    for process in ("chain.steps", "benchmarks.dbos_steps", "benchmarks.absurd_steps"):
        assert any(process in command for command in started_by(environment))

    os.killpg(benchmark.pid, signal.SIGINT)
    benchmark.stderr.read()

    assert benchmark.wait() == 130
    benchmark.stderr.close()
    deadline = time.monotonic() + 10
    while (left := started_by(environment)) and time.monotonic() < deadline:
        time.sleep(0.05)  # the keeper of the servers ends a moment after them
    assert left == []
