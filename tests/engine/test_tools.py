"""What a tool that runs, fails, is tried again or must not run does to its call and its run."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from django.contrib.auth.models import Group

from runs import agents
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from tests.engine.tool_runs import SECRET, attempts, calls_of, only_call, secret_got_out, told, took
from tests.runs.scenes import Together, payloads
from threads import clock
from tools import ApprovalRequired, ModelRetry, RetryPolicy, ToolContext, ToolFailed, tool

pytestmark = pytest.mark.django_db

AT_ONCE = RetryPolicy(attempts=3, initial_seconds=0)


# --- what a tool says, and what it does not


@pytest.mark.parametrize("kind", [ModelRetry, ToolFailed, ApprovalRequired])
@pytest.mark.parametrize("atomic", [False, True])
def test_what_a_tool_says_to_the_model_is_read_by_it_and_is_not_tried_again(
    scripted_model: ScriptedModel, kind: type[Exception], atomic: bool
) -> None:
    @tool(atomic=atomic, retry=AT_ONCE)
    def refuse() -> None:
        """Refuse."""
        Group.objects.create(name="half done")
        raise kind("No order 1042; did you mean 1024?")

    run = took(scripted_model, refuse)
    made = only_call(run)
    error = {"code": kind.code, "message": "No order 1042; did you mean 1024?"}  # type: ignore[attr-defined]
    assert (made.outcome, made.error, made.result, attempts(made)) == ("failed", error, None, ["failed"])
    assert [(part["outcome"], part["error"]) for part in told(run)] == [("failed", error)]
    assert "did you mean 1024?" in scripted_model.requests[1].messages[-1].decode()
    assert payloads(run, "tool_call.settled")[0]["error"] == error
    assert Group.objects.filter(name="half done").exists() is not atomic
    assert_invariants(run)


@pytest.mark.parametrize("atomic", [False, True])
def test_the_text_of_any_other_exception_is_kept_from_model_and_log(
    scripted_model: ScriptedModel, atomic: bool
) -> None:
    @tool(atomic=atomic, retry=AT_ONCE)
    def connect() -> None:
        """Connect."""
        try:
            raise OSError(SECRET)
        except OSError as error:
            raise ConnectionError(f"{SECRET} refused") from error

    run = took(scripted_model, connect)
    made = only_call(run)
    assert made.error == {"code": "error", "message": "The tool failed with ConnectionError."}
    assert attempts(made) == ["retrying", "retrying", "failed"]
    assert not secret_got_out(scripted_model, run)
    assert_invariants(run)


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize(
    ("text", "kept"), [("no file a\udcff", "no file a?"), ("a\0b", "a\ufffdb")], ids=["surrogate", "nul"]
)
def test_what_a_tool_says_is_told_though_it_is_no_clean_text(
    scripted_model: ScriptedModel, atomic: bool, text: str, kept: str
) -> None:
    @tool(atomic=atomic)
    def refuse() -> None:
        """Refuse."""
        raise ToolFailed(text)

    run = took(scripted_model, refuse)
    assert only_call(run).error == {"code": "tool_failed", "message": kept}
    assert_invariants(run)


# --- retries


def test_a_failing_tool_is_tried_again_at_its_time_until_it_works(scripted_model: ScriptedModel) -> None:
    moments = []

    @tool(retry=RetryPolicy(attempts=4, initial_seconds=10, factor=3, jitter=False))
    def flaky(ctx: ToolContext) -> int:
        """Work at the third attempt."""
        moments.append(clock.now())
        if ctx.attempt < 3:
            raise OSError
        return ctx.attempt

    run = took(scripted_model, flaky)
    made = only_call(run)
    assert (made.outcome, made.result, made.error, made.attempt) == ("success", 3, None, 3)
    assert attempts(made) == ["retrying", "retrying", "success"]
    retries = [(each["attempt"], each["delay_seconds"]) for each in payloads(run, "tool_call.retrying")]
    assert retries == [(2, 10), (3, 30)]
    for wait, earlier, later in zip((10, 30), moments, moments[1:], strict=False):
        assert timedelta(seconds=wait) <= later - earlier < timedelta(seconds=wait + 5)
    assert_invariants(run)


def test_the_attempts_are_limited(scripted_model: ScriptedModel) -> None:
    @tool(retry=RetryPolicy(attempts=2, initial_seconds=0))
    def broken() -> None:
        """Fail."""
        raise OSError

    run = took(scripted_model, broken)
    assert (only_call(run).max_attempts, attempts(only_call(run))) == (2, ["retrying", "failed"])
    assert [each["attempt"] for each in payloads(run, "tool_call.started")] == [1, 2]
    assert_invariants(run)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (RetryPolicy(initial_seconds=0, retry_on=(ConnectionError,)), ["retrying", "retrying", "failed"]),
        (RetryPolicy(initial_seconds=0, retry_on=(OSError,)), ["retrying", "retrying", "failed"]),
        (RetryPolicy(initial_seconds=0, retry_on=(KeyError,)), ["failed"]),
        (RetryPolicy(initial_seconds=0, give_up_on=(ConnectionError,)), ["failed"]),
    ],
    ids=["retry_on", "retry_on a parent", "retry_on another", "give_up_on"],
)
def test_the_policy_says_which_errors_are_tried_again(
    scripted_model: ScriptedModel, policy: RetryPolicy, expected: list[str]
) -> None:
    @tool(retry=policy)
    def connect() -> None:
        """Fail to connect."""
        raise ConnectionError

    run = took(scripted_model, connect)
    assert attempts(only_call(run)) == expected
    assert_invariants(run)


def test_the_wait_that_the_error_asks_for_is_kept(scripted_model: ScriptedModel) -> None:
    class Busy(Exception):
        retry_after = 40

    @tool(retry=RetryPolicy(attempts=2, initial_seconds=1))
    def ask(ctx: ToolContext) -> str:
        """Ask a busy service."""
        if ctx.attempt == 1:
            raise Busy
        return "answered"

    run = took(scripted_model, ask)
    assert [each["delay_seconds"] for each in payloads(run, "tool_call.retrying")] == [40]
    assert_invariants(run)


def test_what_starts_at_most_once_is_not_tried_again(scripted_model: ScriptedModel) -> None:
    @tool(idempotent=False)
    def send() -> None:
        """Send money."""
        raise OSError

    run = took(scripted_model, send)
    assert attempts(only_call(run)) == ["failed"]
    assert_invariants(run)


@pytest.mark.parametrize("atomic", [False, True])
def test_a_tool_that_was_cut_at_its_time_is_not_tried_again(scripted_model: ScriptedModel, atomic: bool) -> None:
    """A prefork worker raises this in the tool when its time is up."""

    @tool(atomic=atomic, retry=AT_ONCE)
    def slow() -> None:
        """Take too long."""
        Group.objects.create(name="half done")
        raise SoftTimeLimitExceeded

    run = took(scripted_model, slow)
    made = only_call(run)
    assert made.error == {"code": "timed_out", "message": "The tool did not finish in time."}
    assert attempts(made) == ["failed"]
    assert Group.objects.filter(name="half done").exists() is not atomic
    assert_invariants(run)


# --- atomic tools


def test_the_rows_of_a_failed_atomic_attempt_are_gone_and_those_of_the_last_are_there_once(
    scripted_model: ScriptedModel,
) -> None:
    @tool(atomic=True, retry=AT_ONCE)
    def write(ctx: ToolContext) -> int:
        """Write a row."""
        Group.objects.create(name=f"attempt {ctx.attempt}")
        if ctx.attempt < 3:
            raise OSError
        return Group.objects.count()

    run = took(scripted_model, write)
    made = only_call(run)
    assert (made.result, attempts(made)) == (1, ["retrying", "retrying", "success"])
    assert list(Group.objects.values_list("name", flat=True)) == ["attempt 3"]
    assert_invariants(run)


def test_a_plain_tool_keeps_what_it_wrote_before_it_failed(scripted_model: ScriptedModel) -> None:
    @tool(retry=AT_ONCE)
    def write(ctx: ToolContext) -> None:
        """Write a row."""
        Group.objects.create(name=f"attempt {ctx.attempt}")
        raise OSError

    assert_invariants(took(scripted_model, write))
    assert list(Group.objects.order_by("name").values_list("name", flat=True)) == [
        "attempt 1",
        "attempt 2",
        "attempt 3",
    ]


@pytest.mark.django_db(transaction=True)
def test_the_effect_of_an_atomic_tool_is_gone_when_its_run_was_cancelled_meanwhile(
    scripted_model: ScriptedModel,
) -> None:
    @tool(atomic=True, retry=AT_ONCE)
    def write(ctx: ToolContext) -> str:
        """Write a row, while somebody else cancels the run."""
        Group.objects.create(name="too late")
        run_id = ctx.run_id
        [cancelled] = Together(lambda: Run.objects.get(pk=str(run_id)).cancel()).join()
        assert cancelled.status == "cancelled"
        return "too late"

    agent = agents.registry.add(agents.Agent(name="clerk", model="scripted:x", tools=[write]))
    scripted_model.say(call("write"))
    with mock.patch("runs.tasks.publish"):
        run = run_to_end(agent.start("hello"))
    made = only_call(run)
    assert (run.status, made.outcome, made.result, attempts(made)) == ("cancelled", "cancelled", None, ["cancelled"])
    assert [part["outcome"] for part in told(run)] == ["cancelled"]
    assert not Group.objects.exists()
    assert_invariants(run)


# --- several calls, and other loops


def test_an_async_tool_is_awaited_and_fails_like_any_other(scripted_model: ScriptedModel) -> None:
    @tool(retry=AT_ONCE)
    async def fetch(ctx: ToolContext) -> str:
        """Fetch."""
        await asyncio.sleep(0)
        if ctx.attempt == 1:
            raise OSError
        return "fetched"

    @tool
    async def refuse() -> None:
        """Refuse."""
        raise ModelRetry("not so")

    run = took(scripted_model, fetch, refuse)
    fetched, refused = calls_of(run)
    assert (fetched.result, attempts(fetched)) == ("fetched", ["retrying", "success"])
    assert (refused.error, attempts(refused)) == ({"code": "model_retry", "message": "not so"}, ["failed"])
    assert_invariants(run)


def test_an_async_tool_that_was_cancelled_from_within_has_failed(scripted_model: ScriptedModel) -> None:
    @tool(retry=AT_ONCE)
    async def fetch() -> None:
        """Fetch."""
        raise asyncio.CancelledError(SECRET)

    run = took(scripted_model, fetch)
    made = only_call(run)
    assert made.error == {"code": "error", "message": "The tool failed with CancelledError."}
    assert_invariants(run)


def test_results_stand_in_the_models_order_though_they_came_in_another(scripted_model: ScriptedModel) -> None:
    @tool(retry=AT_ONCE)
    def wait(place: int, attempts: int, ctx: ToolContext) -> int:
        """Work at that attempt."""
        if ctx.attempt < attempts:
            raise OSError
        return place

    run = took(scripted_model, wait, calls=[call("wait", place=place, attempts=3 - place) for place in range(3)])
    assert [each["result"] for each in payloads(run, "tool_call.settled")] == [2, 1, 0]
    assert [part["result"] for part in told(run)] == [0, 1, 2]
    assert [part["tool_call"] for part in told(run)] == [str(made.pk) for made in calls_of(run)]
    results = [message for message in scripted_model.requests[1].messages if b"tool_result" in message]
    assert [b'"result":%d' % place in message for place, message in enumerate(results)] == [True] * 3
    assert_invariants(run)


# --- what must not run here


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ({"needs_approval": True}, "a person's approval"),
        ({"needs_approval": lambda arguments, ctx: True}, "a person's approval"),
        ({"deferred": True}, "a result from outside"),
    ],
    ids=["approval", "approval by arguments", "deferred"],
)
def test_what_waits_for_somebody_outside_never_runs(
    scripted_model: ScriptedModel, option: dict[str, Any], what: str
) -> None:
    ran = []

    @tool(**option)
    def refund() -> None:
        """Pay back."""
        ran.append(1)

    run = took(scripted_model, refund)
    made = only_call(run)
    assert (made.outcome, attempts(made), ran) == ("failed", [], [])
    assert made.error == {"code": "not_available", "message": f"refund needs {what}, which is not available here."}
    assert [part["error"] for part in told(run)] == [made.error]
    assert payloads(run, "tool_call.started") == []
    assert_invariants(run)
