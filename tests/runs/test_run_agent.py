"""`run_agent` and `follow_run`: what is unknown is answered by what exists, and the database is as before."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command

from runs import explain
from runs.models import Run
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
