"""Cells of the table of docs/tools.md with real workers: killed, stopped and woken, asked twice; and what people say then.

The rows of every cell are compared in tests/tools/test_table.py; a killed worker by kind of tool is in test_deaths.py.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import pytest

from agents_project.demo.models import Ledger
from runs import Run
from tests.workers.app.agents import worker_test
from tests.workers.conftest import Kit, eventually
from tests.workers.test_deaths import ended, starts, workers_name, working
from threads.models import Message
from tools import tasks as tool_tasks
from tools.models import ToolAttempt, ToolCall

pytestmark = pytest.mark.slow


def attempts(call: ToolCall) -> list[str]:
    return list(ToolAttempt.objects.filter(call=call).order_by("number").values_list("outcome", flat=True))


def unknown(run: Run) -> ToolCall:
    eventually(lambda: Run.objects.get(pk=run.pk).status == "requires_action", why="the run asks for a person")
    return ToolCall.objects.get(run_id=run.pk, status="unknown")


@contextmanager
def stopped(workers: Kit, life: UUID | None) -> Iterator[None]:
    """SIGSTOP for the block: the worker and its connections stay, only its beat ends. It wakes at the end."""
    process = workers.of(life)
    workers.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        workers.kill(process, signal.SIGCONT)


def log_of(workers: Kit, life: UUID | None) -> str:
    return (workers.folder / f"{workers_name(life)}.log").read_text()


@pytest.mark.parametrize("kind", ["plain", "atomic"])
def test_a_worker_that_was_stopped_in_a_call_is_refused_when_it_wakes(workers: Kit, kind: str) -> None:
    workers.up(tools=2)  # before one is stopped: to start may take longer than who is silent is taken for alive
    run = worker_test.start(f"call {kind} 3")
    call = working(run)
    life = call.holder
    with stopped(workers, life):
        assert ended(run).output == "It is done."
        last = run.last_seq
        assert attempts(call) == ["lost", "success"]
    eventually(lambda: f"Call {call.pk} attempt 1 came too late" in log_of(workers, life), why="it is told")
    run.refresh_from_db()
    assert (run.last_seq, attempts(call)) == (last, ["lost", "success"])
    if kind == "atomic":
        assert list(Ledger.objects.filter(call_id=call.pk).values_list("number", flat=True)) == [2]


def test_the_late_result_of_a_worker_that_was_stopped_settles_an_unknown_call(workers: Kit) -> None:
    run = worker_test.start("call once 3")
    call = working(run)
    with stopped(workers, call.holder):
        unknown(run)
    assert ended(run).output == "It is done."
    call.refresh_from_db()
    assert (call.outcome, call.result, starts(call), attempts(call)) == ("success", "done", 1, ["success"])


def test_a_persons_answer_stands_when_the_worker_wakes(workers: Kit) -> None:
    run = worker_test.start("call once 3")
    call = working(run)
    life = call.holder
    with stopped(workers, life):
        unknown(run).succeed("seen in the mailbox")
        assert ended(run).output == "It is done."
        last = run.last_seq
    eventually(lambda: f"Call {call.pk} attempt 1 came too late" in log_of(workers, life), why="it is told")
    call.refresh_from_db()
    run.refresh_from_db()
    assert (call.result, run.last_seq, attempts(call)) == ("seen in the mailbox", last, ["lost"])


def test_a_call_that_a_person_releases_runs_again(workers: Kit) -> None:
    run = worker_test.start("call once 30")
    call = working(run)
    workers.kill(workers.of(call.holder))
    unknown(run).fail("It is in no mailbox.", retryable=True)
    workers.up(tools=1)
    assert ended(run).output == "It is done."
    assert (starts(call), attempts(call)) == (2, ["released", "success"])


@pytest.mark.parametrize(("kind", "status", "reason"), [
    ("once_told", "completed", "end_turn"), ("once_fails", "failed", "tool_unknown"),
])  # fmt: skip
def test_a_tool_that_asks_nobody_goes_on_as_it_chose(workers: Kit, kind: str, status: str, reason: str) -> None:
    run = worker_test.start(f"call {kind} 30")
    call = working(run)
    workers.kill(workers.of(call.holder))
    ended(run)
    call.refresh_from_db()
    assert (run.status, run.stop_reason) == (status, reason)
    assert call.error is not None
    assert (call.error["code"], starts(call), attempts(call)) == ("unknown_outcome", 1, ["lost"])


@pytest.mark.parametrize("kind", ["once", "idempotent"])
def test_a_message_that_comes_many_times_is_one_attempt(workers: Kit, kind: str) -> None:
    workers.up(tools=2)
    run = worker_test.start(f"call {kind} 1")
    call = working(run)
    for _ in range(20):
        tool_tasks.publish(call.pk, 1, call.timeout)
    assert ended(run).output == "It is done."
    for _ in range(20):
        tool_tasks.publish(call.pk, 1, call.timeout)
    assert ended(worker_test.start("call idempotent 0")).output == "It is done."  # it came behind them
    assert (starts(call), attempts(call)) == (1, ["success"])


@pytest.mark.proof  # the check of all invariants after it takes minutes on a busy machine
@pytest.mark.timeout(600)
def test_a_step_of_a_thousand_calls_is_answered_in_their_order_and_its_failures_stay_theirs(workers: Kit) -> None:
    run = worker_test.start("count tenth_fails 1000")
    assert ended(run, 200).output == "It is done."
    calls = ToolCall.objects.filter(run_id=run.pk).order_by("index")
    assert [(call.arguments["number"], call.outcome, call.result) for call in calls] == [
        (number, "success", number) if number % 10 else (number, "failed", None) for number in range(1, 1001)
    ]
    assert {call.error["message"] for call in calls if call.error} == {
        f"{number} ends in 0." for number in range(10, 1001, 10)
    }
    told = Message.objects.filter(run_id=run.pk, role="tool").order_by("position")
    assert [message.content[0]["tool_call"] for message in told] == [str(call.pk) for call in calls]
    # The messages were sent once or several times, for they waited: each call was run once.
    assert ToolAttempt.objects.filter(call__in=calls).count() == 1000
    assert {call.attempt for call in calls} == {1}
    # The model was shown all of them: its window holds twenty messages, and the last step whole.
    shown = [message["content"] for message in workers.model.calls[-1].messages if message["role"] == "tool"]
    assert [json.loads(content) for content in shown[:9]] == list(range(1, 10))
    assert "10 ends in 0." in shown[9]
    assert len(shown) == 1000
