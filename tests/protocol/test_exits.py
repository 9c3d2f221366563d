"""Every exit from `running` is one transaction that leaves nothing behind, and says so before a terminal event."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from tests.protocol.rows import POISON, SECOND, Claim, World, a_call

pytestmark = pytest.mark.django_db

TERMINAL = ("run.completed", "run.failed", "run.cancelled")


def poison(world: World, claim: Claim) -> None:
    world.db.execute("UPDATE longhaul_runs_run SET lost = %s WHERE id = %s", POISON - 1, claim.run)
    world.reclaim(claim)


# what is called, the reason of leg.ended, and what the log says after the text so far
EXITS: dict[str, tuple[Callable[[World, Claim], Any], str, list[str]]] = {
    "step with calls": (
        lambda world, claim: world.commit(claim, [a_call()]),
        "tools", ["message.completed", "run.waiting", "leg.ended"],
    ),
    "step with bad calls": (
        lambda world, claim: world.commit(claim, [a_call(outcome="failed")], bad=True),
        "tools", ["message.completed", "run.waiting", "leg.ended", "message.completed", "run.queued"],
    ),
    "step that ends": (
        lambda world, claim: world.end(claim), "finished", ["message.completed", "leg.ended", "run.completed"],
    ),
    "budget": (lambda world, claim: world.requeue(claim), "budget", ["message.discarded", "leg.ended", "run.queued"]),
    "drained": (
        lambda world, claim: world.requeue(claim, "drained"),
        "drained", ["message.discarded", "leg.ended", "run.queued"],
    ),
    "retry": (
        lambda world, claim: world.requeue(claim, "retry", delay=5 * SECOND, error={"code": "server"}),
        "retry", ["error", "message.discarded", "leg.ended", "run.queued"],
    ),
    "reclaim": (lambda world, claim: world.reclaim(claim), "lost", ["message.discarded", "leg.ended", "run.queued"]),
    "poison": (poison, "lost", ["message.discarded", "leg.ended", "run.failed"]),
    "finish failed": (
        lambda world, claim: world.finish(claim), "failed", ["message.discarded", "leg.ended", "run.failed"],
    ),
    "cancel": (
        lambda world, claim: world.cancel(claim.run),
        "cancelled", ["message.completed", "leg.ended", "run.cancelled"],
    ),
    "deadline": (
        lambda world, claim: world.cancel(claim.run, "failed", "deadline"),
        "failed", ["message.discarded", "leg.ended", "run.failed"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("exits", EXITS.values(), ids=EXITS)
def test_given_a_leg_that_speaks_when_it_leaves_running_then_nothing_is_left(
    world: World, exits: tuple[Callable[[World, Claim], Any], str, list[str]]
) -> None:
    leave, reason, told = exits
    claim = world.running()
    world.speak(claim, "so ", "far")
    last = world.run(claim.run)["last_seq"]
    # when
    leave(world, claim)
    # then
    run = world.run(claim.run)
    assert (run["pending_message_id"], run["holder"], run["leg_deadline"], run["linger_until"]) == (None,) * 4
    assert world.message(claim.message)["status"] != "pending"
    [leg] = world.legs(claim.run)
    assert (leg["reason"], leg["ended_at"] is not None) == (reason, True)
    events = world.events(claim.run, last)
    assert [event["type"] for event in events] == told
    ended = next(event for event in events if event["type"] == "leg.ended")
    assert ended["payload"] == {"leg": 1, "epoch": claim.epoch, "worker": "agents@a", "reason": reason}
    if run["status"] in ("completed", "failed", "cancelled"):
        assert run["next_publish_at"] is None
        assert run["finished_at"] is not None
        assert events[-1]["payload"]["stop_reason"] == run["stop_reason"]
    elif run["status"] == "queued":
        assert run["next_publish_at"] is not None


def test_given_a_leg_at_a_boundary_when_it_leaves_running_then_no_message_is_spoken_of(world: World) -> None:
    for leave in (world.requeue, world.reclaim, world.finish, lambda claim: world.cancel(claim.run)):
        claim = world.claim(world.start())
        leave(claim)
        assert not [event for event in world.types(claim.run) if event.startswith("message.")]


def test_given_a_retry_when_it_is_put_off_then_it_counts_a_try_and_is_not_published_yet(world: World) -> None:
    claim = world.running()
    answer = (
        world.requeue(claim, "retry", delay=5 * SECOND, usage={"model": "m", "input_tokens": 7, "output_tokens": 1})
        or {}
    )
    run = world.run(claim.run)
    assert answer["dispatch_seq"] is None, "there is nothing to publish yet"
    assert run["not_before"] == run["next_publish_at"] == run["queued_at"] + 5 * SECOND
    assert (run["publishes"], run["model_tries"], run["lost"], run["retry_since"]) == (0, 1, 0, run["queued_at"])
    assert (run["input_tokens"], run["output_tokens"]) == (7, 1)
    [usage] = world.db.rows("SELECT * FROM longhaul_runs_usage")
    assert (usage["discarded"], usage["message_id"]) == (True, claim.message)


def test_given_tries_of_the_model_when_a_step_is_committed_then_their_count_begins_anew(world: World) -> None:
    claim = world.running()
    world.requeue(claim, "retry")
    claim = world.turn(world.claim(claim.run))
    world.requeue(claim, "budget")
    assert world.run(claim.run)["model_tries"] == 1
    claim = world.turn(world.claim(claim.run))
    world.commit(claim, [a_call()], usage={"model": "m", "input_tokens": 5, "output_tokens": 2, "cost": 0.25})
    run = world.run(claim.run)
    assert (run["model_tries"], run["retry_since"]) == (0, None)
    assert (run["input_tokens"], run["output_tokens"], float(run["cost"])) == (5, 2, 0.25)
    [usage] = world.db.rows("SELECT * FROM longhaul_runs_usage")
    assert (usage["step"], usage["discarded"]) == (1, False)


def test_given_usage_in_the_last_step_then_the_terminal_event_counts_it(world: World) -> None:
    claim = world.running()
    world.requeue(claim, "retry", usage={"model": "m", "input_tokens": 1})
    claim = world.turn(world.claim(claim.run))
    usage = {"model": "m", "input_tokens": 5, "output_tokens": 2, "cost": 0.25}
    world.commit(claim, end={"status": "completed", "stop_reason": "end_turn", "output": "said"}, usage=usage)
    last = world.events(claim.run)[-1]["payload"]
    assert last["usage"] == {"input_tokens": 6, "output_tokens": 2, "cost": 0.25}
    assert (last["output"], last["error"], world.run(claim.run)["error"]) == ("said", None, None)


def test_given_bad_steps_in_a_row_then_they_are_counted_until_a_good_one(world: World) -> None:
    claim = world.running()
    for times in (1, 2):
        world.commit(claim, [a_call(outcome="failed")], bad=True)
        assert world.run(claim.run)["bad_calls"] == times
        claim = world.turn(world.claim(claim.run))
    world.commit(claim, [a_call()])
    assert world.run(claim.run)["bad_calls"] == 0


def test_given_the_last_allowed_step_commits_calls_when_it_ends_the_run_then_they_are_answered(world: World) -> None:
    claim = world.running()
    world.commit(
        claim, [a_call(0), a_call(1)], end={"status": "failed", "stop_reason": "token_budget", "error": {"code": "x"}}
    )
    run = world.run(claim.run)
    assert (run["status"], run["error"]) == ("failed", {"code": "x"})
    assert {world.tool_call(call)["outcome"] for call in world.calls(claim.run)} == {"cancelled"}
    assert [one["role"] for one in world.messages(run["thread_id"])] == ["user", "assistant", "tool", "tool"]


def test_given_a_turn_when_it_is_opened_then_its_message_has_a_place_and_the_leg_a_deadline(world: World) -> None:
    claim = world.claim(world.start())
    turn = world.turn(claim, p_model_time=timedelta(seconds=90))
    run, message = world.run(claim.run), world.message(turn.message)
    assert (message["status"], message["position"], message["step"], message["role"]) == ("pending", 2, 1, "assistant")
    assert run["leg_deadline"] == message["created_at"] + timedelta(seconds=90)
    assert world.events(claim.run)[-1]["message_id"] == turn.message


def test_given_messages_saved_by_hand_while_a_run_works_then_they_come_in_at_its_boundary(world: World) -> None:
    """Never between a call and its result."""
    claim = world.running()
    thread = world.run(claim.run)["thread_id"]
    world.commit(claim, [a_call()])
    first, second = (world.say(thread, text, waiting=True) for text in ("one", "two"))
    [call] = world.calls(claim.run)
    world.settle(world.call_claim(call))
    assert [one["role"] for one in world.messages(thread)] == ["user", "assistant", "tool"]
    claim = world.turn(world.claim(claim.run))
    assert [one["id"] for one in world.messages(thread)][3:] == [first, second, claim.message]
    assert world.types(claim.run)[-3:] == ["message.completed", "message.completed", "message.created"]


def test_given_messages_saved_by_hand_when_the_run_ends_then_they_have_a_place(world: World) -> None:
    for leave in (world.end, world.finish, lambda claim: world.cancel(claim.run)):
        claim = world.running()
        thread = world.run(claim.run)["thread_id"]
        saved = world.say(thread, "by hand", waiting=True)
        leave(claim)
        last = world.message(saved)
        assert (last["status"], last["position"], last["run_id"]) == ("completed", 3, None)
        assert world.types(claim.run)[-1] in TERMINAL
        assert str(saved) in {event["payload"].get("message") for event in world.events(claim.run)}


def test_given_a_run_that_saves_nothing_when_another_reads_the_thread_then_only_its_input_shows(world: World) -> None:
    thread = world.thread()
    claim = world.turn(world.claim(world.start(thread, save_mode="none", text="first")))
    world.commit(claim, [a_call()])
    [call] = world.calls(claim.run)
    world.settle(world.call_claim(call))
    own = world.try_turn(claim := world.claim(claim.run), claim.leg) or {}
    assert [one[2] for one in own["context"]] == ["user", "assistant", "tool"]
    world.cancel(claim.run)
    second = world.try_turn(later := world.claim(world.start(thread, text="second")), later.leg) or {}
    assert [one[3][0]["text"] for one in second["context"]] == ["first", "second"]


def test_given_a_long_thread_when_a_turn_is_opened_then_the_last_messages_and_the_runs_own_input_are_shown(
    world: World,
) -> None:
    thread = world.thread()
    for i in range(4):
        world.say(thread, f"old {i}")
    claim = world.claim(world.start(thread, text="input"))
    for _ in range(3):
        claim = world.turn(claim)
        world.commit(claim)
    answer = world.try_turn(claim, claim.leg, p_limit=2) or {}
    assert [one[1] for one in answer["context"]] == [7, 8]
    assert [one[3][0]["text"] for one in answer["pinned"]] == ["input"]
    world.cancel(claim.run)
    claim = world.claim(world.start(thread))
    answer = world.try_turn(claim, claim.leg, p_after=6) or {}
    assert [one[1] for one in answer["context"]] == [7, 8, 10]
    assert answer["pinned"] is None


@pytest.mark.parametrize("reason", ["budget", "drained"])
def test_given_a_leg_that_hands_over_then_it_counts_no_try_of_the_model(world: World, reason: str) -> None:
    claim = world.running()
    world.requeue(claim, reason)
    run = world.run(claim.run)
    assert (run["status"], run["model_tries"], run["retry_since"]) == ("queued", 0, None)
