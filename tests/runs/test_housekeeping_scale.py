"""The housekeeping at 100,000 runs and 1,000,000 events: what it reads to find what is due, and how long it holds anything."""

from __future__ import annotations

import time
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from django.db import connection
from django.test import override_settings

from runs import housekeeping
from runs.models import Event, Run
from tests.runs.test_admin_scale import LONG, RUNS, load, rows_read
from threads.clock import now
from threads.models import Message, Thread

pytestmark = [
    pytest.mark.slow,
    pytest.mark.django_db,
    pytest.mark.timeout(600),  # 1,000,000 events are loaded, and some removed
]

DUE = 50  # runs that ended since the last pass


def old_world() -> None:
    """100,000 runs that ended over 100 days, each on a thread of its own; the log of all but the last DUE old ones is removed."""
    load()
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE TEMPORARY TABLE aged ON COMMIT DROP AS SELECT id, thread_id, now() - interval '100 days'"
            " + row_number() OVER (ORDER BY id) * interval '100 days' / %s AS at FROM longhaul_runs_run",
            (RUNS,),
        )
        cursor.execute(
            "UPDATE longhaul_runs_run r SET finished_at = aged.at FROM aged WHERE aged.id = r.id AND r.stop_reason <> ''"
        )
        cursor.execute(
            "UPDATE longhaul_threads_thread t SET created_at = aged.at FROM aged WHERE aged.thread_id = t.id"
        )
        cursor.execute("UPDATE longhaul_threads_message m SET created_at = aged.at FROM aged WHERE aged.id = m.run_id")
        cursor.execute(
            "UPDATE longhaul_runs_run SET events_removed_through = last_seq - 1 WHERE id IN (SELECT id FROM longhaul_runs_run"
            " WHERE finished_at < %s ORDER BY finished_at DESC OFFSET %s)",
            (now() - timedelta(days=30), DUE),
        )
        cursor.execute(
            "DELETE FROM longhaul_runs_event e USING longhaul_runs_run r WHERE e.run_id = r.id AND e.seq <= r.events_removed_through"
        )
        for table in ("run", "event"):
            cursor.execute(f"ANALYZE longhaul_runs_{table}")


def test_a_pass_reads_what_is_due_and_holds_nothing_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    old_world()
    assert Run.objects.filter(events_removed_through__gt=0).count() > RUNS / 2
    _logs_that_are_due_are_found_without_a_look_at_others()
    _threads_are_looked_at_by_a_few_entries_of_indexes_each()
    _a_thread_of_a_million_events_goes_in_transactions_that_are_short_beside_the_whole(monkeypatch)


def _logs_that_are_due_are_found_without_a_look_at_others() -> None:
    before = now() - timedelta(days=30)
    found = housekeeping._LOGS.replace("FOR NO KEY UPDATE SKIP LOCKED", "")
    assert rows_read(found, (before, housekeeping.RUNS)) <= 2 * DUE
    with override_settings(LONGHAUL={"EVENT_RETENTION_DAYS": 30, "COMPACT_AFTER_DAYS": None}):
        assert housekeeping.keep_house().logs == DUE
    # nothing is due now, and the entries that the index has yet are those of the dead
    assert rows_read(found, (before, housekeeping.RUNS)) <= 2 * DUE


def _threads_are_looked_at_by_a_few_entries_of_indexes_each() -> None:
    asked: dict[str, Any] = {"before": now() - timedelta(days=99), "after": None, "limit": housekeeping.LOOKED_AT}
    assert rows_read(housekeeping._THREADS, asked) <= 10 * housekeeping.LOOKED_AT


def _a_thread_of_a_million_events_goes_in_transactions_that_are_short_beside_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Given a thread with one long run, whose log has a million rows
    run = Run.objects.order_by("pk").last()
    assert run is not None
    length = 1_000_000
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO longhaul_runs_event (run_id, seq, type, at, payload)"
            " SELECT %s, n, 'text.delta', now(), '{\"text\": \"word\"}' FROM generate_series(%s, %s) n",
            (run.pk, LONG + 1, length),
        )
        cursor.execute("ANALYZE longhaul_runs_event")
    old = now() - timedelta(days=40)
    Run.objects.filter(pk=run.pk).update(finished_at=old, status="completed", stop_reason="end_turn", last_seq=length)
    Thread.objects.filter(pk=run.thread_id).update(created_at=old)
    Message.objects.filter(thread=run.thread_id).update(created_at=old)
    monkeypatch.setattr(housekeeping, "due_threads", lambda before: iter([run.thread_id]))

    # When it is removed
    times: list[float] = [time.monotonic()]
    with override_settings(LONGHAUL={"THREAD_RETENTION_DAYS": 30, "COMPACT_AFTER_DAYS": None}):
        removed = housekeeping.Pass(None, lambda _: times.append(time.monotonic())).run()

    # Then no transaction took much more than its share
    assert (removed.threads, removed.events) == (1, 900_000)
    assert not Event.objects.filter(run_id=run.pk).exists()
    spans = [later - earlier for earlier, later in pairwise(times)]
    assert max(spans) < sum(spans) / 3, spans
