"""What nobody reads any more goes, in bounded batches; what somebody may still ask for stays."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest
from celery import current_app
from django.test import override_settings

from runs import housekeeping
from runs.housekeeping import Removed, keep_house
from runs.tasks import keep_house as task
from threads.clock import now
from threads.models import IdempotencyKey
from tools.models import Worker

pytestmark = pytest.mark.django_db

DAY = timedelta(days=1)


def key(name: str, age: timedelta) -> UUID:
    row = IdempotencyKey.objects.create(key=name, fingerprint="f")
    IdempotencyKey.objects.filter(pk=row.pk).update(created_at=now() - age)
    return row.pk


def worker(number: int, silent: timedelta, *, gone: bool = True, parent: Worker | None = None) -> Worker:
    at = now() - silent
    return Worker.objects.create(
        name=f"agents@{number}", kind="agents", host="here", pid=number, lock_key=number, parent=parent,
        started_at=at - DAY, beat_at=at, gone_at=at if gone else None,
    )  # fmt: skip


def test_a_key_lasts_as_long_as_the_setting_says() -> None:
    old, young = key("old", timedelta(hours=25)), key("young", timedelta(hours=23))

    assert keep_house() == Removed(idempotency_keys=1, workers=0)
    assert list(IdempotencyKey.objects.values_list("pk", flat=True)) == [young]

    with override_settings(LONGHAUL={"IDEMPOTENCY_KEY_SECONDS": 3600}):
        assert keep_house().idempotency_keys == 1
    assert old != young
    assert not IdempotencyKey.objects.exists()


def test_workers_go_a_week_after_their_end() -> None:
    worker(1, 8 * DAY)
    kept = worker(2, 6 * DAY)
    worker(3, 8 * DAY, gone=False)  # crashed, and nobody swept since
    present = worker(4, timedelta(seconds=1), gone=False)

    assert keep_house().workers == 2
    assert set(Worker.objects.all()) == {kept, present}


def test_the_first_life_of_a_parent_stays_while_a_child_names_it() -> None:
    parent = worker(1, 8 * DAY)
    child = worker(2, timedelta(seconds=1), gone=False, parent=parent)

    assert keep_house().workers == 0

    Worker.objects.filter(pk=child.pk).update(gone_at=now() - 8 * DAY, beat_at=now() - 8 * DAY)
    assert keep_house().workers == 2


def test_a_pass_is_bounded_and_the_next_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "BATCH", 2)
    monkeypatch.setattr(housekeeping, "BATCHES", 2)
    for number in range(5):
        key(str(number), 2 * DAY)

    assert [keep_house().idempotency_keys for _ in range(3)] == [4, 1, 0]


def test_beat_asks_for_it_by_the_hour_on_a_queue_that_is_consumed() -> None:
    [entry] = [entry for entry in current_app.conf.beat_schedule.values() if entry["task"] == task.name]

    assert entry["schedule"].remaining_estimate(now()) <= timedelta(hours=1)
    assert entry["options"]["queue"] == "longhaul.control"
    task()
