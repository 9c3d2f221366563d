"""What people see of a message in Flower: which run, of which agent, which tool; and an id that leads back."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from runs import admission, flower
from runs import tasks as run_tasks
from runs.models import Run
from runs.sweep import Sweep
from tests.protocol.rows import SECOND, World
from threads.ids import new_id
from tools import messages
from tools.models import ToolCall

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def messages_sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """(task, id, what is shown) of each message, in place of the broker."""
    sent: list[tuple[str, str, str]] = []

    def send(task: Any, args: list[Any], *, task_id: str, shown: str, **_: Any) -> None:
        sent.append((task.name, task_id, shown))

    monkeypatch.setattr(messages, "send", send)
    return sent


def shown(run: UUID, dispatch: int) -> str:
    return f"agent=echo run={run} dispatch={dispatch}"


def test_the_sweep_says_which_run_and_which_tool(world: World, messages_sent: list[tuple[str, str, str]]) -> None:
    waiting = world.waiting()
    [call] = world.calls(waiting.run)
    queued = world.start()
    world.ahead(1.5 * SECOND)

    passes = Sweep(patient=False)
    passes.look()
    passes.watcher.drop()

    (run_task, run_task_id, of_run), (call_task, call_task_id, of_call) = messages_sent
    assert (run_task, of_run) == ("longhaul.advance_run", shown(queued, 1))
    assert flower.row_of(run_task_id) == ("run", queued)
    name = ToolCall.objects.get(pk=call).name
    assert (call_task, of_call) == (
        "longhaul.execute_call",
        f"tool={name} agent=echo run={waiting.run} attempt=1",
    )
    assert flower.row_of(call_task_id) == ("tool_call", call)


def test_each_way_into_the_queue_says_whose_run_it_is(world: World, messages_sent: list[tuple[str, str, str]]) -> None:
    reclaimed, joined, handed_over = world.running(), world.waiting(), world.running()
    thread = Run.objects.get(pk=handed_over.run).thread_id
    held = world.start(thread, status="held")

    admission.announce(world.reclaim(reclaimed) or {})
    admission.announce(world.settle(world.call_claim(*world.calls(joined.run))) or {})
    admission.announce(world.requeue(handed_over, "budget") or {})
    admission.announce(world.cancel(handed_over.run) or {})

    assert [said for _, _, said in messages_sent] == [
        shown(reclaimed.run, 2),
        shown(joined.run, 2),
        shown(handed_over.run, 2),
        shown(held, 1),
    ]


def test_two_messages_of_one_dispatch_are_two_tasks(messages_sent: list[tuple[str, str, str]]) -> None:
    run = new_id()

    for _ in range(2):
        run_tasks.publish(run, 1, "echo")

    assert len({task_id for _, task_id, _ in messages_sent}) == 2


def test_a_call_that_is_reclaimed_says_which_tool_it_is(
    world: World, messages_sent: list[tuple[str, str, str]]
) -> None:
    claim = world.waiting()
    held = world.call_claim(*world.calls(claim.run))

    admission.announce(world.call_reclaim(held, began=False) or {})

    name = ToolCall.objects.get(pk=held.id).name
    [(_, task_id, said)] = messages_sent
    assert said == f"tool={name} agent=echo run={claim.run} attempt=2"
    assert flower.row_of(task_id) == ("tool_call", held.id)
