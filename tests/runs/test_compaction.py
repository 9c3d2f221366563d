"""A compacted log says what it said: every seq once, every character once, whoever reads it from wherever."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from uuid import UUID

import pytest

from runs import Agent, housekeeping
from runs.housekeeping import Removed, keep_house
from runs.models import Event, Run
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from runs.replay import replay
from runs.verification import verify
from tests.http.conftest import Api
from tests.http.conftest import api as api
from tests.http.conftest import api_of as api_of
from tests.runs.invariant_cases import look_up
from tests.runs.scenes import Cast
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

    for after in range(run.last_seq):
        for most in (1000, 2):
            assert truth.holds(from_read(run.pk, after, most), after) == run.last_seq
    for after in range(0, run.last_seq, 17):
        page = api.get(f"/api/runs/{run.pk}/events?after={after}&limit=3")["results"]
        assert truth.holds(page, after) == page[-1]["seq"]
        assert not any("pieces" in event for event in page)


@pytest.mark.django_db(transaction=True)
def test_streams_get_the_same(run: Run) -> None:
    truth = Truth.of(run.pk)
    keep_house()

    for after in range(0, run.last_seq, 11):
        for most, live in ((1000, False), (2, False), (1000, True)):
            got = from_stream(run.pk, after, most, live=live)
            assert truth.holds(got, after) == run.last_seq
            assert got == from_read(run.pk, after, 1000)
