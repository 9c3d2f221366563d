"""Longhaul's tasks say for themselves what they need, in an app of a host that says other things for all of its tasks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery, Task
from celery._state import get_current_app
from celery.backends.base import DisabledBackend

from tools.envelope import ATTRIBUTES, Envelope

# What a host may have set for its own: short limits, early acknowledgement, stored results.
SETTINGS = {
    "task_time_limit": 60,
    "task_soft_time_limit": 30,
    "task_default_rate_limit": "10/m",
    "task_acks_late": False,
    "task_acks_on_failure_or_timeout": False,
    "task_reject_on_worker_lost": False,
    "task_ignore_result": False,
    "task_store_errors_even_if_ignored": True,
    "task_track_started": True,
    "task_serializer": "yaml",
    "result_backend": "redis://localhost:1/0",
}


@pytest.fixture
def host() -> Iterator[Celery]:
    """A host's app, whose tasks have a class of their own."""
    present = get_current_app()

    class Retried(Task):  # type: ignore[type-arg]
        autoretry_for = (Exception,)
        max_retries = 9

    yield Celery("host", task_cls=Retried, changes=SETTINGS, set_as_current=False)
    present.set_current()


@pytest.mark.parametrize("name", ["longhaul.advance_run", "longhaul.execute_call"])
def test_a_task_of_ours_keeps_what_it_needs(host: Celery, name: str) -> None:
    task = host.tasks[name]
    assert {"time_limit", "rate_limit", "acks_late", "ignore_result"} <= set(ATTRIBUTES)
    for attribute in ATTRIBUTES:
        assert getattr(task, attribute) == getattr(Envelope, attribute), attribute
    assert isinstance(task.backend, DisabledBackend)
    assert not hasattr(task, "_orig_run"), "Celery would retry it"


def test_a_task_of_the_host_has_what_the_host_says(host: Celery) -> None:
    @host.task(name="host.ship")
    def ship() -> None: ...

    task = host.tasks["host.ship"]
    assert (task.time_limit, task.soft_time_limit, task.rate_limit) == (60, 30, "10/m")
    assert (task.acks_late, task.ignore_result, task.track_started, task.serializer) == (False, False, True, "yaml")
    assert task.max_retries == 9
    assert task.backend is host.backend
