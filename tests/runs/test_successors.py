"""Runs that follow another one: resume, retry and fork are new runs, and what they are shown is what they should be."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User

from runs.agents import Agent
from runs.exceptions import BadInput, NotLast, NothingToDo, ThreadBusy
from runs.models import Run
from runs.providers.port import ProviderError
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from tests.runs.scenes import Cast, Together, asked, payloads, refused, rows, texts
from threads.models import Message, Thread
from tools import tool

pytestmark = pytest.mark.django_db


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture
def agent(cast: Cast) -> Agent:
    return cast(tools=[add], instructions="Be kind.")


def statuses(run: Run) -> list[tuple[str, str]]:
    return list(run.thread.messages.order_by("position").values_list("role", "status"))


# --- retry


def test_a_retry_asks_for_the_last_answer_of_a_completed_run_again(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("add", a=1, b=2), "three", "four")
    run = run_to_end(agent.start("1 + 2?", metadata={"k": 1}, priority=3, limits={"max_steps": 9}))
    again = run.retry()
    assert (again.parent, again.origin, again.thread, again.status) == (run, "retry", run.thread, "queued")
    assert (again.metadata, again.priority, again.overrides) == ({"k": 1}, 3, {"limits": {"max_steps": 9}})
    answer = Message.objects.get(run_id=run.pk, role="assistant", step=2)
    assert answer.status == "superseded"
    assert payloads(again, "run.queued") == [{"reason": "start", "superseded": str(answer.pk)}]
    run_to_end(again)
    assert texts(scripted_model.requests[2]) == ["1 + 2?", "calls 1", "-> 3"]
    run.refresh_from_db()
    assert (run.output, again.output) == ("three", "four")
    # What the first run was shown can be told as ever, and later runs see the new answer only.
    assert [message.role for message in run.step_set.get(number=2).shown()] == ["user", "assistant", "tool"]
    assert [message.text for message in again.step_set.get().shown()] == ["1 + 2?", "", ""]
    scripted_model.say("bye")
    run_to_end(agent.start("next", thread=run.thread))
    assert texts(scripted_model.requests[3]) == ["1 + 2?", "calls 1", "-> 3", "four", "next"]
    assert_invariants()
