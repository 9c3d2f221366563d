"""A compacted log says what it said: every seq once, every character once, whoever reads it from wherever."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import orjson
import pytest
from django.core.management import call_command
from django.db import transaction
from django.test import Client, override_settings
from django.urls import reverse

from runs import Agent, compaction, housekeeping
from runs.compaction import Compaction
from runs.housekeeping import Removed, keep_house
from runs.models import Event, Run
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from runs.replay import replay
from runs.verification import verify
from tests.http.conftest import Api
from tests.http.conftest import api as api
from tests.http.conftest import api_of as api_of
from tests.runs.invariant_cases import look_up
from tests.runs.scenes import Cast, Together
from tests.streams.truth import Truth, from_read, from_stream
from threads.clock import now

pytestmark = pytest.mark.django_db

DAY = timedelta(days=1)
DELTAS = ("text.delta", "reasoning.delta", "tool_call.arguments_delta")
ODD = 'aé\u0301\U0001f469\u200d\U0001f680漢\n"\\\U0010ffff\u0001'


def pieces_of(text: str, chance: random.Random) -> list[str]:
    """Cut a text as a service may: some pieces are empty, some cut a character that people see as one."""
    cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randint(3, len(text) + 2)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def streamed(run: Run, cut: Callable[[str], list[str]]) -> Run:
    """Tell the log of an ended run as if each delta had come in many pieces."""
    rows: list[Event] = []
    ordinals: dict[UUID | None, int] = {}
    for row in run.event_set.order_by("seq"):
        row.pk = None
        for text in cut(row.payload["text"]) if row.type in DELTAS else [None]:
            again = Event(
                run=run, seq=len(rows) + 1, type=row.type, at=row.at, epoch=row.epoch, payload={**row.payload}
            )
            again.message_id = row.message_id
            if text is not None:
                again.payload["text"] = text
                again.ordinal = ordinals[row.message_id] = ordinals.get(row.message_id, 0) + 1
            rows.append(again)
    run.event_set.all().delete()
    Event.objects.bulk_create(rows)
    Run.objects.filter(pk=run.pk).update(last_seq=len(rows))
    run.refresh_from_db()
    return run


def long_ago(run: Run, days: float = 31) -> Run:
    Run.objects.filter(pk=run.pk).update(finished_at=now() - days * DAY)
    return run


@pytest.fixture
def clerk(cast: Cast) -> Agent:
    return cast(name="clerk", tools=[look_up])


@pytest.fixture
def run(clerk: Agent, scripted_model: ScriptedModel) -> Run:
    """A run that spoke, thought and called in many odd pieces, and ended 31 days ago."""
    from runs.providers.port import ReasoningDelta

    chance = random.Random(7)
    scripted_model.say(
        [ReasoningDelta("Which one? " + ODD), "I look. ", ReasoningDelta("Hm."), ODD, call("look_up", number=1), call("look_up", number=2)],
        ODD * 2,
    )  # fmt: skip
    made = run_to_end(clerk.start("Where is order 1?"))
    return long_ago(streamed(made, lambda text: pieces_of(text, chance)))


def test_a_fold_of_the_log_is_the_same_before_and_after(run: Run) -> None:
    before, rows = replay(event.as_dict() for event in run.events()), run.event_set.count()
    assert verify(run).differences == []
    assert_invariants()

    done = keep_house()

    run.refresh_from_db()
    after = replay(event.as_dict() for event in run.events())
    assert (done.compacted, run.event_set.count() < rows / 3, run.compacted_at is not None) == (1, True, True)
    assert (after.messages, after.calls, after.usage, after.legs, after.output, after.seq, after.faults) == (
        before.messages, before.calls, before.usage, before.legs, before.output, before.seq, [],
    )  # fmt: skip
    assert {event.type for event in run.events() if "from_seq" in event.payload} == set(DELTAS)
    assert verify(run).differences == []
    assert_invariants()
    assert keep_house() == housekeeping.due() == Removed()


def test_every_cursor_gets_what_follows_it(run: Run, api: Api) -> None:
    Run.objects.filter(pk=run.pk).update(owner=api.user)
    truth = Truth.of(run.pk)
    assert keep_house().compacted == 1

    for after in range(0, run.last_seq, 11):
        for most in (1000, 2):
            assert truth.holds(from_read(run.pk, after, most), after) == run.last_seq
    for after in range(3, run.last_seq, 29):
        page = api.get(f"/api/runs/{run.pk}/events?after={after}&limit=3")["results"]
        assert truth.holds(page, after) == page[-1]["seq"]
        assert not any("pieces" in event for event in page)


def test_the_admin_shows_an_event_as_readers_get_it(run: Run, admin_client: Client) -> None:
    keep_house()
    event = run.event_set.filter(payload__has_key="pieces").first()
    assert event is not None
    page = admin_client.get(reverse("admin:longhaul_runs_event_change", args=[event.pk])).content.decode()
    assert "from_seq" in page
    assert "pieces" not in page


@pytest.mark.django_db(transaction=True)
def test_streams_get_the_same(run: Run) -> None:
    truth = Truth.of(run.pk)
    keep_house()

    for after in range(0, run.last_seq, 23):
        for most, live in ((1000, False), (2, False), (1000, True)):
            got = from_stream(run.pk, after, most, live=live)
            assert truth.holds(got, after) == run.last_seq
            assert got == from_read(run.pk, after, 1000)


# --- when, and how much ---------------------------------------------------------------------------------------------


def rows_of(run: Run) -> list[Any]:
    return list(run.event_set.order_by("seq").values_list("pk", "seq", "payload"))


def test_a_log_is_compacted_so_long_after_its_runs_end(run: Run, clerk: Agent) -> None:
    live = clerk.start("And order 2?")
    for seq in range(live.last_seq + 1, live.last_seq + 9):
        Event.objects.create(run=live, seq=seq, type="text.delta", at=now(), payload={"message": "m", "text": "a"})
    Run.objects.filter(pk=live.pk).update(created_at=now() - 100 * DAY, last_seq=live.last_seq + 8)
    before, at_work = rows_of(run), rows_of(live)

    for setting in (None, 32):
        with override_settings(LONGHAUL={"COMPACT_AFTER_DAYS": setting}):
            assert keep_house() == housekeeping.due() == Removed()
    assert rows_of(run) == before

    assert housekeeping.due() == Removed(compacted=1)
    done = keep_house()
    left = rows_of(run)
    folded = [int(payload["from_seq"]) for _, _, payload in left if "from_seq" in payload]
    assert done == Removed(compacted=1, deltas=len(before) - len(left) + len(folded))
    assert rows_of(live) == at_work


def test_by_hand_it_says_what_it_did(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    call_command("keep_house", "--dry-run")
    assert capsys.readouterr().out == "Due to be compacted: 1 logs of runs.\n"
    call_command("keep_house")
    assert re.fullmatch(r"Compacted: 1 logs of runs, \d+ deltas folded\.\n", capsys.readouterr().out)
    call_command("keep_house", "--json")
    said = orjson.loads(capsys.readouterr().out)
    assert (said["compacted"], said["deltas"]) == (0, 0)


def test_a_folded_event_is_bounded_and_what_is_large_stays(
    clerk: Agent, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_model.say("é" * 1000 + "x" * 300 + "é" * 500)
    made = run_to_end(clerk.start("Speak."))
    run = long_ago(streamed(made, lambda text: [*text[:1000], text[1000:1300], *text[1300:], *[""] * 400]))
    truth = Truth.of(run.pk)
    monkeypatch.setattr(compaction, "MOST_BYTES", 256)
    monkeypatch.setattr(compaction, "MOST_PIECES", 150)

    keep_house()

    deltas = [event for event in run.events() if event.type == "text.delta"]
    assert max(event.seq - event.payload.get("from_seq", event.seq) + 1 for event in deltas) == 150
    assert sorted(len(event.payload["text"].encode()) for event in deltas)[-2:] == [256, 300]
    assert len(deltas) < 25
    assert truth.holds(from_read(run.pk, 0, 1000), 0) == run.last_seq
    assert verify(run).differences == []
    assert_invariants()


def test_a_long_log_goes_in_batches_each_right_by_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = Truth.of(run.pk)
    at_once = Compaction(now())
    with transaction.atomic():
        at_once.batch()
        whole = [seq for _, seq, _ in rows_of(run)]
        transaction.set_rollback(True)
    monkeypatch.setattr(compaction, "BATCH", 20)
    monkeypatch.setattr(compaction, "MOST_PIECES", 10)
    deltas = []

    doing = Compaction(now())
    while (batch := doing.batch()) is not None:
        deltas.append(batch.folded)
        run.refresh_from_db()
        assert (run.compacted_at is not None) == batch.done
        assert truth.holds(from_read(run.pk, 0, 1000), 0) == run.last_seq
        assert_invariants()
        if len(deltas) == 2:
            doing = Compaction(now())  # killed here, the next one begins with what is there

    assert len(deltas) > 3
    assert len(rows_of(run)) < len(whole) + run.last_seq / 5


@pytest.mark.django_db(transaction=True)
def test_beside_another_one_and_beside_who_deletes_the_thread_it_waits_for_nobody(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beside() -> Any:
        [answer] = Together(lambda: Compaction(now()).batch()).join()
        return answer

    before, fold = rows_of(run), compaction.fold

    def dies(*given: Any) -> Any:
        patched.undo()
        assert beside() is None  # the run is held
        assert fold(*given)[0] > 0
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(compaction, "fold", dies)
        with pytest.raises(ZeroDivisionError):
            Compaction(now()).batch()
    assert rows_of(run) == before
    with transaction.atomic():
        Event.objects.filter(run=run).delete()  # as one does who deletes the thread, before he comes to the run
        assert beside() is None
        transaction.set_rollback(True)
    assert keep_house().compacted == 1


def test_what_is_removed_later_goes_as_a_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = Truth.of(run.pk)
    keep_house()
    monkeypatch.setattr(housekeeping, "REMOVED_AT_ONCE", 3)
    marks = set()

    while run.events_removed_through < run.last_seq - 1:
        with transaction.atomic():
            through, _ = housekeeping._shorten(run.pk, run.last_seq, run.events_removed_through)
        run.refresh_from_db()
        marks.add(through)
        for after in (0, through - 1, through, through + 1):
            assert truth.holds(from_read(run.pk, after, 1000), after, removed=through) == run.last_seq
        assert_invariants()
    assert len(marks) > 3


def test_a_run_whose_log_was_removed_is_passed_over(run: Run) -> None:
    with override_settings(LONGHAUL={"EVENT_RETENTION_DAYS": 30}):
        assert keep_house() == Removed(logs=1, events=run.last_seq - 1, compacted=1)
