"""Every claim of the demo, checked against the database: not against what the screen showed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from agents_project.demo import audit
from agents_project.demo.models import Ledger
from agents_project.demo.source import Package
from agents_project.demo.supervisor import Kill
from runs.models import Event, Leg, Run, Status, Step
from runs.verification import verify
from threads.models import Message, MessageStatus, Role
from tools.models import CallStatus, Outcome, ToolAttempt, ToolCall

FIRST, LAST = 1, 50
BUDGET_LEGS = 4  # at least
# About a second, on a machine that may be busy: the other agents worker is there already. The calls of a killed tools worker
# wait for one that has to start, which took over 6 s on two cores with eight others waiting.
RESUMED_WITHIN = {"agents": timedelta(seconds=3), "tools": timedelta(seconds=10)}


@dataclass(frozen=True)
class Claim:
    """One statement, and whether the rows bear it out. `found` is what they say, in a few words."""

    text: str
    true: bool
    found: str = ""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a demo. `figures` is what `--json` prints."""

    claims: tuple[Claim, ...]
    figures: dict[str, Any]


def numbers_in(text: str) -> list[int]:
    """Return the whole numbers of a text: 50 and 1275 in "50 numbers, the total is 1,275."."""
    found = re.findall(r"-?\d+(?:[,\u202f'\u00a0]\d{3})*", text)
    return [int(re.sub(r"[^\d-]", "", number)) for number in found]


def total_in(output: Any) -> int | None:
    """Return the last whole number of the answer: 1275 in "The total is 1,275."."""
    numbers = numbers_in(output if isinstance(output, str) else str(output or ""))
    return numbers[-1] if numbers else None


def results_of(run: Run) -> list[int | None]:
    """Return the numbers that the tool messages of the run's transcript give back, in the transcript's order."""
    found: list[int | None] = []
    messages = Message.objects.filter(run_id=run.pk, role=Role.TOOL, status=MessageStatus.COMPLETED)
    for message in messages.order_by("position"):
        for part in message.content:
            if part.get("type") == "tool_result":
                result = part.get("result")
                found.append(result.get("number") if isinstance(result, dict) else None)
    return found


def resumed_after(run: UUID, kill: Kill) -> timedelta | None:
    """Return how long after the kill the run went on: its next leg, or for a tools worker the next start of a call."""
    kind = "leg.started" if kill.kind == "agents" else "tool_call.started"
    events = Event.objects.filter(run_id=run, type=kind, at__gt=kill.at).order_by("seq")
    at = events.values_list("at", flat=True).first()
    return None if at is None else at - kill.at


def judge(run: Run, kills: Sequence[Kill], asked: Sequence[str], violations: int, duration: timedelta) -> Verdict:
    """Check what a run of the demo's job must have left. `asked` are the kinds of workers that were to be killed."""
    run = Run.objects.get(pk=run.pk)
    expected = list(range(FIRST, LAST + 1))
    total, results = total_in(run.output), results_of(run)
    legs = list(Leg.objects.filter(run=run).order_by("number"))
    reasons = Counter(leg.reason for leg in legs)
    calls = ToolCall.objects.filter(run_id=run.pk)
    call_ids = list(calls.values_list("id", flat=True))
    attempts = ToolAttempt.objects.filter(call__run_id=run.pk)
    ledger = sorted(Ledger.objects.filter(call_id__in=call_ids).values_list("number", flat=True))
    messages = Message.objects.filter(run_id=run.pk)
    pending = messages.filter(status=MessageStatus.PENDING).count()
    discarded = set(messages.filter(status=MessageStatus.DISCARDED).values_list("id", flat=True))
    a_step = Counter(calls.values_list("step", flat=True))
    steps = Step.objects.filter(run=run).count()
    resumed = [resumed_after(run.pk, kill) for kill in kills]
    differences = verify(run).differences

    claims = [
        Claim("the run is completed", run.status == Status.COMPLETED, f"{run.status} ({run.stop_reason})"),
        Claim(f"the total is {sum(expected)}", total == sum(expected), str(total)),
        Claim(f"{LAST} results stand in the transcript, in order", results == expected, f"{len(results)} results"),
        Claim(f"{LAST} ledger rows, one a number", ledger == expected, f"{len(ledger)} rows"),
        Claim(
            "one call a step, each settled once",
            sorted(a_step.values()) == [1] * LAST and attempts.filter(outcome="success").count() == LAST,
            f"{len(call_ids)} calls, {attempts.count()} attempts, {steps} steps",
        ),
        Claim(
            f"at least {BUDGET_LEGS} legs ended by their time budget",
            reasons["budget"] >= BUDGET_LEGS,
            f"{reasons['budget']} of {len(legs)}",
        ),
        Claim("no message is pending", pending == 0, str(pending)),
        Claim("no invariant is violated", violations == 0, f"{violations} violations"),
        Claim("the event log alone tells the same run", not differences, f"{len(differences)} differences"),
    ]
    for kind in asked:
        kill = next((each for each in kills if each.kind == kind), None)
        if kill is None:
            claims.append(Claim(f"the {kind} worker was killed", False, "it was not"))
            continue
        if kind == "agents":
            cut = kill.cut in discarded and reasons["lost"] >= 1
            claims.append(Claim("the message that was cut is discarded", cut, f"{len(discarded)} discarded"))
        else:
            numbers = list(attempts.filter(call_id=kill.cut).order_by("number").values_list("outcome", flat=True))
            once = Ledger.objects.filter(call_id=kill.cut).count() == 1
            claims.append(
                Claim(
                    "the call that was cut ran again, took effect once",
                    len(numbers) >= 2 and numbers[-1] == "success" and "success" not in numbers[:-1] and once,
                    ", ".join(numbers),
                )
            )
        after = resumed[list(kills).index(kill)]
        limit = RESUMED_WITHIN[kind]
        claims.append(
            Claim(
                f"the run went on within {limit.seconds} s of the {kind} kill",
                after is not None and after <= limit,
                "it did not" if after is None else f"{milliseconds(after)} ms",
            )
        )
    figures = {
        "status": run.status,
        "total": total,
        "steps": steps,
        "legs": len(legs),
        "legs_by_reason": dict(sorted(reasons.items())),
        "tool_calls": len(call_ids),
        "tool_attempts": attempts.count(),
        "ledger_rows": len(ledger),
        "kills": len(kills),
        "discarded_messages": len(discarded),
        "pending_messages": pending,
        "resumed_after_ms": [None if after is None else milliseconds(after) for after in resumed],
        "violations": violations,
        "differences": len(differences),
        "duration_s": round(duration.total_seconds(), 2),
    }
    return Verdict(tuple(claims), figures)


def judge_audit(run: Run, package: Package, violations: int, duration: timedelta) -> Verdict:
    """Check what an audit of the package must have left; some of what its tools found is read again, here."""
    run = Run.objects.get(pk=run.pk)
    calls = list(ToolCall.objects.filter(run_id=run.pk).order_by("step", "index"))
    attempts = ToolAttempt.objects.filter(call__run_id=run.pk)
    spans = [(begun, ended) for begun, ended in attempts.values_list("started_at", "ended_at") if ended is not None]
    running = max((sum(begun <= at < ended for begun, ended in spans) for at, _ in spans), default=0)
    a_step = max(Counter(call.step for call in calls).values(), default=0)
    settled = sum(call.status == CallStatus.SETTLED for call in calls)
    successes = attempts.filter(outcome="success").values_list("call_id", flat=True)
    legs = Leg.objects.filter(run=run).count()
    pending = Message.objects.filter(run_id=run.pk, status=MessageStatus.PENDING).count()
    looked = [call for call in calls if call.name == "undocumented" and call.outcome == Outcome.SUCCESS]
    found: list[dict[str, Any]] = [call.result or {} for call in looked]
    report = run.output if isinstance(run.output, str) else ""
    modules = len(package.files)
    again = [call for call in calls if call.name == "list_modules" and call.outcome == Outcome.SUCCESS] + looked[-1:]
    tools = {tool.name: tool for tool in audit.TOOLS}
    same = [call.result == tools[call.name](**call.arguments) for call in again]
    differences = verify(run).differences

    claims = [
        Claim("the run is completed", run.status == Status.COMPLETED, f"{run.status} ({run.stop_reason})"),
        Claim("several calls were asked for at once", a_step > 1, f"{a_step} in a step, {running} ran at once"),
        Claim(
            "every call is settled, none succeeded twice",
            settled == len(calls) > 0 and len(set(successes)) == len(successes),
            f"{len(calls)} calls, {attempts.count()} attempts",
        ),
        Claim("read again, the files say the same", bool(same) and all(same), f"{len(same)} results compared"),
        Claim("the report says how many modules there are", modules in numbers_in(report), f"{modules:,}"),
        Claim("no message is pending", pending == 0, str(pending)),
        Claim("no invariant is violated", violations == 0, f"{violations} violations"),
        Claim("the event log alone tells the same run", not differences, f"{len(differences)} differences"),
    ]
    figures = {
        "status": run.status,
        "package": package.name,
        "version": package.version,
        "modules": modules,
        "public_names": sum(each["public"] for each in found),
        "undocumented": sum(each["undocumented"] for each in found),
        "steps": run.steps,
        "legs": legs,
        "tool_calls": len(calls),
        "tool_attempts": attempts.count(),
        "most_asked_at_once": a_step,
        "most_running_at_once": running,
        "pending_messages": pending,
        "violations": violations,
        "differences": len(differences),
        "duration_s": round(duration.total_seconds(), 2),
        "report": report,
    }
    return Verdict(tuple(claims), figures)


def milliseconds(span: timedelta) -> int:
    return round(span / timedelta(milliseconds=1))
