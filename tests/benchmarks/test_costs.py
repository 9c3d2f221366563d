"""The benchmarks of what a step, a stream and a model call cost: each says what it promises, and its figures can fail."""

from __future__ import annotations

import mmap
import os
from collections import Counter

import pytest

from benchmarks import step_cost
from benchmarks.flat_cost import Cost, Stretch, figures
from benchmarks.memory import resident
from tests.benchmarks.conftest import Quick


@pytest.mark.proof  # a minute and more of two cores, which CI does not have
@pytest.mark.timeout(240)
def test_a_streaming_run_stays_under_its_bar_of_memory(quick: Quick) -> None:
    found = quick("memory", "--runs", "100")
    assert found["runs"] == 100
    assert found["streaming_mb"] > found["idle_mb"] > 10
    assert 0 < found["kb_per_run"] <= 150


@pytest.mark.proof  # a minute and more of two cores, which CI does not have
@pytest.mark.timeout(240)
def test_a_model_call_costs_by_its_bytes_and_not_by_its_messages(quick: Quick) -> None:
    found = quick("provider")
    assert list(found["messages"]) == ["10", "100", "400"]
    sizes = [each["bytes"] for each in found["messages"].values()]
    assert sizes[0] * 35 < sizes[2] < sizes[0] * 45
    # As many bytes in a fortieth of the messages cost about the same. CPU time, and a bound with room for noise.
    assert abs(found["same_bytes"]["bytes"] - sizes[2]) < 100
    assert found["same_bytes"]["many_messages_to_few"] < 1.5
    assert all(each["ratio"] < 0.5 for each in found["messages"].values())
    assert found["growth_longhaul"] < 2.5 < found["growth_openai"]


@pytest.mark.proof  # a minute and more of two cores, which CI does not have
@pytest.mark.timeout(240)
def test_a_later_step_of_a_thread_is_compared_with_an_early_one(quick: Quick) -> None:
    found = quick("flat_cost", "--late", "150")
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


def test_a_form_that_is_measured_with_fewer_runs_at_once_says_so() -> None:
    def sample(runs: int) -> step_cost.Sample:
        return step_cost.Sample(runs * step_cost.STEPS, 1.0, {"model": 1.0, "load": 1.0, "postgres": 1.0}, 1, Counter())

    results = {
        name: step_cost.Results(many=[sample(runs)], single=[sample(1)])
        for name, runs in (("longhaul", 20), ("celery", 20), ("dbos", 8))
    }
    found = step_cost.figures(results, 20)
    assert {name: each["runs_at_once"] for name, each in found["forms"].items()} == {
        "longhaul": 20,
        "celery": 20,
        "dbos": 8,
    }
    names = list(step_cost.tables(found)[0].columns[0].cells)
    assert names == ["Longhaul", "raw Celery chain", "DBOS (8 at once)"]


def test_resident_memory_grows_by_what_is_written() -> None:
    # A map of its own: the allocator may answer a bytearray out of pages that this process holds already.
    with mmap.mmap(-1, 8 * 1024 * 1024) as held:
        before = resident(os.getpid())
        held.write(b"x" * len(held))
        assert resident(os.getpid()) - before > len(held) * 0.8
