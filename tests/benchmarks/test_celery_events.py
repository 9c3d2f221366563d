"""The benchmark of Celery's events: the switch is thrown in workers that run, and a ratio is that of neighbours."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.celery_events import Heard, Plan, figures, tables
from benchmarks.step_cost import Sample
from tests.benchmarks.conftest import Quick


@pytest.mark.proof  # a minute and more of two cores, which CI does not have
@pytest.mark.timeout(240)
def test_with_events_on_the_workers_tell_of_each_task_and_flower_hears_it(quick: Quick) -> None:
    found = quick("celery_events")
    assert found["n"] == 3
    # Of a step's task three: received, started, succeeded. One may be on its way as the counting ends.
    told = found["on"]["bells_and_events_per_step"] - found["off"]["bells_and_events_per_step"]
    assert 2 < told < 4
    assert found["on"]["cpu_ms_by_role"]["flower"] > found["off"]["cpu_ms_by_role"]["flower"]
    assert 0.8 < found["ratio"]["cpu"] < 2.5  # noise is no failure; an empty task's cost doubles


def test_the_ratio_is_that_of_neighbours_and_leaves_flower_out() -> None:
    def sample(cpu: float, wall: float) -> Sample:
        spent = dict.fromkeys(Heard.roles, 0.0) | {"agents": cpu, "flower": 9.0}
        return Sample(100, wall, spent, 0, Counter(publish=100))

    off = [
        (sample(1.0, 1.0), sample(1.0, 2.0)),
        (sample(2.0, 2.0), sample(1.0, 2.0)),
        (sample(3.0, 3.0), sample(1.0, 2.0)),
    ]
    on = [
        (sample(1.5, 1.1), sample(1.0, 3.0)),
        (sample(2.4, 2.4), sample(1.0, 3.0)),
        (sample(3.3, 6.0), sample(1.0, 3.0)),
    ]

    found = figures({False: off, True: on}, Plan(rounds=3, runs=2, singles=1))

    assert found["ratio"] == {"cpu": 1.2, "wall": 1.2, "single_cpu": 1.0, "single_wall": 1.5}
    assert (found["off"]["cpu_ms_per_step"], found["on"]["cpu_ms_per_step"]) == (20.0, 24.0)
    [table] = tables(found)
    assert table.row_count == 4 + len(Heard.roles) + 1
