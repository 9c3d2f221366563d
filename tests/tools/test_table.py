"""Every cell of the table of docs/tools.md, tried: a call is brought into the status, the event happens, the rows are compared.

A call gets where it is by the engine, the worker's code and the sweep, on real rows; what wait for later issues (approvals,
deferred results, child runs) are put there by hand. A claim and the rest of an attempt are the two halves of
`execution.execute`, so that something can happen between them. After each cell no invariant is broken, and the log tells
what the tables hold. With processes that are killed and stopped: tests/workers/test_deaths.py, tests/workers/test_calls.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from django.db import transaction
from django.db.models import F
from pytest_django.plugin import DjangoDbBlocker

from runs import Agent, agents, engine, invariants, sweep
from runs.models import Event, Run
from runs.pytest_longhaul import ScriptedModel, WorkerKilled, call, move_clock, scripted
from runs.testing.inline_worker import working
from runs.verification import verify_all
from tests.tools.table import LATER, Cell, cells
from threads import database
from threads.clock import Now
from threads.models import Thread
from tools import ModelRetry, RetryPolicy, ToolContext, ToolFailed, execution, presence, tool
from tools import tasks as tool_tasks
from tools.exceptions import AlreadySettled, NotAwaited
from tools.models import ToolAttempt, ToolCall, Worker

pytestmark = pytest.mark.django_db  # without a test that says so there is no database

TIMEOUT, DEADLINE = timedelta(seconds=60), timedelta(seconds=30)
STOPPED = timedelta(seconds=10)  # without a beat: longer than a claim allows, shorter than makes a worker dead
PEOPLE = ("unknown", "awaiting_approval", "awaiting_result")
WRITTEN = "written by the tool"


class Body:
    """What the tools do next."""

    raises: BaseException | None = None


def _work(ctx: ToolContext) -> str:
    ctx.thread.title = WRITTEN
    ctx.thread.save(update_fields=["title"])
    if Body.raises is not None:
        raise Body.raises
    return "done"


def _tool(kind: str, **options: Any) -> Any:
    retry: dict[str, Any] = (
        {} if options.get("idempotent") is False else {"retry": RetryPolicy(2, initial_seconds=5, jitter=False)}
    )
    name = kind.replace(", ", "_")
    return tool(name=name, description="Work.", timeout_seconds=TIMEOUT.total_seconds(), **retry, **options)(_work)


TOOLS = {
    "plain": _tool("plain"),
    "idempotent": _tool("idempotent", idempotent=True),
    "atomic": _tool("atomic", atomic=True),
    "once": _tool("once", idempotent=False),
    "once, told": _tool("once, told", idempotent=False, on_unknown="tell_model"),
    "once, fails": _tool("once, fails", idempotent=False, on_unknown="fail"),
}
AGENT = Agent(name="the table of calls", model="scripted:table", tools=list(TOOLS.values()))


class Scene:
    """A run whose only call is tried, and the workers that had an attempt of it, in turn."""

    def __init__(self, cell: Cell, present: Any, model: ScriptedModel) -> None:
        self.cell = cell
        self.workers: list[presence.Presence] = []
        self.claimed: list[execution.Claimed] = []
        model.say(call(TOOLS[cell.kind].name))
        limits = {"deadline_seconds": DEADLINE.total_seconds()} if cell.event == "run failed" else {}
        self.run = AGENT.start("Go.", limits=limits)
        engine.advance(self.run.pk, 1, engine.Process(present))
        self.call = ToolCall.objects.get(run_id=self.run.pk)

    # --- what workers do

    def worker(self) -> presence.Presence:
        """A worker of its own, present by its row."""
        made = presence.Presence(name=f"tools-{len(self.workers)}@table", kind="tools")
        Worker.objects.create(id=made.id, name=made.name, kind="tools", host="here", pid=0, lock_key=made.life.lock_key)
        self.workers.append(made)
        return made

    def claim(self) -> None:
        """Another worker claims the call."""
        self.call.refresh_from_db()
        claimed = execution._claim(self.call.pk, self.call.attempt, presence=self.worker(), task_id="", alone=False)
        assert claimed is not None
        self.claimed.append(claimed)

    def goes_on(self, claimed: execution.Claimed | None = None, raises: BaseException | None = None) -> None:
        """The rest of an attempt: the tool, and its settlement."""
        Thread.objects.filter(pk=self.run.thread_id).update(title="")
        Body.raises = raises
        try:
            execution._run(claimed or self.claimed[-1])
        finally:
            Body.raises = None

    def nobodys(self, attempt: int) -> execution.Claimed:
        """What a worker would hold that claimed this attempt, which none did."""
        answer: dict[str, Any] = {
            "agent": AGENT.name, "name": self.call.name, "arguments": {}, "thread": str(self.run.thread_id), "owner": None,
            "message": str(self.call.message_id), "step": 1, "idempotency_key": "", "atomic": self.call.atomic,
            "max_attempts": 2, "timeout_at": "2026-11-21T12:00:00Z",
        }  # fmt: skip
        return execution.Claimed(self.call.pk, self.run.pk, attempt, self.call.pk, self.worker().id, answer)

    def die(self) -> None:
        """The worker of the last attempt is gone, and the sweep has seen it."""
        if self.workers:
            Worker.objects.filter(pk=self.workers[-1].id).update(
                gone_at=Now(), beat_at=F("beat_at") - timedelta(hours=1)
            )
        swept()

    def message(self, worker: presence.Presence, redelivered: bool = False) -> None:
        """The call's message reaches a worker, which dies in the tool if it gets so far."""
        attempt = ToolCall.objects.filter(pk=self.call.pk).values_list("attempt", flat=True).first()
        Body.raises = WorkerKilled()
        task: Any = tool_tasks.execute_call
        task.push_request(id="t", delivery_info={"redelivered": redelivered})
        before, presence.current = presence.current, worker
        try:
            with suppress(WorkerKilled):
                task.run(str(self.call.pk), attempt or self.call.attempt)
        finally:
            presence.current = before
            task.pop_request()
            Body.raises = None

    # --- looks

    def now(self) -> dict[str, Any]:
        """All that the rows say of the call and its run."""
        return {
            "call": ToolCall.objects.filter(pk=self.call.pk).values().first(),
            "attempts": list(ToolAttempt.objects.filter(call=self.call.pk).order_by("number").values()),
            "run": Run.objects.filter(pk=self.run.pk).values().first(),
            "events": [event.type for event in Event.objects.filter(run=self.run.pk).order_by("seq")],
        }


def swept() -> None:
    sweep.Sweep(patient=False, publishes=False).sweep()


# --- ways into a status ---------------------------------------------------------------------------------------------


def running(scene: Scene) -> None:
    scene.claim()


def retrying(scene: Scene) -> None:
    running(scene)
    scene.die()


def last_attempt(scene: Scene) -> None:
    retrying(scene)
    scene.claim()
    assert scene.call.attempt == scene.call.max_attempts


def put_off(scene: Scene) -> None:
    running(scene)
    scene.goes_on(raises=ConnectionError("not now"))


def settled(scene: Scene) -> None:
    running(scene)
    scene.goes_on()


def taken_over(scene: Scene) -> None:
    retrying(scene)
    scene.claim()


def taken_over_and_settled(scene: Scene) -> None:
    taken_over(scene)
    scene.goes_on()


def cancelled_while_it_ran(scene: Scene) -> None:
    running(scene)
    scene.call.cancel()


def answered_by_a_person(scene: Scene) -> None:
    retrying(scene)
    scene.call.succeed("I saw it")


def by_hand(status: str) -> Callable[[Scene], None]:
    def put(scene: Scene) -> None:
        ToolCall.objects.filter(pk=scene.call.pk).update(status=status, next_publish_at=None)
        database.call("SELECT longhaul_calls_changed(%s::uuid)", (scene.run.pk,))

    return put


WAYS: dict[str, Callable[[Scene], None]] = {
    "requested": lambda scene: None,
    "running": running,
    "retrying": retrying,
    "unknown": retrying,  # of a tool that must not run twice
    "settled": settled,
    **{status: by_hand(status) for status in LATER},
    "last attempt": last_attempt,
    "put off": put_off,
    "taken": retrying,
    "taken over": taken_over,
    "taken over and settled": taken_over_and_settled,
    "cancelled while it ran": cancelled_while_it_ran,
    "answered by a person": answered_by_a_person,
    "held by the dead": running,
}

# --- the events -----------------------------------------------------------------------------------------------------


def _attempt(scene: Scene) -> execution.Claimed:
    """The attempt that runs or ran last; of a call that waits for a worker, the one that none has claimed."""
    held = scene.cell.status in ("running", "unknown", "settled")
    return scene.claimed[-1] if held else scene.nobodys(scene.call.attempt)


def fail(scene: Scene) -> None:
    errors: dict[str, BaseException] = {
        "raises `ToolFailed`": ToolFailed("No."),
        "raises `ModelRetry`": ModelRetry("Not so."),
    }
    scene.goes_on(_attempt(scene), errors.get(scene.cell.rule.case, ConnectionError("refused")))


def time_out(scene: Scene) -> None:
    if scene.cell.rule.case.startswith("the soft limit"):
        scene.goes_on(raises=SoftTimeLimitExceeded())
    else:
        move_clock(TIMEOUT + sweep.OVERDUE_GRACE + timedelta(seconds=1))
        swept()


def zombie_wakes(scene: Scene) -> None:
    if not scene.workers:
        scene.worker()
    stopped = scene.workers[0]
    Worker.objects.filter(pk=stopped.id, gone_at=None).update(beat_at=F("beat_at") - STOPPED)
    scene.message(stopped)
    if scene.claimed:
        scene.goes_on(scene.claimed[0])


def doubled_message(scene: Scene) -> None:
    redelivered = scene.cell.rule.given == "held by the dead"
    if scene.cell.status in ("requested", "retrying"):
        scene.message(scene.worker())
    scene.message(scene.worker(), redelivered)


def deadline(scene: Scene) -> None:
    move_clock(DEADLINE + timedelta(seconds=1))
    swept()


def deleted(scene: Scene) -> None:
    scene.run.thread.delete()
    scene.message(scene.worker()) if not scene.claimed else scene.goes_on()


FIRE: dict[str, Callable[[Scene], object]] = {
    "claim": lambda scene: scene.message(scene.worker()),
    "settle": lambda scene: scene.goes_on(_attempt(scene)),
    "fail": fail,
    "time out": time_out,
    "cancel": lambda scene: scene.call.cancel("enough"),
    "worker death": lambda scene: scene.die(),
    "zombie wakes": zombie_wakes,
    "late result": lambda scene: scene.goes_on(scene.claimed[0] if scene.claimed else scene.nobodys(1)),
    "doubled message": doubled_message,
    "run cancelled": lambda scene: scene.run.cancel("enough"),
    "run failed": deadline,
    "thread deleted": deleted,
    "result": lambda scene: scene.call.succeed({"sent": 1}),
    "error": lambda scene: scene.call.fail("The bank refused it."),
    "run again": lambda scene: scene.call.fail("The bank knows of none.", retryable=True),
}


class Heard(logging.Handler):
    """What the worker's code logs."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(str(getattr(record, "action", record.getMessage())))

    def refused(self) -> bool:
        return "call.late" in self.said or any("this worker has not beaten" in each for each in self.said)


@dataclass
class Played:
    """What a cell came to."""

    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    answer: str = ""
    written: bool = False
    run: UUID | None = None
    raised: BaseException | None = None
    broken: list[str] = field(default_factory=list)  # invariants, and differences between the log and the tables


def play(cell: Cell, present: Any, model: ScriptedModel, heard: Heard) -> Played:
    played = Played()
    try:
        with transaction.atomic():
            present.beat()
            # given
            scene = Scene(cell, present, model)
            WAYS[cell.rule.given or cell.status](scene)
            scene.call.refresh_from_db()
            scene.run.refresh_from_db()
            played.before, played.run = scene.now(), scene.run.pk
            # when
            heard.said.clear()
            try:
                FIRE[cell.event](scene)
            except (AlreadySettled, NotAwaited) as error:
                played.answer = error.code
            if heard.refused():
                played.answer = "refused"
            played.after = scene.now()
            played.written = Thread.objects.filter(pk=scene.run.thread_id, title=WRITTEN).exists()
    except Exception as error:
        played.raised = error
    return played


@pytest.fixture(scope="module")
def table(
    request: pytest.FixtureRequest, django_db_setup: None, django_db_blocker: DjangoDbBlocker
) -> Iterator[dict[Cell, Played]]:
    """Every cell that is asked for, played one after another in one transaction, and the invariants looked at once.

    A look at all of them costs three times what a cell does.
    """
    items: list[Any] = request.session.items
    wanted = [item.callspec.params["cell"] for item in items if "table" in getattr(item, "fixturenames", ())]
    heard, logger = Heard(), logging.getLogger("longhaul.tools")
    agents.registry.add(AGENT)
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(heard)
    try:
        with django_db_blocker.unblock(), transaction.atomic():
            with scripted() as model, working() as present:
                played = {cell: play(cell, present, model, heard) for cell in wanted}
            runs = {each.run: each for each in played.values()}
            for found in invariants.check().findings:
                if "waits for a child" not in found["rule"]:  # there is none: the status was put there by hand
                    runs[UUID(found["run"] or "")].broken.append(f"{found['rule']} {found['what']}")
            for report in verify_all():
                runs[report.run].broken += map(str, report.differences)
            transaction.set_rollback(True)
        yield played
    finally:
        logger.removeHandler(heard)
        logger.setLevel(before)
        agents.registry._agents.pop(AGENT.name)


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id=str(cell), marks=[pytest.mark.slow] if cell.repeats else []) for cell in cells()],
)
def test_the_table(cell: Cell, table: dict[Cell, Played]) -> None:
    rule, played = cell.rule, table[cell]
    if played.raised is not None:
        raise played.raised
    before, after = played.before, played.after
    assert before["call"]["status"] == cell.status
    if rule.to == "deleted":
        assert after == {"call": None, "attempts": [], "run": None, "events": []}
        assert played.answer == ("refused" if cell.status in ("running", "retrying", "unknown", "settled") else "")
        return
    assert played.answer == (rule.answer if rule.answer != "dropped" else "")
    if not rule.to:
        assert after == before
    else:
        changed(cell, before, after)
    if rule.effect is not None and cell.kind == "atomic":
        assert played.written == rule.effect
    assert not [each for each in played.broken if cell.status not in LATER or not each.startswith("tool call")]


def changed(cell: Cell, before: dict[str, Any], after: dict[str, Any]) -> None:
    """The call is as the rule says; its run follows from that, and the log tells of both."""
    rule, row = cell.rule, after["call"]
    assert (row["status"], row["outcome"], (row["error"] or {}).get("code", "")) == (
        rule.to, rule.outcome, rule.code or ("error" if cell.event == "fail" and rule.to == "retrying" else
                                             "released" if rule.attempt == "released" else ""),
    )  # fmt: skip
    settles = rule.to == "settled" and cell.status != "settled"
    told = [*rule.events, *(["message.completed"] if settles else [])]
    run = rule.run or ("queued" if settles else "requires_action" if rule.to in PEOPLE else "waiting")
    assert after["run"]["status"] == run
    if run != before["run"]["status"]:
        told.append(f"run.{run}")
    assert after["events"][len(before["events"]) :] == told
    tried = [each["outcome"] for each in before["attempts"]]
    if "tool_call.retrying" in rule.events and "tool_call.started" in rule.events:
        tried[-1:] = ["lost", ""]
    elif "tool_call.started" in rule.events:
        tried.append("")
    elif rule.attempt:
        tried[-1] = rule.attempt
    assert [each["outcome"] for each in after["attempts"]] == tried
    assert [each["ended_at"] is None for each in after["attempts"]] == [not each for each in tried]
