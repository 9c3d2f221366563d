"""Every function, driven from every status: exactly the edges of TRANSITIONS happen, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from uuid import UUID

import pytest

from runs.lifecycle import TRANSITIONS as RUN_TRANSITIONS
from tests.protocol.rows import POISON, Call, Claim, Database, Row, World, a_call, linger_arguments
from threads.ids import new_id
from tools.lifecycle import TRANSITIONS as CALL_TRANSITIONS

pytestmark = pytest.mark.django_db

RUN_STATUSES = ("held", "queued", "running", "waiting", "requires_action", "completed", "failed", "cancelled")
CALL_STATUSES = (
    "requested", "awaiting_approval", "running", "retrying", "awaiting_result", "awaiting_child", "unknown", "settled",
)  # fmt: skip
LIVE = RUN_STATUSES[:5]


def as_held(world: World, run: UUID) -> Claim:
    """The claim that the row names, with every value right: only the status can refuse it."""
    row = world.run(run)
    legs = world.legs(run)
    return Claim(
        run,
        row["holder"] or world.worker(),
        legs[-1]["id"] if legs else new_id(),
        row["epoch"],
        row["pending_message_id"],
    )


def commits(**options: object) -> Callable[[World, UUID], object]:
    return lambda world, run: world.try_commit(as_held(world, run), **options)  # type: ignore[arg-type]


def poisoned(world: World, run: UUID) -> None:
    world.db.execute("UPDATE longhaul_runs_run SET lost = %s WHERE id = %s", POISON - 1, run)
    world.reclaim(as_held(world, run))


def turn(world: World, run: UUID) -> None:
    world.try_turn(as_held(world, run), new_id())


def settle_its_call(world: World, run: UUID) -> None:
    for call in world.calls(run):
        row = world.tool_call(call)
        held = world.call_claim(call) if row["status"] == "requested" else Call(call, row["attempt"], new_id())
        world.settle(held)


def lose_its_call(world: World, run: UUID) -> None:
    world.db.execute("UPDATE longhaul_tools_toolcall SET idempotent = false WHERE run_id = %s", run)
    for call in world.calls(run):
        if world.tool_call(call)["status"] == "requested":
            world.call_reclaim(world.call_claim(call))


def release_its_call(world: World, run: UUID) -> None:
    for call in world.calls(run):
        world.release(call)


def lose_a_call_that_fails_its_run(world: World, run: UUID) -> None:
    world.db.execute("UPDATE longhaul_tools_toolcall SET on_unknown = 'fail' WHERE run_id = %s", run)
    lose_its_call(world, run)


def answer_its_call(world: World, run: UUID) -> None:
    for call in world.calls(run):
        world.answer(call)


ENDED = {"status": "completed", "stop_reason": "end_turn", "output": "said", "error": None}

RUN_EDGES: dict[str, tuple[Callable[[World, UUID], object], set[tuple[str, str]]]] = {
    "claim": (lambda world, run: world.try_claim(run, world.worker()), {("queued", "running")}),
    "turn_open": (turn, set()),
    "step_commit with calls": (commits(calls=[a_call()]), {("running", "waiting")}),
    "step_commit with bad calls": (
        commits(calls=[a_call(outcome="failed", error={"code": "invalid_arguments"})], bad=True),
        {("running", "queued")},
    ),
    "step_commit with neither": (commits(), set()),
    "step_commit at the end": (commits(end=ENDED), {("running", "completed")}),
    "requeue": (lambda world, run: world.requeue(as_held(world, run)), {("running", "queued")}),
    "finish failed": (lambda world, run: world.finish(as_held(world, run)), {("running", "failed")}),
    "finish completed": (
        lambda world, run: world.finish(as_held(world, run), "completed", "max_steps"),
        {("running", "completed")},
    ),
    "cancel": (lambda world, run: world.cancel(run), {(status, "cancelled") for status in LIVE} | {("held", "queued")}),
    "deadline": (
        lambda world, run: world.cancel(run, "failed", "deadline"),
        {(status, "failed") for status in LIVE} | {("held", "queued")},
    ),
    "reclaim": (lambda world, run: world.reclaim(as_held(world, run)), {("running", "queued")}),
    "reclaim as poison": (poisoned, {("running", "failed")}),
    "settle": (settle_its_call, {("waiting", "queued"), ("requires_action", "queued")}),
    "call_reclaim": (lose_its_call, {("waiting", "requires_action")}),
    "call_reclaim of what fails its run": (lose_a_call_that_fails_its_run, {("waiting", "failed")}),
    "call_release": (release_its_call, {("requires_action", "waiting")}),
    "call_answer": (answer_its_call, {("requires_action", "queued")}),
    "linger_claim": (
        lambda world, run: world.db.call("longhaul_linger_claim", **linger_arguments(as_held(world, run), True)),
        set(),
    ),
    "linger_end": (lambda world, run: world.linger_end(as_held(world, run)), set()),
    "runs_due": (lambda world, _: world.db.call_rows("longhaul_runs_due", p_limit=10), set()),
}


def run_statuses(db: Database) -> dict[UUID, str]:
    return {row["id"]: row["status"] for row in db.rows("SELECT id, status FROM longhaul_runs_run")}


@pytest.mark.parametrize("name", RUN_EDGES)
def test_a_function_takes_a_run_along_its_own_edges_only(world: World, name: str) -> None:
    move, expected = RUN_EDGES[name]
    seen = set()
    for status in RUN_STATUSES:
        # given a run in this status, and one that is held behind it when it is the cancel of an occupant
        run = world.in_status(status)
        behind = world.start(world.run(run)["thread_id"], status="held") if ("held", "queued") in expected else None
        if behind is not None and status not in LIVE:
            world.cancel(behind)
        before, rows = run_statuses(world.db), world.run(run)
        # when
        move(world, run)
        # then
        after = run_statuses(world.db)
        seen |= {(old, after[each]) for each, old in before.items() if after[each] != old}
        if status not in LIVE:
            assert world.run(run) == rows | {"lost": world.run(run)["lost"]}, "a finished run never changes"
    assert seen == expected


def test_the_edges_of_all_functions_together_are_the_transitions_of_a_run() -> None:
    together = set().union(*(edges for _, edges in RUN_EDGES.values()))
    assert together == {(str(old), str(new)) for old, news in RUN_TRANSITIONS.items() for new in news}


def call_as_held(world: World, call: UUID) -> Call:
    row = world.tool_call(call)
    return Call(call, row["attempt"], row["holder"] or world.worker())


def reclaims(changes: str, *, began: bool = True) -> Callable[[World, UUID], object]:
    def move(world: World, call: UUID) -> None:
        held = call_as_held(world, call)
        world.db.execute(f"UPDATE longhaul_tools_toolcall SET {changes} WHERE id = %s", call)
        world.call_reclaim(held, began=began)

    return move


CALL_EDGES: dict[str, tuple[Callable[[World, UUID], object], set[tuple[str, str]]]] = {
    "claim": (lambda world, call: world.try_call_claim(call), {("requested", "running"), ("retrying", "running")}),
    "settle": (
        lambda world, call: world.settle(call_as_held(world, call)),
        {("running", "settled"), ("unknown", "settled")},
    ),
    "retry": (lambda world, call: world.retry(call_as_held(world, call)), {("running", "retrying")}),
    "reclaim": (reclaims("idempotent = NULL"), {("running", "retrying")}),
    "reclaim of a call that must not run twice": (reclaims("idempotent = false"), {("running", "unknown")}),
    "reclaim without attempts left": (
        reclaims("idempotent = NULL, max_attempts = attempt"),
        {("running", "settled")},
    ),
    "reclaim past its time": (
        reclaims("idempotent = false, timeout_at = longhaul_now() - interval '1 second'"),
        {("running", "settled")},
    ),
    "given back before it began": (
        reclaims("idempotent = false, max_attempts = attempt", began=False),
        {("running", "retrying")},
    ),
    "reclaim of a call of which the model is told": (
        reclaims("idempotent = false, on_unknown = 'tell_model'"),
        {("running", "settled")},
    ),
    "reclaim of a call that fails its run": (
        reclaims("idempotent = false, on_unknown = 'fail'"),
        {("running", "settled")},
    ),
    "a person's answer": (lambda world, call: world.answer(call), {("unknown", "settled")}),
    "a person's release": (lambda world, call: world.release(call), {("unknown", "retrying")}),
    "its cancel": (
        lambda world, call: world.answer(call, "cancelled", among=CALL_STATUSES),
        {(status, "settled") for status in CALL_STATUSES if status != "settled"},
    ),
    "the end of its run": (
        lambda world, call: world.cancel(world.tool_call(call)["run_id"]),
        {(status, "settled") for status in CALL_STATUSES if status != "settled"},
    ),
    "calls_due": (lambda world, _: world.db.call_rows("longhaul_calls_due", p_limit=10), set()),
}
CALL_EDGES_LATER = {
    ("running", "awaiting_approval"), ("running", "awaiting_result"), ("running", "awaiting_child"),
    ("awaiting_approval", "requested"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALL_EDGES)
def test_a_function_takes_a_call_along_its_own_edges_only(world: World, name: str) -> None:
    move, expected = CALL_EDGES[name]
    seen = set()
    for status in CALL_STATUSES:
        call = world.call_in_status(status)
        before = world.tool_call(call)
        move(world, call)
        after = world.tool_call(call)
        if after["status"] != status:
            seen.add((status, after["status"]))
        elif status == "settled":
            assert after["outcome"] == before["outcome"]
            assert after["result"] == before["result"]
    assert seen == expected


def test_the_edges_of_all_functions_together_are_the_transitions_of_a_call() -> None:
    together = set().union(*(edges for _, edges in CALL_EDGES.values()))
    assert together | CALL_EDGES_LATER == {
        (str(old), str(new)) for old, news in CALL_TRANSITIONS.items() for new in news
    }


def test_given_a_run_whose_calls_all_came_settled_when_it_commits_then_it_is_joined_at_once(world: World) -> None:
    """Also when the caller does not say that they are bad: a run that waits for nothing would wait for ever."""
    claim = world.running()
    bad = [a_call(i, outcome="failed", error={"code": "unknown_tool"}) for i in range(2)]
    answer = world.commit(claim, bad, bad=False)
    assert answer["status"] == "queued"
    assert answer["dispatch_seq"] == world.run(claim.run)["dispatch_seq"]
    assert [message["role"] for message in world.messages(world.run(claim.run)["thread_id"])] == [
        "user", "assistant", "tool", "tool",
    ]  # fmt: skip


def test_given_good_and_bad_calls_in_one_step_then_the_run_waits_for_the_good_ones(world: World) -> None:
    claim = world.running()
    good = a_call(1)
    answer = world.commit(claim, [a_call(0, outcome="failed", error={"code": "unknown_tool"}), good])
    assert answer["status"] == "waiting"
    waiting = next(event for event in world.events(claim.run) if event["type"] == "run.waiting")
    assert waiting["payload"]["tool_calls"] == [good["id"]]
    [call] = [call for call in world.calls(claim.run) if world.tool_call(call)["status"] == "requested"]
    answer = world.settle(world.call_claim(call)) or {}
    assert answer["status"] == "queued"


def test_given_a_step_with_neither_calls_nor_an_end_then_the_leg_goes_on(world: World) -> None:
    """Input to take in, or an answer that does not validate: the next turn is opened under the same claim."""
    claim = world.running()
    nothing: list[Row] = []
    for calls in (None, nothing):
        answer = world.commit(claim, calls)
        assert answer["status"] == "running"
        claim = world.turn(claim)
    world.end(claim)
    assert world.run(claim.run)["steps"] == 3


def test_given_a_turn_that_is_open_when_another_is_opened_then_it_is_refused(world: World) -> None:
    """Else the first message would be pending for ever."""
    claim = world.running()
    before = world.dump()
    assert world.try_turn(replace(claim), new_id()) is None
    assert world.dump() == before


def test_given_a_limit_when_a_turn_is_opened_then_it_is_named_and_nothing_changes(world: World) -> None:
    claim = world.claim(world.start())
    world.db.execute(
        "UPDATE longhaul_runs_run SET input_tokens = 6, output_tokens = 4, cost = 0.5 WHERE id = %s", claim.run
    )
    before = world.dump()
    assert world.try_turn(claim, new_id(), p_max_steps=0) == {"limit": "max_steps"}
    assert world.try_turn(claim, new_id(), p_max_tokens=10) == {"limit": "token_budget"}
    assert world.try_turn(claim, new_id(), p_max_cost=0) == {"limit": "cost_budget"}
    assert world.dump() == before
    world.db.execute("UPDATE longhaul_runs_run SET deadline = longhaul_now() WHERE id = %s", claim.run)
    assert world.try_turn(claim, new_id(), p_max_steps=0) == {"limit": "deadline"}
    world.db.execute(
        "UPDATE longhaul_runs_run SET deadline = longhaul_now() + %s WHERE id = %s", timedelta(1), claim.run
    )
    assert world.try_turn(claim, new_id(), p_max_tokens=11, p_max_steps=None, p_max_cost=None)
