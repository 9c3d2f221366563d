"""Workers die, hang and leave; the runs go on. Real processes, real servers, a real model service over HTTP."""

from __future__ import annotations

import os
import signal
import time
from uuid import UUID

import psycopg
import pytest
import redis
from django.conf import settings
from django.db import connection, transaction

from agents_project.demo.models import Ledger
from runs import Run
from runs import tasks as run_tasks
from runs.models import Event
from tests.workers.app.agents import worker_test
from tests.workers.conftest import Kit, eventually
from threads import Message, Thread
from tools.models import ToolAttempt, ToolCall, Worker

SENTENCE = " ".join(f"w{n}" for n in range(40))


def streaming(run: Run) -> Run:
    """Wait until text of the run is in its log, and return it as it is then."""
    eventually(lambda: Event.objects.filter(run_id=run.pk, type="text.delta").exists(), why="the run streams")
    run.refresh_from_db()
    return run


def working(run: Run) -> ToolCall:
    """Wait until a tool of the run has begun, and return its call."""
    call = eventually(lambda: ToolCall.objects.filter(run_id=run.pk, status="running").first(), why="the tool runs")
    eventually(lambda: starts(call), why="the user's code began")
    return ToolCall.objects.get(pk=call.pk)


def starts(call: ToolCall) -> int:
    return redis.Redis.from_url(settings.REDIS_URL).llen(f"started:{call.pk}")


def ended(run: Run, seconds: float = 40) -> Run:
    run.wait(timeout_seconds=seconds)
    assert run.finished, run.why()
    return run


def test_a_killed_agents_worker_costs_the_run_nothing_but_the_message_it_spoke(workers: Kit) -> None:
    run = streaming(worker_test.start("tell me", owner=None))
    assert run.holder is not None
    workers.kill(workers.of(run.holder))
    ended(run)
    assert (run.status, run.output) == ("completed", SENTENCE)
    assert Message.objects.filter(run_id=run.pk, status="discarded").count() == 1
    assert [leg.reason for leg in run.leg_set.order_by("number")] == ["lost", "finished"]


def test_a_death_is_seen_at_once_by_the_lock_that_went_with_it(workers: Kit) -> None:
    with workers.who_sees_deaths_by_locks_alone():
        run = streaming(worker_test.start("tell me"))
        assert run.holder is not None
        workers.kill(workers.of(run.holder))
        assert ended(run).output == SENTENCE
        assert [leg.reason for leg in run.leg_set.order_by("number")] == ["lost", "finished"]


@pytest.mark.parametrize(("kind", "ledger", "begun"), [("atomic", 1, 2), ("idempotent", 0, 2), ("plain", 0, 2)])
def test_a_call_of_a_killed_tools_worker_runs_again_as_it_declares(
    workers: Kit, kind: str, ledger: int, begun: int
) -> None:
    run = worker_test.start(f"call {kind} 30")
    call = working(run)
    assert call.holder is not None
    workers.kill(workers.of(call.holder))
    workers.up(tools=1)
    ended(run)
    assert (run.status, run.output) == ("completed", "It is done.")
    assert list(ToolAttempt.objects.filter(call=call).order_by("number").values_list("outcome", flat=True)) == [
        "lost",
        "success",
    ]
    assert Ledger.objects.filter(call_id=call.pk).count() == ledger
    assert starts(call) == begun


def test_a_call_that_must_not_start_twice_is_unknown_when_its_worker_dies(workers: Kit) -> None:
    run = worker_test.start("call once 30")
    call = working(run)
    assert call.holder is not None
    workers.kill(workers.of(call.holder))
    workers.up(tools=1)
    eventually(lambda: Run.objects.get(pk=run.pk).status == "requires_action", why="the run asks for a person")
    call.refresh_from_db()
    assert (call.status, starts(call)) == ("unknown", 1)


def test_a_killed_prefork_child_costs_its_call_and_no_other(workers: Kit) -> None:
    run = worker_test.start("call idempotent 30")
    call = working(run)
    assert call.holder is not None
    child = Worker.objects.get(pk=call.holder)
    assert child.parent_id is not None
    os.kill(child.pid, signal.SIGKILL)
    ended(run)
    assert (run.output, starts(call)) == ("It is done.", 2)


def test_losing_every_message_of_the_broker_costs_a_republish_interval(workers: Kit) -> None:
    for kind in ("agents", "tools"):  # nobody takes a message before the broker forgets it
        for name in workers.names(kind):
            workers.kill(workers.processes[name])
    queued = [worker_test.start("tell me") for _ in range(5)]
    workers.broker.forget()
    workers.up(agents=2, tools=1)
    for run in queued:
        assert ended(run).output == SENTENCE
    calling = worker_test.start("call idempotent 0")
    workers.broker.forget()
    assert ended(calling).output == "It is done."


def test_a_cancel_tears_down_the_stream_of_a_silent_model_and_keeps_its_text(workers: Kit) -> None:
    run = streaming(worker_test.start("silence"))
    assert workers.model.open_streams == 1
    run.cancel("enough")
    eventually(lambda: workers.model.open_streams == 0, within=3, why="the stream is torn down")
    assert run.status == "cancelled"
    message = Message.objects.get(run_id=run.pk, role="assistant")
    assert (message.status, message.text) == ("partial", "So far so ")


def test_the_late_result_of_a_cancelled_call_changes_nothing(workers: Kit) -> None:
    run = worker_test.start("call plain 1.5")
    call = working(run)
    run.cancel()
    last = Run.objects.get(pk=run.pk).last_seq
    holder = ToolAttempt.objects.get(call=call).worker_id
    log = workers.folder / f"{workers_name(holder)}.log"
    eventually(lambda: f"Call {call.pk} attempt 1 came too late" in log.read_text(), why="the tool has ended")
    call.refresh_from_db()
    assert (call.outcome, Run.objects.get(pk=run.pk).last_seq) == ("cancelled", last)


def workers_name(life: UUID | None) -> str:
    assert life is not None
    return Worker.objects.get(pk=life).name.partition("@")[0]


def test_a_drained_worker_hands_its_streams_on_and_leaves(workers: Kit) -> None:
    runs = [streaming(worker_test.start("tell me")) for _ in range(5)]
    leaving = workers.of(next(run.holder for run in runs if run.holder))
    name = next(name for name, process in workers.processes.items() if process is leaving)
    workers.kill(leaving, signal.SIGTERM)
    eventually(lambda: leaving.poll() is not None, within=20, why="the drained worker ends")
    for run in runs:
        assert (ended(run).status, run.output) == ("completed", SENTENCE)
    assert {leg.reason for run in runs for leg in run.leg_set.all()} <= {"drained", "finished"}
    assert not Worker.objects.filter(name=f"{name}@test", gone_at=None).exists()


def test_no_connection_is_held_while_the_model_speaks(workers: Kit) -> None:
    """More silent streams than a worker's pool has connections, and a further run still goes to its end."""
    silent = [worker_test.start("silence") for _ in range(30)]
    for run in silent:
        streaming(run)
    assert ended(worker_test.start("call idempotent 0")).output == "It is done."


@pytest.mark.parametrize("kind", ["500", "429", "cut"])
def test_a_failing_model_service_is_asked_again_without_holding_a_worker(workers: Kit, kind: str) -> None:
    run = worker_test.start(f"fail {kind} 2 {time.monotonic()}")
    assert ended(run).output == "At last."
    legs = list(run.leg_set.order_by("number").values_list("reason", flat=True))
    assert legs == ["retry", "retry", "finished"]
    waits = [
        event.payload["not_before"]
        for event in run.events()
        if event.payload.get("reason") == "retry" and event.type == "run.queued"
    ]
    assert len(waits) == 2


def test_a_start_that_is_rolled_back_was_never_there(workers: Kit) -> None:
    asked = len(workers.model.calls)
    with transaction.atomic():
        worker_test.start("tell me")
        transaction.set_rollback(True)
    assert ended(worker_test.start("call idempotent 0")).output == "It is done."
    assert Run.objects.count() == 1
    assert Thread.objects.count() == 1
    assert len(workers.model.calls) == asked + 2


def test_cutting_every_connection_of_the_workers_costs_no_run(workers: Kit) -> None:
    run = worker_test.start("call atomic 1")
    telling = streaming(worker_test.start("tell me"))
    call = working(run)
    with psycopg.connect(**connection.get_connection_params() | {"autocommit": True}) as own:
        own.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid NOT IN (pg_backend_pid(), %s)",
            (connection.connection.info.backend_pid,),
        )
    assert ended(telling).output == SENTENCE
    assert ended(run).output == "It is done."
    assert Ledger.objects.filter(call_id=call.pk).count() == 1


def test_the_late_messages_that_a_worker_finds_when_it_starts_do_nothing_and_are_acknowledged(workers: Kit) -> None:
    """All at the same time, each on a connection of its own."""
    run = ended(worker_test.start("call idempotent 0"))
    for name in workers.names("agents"):
        workers.kill(workers.processes[name])
    for _ in range(80):
        run_tasks.publish(run.pk, 1)
    workers.up(agents=1)
    eventually(lambda: workers.broker.messages("longhaul.agents") == 0, why="all are acknowledged")
    assert Run.objects.get(pk=run.pk).legs == 1
    for name in workers.names("agents"):
        assert "Couldn't ack" not in (workers.folder / f"{name}.log").read_text()


def test_when_the_sweeping_control_worker_dies_another_goes_on(workers: Kit) -> None:
    workers.up(control=2)
    first, *_ = workers.names("control")
    workers.kill(workers.processes[first])
    run = streaming(worker_test.start("tell me"))
    assert run.holder is not None
    workers.kill(workers.of(run.holder))
    assert ended(run).output == SENTENCE


def test_a_worker_that_was_stopped_is_taken_for_dead_and_writes_nothing_when_it_wakes(workers: Kit) -> None:
    """SIGSTOP: the process and its connections stay, only its beat ends, as on a machine that is suspended."""
    run = streaming(worker_test.start("tell me"))
    assert run.holder is not None
    life, stopped = run.holder, workers.of(run.holder)
    name = Worker.objects.get(pk=life).name
    workers.kill(stopped, signal.SIGSTOP)
    try:
        ended(run)
        assert (run.status, run.output) == ("completed", SENTENCE)
        assert [leg.reason for leg in run.leg_set.order_by("number")] == ["lost", "finished"]
        last = run.last_seq
    finally:
        workers.kill(stopped, signal.SIGCONT)
    log = workers.folder / f"{name.partition('@')[0]}.log"
    eventually(lambda: f"Run {run.pk} epoch 1 was lost" in log.read_text(), why="the woken leg sees that it was lost")
    eventually(lambda: Worker.objects.filter(name=name, gone_at=None).exclude(pk=life).exists(), why="a new life")
    run.refresh_from_db()
    assert (run.last_seq, run.event_set.count()) == (last, last)
    for other in workers.names("agents"):  # what was woken works: it is the only one
        if workers.processes[other] is not stopped:
            workers.kill(workers.processes[other])
    assert ended(worker_test.start("tell me")).output == SENTENCE


def test_a_run_whose_every_worker_dies_is_poison(workers: Kit) -> None:
    run = worker_test.start("silence")
    for times in range(1, 4):  # POISON_LIMIT
        eventually(lambda n=times: Run.objects.get(pk=run.pk).legs == n, within=20, why=f"leg {times}")  # type: ignore[misc]
        run.refresh_from_db()
        assert run.holder is not None, run.why()
        workers.kill(workers.of(run.holder))
        workers.up(agents=1)
    ended(run)
    assert (run.status, run.stop_reason) == ("failed", "poison")
    assert run.error is not None
    assert run.error["code"] == "poison"


def test_a_deadline_ends_a_run_whose_model_is_silent(workers: Kit) -> None:
    run = worker_test.start("silence", limits={"deadline_seconds": 1.5})
    eventually(lambda: workers.model.open_streams == 1, why="the model is asked")
    ended(run, 10)
    assert (run.status, run.stop_reason) == ("failed", "deadline")
    eventually(lambda: workers.model.open_streams == 0, within=3, why="the stream is torn down")


def test_a_deadline_ends_a_run_whose_tool_is_slow(workers: Kit) -> None:
    run = worker_test.start("call idempotent 6", limits={"deadline_seconds": 2})
    call = working(run)
    ended(run, 10)
    call.refresh_from_db()
    assert (run.status, run.stop_reason) == ("failed", "deadline")
    # The deadline cuts the tool's own time too: who comes first says how its call ended.
    assert call.outcome == "cancelled" or (call.error or {}).get("code") == "timed_out"
