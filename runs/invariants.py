"""The invariants of the design, counted over a database: what `check_runs` and the tests read.

    report = check()          # every run
    report = check(run.pk)    # one run, and the thread it stands in
    report.violations         # {"1": 0, ..., "8": 0}

Each check is one query that returns the violations of one rule as rows (run, what). Rows that were written together are
consistent at every commit, so a run in flight gives no false alarm: all checks of one call see one snapshot of the database.
What rows cannot show (that the user's code ran while its worker was present, that an atomic effect is there exactly when its
settlement is, that from every state workers and sweep lead on) is proven by tests.

Times are compared only where no seq tells the order (invariant 8). They are the database's, so a database whose clock was
set back under a live run may show rows that are "later" than the end of their run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypedDict
from uuid import UUID

from django.db import connection, transaction
from django.db.backends.utils import CursorWrapper

INVARIANTS = tuple("12345678")
SHOWN = 20  # findings a check; all are counted


class Finding(TypedDict):
    """One violation: of which invariant and rule, in which run (None where a message belongs to none), and what is wrong."""

    invariant: str
    rule: str
    run: str | None
    what: str


@dataclass(frozen=True, slots=True)
class Report:
    """What the checks found. `violations` counts all of them by invariant, `findings` shows the first ones of each check."""

    runs: int
    violations: dict[str, int]
    findings: list[Finding] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """True when nothing is violated."""
        return not any(self.violations.values())

    def __str__(self) -> str:
        lines = [f"{sum(self.violations.values())} violations in {self.runs} runs"]
        lines += [
            f"{found['invariant']}: run {found['run']}: {found['what']} ({found['rule']})" for found in self.findings
        ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Check:
    """One rule of an invariant. `sql` selects (run, what) of each violation.

    It may read `picked`, the runs that are looked at, and `picked_threads`, the ids of the threads.
    """

    invariant: str
    rule: str
    sql: str


# Unused, a CTE costs nothing. %(run)s is bound by the client, so the planner sees a constant and keeps its indexes.
PICKED = """
WITH picked AS (
    SELECT * FROM longhaul_runs_run WHERE %(run)s::uuid IS NULL OR id = %(run)s::uuid),
picked_threads AS (
    SELECT id FROM longhaul_threads_thread
    WHERE %(run)s::uuid IS NULL OR id = (SELECT thread_id FROM longhaul_runs_run WHERE id = %(run)s::uuid))
"""


@contextmanager
def _snapshot() -> Iterator[CursorWrapper]:
    """Yield a cursor of which all statements see one moment. Inside an open transaction (a TestCase) it is that one's."""
    if connection.in_atomic_block:
        with connection.cursor() as cursor:
            yield cursor
        return
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        yield cursor


def check(run_id: UUID | None = None) -> Report:
    """Count the violations of each invariant, over the database or for one run and the thread it stands in.

    Reads only. `Report.runs` is how many runs were looked at: 0 for an id that no run has.
    """
    violations = dict.fromkeys(INVARIANTS, 0)
    findings: list[Finding] = []
    bound = {"run": run_id}
    with _snapshot() as cursor:
        cursor.execute(f"{PICKED} SELECT count(*) FROM picked", bound)
        runs = cursor.fetchone()[0]
        for rule in CHECKS:
            cursor.execute(
                f"{PICKED} SELECT count(*) OVER (), run, what FROM ({rule.sql}) AS broken(run, what) LIMIT {SHOWN}",
                bound,
            )
            for place, (count, run, what) in enumerate(cursor.fetchall()):
                if place == 0:
                    violations[rule.invariant] += count
                findings.append(
                    Finding(
                        invariant=rule.invariant, rule=rule.rule, run=None if run is None else str(run), what=what or ""
                    )
                )
    return Report(runs=runs, violations=violations, findings=findings)
