"""The sweep finds what is overdue and moves it on: lost messages, dead and lost holders, what passed its time.

What one SQL function does with one row is held in `tests/protocol`; here it is the passes over real locks and a real broker.
"""

from __future__ import annotations

import io
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
import redis
from celery import current_app
from django.core.management import call_command
from django.db import connection
from kombu import Producer

from runs import engine, lifecycle, sweep, tasks, worker
from runs.conf import settings
from runs.sweep import Sweep, SweepThread, Watcher
from tests.protocol.rows import SECOND, Call, Claim, Database, World, a_call, wait_until
from threads.ids import new_id
from tools import execution, messages, presence
from tools import tasks as tool_tasks
from tools.presence import Presence

pytestmark = pytest.mark.django_db(transaction=True)

LEASE = timedelta(seconds=61)  # longer than a leg may prepare its turn


@dataclass
class Sent:
    runs: list[tuple[UUID, int]] = field(default_factory=list)
    calls: list[tuple[UUID, int, timedelta, str]] = field(default_factory=list)

    def taken(self) -> list[Any]:
        """What was sent since the last look."""
        seen = [*self.runs, *self.calls]
        self.runs.clear()
        self.calls.clear()
        return seen


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What is sent to the broker, in its place."""
    sent = Sent()
    monkeypatch.setattr(tasks, "publish", lambda run, seq, agent: sent.runs.append((run, seq)))
    monkeypatch.setattr(tool_tasks, "publish", lambda *message: sent.calls.append(message[:4]))
    return sent


class Watch:
    """The sweep's own clock, which counts only for how long it has watched. `meanwhile` happens between two looks."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.meanwhile: Callable[[], Any] = lambda: None

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def sleep(self, seconds: float) -> None:
        self.meanwhile()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(sweep, "time", SimpleNamespace(monotonic=watch.monotonic, sleep=watch.sleep))
    return watch


@pytest.fixture
def passes(watch: Watch) -> Iterator[Sweep]:
    """The sweep of one control process."""
    passes = Sweep()
    yield passes
    passes.watcher.drop()


class Process:
    """A worker's process, as the database sees it: a row that beats, and a session that holds its lock."""

    def __init__(self, world: World, name: str = "agents@a") -> None:
        self.world = world
        self.id = world.worker(name)
        [row] = world.db.rows("SELECT lock_key FROM longhaul_tools_worker WHERE id = %s", self.id)
        self.key = row["lock_key"]
        self.lock()

    def lock(self) -> None:
        self.session = Database(connection.connection.info.dsn)
        self.session.execute("SELECT pg_advisory_lock(%s)", self.key)

    def die(self) -> None:
        """Its socket closes, as the kernel does it for a killed process."""
        ours = socket.socket(fileno=self.session.connection.pgconn.socket)
        ours.shutdown(socket.SHUT_RDWR)
        ours.detach()
        self.session.connection.close()
        wait_until(lambda: not self.locked())

    def locked(self) -> bool:
        return bool(self.world.db.one("SELECT longhaul_worker_locked(%s)", self.id))

    def closed(self) -> bool:
        [row] = self.world.db.rows("SELECT gone_at FROM longhaul_tools_worker WHERE id = %s", self.id)
        return row["gone_at"] is not None

    def speaks(self) -> Claim:
        return self.world.turn(self.world.claim(self.world.start(), self.id))

    def calls(self, **options: Any) -> Call:
        """Claim the only call of a run that waits for it."""
        waiting = self.world.waiting(a_call(**options))
        [call] = self.world.calls(waiting.run)
        return self.world.call_claim(call, self.id)


@pytest.fixture
def process(world: World) -> Iterator[Process]:
    process = Process(world)
    yield process
    process.session.connection.close()


def reclaimed(world: World, claim: Claim) -> bool:
    run = world.run(claim.run)
    return (run["status"], run["epoch"]) == ("queued", claim.epoch + 1)


# --- lost messages


def test_lost_messages_are_sent_again_after_a_second_and_then_less_and_less_often(
    world: World, passes: Sweep, sent: Sent
) -> None:
    run = world.start()
    waiting = world.waiting(a_call(timeout_seconds=30, queue="slow"))
    [call] = world.calls(waiting.run)
    moments: list[int] = []
    for second in range(50):
        world.ahead(second * SECOND + timedelta(milliseconds=50))
        done = passes.look()
        seen = sent.taken()
        assert (done.published_runs, done.published_calls) == ((1, 1) if seen else (0, 0))
        if seen:
            assert seen == [(run, 1), (call, 1, timedelta(seconds=30), "slow")]
            moments.append(second)
    assert [after - before for before, after in itertools.pairwise([0, *moments])] == [1, 2, 4, 8, 15, 15]


def test_a_pass_is_bounded_and_the_next_goes_on(
    world: World, passes: Sweep, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "BATCH", 2)
    runs = {world.start() for _ in range(5)}
    world.ahead(2 * SECOND)
    assert [passes.look().published_runs for _ in range(4)] == [2, 2, 1, 0]
    assert {run for run, _ in sent.runs} == runs


def test_a_message_that_was_not_lost_after_all_does_nothing_when_it_comes_twice(
    world: World, passes: Sweep, sent: Sent
) -> None:
    run = world.start()
    world.ahead(2 * SECOND)
    passes.look()
    [(_, again)] = sent.runs
    claim = world.claim(run, dispatch=1)
    assert world.try_claim(run, world.worker(), again) is None
    assert world.run(run)["holder"] == claim.worker


# --- backed off, though the broker has lost everything


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A queue of the real broker that is this test's alone: give it so many messages."""
    name = f"test.{new_id()}"
    monkeypatch.setattr(sweep, "settings", lambda: SimpleNamespace(agents_queue=name, tools_queue=name))

    def fill(count: int) -> None:
        for _ in range(count):
            messages.send(tasks.advance_run, [str(new_id()), 1], queue=name, task_id=str(new_id()), shown="")

    yield fill
    with current_app.pool.acquire(block=True) as broker:
        broker.default_channel.queue_delete(name)  # type: ignore[attr-defined]


def backed_off(world: World) -> tuple[UUID, UUID]:
    """A run and a call of which several messages were sent."""
    run, waiting = world.start(), world.waiting()
    [call] = world.calls(waiting.run)
    for table, row in (("runs_run", run), ("tools_toolcall", call)):
        world.db.execute(
            f"UPDATE longhaul_{table} SET publishes = 5, next_publish_at = longhaul_now() + interval '15 s' WHERE id = %s",
            row,
        )
    return run, call


def due_in(world: World) -> list[float]:
    """In how many seconds the next messages go out."""
    query = """
        SELECT extract(epoch FROM next_publish_at - longhaul_now())::float AS due FROM longhaul_runs_run
        WHERE next_publish_at IS NOT NULL UNION ALL
        SELECT extract(epoch FROM next_publish_at - longhaul_now())::float FROM longhaul_tools_toolcall"""
    return [row["due"] for row in world.db.rows(query)]


def test_when_the_broker_has_lost_its_messages_all_are_due_in_a_second(
    world: World, passes: Sweep, queue: Callable[[int], None]
) -> None:
    backed_off(world)
    passes.sweep()
    assert all(0 < due <= 1 for due in due_in(world))


def test_when_the_broker_has_fewer_messages_than_rows_wait_all_are_due_in_a_second(
    world: World, passes: Sweep, queue: Callable[[int], None]
) -> None:
    for _ in range(2):
        backed_off(world)
    queue(1)
    passes.sweep()
    assert all(0 < due <= 1 for due in due_in(world))


def test_while_the_messages_are_there_the_rows_wait_out_their_backoff(
    world: World, passes: Sweep, queue: Callable[[int], None]
) -> None:
    backed_off(world)
    queue(2)
    passes.sweep()
    assert all(due > 10 for due in due_in(world))


def test_a_queue_that_a_tool_has_for_itself_is_counted_by_itself(
    world: World, passes: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = backed_off(world)
    _, theirs = backed_off(world)
    world.db.execute("UPDATE longhaul_tools_toolcall SET queue = 'gpu' WHERE id = %s", theirs)
    there = {"gpu": 1, settings().tools_queue: 0, settings().agents_queue: 9}
    monkeypatch.setattr(messages, "depth", lambda app, queue: there[queue])

    def due(call: UUID) -> float:
        query = "SELECT extract(epoch FROM next_publish_at - longhaul_now())::float FROM longhaul_tools_toolcall WHERE id = %s"
        return float(world.db.one(query, call))

    passes.sweep()
    assert 0 < due(ours) <= 1
    assert due(theirs) > 10
    there["gpu"] = 0
    passes.sweep()
    assert 0 < due(theirs) <= 1


def test_a_broker_that_is_away_says_nothing_of_its_messages(world: World, passes: Sweep, no_broker: None) -> None:
    backed_off(world)
    passes.sweep()
    assert all(due > 10 for due in due_in(world))


def test_a_broker_that_is_away_does_not_hold_the_sweep_up(
    world: World, passes: Sweep, process: Process, no_broker: None, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        backed_off(world)
    claim = process.speaks()
    passes.look()
    world.ahead(16 * SECOND)
    world.beat(process.id)
    process.die()
    began = time.monotonic()
    done = passes.look()
    passes.sweep()
    assert (done.reclaimed_runs, done.published_runs, done.published_calls) == ([claim.run], 5, 5)
    assert time.monotonic() - began < 20  # kombu by itself waits 6 s for each of the ten messages
    assert "waits for the broker to come back" in caplog.text


@pytest.mark.parametrize("error", [redis.TimeoutError, redis.OutOfMemoryError])
def test_a_broker_that_hangs_costs_a_pass_one_message_and_no_more(
    world: World,
    passes: Sweep,
    process: Process,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[Exception],
) -> None:
    tried: list[str] = []

    def hang(self: Producer, *_: Any, **options: Any) -> None:
        tried.append(options["routing_key"])
        raise error

    monkeypatch.setattr(Producer, "publish", hang)
    for _ in range(5):
        backed_off(world)
    claims = [process.speaks(), process.speaks()]
    passes.look()
    world.ahead(16 * SECOND)
    world.beat(process.id)
    process.die()
    done = passes.look()
    assert set(done.reclaimed_runs) == {claim.run for claim in claims}
    assert (done.published_runs, done.published_calls) == (5, 5)
    assert len(tried) == 1
    assert f"waits for the broker to come back: {error.__name__}" in caplog.text
    world.ahead(32 * SECOND)
    monkeypatch.setattr(messages, "_hang", None)
    passes.look()
    assert len(tried) == 2  # the next pass asks again


# --- dead by the lock


def test_a_run_is_taken_from_a_killed_process_at_once(
    world: World, passes: Sweep, sent: Sent, process: Process
) -> None:
    claim, beside = process.speaks(), world.running()
    assert not passes.look()
    process.die()
    done = passes.look()
    assert (done.reclaimed_runs, done.dead_workers) == ([claim.run], [process.id])
    assert reclaimed(world, claim)
    assert process.closed()
    assert sent.runs == [(claim.run, 2)]
    assert world.run(beside.run)["status"] == "running"  # of a worker whose lock was never seen
    assert not passes.look()


def test_a_lock_that_was_free_for_a_moment_is_no_death(
    world: World, passes: Sweep, sent: Sent, process: Process, watch: Watch
) -> None:
    claim = process.speaks()
    passes.look()
    process.die()
    watch.meanwhile = process.lock
    assert not passes.look()
    assert world.run(claim.run)["status"] == "running"


@pytest.mark.parametrize("options", [{"idempotent": True}, {"atomic": True}], ids=str)
def test_a_call_that_may_run_again_is_taken_with_the_lock(
    world: World, passes: Sweep, sent: Sent, process: Process, options: dict[str, bool]
) -> None:
    call = process.calls(max_attempts=2, timeout_seconds=9, **options)
    passes.look()
    process.die()
    assert passes.look().reclaimed_calls == [call.id]
    assert process.closed()
    assert sent.calls == [(call.id, 2, timedelta(seconds=9), "")]


@pytest.mark.parametrize(("options", "then"), [({}, "retrying"), ({"idempotent": False}, "unknown")], ids=str)
def test_any_other_call_is_taken_when_a_beat_is_missed_too(
    world: World, passes: Sweep, sent: Sent, process: Process, options: dict[str, bool], then: str
) -> None:
    call = process.calls(max_attempts=2, **options)
    run = process.speaks()
    passes.look()
    process.die()
    # The run is taken, the call is not: its code may still be at work behind a cut connection.
    done = passes.look()
    assert (done.reclaimed_runs, done.reclaimed_calls, done.dead_workers) == ([run.run], [], [])
    assert world.tool_call(call.id)["status"] == "running"
    world.ahead(4 * SECOND)
    done = passes.look()
    assert (done.reclaimed_calls, done.dead_workers) == ([call.id], [process.id])
    assert world.tool_call(call.id)["status"] == then
    assert [sent_call for sent_call, *_ in sent.calls] == ([call.id] if then == "retrying" else [])


def test_a_process_that_lost_its_lock_and_lives_loses_what_it_held_once(
    world: World, passes: Sweep, sent: Sent, process: Process
) -> None:
    """It locks again within two seconds, in which the watcher looks eight times; a run of five losses has failed as poison."""
    call = process.calls()
    run, again = process.speaks(), process.calls(idempotent=True, max_attempts=3)
    passes.look()
    process.die()
    done = passes.look()
    assert (done.reclaimed_runs, done.reclaimed_calls) == ([run.run], [again.id])
    claim, retried = world.claim(run.run, process.id), world.call_claim(again.id, process.id)
    for _ in range(8):
        assert not passes.look().reclaimed_runs
    assert world.run(run.run)["epoch"] == claim.epoch
    assert world.tool_call(again.id)["attempt"] == retried.attempt
    # What is silent for a beat is taken all the same: it has died meanwhile.
    world.ahead(4 * SECOND)
    done = passes.look()
    assert (done.reclaimed_runs, set(done.reclaimed_calls)) == ([run.run], {call.id, again.id})
    assert done.dead_workers == [process.id]


def test_a_process_that_has_locked_again_and_is_killed_loses_what_it_holds_at_once(
    world: World, passes: Sweep, sent: Sent, process: Process
) -> None:
    process.calls()  # for its sake the life stays open until a beat is missed
    run = process.speaks()
    passes.look()
    process.die()
    assert passes.look().reclaimed_runs == [run.run]
    process.lock()
    assert not passes.look()
    world.claim(run.run, process.id)
    process.die()
    assert passes.look().reclaimed_runs == [run.run]


# --- lost holders, and what passed its time


@pytest.mark.parametrize("gone", ["closed", "deleted"])
def test_what_names_a_life_that_is_over_is_taken(world: World, passes: Sweep, sent: Sent, gone: str) -> None:
    agents, tools, alive = world.worker(), world.worker("tools@a"), world.running()
    claim = world.turn(world.claim(world.start(), agents))
    waiting = world.waiting(a_call(max_attempts=2))
    [call] = world.calls(waiting.run)
    world.call_claim(call, tools)
    over = {
        "closed": "UPDATE longhaul_tools_worker SET gone_at = longhaul_now()",
        "deleted": "DELETE FROM longhaul_tools_worker",
    }
    world.db.execute(f"{over[gone]} WHERE id IN (%s, %s)", agents, tools)
    world.ahead(3.5 * SECOND)  # a closed life beats no more
    assert not passes.look()  # the watcher judges only lives that are there
    done = passes.sweep()
    assert (done.reclaimed_runs, done.reclaimed_calls) == ([claim.run], [call])
    assert sent.runs == [(claim.run, 2)]
    assert [(id, attempt) for id, attempt, *_ in sent.calls] == [(call, 2)]
    assert world.run(alive.run)["status"] == "running"
    assert not passes.sweep()


def test_a_call_whose_claim_was_under_way_when_its_life_was_closed_is_taken_when_a_beat_is_missed(
    world: World, passes: Sweep, sent: Sent, process: Process
) -> None:
    """Its process has lost its lock and is alive: it runs the tool, and may be just about to settle it."""
    again, once = process.calls(idempotent=True, max_attempts=2), process.calls(idempotent=False)
    world.db.execute("UPDATE longhaul_tools_worker SET gone_at = longhaul_now() WHERE id = %s", process.id)
    assert passes.sweep().reclaimed_calls == [again.id]
    assert world.tool_call(once.id)["status"] == "running"
    world.ahead(3.5 * SECOND)
    assert passes.sweep().reclaimed_calls == [once.id]
    assert world.tool_call(once.id)["status"] == "unknown"


def test_a_life_that_locked_and_beat_again_since_it_was_seen_dead_is_not_closed(
    world: World, passes: Sweep, sent: Sent, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watcher takes what a dead life held, and then closes it. Closed, it could claim nothing for two seconds."""
    run = process.speaks()
    passes.look()
    process.die()
    reclaim = lifecycle.reclaim

    def and_back(*which: Any) -> Any:
        answer = reclaim(*which)
        process.lock()
        world.beat(process.id)
        return answer

    monkeypatch.setattr(lifecycle, "reclaim", and_back)
    done = passes.look()
    assert (done.reclaimed_runs, done.dead_workers) == ([run.run], [])
    assert not process.closed()
    assert world.claim(run.run, process.id).epoch == run.epoch + 2


def test_a_leg_past_its_deadline_is_taken_from_a_process_that_is_present(
    world: World, passes: Sweep, sent: Sent, process: Process
) -> None:
    preparing = world.claim(world.start(), process.id)
    speaking = process.speaks()
    assert not passes.sweep()
    world.ahead(LEASE)
    world.beat(process.id)
    assert passes.sweep().reclaimed_runs == [preparing.run]
    assert not process.closed()
    assert world.run(speaking.run)["status"] == "running"  # a model may take longer


def test_a_call_past_its_time_gets_its_process_a_grace_and_then_has_timed_out(
    world: World, passes: Sweep, sent: Sent, process: Process
) -> None:
    call = process.calls(timeout_seconds=20, max_attempts=3)
    world.ahead(24 * SECOND)
    assert not passes.sweep()
    world.ahead(26 * SECOND)
    assert passes.sweep().reclaimed_calls == [call.id]
    settled = world.tool_call(call.id)
    assert (settled["status"], settled["outcome"], settled["error"]["code"]) == ("settled", "failed", "timed_out")
    assert [seq for _, seq in sent.runs] == [2]  # its run goes on


@pytest.mark.parametrize("status", ["held", "queued", "running", "waiting", "requires_action"])
def test_a_run_past_its_deadline_fails_once_the_sweep_has_watched_for_a_while(
    world: World, passes: Sweep, sent: Sent, watch: Watch, status: str
) -> None:
    run, another = world.in_status(status), world.in_status("running")
    world.db.execute(
        "UPDATE longhaul_runs_run SET deadline = longhaul_now() + CASE WHEN id = %s THEN interval '1 s' ELSE '1 h' END",
        run,
    )
    passes.watcher.session()
    watch.ahead = 4
    world.ahead(2 * SECOND)
    assert not passes.sweep()  # it may have ended while nobody could write it
    watch.ahead = 6
    assert passes.sweep().expired_runs == [run]
    ended = world.run(run)
    assert (ended["status"], ended["stop_reason"], ended["error"]["code"]) == ("failed", "deadline", "deadline")
    assert world.run(another)["status"] == "running"
    assert not passes.sweep()


def test_a_run_that_expires_makes_room_for_the_next_of_its_thread(
    world: World, sent: Sent, watch: Watch, passes: Sweep
) -> None:
    first = world.start()
    next_one = world.start(world.run(first)["thread_id"], status="held")
    world.db.execute("UPDATE longhaul_runs_run SET deadline = longhaul_now() WHERE id = %s", first)
    passes.watcher.session()
    watch.ahead = 6
    passes.sweep()
    assert sent.runs == [(next_one, 1)]


# --- what somebody else holds


@pytest.fixture
def slow(world: World) -> Iterator[Callable[[UUID], None]]:
    """A transaction of the application's that has done something with a run, and is not done."""
    other = Database(connection.connection.info.dsn)
    other.execute("BEGIN")
    yield lambda run: other.execute("SELECT longhaul_run_lock(%s)", run)
    other.connection.close()


def test_a_run_that_is_held_stops_neither_the_pass_nor_what_is_behind_it(
    world: World, passes: Sweep, sent: Sent, process: Process, slow: Callable[[UUID], None]
) -> None:
    runs = [world.claim(world.start(), process.id).run for _ in range(2)]
    world.ahead(LEASE)
    world.beat(process.id)
    slow(runs[0])
    world.db.execute("UPDATE longhaul_runs_run SET leg_deadline = leg_deadline - interval '1 s' WHERE id = %s", runs[1])
    began = time.monotonic()
    assert passes.sweep().reclaimed_runs == [runs[1]]
    assert time.monotonic() - began < 20  # it would wait for ever


def test_many_held_by_one_transaction_cost_a_pass_one_wait(
    world: World, passes: Sweep, sent: Sent, process: Process, slow: Callable[[UUID], None]
) -> None:
    for _ in range(40):
        slow(world.claim(world.start(), process.id).run)
    world.ahead(LEASE)
    world.beat(process.id)
    began = time.monotonic()
    assert not passes.sweep()
    assert time.monotonic() - began < 10  # seconds: 1.3, where each by itself would take 20 together


def test_what_is_held_of_a_dead_process_is_taken_when_it_is_let_go(
    world: World, passes: Sweep, sent: Sent, process: Process
) -> None:
    held, call, free = process.speaks(), process.calls(max_attempts=2, idempotent=True), process.speaks()
    other = Database(connection.connection.info.dsn)
    other.execute("BEGIN")
    for run in (held.run, world.tool_call(call.id)["run_id"]):
        other.execute("SELECT longhaul_run_lock(%s)", run)
    passes.look()
    process.die()
    done = passes.look()
    assert (done.reclaimed_runs, done.reclaimed_calls, done.dead_workers) == ([free.run], [], [])
    other.connection.close()
    done = passes.look()
    assert (done.reclaimed_runs, done.reclaimed_calls, done.dead_workers) == ([held.run], [call.id], [process.id])


def test_a_run_past_its_deadline_that_is_held_fails_in_a_later_pass(
    world: World, passes: Sweep, sent: Sent, watch: Watch
) -> None:
    held, free = world.start(), world.start()
    world.db.execute("UPDATE longhaul_runs_run SET deadline = longhaul_now()")
    other = Database(connection.connection.info.dsn)
    other.execute("BEGIN")
    other.execute("SELECT longhaul_run_lock(%s)", held)
    passes.watcher.session()
    watch.ahead = 6
    assert passes.sweep().expired_runs == [free]
    other.connection.close()
    assert passes.sweep().expired_runs == [held]


# --- a message that the broker delivers again


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Presence]:
    """The worker that gets it."""
    present = Presence(name="agents@b", kind="agents")
    present.tick()
    monkeypatch.setattr(worker, "process", lambda: engine.Process(present))
    monkeypatch.setattr(presence, "current", present)
    yield present
    present.end()


@pytest.fixture
def taken_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[UUID, int]]:
    """What the receiver goes on to claim: run and dispatch_seq, or call and attempt."""
    said: list[tuple[UUID, int]] = []
    monkeypatch.setattr(engine, "advance", lambda run, dispatch, process, **_: said.append((run, dispatch)))
    monkeypatch.setattr(execution, "execute", lambda call, attempt, **_: said.append((call, attempt)))
    return said


def deliver(task: Any, *args: Any, again: bool) -> None:
    task.push_request(id="t", delivery_info={"redelivered": again})
    try:
        task.run(*args)
    finally:
        task.pop_request()


def test_a_redelivered_message_takes_its_run_from_a_holder_that_is_gone(
    world: World, sent: Sent, process: Process, receiver: Presence, taken_up: list[tuple[UUID, int]]
) -> None:
    claim = process.speaks()
    deliver(tasks.advance_run, str(claim.run), 1, again=True)
    assert world.run(claim.run)["holder"] == process.id  # it is there
    process.die()
    deliver(tasks.advance_run, str(claim.run), 1, again=False)
    assert world.run(claim.run)["holder"] == process.id  # the broker's word is missing
    deliver(tasks.advance_run, str(claim.run), 1, again=True)
    assert reclaimed(world, claim)
    assert taken_up == [(claim.run, 1), (claim.run, 1), (claim.run, 2)]
    assert sent.runs == []  # the receiver goes on at once: no message travels


def test_a_message_that_is_back_before_postgres_has_freed_the_lock_takes_its_run_all_the_same(
    world: World, process: Process, receiver: Presence, taken_up: list[tuple[UUID, int]]
) -> None:
    claim = process.speaks()

    def die() -> None:
        process.die()
        connection.close()  # of this thread

    dying = threading.Timer(0.04, die)  # while the receiver looks
    dying.start()
    deliver(tasks.advance_run, str(claim.run), 1, again=True)
    dying.join()
    assert reclaimed(world, claim)
    assert taken_up == [(claim.run, 2)]


@pytest.mark.parametrize(
    ("options", "taken"),
    [({"idempotent": True}, True), ({"atomic": True}, True), ({}, False), ({"idempotent": False}, False)],
    ids=str,
)
def test_a_redelivered_message_takes_its_call_if_that_may_run_again(
    world: World,
    sent: Sent,
    process: Process,
    receiver: Presence,
    taken_up: list[tuple[UUID, int]],
    options: dict[str, bool],
    taken: bool,
) -> None:
    call = process.calls(max_attempts=2, **options)
    deliver(tool_tasks.execute_call, str(call.id), 1, again=True)
    assert world.tool_call(call.id)["holder"] == process.id  # it is there
    process.die()
    deliver(tool_tasks.execute_call, str(call.id), 1, again=False)
    assert world.tool_call(call.id)["holder"] == process.id
    deliver(tool_tasks.execute_call, str(call.id), 1, again=True)
    assert world.tool_call(call.id)["status"] == ("retrying" if taken else "running")
    assert taken_up[2:] == [(call.id, 2 if taken else 1)]
    assert sent.calls == []


# --- one at a time, and through outages


def test_one_process_sweeps_and_when_it_goes_another_does() -> None:
    first, second = Watcher(), Watcher()
    try:
        assert (first.elected(), second.elected()) == (True, False)
        assert (first.elected(), second.elected()) == (True, False)
        first.drop()
        wait_until(second.elected)
        assert not first.elected()
    finally:
        first.drop()
        second.drop()


def test_without_sessions_one_process_sweeps_by_turns_that_hold_no_table(
    world: World, watch: Watch, settings: Any
) -> None:
    settings.LONGHAUL = {"SESSION_LOCKS": False}
    first, second = Watcher(), Watcher()

    def swept() -> bool:
        return bool(world.db.one(sweep.SOMEBODY_SWEEPS, sweep.SWEEP_LOCK, sweep.SWEPT_WITHIN))

    try:
        for _ in range(3):
            assert (first.elected(), second.elected(), swept()) == (True, False, True)
            first.dead()
            watch.ahead += 3  # its turn is over, and the next one is its own
        world.db.execute("BEGIN")
        world.db.execute("LOCK TABLE longhaul_tools_worker IN ACCESS EXCLUSIVE MODE NOWAIT")
        world.db.execute("ROLLBACK")
        session, lost = first.session(), first._election
        assert lost is not None
        world.db.one("SELECT pg_terminate_backend(%s)", lost.info.backend_pid)
        watch.ahead += 3
        assert not first.elected()
        wait_until(first.elected)
        assert first.session() is session  # with what it has watched
        first.drop()
        wait_until(second.elected)
        assert (first.elected(), second.elected(), swept()) == (False, True, True)
        second.drop()
        wait_until(lambda: not swept())
    finally:
        first.drop()
        second.drop()


@pytest.fixture
def sweeping() -> Iterator[Callable[[], SweepThread]]:
    """Makes threads of control processes, ended after the test."""
    made: list[SweepThread] = []

    def make() -> SweepThread:
        made.append(SweepThread())
        return made[-1]

    yield make
    for each in made:
        each.end()
        assert not each._thread.is_alive()


def test_the_thread_goes_on_after_its_connections_were_cut(
    world: World, sent: Sent, sweeping: Callable[[], SweepThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[set[int]] = []
    look = Sweep.look

    def remember(self: Sweep) -> Any:
        done = look(self)
        sessions.append({self.watcher.session().info.backend_pid, connection.connection.info.backend_pid})
        return done

    monkeypatch.setattr(sweep, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(Sweep, "look", remember)
    run = world.start()
    world.ahead(2 * SECOND)
    sweeping().start()
    wait_until(lambda: sessions and (run, 1) in sent.runs)
    world.db.one("SELECT count(pg_terminate_backend(pid)) FROM unnest(%s::int[]) AS pid", list(sessions[0]))
    world.ahead(10 * SECOND)
    wait_until(lambda: len(sent.runs) > 1 and not sessions[-1] & sessions[0])


def test_the_thread_goes_on_after_an_error(
    world: World,
    sent: Sent,
    sweeping: Callable[[], SweepThread],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    look = Sweep.look
    failed: list[bool] = []

    def fails_once(self: Sweep) -> Any:
        if not failed:
            failed.append(True)
            raise ZeroDivisionError
        return look(self)

    monkeypatch.setattr(Sweep, "look", fails_once)
    run = world.start()
    world.ahead(2 * SECOND)
    sweeping().start()
    wait_until(lambda: (run, 1) in sent.runs)
    assert "The sweep goes on after an error" in caplog.text


def test_a_thread_that_is_not_elected_does_nothing(
    world: World, sent: Sent, sweeping: Callable[[], SweepThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[bool] = []
    elected = Watcher.elected
    monkeypatch.setattr(sweep, "LOOK_SECONDS", 0.01)

    def look(self: Watcher) -> bool:
        looks.append(elected(self))
        return looks[-1]

    monkeypatch.setattr(Watcher, "elected", look)
    world.db.execute("SELECT pg_advisory_lock(%s)", sweep.SWEEP_LOCK)
    world.start()
    world.ahead(2 * SECOND)
    sweeping().start()
    wait_until(lambda: len(looks) > 3)
    assert (sent.runs, set(looks)) == ([], {False})
    world.db.execute("SELECT pg_advisory_unlock(%s)", sweep.SWEEP_LOCK)
    wait_until(lambda: sent.runs)


# --- by hand


def test_by_hand_a_rehearsal_says_what_the_pass_then_moves(world: World, sent: Sent, process: Process) -> None:
    silent, present = world.worker(), process.speaks()
    lost = world.turn(world.claim(world.start(), silent))
    queued = world.start()
    world.ahead(20 * SECOND)
    world.beat(process.id)
    before = world.dump()
    said = io.StringIO()
    call_command("sweep_runs", "--dry-run", stdout=said)
    assert world.dump() == before
    assert sent.taken() == []
    assert "would move: published runs: 1, reclaimed runs: 1, dead workers: 1" in said.getvalue()

    shown = io.StringIO()
    call_command("sweep_runs", "--json", stdout=shown)
    moved = json.loads(shown.getvalue())
    assert (moved["published_runs"], moved["reclaimed_runs"], moved["dead_workers"]) == (
        1,
        [str(lost.run)],
        [str(silent)],
    )
    assert sorted(sent.runs) == sorted([(lost.run, 2), (queued, 1)])
    assert world.run(present.run)["status"] == "running"
    call_command("sweep_runs", stdout=said)
    assert "Nothing is overdue." in said.getvalue()
