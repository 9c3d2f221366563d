"""The benchmarks of what a step, a stream and a model call cost: each says what it promises, and its figures can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents_project import embedded
from benchmarks.flat_cost import Cost, Stretch, figures
from benchmarks.memory import resident

PROJECT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """The environment of a user who set nothing: a benchmark brings its own servers."""
    purpose = f"costs-test-{os.getpid()}"
    foreign = ("DATABASE_URL", "REDIS_URL", "CELERY_BROKER_URL", "DJANGO_SETTINGS_MODULE")
    given = {name: value for name, value in os.environ.items() if name not in foreign}
    yield {**given, "LONGHAUL_PURPOSE": purpose}
    assert embedded.remove(purpose), "the servers of the benchmark are still in use after its end"


def quick(module: str, environment: dict[str, str], *options: str) -> dict[str, Any]:
    """Run the quick form; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--json", *options],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["benchmark"], found["n"] >= 1) == (module, True)
    return found


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_streaming_run_stays_under_its_bar_of_memory(environment: dict[str, str]) -> None:
    found = quick("memory", environment, "--runs", "100")
    assert found["runs"] == 100
    assert found["streaming_mb"] > found["idle_mb"] > 10
    assert 0 < found["kb_per_run"] <= 150


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_model_call_costs_by_its_bytes_and_not_by_its_messages(environment: dict[str, str]) -> None:
    found = quick("provider", environment)
    assert list(found["messages"]) == ["10", "100", "400"]
    sizes = [each["bytes"] for each in found["messages"].values()]
    assert sizes[0] * 35 < sizes[2] < sizes[0] * 45
    # As many bytes in a fortieth of the messages cost about the same. CPU time, and a bound with room for noise.
    assert abs(found["same_bytes"]["bytes"] - sizes[2]) < 100
    assert found["same_bytes"]["many_messages_to_few"] < 1.5
    assert all(each["ratio"] < 0.5 for each in found["messages"].values())
    assert found["growth_longhaul"] < 2.5 < found["growth_openai"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_later_step_of_a_thread_is_compared_with_an_early_one(environment: dict[str, str]) -> None:
    found = quick("flat_cost", environment, "--late", "150")
    assert found["late_steps"] == [75, 150]
    assert found["cpu_ms"]["early"] > 0 < found["own_wall_ms"]["early"]
    assert {"agents", "tools", "control", "postgres", "valkey"} == set(found["cpu_ms_by_role"])
    assert found["ratio"] == found["cpu_ms"]["ratio"]


def test_the_ratio_is_that_of_neighbours_and_leaves_out_who_only_measures() -> None:
    def cost(agents: float, model: float) -> Cost:
        return Cost(steps=100, cpu={"agents": agents, "model": model, "load": 9.0}, wall=agents / 10)

    measured = [(cost(1.0, 5), cost(1.5, 50)), (cost(2.0, 5), cost(2.2, 50)), (cost(3.0, 5), cost(3.9, 50))]
    found = figures(measured, Stretch(first=25, last=100, groups=1))
    assert found["cpu_ms"] == {"early": 20.0, "late": 22.0, "ratio": 1.3}
    assert found["own_wall_ms"] == {"early": 200.0, "late": 220.0, "ratio": 1.3}
    assert set(found["cpu_ms_by_role"]) == {"agents"}


def test_resident_memory_grows_by_what_is_written() -> None:
    before = resident(os.getpid())
    held = bytearray(os.urandom(8 * 1024 * 1024))
    assert resident(os.getpid()) - before > len(held) * 0.8
