"""The logs of all workers together tell what befell a run, to whoever selects by its id."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runs import Run
from tests.workers.app.agents import worker_test
from tests.workers.conftest import Kit, eventually
from tests.workers.test_deaths import ended, streaming, working
from tools.models import Worker

pytestmark = pytest.mark.slow


def lines(workers: Kit) -> list[dict[str, Any]]:
    """Return what all workers have logged so far, in the order of time. A line that is no JSON object fails the test."""
    told = []
    for log in workers.folder.glob("*.log"):
        whole = log.read_bytes().rpartition(b"\n")[0]  # the last may be under way
        for line in filter(None, whole.decode().split("\n")):
            try:
                fields = json.loads(line)
            except ValueError:
                raise AssertionError(f"{log.name}: {line}") from None
            assert {"time", "level", "logger", "message"} <= fields.keys(), line
            told.append(fields)
    return sorted(told, key=lambda fields: str(fields["time"]))


def story(workers: Kit, run: Run) -> list[dict[str, Any]]:
    """What `jq 'select(.run == "..." and .action)'` shows of all logs."""
    return [fields for fields in lines(workers) if fields.get("run") == str(run.pk) and "action" in fields]


def name_of(life: Any) -> str:
    return Worker.objects.get(pk=life).name


def test_a_killed_agents_workers_run_can_be_followed_by_its_id(workers: Kit) -> None:
    run = streaming(worker_test.start("tell me"))
    first = name_of(run.holder)
    workers.kill(workers.of(run.holder))
    ended(run)
    eventually(lambda: story(workers, run)[-1]["action"] == "run.completed", why="the run's end is logged")
    told = story(workers, run)
    assert [fields["action"] for fields in told] == ["run.claimed", "run.reclaimed", "run.claimed", "run.completed"]
    claimed, reclaimed, again, completed = told
    assert (claimed["leg"], claimed["epoch"], claimed["worker"]) == (1, 1, first)
    assert (reclaimed["epoch"], reclaimed["level"]) == (1, "WARNING")
    assert (again["leg"], again["epoch"]) == (completed["leg"], completed["epoch"]) == (2, 3)
    assert again["worker"] == completed["worker"] != first
    assert {fields["agent"] for fields in told if "agent" in fields} == {"worker_test"}
    assert [fields["level"] for fields in told if fields is not reclaimed] == ["INFO"] * 3
    # What a library logs while a leg waits for its model says whose it is, too.
    asked = [fields for fields in lines(workers) if fields["logger"] == "httpx2" and fields.get("run") == str(run.pk)]
    assert [(fields["leg"], fields["epoch"]) for fields in asked] == [(1, 1), (2, 3)]


def test_a_killed_tools_workers_call_can_be_followed_by_its_id(workers: Kit) -> None:
    run = worker_test.start("call idempotent 30")
    call = working(run)
    first = name_of(call.holder)
    workers.kill(workers.of(call.holder))
    workers.up(tools=1)
    ended(run)
    eventually(lambda: story(workers, run)[-1]["action"] == "run.completed", why="the run's end is logged")
    told = [fields for fields in story(workers, run) if fields.get("tool_call") == str(call.pk)]
    assert [(fields["action"], fields["attempt"]) for fields in told] == [
        ("call.claimed", 1),
        ("call.reclaimed", 1),
        ("call.claimed", 2),
        ("call.settled", 2),
    ]
    assert told[0]["worker"] == first != told[2]["worker"]
    assert (told[3]["tool"], told[3]["agent"], told[3]["outcome"]) == ("idempotent", "worker_test", "success")
    actions = [fields["action"] for fields in story(workers, run)]
    assert actions[:2] == ["run.claimed", "step.committed"]
    assert actions[-2:] == ["run.claimed", "run.completed"]
