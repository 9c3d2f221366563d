"""What nobody reads any more goes, in bounded batches; what somebody may still ask for stays."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import pytest
from celery import current_app
from django.core.management import call_command
from django.db import connection, transaction
from django.db.models import F, ProtectedError
from django.db.models.signals import pre_delete
from django.test import Client, override_settings

from agents_project import embedded
from runs import Agent, conf, events, housekeeping
from runs.housekeeping import Removed, keep_house
from runs.models import Event, Run
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from runs.replay import replay
from runs.tasks import keep_house as task
from runs.verification import verify
from tests.protocol.rows import World, wait_until
from tests.runs.invariant_cases import look_up
from tests.runs.scenes import Cast, Together
from threads.clock import now
from threads.exceptions import ThreadGone
from threads.models import IdempotencyKey, Message, Thread
from tools.models import ToolAttempt, ToolCall, Worker

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


@pytest.mark.parametrize("name", ["EVENT_RETENTION_DAYS", "THREAD_RETENTION_DAYS", "WORKER_RETENTION_DAYS"])
def test_days_are_days_and_none_is_for_ever(name: str) -> None:
    key = conf.KEYS[name]

    assert [key.problem(days) for days in (None, 1, 1.5, 3650)] == [None] * 4
    assert key.problem(0.5) == "must be at least 1; it is 0.5"
    assert key.problem(3651) == "must be at most 3650; it is 3651"
    assert key.problem("30") == "must be a number of days or None; it is '30'"
    for given, kept in ((30, 30 * DAY), (None, None)):
        with override_settings(LONGHAUL={name: given}):
            assert getattr(conf.settings(), conf.attribute(name)) == kept


def test_workers_may_be_kept_for_ever() -> None:
    worker(1, 3000 * DAY)
    with kept_for(WORKER=None):
        assert keep_house() == housekeeping.due() == Removed()
    with kept_for(WORKER=3001):
        assert keep_house() == Removed()
    with kept_for(WORKER=2999):
        assert housekeeping.due() == Removed(workers=1)
        assert keep_house() == Removed(workers=1)


# --- event logs -----------------------------------------------------------------------------------------------------


def asked(agent: Agent, model: ScriptedModel, *, ended: timedelta, thread: Thread | None = None) -> Run:
    """A run that called a tool, and ended so long ago."""
    model.say([call("look_up", number=1)], "Order 1 is shipped.")
    run = run_to_end(agent.start("Where is order 1?", **({} if thread is None else {"thread": thread})))
    return aged(run, ended)


def aged(run: Run, ended: timedelta) -> Run:
    """Move a run, its thread and all that is told of them into the past."""
    for rows, times in (
        (Run.objects.filter(pk=run.pk), ("created_at", "queued_at", "started_at", "finished_at")),
        (run.event_set.all(), ("at",)),
        (run.leg_set.all(), ("started_at", "ended_at")),
        (run.step_set.all(), ("created_at",)),
        (run.usage_set.all(), ("created_at",)),
        (Message.objects.filter(run_id=run.pk), ("created_at",)),
        (ToolCall.objects.filter(run_id=run.pk), ("created_at", "settled_at")),
        (ToolAttempt.objects.filter(call__run_id=run.pk), ("started_at", "ended_at")),
        (Thread.objects.filter(pk=run.thread_id), ("created_at",)),
    ):
        rows.update(**{time: F(time) - ended for time in times})
    run.refresh_from_db()
    return run


def kept_for(**days: float | None) -> override_settings:
    kept = {f"{name}_RETENTION_DAYS": value for name, value in days.items()}
    return override_settings(LONGHAUL={"COMPACT_AFTER_DAYS": None, **kept})


@pytest.fixture
def clerk(cast: Cast) -> Agent:
    return cast(name="clerk", tools=[look_up])


def gone(run: Run) -> list[int]:
    return list(run.event_set.order_by("seq").values_list("seq", flat=True))


def test_everything_that_people_made_is_kept_for_ever_by_default(clerk: Agent, scripted_model: ScriptedModel) -> None:
    run = asked(clerk, scripted_model, ended=3000 * DAY)

    assert keep_house() == Removed(compacted=1)  # of which there is nothing to fold
    assert gone(run) == list(range(1, run.last_seq + 1))


def test_a_log_goes_so_long_after_its_runs_end_but_for_its_last_event(
    clerk: Agent, scripted_model: ScriptedModel
) -> None:
    old, young = (asked(clerk, scripted_model, ended=days * DAY) for days in (31, 29))
    live = clerk.start("And order 2?")
    Run.objects.filter(pk=live.pk).update(created_at=now() - 100 * DAY)
    rest = [list(each) for each in what_else_is_kept(old)]

    with kept_for(EVENT=30):
        assert housekeeping.due() == Removed(logs=1, events=old.last_seq - 1)
        assert keep_house() == Removed(logs=1, events=old.last_seq - 1)
        assert keep_house() == housekeeping.due() == Removed()

    old.refresh_from_db()
    assert (gone(old), old.events_removed_through) == ([old.last_seq], old.last_seq - 1)
    assert gone(young) == list(range(1, young.last_seq + 1))
    assert gone(live) == [1, 2]
    assert [list(each) for each in what_else_is_kept(old)] == rest
    assert all(rest)
    assert_invariants()


def what_else_is_kept(run: Run) -> Iterator[Any]:
    for rows in (Message.objects.filter(run_id=run.pk), run.step_set, run.leg_set, run.usage_set):
        yield rows.order_by("pk").values_list()
    calls = ToolCall.objects.filter(run_id=run.pk)
    yield from (calls.values_list(), ToolAttempt.objects.filter(call__in=calls).values_list())


@pytest.fixture
def removed(clerk: Agent, scripted_model: ScriptedModel) -> Run:
    """A run whose log was removed."""
    run = asked(clerk, scripted_model, ended=31 * DAY)
    with kept_for(EVENT=30):
        assert keep_house().logs == 1
    run.refresh_from_db()
    return run


def test_a_reader_is_told_what_is_missing_once(removed: Run) -> None:
    last = removed.last_seq
    for cursor in (0, 1, last - 2):
        [gap, end] = removed.events(after=cursor)
        assert gap.as_dict() == {"type": "resume_gap", "from": cursor + 1, "to": last - 1}
        assert (gap.seq, end.seq, end.type) == (last - 1, last, "run.completed")
        assert [event.as_dict() for event in removed.events(after=cursor, follow=True)] == [
            gap.as_dict(), end.as_dict(),
        ]  # fmt: skip
    assert [event.seq for event in removed.events(after=last - 1)] == [last]
    assert list(removed.events(after=last)) == []


def test_a_gap_is_no_place_of_a_short_read(removed: Run) -> None:
    assert [event.type for event in events.read(removed.pk, 0, limit=1)] == ["resume_gap", "run.completed"]


def test_the_log_of_such_a_run_is_not_held_against_its_rows(removed: Run, capsys: pytest.CaptureFixture[str]) -> None:
    report = verify(removed)
    told = replay(event.as_dict() for event in removed.events())

    assert (report.removed, report.differences) == (removed.last_seq - 1, [])
    assert (told.removed, told.faults, told.output) == (removed.last_seq - 1, [], removed.output)
    call_command("replay_run", str(removed.pk), "--verify")
    call_command("replay_run", "--verify", "--all")
    assert re.search(
        r"1 to \d+ were removed.*\nRun .* 1 event, no diff.*\nOf 1 run the log was", capsys.readouterr().out
    )

    Event.objects.filter(run=removed).update(payload={"stop_reason": "max_steps", "output": "Something else."})
    assert {each.what for each in verify(removed).differences} >= {"stop_reason", "output"}


def test_its_page_in_the_admin_says_so(removed: Run, admin_client: Client) -> None:
    page = admin_client.get(f"/admin/longhaul_runs/run/{removed.pk}/change/").content.decode()

    assert f"Events 1 to {removed.last_seq - 1} were removed (EVENT_RETENTION_DAYS)." in page
    assert "?events_to=" not in page


def test_such_a_run_is_shown_and_played_with_a_line_that_says_so(
    removed: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["follow_run", str(removed.pk)], ["replay_run", str(removed.pk), "--speed", "0"]):
        call_command(*command)
        assert f"events 1 to {removed.last_seq - 1} are no longer kept" in capsys.readouterr().out
    call_command("follow_run", str(removed.pk), "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == {
        "type": "resume_gap", "from": 1, "to": removed.last_seq - 1,
    }  # fmt: skip
    call_command("replay_run", str(removed.pk), "--at-step", "1")
    assert removed.why().startswith("completed (end_turn)")


def test_runs_that_follow_such_a_run_need_nothing_of_its_log(
    removed: Run, clerk: Agent, scripted_model: ScriptedModel
) -> None:
    scripted_model.say("Once more: shipped.", "And once more.", "Yes.")
    retried = run_to_end(removed.retry())
    forked = run_to_end(removed.fork(after_step=1))
    ended = aged(clerk.start("Cancel me.").cancel(), 31 * DAY)
    with kept_for(EVENT=30):
        assert keep_house().logs == 1
    resumed = run_to_end(ended.resume())

    assert [run.status for run in (retried, forked, resumed)] == ["completed"] * 3
    assert_invariants()


def long_log(run: Run, length: int, *, compacted: tuple[int, int] | None = None) -> Run:
    """Give an ended run a log of so many seqs, with few rows in it. compacted: the range that one event stands for."""
    last = run.event_set.get(seq=run.last_seq)
    run.event_set.all().delete()
    seqs = [seq for seq in range(1, length, 1000) if compacted is None or not compacted[0] <= seq <= compacted[1]]
    rows = [Event(run=run, seq=seq, type="data", at=last.at) for seq in seqs]
    if compacted:
        first, to = compacted
        rows.append(Event(run=run, seq=to, type="text.delta", at=last.at, payload={"from_seq": first, "text": ""}))
    last.pk, last.seq = None, length
    Event.objects.bulk_create([*rows, last])
    Run.objects.filter(pk=run.pk).update(last_seq=length)
    run.refresh_from_db()
    return run


@pytest.mark.parametrize(
    ("compacted", "marks"),
    [(None, [100_000, 200_000, 249_999]), ((90_000, 150_000), [150_000, 249_999]), ((1, 100_000), [100_000, 200_000, 249_999])],
)  # fmt: skip
def test_a_long_log_goes_in_batches_each_with_its_mark(
    clerk: Agent, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch,
    compacted: tuple[int, int] | None, marks: list[int],
) -> None:  # fmt: skip
    run = long_log(asked(clerk, scripted_model, ended=31 * DAY), 250_000, compacted=compacted)
    seen = []

    def look(_: Any) -> None:
        mark = Run.objects.values_list("events_removed_through", flat=True).get(pk=run.pk)
        left = [int(payload.get("from_seq", seq)) for seq, payload in run.event_set.values_list("seq", "payload")]
        assert min(left) > mark
        [gap] = [event for event in run.events() if event.type == "resume_gap"]
        assert gap.payload["to"] == min(left) - 1 >= mark
        # killed here, the next pass finds it again
        with kept_for(EVENT=30):
            assert housekeeping.due().logs == (mark < 249_999)
        seen.append(mark)

    with kept_for(EVENT=30):
        removed = housekeeping.Pass(told=lambda done: look(done) if done.events else None).run()

    assert list(dict.fromkeys(seen)) == marks
    assert (removed.logs, gone(run)) == (1, [250_000])


def test_logs_share_a_transaction_as_far_as_they_are_short(clerk: Agent, scripted_model: ScriptedModel) -> None:
    for length in (70_000, 20_000, 70_000):
        long_log(asked(clerk, scripted_model, ended=31 * DAY), length)
    seen: list[int] = []

    with kept_for(EVENT=30):
        housekeeping.Pass(told=lambda done: seen.append(done.logs)).run()

    assert list(dict.fromkeys(seen)) == [0, 2, 3]


def test_the_oldest_logs_go_first_and_a_pass_ends_when_its_time_is_over(
    clerk: Agent, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [asked(clerk, scripted_model, ended=days * DAY) for days in (33, 35, 34)]
    monkeypatch.setattr(housekeeping, "RUNS", 1)
    monkeypatch.setattr(housekeeping.Pass, "_has_time", lambda self: self.removed.logs < 2)

    with kept_for(EVENT=30):
        housekeeping.Pass().run()

    assert [run.event_set.count() == 1 for run in runs] == [False, True, True]


# --- threads --------------------------------------------------------------------------------------------------------


def test_a_thread_goes_so_long_after_its_last_word_with_all_that_hangs_on_it(
    clerk: Agent, scripted_model: ScriptedModel
) -> None:
    old, young = (asked(clerk, scripted_model, ended=days * DAY) for days in (31, 29))
    forked = clerk.start("And now?", thread=young.thread)
    Run.objects.filter(pk=forked.pk).update(parent=old)
    signalled: list[Any] = []

    def note(instance: Any, **_: Any) -> None:
        signalled.append(instance.pk)

    pre_delete.connect(note, sender=Thread)
    try:
        with kept_for(THREAD=30):
            assert housekeeping.due() == Removed(threads=1)
            assert keep_house() == Removed(threads=1)
            assert keep_house() == housekeeping.due() == Removed()
    finally:
        pre_delete.disconnect(note, sender=Thread)

    assert signalled == [old.thread_id]
    assert set(Thread.objects.all()) == {young.thread}
    assert not any(rows.exists() for rows in what_else_is_kept(old))
    assert not Event.objects.filter(run_id=old.pk).exists()
    assert Event.objects.filter(run_id=young.pk).count() == young.last_seq
    forked.refresh_from_db()
    assert (forked.status, forked.parent) == ("queued", None)
    assert_invariants()


def test_a_thread_that_a_row_of_the_host_protects_stays_and_stops_no_other(
    clerk: Agent, scripted_model: ScriptedModel, caplog: pytest.LogCaptureFixture
) -> None:
    held, free = (asked(clerk, scripted_model, ended=days * DAY) for days in (50, 40))

    def protect(instance: Any, **_: Any) -> None:
        if instance.pk == held.thread_id:
            raise ProtectedError("An order names it.", {instance})

    pre_delete.connect(protect, sender=Thread)
    try:
        with kept_for(THREAD=30):
            assert keep_house() == Removed(threads=1)
    finally:
        pre_delete.disconnect(protect, sender=Thread)

    assert list(Thread.objects.all()) == [held.thread]
    assert Message.objects.filter(run_id=held.pk).exists()
    assert [record.message for record in caplog.records if str(held.thread_id) in record.message]
    assert free.thread_id != held.thread_id
    assert_invariants()


def test_what_has_said_something_lately_or_lives_is_kept_whatever_its_age(
    clerk: Agent, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken, live, run_lately, empty = (asked(clerk, scripted_model, ended=40 * DAY) for _ in range(4))
    spoken.thread.save(role="user", content="Are you there?")
    waiting = clerk.start("Wait.", thread=live.thread)
    aged(waiting, 40 * DAY)
    asked(clerk, scripted_model, ended=DAY, thread=run_lately.thread)
    Thread.objects.filter(pk=run_lately.thread_id).update(created_at=now() - 40 * DAY)
    Message.objects.filter(thread=run_lately.thread).update(created_at=now() - 40 * DAY)
    empty.thread.delete()
    bare = Thread.objects.create()
    Thread.objects.filter(pk=bare.pk).update(created_at=now() - 40 * DAY)

    with kept_for(THREAD=30):
        # also where the first look saw something else
        every = [thread.pk for thread in Thread.objects.all()]
        assert housekeeping.due() == Removed(threads=1)
        monkeypatch.setattr(housekeeping, "due_threads", lambda before: iter(every))
        assert keep_house() == Removed(threads=1)

    assert set(Thread.objects.all()) == {spoken.thread, live.thread, run_lately.thread}
    waiting.refresh_from_db()
    assert waiting.status == "queued"


def test_a_run_that_starts_before_the_last_transaction_keeps_its_thread(
    clerk: Agent, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = asked(clerk, scripted_model, ended=40 * DAY)
    started: list[Run] = []

    def start(*_: Any) -> bool:
        started.append(clerk.start("And now?", thread=run.thread))
        return True

    monkeypatch.setattr(housekeeping.Pass, "_shorten_thread", start)
    with kept_for(THREAD=30):
        assert keep_house() == Removed()
    started[0].refresh_from_db()
    assert started[0].status == "queued"


def test_the_walk_goes_by_batches_to_where_threads_are_young(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "LOOKED_AT", 2)
    threads = [Thread.objects.create() for _ in range(9)]
    for thread in threads[:5]:
        Thread.objects.filter(pk=thread.pk).update(created_at=now() - 40 * DAY)
    threads[1].save(role="user", content="Still here.")

    with kept_for(THREAD=30):
        assert keep_house().threads == 4

    assert list(Thread.objects.order_by("pk")) == [threads[1], *threads[5:]]


@pytest.mark.django_db(transaction=True)
def test_a_run_that_starts_at_that_moment_keeps_its_thread_and_is_not_waited_for(
    clerk: Agent, scripted_model: ScriptedModel
) -> None:
    run = asked(clerk, scripted_model, ended=40 * DAY)
    with kept_for(THREAD=30, EVENT=30):
        with transaction.atomic(), mock.patch("runs.tasks.publish"):
            started = clerk.start("And now?", thread=run.thread)
            # not committed yet: the housekeeping sees an old thread that nobody uses, and cannot have it
            [removed] = Together(keep_house).join()
        assert removed == Removed(logs=1, events=run.last_seq - 1)  # a log has nothing to do with it
        assert keep_house() == Removed()

    started.refresh_from_db()
    assert started.status == "queued"
    assert_invariants()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "meanwhile", ["start", pytest.param("save", marks=pytest.mark.slow), pytest.param("fork", marks=pytest.mark.slow)]
)
def test_who_comes_after_the_housekeeping_has_it_waits_and_is_told_that_it_is_gone(
    clerk: Agent, scripted_model: ScriptedModel, meanwhile: str
) -> None:
    run = asked(clerk, scripted_model, ended=40 * DAY)
    work = {
        "start": lambda: clerk.start("And now?", thread=run.thread),
        "save": lambda: run.thread.save(role="user", content="Wait."),
        "fork": lambda: run.fork(after_step=1),
    }[meanwhile]
    with kept_for(THREAD=30):
        with transaction.atomic():
            assert housekeeping._delete(run.thread_id, now() - 30 * DAY)
            coming = Together(work)
            wait_until(lambda: _somebody_waits() or coming.results[0] is not None)
            assert coming.results == [None]
        [came] = coming.join()

    assert isinstance(came, ThreadGone | Run.DoesNotExist), came
    assert not Run.objects.exists()
    assert not Message.objects.exists()


def _somebody_waits() -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT EXISTS (SELECT 1 FROM pg_locks WHERE NOT granted)")
        return bool(cursor.fetchone()[0])


@pytest.mark.django_db(transaction=True)
def test_what_somebody_holds_is_left_to_the_next_pass(
    clerk: Agent, scripted_model: ScriptedModel, world: World
) -> None:
    held, free = (asked(clerk, scripted_model, ended=days * DAY) for days in (40, 35))
    with world.db.connection.transaction():
        world.db.connection.execute("SELECT 1 FROM longhaul_runs_run WHERE id = %s FOR UPDATE", (held.pk,))
        with kept_for(EVENT=30):
            assert keep_house().logs == 1
    free.refresh_from_db()
    assert free.events_removed_through == free.last_seq - 1
    with kept_for(EVENT=30):
        assert keep_house().logs == 1


@pytest.mark.django_db(transaction=True)
def test_a_thread_with_a_long_log_is_taken_apart_in_short_transactions(
    clerk: Agent, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = long_log(asked(clerk, scripted_model, ended=40 * DAY), 250_000)
    second = long_log(asked(clerk, scripted_model, ended=35 * DAY, thread=first.thread), 50_000)
    seen: list[tuple[int, int]] = []

    def look(_: Removed) -> None:
        seen.append(
            (
                Thread.objects.count(),
                sum(run.last_seq - run.events_removed_through for run in Run.objects.all()),
            )
        )

    with kept_for(THREAD=30):
        monkeypatch.setattr(housekeeping.Pass, "_count", counting(housekeeping.Pass._count, look))
        housekeeping.Pass().run()

    assert list(dict.fromkeys(seen)) == [(1, 300_000), (1, 200_000), (1, 100_000), (0, 0)]
    assert not Event.objects.filter(run_id__in=[first.pk, second.pk]).exists()


def counting(count: Any, look: Any) -> Any:
    """Return Pass._count that looks at what is committed by then."""

    def counted(self: housekeeping.Pass, **more: int) -> None:
        count(self, **more)
        look(self.removed)

    return counted


# --- by hand --------------------------------------------------------------------------------------------------------


def test_by_hand_it_goes_on_until_nothing_is_due(
    clerk: Agent, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(housekeeping, "BATCH", 2)
    monkeypatch.setattr(housekeeping, "BATCHES", 2)
    for number in range(9):
        key(str(number), 2 * DAY)
    run = asked(clerk, scripted_model, ended=40 * DAY)
    with kept_for(EVENT=30, THREAD=50):
        call_command("keep_house", "--dry-run")
        events = run.last_seq - 1
        assert capsys.readouterr().out == f"Due to be removed: 9 idempotency keys, 1 logs of runs, {events} events.\n"
        assert IdempotencyKey.objects.count() == 9
        call_command("keep_house", "--json")
        assert json.loads(capsys.readouterr().out) == {
            "idempotency_keys": 9, "workers": 0, "logs": 1, "events": events, "threads": 0,
            "compacted": 0, "deltas": 0, "more": False,
        }  # fmt: skip
        call_command("keep_house")
        assert capsys.readouterr().out == "Nothing is due.\n"


@pytest.mark.slow
@pytest.mark.timeout(300)  # a command is started and killed some ten times
@pytest.mark.django_db(transaction=True)
def test_killed_in_the_middle_it_leaves_nothing_half_done(
    clerk: Agent, scripted_model: ScriptedModel, servers: embedded.Servers
) -> None:
    runs = [asked(clerk, scripted_model, ended=40 * DAY) for _ in range(20)]
    fill(runs[5], 350_000)
    settings_of = (
        "from agents_project.settings import *\nLONGHAUL = {'EVENT_RETENTION_DAYS': 30, 'THREAD_RETENTION_DAYS': 35}\n"
    )
    command = (
        "import sys, types; module = types.ModuleType('house_settings'); "
        f"exec({settings_of!r}, module.__dict__); sys.modules['house_settings'] = module; "
        "from django.core.management import execute_from_command_line as run; run(['manage.py', 'keep_house'])"
    )
    environment = {
        **os.environ, "DJANGO_SETTINGS_MODULE": "house_settings", "DATABASE_URL": url_of_the_test_database(servers),
    }  # fmt: skip
    kills = 0
    while True:
        house = subprocess.Popen(
            [sys.executable, "-c", command], cwd=embedded.PROJECT, env=environment, stdout=subprocess.PIPE, text=True
        )
        before = left()
        until = time.monotonic() + 60
        while house.poll() is None and left() == before and time.monotonic() < until:
            time.sleep(0.002)
        if kills < 5 and house.poll() is None:
            house.kill()
            kills += 1
        said, _ = house.communicate(timeout=120)
        assert_invariants()
        if house.returncode == 0:
            break
    assert kills >= 3
    assert said.startswith("Removed") or said == "Nothing is due.\n"
    assert not Thread.objects.exists()
    assert not Event.objects.exists()


def fill(run: Run, length: int) -> None:
    """Give an ended run so many rows of events."""
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE longhaul_runs_event SET seq = %s WHERE run_id = %s AND seq = %s", (length, run.pk, run.last_seq)
        )
        cursor.execute(
            "INSERT INTO longhaul_runs_event (run_id, seq, type, at, payload)"
            " SELECT %s, n, 'data', (SELECT min(at) FROM longhaul_runs_event WHERE run_id = %s), '{}'"
            " FROM generate_series(%s, %s) n",
            (run.pk, run.pk, run.last_seq, length - 1),
        )
        cursor.execute("UPDATE longhaul_runs_run SET last_seq = %s WHERE id = %s", (length, run.pk))


def left() -> tuple[int, int]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT (SELECT coalesce(sum(events_removed_through), 0) FROM longhaul_runs_run),"
            " (SELECT count(*) FROM longhaul_threads_thread)"
        )
        found: tuple[int, int] = cursor.fetchone()
        return found


def url_of_the_test_database(servers: embedded.Servers) -> str:
    return urlunsplit(urlsplit(servers.database_url)._replace(path=f"/{connection.settings_dict['NAME']}"))
