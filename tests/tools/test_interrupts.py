"""What ends a call's code: signals in the main thread, the loop of an async tool, a process that looks after its call."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from threads.ids import new_id
from tools import WorkerLeaving, interrupts
from tools.interrupts import Minder, Reason

LONG = 30.0  # seconds, of which none is waited for


@pytest.fixture
def delivered() -> Iterator[None]:
    with interrupts.delivered(prefork=True):
        yield


def test_code_is_interrupted_when_its_time_is_up(delivered: None) -> None:
    with pytest.raises(SoftTimeLimitExceeded), interrupts.body(new_id(), 1, 0.01):
        time.sleep(LONG)


def test_code_that_ends_in_time_is_not_interrupted_after_it(delivered: None) -> None:
    with interrupts.body(new_id(), 1, 0.05):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    os.kill(os.getpid(), signal.SIGALRM)
    os.kill(os.getpid(), signal.SIGUSR1)  # Celery's soft limit comes in the middle of a settlement


def test_what_cleans_up_is_not_interrupted_again(delivered: None) -> None:
    cleaned = []
    with pytest.raises(SoftTimeLimitExceeded), interrupts.body(new_id(), 1, 0.01):
        try:
            time.sleep(LONG)
        finally:
            os.kill(os.getpid(), signal.SIGUSR1)  # Celery's comes after our own
            os.kill(os.getpid(), signal.SIGALRM)
            cleaned.append(True)
    assert cleaned


def test_celerys_own_limit_interrupts_too(delivered: None) -> None:
    with pytest.raises(SoftTimeLimitExceeded), interrupts.body(new_id(), 1, None):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(LONG)


def test_handlers_of_others_are_put_back() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGALRM, signal.SIGUSR1)]
    with interrupts.delivered(prefork=True):
        assert [signal.getsignal(each) for each in (signal.SIGALRM, signal.SIGUSR1)] != before
    assert [signal.getsignal(each) for each in (signal.SIGALRM, signal.SIGUSR1)] == before


def test_no_signal_comes_when_nobody_hears_it_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    sends, heard_by = threading.Event(), []

    def slow(thread: int, number: int) -> None:
        sends.set()
        time.sleep(0.1)  # long enough for the block to end, did it not wait
        heard_by.append(signal.getsignal(number))

    before = signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr(signal, "pthread_kill", slow)
    sender = threading.Thread(target=interrupts.interrupt, args=(new_id(), 1, Reason.UNWANTED))
    with interrupts.delivered(prefork=True):
        sender.start()
        assert sends.wait(LONG)
    sender.join()
    assert heard_by != [before]


@pytest.mark.parametrize(
    ("reason", "error"), [(Reason.LEAVING, WorkerLeaving), (Reason.UNWANTED, SoftTimeLimitExceeded)]
)
def test_another_thread_interrupts_the_attempt_that_it_means(
    delivered: None, reason: Reason, error: type[Exception]
) -> None:
    call = new_id()
    with pytest.raises(error), interrupts.body(call, 2, LONG):
        threading.Thread(target=interrupts.interrupt, args=(call, 2, reason)).start()
        time.sleep(LONG)


def test_another_thread_interrupts_no_other_attempt(delivered: None) -> None:
    call = new_id()
    with interrupts.body(call, 3, LONG) as body:
        interrupts.interrupt(call, 2, Reason.UNWANTED)
        interrupts.interrupt(new_id(), 3, Reason.UNWANTED)
    assert body.reason is None


def test_an_async_tool_is_cancelled_and_may_clean_up(delivered: None) -> None:
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.sleep(LONG)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    with pytest.raises(SoftTimeLimitExceeded), interrupts.body(new_id(), 1, 0.01) as body:
        asyncio.run(body.bounded(work()))
    assert cleaned


def test_an_async_tool_is_cancelled_where_no_signal_reaches_it() -> None:
    """In a pool of threads."""
    ended: list[Any] = []

    def run() -> None:
        with interrupts.body(new_id(), 1, 0.01) as body:
            try:
                asyncio.run(body.bounded(asyncio.sleep(LONG)))
            except SoftTimeLimitExceeded as error:
                ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(ended) == 1


def test_an_async_tool_whose_loop_stands_still_is_interrupted_after_all(
    delivered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "LOOP_SECONDS", 0.01)

    async def work() -> None:
        time.sleep(LONG)

    with pytest.raises(SoftTimeLimitExceeded), interrupts.body(new_id(), 1, 0.01) as body:
        asyncio.run(body.bounded(work()))


def test_an_async_tool_that_cancels_itself_is_not_out_of_time(delivered: None) -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError), interrupts.body(new_id(), 1, LONG) as body:
        asyncio.run(body.bounded(work()))


class Rows:
    """A connection that knows which attempts may settle their calls."""

    def __init__(self, *wanted: Any) -> None:
        self.wanted = wanted

    def execute(self, query: str, parameters: Any) -> Rows:
        self.found = tuple(parameters) in self.wanted
        return self

    def fetchone(self) -> tuple[int] | None:
        return (1,) if self.found else None


def test_a_call_that_nobody_wants_is_interrupted_after_its_grace(delivered: None) -> None:
    call = new_id()
    minder = Minder(timedelta(seconds=0), kills=False)
    with pytest.raises(SoftTimeLimitExceeded), interrupts.body(call, 1, LONG):
        minder.look(Rows(), {(call, 1)}, leaving=False)  # type: ignore[arg-type]
        minder.look(Rows(), {(call, 1)}, leaving=False)  # type: ignore[arg-type]
        time.sleep(LONG)


@pytest.mark.parametrize(
    ("wanted", "grace", "taken"), [(True, 0, True), (False, 60, True), (False, 0, False)],
    ids=["nobody knows what became of it", "it has a grace", "it is ours"],
)  # fmt: skip
def test_a_call_is_let_be(delivered: None, wanted: bool, grace: float, taken: bool) -> None:
    call = new_id()
    minder = Minder(timedelta(seconds=grace), kills=True)
    rows: Any = Rows(*[(call, 1)] if wanted else [])
    with interrupts.body(call, 1, LONG) as body:
        for _ in range(3):
            minder.look(rows, {(call, 1)} if taken else set(), leaving=False)
    assert body.reason is None


@pytest.mark.parametrize("kills", [True, False])
def test_what_heeds_nothing_is_killed_where_that_kills_nothing_else(
    delivered: None, monkeypatch: pytest.MonkeyPatch, kills: bool
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(os, "kill", lambda *told: killed.append(told))
    monkeypatch.setattr(interrupts, "GRACE", timedelta(0))
    call = new_id()
    minder = Minder(timedelta(0), kills=kills)
    with interrupts.body(call, 1, LONG) as body:
        body.reason = Reason.UNWANTED  # it was told, and went on
        minder.look(Rows(), {(call, 1)}, leaving=False)  # type: ignore[arg-type]
        minder.look(Rows(), {(call, 1)}, leaving=False)  # type: ignore[arg-type]
    assert bool(killed) == kills


@pytest.mark.parametrize("gives_back", [True, False])
def test_a_worker_that_leaves_interrupts_what_asked_for_it(delivered: None, gives_back: bool) -> None:
    minder = Minder(timedelta(seconds=60), kills=True)
    error: Exception | None = None
    with interrupts.body(new_id(), 1, LONG, gives_back=gives_back) as body:
        try:
            minder.look(Rows(), set(), leaving=True)  # type: ignore[arg-type]
        except WorkerLeaving as raised:
            error = raised
    assert (body.reason is Reason.LEAVING) == (error is not None) == gives_back
