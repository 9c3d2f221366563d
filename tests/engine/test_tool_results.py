"""What becomes of a result: kept as JSON that Postgres, orjson and the model know, or refused without another attempt."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from django.contrib.auth.models import Group
from pydantic import BaseModel, computed_field, field_serializer

from runs.pytest_longhaul import ScriptedModel, assert_invariants
from tests.engine.tool_runs import SECRET, attempts, only_call, secret_got_out, told, took
from tools import RetryPolicy, registry, tool

pytestmark = pytest.mark.django_db

AT_ONCE = RetryPolicy(attempts=3, initial_seconds=0)


class Opaque:
    """What JSON does not know."""


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize(
    "result",
    [Opaque(), {"deep": [Opaque()]}, b"\xff", "\ud800", 10**5000],
    ids=["object", "deep", "bytes", "text", "int"],
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
    assert "'answer'" in made.error["message"]
    assert Group.objects.filter(name="done").exists() is not atomic
    assert_invariants(run)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (None, None),
        (False, False),
        (2**64 - 1, 2**64 - 1),
        (2**64, str(2**64)),
        ([{"wei": -(2**63) - 1}], [{"wei": str(-(2**63) - 1)}]),
        (float("inf"), "Infinity"),
        ("a\0b", "a\ufffdb"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("atomic", [False, True])
def test_a_result_that_the_database_could_not_take_is_kept_as_text(
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
        return "refused"

    monkeypatch.setattr(registry, "jsonable", lambda result: "\0" + result)
    with mock.patch("runs.tasks.publish"):
        run = took(scripted_model, answer)
    made = only_call(run)
    assert made.error is not None
    assert (made.outcome, made.result) == ("failed", None)
    assert made.error["code"] == ("error" if atomic else "tool_failed")
    assert len(ran) == (3 if atomic else 1)  # what an atomic attempt did is rolled back with it
    assert_invariants(run)
