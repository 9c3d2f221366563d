"""The table of tool calls: what each event does to a call in each status. The page shows it, the tests are made from it.

`RULES` says it once. A rule is for some statuses, and for some tools where it depends on the tool: `kinds`. Every pair of
a status and an event has its rules, one a case; `cells()` lists them, and fails for a pair that is missing or told twice.

`python -m tests.docs.tools` writes docs/tools.md from it; tests/tools/test_table.py makes a test of every cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

STATUSES = (
    "requested", "retrying", "running", "unknown", "awaiting_approval", "awaiting_result", "awaiting_child", "settled",
)  # fmt: skip
OPEN = STATUSES[:-1]
LATER = ("awaiting_approval", "awaiting_result", "awaiting_child")
EVENTS = {
    "claim": "a worker takes the call's message",
    "settle": "the attempt that runs returns its result",
    "fail": "the attempt that runs raises",
    "time out": "the time of an attempt is up",
    "cancel": "somebody cancels the call",
    "worker death": "the worker of the last attempt dies",
    "zombie wakes": "a worker that was stopped, and has not beaten since, goes on",
    "late result": "an attempt that was taken from its worker returns after all",
    "doubled message": "the call's message comes a second time",
    "run cancelled": "its run is cancelled",
    "run failed": "its run fails: its deadline passes",
    "thread deleted": "its thread is deleted",
    "result": "a person gives its result",
    "error": "a person says that it failed",
    "run again": "a person says that it did not take effect and may run again",
}
KINDS = {
    "plain": "`idempotent=None`",
    "idempotent": "`idempotent=True`",
    "atomic": "`atomic=True`",
    "once": "`idempotent=False`",
    "once, told": '`idempotent=False, on_unknown="tell_model"`',
    "once, fails": '`idempotent=False, on_unknown="fail"`',
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What becomes of a call. `to` "" is no change at all, of any row; `deleted` is a row that is gone.

    `case` tells rules of one status and event apart, in words. `events` are those that tell of the call itself, `attempt`
    is how its last attempt is closed. `run` is the run's status where the call does not decide it. `says` is for readers.
    `answer`: refused (and logged by the worker), dropped (the message), or an HTTP code of a person's request.
    """

    says: str
    kinds: tuple[str, ...] = ("plain",)  # those that a test tries
    only: bool = False  # of these kinds only, and so the page names them
    case: str = ""
    to: str = ""
    outcome: str = ""
    code: str = ""
    events: tuple[str, ...] = ()
    attempt: str = ""
    run: str = ""
    answer: str = ""
    given: str = ""  # another way into the status: a key of test_table.WAYS
    effect: bool | None = None  # of an atomic tool: whether what it wrote is there


SETTLED = ("tool_call.settled",)
_NOBODY = "Nothing happens: no worker has it."
_NO_ATTEMPT = "Nothing changes: no attempt of it runs, so the result is refused."
_TWICE = ("idempotent", "atomic", "plain")


def _success(**more: Any) -> Rule:
    said: dict[str, Any] = {
        "says": "It is settled with the result.",
        "to": "settled",
        "outcome": "success",
        "events": SETTLED,
    }
    return Rule(**said | {"attempt": "success"} | more)


def _failed(says: str, code: str, **more: Any) -> Rule:
    said: dict[str, Any] = {
        "says": says,
        "to": "settled",
        "outcome": "failed",
        "code": code,
        "events": SETTLED,
        "attempt": "failed",
    }
    return Rule(**said | more)


def _refused(says: str, **more: Any) -> Rule:
    return Rule(**{"says": says, "answer": "refused"} | more)


def _dropped(says: str, **more: Any) -> Rule:
    return Rule(**{"says": says, "answer": "dropped"} | more)


_AGAIN: dict[str, Any] = {"to": "retrying", "events": ("tool_call.retrying",)}
_STARTED: dict[str, Any] = {"to": "running", "events": ("tool_call.started",)}
_CLOSED: dict[str, Any] = {"to": "settled", "outcome": "cancelled", "events": SETTLED}
_UNTAKEN = _dropped("The message is dropped: the call is not to be run.")
_NOT_AWAITED = Rule(says="409 `not_awaited`: the call waits for no person's answer.", answer="not_awaited")
_ALREADY = Rule(says="409 `already_settled`, and nothing changes.", answer="already_settled")

RULES: dict[str, list[tuple[tuple[str, ...], Rule]]] = {
    "claim": [
        (("requested",), Rule(says="The worker runs it: its first attempt begins.", kinds=tuple(KINDS), **_STARTED)),
        (("retrying",), Rule(says="The worker runs it: its next attempt begins.", kinds=_TWICE, **_STARTED)),
        (
            ("retrying",),
            _dropped(
                "The message is dropped: the wait before the next attempt is not over.",
                case="before it is due",
                given="put off",
            ),
        ),
        (("running", "unknown", "settled", *LATER), _UNTAKEN),
    ],
    "settle": [
        (("running",), _success(kinds=("plain", "idempotent", "once"))),
        (
            ("running",),
            _success(
                says="What the tool wrote and the settlement are committed together.",
                kinds=("atomic",),
                only=True,
                effect=True,
            ),
        ),
        (("requested", "retrying", *LATER), _refused(_NO_ATTEMPT)),
        (
            ("unknown",),
            _success(says="Its worker was taken for dead and lives: the result settles the call.", kinds=("once",)),
        ),
        (("settled",), Rule(says="Nothing changes: a settlement may be sent again, until it is answered.")),
    ],
    "fail": [
        (
            ("running",),
            Rule(
                says="It is tried again, after the wait of its `RetryPolicy`.",
                case="an attempt is left",
                kinds=_TWICE,
                only=True,
                attempt="retrying",
                effect=False,
                **_AGAIN,
            ),
        ),
        (
            ("running",),
            _failed(
                "It has failed; the model is told the exception's class.",
                "error",
                case="no attempt is left",
                given="last attempt",
            ),
        ),
        (
            ("running",),
            _failed("It has failed; the model is told the exception's class.", "error", kinds=("once",), only=True),
        ),
        (
            ("running",),
            _failed("It has failed for good; the model reads the text.", "tool_failed", case="raises `ToolFailed`"),
        ),
        (
            ("running",),
            _failed(
                "It has failed; the model reads the text and may try otherwise.",
                "model_retry",
                case="raises `ModelRetry`",
                kinds=("plain", "once"),
            ),
        ),
        (("requested", "retrying", *LATER), _refused("Nothing changes: no attempt of it runs.")),
        (
            ("unknown",),
            _failed("Its worker was taken for dead and lives: the call has failed.", "error", kinds=("once",)),
        ),
        (("settled",), _refused("Nothing changes: the first settlement stands.")),
    ],
    "time out": [
        (
            ("running",),
            _failed(
                "The tool is interrupted, and the call has failed. It is not tried again.",
                "timed_out",
                case="the soft limit of a prefork worker",
                kinds=("plain", "once", "atomic"),
                effect=False,
            ),
        ),
        (
            ("running",),
            _failed(
                "The sweep settles it 5 s later. It is not tried again.",
                "timed_out",
                case="nothing stops the tool",
                kinds=("plain", "idempotent", "atomic", "once"),
                attempt="lost",
            ),
        ),
        (("requested", "retrying"), Rule(says="Nothing happens: the time of an attempt begins with its claim.")),
        (
            ("unknown", *LATER),
            Rule(says="Nothing happens: the time of an attempt ends with it. The run's deadline stays."),
        ),
        (("settled",), Rule(says="Nothing happens.")),
    ],
    "cancel": [
        (
            ("requested", "retrying"),
            Rule(
                says="It is settled, and its run goes on. Its message finds nothing to do.", code="cancelled", **_CLOSED
            ),
        ),
        (
            ("running",),
            Rule(
                says="It is settled, and its run goes on. The tool hears it by `is_cancelled()`; its result is refused.",
                code="cancelled",
                attempt="cancelled",
                kinds=("plain", "atomic", "once"),
                **_CLOSED,
            ),
        ),
        (("unknown", *LATER), Rule(says="It is settled, and its run goes on.", code="cancelled", **_CLOSED)),
        (("settled",), Rule(says="Nothing changes. The call is answered as it is.")),
    ],
    "worker death": [
        (
            ("running",),
            Rule(
                says="It is requested again: at once; of a plain tool when a beat is missed too.",
                case="an attempt is left",
                kinds=_TWICE,
                only=True,
                attempt="lost",
                effect=False,
                **_AGAIN,
            ),
        ),
        (
            ("running",),
            _failed("It has failed.", "worker_lost", case="no attempt is left", given="last attempt", attempt="lost"),
        ),
        (
            ("running",),
            Rule(
                says="Nobody knows whether it took effect. It is never started again unless a person says so.",
                kinds=("once",),
                only=True,
                to="unknown",
                events=("tool_call.unknown",),
                attempt="lost",
            ),
        ),
        (
            ("running",),
            _failed(
                "The model is told that nobody knows whether it took effect, and goes on.",
                "unknown_outcome",
                kinds=("once, told",),
                only=True,
                attempt="lost",
            ),
        ),
        (
            ("running",),
            _failed(
                "Its run fails with it: `failed` (`tool_unknown`). A person looks, then resumes the run.",
                "unknown_outcome",
                kinds=("once, fails",),
                only=True,
                attempt="lost",
                run="failed",
            ),
        ),
        (("requested", "retrying", "unknown", *LATER), Rule(says=_NOBODY)),
        (("settled",), Rule(says="Nothing happens.")),
    ],
    "zombie wakes": [
        (
            ("requested", "retrying"),
            _refused("Its claim is refused until it has beaten again; another worker takes the call."),
        ),
        (
            ("running",),
            _success(says="Nobody has taken the call from it yet: its result settles it.", kinds=("plain", "once")),
        ),
        (("unknown",), _success(says="Its result settles the call.", kinds=("once",))),
        (("settled",), _refused("Nothing changes: the first settlement stands.", given="taken over and settled")),
        (LATER, _dropped("Nothing changes: it holds nothing any more, and there is nothing to claim.")),
    ],
    "late result": [
        (("requested", *LATER), _refused(_NO_ATTEMPT)),
        (("retrying",), _refused("Nothing changes: the next attempt is the one that counts.", given="taken")),
        (
            ("retrying",),
            _refused(
                "What it wrote is rolled back: the next attempt is the one that counts.",
                kinds=("atomic",),
                only=True,
                given="taken",
                effect=False,
            ),
        ),
        (("running",), _refused("Nothing changes: another attempt runs.", given="taken over")),
        (
            ("running",),
            _refused(
                "What it wrote is rolled back: another attempt runs.",
                kinds=("atomic",),
                only=True,
                given="taken over",
                effect=False,
            ),
        ),
        (("unknown",), _success(says="It settles the call: now somebody knows.", kinds=("once",))),
        (("settled",), _refused("Nothing changes: the first settlement stands.", given="taken over and settled")),
        (("settled",), _refused("Nothing changes.", case="it was cancelled", given="cancelled while it ran")),
        (
            ("settled",),
            _refused(
                "What it wrote is rolled back.",
                case="it was cancelled",
                kinds=("atomic",),
                only=True,
                given="cancelled while it ran",
                effect=False,
            ),
        ),
        (
            ("settled",),
            _refused("Nothing changes.", case="a person answered it", kinds=("once",), given="answered by a person"),
        ),
    ],
    "doubled message": [
        (
            ("requested", "retrying"),
            Rule(says="The first is a claim, the second is dropped: one attempt begins.", **_STARTED),
        ),
        (("running",), _dropped("The message is dropped: the attempt goes on.", kinds=("plain", "atomic", "once"))),
        (
            ("running",),
            Rule(
                says="The call is taken from its dead worker, and its next attempt begins at once.",
                case="redelivered, and its worker's lock is free",
                kinds=("idempotent", "atomic"),
                only=True,
                to="running",
                events=("tool_call.retrying", "tool_call.started"),
                given="held by the dead",
            ),
        ),
        (
            ("running",),
            _dropped(
                "The message is dropped: the watcher decides, when a beat is missed too.",
                case="redelivered, and its worker's lock is free",
                kinds=("plain", "once"),
                only=True,
                given="held by the dead",
            ),
        ),
        (("unknown", "settled", *LATER), _UNTAKEN),
    ],
    "run cancelled": [
        (
            ("requested", "retrying", "unknown", *LATER),
            Rule(says="It is settled with its run.", run="cancelled", **_CLOSED),
        ),
        (
            ("running",),
            Rule(
                says="It is settled with its run. The tool hears it by `is_cancelled()`; its result is refused.",
                attempt="cancelled",
                kinds=("plain", "atomic", "once"),
                run="cancelled",
                **_CLOSED,
            ),
        ),
        (("settled",), Rule(says="The call stays as it is.", to="settled", outcome="success", run="cancelled")),
    ],
    "run failed": [
        (
            ("requested", "retrying", "unknown", *LATER),
            Rule(says="It is settled with its run.", run="failed", **_CLOSED),
        ),
        (
            ("running",),
            Rule(
                says="It is settled with its run. The tool hears it by `is_cancelled()`; its result is refused.",
                attempt="cancelled",
                run="failed",
                **_CLOSED,
            ),
        ),
        (("settled",), Rule(says="The call stays as it is.", to="settled", outcome="success", run="failed")),
    ],
    "thread deleted": [
        (
            ("running",),
            Rule(
                says="Its run is cancelled, then all is deleted. Its result finds no call, and is refused.",
                to="deleted",
            ),
        ),
        (
            tuple(status for status in STATUSES if status != "running"),
            Rule(says="Its run is cancelled, then all is deleted. Its message finds no call.", to="deleted"),
        ),
    ],
    "result": [
        (
            ("unknown",),
            Rule(
                says="It is settled with that result, and its run goes on.",
                kinds=("once",),
                to="settled",
                outcome="success",
                events=SETTLED,
            ),
        ),
        (("requested", "retrying", "running", *LATER), _NOT_AWAITED),
        (("settled",), _ALREADY),
    ],
    "error": [
        (
            ("unknown",),
            Rule(
                says="It has failed; the model reads what the person wrote, and the run goes on.",
                kinds=("once",),
                to="settled",
                outcome="failed",
                code="tool_failed",
                events=SETTLED,
            ),
        ),
        (("requested", "retrying", "running", *LATER), _NOT_AWAITED),
        (("settled",), _ALREADY),
    ],
    "run again": [
        (
            ("unknown",),
            Rule(
                says="It is requested again. From now on the first attempt's late result is refused.",
                kinds=("once",),
                attempt="released",
                **_AGAIN,
            ),
        ),
        (("requested", "retrying", "running", *LATER), _NOT_AWAITED),
        (("settled",), _ALREADY),
    ],
}


@dataclass(frozen=True)
class Cell:
    """One case of one event in one status, for one kind of tool: what a test tries."""

    event: str
    status: str
    kind: str
    rule: Rule

    @property
    def repeats(self) -> bool:
        """Whether another cell of the rule shows the same for another tool, or another of the statuses of later issues."""
        same = not self.rule.only and self.kind not in (self.rule.kinds[0], "once" if self.status == "unknown" else "")
        return same or self.status in LATER[1:]

    def __str__(self) -> str:
        return " | ".join([self.event, self.status, self.kind, *([self.rule.case] if self.rule.case else [])])


def cells() -> Iterator[Cell]:
    """Every cell. Raises AssertionError where the table has a hole, or tells a case twice."""
    assert list(RULES) == list(EVENTS)
    found: Counter[tuple[str, ...]] = Counter()
    for event, rules in RULES.items():
        for statuses, rule in rules:
            for status in statuses:
                for kind in rule.kinds:
                    # Only a call that must not run twice is ever unknown.
                    cell = Cell(event, status, "once" if status == "unknown" and kind == "plain" else kind, rule)
                    found[event, status, cell.kind, rule.case] += 1
                    yield cell
        told = {status for statuses, _ in rules for status in statuses}
        assert told == set(STATUSES), (event, set(STATUSES) - told)
    assert not [cell for cell, count in found.items() if count > 1]
