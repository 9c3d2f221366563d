"""Tools made for a run, and hooks around their calls, between real workers: one of which dies in a hook."""

from __future__ import annotations

import pytest

from runs import Run
from tests.workers.app.choice import choice_test
from tests.workers.conftest import Kit, eventually
from tests.workers.test_deaths import ended, starts, working
from tools.models import ToolCall

pytestmark = pytest.mark.slow


def test_a_tool_made_for_a_run_is_found_in_another_process_and_its_result_is_masked_there(workers: Kit) -> None:
    run = ended(choice_test.start("call look_inside 0"))
    assert run.output == "It is done.", run.why()
    call = ToolCall.objects.get(run_id=run.pk)
    assert (call.outcome, call.result, starts(call)) == ("success", f"*** of {run.pk}", 1)


def test_a_worker_that_is_killed_in_a_hook_has_begun_the_call(workers: Kit) -> None:
    run = choice_test.start("call look_inside 30")
    call = working(run)
    workers.kill(workers.of(call.holder))
    eventually(lambda: Run.objects.get(pk=run.pk).status == "requires_action", why="the run asks for a person")
    call.refresh_from_db()
    assert (call.status, starts(call)) == ("unknown", 1)
    workers.up(tools=1)
    call.fail("It was not done.", retryable=True)
    assert ended(run).output == "It is done."
    call.refresh_from_db()
    assert (call.result, starts(call)) == (f"*** of {run.pk}", 2)
