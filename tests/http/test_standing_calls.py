"""Tool calls after a reload: a snapshot says of each how it stood, as the log up to its cursor does."""

from __future__ import annotations

import pytest
from psycopg.types.json import Jsonb

from longhaul_client import Event, Transcript
from longhaul_client.answers import events_of, messages
from tests.http.conftest import Api
from tests.protocol.rows import World, a_call
from threads.models import Thread

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_snapshot_says_how_the_calls_of_the_live_run_stand(world: World, api: Api) -> None:
    kinds = [a_call(0), a_call(1), a_call(2, max_attempts=3), a_call(3, idempotent=False), a_call(4)]
    claim = world.waiting(*kinds)
    running, settled, retrying, unknown, requested = world.calls(claim.run)
    thread = world.run(claim.run)["thread_id"]
    Thread.objects.filter(pk=thread).update(owner=api.user)
    world.db.execute("UPDATE longhaul_runs_run SET owner_id = %s WHERE id = %s", api.user.pk, claim.run)
    world.call_claim(running)
    world.settle(world.call_claim(settled), result={"n": 1})
    world.retry(world.call_claim(retrying))
    world.call_reclaim(world.call_claim(unknown))
    # What an attempt before has told of itself is in the row, and is no more what its readers see.
    world.db.execute(
        "UPDATE longhaul_tools_toolcall SET progress = %s, error = %s WHERE id = %s",
        Jsonb({"fraction": 0.5, "note": "half", "attempt": 0}), Jsonb({"code": "error"}), running,
    )  # fmt: skip

    page = messages(api.get(f"/api/threads/{thread}/messages"))
    seen = Transcript(page).tool_calls
    assert page.run == str(claim.run)
    assert {id: call.status for id, call in seen.items()} == {
        str(running): "running",
        str(settled): "settled",
        str(retrying): "retrying",
        str(unknown): "unknown",
        str(requested): "requested",
    }
    # Word for word what the log says, but for what no event tells: a call that was only made.
    log: list[Event] = list(events_of(page.run)(api.get(f"/api/runs/{claim.run}/events")))
    told = Transcript().take_all(log).tool_calls
    assert {id: call for id, call in seen.items() if id in told} == told
    assert set(seen) - set(told) == {str(requested)}
    # And what comes after the cursor goes on from there.
    world.settle(world.call_claim(requested), result=2)
    more = events_of(page.run)(api.get(f"/api/runs/{claim.run}/events?after={page.seq}"))
    assert Transcript(page).take_all(more).tool_calls[str(requested)].result == 2


def test_of_a_run_that_has_ended_the_messages_say_all(world: World, api: Api) -> None:
    claim = world.waiting(a_call())
    thread = world.run(claim.run)["thread_id"]
    Thread.objects.filter(pk=thread).update(owner=api.user)
    world.cancel(claim.run)
    assert api.get(f"/api/threads/{thread}/messages")["tool_calls"] == []
