"""What must hold in every state, by the numbers of the invariants in the design; and what counts as an end."""

from __future__ import annotations

from tests.model.rows import (
    ACTION,
    CANCELLED,
    EXECUTING,
    HELD,
    OCCUPYING,
    OPEN,
    RUNNING,
    TERMINAL,
    WAITS,
    World,
)
from tests.model.scenarios import Scenario


def violation(world: World, scenario: Scenario) -> str:
    """Return what is wrong with a state, "" for nothing."""
    if world.bad:
        return world.bad
    runs = world.runs
    if sum(run.status in OCCUPYING for run in runs) > 1:
        return "held: two runs occupy one thread"
    spent = scenario.faults - world.left.faults
    for number, run in enumerate(runs):
        if (run.status in TERMINAL) != run.ended:
            return "1: terminal state and terminal event differ"
        if run.pending and run.status != RUNNING:
            return "6: a pending message outlives its leg"
        if len(run.legs) > 1:
            return "linger: two legs of one run are open"
        if run.ended and run.legs:
            return "linger: a leg is open after the end of its run"
        if run.ended and not run.joined:
            return "6: the transcript ends in unanswered calls"
        if run.status == RUNNING and not run.legs:
            return "linger: a run is running and its leg is ended"
        if run.status == HELD and any(later.status not in (HELD, CANCELLED) for later in runs[number + 1 :]):
            return "held: a run overtook one that was accepted before it"
        # A process that loses its lock and lives may claim once more before its life is closed.
        if run.lost > spent * (2 if "blip" in scenario.kinds else 1):
            return "5: more losses were counted than workers were lost"
        claims = 0
        for process in world.processes:
            for at, its_run, epoch, leg in process.jobs if process.kind == "A" else ():
                if its_run == number and epoch == run.epoch and run.status == RUNNING and at in "bhmwne":
                    claims += 1
                    if leg not in run.legs:
                        return "linger: a leg runs that is ended in the log"
        if claims > 1:
            return "3: two live claims"
    first = runs[0]
    open_calls = [call for call in world.calls if call.status in OPEN]
    if open_calls and first.ended:
        return "8: an open call of a finished run"
    if open_calls and first.status not in WAITS:
        return "an open call while its run does not wait"
    for call in world.calls:
        if call.kind == "@" and call.effect != (call.outcome == "ok"):
            return "5: an atomic effect without its settlement, or twice"
        if call.kind == "N" and call.effect > 1:
            return "5: an idempotent=False tool ran twice"
        if call.outcome == "ok" and not call.effect:
            return "5: success without an effect"
        if call.status == EXECUTING and call.holder is None:
            return "a running call without a holder"
    return ""


def changed_after_end(before: World, after: World) -> bool:
    """Whether a run that had ended is another one now."""
    if before.runs is after.runs and before.calls is after.calls:
        return False
    for old, new in zip(before.runs, after.runs, strict=False):
        if old.ended and (old.status, old.step, old.joined) != (new.status, new.step, new.joined):
            return True
    return before.runs[0].ended and [call.status for call in before.calls] != [call.status for call in after.calls]


def is_end(world: World) -> bool:
    """Every run has ended, or waits for a person: then those behind it wait too."""
    if all(run.ended for run in world.runs):
        return not (world.saw and world.saw[0] < 0)
    return world.runs[0].status == ACTION
