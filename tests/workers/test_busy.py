"""A busy thread with real workers: the live stream is torn down, the live call is left alone, and the new run answers."""

from __future__ import annotations

import pytest

from runs import Run
from runs.verification import verify
from tests.workers.app.agents import worker_test
from tests.workers.conftest import Kit, eventually
from tests.workers.test_deaths import SENTENCE, ended, streaming, working
from threads.models import Message
from tools.models import ToolCall

pytestmark = pytest.mark.slow


def shown(run: Run) -> list[tuple[str, str, str]]:
    messages = Message.objects.filter(thread=run.thread_id, position__isnull=False).order_by("position")
    return [(message.role, message.status, message.text) for message in messages]


@pytest.mark.parametrize("busy", ["interrupt", "rollback"])
def test_the_stream_of_a_silent_model_is_torn_down_and_the_new_run_answers(workers: Kit, busy: str) -> None:
    run = streaming(worker_test.start("silence"))
    assert workers.model.open_streams == 1
    new = worker_test.start("tell me", thread=run.thread, busy=busy)
    assert ended(new).output == SENTENCE
    eventually(lambda: workers.model.open_streams == 0, why="the stream is torn down")
    kept = "partial" if busy == "interrupt" else "rolled_back"
    asked = "completed" if busy == "interrupt" else "rolled_back"
    assert shown(run) == [
        ("user", asked, "silence"), ("assistant", kept, "So far so "),
        ("user", "completed", "tell me"), ("assistant", "completed", SENTENCE),
    ]  # fmt: skip
    for each in (run, new):
        assert verify(each).differences == []


def test_a_call_that_runs_when_its_run_is_rolled_back_is_told_and_changes_nothing_more(workers: Kit) -> None:
    run = worker_test.start("call plain 1.5")
    call = working(run)
    new = worker_test.start("tell me", thread=run.thread, busy="rollback")
    assert new.rolled_back is not None
    assert [(each["id"], each["effect"]) for each in new.rolled_back["tool_calls"]] == [(str(call.pk), "possible")]
    assert ended(new).output == SENTENCE
    assert ToolCall.objects.get(pk=call.pk).outcome == "cancelled"
    assert shown(new)[-2:] == [("user", "completed", "tell me"), ("assistant", "completed", SENTENCE)]
    assert verify(run).differences == []


def test_a_run_that_waits_for_its_call_takes_in_what_steers_it(workers: Kit) -> None:
    run = worker_test.start("call plain 1")
    working(run)
    assert worker_test.start("tell me", thread=run.thread, busy="steer") == run
    assert ended(run).status == "completed"
    assert [(role, status) for role, status, _ in shown(run)] == [
        ("user", "completed"), ("assistant", "completed"), ("tool", "completed"), ("user", "completed"),
        ("assistant", "completed"),
    ]  # fmt: skip
    assert Run.objects.count() == 1
    assert verify(run).differences == []
