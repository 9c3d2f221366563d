"""The time of calls: limits, long tools, deploys and cancels, with real workers and all their own times made short.

A leg of half a second, a model call of two, a broker that delivers again at once, a presence that is missed after four.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import current_app
from django.conf import settings

from agents_project.demo.models import Ledger
from runs import Run
from runs.agents import registry
from runs.http import answers
from tests.workers.app.slow import slow_test
from tests.workers.conftest import Kit, Redis, eventually, kit_over
from tests.workers.test_calls import attempts, log_of, stopped
from tests.workers.test_deaths import ended, starts, streaming, workers_name, working
from tools.models import ToolCall, Worker

pytestmark = pytest.mark.slow

SHORT = {
    "TESTS_LONGHAUL": '{"LEG_BUDGET_SECONDS": 0.5, "MODEL_TIMEOUT_SECONDS": 2, "MODEL_SILENCE_SECONDS": 2}',
    "TESTS_PRESENCE_TTL_SECONDS": "4",
}
TTL = 4.0


@pytest.fixture(scope="module")
def kit(django_db_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    with kit_over(Redis(), tmp_path_factory.mktemp("workers")) as kit:
        kit.environment |= SHORT
        registry.add(slow_test)
        yield kit


def told(call: ToolCall, what: str) -> list[float]:
    """When the tool said so: seconds since the epoch."""
    rows: Any = redis.Redis.from_url(settings.REDIS_URL).lrange(f"{what}:{call.pk}", 0, -1)
    return [float(each) for each in rows]


def holder_of(call: ToolCall) -> Worker:
    assert call.holder is not None
    return Worker.objects.get(pk=call.holder)


def begun(what: str, **options: Any) -> tuple[Run, ToolCall]:
    run = slow_test.start(f"call {what}", **options)
    return run, working(run)


def settled(call: ToolCall) -> ToolCall:
    eventually(lambda: ToolCall.objects.get(pk=call.pk).status == "settled", why="the call is settled")
    call.refresh_from_db()
    return call


# --- limits


@pytest.mark.parametrize("kind", ["limited", "limited_async"])
def test_a_tool_whose_time_is_up_may_clean_up_and_is_not_tried_again(workers: Kit, kind: str) -> None:
    run, call = begun(f"{kind} 30")
    assert ended(run).output == "It is done."
    settled(call)
    assert (call.outcome, call.error["code"] if call.error else "") == ("failed", "timed_out")
    assert (len(told(call, "cleaned")), attempts(call)) == (1, ["failed"])


def test_a_tool_that_heeds_no_limit_is_killed_and_its_call_settled_by_its_own_worker(workers: Kit) -> None:
    """There is no control worker: neither watcher nor sweep has a part in it."""
    workers.up(tools=1)
    for name in workers.names("control"):
        workers.kill(workers.processes[name])
    _, call = begun("stubborn 60")
    child = holder_of(call)
    settled(call)
    assert call.error is not None
    assert call.error["code"] == "timed_out"
    assert "Whether it has taken effect is not known" in call.error["message"]
    eventually(lambda: not os.path.exists(f"/proc/{child.pid}"), why="its process is gone")
    assert (len(told(call, "unheeded")), told(call, "ended"), starts(call)) == (1, [], 1)
    workers.up(control=1)
    assert ended(slow_test.start("call limited 0")).output == "It is done."  # its place was taken


def test_a_child_that_dies_is_missed_by_its_own_worker(workers: Kit) -> None:
    for name in workers.names("control"):
        workers.kill(workers.processes[name])
    _, call = begun("unlimited 30")
    os.kill(holder_of(call).pid, signal.SIGKILL)
    eventually(lambda: ToolCall.objects.get(pk=call.pk).attempt == 2, why="it is requested again")
    assert attempts(call)[0] == "lost"


def test_the_deadline_of_a_run_cuts_the_time_of_its_tool(workers: Kit) -> None:
    run, call = begun("unlimited 30", limits={"deadline_seconds": 3})
    eventually(lambda: told(call, "cleaned"), within=20, why="the tool is told")
    ended(run)
    assert (run.status, run.stop_reason) == ("failed", "deadline")


# --- long tools


def test_a_long_tool_outlives_leg_model_and_message_and_runs_once(workers: Kit) -> None:
    """Its message came a second time, from the broker, while it ran."""
    run, call = begun("long 8")
    log = workers.folder / f"{workers_name(call.holder)}.log"
    received = f"longhaul.execute_call[{call.attempts.get().task_id}] received"
    eventually(lambda: ToolCall.objects.get(pk=call.pk).progress, why="it says how far it is")
    # The broker's patience has ended. (kombu looks once in 100 s whose has.)
    with current_app.connection_for_read(transport_options={"visibility_timeout": 0.2}) as broker:
        eventually(lambda: _restored(broker) or log.read_text().count(received) > 1, why="a second message")
    call.refresh_from_db()
    assert call.status == "running"
    assert call.progress is not None
    shown = answers.tool_call(call)
    assert shown["progress"] == call.progress
    assert [each["worker_name"] for each in shown["attempts"]] == [f"{workers_name(call.holder)}@test"]
    assert re.search(r"long \(running on tools-.*, attempt 1 of 3, \d+%: \d\.\d s of 8", run.why()), run.why()
    assert ended(run).output == "It is done."
    assert (starts(call), attempts(call), run.legs) == (1, ["success"], 2)


def _restored(broker: Any) -> bool:
    """Do what kombu does for messages that were taken long ago and not acknowledged."""
    broker.default_channel.qos.restore_visible(num=100, interval=1)
    return False


@pytest.mark.parametrize("kind", ["gripping", "spawning"])
def test_a_tool_that_leaves_its_process_no_time_is_not_taken_for_dead(workers: Kit, kind: str) -> None:
    run, call = begun(f"{kind} {TTL + 2}")
    assert ended(run).output == "It is done."
    settled(call)
    assert (call.outcome, starts(call), attempts(call)) == ("success", 1, ["success"])
    assert call.result in ("done", "done (0)")


@pytest.mark.proof  # test_calls has the short form: its settlement is refused
def test_what_was_stopped_for_longer_than_its_presence_has_no_effect_when_it_wakes(workers: Kit) -> None:
    workers.up(tools=2)
    run, call = begun("talkative 2")
    life = call.holder
    with stopped(workers, life):
        eventually(lambda: ToolCall.objects.get(pk=call.pk).attempt == 2, why="it is taken")
        assert ended(run).output == "It is done."
        last = run.last_seq
    eventually(lambda: f"Call {call.pk} attempt 1 came too late" in log_of(workers, life), why="it is told")
    run.refresh_from_db()
    assert (run.last_seq, run.event_set.count(), attempts(call)) == (last, last, ["lost", "success"])


# --- cancel


@pytest.mark.parametrize("whole", [True, False], ids=["the run", "the call"])
def test_a_tool_that_listens_ends_soon_after_a_cancel(workers: Kit, whole: bool) -> None:
    run, call = begun("long 60")
    asked = time.time()
    _ = run.cancel() if whole else call.cancel()
    eventually(lambda: told(call, "heard"), why="it has heard")
    print(f"a tool that listens: {told(call, 'heard')[0] - asked:.3f} s after the cancel")
    assert (
        told(call, "heard")[0] - asked < 10
    )  # under 0.1 s as a rule; without the row it would be at its end, in a minute
    settled(call)
    assert call.outcome == "cancelled"


def test_a_stream_ends_soon_after_a_cancel(workers: Kit) -> None:
    run = streaming(slow_test.start("silence"))
    asked = time.time()
    run.cancel()
    eventually(lambda: workers.model.open_streams == 0, within=10, why="the stream is torn down")
    print(f"a stream: {time.time() - asked:.3f} s after the cancel")


@pytest.mark.parametrize("kind", ["unlimited", "deaf"])
def test_a_tool_that_does_not_listen_is_cut_after_its_grace(workers: Kit, kind: str) -> None:
    _, call = begun(f"{kind} 60")
    child = holder_of(call)
    call.cancel()
    if kind == "unlimited":
        eventually(lambda: told(call, "cleaned"), why="it is interrupted")
        os.kill(child.pid, 0)
    else:
        eventually(lambda: told(call, "unheeded"), why="it is interrupted")
        eventually(lambda: not os.path.exists(f"/proc/{child.pid}"), why="its process is gone")
        assert told(call, "ended") == []
    assert ended(slow_test.start("call limited 0")).output == "It is done."
    assert (settled(call).outcome, starts(call), attempts(call)) == ("cancelled", 1, ["cancelled"])


@pytest.mark.parametrize("kind", ["talkative", "writing"])
@pytest.mark.parametrize("whole", [True, False], ids=["the run", "the call"])
def test_what_a_cancelled_tool_says_and_writes_has_no_effect(workers: Kit, kind: str, whole: bool) -> None:
    run, call = begun(f"{kind} 30")
    life = call.holder
    _ = run.cancel() if whole else call.cancel()
    eventually(lambda: f"Call {call.pk} attempt 1 came too late" in log_of(workers, life), why="it is told")
    ended(run)
    assert len(told(call, "talked")) == 1
    call.refresh_from_db()
    assert (call.outcome, call.result, call.progress) == ("cancelled", None, None)
    assert not run.event_set.filter(type__in=["tool_call.progress", "data"]).exists()
    assert not Ledger.objects.filter(call_id=call.pk).exists()


# --- deploys


@pytest.mark.parametrize("kind", ["given_back", "stopping"])
def test_a_long_tool_that_may_begin_again_lets_its_worker_leave(workers: Kit, kind: str) -> None:
    run, call = begun(f"{kind} 600")
    leaving = workers.of(call.holder)
    os.kill(leaving.pid, signal.SIGTERM)
    eventually(lambda: leaving.poll() is not None, why="the worker leaves")
    workers.up(tools=1)
    assert ended(run).output == "It is done."
    call.refresh_from_db()
    assert (starts(call), attempts(call), call.max_attempts) == (2, ["given_back", "success"], 4)


def test_a_worker_waits_for_a_tool_that_may_not(workers: Kit) -> None:
    run, call = begun("long 6")
    leaving = workers.of(call.holder)
    os.kill(leaving.pid, signal.SIGTERM)
    eventually(lambda: Worker.objects.filter(name=_name(call), draining=True).exists(), why="it says that it leaves")
    workers.up(tools=1)
    assert ended(run).output == "It is done."
    assert (starts(call), attempts(call)) == (1, ["success"])
    eventually(lambda: leaving.poll() is not None, why="the worker leaves")


def _name(call: ToolCall) -> str:
    return Worker.objects.get(pk=call.attempts.get().worker_id).name


# --- waiting


def test_an_attempt_that_waits_holds_no_worker(workers: Kit) -> None:
    """More of them than the worker has places, and another call passes them."""
    runs = [slow_test.start("call busy 6") for _ in range(3)]

    def waiting() -> bool:
        return ToolCall.objects.filter(status="retrying", holder=None, not_before__isnull=False).count() == len(runs)

    eventually(waiting, why="all wait")
    assert ended(slow_test.start("call limited 0")).output == "It is done."
    assert waiting()
    call = ToolCall.objects.filter(run_id=runs[0].pk).get()
    [first] = answers.tool_call(call)["attempts"]
    assert first["outcome"] == "retrying"
    assert first["error"] == {"code": "error", "message": "The tool failed with Busy."}
    assert first["next_try_at"] > first["ended_at"] > first["started_at"]
    for run in runs:
        assert ended(run).output == "It is done."
