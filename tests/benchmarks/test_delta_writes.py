"""The benchmark of delta writes: it writes real rows, through workers that flush as they are told, and proposes an interval."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.delta_writes import proposed
from tests.benchmarks.conftest import Quick


@pytest.mark.proof  # a minute and more of two cores, which CI does not have
@pytest.mark.timeout(300)
def test_the_quick_form_measures_batches_and_intervals(quick: Quick) -> None:
    found = quick("delta_writes")
    assert found["violations"] == 0
    sizes = {each["size"]: each for each in found["batches"]}
    assert {1, 2, 5, 10, 20, 50} == set(sizes)
    # One commit a batch, whatever is in it: by an order of magnitude, on any machine.
    assert sizes[50]["postgres_us_per_row"] < sizes[1]["postgres_us_per_row"] / 3
    assert sizes[50]["rows_per_s"] > 3 * sizes[1]["rows_per_s"]
    short, long = found["intervals"]
    assert (short["ms"], long["ms"]) == (5, 25)
    assert [short[load]["wrong"] + long[load]["wrong"] for load in ("reference", "hard")] == [0, 0]
    # 100 chunks/s: an interval of 25 ms joins what 5 ms leaves apart. So the workers do flush as they were told.
    assert long["hard"]["rows_per_chunk"] < short["hard"]["rows_per_chunk"]


def test_the_cheapest_interval_that_keeps_the_bars_is_proposed() -> None:
    def at(ms: float, p50: float, p99: float, hard: float, cost: float) -> dict[str, Any]:
        load = {"p50_ms": p50, "p99_ms": p99, "cpu_us_per_chunk": cost}
        return {"ms": ms, "reference": load, "hard": {**load, "p99_ms": hard}}

    curve = [at(5, 10, 30, 40, 90), at(25, 40, 80, 90, 50), at(50, 70, 120, 90, 40), at(100, 50, 120, 130, 30)]
    assert proposed(curve) == 25
    assert proposed(curve[2:]) is None
