"""Runs in every state, brought there by the engine, and one way to break each rule of `runs/invariants.sql`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runs import Agent, agents, engine, lifecycle
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, call, run_to_end
from runs.testing.inline_worker import working
from threads.ids import new_id
from tools import ToolFailed, tool
from tools import execution as tool_execution
from tools import lifecycle as tool_lifecycle
from tools.models import ToolCall


@tool(idempotent=True)
def look_up(number: int) -> dict[str, int]:
    """Look an order up."""
    return {"number": number}


@tool(idempotent=False)
def refund(number: int) -> str:
    """Refund an order."""
    if number == 13:
        raise ToolFailed("Not this one.")
    return f"refunded {number}"


clerk = Agent(name="clerk of the invariants", model="scripted:clerk", tools=[look_up, refund])
agents.registry.add(clerk)


class State:
    """A run in each state that the checks tell apart, made by the engine and the SQL functions."""

    def __init__(self, model: ScriptedModel) -> None:
        self.model = model

    def queued(self) -> Run:
        return clerk.start("Where are my orders?")

    def held(self) -> Run:
        before = self.queued()
        return clerk.start("And another thing.", thread=before.thread)

    def preparing(self) -> Run:
        """Claimed, before its turn is opened."""
        run = self.queued()
        with working() as present:
            answer = lifecycle.claim(
                run.pk, run.dispatch_seq, worker=present.id, worker_name="agents@a", task_id="", leg=new_id()
            )
            assert answer["epoch"] == 1
        return run

    def running(self) -> Run:
        """Its model is asked, and has said something."""
        run = self.queued()
        with working() as present:
            worker = present.id
            lifecycle.claim(run.pk, 1, worker=worker, worker_name="agents@a", task_id="", leg=new_id())
            message = new_id()
            turn = (message, engine.MARGIN, 0, 100, 10, lifecycle.UNLIMITED_TOKENS, lifecycle.UNLIMITED_COST)
            lifecycle.open_turn(run.pk, 1, worker, turn)
            buffer = engine.Buffer(run.pk, 1, message) if False else None
            assert buffer is None
        return run

    def waiting(self) -> Run:
        """For two calls that nobody has taken yet."""
        run = self.queued()
        self.model.say(["I look.", call("look_up", number=1), call("refund", number=2)])
        with working() as present:
            engine.advance(run.pk, run.dispatch_seq, engine.Process(present))
        run.refresh_from_db()
        assert run.status == "waiting"
        return run

    def calling(self) -> Run:
        """Its first call is settled, its second one runs."""
        run = self.waiting()
        first, second = ToolCall.objects.filter(run_id=run.pk).order_by("index")
        with working() as present:
            tool_execution.execute(first.pk, 1, presence=present)
            tool_lifecycle.claim(second.pk, 1, worker=present.id, worker_name="tools@a", task_id="", alone=False)
        return run

    def unknown(self) -> Run:
        """Its second call may have had its effect, or not: nobody knows."""
        run = self.calling()
        second = ToolCall.objects.get(run_id=run.pk, index=1)
        assert second.holder is not None
        tool_lifecycle.reclaim(second.pk, 1, holder=second.holder)
        return run

    def retrying(self) -> Run:
        """Its first call runs again, for its worker was lost."""
        run = self.waiting()
        first = ToolCall.objects.filter(run_id=run.pk).order_by("index")[0]
        with working() as present:
            tool_lifecycle.claim(first.pk, 1, worker=present.id, worker_name="tools@a", task_id="", alone=False)
            tool_lifecycle.reclaim(first.pk, 1, holder=present.id)
        return run

    def joined(self) -> Run:
        """Both calls are settled, so it is queued again."""
        run = self.waiting()
        with working() as present:
            for each in ToolCall.objects.filter(run_id=run.pk).order_by("-index"):
                tool_execution.execute(each.pk, 1, presence=present)
        return run

    def reclaimed(self) -> Run:
        run = self.running()
        run.refresh_from_db()
        assert run.holder is not None
        lifecycle.reclaim(run.pk, run.epoch, run.holder)
        return run

    def handed_over(self) -> Run:
        run = self.running()
        run.refresh_from_db()
        assert run.holder is not None
        lifecycle.requeue(run.pk, run.epoch, run.holder, "budget")
        return run

    def completed(self) -> Run:
        """Two steps, two calls, two legs."""
        run = self.queued()
        self.model.say(["I look.", call("look_up", number=1), call("refund", number=2)], "Here they are.")
        return run_to_end(run)

    def failed(self) -> Run:
        run = self.queued()
        self.model.say(*[call("nothing_like_this", number=1)] * 5)
        return run_to_end(run)

    def cancelled(self) -> Run:
        """In the middle of a call."""
        return self.calling().cancel("enough")

    def cancelled_speaking(self) -> Run:
        return self.running().cancel()


STATES = [name for name in vars(State) if not name.startswith("_")]


@dataclass(frozen=True)
class Corruption:
    """SQL that breaks one rule (`rule`: words of it) of a run in `state`, and the invariants that it breaks.

    %(run)s is the run. `without`: constraints of the tables that would refuse it.
    """

    invariants: str
    rule: str
    state: str
    sql: str
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.invariants}-{self.rule}"


def _event(where: str, change: str) -> str:
    return f"UPDATE longhaul_runs_event SET {change} WHERE run_id = %(run)s AND {where}"


def _append(type: str, payload: str = "'{}'", at: str = "max(at)") -> str:
    return f"""
        INSERT INTO longhaul_runs_event (run_id, seq, type, at, payload)
        SELECT run_id, max(seq) + 1, '{type}', {at}, {payload} FROM longhaul_runs_event WHERE run_id = %(run)s GROUP BY 1;
        UPDATE longhaul_runs_run SET last_seq = last_seq + 1 WHERE id = %(run)s"""


def _message(role: str, status: str, content: str = "'[]'", placed: bool = True) -> str:
    place = "(SELECT max(position) + 1 FROM longhaul_threads_message m WHERE m.thread_id = r.thread_id)"
    return f"""
        INSERT INTO longhaul_threads_message (id, thread_id, role, status, position, content, metadata, client_id, shown)
        SELECT longhaul_uuid7(), r.thread_id, '{role}', '{status}', {place if placed else "NULL"}, {content}, '{{}}', '', true
        FROM longhaul_runs_run r WHERE r.id = %(run)s"""


def _run(change: str) -> str:
    return f"UPDATE longhaul_runs_run SET {change} WHERE id = %(run)s"


def _call(change: str, where: str = "true") -> str:
    return f"UPDATE longhaul_tools_toolcall SET {change} WHERE run_id = %(run)s AND {where}"


def _attempt(change: str) -> str:
    first = "SELECT id FROM longhaul_tools_toolcall WHERE run_id = %(run)s AND index = 0"
    return f"UPDATE longhaul_tools_toolattempt SET {change} WHERE call_id = ({first})"


_FIRST_CALL = "(SELECT id FROM longhaul_tools_toolcall WHERE run_id = %(run)s AND index = 0)"
_FIRST_TYPE = "seq = (SELECT min(seq) FROM longhaul_runs_event WHERE run_id = %(run)s AND type = '{}')"
_LAST_TYPE = "seq = (SELECT max(seq) FROM longhaul_runs_event WHERE run_id = %(run)s AND type = '{}')"

CORRUPTIONS = [
    Corruption("13", "exactly one terminal event", "completed", _event("type = 'run.completed'", "type = 'data'")),
    Corruption("1", "The terminal event is the last", "completed", _append("data")),
    Corruption(
        "1", "The terminal event tells", "failed", _event("type = 'run.failed'", "payload = payload || '{\"stop_reason\": \"poison\"}'")
    ),
    Corruption("1", "an end in time exactly", "completed", _run("finished_at = NULL")),
    Corruption("1", "an end in time exactly", "running", _run("finished_at = longhaul_now()")),
    Corruption("2", "seq is contiguous", "completed", _event("seq > 3", "seq = seq + 1000") + ";" + _run("last_seq = last_seq + 1000")),
    Corruption("2", "seq is contiguous", "completed", _run("events_removed_through = 3")),
    Corruption("2", "A log is compacted of an ended run only", "running", _run("compacted_at = longhaul_now()")),
    Corruption(
        "2", "A log is compacted of an ended run only", "completed",
        _event(_FIRST_TYPE.format("text.delta"), "payload = payload || jsonb_build_object('from_seq', seq, 'pieces', '1')"),
    ),
    Corruption(
        "2", "A log is compacted of an ended run only", "completed",
        _event(
            _FIRST_TYPE.format("text.delta"),
            "payload = payload || jsonb_build_object('from_seq', seq, 'pieces', char_length(payload->>'text') || ',0')",
        ),
    ),
    Corruption(
        "2", "Events are removed of an ended run only", "waiting",
        "DELETE FROM longhaul_runs_event WHERE run_id = %(run)s AND seq = 1;" + _run("events_removed_through = 1"),
    ),
    Corruption(
        "12", "Events are removed of an ended run only", "completed",
        "DELETE FROM longhaul_runs_event WHERE run_id = %(run)s;" + _run("events_removed_through = last_seq"),
    ),
    Corruption("2", "last_seq is that of its last event", "waiting", _run("last_seq = last_seq + 1")),
    Corruption("2", "The log tells the status", "waiting", _event("type = 'run.waiting'", "type = 'data'")),
    Corruption("2", "run.started is told once", "completed", _event("type = 'run.started'", "type = 'data'")),
    Corruption("2", "ordinals of a message's deltas", "completed", _event("type = 'text.delta'", "ordinal = NULL")),
    Corruption(
        "2", "ordinals of a message's deltas", "completed",
        _event("type = 'tool_call.arguments_delta'", "ordinal = 1"),
    ),
    Corruption("2", "A delta stands between", "completed", _event(_FIRST_TYPE.format("text.delta"), "message_id = longhaul_uuid7()")),
    Corruption("2", "begins once in the log", "completed", _event(_FIRST_TYPE.format("message.created"), "type = 'data'")),
    Corruption(
        "2", "The text that was streamed", "completed",
        _event(_FIRST_TYPE.format("text.delta"), "payload = payload || '{\"text\": \"Elsewhere.\"}'"),
    ),
    Corruption(
        "2", "The content that message.completed tells", "completed",
        _event(_LAST_TYPE.format("message.completed"), "payload = payload || '{\"content\": []}'"),
    ),
    Corruption("3", "never falls with seq", "completed", _event(_FIRST_TYPE.format("leg.started"), "epoch = 2")),
    Corruption("3", "an epoch that no claim has raised", "completed", _event("type = 'run.completed'", "epoch = 9")),
    Corruption("3", "an epoch that no claim has raised", "completed", "UPDATE longhaul_runs_usage SET epoch = 9 WHERE run_id = %(run)s"),
    Corruption("3", "After the end of a leg", "completed", _event(_FIRST_TYPE.format("tool_call.started"), "epoch = 1")),
    Corruption(
        "3", "At most one leg of a run is open", "running",
        """INSERT INTO longhaul_runs_leg (id, run_id, number, epoch, worker_id, worker, task_id, started_at, reason)
        SELECT longhaul_uuid7(), run_id, 2, 1, worker_id, worker, '', started_at, '' FROM longhaul_runs_leg WHERE run_id = %(run)s""",
        ("longhaul_one_open_leg_a_run",),
    ),
    Corruption("3", "A running run has an open leg", "waiting", _run("linger_until = longhaul_now()")),
    Corruption("3", "A running run has an open leg", "running", _run("epoch = epoch + 1") + ";" + _event("epoch = 1", "epoch = 2")),
    Corruption("3", "The legs of a run are numbered", "completed", _run("legs = legs + 1")),
    Corruption(
        "3", "The legs of a run are numbered", "completed", "UPDATE longhaul_runs_leg SET epoch = 1 WHERE run_id = %(run)s"
    ),
    Corruption("3", "Each leg begins once", "completed", _event(_FIRST_TYPE.format("leg.ended"), "type = 'data'")),
    Corruption(
        "3", "A step is committed under an epoch", "completed",
        "UPDATE longhaul_runs_step SET epoch = 2 WHERE run_id = %(run)s AND number = 1",
    ),
    Corruption(
        "4", "The steps of a run are numbered", "completed",
        "UPDATE longhaul_runs_step SET number = 3 WHERE run_id = %(run)s AND number = 2",
    ),
    Corruption(
        "4", "A step has one message", "completed",
        """UPDATE longhaul_runs_step SET message_id = (
            SELECT id FROM longhaul_threads_message WHERE run_id = %(run)s AND role = 'user')
        WHERE run_id = %(run)s AND number = 2""",
    ),
    Corruption("4", "is the sum of its usage", "completed", _run("input_tokens = input_tokens + 1")),
    Corruption(
        "4", "is the sum of its usage", "completed",
        """UPDATE longhaul_runs_usage SET message_id = (SELECT id FROM longhaul_threads_message WHERE run_id = %(run)s AND role = 'user')
        WHERE run_id = %(run)s""",
    ),
    Corruption("4", "A settled call is told to be settled once", "completed", _event(_FIRST_TYPE.format("tool_call.settled"), "type = 'data'")),
    Corruption(
        "4", "The outcome that tool_call.settled tells", "completed",
        _event(_FIRST_TYPE.format("tool_call.settled"), "payload = payload || '{\"outcome\": \"failed\"}'"),
    ),
    Corruption("4", "The outcome that tool_call.settled tells", "completed", _call("settled_at = NULL")),
    Corruption("4", "A call is a part of the message", "completed", _call("message_id = longhaul_uuid7()")),
    Corruption(
        "46", "each of its calls has exactly one tool message", "completed",
        "DELETE FROM longhaul_threads_message WHERE run_id = %(run)s AND role = 'tool'",
    ),
    Corruption("4", "A tool message gives the outcome", "completed", _call("result = '\"something else\"'")),
    Corruption(
        "4", "stand in call order", "completed",
        """UPDATE longhaul_threads_message m
        SET position = (SELECT sum(position) FROM longhaul_threads_message WHERE run_id = %(run)s AND role = 'tool') - m.position
        WHERE run_id = %(run)s AND role = 'tool'""",
        ("longhaul_one_message_a_position",),
    ),
    Corruption("246", "A call is open only while", "waiting", _run("status = 'queued', next_publish_at = longhaul_now()")),
    Corruption(
        "5", "The log tells nothing of a call after", "completed",
        _event(_LAST_TYPE.format("usage"), f"type = 'tool_call.progress', payload = jsonb_build_object('tool_call', {_FIRST_CALL})"),
    ),
    Corruption("5", "has its one attempt open", "completed", _attempt("ended_at = NULL")),
    Corruption("5", "has its one attempt open", "calling", _call("holder = longhaul_uuid7()", "index = 1")),
    Corruption("5", "has its one attempt open", "waiting", _call("holder = longhaul_uuid7()", "index = 1")),
    Corruption("5", "The attempts of a call are numbered", "completed", _attempt("number = 3")),
    Corruption("5", "The attempts of a call are numbered", "waiting", _call("attempt = 2")),
    Corruption("5", "Each attempt is told", "completed", _event(_FIRST_TYPE.format("tool_call.started"), "type = 'data'")),
    Corruption("5", "A call that must not run twice", "retrying", f"""
        UPDATE longhaul_tools_toolcall SET idempotent = false WHERE id = {_FIRST_CALL};
        INSERT INTO longhaul_tools_toolattempt (id, call_id, number, worker_id, task_id, ended_at, outcome)
        SELECT longhaul_uuid7(), id, 2, longhaul_uuid7(), '', longhaul_now(), 'lost'
        FROM longhaul_tools_toolcall WHERE id = {_FIRST_CALL}"""),
    Corruption(
        "5", "Nobody claims after it was gone", "completed",
        """INSERT INTO longhaul_tools_worker (id, name, kind, host, pid, lock_key, started_at, beat_at, draining, gone_at)
        SELECT worker_id, 'agents@a', 'agents', 'a', 1, 1, started_at, started_at, false, started_at - interval '1 minute'
        FROM longhaul_runs_leg WHERE run_id = %(run)s AND number = 1""",
    ),
    Corruption("6", "A pending message is the one", "running", _run("pending_message_id = longhaul_uuid7()")),
    Corruption("6", "A pending message is the one", "completed", _message("assistant", "pending")),
    Corruption("6", "A pending message is the one", "running", _event("type = 'message.created'", "epoch = NULL")),
    Corruption(
        "6", "Every call in a thread is answered", "completed",
        _message("assistant", "completed", """'[{"type": "tool_call", "tool_call": "x", "name": "refund", "arguments": {}}]'"""),
    ),
    Corruption(
        "6", "Every call in a thread is answered", "completed", _message("tool", "completed", """'[{"type": "tool_result", "tool_call": "x"}]'""")
    ),
    Corruption("6", "nothing stands behind its message", "waiting", _message("user", "completed")),
    Corruption(
        "6", "No call is answered twice", "completed",
        _message("tool", "completed", f"jsonb_build_array(jsonb_build_object('type', 'tool_result', 'tool_call', {_FIRST_CALL}))"),
    ),
    Corruption(
        "6", "What has been said has a place", "completed",
        "UPDATE longhaul_threads_message SET position = NULL WHERE run_id = %(run)s AND role = 'user'",
    ),
    Corruption(
        "6", "What has been said has a place", "completed",
        "UPDATE longhaul_threads_message SET content = '{}' WHERE run_id = %(run)s AND role = 'user'",
    ),
    Corruption("7", "A queued run is due", "queued", _run("next_publish_at = NULL")),
    Corruption("7", "A queued run is due", "joined", _run("next_publish_at = longhaul_now() + interval '1 day'")),
    Corruption("7", "Only a queued run waits for its turn", "queued", _run("turn = 1, next_publish_at = NULL")),
    Corruption("7", "Only a queued run waits for its turn", "running", _run("turn = 1")),
    Corruption("7", "no more are at work than the gate lets", "running", _run("gates = '{\"agent:x\": {\"most\": 0}}'")),
    Corruption("7", "A call that is to be run is due", "waiting", _call("next_publish_at = NULL", "index = 1")),
    Corruption("7", "What waits for its turn", "waiting", _call("turn = 1, next_publish_at = NULL", "index = 1")),
    Corruption("7", "A waiting run has an open call", "waiting", _call("status = 'awaiting_approval'")),
    Corruption("7", "A waiting run has an open call", "unknown", _call("status = 'requested', attempt = 2, next_publish_at = longhaul_now()", "index = 1")),
    Corruption("7", "a time after which they are taken", "preparing", _run("leg_deadline = NULL")),
    Corruption("7", "a time after which they are taken", "calling", _call("timeout_at = NULL", "index = 1")),
    Corruption("7", "A run is held only while", "held", """
        INSERT INTO longhaul_threads_thread (id, agent, title, summary, metadata, overrides)
        SELECT longhaul_uuid7(), '', 'elsewhere', '', '{}', '{}';
        UPDATE longhaul_runs_run SET thread_id = (SELECT id FROM longhaul_threads_thread WHERE title = 'elsewhere') WHERE id = %(run)s"""),
    Corruption("7", "A message waits for its place", "completed", _message("user", "waiting", placed=False)),
    Corruption("7", "A call that waits for a child", "waiting", _call("status = 'awaiting_child'", "index = 1")),
    Corruption("38", "leaves no call, no leg and no child", "completed", "UPDATE longhaul_runs_leg SET ended_at = NULL WHERE run_id = %(run)s AND number = 2"),
    Corruption("48", "leaves no call, no leg and no child", "completed", _call("status = 'unknown', outcome = '', settled_at = NULL", "index = 1")),
    Corruption("8", "Nothing would wake an ended run", "completed", _run("next_publish_at = longhaul_now()")),
    Corruption("8", "A cancel raises the epoch", "cancelled_speaking", _run("epoch = epoch - 1")),
    Corruption("8", "Nothing of a run is later", "completed", "UPDATE longhaul_runs_usage SET created_at = longhaul_now() WHERE run_id = %(run)s"),
    Corruption("8", "Nothing of a run is later", "cancelled", _event("seq = 2", "at = longhaul_now()")),
]  # fmt: skip

__all__: list[Any] = ["CORRUPTIONS", "STATES", "Corruption", "State", "clerk"]
