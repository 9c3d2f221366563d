"""What becomes of a result: kept as JSON that Postgres, orjson and the model know, or refused without another attempt."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any
from unittest import mock

import pytest
from django.contrib.auth.models import Group
from pydantic import BaseModel, computed_field, field_serializer

from runs.pytest_longhaul import ScriptedModel, assert_invariants
from tests.engine.tool_runs import SECRET, attempts, only_call, secret_got_out, told, took
from tools import File, RetryPolicy, registry, tool
from tools.results import Kept

pytestmark = pytest.mark.django_db

AT_ONCE = RetryPolicy(attempts=3, initial_seconds=0)


class Opaque:
    """What JSON does not know."""


def itself() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize(
    "result",
    [
        *(Opaque(), {"deep": [Opaque()]}, b"\xff", "\ud800", 10**5000, 2**64, float("nan"), {"rate": float("-inf")}),
        *(
            "a\0b",
            itself(),
            nested(500),
            ["x" * 1_000_000] * 1_000_000,
            File("large", data=bytes(10_000_001)),
            (n for n in [1]),
        ),
    ],
    ids=[
        *("object", "deep object", "bytes", "surrogate", "int", "int of 65 bits", "nan", "infinity"),
        *("nul", "cycle", "nested", "terabyte", "large file", "generator"),
    ],
)
def test_a_result_that_cannot_be_json_fails_the_call_without_another_attempt(
    scripted_model: ScriptedModel, atomic: bool, result: Any
) -> None:
    @tool(atomic=atomic, retry=AT_ONCE)
    def answer() -> Any:
        """Answer."""
        Group.objects.create(name="done")
        return result

    run = took(scripted_model, answer)
    made = only_call(run)
    assert (made.outcome, made.result, attempts(made)) == ("failed", None, ["failed"])
    assert made.error is not None
    assert made.error["code"] == "invalid_result"
    assert ("Tool 'answer' was rolled back" if atomic else "Tool 'answer' ran") in made.error["message"]
    assert made.stored is None
    assert Group.objects.filter(name="done").exists() is not atomic
    assert_invariants(run)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (None, None),
        (False, False),
        (2**64 - 1, 2**64 - 1),
        (Decimal("1.10"), "1.10"),
        (date(2026, 11, 21), "2026-11-21"),
        ("NaN, Infinity", "NaN, Infinity"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("atomic", [False, True])
def test_a_result_is_kept_and_told_as_json(
    scripted_model: ScriptedModel, atomic: bool, result: Any, expected: Any
) -> None:
    @tool(atomic=atomic)
    def answer() -> Any:
        """Answer."""
        return result

    run = took(scripted_model, answer)
    made = only_call(run)
    assert (made.outcome, made.result, attempts(made)) == ("success", expected, ["success"])
    assert [part["result"] for part in told(run)] == [expected]
    assert_invariants(run)


class Summary(BaseModel):
    """A result that cannot be written, for it asks somebody else first."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> int:
        raise ValueError(SECRET)


class Line(BaseModel):
    price: int = 1

    @field_serializer("price")
    def in_words(self, price: int) -> str:
        raise ConnectionError(SECRET)


@pytest.mark.parametrize("result", [Summary(), Line(), [Line()]], ids=["computed", "serializer", "deep"])
def test_the_text_of_an_exception_of_a_result_is_kept_from_model_and_log(
    scripted_model: ScriptedModel, result: Any
) -> None:
    @tool
    def answer() -> Any:
        """Answer."""
        return result

    run = took(scripted_model, answer)
    made = only_call(run)
    assert made.error is not None
    assert made.error["code"] == "invalid_result"
    assert not secret_got_out(scripted_model, run)
    assert_invariants(run)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("atomic", [False, True])
def test_a_result_that_postgres_refuses_fails_the_call_all_the_same(
    scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    """What nobody has foreseen: the settlement itself is what fails."""
    ran = []

    @tool(atomic=atomic, retry=AT_ONCE)
    def answer() -> str:
        """Answer."""
        ran.append(1)
        Group.objects.create(name="done")
        return "refused"

    monkeypatch.setattr(registry, "keep", lambda result, call_id: Kept("\0" + result))
    with mock.patch("runs.tasks.publish"):
        run = took(scripted_model, answer)
    made = only_call(run)
    assert made.error is not None
    assert (made.outcome, made.result) == ("failed", None)
    assert made.error["code"] == "invalid_result"
    assert ("was rolled back" if atomic else "what it does is done") in made.error["message"]
    assert len(ran) == 1
    assert Group.objects.filter(name="done").exists() is not atomic
    assert_invariants(run)
