"""`run_agent` and `follow_run`: what is unknown is answered by what exists, and the database is as before."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import OperationalError, connection

from runs import agents, explain
from runs.events import RunEvent
from runs.models import Run
from runs.pytest_longhaul import run_to_end, scripted
from runs.terminal import RunView, patient
from threads.models import Message, Thread
from tools.models import Worker


def told(*arguments: str, **options: Any) -> tuple[str, str]:
    """Return stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    call_command(*arguments, stdout=out, stderr=err, **options)
    return out.getvalue(), err.getvalue()


def refused(*arguments: str) -> str:
    """Return why the command was refused, having changed nothing."""
    before = (Run.objects.count(), Thread.objects.count(), Message.objects.count())
    with pytest.raises(CommandError) as caught:
        told(*arguments)
    assert (Run.objects.count(), Thread.objects.count(), Message.objects.count()) == before
    return str(caught.value)


@pytest.mark.django_db
def test_an_unknown_agent_is_answered_with_those_that_exist() -> None:
    assert "tester" in refused("run_agent", "nobody", "hello")


@pytest.mark.django_db
def test_an_unknown_user_is_answered_with_those_that_exist() -> None:
    assert "createsuperuser" in refused("run_agent", "tester", "hello", "--user", "ann")
    User.objects.create_user("bob")
    assert refused("run_agent", "tester", "hello", "--user", "ann") == "There is no user 'ann'; there are:\n  bob"


@pytest.mark.django_db
@pytest.mark.parametrize("id", ["nonsense", "0199f000-0000-7000-8000-000000000001"])
def test_an_unknown_thread_or_run_is_answered_with_the_latest_ones(id: str) -> None:
    assert "there are none yet" in refused("run_agent", "tester", "hello", "--thread", id)
    assert "there are none yet" in refused("follow_run", id)
    thread = Thread.objects.create(title="Orders")
    run = Run.objects.create(thread=thread, agent="tester")
    assert f"  {thread.pk} Orders" in refused("run_agent", "tester", "hello", "--thread", id)
    assert f"  {run.pk} tester queued" in refused("follow_run", id)


@pytest.mark.django_db
def test_an_empty_input_is_refused() -> None:
    assert refused("run_agent", "tester", "")


@pytest.mark.django_db
def test_a_run_is_started_for_its_user_on_its_thread() -> None:
    user = User.objects.create_user("bob")
    thread = Thread.objects.create(owner=user)
    out, _ = told("run_agent", "tester", "hello", "--user", "bob", "--thread", str(thread.pk), "--json")
    run = Run.objects.get()
    assert json.loads(out) == {"run": str(run.pk), "thread": str(thread.pk), "agent": "tester", "status": "queued"}
    assert (run.owner, run.thread) == (user, thread)
    # And on a new thread, which is the user's too
    told("run_agent", "tester", "hello", "--user", "bob")
    assert [(each.owner, each.thread.owner) for each in Run.objects.exclude(pk=run.pk)] == [(user, user)]


@pytest.mark.django_db
def test_absent_workers_are_named_with_the_command_that_starts_them() -> None:
    # Given no worker
    _, err = told("run_agent", "tester", "hello")
    assert err.splitlines()[:2] == [
        "No agents worker is present: the run waits. Start one:",
        f"  {explain.celery()} -A agents_project worker -Q longhaul.agents -P gevent -c 1000 -n agents@%h",
    ]
    assert "No tools worker is present" in err
    assert "No control worker is present" in err
    # When all kinds are there
    for number, kind in enumerate(("agents", "tools", "control")):
        Worker.objects.create(name=kind, kind=kind, host="h", pid=number, lock_key=number)
    # Then nothing is said
    assert told("run_agent", "tester", "hello")[1] == ""


@pytest.mark.django_db
def test_a_cursor_that_cannot_be_is_refused() -> None:
    run = Run.objects.create(thread=Thread.objects.create(), agent="tester", status="completed", stop_reason="end_turn")
    assert "0 or more" in refused("follow_run", str(run.pk), "--after=-1")
    assert "nothing comes after" in refused("follow_run", str(run.pk))


@pytest.mark.django_db
@pytest.mark.parametrize("part", [slice(0, 13), slice(-6, None), slice(None)], ids=["begin", "end", "whole"])
def test_a_run_is_followed_by_a_part_of_its_id_that_no_other_run_has(part: slice) -> None:
    run = ended()
    assert "run completed (end_turn)" in told("follow_run", str(run.pk)[part])[0]


@pytest.mark.django_db
def test_a_part_that_two_runs_have_is_refused() -> None:
    first, second = str(ended().pk), str(ended().pk)
    assert first[:6] == second[:6]  # both begin with the time
    assert "More than one run's id" in refused("follow_run", first[:6])


@pytest.mark.django_db
@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "plain"])
def test_a_reader_of_stdout_that_leaves_ends_the_command_without_a_word(options: list[str]) -> None:
    # Given a pipe whose reader has left, as `| head` does
    run = ended()
    reading, writing = os.pipe()
    os.close(reading)
    err = io.StringIO()
    with os.fdopen(writing, "w", encoding="utf-8") as pipe, pytest.raises(SystemExit) as caught:
        call_command("follow_run", str(run.pk), *options, stdout=pipe, stderr=err)
    # Then it ends as SIGPIPE would end it, and so does the closing of the pipe, which flushes what is left
    assert caught.value.code == 141
    assert err.getvalue() == ""


@pytest.mark.django_db(transaction=True)
def test_a_database_that_was_away_costs_a_follower_nothing() -> None:
    # Given a reader whose connection is ended by the server once, in the middle of the events
    run = ended()
    view, lines, reads = RunView(run.pk), list[str](), list[int]()

    def read(after: int) -> Iterator[RunEvent]:
        reads.append(after)
        for event in run.events(after=after, follow=True):
            if len(reads) == 1 and event.seq == 3:
                with connection.cursor() as cursor:
                    cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            yield event

    # When it reads on
    seen = []
    for event in patient(read, view, lines.extend):
        view.apply(event.as_dict())
        seen.append(event.as_dict()["seq"])
    # Then every event came once, in order, and the gap was told
    assert reads == [0, 2]
    assert seen == list(range(1, run.last_seq + 1))
    assert "the database is away" in lines[0]
    assert "the database is back after" in lines[1]


@pytest.mark.django_db(transaction=True)
def test_a_database_that_stays_away_ends_the_wait() -> None:
    def read(after: int) -> list[RunEvent]:
        raise OperationalError("connection refused")

    with pytest.raises(OperationalError, match="connection refused"):
        list(patient(read, RunView("r"), lambda lines: None, patience=timedelta()))


@pytest.mark.django_db(transaction=True)
def test_a_second_outage_without_an_event_between_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be silent for hours: the patience counts from each outage, not from the first."""
    moment = [0.0]
    monkeypatch.setattr("runs.terminal.reader.time.monotonic", lambda: moment[0])
    monkeypatch.setattr("runs.terminal.reader._AGAIN_SECONDS", 0.0)
    lines, reads = list[str](), list[int]()

    def read(after: int) -> Iterator[RunEvent]:
        reads.append(after)
        moment[0] += 3600  # of waiting for the next event, in which the database answered each second
        if len(reads) < 5:
            raise OperationalError("the server restarts")
        yield from ()

    assert list(patient(read, RunView("r"), lines.extend, patience=timedelta(minutes=5))) == []
    assert reads == [0] * 5
    assert ["away" in line for line in lines] == [True, False] * 4


@pytest.mark.django_db(transaction=True)
def test_an_outage_that_comes_back_at_once_is_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database answers, and reading fails all the same: that ends, and is told once."""
    monkeypatch.setattr("runs.terminal.reader._AGAIN_SECONDS", 0.01)
    lines, reads = list[str](), list[int]()

    def read(after: int) -> list[RunEvent]:
        reads.append(after)
        raise OperationalError("a standby that lags")

    with pytest.raises(OperationalError, match="lags"):
        list(patient(read, RunView("r"), lines.extend, patience=timedelta(seconds=0.2)))
    assert len(reads) > 2
    assert len(lines) == 2


@pytest.mark.django_db(transaction=True)
def test_a_database_that_answers_no_more_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.terminal.reader._AGAIN_SECONDS", 0.01)

    def away(*_: Any) -> Any:
        raise OperationalError("connection refused")

    monkeypatch.setattr("runs.terminal.reader.clock", SimpleNamespace(now=away))
    with pytest.raises(OperationalError, match="connection refused"):
        list(patient(away, RunView("r"), lambda lines: None, patience=timedelta(seconds=0.1)))


@pytest.mark.django_db
@pytest.mark.parametrize("arguments", [["run_agent", "tester", "hi"], ["follow_run", "0199"], ["list_runs"]])
def test_a_database_that_is_away_is_told_in_a_line(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise OperationalError("connection refused\n  Is the server running?")

    before = (Run.objects.count(), Thread.objects.count())
    with monkeypatch.context() as patched, pytest.raises(CommandError) as caught:
        patched.setattr("django.db.models.sql.compiler.SQLCompiler.execute_sql", away)
        patched.setattr("runs.agents.Agent.start", away)
        told(*arguments)
    assert str(caught.value) == "The database is away: connection refused."
    assert (Run.objects.count(), Thread.objects.count()) == before


@pytest.mark.django_db
def test_a_run_that_was_started_is_followed_though_the_database_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> Any:
        raise OperationalError("connection refused")

    monkeypatch.setattr("runs.management.commands.run_agent.absent_workers", away)
    monkeypatch.setattr("runs.terminal.reader.clock", SimpleNamespace(now=away))
    monkeypatch.setattr(Run, "events", lambda run, after=0, follow=False: iter(()))
    with pytest.raises(SystemExit) as caught:
        told("run_agent", "tester", "hi", "--follow")
    assert caught.value.code == 1  # its events ended without an end, and nothing was raised
    assert Run.objects.count() == 1


def ended() -> Run:
    """Return a run that has completed, with all of its events."""
    run = agents.get("tester").start("hello")
    with scripted("Hello."):
        run_to_end(run)
    run.refresh_from_db()
    return run
