"""The benchmark itself: it says what it promises, in the time it promises, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from agents_project import embedded
from benchmarks.forms import FORMS
from tests.benchmarks.conftest import Quick, started_by

pytestmark = pytest.mark.slow

KEYS = {
    "steps_per_s",
    "cpu_ms_per_step",
    "cpu_ratio_vs_celery",
    "cpu_ratio_vs_bare_openai",
    "cpu_ratio_vs_dbos",
    "cpu_ratio_vs_dbos_httpx2",
    "cpu_ratio_vs_absurd",
    "cpu_ratio_vs_absurd_httpx2",
    "throughput_ratio_vs_celery",
    "throughput_ratio_vs_dbos",
    "throughput_ratio_vs_dbos_httpx2",
    "throughput_ratio_vs_absurd",
    "throughput_ratio_vs_absurd_httpx2",
    "round_trips_per_step",
    "transactions_per_step",
    "wal_bytes_per_step",
    "publishes_per_step",
}


@pytest.mark.timeout(360)  # 2 minutes are promised on an idle machine
def test_the_quick_form_prints_one_line_of_json_with_every_figure(quick: Quick) -> None:
    found = quick("step_cost")
    assert found.keys() >= KEYS
    assert all(found[key] > 0 for key in KEYS)
    assert found["n"] >= 1
    assert found["forms"].keys() == set(FORMS)
    # A chain's step is two tasks, each one transaction; a first task a run is published by the driver.
    assert 2.0 <= found["forms"]["celery"]["transactions_per_step"] <= 2.1
    assert 2.0 <= found["forms"]["celery"]["publishes_per_step"] <= 2.1
    # Two steps of theirs, a model call and a tool call, each looked up and then written: absurd in one statement each,
    # DBOS in a transaction each. What a process asks beside its work is in it too.
    for peer in ("absurd", "absurd_httpx2", "dbos", "dbos_httpx2"):
        assert 4.0 <= found["forms"][peer]["transactions_per_step"] <= 6.0
    assert found["forms"]["absurd"]["publishes_per_step"] is None


@pytest.mark.timeout(240)  # the workers need seconds to start on a busy machine
def test_ctrl_c_in_the_middle_ends_everything_that_was_started(environment: dict[str, str]) -> None:
    benchmark = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.step_cost", "--quick", "--only", "celery,dbos,absurd"],
        cwd=embedded.PROJECT,
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


@pytest.mark.needs_rabbitmq
@pytest.mark.timeout(360)  # 2 minutes are promised on an idle machine
def test_over_rabbitmq_the_chain_is_beside_longhaul_too(quick: Quick) -> None:
    found = quick("step_cost", "--broker", "rabbitmq", "--only", "longhaul,celery")
    assert found["broker"] == "rabbitmq"
    assert found["cpu_ratio_vs_celery"] > 0
    assert found["throughput_ratio_vs_celery"] > 0
    for form in ("longhaul", "celery"):
        assert found["forms"][form]["cpu_ms_by_role"]["rabbitmq"] > 0
        assert found["forms"][form]["publishes_per_step"] is None
