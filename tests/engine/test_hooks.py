"""What runs around a call: its order, what it may change, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from django.contrib.auth.models import Group

from runs import agents
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, WorkerKilled, assert_invariants, call, run_to_end
from tests.engine.tool_runs import SECRET, attempts, only_call, secret_got_out
from tools import Hooks, Instead, ModelRetry, RetryPolicy, ToolContext, ToolFailed, tool
from tools.exceptions import ToolOptionError
from tools.models import ToolCall
from tools.registry import Tool

pytestmark = pytest.mark.django_db

AT_ONCE = RetryPolicy(attempts=3, initial_seconds=0)
Heard = list[str]


def took(model: ScriptedModel, used: Tool, *, hooks: Any = (), **arguments: Any) -> Run:
    """A run that called the tool once, of an agent with these hooks, and then said `done`."""
    agent = agents.registry.add(agents.Agent(name="clerk", model="scripted:x", tools=[used], hooks=hooks))
    model.say(call(used.name, **arguments), "done")
    run = run_to_end(agent.start("hello"))
    assert (run.status, run.output) == ("completed", "done"), run.why()
    assert_invariants(run)
    return run


def layer(name: str, heard: Heard, **instead: Callable[..., Any]) -> Hooks:
    """Hooks that say when they are asked."""

    def said(moment: str) -> Callable[..., Any]:
        def hook(*args: Any) -> Any:
            heard.append(f"{name} {moment}")
            return instead[moment](*args) if moment in instead else None

        if moment == "before":
            return lambda call, arguments, ctx: hook(call, arguments, ctx)
        return lambda call, arguments, what, ctx: hook(call, arguments, what, ctx)

    return Hooks(before=said("before"), after=said("after"), on_error=said("on_error"))


def raises(error: BaseException) -> Callable[..., Any]:
    def hook(*_: Any) -> Any:
        raise error

    return hook


# --- the order


def test_hooks_are_layers_the_agents_around_the_tools_the_first_around_the_others(
    scripted_model: ScriptedModel,
) -> None:
    heard: Heard = []

    @tool(hooks=[layer("t1", heard), layer("t2", heard)])
    def add(a: int, b: int) -> int:
        """Add."""
        heard.append("body")
        return a + b

    run = took(scripted_model, add, hooks=[layer("a1", heard), layer("a2", heard)], a=1, b=2)
    inward = ["a1 before", "a2 before", "t1 before", "t2 before"]
    assert heard == [*inward, "body", "t2 after", "t1 after", "a2 after", "a1 after"]
    assert (only_call(run).result, attempts(only_call(run))) == (3, ["success"])


def test_an_error_goes_outward_until_a_layer_makes_a_result_of_it(scripted_model: ScriptedModel) -> None:
    heard: Heard = []

    @tool(hooks=[layer("t1", heard, on_error=lambda call, arguments, error, ctx: f"not: {error}"), layer("t2", heard)])
    def fail() -> None:
        """Fail."""
        raise ToolFailed("no")

    run = took(scripted_model, fail, hooks=[layer("a1", heard)])
    assert heard == ["a1 before", "t1 before", "t2 before", "t2 on_error", "t1 on_error", "a1 after"]
    assert (only_call(run).outcome, only_call(run).result) == ("success", "not: no")


def test_what_lies_within_a_layer_that_refused_or_answered_is_not_begun(scripted_model: ScriptedModel) -> None:
    for before, outward, outcome in (
        (raises(ModelRetry("not like this")), "a1 on_error", "failed"),
        (lambda *_: Instead({"from": "the cache"}), "a1 after", "success"),
    ):
        heard: Heard = []

        @tool(hooks=[layer("t1", heard)])
        def add() -> None:
            """Add."""
            heard.append("body")  # noqa: B023 (called in this turn)

        run = took(scripted_model, add, hooks=[layer("a1", heard), layer("a2", heard, before=before)])
        assert heard == ["a1 before", "a2 before", outward]
        made = only_call(run)
        assert made.outcome == outcome
        assert (made.result, made.error) in (
            (None, {"code": "model_retry", "message": "not like this"}),
            ({"from": "the cache"}, None),
        )


# --- before


def test_before_sees_the_call_as_the_tool_does_and_changes_its_arguments(scripted_model: ScriptedModel) -> None:
    seen: list[Any] = []

    def halve(call: ToolCall, arguments: dict[str, Any], ctx: ToolContext) -> dict[str, Any]:
        seen.append((call.name, ctx.attempt, ctx.idempotency_key == str(call.pk), dict(arguments)))
        arguments["note"] = "changed in place: it counts for nothing"
        return {"euros": arguments["euros"] / 2}

    def keep(call: ToolCall, arguments: dict[str, Any], result: Any, ctx: ToolContext) -> None:
        seen.append(arguments)

    @tool(hooks=[Hooks(before=halve, after=keep)])
    def refund(euros: Decimal, ctx: ToolContext, note: str = "none") -> str:
        """Pay back."""
        return f"{euros} {note} {ctx.attempt}"

    run = took(scripted_model, refund, euros="10")
    assert only_call(run).result == "5 none 1"
    assert only_call(run).arguments == {"euros": "10"}  # what the model asked for stays so
    assert seen == [
        ("refund", 1, True, {"euros": Decimal(10), "note": "none"}),
        {"euros": Decimal(5), "note": "none"},
    ]


@pytest.mark.parametrize("given", [{"euros": "many"}, {}, {"euros": 1, "cents": 2}, ["euros"], True, "euros"], ids=str)
def test_arguments_of_a_hook_that_the_tool_does_not_take_are_not_used(
    scripted_model: ScriptedModel, given: Any
) -> None:
    ran = []

    @tool(retry=AT_ONCE, hooks=[Hooks(before=lambda call, arguments, ctx: given)])
    def refund(euros: int) -> None:
        """Pay back."""
        ran.append(euros)

    made = only_call(took(scripted_model, refund, euros=1))
    assert made.error is not None
    assert (made.error["code"], ran, attempts(made)) == ("hook_failed", [], ["failed"])
    assert made.error["message"].startswith("refund was not run: a hook before it ")


def test_a_hook_before_that_fails_is_the_tool_failing(scripted_model: ScriptedModel) -> None:
    tries = []

    def check(call: ToolCall, arguments: dict[str, Any], ctx: ToolContext) -> None:
        tries.append(ctx.attempt)
        if ctx.attempt < 3:
            raise ConnectionError(SECRET)

    @tool(retry=AT_ONCE, hooks=[Hooks(before=check)])
    def add() -> str:
        """Add."""
        return "added"

    run = took(scripted_model, add)
    assert (tries, attempts(only_call(run))) == ([1, 2, 3], ["retrying", "retrying", "success"])
    assert not secret_got_out(scripted_model, run)


def test_no_hook_is_asked_about_arguments_that_are_wrong(scripted_model: ScriptedModel) -> None:
    heard: Heard = []

    @tool(hooks=[layer("t", heard)])
    def add(a: int) -> None:
        """Add."""

    run = took(scripted_model, add, a="?")
    assert (heard, only_call(run).error["code"]) == ([], "invalid_arguments")  # type: ignore[index]


# --- after


def test_after_changes_the_result_before_anything_is_kept_of_it(scripted_model: ScriptedModel) -> None:
    def mask(call: ToolCall, arguments: dict[str, Any], result: Any, ctx: ToolContext) -> Any:
        return {**result, "dsn": "***"}

    @tool
    def look_up() -> dict[str, str]:
        """Look it up."""
        return {"dsn": SECRET, "state": "shipped"}

    run = took(scripted_model, look_up, hooks=[Hooks(after=mask)])
    assert only_call(run).result == {"dsn": "***", "state": "shipped"}
    assert not secret_got_out(scripted_model, run)


@pytest.mark.parametrize(("given", "kept"), [(None, "as it was"), (Instead(None), None), (Instead(1), 1), (0, 0)])
def test_what_after_returns_replaces_the_result_and_none_does_not(
    scripted_model: ScriptedModel, given: Any, kept: Any
) -> None:
    @tool(hooks=[Hooks(after=lambda call, arguments, result, ctx: given)])
    def look_up() -> str:
        """Look it up."""
        return "as it was"

    made = only_call(took(scripted_model, look_up))
    assert (made.outcome, made.result) == ("success", kept)


@pytest.mark.parametrize("atomic", [False, True])
def test_a_hook_after_that_fails_keeps_the_result_back_and_the_tool_does_not_run_again(
    scripted_model: ScriptedModel, atomic: bool
) -> None:
    ran = []

    @tool(atomic=atomic, retry=AT_ONCE, hooks=[Hooks(after=lambda call, arguments, result, ctx: result["iban"])])
    def look_up() -> dict[str, str]:
        """Look it up."""
        ran.append(1)
        Group.objects.create(name="written")
        return {"dsn": SECRET}

    run = took(scripted_model, look_up)
    made = only_call(run)
    said = "look_up ran, but its result is kept back: a hook after it failed with KeyError."
    assert (made.outcome, made.result, made.error) == ("failed", None, {"code": "hook_failed", "message": said})
    assert (ran, attempts(made)) == ([1], ["failed"])
    assert not secret_got_out(scripted_model, run)
    assert Group.objects.filter(name="written").exists() is not atomic


def test_after_may_refuse_a_result(scripted_model: ScriptedModel) -> None:
    @tool(hooks=[Hooks(after=raises(ModelRetry("Ask for less.")))])
    def look_up() -> str:
        """Look it up."""
        return SECRET

    run = took(scripted_model, look_up)
    assert only_call(run).error == {"code": "model_retry", "message": "Ask for less."}
    assert not secret_got_out(scripted_model, run)


# --- on_error


def test_on_error_gives_another_error_and_the_policy_goes_by_that(scripted_model: ScriptedModel) -> None:
    def final(call: ToolCall, arguments: dict[str, Any], error: BaseException, ctx: ToolContext) -> None:
        if isinstance(error, ConnectionError):
            raise ToolFailed("The shop is closed.") from error

    @tool(retry=AT_ONCE, hooks=[Hooks(on_error=final)])
    def connect() -> None:
        """Connect."""
        raise ConnectionError(SECRET)

    made = only_call(took(scripted_model, connect))
    assert (made.error, attempts(made)) == ({"code": "tool_failed", "message": "The shop is closed."}, ["failed"])


def test_an_error_that_nobody_answers_stays_what_it_is(scripted_model: ScriptedModel) -> None:
    heard: Heard = []

    @tool(retry=AT_ONCE, hooks=[layer("t", heard)])
    def connect() -> None:
        """Connect."""
        raise ConnectionError

    made = only_call(took(scripted_model, connect))
    assert heard == ["t before", "t on_error"] * 3
    assert attempts(made) == ["retrying", "retrying", "failed"]
    assert made.error == {"code": "error", "message": "The tool failed with ConnectionError."}


def test_when_the_time_is_up_no_hook_is_asked(scripted_model: ScriptedModel) -> None:
    for where in ("body", "before", "after"):
        heard: Heard = []

        @tool(hooks=[layer("t", heard, **{where: raises(SoftTimeLimitExceeded())} if where != "body" else {})])
        def slow() -> None:
            """Take long."""
            if where == "body":  # noqa: B023 (called in this turn)
                raise SoftTimeLimitExceeded

        made = only_call(took(scripted_model, slow, hooks=[layer("a", heard)]))
        assert made.error == {"code": "timed_out", "message": "The tool did not finish in time."}
        assert not [said for said in heard if "on_error" in said or said == "a after"]


# --- atomic, at most once, async


def test_hooks_of_an_atomic_call_are_part_of_its_transaction(scripted_model: ScriptedModel) -> None:
    def count(call: ToolCall, arguments: dict[str, Any], ctx: ToolContext) -> None:
        Group.objects.create(name=f"counted {ctx.attempt}")

    @tool(atomic=True, retry=AT_ONCE, hooks=[Hooks(before=count)])
    def write(ctx: ToolContext) -> None:
        """Write."""
        if ctx.attempt == 1:
            raise OSError

    run = took(scripted_model, write)
    assert attempts(only_call(run)) == ["retrying", "success"]
    assert list(Group.objects.values_list("name", flat=True)) == ["counted 2"]


def test_what_a_failed_atomic_body_wrote_goes_though_a_hook_answers(scripted_model: ScriptedModel) -> None:
    def answer(call: ToolCall, arguments: dict[str, Any], error: BaseException, ctx: ToolContext) -> str:
        Group.objects.create(name="by the hook")
        return "answered"

    @tool(atomic=True, hooks=[Hooks(on_error=answer)])
    def write() -> None:
        """Write."""
        Group.objects.create(name="half done")
        Group.objects.create(name="half done")  # a name is there once: the statement fails, and the transaction with it

    made = only_call(took(scripted_model, write))
    assert (made.outcome, made.result) == ("success", "answered")
    assert list(Group.objects.values_list("name", flat=True)) == ["by the hook"]


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_worker_that_dies_in_a_hook_has_begun_the_call(scripted_model: ScriptedModel, where: str) -> None:
    heard: Heard = []

    @tool(idempotent=False, hooks=[layer("t", heard, **{where: raises(WorkerKilled())})])
    def send() -> None:
        """Send money."""

    agent = agents.registry.add(agents.Agent(name="clerk", model="scripted:x", tools=[send]))
    scripted_model.say(call("send"))
    run = agent.start("hello")
    with pytest.raises(WorkerKilled):
        run_to_end(run)
    run = run_to_end(run)
    assert (run.status, only_call(run).status) == ("requires_action", "unknown")
    assert heard.count("t before") == 1
    assert_invariants(run)


def test_async_hooks_and_an_async_tool_share_a_loop_and_sync_ones_run_beside_it(
    scripted_model: ScriptedModel,
) -> None:
    loops = []

    async def before(call: ToolCall, arguments: dict[str, Any], ctx: ToolContext) -> dict[str, Any]:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return {"a": arguments["a"] + 1}

    def write(call: ToolCall, arguments: dict[str, Any], result: Any, ctx: ToolContext) -> None:
        Group.objects.create(name="sync")  # Django refuses this where a loop runs

    class Redact:
        async def __call__(self, call: ToolCall, arguments: dict[str, Any], result: Any, ctx: ToolContext) -> Any:
            loops.append(asyncio.get_running_loop())
            return result + 1

    @tool(hooks=[Hooks(before=before, after=Redact()), Hooks(after=write)])
    async def add(a: int) -> int:
        """Add."""
        loops.append(asyncio.get_running_loop())
        return a + 10

    assert only_call(took(scripted_model, add, a=1)).result == 13
    assert len(loops) == 3
    assert len(set(loops)) == 1
    assert loops[0].is_closed()
    assert Group.objects.filter(name="sync").exists()


# --- what is no hook


def test_what_cannot_be_a_hook_is_refused_where_it_is_written() -> None:
    async def later(call: Any, arguments: Any, ctx: Any) -> None: ...

    def plain() -> None:
        """Do nothing."""

    with pytest.raises(ToolOptionError, match=r"Hooks\(\) needs one of: before, after, on_error."):
        Hooks()
    with pytest.raises(ToolOptionError, match=r"Hooks\(after=...\) is a function; got 3."):
        Hooks(after=3)  # type: ignore[arg-type]
    with pytest.raises(ToolOptionError, match=r"must take \(call, arguments, error, ctx\)."):
        Hooks(on_error=later)  # type: ignore[arg-type]
    with pytest.raises(ToolOptionError, match=r"Tool 'plain': hooks is a list of Hooks\(...\); got <"):
        tool(hooks=later)(plain)  # type: ignore[call-overload]
    with pytest.raises(ToolOptionError, match=r"Tool 'plain': hooks is a list of Hooks\(...\); it holds <"):
        tool(hooks=[later])(plain)  # type: ignore[list-item]
    with pytest.raises(ToolOptionError, match="atomic=True run inside its transaction"):
        tool(atomic=True, hooks=[Hooks(before=later)])(plain)
    with pytest.raises(ToolOptionError, match=r"Agent 'a': .*atomic=True run inside its transaction"):
        agents.Agent(name="a", tools=[tool(atomic=True)(plain)], hooks=[Hooks(before=later)])
