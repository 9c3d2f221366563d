"""The decorator, its options, and the words of the package root."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import tools
from tools.context import ToolContext
from tools.exceptions import (
    ApprovalRequired,
    DuplicateTool,
    InvalidArguments,
    InvalidResult,
    ModelRetry,
    ToolError,
    ToolFailed,
    ToolOptionError,
    ToolSchemaError,
    UnknownTool,
)
from tools.gates import Rate, gates_of
from tools.registry import Tool, tool, tool_names, tools_by_name
from tools.retry import RetryPolicy

ROOT = Path(tools.__file__).resolve().parents[1]


@tool
def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


@tool(timeout_seconds=30, retry=RetryPolicy(attempts=5), idempotent=True, queue="slow", name="refund-order")
def refund(number: int, amount: Decimal, ctx: ToolContext) -> dict[str, Any]:
    """Pay back.

    Args:
        number: the order's number
    """
    return {"number": number, "amount": amount}


# --- the decorator ---


def test_bare_it_takes_everything_from_the_function() -> None:
    assert add.name == "add"
    assert add.description == "Add two numbers."
    assert list(add.parameters["properties"]) == ["a", "b"]
    assert add.timeout == timedelta(seconds=60)
    assert add.retry == RetryPolicy()
    assert (add.idempotent, add.atomic, add.needs_approval, add.deferred, add.queue) == (
        None,
        False,
        False,
        False,
        None,
    )
    assert (add.takes_context, add.context_parameter, add.is_async) == (False, None, False)


def test_options_are_kept() -> None:
    assert refund.name == "refund-order"
    assert refund.timeout == timedelta(seconds=30)
    assert refund.retry == RetryPolicy(attempts=5)
    assert (refund.idempotent, refund.queue) == (True, "slow")
    assert (refund.takes_context, refund.context_parameter) == (True, "ctx")
    assert refund.parameters["properties"]["number"]["description"] == "the order's number"


def test_a_description_given_replaces_the_docstring_but_not_that_of_the_parameters() -> None:
    @tool(description="Other words.")
    def order(number: int) -> None:
        """Find.

        Args:
            number: printed
        """

    assert order.description == "Other words."
    assert order.parameters["properties"]["number"]["description"] == "printed"


def test_calling_a_tool_calls_the_function() -> None:
    assert add(1, b=3) == 4
    with pytest.raises(TypeError):
        add("1", no=3)  # type: ignore[call-arg, arg-type]


def test_a_coroutine_function_is_awaited_by_its_caller() -> None:
    @tool
    async def double(number: int) -> int:
        return number * 2

    assert double.is_async
    assert asyncio.run(double(4)) == 8


def test_a_tool_shows_as_its_function() -> None:
    assert (add.__name__, add.__doc__, add.__module__) == ("add", "Add two numbers.", __name__)  # type: ignore[attr-defined]
    assert inspect.signature(add) == inspect.signature(add.function)


def test_a_tool_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        add.name = "sub"  # type: ignore[misc]


def test_a_tool_defined_in_a_function_sees_the_names_there() -> None:
    @dataclasses.dataclass
    class Local:
        x: int

    @tool
    def bare(value: Local) -> int:
        return value.x

    @tool(idempotent=True)
    def with_options(value: Local) -> int:
        return value.x

    assert bare.validate('{"value": {"x": 3}}') == with_options.validate('{"value": {"x": 3}}') == {"value": Local(3)}


def test_a_signature_that_cannot_be_a_schema_fails_at_import_and_names_tool_and_parameter() -> None:
    with pytest.raises(ToolSchemaError) as caught:

        @tool(name="find")
        def look_up(number: int, thing: object, more) -> None: ...

    assert isinstance(caught.value, TypeError)
    assert (caught.value.tool, caught.value.parameter) == ("find", "more")


def test_a_lambda_is_refused() -> None:
    with pytest.raises(ToolSchemaError, match="lambda"):
        tool(lambda: 1)
    with pytest.raises(ToolSchemaError, match="lambda"):
        tool(name="one")(lambda: 1)


def test_a_tool_is_not_made_twice() -> None:
    with pytest.raises(ToolSchemaError, match="made from a function"):
        tool(add)


@pytest.mark.parametrize("name", ["", "über", "a b", "a.b", "x" * 65, "line\n"])
def test_a_name_that_services_refuse_is_refused(name: str) -> None:
    def order() -> None: ...

    with pytest.raises(ToolSchemaError, match="1 to 64 letters"):
        tool(name=name)(order)


# --- options that exclude each other ---


def plain() -> None: ...


async def coroutine() -> None: ...


async def ask(arguments: dict[str, Any], context: ToolContext) -> bool:
    return True


@pytest.mark.parametrize(
    ("options", "function", "says"),
    [
        ({"atomic": True, "idempotent": True}, plain, "atomic=True excludes idempotent=True"),
        ({"atomic": True, "idempotent": False}, plain, "atomic=True excludes idempotent=False"),
        ({"atomic": True}, coroutine, "cannot be `async def`"),
        ({"atomic": True, "deferred": True}, plain, "a deferred call settles later"),
        ({"idempotent": False, "retry": RetryPolicy(attempts=2)}, plain, "starts at most once"),
        ({"idempotent": False, "on_unknown": "shrug"}, plain, "on_unknown is one of ask, tell_model, fail"),
        ({"on_unknown": "ask"}, plain, "give it beside idempotent=False"),
        ({"idempotent": True, "on_unknown": "fail"}, plain, "give it beside idempotent=False"),
        ({"idempotent": "yes"}, plain, "idempotent is True, False or None"),
        ({"timeout_seconds": 0}, plain, "timeout_seconds must be above 0"),
        ({"timeout_seconds": -1}, plain, "timeout_seconds must be above 0"),
        ({"timeout_seconds": float("inf")}, plain, "timeout_seconds must be above 0"),
        ({"timeout_seconds": float("nan")}, plain, "timeout_seconds must be above 0"),
        ({"timeout_seconds": timedelta(seconds=3)}, plain, "timeout_seconds is a number"),
        ({"timeout_seconds": True}, plain, "timeout_seconds is a number"),
        ({"retry": 3}, plain, "retry is a RetryPolicy"),
        ({"needs_approval": "yes"}, plain, "needs_approval is True, False or a function"),
        ({"needs_approval": ask}, plain, "make it a plain def"),
        ({"needs_approval": lambda arguments: True}, plain, "two arguments"),
        ({"queue": " "}, plain, "queue is the name"),
        ({"queue": 3}, plain, "queue is the name"),
        ({"max_concurrency": 0}, plain, "max_concurrency is a whole number from 1; got 0"),
        ({"max_concurrency": 2.5}, plain, "max_concurrency is a whole number"),
        ({"max_concurrency": True}, plain, "max_concurrency is a whole number"),
        ({"rate_limit": "0/s"}, plain, "rate_limit: a rate is a whole number above 0, a slash and s, min, h or d"),
        ({"rate_limit": "10/minute"}, plain, "like '100/min'; got '10/minute'"),
        ({"rate_limit": 10}, plain, "rate_limit: a rate is"),
    ],
)
def test_a_wrong_option_fails_at_import(options: dict[str, Any], function: Any, says: str) -> None:
    with pytest.raises(ToolOptionError, match=says) as caught:
        tool(**options)(function)
    assert isinstance(caught.value, ValueError)
    assert f"Tool '{function.__name__}': " in str(caught.value)


def test_options_that_go_together() -> None:
    asks = tool(atomic=True, needs_approval=lambda arguments, context: arguments["amount"] > 100)(plain)
    assert callable(asks.needs_approval)
    assert tool(atomic=True, retry=RetryPolicy(attempts=9))(plain).retry.attempts == 9
    assert tool(deferred=True, needs_approval=True)(coroutine).deferred


@pytest.mark.parametrize(
    ("text", "count", "seconds"), [("10/s", 10, 1), ("100/min", 100, 60), ("1000/h", 1000, 3600), ("5/d", 5, 86400)]
)
def test_a_rate_is_so_many_in_a_time(text: str, count: int, seconds: int) -> None:
    assert tool(rate_limit=text)(plain).rate == Rate(count, timedelta(seconds=seconds))


def test_a_tool_without_limits_has_no_gates() -> None:
    assert gates_of(tool(plain), "7") is None
    assert gates_of(tool(max_concurrency=5, rate_limit="10/min")(plain), "7") == {
        "tool:plain": {"most": 5, "count": 10, "seconds": 60.0}
    }
    assert gates_of(tool(plain), "7", per_owner=3, rate_per_owner="2/s") == {
        "calls_of:7": {"most": 3, "count": 2, "seconds": 1.0}
    }
    assert gates_of(tool(plain), None, per_owner=3) is None


def test_a_tool_that_starts_at_most_once_has_one_attempt() -> None:
    assert tool(idempotent=False)(plain).retry.attempts == 1
    assert tool(idempotent=False)(plain).retry.delay(1) is None
    assert tool(idempotent=False, retry=RetryPolicy(attempts=1))(plain).retry.attempts == 1


# --- arguments and results ---


def test_arguments_come_back_as_the_function_wants_them_without_the_context() -> None:
    assert refund.validate('{"number": "3", "amount": "1.50"}') == {"number": 3, "amount": Decimal("1.50")}
    assert add(**add.validate({"a": 1})) == 3


def test_wrong_arguments_are_told_to_the_model_by_the_tools_name() -> None:
    with pytest.raises(InvalidArguments, match=r"The arguments of refund-order are not valid") as caught:
        refund.validate('{"number": 3, "ctx": {}}')
    assert caught.value.problems == [
        {"path": "amount", "message": "is required"},
        {"path": "ctx", "message": "is no parameter; there are: number, amount"},
    ]


def test_a_result_becomes_json() -> None:
    assert refund.keep({"amount": Decimal("1.50")}).result == {"amount": "1.50"}


def test_a_result_that_cannot_be_json_is_final_and_says_so() -> None:
    with pytest.raises(ToolFailed, match="its result is lost: object cannot be written") as caught:
        add.keep(object())
    assert isinstance(caught.value, InvalidResult)
    assert add.retry.delay(1, caught.value) is None


# --- digest ---


def make(description: str = "Find.", name: str = "order") -> Tool:
    def order(number: int, size: str = "s") -> None: ...

    return tool(name=name, description=description)(order)


def test_the_digest_says_what_the_model_was_told() -> None:
    assert make().digest == make().digest
    assert len(make().digest) == 64
    assert len({make().digest, make(description="Look.").digest, make(name="other").digest}) == 3


def test_the_digest_is_the_same_in_every_process() -> None:
    code = "from tests.tools.test_registry import refund; print(refund.digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {refund.digest}


# --- lists of tools ---


def test_names_keep_their_order() -> None:
    assert tool_names([refund, add]) == ["refund-order", "add"]
    assert tools_by_name([refund, add]) == {"refund-order": refund, "add": add}


def test_two_tools_of_one_name_are_refused_and_both_are_named() -> None:
    with pytest.raises(DuplicateTool, match=r"named 'add'.*test_registry\.add and .*test_registry\.plain"):
        tool_names([add, refund, tool(name="add")(plain)])
    with pytest.raises(DuplicateTool):
        tool_names([add, add])


def test_what_is_no_tool_is_refused() -> None:
    with pytest.raises(TypeError, match="Decorate the function with @tool"):
        tool_names([add, plain])  # type: ignore[list-item]


# --- the context ---


def test_the_context_reads_only_what_is_asked_and_only_once() -> None:
    asked: list[str] = []

    def load(what: str) -> Callable[[], Any]:
        def loaded() -> Any:
            asked.append(what)
            return what

        return loaded

    call: Any = "call"
    context = ToolContext(
        tool_call=call,
        attempt=2,
        idempotency_key="k",
        load_run=load("run"),
        load_thread=load("thread"),
        load_owner=load("owner"),
    )
    assert (context.attempt, context.idempotency_key, context.deadline) == (2, "k", None)
    assert context.tool_call is call
    assert asked == []
    found: list[Any] = [context.run, context.run, context.thread, context.owner]
    assert found == ["run", "run", "thread", "owner"]
    assert asked == ["run", "thread", "owner"]


def test_nothing_of_the_context_can_be_assigned() -> None:
    context = ToolContext(tool_call=None)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        context.attempt = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        context.note = "x"  # type: ignore[attr-defined]


def test_the_context_carries_what_the_tool_says() -> None:
    said: list[Any] = []
    context = ToolContext(
        tool_call=None,  # type: ignore[arg-type]
        report_progress=lambda fraction, note: said.append((fraction, note)),
        emit_data=said.append,
        check_cancelled=lambda: True,
    )
    context.progress(0.5, "half")
    context.progress(1.0000001)
    context.progress(-1)
    context.progress(float("nan"), "?")
    context.progress(note="busy")
    context.emit({"total": Decimal("1.5")})
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        context.emit(object())
    assert said == [(0.5, "half"), (1.0, ""), (0.0, ""), (None, "?"), (None, "busy"), {"total": "1.5"}]
    assert context.is_cancelled()


# --- errors ---


def test_the_docstring_is_the_default_message() -> None:
    assert str(ToolError()) == "A tool could not be used."
    assert str(ModelRetry()) == "The call did not work as asked; try it another way."
    assert str(ToolFailed("no such card")) == "no such card"


@pytest.mark.parametrize(
    "error",
    [
        ModelRetry("again"),
        ToolFailed(),
        ApprovalRequired("more than 100"),
        UnknownTool("find", ["add"]),
        InvalidArguments("add", [{"path": "a", "message": "is required"}]),
        ToolSchemaError("add", "no annotation.", "a"),
        ToolOptionError("Tool 'add': no."),
        InvalidResult("lost"),
        DuplicateTool(),
    ],
)
def test_errors_survive_the_way_to_another_process(error: ToolError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.code, vars(copy)) == (str(error), error.code, vars(error))


def test_an_unknown_tool_is_answered_with_those_that_exist() -> None:
    assert str(UnknownTool("find", ["add", "refund"])) == "There is no tool named 'find'. Use one of: add, refund."
    assert str(UnknownTool("find")) == "There is no tool named 'find'. This run has no tools."


# --- the package root ---


def test_the_root_is_there_before_djangos_apps_and_loads_nothing_until_asked() -> None:
    code = """
import sys
import tools
assert not {"django", "pydantic", "griffe", "tools.registry"} & set(sys.modules), "loaded by the import"
from tools import ApprovalRequired, ModelRetry, RetryPolicy, Tool, ToolContext, ToolFailed, tool
@tool
def order(number: int, ctx: ToolContext): "Find."
assert "django" not in sys.modules, "loaded by the names"
assert "griffe" not in sys.modules, "loaded for a docstring without sections"
try:
    tools.nothing
except AttributeError as error:
    assert str(error) == "module 'tools' has no attribute 'nothing'"
else:
    raise SystemExit("no AttributeError")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)


def test_the_root_lists_its_names() -> None:
    assert {"ToolCall", "tool", "RetryPolicy"} <= set(dir(tools))
    assert set(tools.__all__) == set(tools._HOME)
