"""A prefork parent and the calls of its children: who is gone, who is past the limit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from tests.protocol.rows import World, a_call
from tests.tools import test_presence
from threads import clock
from tools.models import ToolCall, Worker
from tools.presence import Presence

pytestmark = pytest.mark.django_db(transaction=True)
arrive = test_presence.arrive


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A child of this process that runs until it is killed."""
    made = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield made
    made.kill()
    made.communicate()


def held(world: World, child: Presence, late: timedelta, **options: Any) -> UUID:
    """A call that the child runs, and whose time was up so long ago."""
    [call] = world.calls(world.waiting(a_call(max_attempts=3, **options)).run)
    world.call_claim(call, child.id)
    ToolCall.objects.filter(pk=call).update(timeout_at=clock.now() - late)
    return call


@pytest.mark.parametrize(("seconds", "cut"), [(-60, False), (1, False), (6, True)])
@pytest.mark.parametrize("idempotent", [None, False])
def test_a_child_past_its_limit_and_a_grace_is_killed_and_its_call_has_timed_out(
    world: World,
    arrive: Callable[..., Presence],
    process: subprocess.Popen[bytes],
    seconds: int,
    cut: bool,
    idempotent: bool | None,
) -> None:
    parent = arrive()
    child = arrive(parent=parent.first_life, beats=False)
    Worker.objects.filter(pk=child.id).update(pid=process.pid)
    call = held(world, child, timedelta(seconds=seconds), idempotent=idempotent)
    for _ in range(4):
        parent.tick()
    found = world.tool_call(call)
    if not cut:
        assert (found["status"], process.poll()) == ("running", None)
        return
    assert process.wait(30) == -9
    assert (found["outcome"], found["error"]["code"]) == ("failed", "timed_out")
    assert ("is not known" in found["error"]["message"]) == (idempotent is False)


@pytest.mark.parametrize("leaves", [True, False])
def test_the_call_of_a_child_that_is_gone_is_taken_at_once(
    world: World,
    arrive: Callable[..., Presence],
    leaves: bool,
) -> None:
    """Also of one that said that it leaves."""
    parent = arrive()
    child = arrive(parent=parent.first_life, beats=False)
    parent.tick()
    parent.tick()  # it has seen that there are children
    call = held(world, child, timedelta(seconds=-60))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    Worker.objects.filter(pk=child.id).update(pid=gone.pid)
    if leaves:
        child.end()
    parent.tick()
    found = world.tool_call(call)
    assert (found["status"], found["attempt"]) == ("retrying", 2)


def test_a_child_that_went_on_to_another_call_lives(
    world: World,
    arrive: Callable[..., Presence],
    process: subprocess.Popen[bytes],
) -> None:
    parent = arrive()
    child = arrive(parent=parent.first_life, beats=False)
    Worker.objects.filter(pk=child.id).update(pid=process.pid)
    late = held(world, child, timedelta(seconds=60))
    fresh = held(world, child, timedelta(seconds=-60))
    for _ in range(4):
        parent.tick()
    assert (world.tool_call(late)["outcome"], world.tool_call(fresh)["status"]) == ("failed", "running")
    assert process.poll() is None
