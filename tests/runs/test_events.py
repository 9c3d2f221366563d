"""The log of a run as its readers see it: whole from any point, live to the end, with the bell and without it."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from asgiref.sync import sync_to_async
from django.db import connection

from runs import admission, bells, engine, events
from runs.agents import Agent
from runs.events import RunEvent
from runs.models import Event, Run
from runs.providers.port import ModelEvent, ModelRequest, ProviderError, TextDelta
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from tests.protocol.rows import wait_until
from tests.runs.scenes import Cast, Together, add, agents_process, speaking
from threads import clock
from threads.models import Thread

PATIENCE = 15.0  # seconds that a reader may take on a busy machine: less than FAR, and than a test may take
FAR = 60.0  # seconds: a reader that misses what should wake it looks no sooner

live = pytest.mark.django_db(transaction=True)


@pytest.fixture
def agent(cast: Cast) -> Agent:
    return cast(tools=[add])


@pytest.fixture
def by_bell_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", FAR)


@pytest.fixture
def without_bells(monkeypatch: pytest.MonkeyPatch) -> None:
    """No message ever comes; a reader looks often."""
    monkeypatch.setattr(bells, "ring", lambda channels: None)
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.02)


class Reader:
    """Reads in a thread of its own, with a connection of its own. `seen` is what it has got so far."""

    def __init__(self, read: Callable[[], Iterator[RunEvent]]) -> None:
        self.seen: list[RunEvent] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, args=(read,), daemon=True)
        self._thread.start()

    def _read(self, read: Callable[[], Iterator[RunEvent]]) -> None:
        try:
            for event in read():
                self.seen.append(event)
        except BaseException as error:
            self._error = error
        finally:
            connection.close()

    def has(self, type: str) -> bool:
        return any(event.type == type for event in self.seen)

    def end(self) -> list[RunEvent]:
        """Wait until it has read to the end, and return all it saw."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), f"still reading after {[event.type for event in self.seen]}"
        if self._error is not None:
            raise self._error
        return self.seen


class Pieces:
    """A model that says one piece after another, each when the test lets it."""

    def __init__(self, *pieces: str) -> None:
        self._pieces = pieces
        self._may = threading.Semaphore(0)

    def __call__(self, request: ModelRequest) -> Iterator[ModelEvent]:
        for piece in self._pieces:
            assert self._may.acquire(timeout=PATIENCE)
            yield TextDelta(piece)

    def say(self, count: int = 1) -> None:
        self._may.release(count)


def following(run: Run, after: int = 0) -> Reader:
    """A reader that follows the run, and that hears its bell already."""
    channel = bells.run_channel(run.pk)
    before = len(bells.ear()._events.get(channel, ()))
    reader = Reader(partial(run.events, after=after, follow=True))
    wait_until(lambda: len(bells.ear()._events.get(channel, ())) > before)
    wait_until(lambda: listeners(run) > 0)
    bells._unheard.pop(channel, None)  # nobody listened to what was rung so far; now somebody does
    return reader


def listeners(run: Run) -> int:
    client: Any = bells._client()
    [(_, count)] = client.pubsub_numsub(bells.run_channel(run.pk))
    return int(count)


def speak(run: Run, process: engine.Process) -> Together:
    return Together(partial(engine.advance, run.pk, 1, process))


def assert_whole(seen: list[RunEvent], run: Run, after: int = 0) -> None:
    """From just after the cursor, gap-free, to the terminal event, which is the last."""
    run.refresh_from_db()
    assert [event.seq for event in seen] == list(range(after + 1, run.last_seq + 1))
    assert [event.terminal for event in seen] == [False] * (len(seen) - 1) + [True]
    assert seen[-1].type == f"run.{run.status}"


def text(seen: list[RunEvent]) -> str:
    return "".join(event.payload["text"] for event in seen if event.type == "text.delta")


def lengthen(run: Run, events: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT longhaul_run_record(%s, 'data', jsonb_build_object('data', n)) FROM generate_series(1, %s) AS n",
            (run.pk, events),
        )


# --- from any point


@pytest.mark.django_db
def test_from_any_point_the_rest_of_the_log_is_read(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(["let me see", call("add", a=1, b=2), call("add", a=3, b=4)], "that is 3 and 7")
    run = run_to_end(agent.start("add up"))
    whole = list(run.events())
    assert_whole(whole, run)
    for after in range(run.last_seq + 1):
        assert list(run.events(after=after)) == whole[after:]
        assert list(run.events(after=after, follow=True)) == whole[after:]
    assert_invariants(run)


@pytest.mark.django_db
def test_the_text_deltas_of_a_message_are_its_text(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(["let me", " see", call("add", a=1, b=2)], ["that ", "is", " 3"])
    run = run_to_end(agent.start("add up"))
    seen = list(run.events())
    messages = list(run.thread.messages.filter(role="assistant").order_by("position"))
    assert [message.text for message in messages] == ["let me see", "that is 3"]
    for message in messages:
        assert text([event for event in seen if event.payload.get("message") == str(message.pk)]) == message.text
    assert seen[-1].payload["output"] == text(seen).removeprefix("let me see")


@pytest.mark.django_db
def test_an_event_is_flat_for_its_readers_and_its_time_is_in_utc(agent: Agent) -> None:
    run = agent.start("hello")
    queued = list(run.events())[-1]
    shown = queued.as_dict()
    at = shown.pop("at")
    assert shown == {"seq": 2, "type": "run.queued", "run": str(run.pk), "reason": "start"}
    assert at.endswith("Z")
    assert datetime.fromisoformat(at) == queued.at
    elsewhere = replace(queued, at=datetime(2026, 11, 21, 1, 30, tzinfo=timezone(timedelta(hours=2))))
    assert elsewhere.as_dict()["at"] == "2026-11-20T23:30:00Z"


@pytest.mark.django_db
def test_a_clock_that_went_back_does_not_change_the_order(agent: Agent) -> None:
    run = agent.start("hello").cancel()
    Event.objects.filter(run=run, seq=1).update(at=clock.now() + timedelta(hours=1))
    assert [event.seq for event in run.events()] == [1, 2, 3]


@live
def test_a_long_log_is_read_in_batches_without_a_pause_between(agent: Agent, by_bell_only: None) -> None:
    run = agent.start("hello")
    lengthen(run, 2 * events.BATCH + 500)
    run.cancel()
    whole = list(run.events())
    assert_whole(whole, run)
    assert Reader(partial(run.events, follow=True)).end() == whole
    # A log that ends with a batch
    after = run.last_seq - events.BATCH
    assert Reader(partial(run.events, after=after, follow=True)).end() == whole[after:]


@pytest.mark.django_db
def test_without_follow_a_live_run_is_read_as_far_as_it_is(agent: Agent) -> None:
    run = agent.start("hello")
    assert [event.type for event in run.events()] == ["message.completed", "run.queued"]
    assert list(run.events(after=2)) == []


# --- live


@live
def test_readers_that_begin_before_during_and_after_the_run_see_the_same(cast: Cast) -> None:
    pieces = Pieces("one ", "two ", "three")
    run = cast().start("count")
    before = following(run)
    with speaking(pieces), agents_process() as process:
        leg = speak(run, process)
        pieces.say()
        wait_until(lambda: before.has("text.delta"))
        so_far = before.seen[-1].seq
        during, onward = following(run), following(run, so_far)
        pieces.say(2)
        leg.join()
    after = Reader(partial(run.events, follow=True)).end()
    whole = before.end()
    assert_whole(whole, run)
    assert during.end() == after == list(run.events()) == whole
    assert_whole(onward.end(), run, so_far)
    assert text(whole) == run.output == "one two three"
    assert_invariants(run)


@live
@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
def test_a_follower_ends_at_the_terminal_event(
    cast: Cast, scripted_model: ScriptedModel, end: str, by_bell_only: None
) -> None:
    run = cast().start("hello")
    reader = following(run)
    if end == "cancelled":
        run.cancel()
    else:
        scripted_model.say("done" if end == "completed" else ProviderError("auth", "no"))
        with agents_process() as process:
            engine.advance(run.pk, 1, process)
    assert_whole(reader.end(), run)
    assert run.status == end


@live
def test_a_follower_of_a_run_that_is_deleted_ends(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    run = agent.start("hello")
    reader = following(run)
    wait_until(lambda: reader.has("run.queued"))
    Thread.objects.get(pk=run.thread_id).delete()
    assert [event.type for event in reader.end()] == ["message.completed", "run.queued"]


@live
def test_a_reader_that_leaves_is_forgotten(agent: Agent) -> None:
    run = agent.start("hello")
    reading = run.events(follow=True)
    next(reading)
    wait_until(lambda: listeners(run) == 1)
    reading.close()  # type: ignore[attr-defined]
    wait_until(lambda: listeners(run) == 0)
    assert bells.run_channel(run.pk) not in bells.ear()._events


@live
def test_of_two_readers_in_one_process_one_leaves_and_the_other_hears_on(agent: Agent, by_bell_only: None) -> None:
    run = agent.start("hello")
    stays = following(run)
    leaves = run.events(follow=True)
    next(leaves)
    leaves.close()  # type: ignore[attr-defined]
    run.cancel()
    assert_whole(stays.end(), run)


@live
def test_who_waits_holds_no_connection(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    holding: list[bool] = []

    class Wake(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            holding.append(connection.connection is not None)
            return super().wait(timeout)

    @contextmanager
    def listen(channel: str) -> Iterator[Wake]:
        yield Wake()

    monkeypatch.setattr(bells, "ear", lambda: SimpleNamespace(listen=listen))
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.01)
    run = agent.start("hello")
    waiting: list[Callable[[], Any]] = [lambda: list(run.events(follow=True)), lambda: events.wait(run.pk, PATIENCE)]
    waits = Together(*waiting)
    wait_until(lambda: len(holding) > 5)
    run.cancel()
    waits.join()
    assert not any(holding)


# --- the bell


@live
def test_the_bell_wakes_a_follower_and_a_waiter(cast: Cast, by_bell_only: None) -> None:
    pieces = Pieces("one ", "two")
    run = cast().start("count")
    reader = following(run)
    waiter = Together(partial(run.wait, FAR))
    with speaking(pieces), agents_process() as process:
        leg = speak(run, process)
        for count in (1, 2):
            pieces.say()
            wait_until(lambda: len([event for event in reader.seen if event.type == "text.delta"]) == count)  # noqa: B023
        leg.join()
    assert_whole(reader.end(), run)
    [waited] = waiter.join()
    assert (waited.status, waited.output) == ("completed", "one two")


@live
def test_when_no_bell_is_heard_a_follower_and_a_waiter_look_by_themselves(cast: Cast, without_bells: None) -> None:
    pieces = Pieces("one ", "two")
    run = cast().start("count")
    reader = Reader(partial(run.events, follow=True))
    waiter = Together(partial(run.wait, FAR))
    with speaking(pieces), agents_process() as process:
        leg = speak(run, process)
        pieces.say()
        wait_until(lambda: reader.has("text.delta"))
        pieces.say()
        leg.join()
    assert_whole(reader.end(), run)
    assert waiter.join()[0].finished


def test_a_lost_bell_costs_a_second() -> None:
    assert events.LOOK_SECONDS == 1.0


@live
def test_a_subscription_that_is_cut_wakes_its_readers_and_is_renewed(
    agent: Agent, by_bell_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bells, "_PAUSE_SECONDS", 0.05)
    run = agent.start("hello")
    reader = following(run)
    wait_until(lambda: reader.has("run.queued"))
    # given an event that rang for nobody
    with connection.cursor() as cursor:
        cursor.execute("SELECT longhaul_run_record(%s, 'data', '{\"data\": 1}')", (run.pk,))
    client: Any = bells._client()
    cut = weakref.ref(bells.ear()._pubsub)  # it must be free to go: it subscribes again when it is used once more
    client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    # then the cut shows it, and what rings later is heard
    wait_until(lambda: reader.has("data"))
    wait_until(lambda: bells.ear()._pubsub not in (None, cut()) and listeners(run) == 1)
    bells._unheard.clear()
    run.cancel()
    assert_whole(reader.end(), run)


@live
def test_a_redis_that_is_away_costs_a_start_and_a_cancel_nothing(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bells, "_client", lambda: redis.Redis.from_url("unix:///nonexistent"))
    monkeypatch.setattr(bells, "_away_until", 0.0)
    deaf = bells.Ear()
    monkeypatch.setattr(bells, "ear", lambda: deaf)
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.02)
    run = agent.start("hello")
    reader = Reader(partial(run.events, follow=True))
    wait_until(lambda: reader.has("run.queued"))
    run.cancel()
    agent.start("again").cancel()
    assert_whole(reader.end(), run)
    assert len([record for record in caplog.records if record.name == "longhaul.bells"]) == 1  # not one a ring


# --- waiting


@live
def test_waiting_for_a_run_that_does_not_end_gives_up_at_its_time(agent: Agent) -> None:
    run = agent.start("hello")
    began = time.monotonic()
    assert run.wait(timeout_seconds=0.1) is run
    assert 0.1 <= time.monotonic() - began < 30
    assert not run.finished
    assert events.wait(run.pk, 0) is False


@live
def test_waiting_for_a_run_that_has_ended_returns_at_once_with_the_run_as_it_is(
    agent: Agent, by_bell_only: None
) -> None:
    run = agent.start("hello")
    admission.cancel(Run.objects.get(pk=run.pk))
    assert not run.finished  # as it was when it was read
    assert run.wait(timeout_seconds=0).status == "cancelled"


@live
def test_waiting_for_a_run_that_is_deleted_ends(agent: Agent, by_bell_only: None) -> None:
    run = agent.start("hello")
    Thread.objects.get(pk=run.thread_id).delete()
    assert events.wait(run.pk, FAR) is True


@live
async def test_waiting_from_async_code(agent: Agent, by_bell_only: None) -> None:
    run = await agent.astart("hello")
    assert (await run.await_finished(timeout_seconds=0)).status == "queued"
    ending = sync_to_async(Together)(partial(admission.cancel, await Run.objects.aget()))
    ended = await ending
    assert (await run.await_finished(timeout_seconds=FAR)).status == "cancelled"
    ended.join()
    await sync_to_async(lambda: connection.close())()  # of the thread that async code uses


# --- async


async def collected(run: Run, seen: list[RunEvent], **options: Any) -> list[RunEvent]:
    async for event in run.aevents(**options):
        seen.append(event)
    return seen


@live
async def test_an_async_reader_sees_what_a_sync_one_sees(cast: Cast) -> None:
    pieces = Pieces("one ", "two")
    run = await cast().astart("count")
    with speaking(pieces):

        @sync_to_async
        def begin() -> Any:
            process = agents_process()
            return process, speak(run, process.__enter__())

        process, leg = await begin()
        seen: list[RunEvent] = []
        before = asyncio.create_task(collected(run, seen))
        pieces.say()
        async with asyncio.timeout(PATIENCE):
            while not any(event.type == "text.delta" for event in seen):
                await asyncio.sleep(0.01)  # the pace of looking
            so_far = seen[-1].seq
            during = asyncio.create_task(collected(run, [], after=so_far))
            pieces.say()
            await sync_to_async(leg.join)()
            whole = await before
            rest = await during
        await sync_to_async(process.__exit__)(None, None, None)
    await sync_to_async(assert_whole)(whole, run)
    assert rest == whole[so_far:]
    assert text(whole) == "one two"
    assert await collected(run, []) == whole
    assert await collected(run, [], follow=False) == whole
    assert await collected(run, [], after=3, follow=False) == whole[3:]
    assert await sync_to_async(lambda: list(run.events()))() == whole
    await sync_to_async(lambda: connection.close())()  # of the thread that async code uses


@live
async def test_an_async_reader_of_a_long_log_and_of_a_deleted_run_ends(agent: Agent) -> None:
    run = await agent.astart("hello")
    await sync_to_async(lengthen)(run, 2 * events.BATCH)
    await sync_to_async(run.cancel)()
    async with asyncio.timeout(PATIENCE):
        whole = await collected(run, [])
        assert await collected(run, [], follow=False) == whole
        await sync_to_async(assert_whole)(whole, run)
        await sync_to_async(lambda: Thread.objects.get(pk=run.thread_id).delete())()
        assert await collected(run, []) == []
    await sync_to_async(lambda: connection.close())()  # of the thread that async code uses
