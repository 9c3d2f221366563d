"""The invariants of the design, counted over a database: what `check_runs` and the tests read.

    report = check()          # every run
    report = check(run.pk)    # one run, and the thread it stands in
    report.violations         # {"1": 0, ..., "8": 0}

The rules stand in `invariants.sql`, a query each, that returns the violations as rows (run, what). What one transaction
writes is consistent at its commit, so a run in flight gives no false alarm: all queries see one snapshot. What rows cannot
show (that user code started only while its worker was present, that an atomic effect is there exactly when its settlement
is, that workers and sweep lead on from every state) is proven by tests.

Times are compared only where no seq tells the order (invariant 8). They are the database's: where its clock was set back
under a live run, rows may look later than the run's end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypedDict
from uuid import UUID

from django.db import connection, transaction
from django.db.backends.utils import CursorWrapper

INVARIANTS = tuple("12345678")
SHOWN = 20  # findings a check; all are counted


class Finding(TypedDict):
    """One violation: of which invariant and rule, in which run (None: a message of no run), and what is wrong."""

    invariant: str
    rule: str
    run: str | None
    what: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. `violations` counts by invariant; `findings` shows the first ones of each rule."""

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
    """One rule of an invariant. `sql` counts its violations: (count of all, run, what), SHOWN rows at most."""

    invariant: str
    rule: str
    sql: str


@cache
def checks() -> tuple[Check, ...]:
    """Read `invariants.sql`: `-- N: the rule.`, and below it the query."""
    text = Path(__file__).with_suffix(".sql").read_text()
    # The one parameter is :run there, so that psql runs the file's queries too; any other % is the query's own.
    text = text.replace("%", "%%").replace(":run::", "%(run)s::")
    picked, *found = re.split(r"^-- ([1-8]): (.+)\n", text, flags=re.MULTILINE)
    picked = picked[picked.index("WITH ") : picked.rindex(";")] + "\n"
    counted = "SELECT count(*) OVER (), run, what FROM (\n{}\n) AS broken(run, what) LIMIT {}"
    return tuple(
        Check(invariant, rule, picked + counted.format(rest.partition(";\n")[0], SHOWN))
        for invariant, rule, rest in zip(found[::3], found[1::3], found[2::3], strict=True)
    )


@contextmanager
def snapshot() -> Iterator[CursorWrapper]:
    """Yield a cursor whose statements all see one moment; inside an open transaction (a TestCase) it is that one's."""
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
    with snapshot() as cursor:
        cursor.execute(
            "SELECT count(*) FROM longhaul_runs_run WHERE %(run)s::uuid IS NULL OR id = %(run)s::uuid", {"run": run_id}
        )
        (runs,) = cursor.fetchone()
        for each in checks():
            cursor.execute(each.sql, {"run": run_id})
            rows = cursor.fetchall()
            violations[each.invariant] += rows[0][0] if rows else 0
            findings += [
                Finding(
                    invariant=each.invariant, rule=each.rule, run=None if run is None else str(run), what=what or ""
                )
                for _, run, what in rows
            ]
    return Report(runs=runs, violations=violations, findings=findings)
