"""clients/js in Node, while the connections to a real server are cut."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from runs.models import Run
from tests.clients.js.node import HERE, node
from tests.http.conftest import Api
from tests.streams.cutting import CuttingProxy
from tests.streams.outside import processes
from tests.workers.conftest import Kit

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.slow,
    pytest.mark.needs_node,
    pytest.mark.timeout(240),
]
SAY = ["tell me", "call idempotent 0.2", "tell me more"]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_conversation_over_cuts_is_the_one_that_was_held(workers: Kit, api: Api, tmp_path: Path, seed: int) -> None:
    with processes(tmp_path, 1) as (web,), CuttingProxy(web.port, seed=seed, mean_bytes=1500, share=0.9) as proxy:
        given = {"baseUrl": f"{proxy.url}/api", "apiKey": api.key, "agent": "worker_test", "say": SAY}
        done = node(str(HERE / "conversation.mjs"), json.dumps(given), timeout=200)
        cuts = sum(proxy.cuts.values())
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["error"] is None
    assert cuts >= 5, "they were cut"
    # Whatever was sent again, each message started one run.
    runs = list(Run.objects.filter(thread=told["thread"]).order_by("created_at"))
    assert [str(run.pk) for run in runs] == told["runs"]
    assert Run.objects.count() == len(SAY)
    # Each event once, in order, to the last character.
    log = json.loads(json.dumps([event.as_dict() for run in runs for event in run.events()]))
    assert told["log"] == log
    assert told["ofRuns"] == log
    # And what it shows is what the thread holds.
    listed = api.get(f"/api/threads/{told['thread']}/messages?limit=200")["results"]
    names = ["id", "role", "status", "content", "run", "step", "client_id"]
    assert of(told["messages"], names) == of(listed, names)
    pages = [api.get(f"/api/runs/{run.pk}/tool-calls")["results"] for run in runs]
    names = ["id", "name", "status", "outcome", "result", "arguments"]
    assert of(told["toolCalls"].values(), names) == of(chain(*pages), names)


def of(rows: Iterable[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names} for row in rows]
