"""The table of busy threads: what each mode of `busy` makes of a thread, by how its live run stands.

`STANDS` are the ways in which a run can stand, with what its thread shows then; `cells()` pairs each with each mode, and says the
transcript that comes of it. docs/busy.md shows the table, and tests/runs/test_busy_table.py makes a test of every cell.

A transcript is a list of words, one a message, in the order of the thread: who, what was said, and the message's status in
brackets where it is not `completed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

MODES = ("enqueue", "steer", "interrupt", "rollback", "reject")
INPUT = "user: second"


@dataclass(frozen=True)
class Stand:
    """How a run stands: its status, what its thread shows, and what a cancel makes of that.

    `effects`: what a rollback tells of its calls, by name.
    """

    says: str
    status: str
    shows: tuple[str, ...]
    ended: tuple[str, ...]
    effects: dict[str, str] = field(default_factory=dict)


_FIRST = "user: first"
_ASKED = "assistant: said, and asks"

STANDS = {
    "queued": Stand("it waits for a worker", "queued", (_FIRST,), (_FIRST,)),
    "retry": Stand("its model failed, and is asked again later", "queued", (_FIRST,), (_FIRST,)),
    "claimed": Stand("a worker has it, the model is not asked yet", "running", (_FIRST,), (_FIRST,)),
    "silent": Stand("the model has said nothing yet", "running", (_FIRST, "assistant:  [pending]"), (_FIRST,)),
    "speaking": Stand(
        "in mid stream",
        "running",
        (_FIRST, "assistant:  [pending]"),
        (_FIRST, "assistant: so far [partial]"),
    ),
    "requested": Stand("its call waits for a worker", "waiting", (_FIRST, _ASKED), (_FIRST, _ASKED, "tool: cancelled")),
    "lingering": Stand(
        "its call waits, its leg lingers", "waiting", (_FIRST, _ASKED), (_FIRST, _ASKED, "tool: cancelled")
    ),
    "executing": Stand(
        "its call runs",
        "waiting",
        (_FIRST, _ASKED),
        (_FIRST, _ASKED, "tool: cancelled"),
        {"call 0": "possible"},
    ),
    "fan-out": Stand(
        "of three calls one is done, one runs, one waits",
        "waiting",
        (_FIRST, _ASKED),
        (_FIRST, _ASKED, "tool: success", "tool: cancelled", "tool: cancelled"),
        {"call 0": "taken", "call 1": "possible"},
    ),
    "joined": Stand(
        "its calls are done, it waits for a worker",
        "queued",
        (_FIRST, _ASKED, "tool: success"),
        (_FIRST, _ASKED, "tool: success"),
        {"call 0": "taken"},
    ),
    "unknown": Stand(
        "a person must say what became of its call",
        "requires_action",
        (_FIRST, _ASKED),
        (_FIRST, _ASKED, "tool: cancelled"),
        {"call 0": "possible"},
    ),
}


@dataclass(frozen=True)
class Cell:
    """What a start does. `answer`: the run that is returned, `new` or `live`, or `409`."""

    stand: str
    mode: str
    transcript: tuple[str, ...]
    answer: str
    live: str  # the old run's status after it
    new: str = ""
    stop_reason: str = ""
    effects: dict[str, str] = field(default_factory=dict)


def cells() -> Iterator[Cell]:
    for name, stand in STANDS.items():
        waits = f"{INPUT} [waiting]"
        yield Cell(name, "enqueue", (*stand.shows, waits), "new", stand.status, "held")
        yield Cell(name, "steer", (*stand.shows, waits), "live", stand.status)
        yield Cell(name, "interrupt", (*stand.ended, INPUT), "new", "cancelled", "queued", "interrupted")
        back = tuple(f"{said.partition(' [')[0]} [rolled_back]" for said in stand.ended)
        yield Cell(name, "rollback", (*back, INPUT), "new", "cancelled", "queued", "rolled_back", stand.effects)
        yield Cell(name, "reject", stand.shows, "409", stand.status)
