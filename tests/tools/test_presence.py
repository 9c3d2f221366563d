"""Presence: a life of a process, by its lock and its beat; what the watcher makes of both; what a process gives back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import psycopg
import pytest
from django.db import OperationalError, connection, connections
from pytest_django.fixtures import Settings

from runs import admission, sweep
from runs.sweep import Watcher
from runs.worker import RUNS
from tests.protocol.rows import SECOND, Claim, Database, World, a_call, wait_until
from tests.workers.pgbouncer import PORT, PgBouncer
from threads.ids import new_id
from tools import execution, lifecycle, presence
from tools.models import Worker
from tools.presence import CALLS, Holding, Presence, Register

pytestmark = pytest.mark.django_db(transaction=True)

FRESH = 5 * SECOND  # what is old is 10 s old

HOLDINGS = (CALLS, Holding(RUNS.kind, RUNS.select, RUNS.give_back.format(poison=5)))


@pytest.fixture
def arrive() -> Iterator[Callable[..., Presence]]:
    """Makes presences whose ticks the test makes."""
    made: list[Presence] = []

    def arrive(**options: Any) -> Presence:
        present = Presence(name="agents@a", kind="agents", holdings=HOLDINGS, **options)
        made.append(present)
        present.tick()
        return present

    yield arrive
    for present in made:
        present.end()


def row(present: Presence | UUID) -> Worker:
    return Worker.objects.get(pk=present if isinstance(present, UUID) else present.id)


def age(present: Presence, world: World) -> timedelta:
    """How long ago its beat was, by the database's clock."""
    silent: timedelta = world.db.one(
        "SELECT longhaul_now() - beat_at FROM longhaul_tools_worker WHERE id = %s", present.id
    )
    return silent


def locked(key: int | None, world: World) -> bool:
    query = """
        SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND granted
        AND (classid::bigint << 32) | objid::bigint = %s)"""
    return bool(world.db.one(query, key))


def session(present: Presence) -> Any:
    assert present._connection is not None
    return present._connection


def cut(present: Presence, world: World) -> None:
    """End its session, as an outage or a failover does. Its lock is free then."""
    key = present.life.lock_key
    world.db.one("SELECT pg_terminate_backend(%s)", session(present).info.backend_pid)
    wait_until(lambda: not locked(key, world))


# --- a life


def test_who_arrives_has_a_row_a_lock_and_a_fresh_beat(world: World, arrive: Callable[..., Presence]) -> None:
    present = arrive()
    found = row(present)
    assert (found.name, found.kind, found.pid, found.parent_id) == ("agents@a", "agents", os.getpid(), None)
    assert (found.lock_key, found.gone_at, found.draining) == (present.life.lock_key, None, False)
    assert locked(found.lock_key, world)
    assert age(present, world) < FRESH
    assert world.db.one("SELECT longhaul_worker_present(%s, longhaul_now())", present.id)


def test_every_second_tick_is_a_beat_that_tells_of_a_drain(world: World, arrive: Callable[..., Presence]) -> None:
    present = arrive()
    world.ahead(10 * SECOND)
    present.tick()
    assert age(present, world) >= 10 * SECOND
    present.draining = True
    present.tick()
    assert age(present, world) < FRESH
    assert row(present).draining
    assert presence.BEAT.total_seconds() == presence._TICK_SECONDS * 2


def test_who_leaves_closes_its_life_and_leaves_no_lock(world: World, arrive: Callable[..., Presence]) -> None:
    present = arrive()
    child = arrive(parent=present.first_life, beats=False)
    beside = arrive()
    present.end()
    here = Worker.objects.filter(gone_at=None)
    assert set(here.values_list("pk", flat=True)) == {beside.id}  # nor its children
    assert Worker.objects.count() == 3  # who asks later is told what they were
    wait_until(lambda: not locked(present.life.lock_key, world))
    child.end()


@pytest.mark.parametrize("at_first", [True, False], ids=["from the start", "later"])
def test_a_wrong_setting_is_told_and_ends_no_thread(
    world: World,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    at_first: bool,
) -> None:
    """The worker would look alive, and never be present again."""
    present = Presence(name="agents@a", kind="agents", holdings=HOLDINGS)
    right, wrong = dict(settings.LONGHAUL), {**settings.LONGHAUL, "DIRECT_DATABASE": "nowhere"}
    tried = []
    tick = present.tick

    def counted() -> None:
        tried.append(1)
        tick()

    monkeypatch.setattr(presence, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(present, "tick", counted)
    try:
        if at_first:
            settings.LONGHAUL = wrong
        present.start()
        said = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
        assert len(said) == at_first
        if at_first:
            assert "agents@a cannot be present" in said[0]
            assert "ConnectionDoesNotExist: The connection 'nowhere' doesn't exist." in said[0]
        else:
            settings.LONGHAUL = wrong
            cut(present, world)
        tried.clear()
        wait_until(lambda: len(tried) > 2)  # the tick that failed has ended no thread
        settings.LONGHAUL = right
        wait_until(lambda: locked(present.life.lock_key, world))
        wait_until(lambda: Worker.objects.filter(pk=present.id, gone_at=None).exists())  # its row comes after its lock
    finally:
        present.end()


# --- a lost connection


def test_a_lost_connection_is_told_and_the_next_tick_takes_a_new_lock_for_the_same_life(
    world: World, arrive: Callable[..., Presence]
) -> None:
    present = arrive()
    id, key = present.id, present.life.lock_key
    held = claimed(world, present)
    with present.register.entry("run", held.run) as registered:
        registered(held.epoch)
        cut(present, world)
        with pytest.raises(psycopg.Error):
            present.tick()
        world.ahead(10 * SECOND)
        present.tick()
        assert present.id == id
        # A new key: the server may not have noticed the end of the old session, which would hold the old one still.
        assert present.life.lock_key != key
        assert row(present).lock_key == present.life.lock_key
        assert (locked(present.life.lock_key, world), locked(key, world)) == (True, False)
        assert age(present, world) < FRESH
        assert world.run(held.run)["holder"] == id  # it goes on


def test_who_was_found_dead_meanwhile_begins_a_new_life(world: World, arrive: Callable[..., Presence]) -> None:
    present = arrive()
    before = present.life
    cut(present, world)
    bury(before.id, world)
    with pytest.raises(psycopg.Error):
        present.tick()
    present.tick()
    assert_new_life(present, before, world)


def test_who_is_found_dead_with_its_session_unbroken_begins_a_new_life(
    world: World, arrive: Callable[..., Presence]
) -> None:
    """A process that was stopped for longer than the time to live, and woke."""
    present = arrive()
    before = present.life
    bury(before.id, world)
    present.tick()
    present.tick()
    assert_new_life(present, before, world)


def bury(life: UUID, world: World) -> None:
    world.db.execute("UPDATE longhaul_tools_worker SET gone_at = longhaul_now() WHERE id = %s", life)


def assert_new_life(present: Presence, before: presence.Life, world: World) -> None:
    assert present.id != before.id
    assert present.first_life == before.id
    assert (row(before.id).gone_at is None, row(present).gone_at) == (False, None)
    assert locked(present.life.lock_key, world)
    assert not locked(before.lock_key, world)


def claimed(world: World, present: Presence) -> Claim:
    return world.turn(world.claim(world.start(), present.id))


def called(world: World, present: Presence, **options: Any) -> UUID:
    """A running call that the process holds."""
    waiting = world.waiting(a_call(max_attempts=3, **options))
    [call] = world.calls(waiting.run)
    world.call_claim(call, present.id)
    return call


# --- what it does not know it holds


def test_what_names_a_process_that_does_not_know_it_is_given_back(
    world: World, arrive: Callable[..., Presence]
) -> None:
    present = arrive()
    lost, known, earlier = claimed(world, present), claimed(world, present), claimed(world, present)
    with present.register.entry("run", known.run) as of_known, present.register.entry("run", earlier.run) as of_earlier:
        of_known(known.epoch)
        of_earlier(earlier.epoch - 1)  # of a claim that it has lost: the present one is nobody's
        present.tick()
    assert [world.run(each.run)["status"] for each in (lost, known, earlier)] == ["queued", "running", "queued"]
    present.tick()
    assert world.run(known.run)["status"] == "queued"  # its leg is over


def test_what_is_about_to_be_claimed_is_not_given_back(world: World, arrive: Callable[..., Presence]) -> None:
    present = arrive()
    run = world.start()
    with present.register.entry("run", run):
        world.claim(run, present.id)
        present.tick()  # between the claim and its answer
        assert world.run(run)["status"] == "running"
    assert not present.register.knows("run", run, 1)


@pytest.mark.parametrize(
    ("options", "then"),
    [({"idempotent": True}, "retrying"), ({}, "retrying"), ({"idempotent": False}, "unknown")],
    ids=str,
)
def test_a_call_that_is_given_back_goes_the_way_of_a_lost_one(
    world: World, arrive: Callable[..., Presence], options: dict[str, bool], then: str
) -> None:
    present, beside = arrive(), arrive()
    call, known, others = called(world, present, **options), called(world, present), called(world, beside)
    with present.register.entry("call", known) as registered:
        registered(1)
        present.tick()
    assert [world.tool_call(each)["status"] for each in (call, known, others)] == [then, "running", "running"]


@pytest.mark.parametrize("committed", [True, False])
def test_a_call_whose_claim_got_no_answer_never_began_and_is_requested_again(
    world: World, arrive: Callable[..., Presence], monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    present = arrive()
    [call] = world.calls(world.waiting(a_call(idempotent=False)).run)
    claim = lifecycle.claim

    def lose_the_answer(*args: Any, **options: Any) -> None:
        if committed:
            claim(*args, **options)
        raise OperationalError("the connection was lost")

    with monkeypatch.context() as patch, pytest.raises(OperationalError):
        patch.setattr(lifecycle, "claim", lose_the_answer)
        execution.execute(call, 1, presence=present)
    if not committed:  # then a second message was claimed, and its work broke off: that one did begin
        with pytest.raises(KeyboardInterrupt), present.register.entry("call", call) as registered:
            world.call_claim(call, present.id)
            registered(1)
            raise KeyboardInterrupt
    assert world.tool_call(call)["status"] == "running"
    present.tick()
    found = world.tool_call(call)
    assert (found["status"], found["attempt"]) == (("retrying", 2) if committed else ("unknown", 1))
    # What was given back is forgotten: a later attempt that is lost may have begun.
    if committed:
        world.call_claim(call, present.id)
        present.tick()
        assert world.tool_call(call)["status"] == "unknown"


def test_a_register_tells_what_never_began_from_what_broke_off() -> None:
    register, id = Register(), new_id()
    assert not register.unbegun("call", id, 1)
    with pytest.raises(ZeroDivisionError), register.entry("call", id) as doubled:
        # A claim of the same attempt is answered and breaks off, before the doubled one's fails.
        with pytest.raises(KeyError), register.entry("call", id) as registered:
            registered(1)
            raise KeyError
        raise ZeroDivisionError
    del doubled
    assert not register.unbegun("call", id, 1)
    assert register.unbegun("call", id, 2)
    register.forget("call", id, 2)
    assert not register.unbegun("call", id, 2)
    with register.entry("call", id):
        pass  # answered by nobody's claim: another worker was first
    assert not register.unbegun("call", id, 3)


def test_what_somebody_else_holds_is_given_back_later_and_keeps_no_beat_back(
    world: World, arrive: Callable[..., Presence]
) -> None:
    present = arrive()
    held, free = claimed(world, present), claimed(world, present)
    other = Database(world.db.connection.info.dsn)
    other.execute("BEGIN")
    other.execute("SELECT longhaul_run_lock(%s)", held.run)
    before = session(present)
    assert timedelta(milliseconds=2 * presence._PATIENCE) < presence.MISSED - presence.BEAT
    try:
        for _ in range(2):
            world.ahead(10 * SECOND)
            present.tick()  # without a bound of its own it would wait for ever
            present.tick()
            assert age(present, world) < FRESH
        assert [world.run(each.run)["status"] for each in (held, free)] == ["running", "queued"]
        assert session(present) is before  # and so is its lock
        assert before.execute("SHOW lock_timeout").fetchone() == ("0",)
    finally:
        other.connection.close()
    present.tick()
    assert world.run(held.run)["status"] == "queued"


def test_a_register_knows_an_entry_by_kind_id_and_number() -> None:
    register, id = Register(), new_id()
    with register.entry("run", id) as first:
        assert register.knows("run", id, 7)  # whatever the claim's answer will be
        first(1)
        with register.entry("run", id) as second:  # a doubled message, in the same process
            second(2)
            assert (register.knows("run", id, 1), register.knows("run", id, 2)) == (True, True)
        assert not register.knows("run", id, 2)
        assert not register.knows("call", id, 1)
        assert not register.knows("run", new_id(), 1)
        first(3)  # a leg that lingered has claimed again
        assert (register.knows("run", id, 1), register.knows("run", id, 3)) == (False, True)
    assert not register.knows("run", id, 3)


# --- a prefork child


def test_the_parent_beats_for_the_children_that_run(world: World, arrive: Callable[..., Presence]) -> None:
    parent = arrive()
    child = arrive(parent=parent.first_life, beats=False)
    dead = arrive(parent=parent.first_life, beats=False)
    ended = subprocess.Popen([sys.executable, "-c", ""])  # a zombie until it is waited for: it does not run
    wait_until(lambda: not presence._runs(ended.pid))
    Worker.objects.filter(pk=dead.id).update(pid=ended.pid)
    world.ahead(10 * SECOND)
    for _ in range(2):
        child.tick()
        assert age(child, world) >= 10 * SECOND  # it does not beat itself: a tool may keep it from that
    parent.tick()
    parent.tick()
    assert age(child, world) < FRESH
    assert age(dead, world) >= 10 * SECOND
    ended.wait()


def test_a_parent_that_began_a_new_life_beats_for_its_children_still(
    world: World, arrive: Callable[..., Presence]
) -> None:
    parent = arrive()
    child = arrive(parent=parent.first_life, beats=False)
    bury(parent.id, world)
    for _ in range(2):
        parent.tick()
    late = arrive(parent=parent.first_life, beats=False)
    world.ahead(10 * SECOND)
    parent.tick()
    parent.tick()
    assert age(child, world) < FRESH
    assert age(late, world) < FRESH


def test_a_child_that_was_found_dead_begins_a_new_life(world: World, arrive: Callable[..., Presence]) -> None:
    parent = arrive()
    child = arrive(parent=parent.first_life, beats=False)
    before = child.life
    bury(child.id, world)
    child.tick()
    assert_new_life(child, before, world)
    assert row(child).parent_id == parent.first_life


def test_a_forked_child_does_not_hide_its_parents_death(world: World, arrive: Callable[..., Presence]) -> None:
    parent = arrive()
    copy = os.dup(session(parent).pgconn.socket)  # what a fork does to each file
    key = parent.life.lock_key
    try:
        parent.forget()
        assert locked(key, world)  # the parent's own file is open: nothing was said to the server
    finally:
        os.close(copy)
    wait_until(lambda: not locked(key, world))


# --- the thread


def test_the_thread_keeps_the_process_present_through_an_outage(
    world: World, arrive: Callable[..., Presence], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "_TICK_SECONDS", 0.01)
    present = Presence(name="agents@a", kind="agents", holdings=HOLDINGS)
    present.start()
    try:
        assert locked(present.life.lock_key, world)  # from the first moment
        before = present.life.lock_key
        cut(present, world)
        wait_until(lambda: present.life.lock_key != before and locked(present.life.lock_key, world))
        world.ahead(10 * SECOND)
        wait_until(lambda: age(present, world) < FRESH)
        lost = world.claim(world.start(), present.id)  # not a turn too: the thread may be faster than we are
        wait_until(lambda: world.run(lost.run)["status"] == "queued")
    finally:
        present.end()
    wait_until(lambda: not locked(present.life.lock_key, world))
    assert not Worker.objects.filter(gone_at=None).exists()


# --- what the watcher makes of lock and beat


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """A watcher, and a way to let it watch for so many seconds, with a look each second; or none, `blindly`."""
    ahead = [time.monotonic()]  # it stands: how long the looks themselves take is no part of the tests
    clock = SimpleNamespace(monotonic=lambda: ahead[0], sleep=lambda seconds: None)
    monkeypatch.setattr(sweep, "time", clock)
    watcher = Watcher()

    def watch(seconds: int, *, blindly: bool = False) -> None:
        for _ in range(1 if blindly else seconds):
            ahead[0] += seconds if blindly else 1
            if not blindly:
                watcher.dead()

    yield watcher, watch
    watcher.drop()


Watched = tuple[Watcher, Callable[..., None]]


def test_lock_held_and_beating_is_alive_for_ever(
    world: World, arrive: Callable[..., Presence], watched: Watched
) -> None:
    watcher, watch = watched
    present = arrive()
    for minute in range(1, 4):
        world.ahead(minute * 60 * SECOND)
        watch(60)
        present.tick()
        present.tick()
        assert watcher.dead() == {}


def test_lock_held_and_silent_is_dead_by_time(world: World, arrive: Callable[..., Presence], watched: Watched) -> None:
    """A process that is stopped, or cut off by a network that says nothing: its session stands."""
    watcher, watch = watched
    present = arrive()
    watcher.dead()
    world.ahead(6 * SECOND)
    watch(60)
    assert watcher.dead() == {}
    world.ahead(13 * SECOND)
    assert watcher.dead() == {present.id: True}
    assert locked(present.life.lock_key, world)


def test_silence_counts_only_while_it_was_watched(
    world: World, arrive: Callable[..., Presence], watched: Watched
) -> None:
    """An outage of Postgres, in which nobody could beat, kills nobody."""
    watcher, watch = watched
    present = arrive()
    world.ahead(600 * SECOND)
    assert watcher.dead() == {}
    watch(11)
    assert watcher.dead() == {}
    watch(2)
    assert watcher.dead() == {present.id: True}
    watcher.drop()
    assert watcher.dead() == {}


def test_an_answer_that_comes_late_counts_no_silence(
    world: World, arrive: Callable[..., Presence], watched: Watched
) -> None:
    """A pooler that waited for Postgres, or a server that was frozen, answers after minutes as if nothing had been."""
    watcher, watch = watched
    present = arrive()
    watch(5)
    world.ahead(600 * SECOND)
    watch(600, blindly=True)
    assert watcher.dead() == {}
    watch(5)
    assert watcher.dead() == {}
    watch(3)
    assert watcher.dead() == {present.id: True}


def test_lock_lost_and_beating_is_dead_but_no_beat_is_missed(
    world: World, arrive: Callable[..., Presence], watched: Watched
) -> None:
    watcher, _ = watched
    present = arrive()
    watcher.dead()
    cut(present, world)
    world.beat(present.id)
    assert watcher.dead() == {present.id: False}
    world.ahead(4 * SECOND)
    assert watcher.dead() == {present.id: True}


def test_a_lock_that_was_never_seen_held_says_nothing(
    world: World, arrive: Callable[..., Presence], watched: Watched
) -> None:
    watcher, _ = watched
    present = arrive()
    cut(present, world)
    assert watcher.dead() == {}
    # Nor does the old key, once the life has a new one.
    with pytest.raises(psycopg.Error):
        present.tick()
    present.tick()
    assert watcher.dead() == {}


def test_a_watcher_with_a_new_session_has_seen_nothing(
    world: World, arrive: Callable[..., Presence], watched: Watched
) -> None:
    """After a failover all locks are free, for a moment."""
    watcher, _ = watched
    present = arrive()
    watcher.dead()
    cut(present, world)
    world.db.one("SELECT pg_terminate_backend(%s)", watcher.session().info.backend_pid)
    with pytest.raises(psycopg.Error):
        watcher.dead()
    watcher.drop()
    assert watcher.dead() == {}


def test_a_life_that_is_closed_is_not_judged_again(
    world: World, arrive: Callable[..., Presence], watched: Watched
) -> None:
    watcher, watch = watched
    present = arrive()
    bury(present.id, world)
    world.ahead(60 * SECOND)
    watcher.dead()
    watch(60)
    assert watcher.dead() == {}


def test_a_lock_of_another_database_with_the_same_key_keeps_nobody_alive(
    world: World, arrive: Callable[..., Presence], watched: Watched
) -> None:
    watcher, _ = watched
    present = arrive()
    watcher.dead()
    elsewhere = psycopg.connect(world.db.connection.info.dsn, dbname="postgres", autocommit=True)
    with elsewhere:
        elsewhere.execute("SELECT pg_advisory_lock(%s)", (present.life.lock_key,))
        query = "SELECT pg_terminate_backend(%s)"
        world.db.one(query, session(present).info.backend_pid)
        wait_until(lambda: present.id in watcher.dead())
        assert not world.db.one("SELECT longhaul_worker_locked(%s)", present.id)


# --- behind a pooler that keeps no sessions


@pytest.fixture
def no_sessions(settings: Any) -> Callable[[bool], None]:
    """From here on connections are no sessions, or are again."""

    def switch(on: bool = True) -> None:
        settings.LONGHAUL = {"SESSION_LOCKS": not on}

    switch()
    return switch


@pytest.mark.needs_pgbouncer
def test_a_pooler_shows_itself_and_there_is_a_way_past_it(
    world: World, arrive: Callable[..., Presence], monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    parameters = connection.get_connection_params()
    pgbouncer = PgBouncer(parameters, size=2)
    settings.LONGHAUL = {"DIRECT_DATABASE": "pooled"}
    try:
        pgbouncer.start()
        pooled = connection.settings_dict | {"HOST": str(pgbouncer.folder), "PORT": str(PORT)}
        monkeypatch.setitem(connections.settings, "pooled", pooled)
        assert presence.has_session(connection.connection)
        made = [presence.connect("a test") for _ in range(3)]
        assert [each.sessions for each in made] == [False, False, False]
        present = arrive()
        for _ in range(20):  # more than psycopg runs a statement before it prepares it
            present.tick()
        assert row(present).lock_key is None
        assert session(present).execute("SHOW lock_timeout").fetchone() == ("0",)
        settings.LONGHAUL = {"DIRECT_DATABASE": "pooled", "SESSION_LOCKS": True}  # as of a pooler of whole sessions
        made.append(presence.connect("a test"))
        assert made[-1].sessions
        settings.LONGHAUL = {}
        made.append(presence.connect("a test"))
        assert made[-1].sessions
        for each in made:
            each.close()
        present.end()
    finally:
        pgbouncer.end()
        if "pooled" in connections:
            connections["pooled"].close()
            del connections["pooled"]


def test_a_life_without_a_session_has_no_lock_and_beats(
    world: World, arrive: Callable[..., Presence], no_sessions: Callable[..., None]
) -> None:
    present = arrive()
    assert (row(present).lock_key, present.life.lock_key) == (None, None)
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = %s"
    assert world.db.one(query, session(present).info.backend_pid) == 0
    assert world.db.one("SELECT longhaul_worker_present(%s, longhaul_now())", present.id)
    before = present.life
    bury(before.id, world)
    present.tick()
    present.tick()
    assert present.id != before.id
    assert row(present).lock_key is None


def test_that_there_is_no_lock_is_not_that_it_is_free(
    world: World, arrive: Callable[..., Presence], no_sessions: Callable[..., None]
) -> None:
    """Neither to the watcher, whose own connection is a session, nor to who got its message a second time."""
    present = arrive()
    assert world.db.one("SELECT longhaul_worker_locked(%s)", present.id) is None
    run, call = claimed(world, present), called(world, present, idempotent=True)
    admission.take_from_absent(run.run)
    assert lifecycle.take_from_absent(call) is None
    assert (world.run(run.run)["holder"], world.tool_call(call)["holder"]) == (present.id, present.id)
    assert world.db.one("SELECT longhaul_worker_locked(%s)", new_id()) is False


def test_a_life_without_a_lock_is_dead_by_time_alone(
    world: World, arrive: Callable[..., Presence], no_sessions: Callable[..., None], watched: Watched
) -> None:
    watcher, watch = watched
    present = arrive()
    no_sessions(False)
    world.ahead(600 * SECOND)
    watch(12)
    assert watcher.dead() == {}
    watch(2)
    assert watcher.dead() == {present.id: True}
    for _ in range(2):
        present.tick()
    assert watcher.dead() == {}


def test_a_life_that_came_back_by_the_pooler_between_two_looks_is_not_dead(
    world: World, arrive: Callable[..., Presence], settings: Any, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock was seen held, and then free; now it has none."""
    watcher, _ = watched
    present = arrive()
    watcher.dead()
    cut(present, world)
    with pytest.raises(psycopg.Error):
        present.tick()
    settings.LONGHAUL = {"SESSION_LOCKS": False}
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: present.tick())
    monkeypatch.setattr(sweep, "time", clock)
    assert watcher.dead() == {}
    assert row(present).lock_key is None


def test_a_watcher_without_a_session_knows_time_alone(
    world: World, arrive: Callable[..., Presence], settings: Any, watched: Watched
) -> None:
    """Postgres may have lost all locks behind the pooler's back."""
    watcher, watch = watched
    present = arrive()
    settings.LONGHAUL = {"SESSION_LOCKS": False}
    watcher.dead()
    cut(present, world)
    assert watcher.dead() == {}
    world.ahead(13 * SECOND)
    watch(13)
    assert watcher.dead() == {present.id: True}
