"""A leg: one Celery task's stretch of a run.

Claim; at every step boundary look at the limits and at the time; open a turn (the pending message is a row before the
model is asked); stream, holding no database connection; commit the step in one transaction; linger for its tool calls;
claim again. Every write carries the fence. What ends a leg is one transaction that leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import Any, Literal, TypeVar
from uuid import UUID

from django.db import DatabaseError, InterfaceError, connection

from runs import admission, agents, bells, lifecycle, quotas
from runs.claims import Claim, Interrupted
from runs.conf import settings
from runs.context import Hidden, Window, mark, work_of
from runs.exceptions import AgentsError, FenceLost, LonghaulError
from runs.flusher import Buffer, Chunk, Flusher
from runs.models import Run, Status, StopReason
from runs.output_schema import OutputInvalid
from runs.providers.port import (
    AsksForSchema,
    Finished,
    ModelRequest,
    Provider,
    ProviderError,
    RatesReported,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    UnknownProvider,
    UsageReported,
    get_provider,
    parse_arguments,
)
from threads import database, logs
from threads.ids import new_id
from threads.models import Message, Role
from threads.redaction import redact
from tools import gates
from tools.exceptions import NotParallel, ToolError, UnknownTool
from tools.execution import described_error
from tools.presence import Presence
from tools.registry import Tool

logger = logging.getLogger("longhaul.engine")

LONGEST_NAME = 200  # of a call, as a column holds it; the model may say anything
MARGIN = timedelta(seconds=30)  # after model_timeout: what a commit may take
LOOK_SECONDS = 1.0  # how often a lingering leg looks though no bell rang
TURN = 8  # events of a model in a row, before the others of this process
E = TypeVar("E")


class LeaveLapsed(Exception):
    """So long after a leg was given leave to ask its model it does not ask: others may count on it by now."""


@dataclass
class Process:
    """What the legs of one worker process share. `flusher` None: every delta waits for its step's commit."""

    presence: Presence
    flusher: Flusher | None = None
    draining_since: float | None = None  # monotonic
    ended: bool = False
    legs: set[Claim] = field(default_factory=set)

    @property
    def draining(self) -> bool:
        return self.draining_since is not None

    def drain(self) -> None:
        """Take no new step. Legs that wait for calls or for a person end now; streams have their grace first."""
        self.draining_since = time.monotonic()
        self.presence.draining = True
        for claim in list(self.legs):
            if claim.wake is not None:
                claim.wake.set()

    def look(self) -> None:
        """Stop the legs whose fence is gone (cancelled, reclaimed): they may be waiting for a silent model."""
        claims = [(claim, claim.epoch, claim.turn) for claim in list(self.legs) if claim.speaking]
        if not claims:
            return
        rows = database.rows_of(
            "SELECT id, epoch FROM longhaul_runs_run WHERE status = 'running' AND id = ANY (%s)",
            ([claim.run_id for claim, _, _ in claims],),
        )
        held = set(rows)
        for claim, epoch, turn in claims:
            # Still in the same wait: a leg that committed while we looked gave its claim up itself.
            if (claim.run_id, epoch) not in held and claim.speaking and claim.turn == turn:
                claim.interrupt("lost")

    def cut(self) -> None:
        """The grace is over: hand on what still streams."""
        for claim in list(self.legs):
            claim.interrupt("drained")


@dataclass(slots=True)
class Call:
    """A tool call as the model speaks it. Its id is minted here, at its first chunk."""

    id: UUID
    name: str
    text: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """What the model said in one turn: parts in the order in which they began."""

    parts: list[dict[str, Any]] = field(default_factory=list)
    calls: dict[int, Call] = field(default_factory=dict)
    usage: UsageReported | None = None
    finish: str = ""

    @property
    def text(self) -> str:
        return "".join(part["text"] for part in self.parts if part["type"] == "text")


@dataclass(slots=True)
class Turn:
    """An opened turn: its pending message is a row."""

    message: UUID
    step: int
    bad_calls: int
    last: bool  # the last allowed step: asked for without tools
    buffer: Buffer


def advance(run_id: UUID, dispatch_seq: int, process: Process, *, task_id: str = "") -> None:
    """Claim the run by `dispatch_seq` and take it as far as this leg may. A doubled or late message does nothing."""
    if process.draining:
        # Celery's gevent worker takes up to two messages more after SIGTERM (measured), and acknowledges them when we return:
        # their runs would wait for the sweep. Whoever else takes this one finds the same run, so it is passed on.
        agent = Run.objects.filter(pk=run_id).values_list("agent", flat=True).first()
        admission.publish(run_id, dispatch_seq, agent or "")
        return
    presence = process.presence
    with presence.register.entry("run", run_id) as registered:
        worker = presence.id
        leg_id = new_id()
        answer = lifecycle.claim(
            run_id, dispatch_seq, worker=worker, worker_name=presence.name, task_id=task_id, leg=leg_id
        )
        if answer is None:
            return  # another worker got there first, or the run is no longer due
        if answer.get("absent"):
            logger.warning("Run %s is left to others: this worker has not beaten", run_id)
            return
        claim = Claim(run_id, worker)
        claim.epoch = answer["epoch"]
        registered(claim.epoch)
        process.legs.add(claim)
        told = logs.bind(
            run=run_id, leg=answer["leg"], epoch=claim.epoch, agent=answer["agent"], thread=answer["thread"]
        )
        try:
            logger.info("Run %s claimed", run_id, extra={"action": "run.claimed"})
            if answer.get("release"):
                admission.release()
            Leg(process, claim, leg_id, answer, registered).advance()
        except FenceLost:
            logger.info("Run %s epoch %s was lost", run_id, claim.epoch, extra={"action": "leg.lost"})
        except (DatabaseError, InterfaceError) as error:
            # Whether the last write took effect is unknown, so nothing is assumed: the leg ends. What the row still
            # says it holds is given back by this process's presence, for it is no longer in the register.
            logger.warning(
                "Run %s: its leg ends without an answer of Postgres",
                run_id,
                exc_info=error,
                extra={"action": "leg.unanswered"},
            )
            if not connection.in_atomic_block:
                connection.close()
        finally:
            process.legs.discard(claim)
            logs.release(told)


def in_turn(events: Iterable[E], flusher: Flusher | None = None) -> Iterator[E]:
    """Yield the events, and let the other greenlets of this process have their turn every few of them.

    While the flusher is late, after each: it needs many turns for a round, and all that is heard waits for it.

    A read that finds data does not wait, so a greenlet whose model is ahead of it would read on for ever, and the
    flusher, and all other legs, would stand still meanwhile (measured: 200 streams of 100 chunks/s on a busy machine, not one
    row in ten seconds). In a thread it costs nothing.
    """
    for number, event in enumerate(events, 1):
        yield event
        if not number % TURN or (flusher is not None and flusher.is_late):
            time.sleep(0)


class Leg:
    """One task's stretch of a run, over the claims that it makes after lingering."""

    def __init__(self, process: Process, claim: Claim, leg_id: UUID, claimed: dict[str, Any], registered: Any) -> None:
        self.process = process
        self.claim = claim
        self.id = leg_id
        self.claimed = claimed
        self.registered = registered
        self.began = time.monotonic()
        self.tries = int(claimed["model_tries"])
        self.usage: dict[str, Any] | None = None
        self.committed = False  # a step, in this leg
        self.asked = 0.0  # monotonic, before leave was asked for last

    # -- the course of a leg --

    def advance(self) -> None:
        try:
            definition = self._define()
        except (LonghaulError, UnknownProvider, ToolError) as error:
            self._fail(StopReason.CONFIGURATION, getattr(error, "code", "configuration"), str(error))
            return
        except (DatabaseError, InterfaceError):
            raise  # no fault of the agent's: the run is taken back, and tried again
        except Exception as error:
            logger.exception("Run %s: its agent cannot be set up", self.claim.run_id)
            said = f"The run's agent cannot be set up ({type(error).__name__}). The worker's log says more."
            self._fail(StopReason.CONFIGURATION, "configuration", said)
            return
        self.definition = definition
        if self.process.draining:
            self._requeue("drained")
            return
        try:
            with self._listening():
                self._steps()
        except Interrupted as interrupted:
            if interrupted.reason == "lost":
                raise FenceLost from None
            self._requeue("drained")

    def _define(self) -> agents.Definition:
        agent = agents.get(self.claimed["agent"])
        definition = agents.define(
            agent,
            self.claimed["thread_overrides"] or {},
            self.claimed["overrides"] or {},
            offered=self._tools_of(agent),
            begun=self.claimed["steps"] > 0,
        )
        self.provider: Provider
        self.provider, self.model = get_provider(definition.model)
        self.quota = quotas.quota(definition.model)
        self.instructions = self._instruct(definition)
        self.tools = self.provider.render_tools(definition.specs)
        hidden = Hidden(lambda: work_of(self.claim.run_id))
        self.window = Window(definition.last_messages, self.provider.render, hidden)
        self.options = dict(definition.options)
        if definition.output_schema is not None and isinstance(self.provider, AsksForSchema):
            asked = self.provider.schema_options(definition.output_schema.schema)
            # What the options say themselves wins; None: the service knows no such field.
            unknown = {name for name in asked if self.options.get(name, asked) is None}
            self.options = {name: value for name, value in (asked | self.options).items() if name not in unknown}
        return definition

    def _tools_of(self, agent: agents.Agent) -> Mapping[str, Tool]:
        return agent.tools_of(Run.objects.get(pk=self.claim.run_id)) if agent.tool_functions else agent.tools_by_name

    def _instruct(self, definition: agents.Definition) -> str:
        if isinstance(definition.instructions, str):
            return definition.instructions
        began = time.monotonic()
        run = Run.objects.get(pk=self.claim.run_id)
        try:
            said = definition.instructions(run)
        except (DatabaseError, InterfaceError):
            raise
        except Exception as error:  # it is the user's code
            logger.exception("Run %s: its agent's instructions failed", run.pk)
            # The class only, for the run keeps it: the text of a foreign exception may carry what no reader may see.
            raise AgentsError(
                f"The agent's instructions failed ({type(error).__name__}). The worker's log says more."
            ) from error
        if time.monotonic() - began > 1:
            logger.warning("The instructions of agent %s took over 1 s; other runs waited", definition.agent)
        if not isinstance(said, str):
            raise agents.BadInput(
                f"The instructions of agent {definition.agent!r} returned {type(said).__name__}, not a text."
            )
        return said

    def _steps(self) -> None:
        turn = self._open()
        while turn is not None:
            try:
                answer = self._speak(turn)
            except ProviderError as error:
                self._close(turn)
                self._model_failed(error)
                return
            except LeaveLapsed:
                self._close(turn)
                self._requeue("limited")
                return
            except BaseException:
                self._close(turn)
                raise
            outcome = self._commit(turn, answer)
            if outcome["status"] == "running":
                turn = self._open()
            elif outcome.get("lingering") or outcome["status"] == "waiting":
                turn = self._linger(joined=outcome["status"] == "queued")
            else:
                turn = None

    # -- boundaries --

    def _opening(self) -> tuple[Any, ...]:
        limits = self.definition.limits
        return (
            new_id(),
            settings().model_timeout + MARGIN,
            self.window.last,
            self.window.size,
            limits.max_steps,
            limits.max_total_tokens or lifecycle.UNLIMITED_TOKENS,
            limits.max_cost if limits.max_cost is not None else lifecycle.UNLIMITED_COST,
        )

    def _open(self) -> Turn | None:
        """The boundary of a claim that is held: open the next turn, or end the run at a limit."""
        if self._handed_over():
            return None
        opening = self._opening()
        return self._opened(
            opening[0],
            lifecycle.open_turn(self.claim.run_id, self.claim.epoch, self.claim.worker, opening, self._ask()),
        )

    def _ask(self) -> str:
        """What this leg asks of its model's limits where it opens a turn."""
        self.asked = time.monotonic()
        if self.quota.limits is None:
            return self.quota.ask(0, self.options)
        size = len(self.instructions) + len(self.tools) + sum(map(len, self.window.messages()))
        return self.quota.ask(size, self.options)

    def _opened(self, message: UUID, answer: dict[str, Any]) -> Turn | None:
        if limit := answer.get("limit"):
            if limit == "model":
                self._requeue("limited", timedelta(seconds=float(answer["delay"])))
            else:
                self._finish_at(StopReason(limit))
            return None
        run = str(self.claim.run_id)
        if answer.get("pinned"):
            self.window.pin(answer["pinned"])
        self.window.extend(answer["context"], run=run)
        steps = int(answer["steps"])
        return Turn(
            message=message,
            step=steps + 1,
            bad_calls=int(answer["bad_calls"]),
            last=bool(self.definition.tools) and steps + 1 >= self.definition.limits.max_steps,
            buffer=self._buffer(message),
        )

    def _handed_over(self) -> bool:
        """Hand over when this worker drains or the time budget is used. A leg takes at least one step."""
        if self.process.draining:
            self._requeue("drained")
            return True
        # Measured from the leg's begin; a model call that is longer is cut at model_timeout, never here. Before its first
        # step a leg has used no more than its preparation took: one that handed over then would never get further.
        if self.committed and self._used:
            self._requeue("budget")
            return True
        return False

    @property
    def _used(self) -> bool:
        """Whether the leg's time budget is used."""
        return time.monotonic() - self.began >= self.definition.limits.leg_budget.total_seconds()

    # -- the model --

    def _speak(self, turn: Turn) -> Answer:
        request = ModelRequest(
            model=self.model,
            instructions=self.instructions,
            messages=self.window.messages(),
            tools=self.tools,
            tool_choice=self.definition.choice_at(turn.step, last=turn.last),
            parallel_tool_calls=self.definition.parallel_tool_calls,
            options=self.options,
            timeout=settings().model_timeout,
            silence=settings().model_silence,
        )
        database.release()  # no connection is held while the model speaks
        if self.quota.limits and time.monotonic() - self.asked > quotas.SEND_WITHIN.total_seconds():
            raise LeaveLapsed
        answer = Answer()
        self.usage = None
        stream = self.provider.stream(request)
        with contextlib.closing(stream), self.claim.interruptible():  # type: ignore[type-var]
            for event in in_turn(stream, self.process.flusher):
                self.claim.check()
                self._hear(turn, answer, event)
        return answer

    def _hear(self, turn: Turn, answer: Answer, event: Any) -> None:
        buffer = turn.buffer
        match event:
            case TextDelta(text):
                _append(answer.parts, "text", text)
                buffer.add("text.delta", text)
            case ReasoningDelta(text):
                _append(answer.parts, "reasoning", text)
                buffer.add("reasoning.delta", text)
            case ToolCallDelta(index, _, name, text):
                call = answer.calls.get(index)
                if call is None:
                    call = answer.calls[index] = Call(new_id(), name[:LONGEST_NAME])
                call.text.append(text)
                buffer.add("tool_call.arguments_delta", text, tool_call=str(call.id), name=call.name)
            case UsageReported():
                answer.usage = event
                self.usage = self._usage_row(event)
                return
            case RatesReported():
                self._hear_rates(event)
                return
            case Finished(reason):
                answer.finish = reason
                return
        if self.process.flusher is not None:
            self.process.flusher.wake()

    def _hear_rates(self, rates: RatesReported) -> None:
        quotas.hear(self.definition.model, rates)
        if rates.wait is not None:
            quotas.pause(self.quota, rates.wait, "nothing is left")
            database.release()

    def _model_failed(self, error: ProviderError) -> None:
        # A service may repeat the key it was sent, or what stands in its own settings.
        described = {"code": error.code, "message": redact(error.message), "retryable": error.retryable}
        waited = timedelta(seconds=float(self.claimed["retry_seconds"] or 0)) + timedelta(
            seconds=time.monotonic() - self.began
        )
        tries = self.tries + 1
        again = error.retryable and tries < settings().model_tries
        again = again and (tries == 1 or waited < settings().model_retry_total)
        if error.retry_after and error.code in ("rate_limited", "overloaded"):
            # Before the run is queued again, so that it has its place before those that come meanwhile.
            quotas.pause(self.quota, error.retry_after, error.code, self.claim.run_id if again else None)
        if again:
            delay = retry_delay(tries, error.retry_after)
            logger.info(
                "Run %s: the model failed (%s), again in %s",
                self.claim.run_id,
                error.code,
                delay,
                extra={"action": "run.retried", "code": error.code, "delay_seconds": delay.total_seconds()},
            )
            self._announce(
                lifecycle.requeue(
                    self.claim.run_id,
                    self.claim.epoch,
                    self.claim.worker,
                    "retry",
                    delay=delay,
                    error={"error": described},
                    usage=self.usage,
                )
            )
            return
        self._fail(StopReason.MODEL_ERROR, error.code, error.message, retryable=error.retryable)

    # -- the commit --

    def _commit(self, turn: Turn, answer: Answer) -> dict[str, Any]:
        # What was asked for without tools is an answer, whatever else the model put into it.
        calls, settled_events = (
            ([], []) if self.definition.choice_at(turn.step, last=turn.last) == "none" else self._calls(turn, answer)
        )
        bad = bool(calls) and all("outcome" in call for call in calls)
        content = [part for part in answer.parts if part["text"]]
        content += [
            {"type": "tool_call", "tool_call": call["id"], "name": call["name"], "arguments": call["arguments"]}
            | self._mark(call["name"])
            for call in calls
        ]
        end = self._end(turn, answer, calls, bad)
        step = self._step_row(turn)
        if end is not None and end["status"] == Status.COMPLETED and self.definition.output_schema is not None:
            try:
                end["output"] = self.definition.output_schema.read(answer.text)
            except OutputInvalid as invalid:
                end = self._misfit(turn, step, end, invalid)
        message = {"message": str(turn.message), "role": "assistant", "step": turn.step}
        flusher = self.process.flusher
        rest: list[Chunk] = turn.buffer.take()
        events: list[list[Any]] = [[chunk.type, chunk.ordinal, chunk.payload] for chunk in rest]
        events.append(["message.completed", None, {**message, "content": content}])
        if self.usage is not None:
            events.append(["usage", None, {"message": str(turn.message), **self.usage}])
        events += [
            [
                "tool_call.created",
                None,
                {
                    "tool_call": call["id"],
                    "name": call["name"],
                    "message": str(turn.message),
                    "arguments": call["arguments"],
                },
            ]
            for call in calls
        ]
        events += settled_events
        try:
            self.claim.check_lost()  # an answer that is whole is committed, though its worker drains
            outcome: dict[str, Any] = lifecycle.commit_step(
                self.claim.run_id,
                self.claim.epoch,
                self.claim.worker,
                message=turn.message,
                leg=self.id,
                content=content,
                events=events,
                step=step,
                usage=self.usage,
                calls=calls,
                bad=bad,
                end=end,
                linger=self._linger_time(),
            )
        finally:
            if flusher is not None:
                flusher.close(turn.buffer)
        self.committed = True
        self.tries = 0
        self.usage = None
        if end is None or outcome["status"] == "running":  # somebody has steered it meanwhile: it goes on
            logger.info(
                "Run %s: step %s committed, %s calls",
                self.claim.run_id,
                turn.step,
                len(calls),
                extra={"action": "step.committed", "step": turn.step, "calls": len(calls)},
            )
        else:
            self._say_end(end["status"], end["stop_reason"], end["error"])
        if outcome["status"] == "waiting":
            self._publish_calls(calls, outcome.get("out"))
        self._announce(outcome)
        return outcome

    def _linger_time(self) -> timedelta:
        """A leg without a flusher has nobody to wait beside; a draining one has no time."""
        if self.process.draining or self.process.flusher is None:
            return timedelta(0)
        return settings().linger

    def _publish_calls(self, calls: list[dict[str, Any]], out: list[str] | None) -> None:
        """Send the calls' messages: of those in `out` alone, when others wait for their turn."""
        # Between the commit and this a death costs a republish interval: the rows say when they are due.
        from tools import tasks

        for call in calls:
            if "outcome" not in call and (out is None or call["id"] in out):
                tool = self.definition.tools[call["name"]]
                tasks.publish(
                    UUID(call["id"]),
                    1,
                    tool.timeout,
                    tool.queue or "",
                    tool.name,
                    self.claim.run_id,
                    self.definition.agent,
                )

    def _calls(self, turn: Turn, answer: Answer) -> tuple[list[dict[str, Any]], list[list[Any]]]:
        """Return the rows of the calls, the bad ones settled with what the model is told, and the events of those."""
        rows: list[dict[str, Any]] = []
        settled: list[list[Any]] = []
        one_at_a_time = self.definition.parallel_tool_calls is False
        for index, call in sorted(answer.calls.items()):
            text = "".join(call.text)
            arguments = parse_arguments(text)
            row: dict[str, Any] = {"id": str(call.id), "index": index, "name": call.name, "arguments": arguments}
            error = self._bad(call.name, text)
            tool = self.definition.tools.get(call.name)
            if error is None and one_at_a_time and any("outcome" not in taken for taken in rows):
                error = described_error(NotParallel())
            if error is None and tool is not None:
                row |= {
                    "max_attempts": tool.retry.attempts,
                    "idempotent": tool.idempotent,
                    "on_unknown": tool.on_unknown,
                    "atomic": tool.atomic,
                    "deferred": tool.deferred,
                    "timeout_seconds": tool.timeout.total_seconds(),
                    "queue": "" if tool.queue in (None, settings().tools_queue) else tool.queue,
                    "gates": gates.gates_of(
                        tool,
                        self.claimed["owner"],
                        per_owner=settings().calls_per_owner,
                        rate_per_owner=settings().call_rate_per_owner,
                    ),
                }
            else:
                row |= {"outcome": "failed", "error": error}
                payload = {
                    "tool_call": str(call.id),
                    "name": call.name,
                    "message": str(turn.message),
                    "outcome": "failed",
                    "result": None,
                    "error": error,
                }
                settled.append(["tool_call.settled", None, payload])
            rows.append(row)
        return rows, settled

    def _mark(self, name: str) -> dict[str, Any]:
        """Return what the transcript says of how long a call of this tool is shown."""
        tool = self.definition.tools.get(name)
        return {} if tool is None else mark(tool.in_context, self.claim.run_id)

    def _bad(self, name: str, text: str) -> dict[str, str] | None:
        """Return what is wrong with a call, as the model is told it."""
        tool = self.definition.tools.get(name)
        try:
            if tool is None:
                raise UnknownTool(name, self.definition.tools)
            tool.validate(text)
        except ToolError as error:
            return described_error(error)
        except Exception as error:  # a validator of the user's
            return {
                "code": "invalid_arguments",
                "message": f"The arguments could not be checked ({type(error).__name__}).",
            }
        if tool.needs_approval or tool.deferred:
            # Their code comes later; what needs a person's word must not run without it.
            what = "a person's approval" if tool.needs_approval else "a result from outside"
            return {"code": "not_available", "message": f"{name} needs {what}, which is not available here."}
        return None

    def _end(self, turn: Turn, answer: Answer, calls: list[dict[str, Any]], bad: bool) -> dict[str, Any] | None:
        """Decide whether this step ends the run, and how."""
        if not calls:
            # What was asked for as the last step is the limit's doing, whatever the model made of it.
            reason = StopReason.MAX_STEPS if turn.last else StopReason.END_TURN
            limits = self._opening()[-3:]  # steps, tokens, cost
            room = [limits[0], limits[1], str(limits[2])]
            return {
                "status": Status.COMPLETED,
                "stop_reason": reason,
                "output": answer.text,
                "error": None,
                "room": room,
            }
        if bad and turn.bad_calls + 1 >= settings().bad_calls_limit:
            message = f"The model made only invalid tool calls in {turn.bad_calls + 1} steps in a row."
            error = {"code": "invalid_calls", "message": message, "retryable": False}
            return {"status": Status.FAILED, "stop_reason": StopReason.MODEL_ERROR, "output": None, "error": error}
        return None

    def _misfit(
        self, turn: Turn, step: dict[str, Any], end: dict[str, Any], invalid: OutputInvalid
    ) -> dict[str, Any] | None:
        """Send an answer that does not fit the schema back to the model, once in a run, or fail the run.

        The rows say whether it went back already, for the leg that sent it may be dead.
        """
        told = Message.objects.filter(run_id=self.claim.run_id, step__isnull=False, role=Role.USER)
        if turn.step < self.definition.limits.max_steps and not told.exists():
            said = f"Your answer does not fit the JSON schema that was asked for: {invalid} Answer again, with the JSON alone."
            step["correction"] = {"id": str(new_id()), "content": [{"type": "text", "text": said}]}
            return None
        message = f"The model's answer does not fit output_schema: {invalid}"
        error = {"code": "output_invalid", "message": message, "retryable": False}
        failed = {"status": Status.FAILED, "stop_reason": StopReason.MODEL_ERROR, "output": None, "error": error}
        return failed

    def _step_row(self, turn: Turn) -> dict[str, Any]:
        return {
            "model": self.definition.model,
            "instructions": self.instructions,
            "tool_names": list(self.definition.tools),
            "schema_digest": self.definition.schema_digest,
            "options": database.dumps(self._asked(turn)),
            "context": self.window.described(),
        }

    def _asked(self, turn: Turn) -> dict[str, Any]:
        """Return the options of the request with what it said of tools, as `Step.asked` gives them back."""
        asked = {**self.options, "tool_choice": self.definition.choice_at(turn.step, last=turn.last)}
        if self.definition.parallel_tool_calls is not None:
            asked["parallel_tool_calls"] = self.definition.parallel_tool_calls
        return asked

    def _usage_row(self, usage: UsageReported) -> dict[str, Any]:
        price = settings().prices.get(self.model) or settings().prices.get(self.definition.model)
        cost = None
        if price is not None:
            million = Decimal(1_000_000)
            cost = str(
                Decimal(str(price.get("input", 0))) * usage.input_tokens / million
                + Decimal(str(price.get("output", 0))) * usage.output_tokens / million
            )
        return {
            "model": self.definition.model,
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cached_tokens": usage.cached_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "cost": cost,
        }

    # -- lingering --

    def _linger(self, joined: bool) -> Turn | None:
        """Wait a little for the calls, without connection and claim. Returns the next turn, or None when the leg is over.

        joined: every call came settled, so the run is queued for this leg already.
        """
        wake = self.claim.wake
        if wake is None or self._linger_time() <= timedelta(0):
            self._give_up("drained")  # nothing to end when the commit was told of no linger
            return None
        until = time.monotonic() + settings().linger.total_seconds() + 0.05  # the last look is after linger_until
        while True:
            remaining = until - time.monotonic()
            if not joined and remaining > 0:
                database.release()
                wake.wait(min(LOOK_SECONDS, remaining))
                wake.clear()
                self.claim.check_lost()
            joined = False
            if self.process.draining:
                self._give_up("drained")
                return None
            over = time.monotonic() >= until
            taken = self._look()
            if taken is not False:
                return taken or None
            if over:
                self._give_up("tools")
                return None

    def _look(self) -> Turn | Literal[False] | None:
        """Claim if the join has queued the run. False: not yet."""
        used = self._used
        opening, ask = self._opening(), self._ask()
        # Whatever epoch the answer brings is known from before it is asked for: until it is here, this worker's presence
        # would take the new claim for one that nobody holds, and give it back.
        self.registered(None)
        answer = lifecycle.claim_lingering(
            self.claim.run_id, self.id, self.claim.worker, opens=not used, turn=opening, ask=ask
        )
        status = answer["status"]
        if status in ("waiting", "requires_action"):
            self.registered(self.claim.epoch)
            return False
        if status != "running":
            raise FenceLost
        self.claim.epoch = answer["epoch"]
        self.registered(self.claim.epoch)
        logs.bind(epoch=self.claim.epoch)  # until the leg's end, which releases all
        logger.info("Run %s claimed again", self.claim.run_id, extra={"action": "run.claimed"})
        if used:
            self._requeue("budget")
            return None
        if answer["turn"] is None:
            raise FenceLost
        return self._opened(opening[0], answer["turn"])

    def _give_up(self, reason: str) -> None:
        """End the leg that waits, if it is still the open one."""
        answer = lifecycle.end_lingering(self.claim.run_id, self.id, reason)
        logger.info(
            "Run %s: its leg ends, its calls go on (%s)",
            self.claim.run_id,
            reason,
            extra={"action": "leg.ended", "reason": reason},
        )
        self._announce(answer)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Hear the leg's bell: the join of its calls, or the end of its run."""
        if self.process.flusher is None:
            yield
            return
        with bells.ear().listen(bells.leg_channel(self.claim.run_id)) as wake:
            self.claim.wake = wake
            try:
                yield
            finally:
                self.claim.wake = None

    # -- the exits of a leg, each one transaction --

    def _requeue(self, reason: str, delay: timedelta = timedelta(0)) -> None:
        answer = lifecycle.requeue(
            self.claim.run_id, self.claim.epoch, self.claim.worker, reason, delay=delay, usage=self.usage
        )
        logger.info(
            "Run %s handed over (%s)",
            self.claim.run_id,
            reason,
            extra={"action": "run.handed_over", "reason": reason},
        )
        self._announce(answer)

    def _finish_at(self, limit: StopReason) -> None:
        status = Status.COMPLETED if limit == StopReason.MAX_STEPS else Status.FAILED
        error = None
        if status == Status.FAILED:
            error = {
                "code": str(limit),
                "message": f"The run reached its limit: {limit.label.lower()}.",
                "retryable": False,
            }
        answer = lifecycle.finish(self.claim.run_id, self.claim.epoch, self.claim.worker, status, limit, error=error)
        self._say_end(status, limit, error)
        self._announce(answer)

    def _fail(self, reason: StopReason, code: str, message: str, *, retryable: bool = False) -> None:
        error = {"code": code, "message": redact(message), "retryable": retryable}
        answer = lifecycle.finish(
            self.claim.run_id,
            self.claim.epoch,
            self.claim.worker,
            Status.FAILED,
            reason,
            error=error,
            usage=self.usage,
        )
        self._say_end(Status.FAILED, reason, error)
        self._announce(answer)

    def _say_end(self, status: Status, stop_reason: StopReason, error: Mapping[str, Any] | None) -> None:
        """Log the end of the run: by its error's code, for the text is its reader's."""
        logger.log(
            logging.WARNING if status == Status.FAILED else logging.INFO,
            "Run %s %s (%s)",
            self.claim.run_id,
            status.value,
            stop_reason.value,
            extra={"action": f"run.{status.value}", "stop_reason": stop_reason, "code": (error or {}).get("code")},
        )

    # -- what surrounds a message --

    def _buffer(self, message: UUID) -> Buffer:
        flusher = self.process.flusher
        return Buffer(self.claim, self.claim.epoch, message) if flusher is None else flusher.open(self.claim, message)

    def _close(self, turn: Turn) -> None:
        if self.process.flusher is not None:
            self.process.flusher.close(turn.buffer)

    def _bell(self) -> None:
        """Ring for what was just committed, with the flusher's next batch."""
        if self.process.flusher is not None:
            self.process.flusher.ring(self.claim.run_id)

    def _announce(self, answer: dict[str, Any]) -> None:
        if self.process.flusher is None:
            admission.announce(answer)
        else:
            self._bell()
            admission.announce(answer, ring=False)


def _append(parts: list[dict[str, Any]], kind: str, text: str) -> None:
    if parts and parts[-1]["type"] == kind:
        parts[-1]["text"] += text
    else:
        parts.append({"type": kind, "text": text})


def retry_delay(tries: int, retry_after: timedelta | None = None) -> timedelta:
    """Return how long to wait before the next try of the model, after `tries` failed ones: full jitter, or what was asked.

    The ceiling of the draw is 0.5, 1, 2, 4 ... 60 s; Retry-After is capped at an hour.
    """
    if retry_after is not None:
        return min(max(retry_after, timedelta(0)), quotas.LONGEST_PAUSE) + timedelta(milliseconds=50)
    ceiling = min(60.0, 0.5 * 2 ** (tries - 1))
    return timedelta(seconds=max(0.05, random.uniform(0, ceiling)))  # noqa: S311
