"""What a tool says of its time: how far it is, that its worker leaves; and what is kept of each try."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from django.contrib.auth.models import Group
from django.db import connection, transaction

from runs import occupant
from runs.pytest_longhaul import ScriptedModel, assert_invariants
from runs.verification import verify
from tests.engine.tool_runs import attempts, only_call, told, took
from tests.runs.scenes import payloads
from tools import RetryPolicy, ToolContext, ToolFailed, WorkerLeaving, tool
from tools.models import ToolCall

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize("atomic", [False, True])
def test_how_far_a_call_is_stands_in_its_row_and_in_the_log(scripted_model: ScriptedModel, atomic: bool) -> None:
    @tool(atomic=atomic)
    def work(ctx: ToolContext) -> None:
        """Work."""
        ctx.progress(0.25, "a quarter")
        ctx.progress(1.0, "all of it")

    run = took(scripted_model, work)
    kept = only_call(run).progress
    assert kept is not None
    assert (kept["fraction"], kept["note"], kept["attempt"], kept["at"][-1]) == (1.0, "all of it", 1, "Z")
    assert [each["note"] for each in payloads(run, "tool_call.progress")] == ["a quarter", "all of it"]
    assert verify(run).differences == []
    assert_invariants(run)


@pytest.mark.parametrize("options", [{}, {"idempotent": True}, {"atomic": True}])
def test_a_tool_whose_worker_leaves_begins_again_and_loses_no_attempt(
    scripted_model: ScriptedModel, options: dict[str, Any]
) -> None:
    begun = []

    @tool(retry=RetryPolicy(attempts=1), **options)
    def work() -> str:
        """Work."""
        begun.append(1)
        if len(begun) < 4:
            raise WorkerLeaving
        return "done"

    run = took(scripted_model, work)
    assert attempts(only_call(run)) == [*["given_back"] * 3, "success"]
    assert verify(run).differences == []
    assert_invariants(run)


def test_an_attempt_that_was_given_back_is_none_of_those_that_the_policy_grants(scripted_model: ScriptedModel) -> None:
    begun = []

    @tool(retry=RetryPolicy(attempts=2, initial_seconds=0))
    def work() -> str:
        """Work."""
        begun.append(1)
        if len(begun) < 3:
            raise WorkerLeaving
        if len(begun) == 3:
            raise ConnectionError
        return "done"

    run = took(scripted_model, work)
    assert attempts(only_call(run)) == ["given_back", "given_back", "retrying", "success"]


def test_what_gave_itself_back_may_have_had_an_effect(scripted_model: ScriptedModel) -> None:
    @tool
    def work(ctx: ToolContext) -> None:
        """Work."""
        if ctx.attempt == 1:
            raise WorkerLeaving

    run = took(scripted_model, work)
    made = only_call(run)
    # As when the run was rolled back before the second attempt.
    made.attempts.filter(number=2).delete()
    ToolCall.objects.filter(pk=made.pk).update(outcome="cancelled")
    assert [each["effect"] for each in occupant.effects(run)] == ["possible"]


def test_given_back_or_not_a_call_is_tried_as_often_as_its_policy_says(scripted_model: ScriptedModel) -> None:
    begun = []

    @tool(retry=RetryPolicy(attempts=2, initial_seconds=0))
    def work() -> str:
        """Work."""
        begun.append(1)
        raise WorkerLeaving if len(begun) == 1 else ConnectionError

    run = took(scripted_model, work)
    assert attempts(only_call(run)) == ["given_back", "retrying", "failed"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("atomic", [False, True])
def test_code_that_is_broken_off_on_its_way_out_of_a_transaction_is_settled_all_the_same(
    scripted_model: ScriptedModel, atomic: bool
) -> None:
    @tool(atomic=atomic)
    def work() -> None:
        """Work."""
        # What a signal leaves that comes when Django has not yet begun to end the block.
        transaction.atomic().__enter__()
        Group.objects.create(name="left open")
        raise SoftTimeLimitExceeded

    made = only_call(took(scripted_model, work))
    assert not connection.in_atomic_block
    connection.close()  # as Celery does after a task: what was not committed goes
    made.refresh_from_db()
    assert made.error is not None
    assert made.error["code"] == "timed_out"
    assert not Group.objects.exists()


def test_a_tool_that_must_not_start_twice_does_not_begin_again_on_its_own_word(scripted_model: ScriptedModel) -> None:
    @tool(idempotent=False)
    def once() -> None:
        """Work."""
        raise WorkerLeaving

    made = only_call(took(scripted_model, once))
    assert made.error is not None
    assert (attempts(made), made.error["code"]) == (["failed"], "worker_leaving")


def test_a_tool_that_must_not_start_twice_and_was_cut_says_that_nobody_knows(scripted_model: ScriptedModel) -> None:
    @tool(idempotent=False)
    def once() -> None:
        """Work."""
        raise SoftTimeLimitExceeded

    made = only_call(took(scripted_model, once))
    assert made.error is not None
    assert made.error["code"] == "timed_out"
    assert "Whether it has taken effect is not known." in made.error["message"]


@pytest.mark.parametrize("how", ["it ends", "it raises", "it returns"])
def test_an_async_tool_is_cancelled_at_its_time_and_is_not_tried_again(scripted_model: ScriptedModel, how: str) -> None:
    @tool(timeout_seconds=0.05)
    async def work() -> str:
        """Wait."""
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if how == "it raises":
                raise OSError("closing failed") from None
            if how == "it ends":
                raise
        return "as far as I came"

    made = only_call(took(scripted_model, work))
    if how == "it returns":
        assert (made.outcome, made.result) == ("success", "as far as I came")
    else:
        assert made.error == {"code": "timed_out", "message": "The tool did not finish in time."}
        assert attempts(made) == ["failed"]


def test_a_traceback_in_a_text_for_the_model_is_cut_to_its_last_line(scripted_model: ScriptedModel) -> None:
    trace = 'Traceback (most recent call last):\n  File "/srv/app/private.py", line 7, in pay\n    key = 1\nKeyError: 7'

    @tool
    def work() -> None:
        """Work."""
        raise ToolFailed(f"The bank said no.\n{trace}\n")

    run = took(scripted_model, work)
    [part] = told(run)
    assert part["error"]["message"] == "The bank said no.\nKeyError: 7"


def test_each_try_tells_when_where_why_and_when_the_next_may_begin(scripted_model: ScriptedModel) -> None:
    @tool(retry=RetryPolicy(attempts=2, initial_seconds=3, jitter=False))
    def work(ctx: ToolContext) -> None:
        """Work."""
        if ctx.attempt == 1:
            raise ConnectionError("postgres://root:hunter2@db")

    made = only_call(took(scripted_model, work))
    first, second = made.attempts.order_by("number")
    assert first.retry_at is not None
    assert first.ended_at is not None
    assert (first.retry_at - first.ended_at).total_seconds() == 3
    assert second.started_at >= first.retry_at
    assert second.retry_at is None
    assert first.worker == second.worker != ""
    assert first.error == {"code": "error", "message": "The tool failed with ConnectionError."}
