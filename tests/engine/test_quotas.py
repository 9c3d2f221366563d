"""A leg and the limits of its model: it asks for leave, keeps to it, and tells all others what its service says."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from runs import agents, engine, explain, quotas
from runs.agents import Agent
from runs.models import Leave, Run
from runs.providers.port import ModelEvent, ModelRequest, ProviderError, Rate, RatesReported, TextDelta, UsageReported
from runs.pytest_longhaul import ScriptedModel, assert_invariants, run_to_end
from runs.testing.inline_worker import move_clock, working
from tests.runs.scenes import agents_process, speaking
from tools.models import Pause, RateUse

pytestmark = pytest.mark.django_db

KEY = "model:scripted:x"


@pytest.fixture(autouse=True)
def nothing_heard() -> Iterator[None]:
    yield
    quotas.forget()


def clerk(**options: Any) -> Agent:
    return agents.registry.add(Agent(name="clerk", **{"model": "scripted:x", **options}))


def limit(settings: Any, **limits: int) -> None:
    settings.LONGHAUL = {"MODEL_LIMITS": {"scripted:x": limits}}


def leg(run: Run, process: engine.Process) -> Run:
    run.refresh_from_db()
    engine.advance(run.pk, run.dispatch_seq, process)
    run.refresh_from_db()
    return run


def reasons(run: Run) -> list[str]:
    return [event.payload["reason"] for event in run.events() if event.type == "run.queued"]


# --- what bounds a model


def test_the_name_comes_first_then_the_longest_pattern(settings: Any) -> None:
    settings.LONGHAUL = {
        "MODEL_LIMITS": {
            "openai:*": {"max_concurrency": 9},
            "openai:gpt-5*": {"requests_per_minute": 8},
            "openai:gpt-5-mini": {"tokens_per_minute": 7},
        }
    }
    assert quotas.quota("openai:gpt-5-mini").limits == {"tokens": 7}
    assert quotas.quota("openai:gpt-5-nano").limits == {"requests": 8}
    assert quotas.quota("openai:o3").limits == {"concurrency": 9}
    assert quotas.quota("scripted:x").limits is None
    assert len("tokens:" + quotas.quota("openai:" + "x" * 500).key) <= 300


def test_what_cannot_be_read_bounds_nothing(settings: Any) -> None:
    limit(settings, requests_per_minute=0, requests=3)
    assert quotas.quota("scripted:x").limits is None


# --- refused


def test_a_leg_that_is_refused_asks_nothing_and_its_run_is_asked_later(
    scripted_model: ScriptedModel, settings: Any
) -> None:
    limit(settings, requests_per_minute=1)
    scripted_model.say("one", "two")
    first, second = clerk().start("first"), clerk().start("second")
    with working() as present:
        process = engine.Process(present)
        leg(first, process)
        leg(second, process)
    assert (len(scripted_model.requests), second.status, reasons(second)) == (1, "queued", ["start", "limited"])
    why = explain.why(second)
    assert why.startswith("waits for scripted:x: 1 requests a minute are used, next in 62 s"), why
    run_to_end(second)
    assert (second.output, second.model_tries, second.lost) == ("two", 0, 0)
    assert_invariants(second)


def test_tokens_are_corrected_by_what_is_reported(scripted_model: ScriptedModel, settings: Any) -> None:
    limit(settings, tokens_per_minute=10_000, requests_per_minute=9)
    scripted_model.say([UsageReported(70, 7), "Said."])
    run_to_end(clerk().start("hello"))
    assert list(RateUse.objects.filter(key=f"tokens:{KEY}").values_list("amount", flat=True)) == [77]
    assert RateUse.objects.filter(key=KEY).count() == 1
    assert not Leave.objects.exists()


def test_a_bound_of_the_answer_is_what_is_reserved() -> None:
    quota = quotas.Quota("scripted:x", {"tokens": 9})
    assert '"answer":500' in quota.ask(0, {})
    assert '"answer":20' in quota.ask(0, {"max_completion_tokens": 20})


def test_a_leg_that_stood_still_does_not_use_its_leave(
    scripted_model: ScriptedModel, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(settings, requests_per_minute=5)
    run = clerk().start("hello")
    with working() as present, monkeypatch.context() as late:
        late.setattr(quotas, "SEND_WITHIN", timedelta(seconds=-1))  # as if so much time had passed
        leg(run, engine.Process(present))
    assert (scripted_model.requests, run.status, run.pending_message_id) == ([], "queued", None)
    assert reasons(run) == ["start", "limited"]
    scripted_model.say("Said.")
    assert run_to_end(run).output == "Said."


# --- what services say


@pytest.mark.parametrize("code", ["rate_limited", "overloaded"])
def test_a_wait_that_is_asked_of_one_run_holds_for_all(scripted_model: ScriptedModel, code: Any) -> None:
    scripted_model.say(ProviderError(code, "slow down", retry_after=timedelta(seconds=90)), "one", "two")
    first, second = clerk().start("first"), clerk().start("second")
    with working() as present:
        process = engine.Process(present)
        leg(first, process)
        leg(second, process)
        assert len(scripted_model.requests) == 1
        assert (reasons(first), reasons(second)) == (["start", "retry"], ["start", "limited"])
        [pause] = Pause.objects.all()
        assert (pause.key, pause.reason) == (KEY, code)
        assert explain.why(second).startswith("waits for scripted:x: its service is left alone for 90 s more"), second
        move_clock(timedelta(seconds=91))
        assert quotas.release() == 2
        present.beat()
        leg(first, process)
        leg(second, process)
    assert (first.output, second.output) == ("one", "two")
    assert (first.legs, second.legs) == (2, 2)


def test_a_failure_that_asks_for_no_wait_holds_nobody_up(scripted_model: ScriptedModel) -> None:
    scripted_model.say(ProviderError("rate_limited", "slow down"), ProviderError("server", "broken"), "done")
    run_to_end(clerk().start("first"))
    assert not Pause.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_an_answer_that_says_that_nothing_is_left_holds_up_who_comes_next(settings: Any) -> None:
    limit(settings, requests_per_minute=500)

    def script(request: ModelRequest) -> Iterator[ModelEvent]:
        yield RatesReported(Rate(60, 0, timedelta(seconds=60)), Rate(1000, 900, timedelta(seconds=6)))
        yield TextDelta("Said.")

    with speaking(script), agents_process(flushes=False) as process:
        run, late = clerk().start("hello"), clerk().start("hello")
        assert leg(run, process).output == "Said.", "its own answer is none the worse"
        assert Pause.objects.get().reason == "nothing is left"
        assert reasons(leg(late, process)) == ["start", "limited"]
    assert quotas.quota("scripted:x").limits == {"requests": 60}, "lowered to what the service says"
    quotas.hear("scripted:x", RatesReported(Rate(500, 499, timedelta(milliseconds=120))))
    assert quotas.quota("scripted:x").limits == {"requests": 60}
    late.cancel()
