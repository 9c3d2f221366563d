"""Readers over a log that is written, compacted and shortened at any moment: each gets every seq once, and its own text."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from django.contrib.auth.models import User
from django.db import transaction
from django.test import Client
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from runs import compaction, events, housekeeping
from runs.compaction import Compaction
from runs.models import Event, Run, Status, StopReason
from runs.streams.log import Log
from tests.streams.folding import folded
from tests.streams.truth import Truth, frames_of, history, tail
from threads.authentication import create_key
from threads.clock import now
from threads.ids import new_id
from threads.models import Thread

DELTAS = ("text.delta", "reasoning.delta", "tool_call.arguments_delta")
# With combining marks, astral characters, what JSON escapes, and nothing at all.
TEXTS = st.text(st.sampled_from('ab é\u0301\U0001f469\u200d\U0001f680漢\n"\\\U0010ffff\u0001'), max_size=6)
WAYS = ("read", "page", "tail", "http")
numbers = itertools.count()
seen: Counter[tuple[str, str]] = Counter()  # from where readers read


class Reader:
    """Somebody who has read up to `at`, from `begin` on."""

    def __init__(self, at: int, way: str) -> None:
        self.begin = self.at = at
        self.way = way
        self.got: list[dict[str, Any]] = []


class Life(RuleBasedStateMachine):
    """One run. Whoever writes, keeps house or reads does one transaction or one look at a time, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.truth = Truth()
        owner = User.objects.create_user(f"reader {next(numbers)}")
        self.key = create_key(owner)[1]
        self.client = Client()
        self.run_row = Run.objects.create(thread=Thread.objects.create(owner=owner), owner=owner, agent="x")
        self.readers: list[Reader] = []
        self.message = ""
        self.call: UUID = new_id()
        self.over = False
        self.removed = 0
        self.housekeepers = [Compaction(now()), Compaction(now())]
        self.loop = asyncio.Runner()
        self.log = Log("test")

    # --- the writer -------------------------------------------------------------------------------------------------

    def write(self, events: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> None:
        rows = [
            Event(run=self.run_row, seq=self.truth.add(type, payload), type=type, at=now(), payload=payload, **more)
            for type, payload, more in events
        ]
        with transaction.atomic():
            Event.objects.bulk_create(rows)
            Run.objects.filter(pk=self.run_row.pk).update(last_seq=rows[-1].seq)

    @initialize(said=st.lists(st.tuples(st.sampled_from(DELTAS), st.lists(TEXTS, min_size=3, max_size=12)), min_size=1, max_size=4),
                over=st.booleans())  # fmt: skip
    def lives(self, said: list[tuple[str, list[str]]], over: bool) -> None:
        """Begin with a run that has said something: there is much to do to it at once."""
        self.begins()
        for kind, texts in said:
            self.speaks(kind, texts, other=False)
        if over:
            self.ends()

    @precondition(lambda self: not self.over and not self.message)
    @rule()
    def begins(self) -> None:
        self.message = str(new_id())
        self.write([("message.created", {"message": self.message, "role": "assistant", "step": 1}, {})])

    @precondition(lambda self: not self.over and self.message)
    @rule(kind=st.sampled_from(DELTAS), texts=st.lists(TEXTS, min_size=1, max_size=12), other=st.booleans())
    def speaks(self, kind: str, texts: list[str], other: bool) -> None:
        if other:
            self.call = new_id()
        call = {"tool_call": str(self.call), "name": "f"} if kind == DELTAS[2] else {}
        more = {"epoch": 1, "message_id": self.message}
        self.write([(kind, {"message": self.message, "text": text, **call}, more) for text in texts])

    @precondition(lambda self: not self.over)
    @rule()
    def emits(self) -> None:
        self.write([("data", {"data": {"text": "of a tool", "n": len(self.truth.events)}}, {})])

    @precondition(lambda self: not self.over and self.message)
    @rule(discards=st.booleans())
    def ends_message(self, discards: bool) -> None:
        if discards:
            self.write([("message.discarded", {"message": self.message, "role": "assistant", "reason": "lost"}, {})])
        else:
            said = folded(self.truth.events)[self.message]["content"]
            told = {"message": self.message, "role": "assistant", "step": 1, "content": said}
            self.write([("message.completed", told, {})])
        self.message = ""

    @precondition(lambda self: not self.over)
    @rule()
    def ends(self) -> None:
        if self.message:
            self.ends_message(discards=False)
        self.write([("run.completed", {"stop_reason": "end_turn", "output": "", "usage": {}, "error": None}, {})])
        ended = {
            "status": Status.COMPLETED,
            "stop_reason": StopReason.END_TURN,
            "finished_at": now() - timedelta(days=1),
        }
        Run.objects.filter(pk=self.run_row.pk).update(**ended)
        self.over = True

    # --- the housekeepers -------------------------------------------------------------------------------------------

    @rule(who=st.integers(0, 1))
    def compacts(self, who: int) -> None:
        rows = Event.objects.filter(run=self.run_row)
        before = list(rows.order_by("seq").values_list("seq", "payload"))
        done = self.housekeepers[who].batch()
        if not self.over:
            assert done is None
            assert list(rows.order_by("seq").values_list("seq", "payload")) == before

    @precondition(lambda self: self.over)
    @rule()
    def is_killed(self) -> None:
        """A housekeeper dies before its commit, and another one begins."""
        try:
            with transaction.atomic():
                Compaction(now()).batch()
                raise ZeroDivisionError
        except ZeroDivisionError:
            self.housekeepers[0] = Compaction(now())

    @precondition(lambda self: self.over)
    @rule(many=st.integers(1, 4))
    def removes(self, many: int) -> None:
        with pytest.MonkeyPatch.context() as patched, transaction.atomic():
            patched.setattr(housekeeping, "REMOVED_AT_ONCE", many)
            run = Run.objects.select_for_update(no_key=True).get(pk=self.run_row.pk)
            self.removed, _ = housekeeping._shorten(run.pk, run.last_seq, run.events_removed_through)

    # --- the readers ------------------------------------------------------------------------------------------------

    @rule(data=st.data(), way=st.sampled_from(WAYS))
    def comes(self, data: st.DataObject, way: str) -> None:
        self.readers.append(Reader(data.draw(st.integers(0, len(self.truth.events))), way))

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), most=st.sampled_from([1, 2, 5, 1000]))
    def reads(self, data: st.DataObject, most: int) -> None:
        self.look(data.draw(st.sampled_from(self.readers)), most)

    def look(self, reader: Reader, most: int) -> None:
        run, at = self.run_row.pk, reader.at
        match reader.way:
            case "read":
                got = [event.as_dict() for event in events.read(run, at, most)]
            case "http":
                path = f"/api/runs/{run}/events?after={at}&limit={most}"
                got = self.client.get(path, headers={"Authorization": f"Bearer {self.key}"}).json()["results"]
            case way:
                asked = tail(self.log, run, at) if way == "tail" else history(self.log, run, at, most)
                body, last = self.loop.run(asked)
                got = frames_of(body)
                assert last == max([at, *(event.get("seq") or event["to"] for event in got)])
        within = Event.objects.filter(run=run, payload__from_seq__lte=at, seq__gt=at).exists()
        seen[reader.way, "within a range" if within else "elsewhere"] += 1
        reader.at = self.truth.holds(got, at, removed=self.removed)
        reader.got += got

    def teardown(self) -> None:
        try:
            if not self.over:
                self.ends()
            last = len(self.truth.events)
            # Whoever is there, and some more in the midst of it all, while the rest is compacted.
            self.housekeepers[0].batch()
            self.readers += [Reader(at, way) for at, way in zip(range(0, last, 5), itertools.cycle(WAYS), strict=False)]
            while reading := [reader for reader in self.readers if reader.at < last]:
                for reader in reading:
                    before = reader.at
                    self.look(reader, 7)
                    assert reader.at > before
                self.housekeepers[0].batch()
            for reader in self.readers:
                assert self.truth.holds(reader.got, reader.begin, removed=self.removed) == last
                if not any(event["type"] == "resume_gap" for event in reader.got) and not reader.begin:
                    assert folded(reader.got) == folded(self.truth.events)
        finally:
            self.loop.run(self.log.close())
            self.loop.close()
            Event.objects.filter(run=self.run_row).delete()
            Run.objects.filter(pk=self.run_row.pk).delete()


def told(monkeypatch: pytest.MonkeyPatch, examples: int, steps: int) -> None:
    for name, value in (("BATCH", 7), ("MOST_PIECES", 4), ("MOST_BYTES", 24)):
        monkeypatch.setattr(compaction, name, value)
    seen.clear()
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.django_db(transaction=True)
def test_whatever_is_done_to_a_log_its_readers_get_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, 5, 15)


@pytest.mark.proof
@pytest.mark.timeout(1800)
@pytest.mark.django_db(transaction=True)
def test_whatever_is_done_to_a_log_its_readers_get_it_once_over_many_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, 300, 60)
    assert min(seen[way, "within a range"] for way in WAYS) >= 20
