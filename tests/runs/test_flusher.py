"""The flusher writes the deltas of all runs of a process: in order, together, and each once, whatever Postgres answers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from django.db import connection

from runs import claims, engine, flusher
from runs.exceptions import FenceLost
from runs.flusher import Buffer, Flusher
from runs.models import Run
from runs.providers.port import ModelEvent, ModelRequest, TextDelta
from runs.pytest_longhaul import assert_invariants
from tests.protocol.rows import Background, Claim, Database, World, wait_until
from tests.runs.scenes import Cast, Together, _flush, agents_process, speaking

pytestmark = pytest.mark.django_db(transaction=True)

PIECE = "text.delta"


@pytest.fixture
def other(world: World) -> Iterator[Database]:
    """A second session, that holds what the flusher wants."""
    db = Database(connection.connection.info.dsn)
    yield db
    db.connection.close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that was not answered is sent again without a pause."""
    monkeypatch.setattr(flusher, "AGAIN_SECONDS", 0.0)


@pytest.fixture
def rung(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What the flusher rang, a set a time."""
    rung: list[set[str]] = []
    monkeypatch.setattr("runs.bells.ring", lambda channels: rung.append(set(channels)))
    return rung


class Speaker:
    """A leg that speaks through a flusher."""

    def __init__(self, world: World, through: Flusher, worker: UUID | None = None) -> None:
        self.world = world
        self.leg: Claim = world.turn(world.claim(world.start(), worker))
        self.claim = claims.Claim(self.leg.run, self.leg.worker)
        self.claim.epoch = self.leg.epoch
        assert self.leg.message is not None
        self.buffer: Buffer = through.open(self.claim, self.leg.message)

    def say(self, *pieces: str, kind: str = PIECE, **fields: Any) -> None:
        for piece in pieces:
            self.buffer.add(kind, piece, **fields)

    def deltas(self) -> list[dict[str, Any]]:
        return [row for row in self.world.events(self.leg.run) if row["type"].endswith("delta")]

    def written(self) -> list[str]:
        return [row["payload"]["text"] for row in self.deltas()]

    def whole(self) -> bool:
        """Each ordinal once, rising, and the log without a gap."""
        ordinals = [row["ordinal"] for row in self.deltas()]
        seqs = [row["seq"] for row in self.world.events(self.leg.run)]
        return ordinals == sorted(set(ordinals)) and seqs == list(range(1, len(seqs) + 1))

    @property
    def lost(self) -> bool:
        return self.claim.interruption == "lost"


@pytest.fixture
def through() -> Flusher:
    """A flusher whose rounds the test makes."""
    return Flusher(timedelta(milliseconds=1))


@contextmanager
def standing_still(db: Database) -> Iterator[None]:
    """Let a batch get its runs, and wait before it writes a row."""
    with db.transaction():
        db.execute("LOCK TABLE longhaul_runs_event IN SHARE MODE")
        yield


class Flushing:
    """A round in a thread of its own, whose connection can be cut."""

    def __init__(self, through: Flusher) -> None:
        self.pid = 0
        self._socket = -1

        def flush() -> None:
            connection.ensure_connection()
            self._socket = connection.connection.pgconn.socket
            self.pid = connection.connection.info.backend_pid
            try:
                through.flush()
            finally:
                connection.close()

        self._round = Background(flush)

    def waits(self, db: Database) -> None:
        """Wait until Postgres is at work on the batch and cannot go on."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
        wait_until(lambda: self.pid and db.one(query, self.pid))

    def cut(self) -> None:
        """Cut the connection: the server does not notice and works on, the answer is lost."""
        ours = socket.socket(fileno=self._socket)
        ours.shutdown(socket.SHUT_RDWR)
        ours.detach()
        self.end()

    def end(self) -> None:
        self._round.result()


# --- order and batches


def test_pieces_of_one_kind_are_one_row_and_kinds_keep_their_order(world: World, through: Flusher) -> None:
    speaker = Speaker(world, through)
    speaker.say("I ", "see")
    speaker.say("hm", kind="reasoning.delta")
    speaker.say("so", ".")
    speaker.say("{", "}", kind="tool_call.arguments_delta", tool_call="a", name="x")
    speaker.say("{}", kind="tool_call.arguments_delta", tool_call="b", name="x")
    through.flush()
    message = str(speaker.leg.message)
    assert [(row["type"], row["ordinal"], row["payload"]) for row in speaker.deltas()] == [
        ("text.delta", 2, {"message": message, "text": "I see"}),
        ("reasoning.delta", 3, {"message": message, "text": "hm"}),
        ("text.delta", 5, {"message": message, "text": "so."}),
        ("tool_call.arguments_delta", 7, {"message": message, "text": "{}", "tool_call": "a", "name": "x"}),
        ("tool_call.arguments_delta", 8, {"message": message, "text": "{}", "tool_call": "b", "name": "x"}),
    ]
    speaker.say("on", " and on")
    through.flush()
    assert speaker.written()[5:] == ["on and on"]
    assert speaker.whole()


def test_the_deltas_of_all_runs_are_written_together(world: World, through: Flusher, rung: list[set[str]]) -> None:
    worker = world.worker()
    speakers = [Speaker(world, through, worker) for _ in range(5)]
    for number, speaker in enumerate(speakers[:4]):
        speaker.say(f"I am {number}")
    through.flush()
    assert [speaker.written() for speaker in speakers] == [["I am 0"], ["I am 1"], ["I am 2"], ["I am 3"], []]
    assert len({row["at"] for speaker in speakers for row in speaker.deltas()}) == 1  # one statement
    assert rung == [{f"longhaul.run.{speaker.leg.run}" for speaker in speakers[:4]}]
    through.flush()
    assert len(rung) == 1


def test_what_is_said_is_stored_letter_by_letter(world: World, through: Flusher) -> None:
    awkward = ['"', "\\", '{"a", NULL}', "NULL", "", " ", "\n\t", "'%s%b'", "\u2028 \U0001f600 é", "x" * 70_000]
    one, other = Speaker(world, through), Speaker(world, through)
    one.buffer.ordinal = 2**15  # two sizes of numbers in one batch
    other.say("before")
    for text in awkward:  # by turns, so that none are joined
        one.say(text)
        one.say(text, kind="reasoning.delta")
    through.flush()
    assert one.written() == [text for text in awkward for _ in range(2)]
    assert other.written() == ["before"]
    assert one.whole()


def test_a_message_that_has_only_just_begun_waits_a_round_and_one_that_goes_on_does_not(
    world: World, through: Flusher
) -> None:
    waits, comes = Speaker(world, through), Speaker(world, through)
    waits.say("old")
    comes.say("new")
    waits.buffer.since = time.monotonic() - 60
    through._work.clear()
    through.flush(older_than=30)
    assert (waits.written(), comes.written()) == (["old"], [])
    assert through._work.is_set()  # it is not forgotten
    comes.say("er")
    comes.buffer.since -= 60
    through.flush(older_than=30)
    assert comes.written() == ["newer"]
    comes.say("still")
    through.flush(older_than=30)
    assert comes.written() == ["newer", "still"]


def test_a_process_that_began_a_new_life_writes_for_its_legs_of_both(world: World, through: Flusher) -> None:
    before, after = Speaker(world, through, world.worker()), Speaker(world, through, world.worker())
    before.say("a")
    after.say("b")
    through.flush()
    assert (before.written(), after.written()) == (["a"], ["b"])
    assert not before.lost
    assert not after.lost


def test_what_belongs_to_a_message_that_has_ended_is_dropped(world: World, through: Flusher) -> None:
    speaker = Speaker(world, through)
    speaker.say("late")
    through.close(speaker.buffer)
    through.flush()
    assert speaker.written() == []


def test_a_bell_is_rung_after_the_commit_and_for_what_legs_have_committed_too(
    world: World, through: Flusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker, beside = Speaker(world, through), world.start()
    heard: list[tuple[set[str], list[str]]] = []
    monkeypatch.setattr("runs.bells.ring", lambda channels: heard.append((set(channels), speaker.written())))
    speaker.say("hello")
    through.ring(beside)
    through.flush()
    assert heard == [({f"longhaul.run.{speaker.leg.run}", f"longhaul.run.{beside}"}, ["hello"])]


# --- lost answers


def test_a_batch_whose_connection_is_cut_before_its_commit_is_sent_again(
    world: World, other: Database, through: Flusher
) -> None:
    worker = world.worker()
    speaker, beside = Speaker(world, through, worker), Speaker(world, through, worker)
    speaker.say("one ", "two ")
    beside.say("mine")
    with standing_still(other):
        batch = Flushing(through)
        batch.waits(world.db)
        speaker.say("three")  # meanwhile
        world.db.one("SELECT pg_terminate_backend(%s)", batch.pid)
        batch.end()
    assert speaker.written() == []
    through.flush()
    assert speaker.written() == ["one two ", "three"]  # what may be a row stays as it was sent
    assert beside.written() == ["mine"]
    assert speaker.whole()
    assert not speaker.lost


def test_a_batch_whose_answer_is_lost_is_not_written_twice(world: World, other: Database, through: Flusher) -> None:
    speaker = Speaker(world, through)
    speaker.say("one ", "two ")
    with standing_still(other):
        first = Flushing(through)
        first.waits(world.db)
        first.cut()
        # The server is still at work on it when it comes again.
        speaker.say("three")
        again = Flushing(through)
        again.waits(world.db)
    again.end()
    while speaker.buffer.chunks:  # the first batch holds the run until it has committed
        through.flush()
    assert speaker.written() == ["one two ", "three"]
    assert speaker.whole()
    assert not speaker.lost


def test_without_postgres_nothing_is_lost(
    world: World, through: Flusher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    speaker = Speaker(world, through)
    speaker.say("one ")
    host = connection.settings_dict["HOST"]
    connection.close()
    monkeypatch.setitem(connection.settings_dict, "HOST", "/nonexistent")
    for piece in ("two ", "three"):
        through.flush()
        speaker.say(piece)
    assert "it is sent again" in caplog.text
    assert not speaker.lost
    monkeypatch.setitem(connection.settings_dict, "HOST", host)
    through.flush()
    assert "".join(speaker.written()) == "one two three"
    assert speaker.whole()


# --- lost fences, locked runs, deltas that cannot be stored


@pytest.mark.parametrize("way", ["reclaimed", "cancelled", "next message", "deleted"])
def test_a_leg_without_its_fence_writes_nothing_and_is_told(
    world: World, through: Flusher, rung: list[set[str]], way: str
) -> None:
    worker = world.worker()
    speaker, beside = Speaker(world, through, worker), Speaker(world, through, worker)
    speaker.say("before")
    through.flush()
    match way:
        case "reclaimed":
            world.reclaim(speaker.leg)
            world.turn(world.claim(speaker.leg.run, worker))  # by the same process, at that
        case "cancelled":
            world.cancel(speaker.leg.run)
        case "next message":
            world.commit(speaker.leg, None)
            world.turn(speaker.leg)
        case "deleted":
            Run.objects.get(pk=speaker.leg.run).thread.delete()
    before = world.dump()["longhaul_runs_event"]
    rung.clear()
    speaker.say(" and after")
    through.flush()
    assert world.dump()["longhaul_runs_event"] == before
    assert speaker.lost
    assert rung == []
    beside.say("fine")
    speaker.say("!")
    through.flush()
    assert beside.written() == ["fine"]
    assert not beside.lost
    with pytest.raises(FenceLost):
        speaker.claim.check_lost()


def test_a_run_that_somebody_holds_is_left_to_the_next_round(world: World, other: Database, through: Flusher) -> None:
    worker = world.worker()
    held, free = Speaker(world, through, worker), Speaker(world, through, worker)
    held.say("one ")
    free.say("here")
    through._work.clear()
    with other.transaction():
        other.execute("SELECT 1 FROM longhaul_runs_run WHERE id = %s FOR UPDATE", held.leg.run)
        through.flush()
        assert (held.written(), free.written()) == ([], ["here"])
        assert through._work.is_set()
        held.say("two")
    through.flush()
    assert held.written() == ["one ", "two"]
    assert held.whole()
    assert not held.lost


@pytest.mark.parametrize("piece", ["\x00", "\ud800"], ids=["NUL", "half a pair"])
def test_a_delta_that_cannot_be_stored_costs_its_leg_and_no_other(
    world: World, through: Flusher, caplog: pytest.LogCaptureFixture, piece: str
) -> None:
    worker = world.worker()
    speakers = [Speaker(world, through, worker) for _ in range(3)]
    bad = speakers[1]
    for speaker in speakers:
        speaker.say(piece if speaker is bad else "fine")
    through.flush()
    assert [speaker.written() for speaker in speakers] == [["fine"], [], ["fine"]]
    assert [speaker.lost for speaker in speakers] == [False, True, False]
    assert f"A delta of run {bad.leg.run} cannot be stored" in caplog.text
    assert bad.buffer.take() == []  # it does not wait for an answer that never comes


# --- what the step's commit takes


def waiting(buffer: Buffer) -> bool:
    return bool(buffer.answered._cond._waiters)  # type: ignore[attr-defined]


def test_a_commit_takes_what_is_not_written_after_the_batch_in_flight_was_answered(
    world: World, other: Database, through: Flusher
) -> None:
    speaker = Speaker(world, through)
    speaker.say("one ")
    with standing_still(other):
        batch = Flushing(through)
        batch.waits(world.db)
        speaker.say("two ", "three")
        taking = Background(speaker.buffer.take)
        wait_until(lambda: waiting(speaker.buffer))
        assert not taking.is_done()
    batch.end()
    assert speaker.buffer.answered.is_set()  # nobody waits longer than for the answer
    [rest] = taking.result()
    assert (speaker.written(), rest.payload["text"], rest.ordinal) == (["one "], "two three", 3)
    assert speaker.buffer.take() == []


def test_a_step_that_takes_its_text_while_the_flusher_looks_costs_no_leg(
    world: World, through: Flusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a threads pool the two are real threads: here the commit is faster than the flusher, between its look and its hold."""
    quick, other = Speaker(world, through), Speaker(world, through)
    quick.say("a")
    other.say("b")
    send, taken = Buffer.send, []

    def late(buffer: Buffer) -> bool:
        if buffer is quick.buffer:
            taken.extend(buffer.take())
        return send(buffer)

    monkeypatch.setattr(Buffer, "send", late)
    through.flush()
    assert [chunk.payload["text"] for chunk in taken] == ["a"]
    assert quick.claim.interruption is None
    assert (quick.written(), other.written()) == ([], ["b"])


def test_a_step_never_overlooks_text_that_is_just_put_in_flight(world: World, through: Flusher) -> None:
    speaker = Speaker(world, through)
    speaker.say("a")
    buffer, real = speaker.buffer, speaker.buffer.lock

    class Late:
        """The flusher's hand is quicker, whenever the step reaches for the lock for the first time."""

        def __enter__(self) -> None:
            buffer.lock = real
            buffer.send()
            real.acquire()

        def __exit__(self, *_: object) -> None:
            real.release()

    buffer.lock = Late()  # type: ignore[assignment]
    taking = Background(buffer.take)
    wait_until(lambda: bool(buffer.in_flight) or taking.is_done())
    buffer.settle(again=True)  # it was not answered: the step writes it itself
    assert [chunk.payload["text"] for chunk in taking.result()] == ["a"]


def test_a_commit_takes_a_batch_over_that_was_not_answered(world: World, other: Database, through: Flusher) -> None:
    speaker = Speaker(world, through)
    speaker.say("one ")
    with standing_still(other):
        batch = Flushing(through)
        batch.waits(world.db)
        speaker.say("two")
        taking = Background(speaker.buffer.take)
        wait_until(lambda: waiting(speaker.buffer))
        world.db.one("SELECT pg_terminate_backend(%s)", batch.pid)
        batch.end()
    assert [(chunk.payload["text"], chunk.ordinal) for chunk in taking.result()] == [("one ", 1), ("two", 2)]


def test_a_leg_that_is_lost_does_not_wait_for_its_batch(world: World, through: Flusher) -> None:
    speaker = Speaker(world, through)
    speaker.say("one")
    speaker.buffer.send()
    speaker.claim.interrupt("lost")
    speaker.buffer.answered.set()  # so that it looks at once
    with pytest.raises(FenceLost):
        speaker.buffer.take()


# --- in its own rhythm


@pytest.fixture
def running(through: Flusher) -> Iterator[Flusher]:
    through._thread = threading.Thread(target=_flush, args=(through,), daemon=True)
    through.start()
    yield through
    through.end()
    through._thread.join(5)
    assert not through._thread.is_alive()


def test_it_writes_by_itself_when_it_is_woken(world: World, running: Flusher) -> None:
    speaker = Speaker(world, running)
    for piece in ("one ", "two ", "three"):
        speaker.say(piece)
        running.wake()
        wait_until(lambda: "".join(speaker.written()).endswith(piece))  # noqa: B023
    assert "".join(speaker.written()) == "one two three"
    assert speaker.whole()


def test_it_goes_on_after_an_error(
    world: World, running: Flusher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("runs.bells.ring", lambda channels: 1 / 0)
    first, second = Speaker(world, running), Speaker(world, running)
    first.say("one")
    running.wake()
    wait_until(lambda: "The flusher goes on after an error" in caplog.text)
    second.say("two")
    running.wake()
    wait_until(second.written)
    assert (first.written(), second.written()) == (["one"], ["two"])


def test_a_run_through_cuts_says_everything_once(cast: Cast, world: World, other: Database) -> None:
    """The whole way: a model that speaks, a flusher whose batches are cut, a commit with the rest."""
    pieces = [f"w{number} " for number in range(12)]
    process: engine.Process
    run: Run

    def batch() -> int:
        query = (
            "SELECT coalesce(max(pid), 0) FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND query LIKE '%%longhaul_deltas_write%%' AND pid <> pg_backend_pid()"
        )
        return int(world.db.one(query))

    def script(request: ModelRequest) -> Iterator[ModelEvent]:
        for number, piece in enumerate(pieces):
            if number % 4 != 3:
                yield TextDelta(piece)
                continue
            with standing_still(other):
                yield TextDelta(piece)
                pid = wait_until(batch)
                world.db.one("SELECT pg_terminate_backend(%s)", pid)
                wait_until(lambda: batch() not in (0, pid))  # noqa: B023
        yield TextDelta("end")

    with speaking(script), agents_process() as process:
        run = cast().start("count")
        Together(lambda: engine.advance(run.pk, 1, process)).join()
    run.refresh_from_db()
    assert (run.status, run.output) == ("completed", "".join(pieces) + "end")
    said = [event.payload["text"] for event in run.events() if event.type == PIECE]
    assert "".join(said) == run.output
    assert_invariants(run)
