"""Every cell of the table of busy threads (tests/runs/busy.py), against Postgres; and what steers a run that ends first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from django.db import connection
from psycopg.rows import dict_row
from psycopg.types.json import JsonbLoader

from runs.agents import Agent
from runs.exceptions import NothingToDo, ThreadBusy, TooManyHeld
from runs.models import Run
from runs.pytest_longhaul import assert_invariants
from tests.protocol.rows import POISON, Claim, Database, World, a_call
from tests.runs.busy import MODES, STANDS, Cell, cells
from tests.runs.scenes import Cast, payloads, refused, rows, types
from threads.models import Message, Thread

pytestmark = pytest.mark.django_db

CELLS = {f"{cell.stand}, {cell.mode}": cell for cell in cells()}


class InThisTransaction(Database):
    """Django's own connection, so that a test is rolled back and sees what it does."""

    def __init__(self) -> None:
        connection.ensure_connection()
        self.connection = connection.connection

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        with self.connection.cursor(row_factory=dict_row) as cursor:
            cursor.adapters.register_loader("jsonb", JsonbLoader)  # Django reads text
            return list(cursor.execute(query, values or None).fetchall())


@pytest.fixture
def world(db: None) -> World:
    return World(InThisTransaction())


@pytest.fixture
def echo(cast: Cast) -> Agent:
    return cast("echo")


# --- the ways in which a run stands -------------------------------------------------------------------------------


def speaking(world: World, *texts: str) -> Claim:
    claim = world.turn(world.claim(world.start(text="first")))
    if texts:
        world.speak(claim, *texts)
    return claim


def asking(world: World, *calls: dict[str, Any], linger: timedelta | None = None) -> UUID:
    claim = speaking(world)
    asked = calls or (a_call(name="call 0"),)
    content = [{"type": "text", "text": "said"}] + [
        {"type": "tool_call", "tool_call": call["id"], "name": call["name"], "arguments": {}} for call in asked
    ]
    world.speak(claim, "said")
    created = {"message": str(claim.message), "arguments": {}}
    told = [["tool_call.created", None, {**created, "tool_call": call["id"], "name": call["name"]}] for call in asked]
    world.commit(claim, asked, linger=linger, content=content, events=told)
    return claim.run


def retrying(world: World) -> UUID:
    claim = speaking(world)
    world.requeue(claim, "retry", timedelta(hours=1))
    return claim.run


def executing(world: World) -> UUID:
    run = asking(world)
    world.call_claim(world.calls(run)[0])
    return run


def fan_out(world: World) -> UUID:
    run = asking(world, *(a_call(index, name=f"call {index}") for index in range(3)))
    done, runs, _ = world.calls(run)
    world.settle(world.call_claim(done))
    world.call_claim(runs)
    return run


def joined(world: World) -> UUID:
    run = asking(world)
    world.settle(world.call_claim(world.calls(run)[0]))
    return run


def unknown(world: World) -> UUID:
    run = asking(world, a_call(name="call 0", idempotent=False))
    world.call_reclaim(world.call_claim(world.calls(run)[0]))
    return run


WAYS: dict[str, Callable[[World], UUID]] = {
    "queued": lambda world: world.start(text="first"),
    "retry": retrying,
    "claimed": lambda world: world.claim(world.start(text="first")).run,
    "silent": lambda world: speaking(world).run,
    "speaking": lambda world: speaking(world, "so ", "far").run,
    "requested": asking,
    "lingering": lambda world: asking(world, linger=timedelta(seconds=60)),
    "executing": executing,
    "fan-out": fan_out,
    "joined": joined,
    "unknown": unknown,
}


def shown(thread: Thread) -> tuple[str, ...]:
    """The thread as the table tells it: discarded messages are not there."""
    found = Message.objects.filter(thread=thread).exclude(status="discarded")
    placed = [*found.filter(position__isnull=False).order_by("position"), *found.filter(position=None).order_by("pk")]
    return tuple(_word(message) for message in placed)


def _word(message: Message) -> str:
    results = [part["outcome"] for part in message.content if part["type"] == "tool_result"]
    asks = any(part["type"] == "tool_call" for part in message.content)
    said = results[0] if results else message.text + (", and asks" if asks else "")
    return f"{message.role}: {said}" + ("" if message.status == "completed" else f" [{message.status}]")


def live_run(world: World, stand: str) -> tuple[Run, Thread]:
    run = Run.objects.get(pk=WAYS[stand](world))
    assert run.status == STANDS[stand].status
    assert shown(run.thread) == STANDS[stand].shows
    return run, run.thread


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_has_every_way_and_every_mode() -> None:
    assert set(WAYS) == set(STANDS)
    assert {(cell.stand, cell.mode) for cell in CELLS.values()} == {(stand, mode) for stand in STANDS for mode in MODES}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_a_start_on_a_busy_thread(world: World, echo: Agent, cell: Cell) -> None:
    live, thread = live_run(world, cell.stand)
    held = echo.start("third", thread=thread)
    if cell.mode == "reject":
        with refused(ThreadBusy, str(live.pk)):
            echo.start("second", thread=thread, busy="reject")
        return
    started = echo.start("second", thread=thread, busy=cell.mode)
    live.refresh_from_db()
    assert (live.status, live.stop_reason) == (cell.live, cell.stop_reason)
    told = tuple(word for word in shown(thread) if not word.startswith("user: third"))
    assert told == cell.transcript
    if cell.answer == "live":
        assert started == live
    else:
        assert (started.status, started.dispatch_seq) == (cell.new, int(cell.new == "queued"))
    if cell.stop_reason:
        assert (started.parent, started.origin) == (live, "start")
        assert payloads(live, "run.cancelled")[0]["next"] == str(started.pk)
        assert payloads(started, "run.queued")[0]["after"] == str(live.pk)
        assert types(live)[-1] == "run.cancelled"
        assert valid(thread, started)
    if cell.mode == "rollback":
        assert started.rolled_back is not None
        assert started.rolled_back["run"] == str(live.pk)
        assert {each["name"]: each["effect"] for each in started.rolled_back["tool_calls"]} == cell.effects
        told_away = [each["message"] for each in payloads(live, "message.discarded") if each["reason"] == "rolled_back"]
        gone = Message.objects.filter(thread=thread, status="rolled_back").order_by("position")
        assert told_away == [str(message.pk) for message in gone]
    else:
        assert started.rolled_back is None
    held.refresh_from_db()
    assert held.status == "held"
    assert_invariants()


def valid(thread: Thread, run: Run) -> bool:
    """Whether a provider takes what the run would be shown: every call answered, right behind it."""
    open_calls: set[str] = set()
    said = Message.objects.filter(thread=thread, status__in=["completed", "partial"]).order_by("position")
    for message in said:
        if message.role == "tool":
            [answer] = [part["tool_call"] for part in message.content]
            open_calls.remove(str(answer))
            continue
        assert not open_calls
        open_calls = {str(part["tool_call"]) for part in message.content if part["type"] == "tool_call"}
    return not open_calls and message.run_id == run.pk


@pytest.mark.parametrize("mode", MODES)
def test_a_start_on_a_free_thread_starts(world: World, echo: Agent, mode: str) -> None:
    claim = speaking(world, "said")
    world.end(claim)
    thread = Thread.objects.get(pk=world.run(claim.run)["thread_id"])
    started = echo.start("second", thread=thread, busy=mode)
    assert (started.status, started.parent, started.rolled_back) == ("queued", None, None)
    assert shown(thread) == ("user: first", "assistant: said", "user: second")
    assert_invariants()


@pytest.mark.parametrize("mode", ["steer", "interrupt", "rollback"])
@pytest.mark.parametrize("stand", STANDS)
def test_twice_in_a_row(world: World, echo: Agent, stand: str, mode: str) -> None:
    live, thread = live_run(world, stand)
    second, third = (echo.start(word, thread=thread, busy=mode) for word in ("second", "third"))
    inputs = [word for word in shown(thread) if word.startswith("user: ")]
    if mode == "steer":
        assert second == third == live
        assert inputs == ["user: first", "user: second [waiting]", "user: third [waiting]"]
    else:
        second.refresh_from_db()
        assert (second.status, third.status, third.parent) == ("cancelled", "queued", second)
        mark = " [rolled_back]" if mode == "rollback" else ""
        assert inputs == [f"user: first{mark}", f"user: second{mark}", "user: third"]
    assert_invariants()


# --- what steers a run that ends first ------------------------------------------------------------------------------


def poison(world: World, claim: Claim) -> Any:
    world.db.execute("UPDATE longhaul_runs_run SET lost = %s WHERE id = %s", POISON - 1, claim.run)
    return world.reclaim(claim)


ENDS: dict[str, Callable[[World, Claim], Any]] = {
    "completed, with no room": lambda world, claim: world.end(claim),
    "finished": lambda world, claim: world.finish(claim),
    "cancelled": lambda world, claim: world.cancel(claim.run),
    "past its deadline": lambda world, claim: world.cancel(claim.run, "failed", "deadline"),
    "poison": poison,
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_what_steered_a_run_that_ends_first_is_answered_by_a_run_of_its_own(
    world: World, echo: Agent, end: Callable[[World, Claim], Any]
) -> None:
    claim = speaking(world, "said")
    live = Run.objects.get(pk=claim.run)
    held = echo.start("held", thread=live.thread)
    for word in ("second", "third"):
        assert echo.start(word, thread=live.thread, busy="steer", client_id=word) == live
    answer = end(world, claim)
    live.refresh_from_db()
    [new] = Run.objects.filter(parent=live)
    assert (new.status, new.origin, new.agent, new.save_mode) == ("queued", "steer", "echo", live.save_mode)
    assert answer["released"] == [str(new.pk), 1, "echo"]
    assert shown(live.thread)[-3:] == ("user: second", "user: third", "user: held [waiting]")
    assert types(new) == ["message.completed", "message.completed", "run.queued"]
    assert [each["client_id"] for each in payloads(new, "message.completed")] == ["second", "third"]
    assert payloads(live, f"run.{live.status}")[0]["next"] == str(new.pk)
    assert str(new.input_message_id) == payloads(new, "message.completed")[0]["message"]
    held.refresh_from_db()
    assert held.status == "held"
    world.cancel(new.pk)
    held.refresh_from_db()
    assert held.status == "queued"
    assert_invariants()


def test_what_steered_a_run_that_is_interrupted_is_shown_to_the_run_in_its_place(world: World, echo: Agent) -> None:
    live = Run.objects.get(pk=speaking(world, "so far").run)
    echo.start("second", thread=live.thread, busy="steer")
    new = echo.start("third", thread=live.thread, busy="interrupt")
    assert shown(live.thread) == ("user: first", "assistant: so far [partial]", "user: second", "user: third")
    assert set(Message.objects.filter(run_id=new.pk).values_list("content__0__text", flat=True)) == {"second", "third"}
    assert types(new) == ["message.completed", "message.completed", "run.queued"]
    assert_invariants()


def test_what_steered_a_run_that_is_rolled_back_is_taken_back_with_it(world: World, echo: Agent) -> None:
    live = Run.objects.get(pk=speaking(world, "so far").run)
    echo.start("second", thread=live.thread, busy="steer", client_id="c")
    echo.start("third", thread=live.thread, busy="rollback")
    assert [(word.split()[1], word.split()[-1]) for word in shown(live.thread)] == [
        ("first", "[rolled_back]"), ("so", "[rolled_back]"), ("third", "third"),
    ]  # fmt: skip
    [told] = [each for each in payloads(live, "message.discarded") if each.get("client_id") == "c"]
    assert told["reason"] == "rolled_back"
    assert_invariants()


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    assert_invariants()


def test_a_message_saved_by_hand_is_not_rolled_back(world: World, echo: Agent) -> None:
    live = Run.objects.get(pk=speaking(world, "so far").run)
    live.thread.save_many([{"role": "user", "content": "by hand"}])
    echo.start("second", thread=live.thread, busy="rollback")
    assert shown(live.thread)[2:] == ("user: by hand", "user: second")


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_steer_needs_input(world: World, echo: Agent) -> None:
    live, thread = live_run(world, "fan-out")
    with refused(NothingToDo, str(live.pk)):
        echo.start(thread=thread, busy="steer")


def test_so_much_steers_a_run_and_no_more(world: World, echo: Agent, settings: Any) -> None:
    settings.LONGHAUL = {"MAX_HELD": 2}
    _, thread = live_run(world, "fan-out")
    for word in ("second", "third"):
        echo.start(word, thread=thread, busy="steer")
    with refused(TooManyHeld, "2 messages wait"):
        echo.start("fourth", thread=thread, busy="steer")


def test_an_interrupt_that_is_refused_leaves_the_live_run_alone(world: World, echo: Agent) -> None:
    claim = speaking(world, "said")
    world.end(claim)
    thread = Thread.objects.get(pk=world.run(claim.run)["thread_id"])
    echo.start("second", thread=thread)
    with refused(NothingToDo):
        echo.start(thread=thread, busy="rollback")  # what is left is a finished turn of the assistant


# --- the same request again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES[:-1])
def test_the_same_key_gives_the_same_run_and_changes_nothing(world: World, echo: Agent, mode: str) -> None:
    _, thread = live_run(world, "fan-out")
    first = echo.start("second", thread=thread, busy=mode, idempotency_key="k")
    before = rows()
    again = echo.start("second", thread=thread, busy=mode, idempotency_key="k")
    assert (again, again.rolled_back) == (first, first.rolled_back)
    assert rows() == before


@pytest.mark.parametrize("mode", ["steer", "interrupt", "rollback"])
def test_the_same_saved_message_is_given_once(world: World, echo: Agent, mode: str) -> None:
    _, thread = live_run(world, "fan-out")
    [message] = thread.save_many([{"role": "user", "content": "second"}])
    first = echo.start(message=message, busy=mode)
    before = rows()
    assert echo.start(message=message, busy=mode) == first
    assert rows() == before
    message.refresh_from_db()
    assert message.run_id == first.pk
