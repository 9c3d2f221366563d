"""The list. Each module is a part of the protocol; a group is a heading of docs/durability.md."""

from __future__ import annotations

from tests.mutants.catalogue import calls, claims, dispatch, ends, gates, legs, logs, models, presence, turns
from tests.mutants.mutant import Group, Later

GROUPS: tuple[Group, ...] = (
    dispatch.PUBLISH,
    claims.CLAIMS,
    claims.FENCES,
    presence.PRESENT,
    presence.WATCHER,
    legs.POISON,
    legs.BOUNDARIES,
    models.LIMITS,
    legs.EXIT,
    legs.LINGERS,
    legs.DRAINS,
    legs.TEXT,
    calls.SETTLES,
    calls.ATTEMPTS,
    calls.ATOMIC,
    calls.ANSWERS,
    calls.ORDER,
    gates.LIMITS,
    turns.RUNS,
    ends.ENDS,
    ends.BUSY,
    presence.DEADLINES,
    logs.COMPACTED,
)
MUTANTS = tuple(mutant for group in GROUPS for mutant in group.mutants)
LATER: tuple[Later, ...] = (
    Later(
        "early_result_refused",
        "A deferred result settles its call in any open status, the call's own `running` included.",
        "deferred tools",
    ),
    Later("child_in_two", "A child run is inserted in the transaction that takes its call to waiting.", "child runs"),
    Later("deadline of a decision", "Approvals and deferred results are ended by the sweep.", "approvals"),
    Later("child_end_in_two", "A child run ends in the transaction that settles the call.", "child runs"),
)
