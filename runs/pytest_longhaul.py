"""A pytest plugin for tests of one's own agents: no worker, no broker, no model service.

    def test_refund(scripted_model, ...):            # or, in a plain TestCase: with scripted(...) as model:
        scripted_model.say(call("look_up_order", number=1042), "It is on its way.")
        run = support.start("Where is order 1042?", owner=user)
        run_to_end(run)
        assert run.output == "It is on its way."
        assert_invariants(run)

`run_to_end` takes a run through the real engine, its real SQL and its real tools inside the test's own transaction, so a
plain `TestCase` works. `move_clock` moves the database's time, on which every timer of Longhaul rests.

The functions need no pytest: tests of Django's own runner import them from here. This module is loaded when pytest
starts, so it imports Django's models only when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from runs.testing.inline_worker import WorkerKilled, move_clock, run_to_end
from runs.testing.scripted_model import CallTool, Reply, ScriptedModel, call, scripted

try:
    import pytest
except ImportError:  # the tests of this project are run by Django's own runner
    pytest = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from runs.models import Run

__all__ = [
    "CallTool",
    "Reply",
    "ScriptedModel",
    "WorkerKilled",
    "assert_invariants",
    "call",
    "move_clock",
    "run_to_end",
    "scripted",
]


def assert_invariants(run: Run | None = None) -> None:
    """Fail when a row breaks an invariant: of one run, or of the whole database."""
    from runs import invariants

    report = invariants.check(None if run is None else run.pk)
    if not report.clean:
        raise AssertionError(str(report))
    if run is not None and not report.runs:
        raise AssertionError(f"There is no run {run.pk} (any more) that this thread can see.")


if pytest is not None:

    @pytest.fixture
    def scripted_model() -> Iterator[ScriptedModel]:
        """A ScriptedModel in the place of every provider, for one test; replies that are left fail it."""
        with scripted() as model:
            yield model

    @pytest.fixture
    def longhaul_clock(db: None) -> Iterator[Callable[[timedelta], None]]:
        """`move_clock`, undone after the test also where the test commits."""
        yield move_clock
        from threads.models import Clock

        Clock.objects.all().delete()
