"""The same in pytest's own way: fixtures in place of TestCases."""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.db import connections

from desk import carrier
from desk.agents import look_up_order, support
from desk.models import Order
from runs import Run
from runs.providers.port import ProviderError
from runs.pytest_longhaul import CallTool, ScriptedModel, assert_invariants, call, move_clock, run_to_end
from tools import ToolCall, ToolContext

pytestmark = pytest.mark.django_db


@pytest.fixture
def ada() -> User:
    user = User.objects.create_user("ada", "ada@example.com")
    Order.objects.create(number=1042, customer=user, state="shipped", cents=5000)
    return user


def test_an_order_is_looked_up(scripted_model: ScriptedModel, ada: User) -> None:
    scripted_model.say(call("look_up_order", number=1042), "It is on its way.")
    run = run_to_end(support.start("Where is order 1042?", owner=ada))
    assert run.output == "It is on its way."
    assert_invariants(run)


@pytest.mark.parametrize(
    ("code", "asked"), [("network", 2), ("server", 2), ("overloaded", 2), ("auth", 1), ("invalid_request", 1)]
)
def test_which_failures_of_the_model_are_tried_again(
    scripted_model: ScriptedModel, ada: User, code: Any, asked: int
) -> None:
    scripted_model.say(["It is on", ProviderError(code, "Cut.")])  # cut in the middle of its text
    if asked == 2:
        scripted_model.say("It is on its way.")
    run = run_to_end(support.start("Where is order 1042?", owner=ada))
    assert len(scripted_model.requests) == asked
    assert run.output == ("It is on its way." if asked == 2 else None)
    assert_invariants(run)


def test_a_model_that_answers_by_what_it_is_shown(scripted_model: ScriptedModel, ada: User) -> None:
    def answer(messages: list[dict[str, Any]]) -> str | CallTool:
        last = messages[-1]
        if last["role"] == "user":
            return call("look_up_order", number=int(last["content"][0]["text"]))
        return str(last["content"][0]["result"]["state"])

    scripted_model.answer = answer
    assert run_to_end(support.start("1042", owner=ada)).output == "shipped"


def test_a_wait_is_seen_before_it_is_over(
    scripted_model: ScriptedModel, ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = True

    def where_is(parcel: str) -> dict[str, str]:
        if away:
            raise OSError("away")
        return {"city": "Bergen"}

    monkeypatch.setattr(carrier, "where_is", where_is)
    scripted_model.say(call("track_parcel", number=1042), "In Bergen.")
    run = support.start("Where is my parcel?", owner=ada)

    with pytest.raises(AssertionError, match="Nothing is due"):
        run_to_end(run, moves_clock=False)
    assert re.search(r"track_parcel \(again in \d+ s after error, attempt 2 of 3\)", run.why())

    away = False
    move_clock(timedelta(minutes=1))
    assert run_to_end(run, moves_clock=False).output == "In Bergen."


def test_a_tool_is_a_function(ada: User) -> None:
    context = ToolContext(tool_call=ToolCall(name="look_up_order"), owner_id=ada.pk)
    assert look_up_order(1042, context) == {"number": 1042, "state": "shipped", "cents": 5000}
    assert look_up_order.parameters["required"] == ["number"]


@pytest.mark.django_db(transaction=True)
def test_where_tests_commit_the_clock_is_given_back_by_its_fixture(
    scripted_model: ScriptedModel, ada: User, longhaul_clock: Callable[[timedelta], None]
) -> None:
    run = support.start("Hello", owner=ada)
    longhaul_clock(timedelta(hours=2))
    assert run_to_end(run).stop_reason == "deadline"
    assert_invariants()


@pytest.mark.django_db(transaction=True)
async def test_an_async_test_commits_for_its_sync_code_has_a_thread_and_a_connection_of_its_own(
    scripted_model: ScriptedModel,
) -> None:
    scripted_model.say("Hello.")
    run = await support.astart("Hello")
    await sync_to_async(run_to_end)(run)
    again = await Run.objects.aget(pk=run.pk)
    assert again.output == "Hello."
    await sync_to_async(connections.close_all)()  # an open one would be in the way when the test database is dropped
