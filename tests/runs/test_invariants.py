"""`runs/invariants.sql`: no false alarm in any state, and each rule seen to count what breaks it, and nothing else."""

from __future__ import annotations

import pytest
from django.db import connection, transaction

from runs import invariants
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, assert_invariants
from tests.runs.invariant_cases import CORRUPTIONS, STATES, Corruption, State, clerk
from threads.models import Message


@pytest.mark.django_db
@pytest.mark.parametrize("state", STATES)
def test_a_run_in_this_state_gives_no_false_alarm(scripted_model: ScriptedModel, state: str) -> None:
    run: Run = getattr(State(scripted_model), state)()
    report = invariants.check()
    assert report.clean, str(report)
    assert report.runs == Run.objects.count()
    assert invariants.check(run.pk).runs == 1


@pytest.mark.django_db
@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=str)
def test_each_rule_counts_what_breaks_it(scripted_model: ScriptedModel, corruption: Corruption) -> None:
    run: Run = getattr(State(scripted_model), corruption.state)()
    # given a sound run, and another one beside it that stays so
    beside = clerk.start("Beside.")
    assert_invariants()
    # when one row is changed behind Longhaul's back
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        for name in corruption.without:
            cursor.execute(f"DROP INDEX IF EXISTS {name}") if "open_leg" in name else cursor.execute(
                f"ALTER TABLE longhaul_threads_message DROP CONSTRAINT {name}"
            )
        for statement in corruption.sql.split(";"):
            cursor.execute(statement, {"run": run.pk})
    # then that rule counts it, over the database as for the run, and no other invariant does
    for report in (invariants.check(), invariants.check(run.pk)):
        violated = "".join(number for number, count in report.violations.items() if count)
        assert violated == corruption.invariants, str(report)
        assert any(corruption.rule in found["rule"] for found in report.findings), str(report)
        assert {found["run"] for found in report.findings} <= {str(run.pk), None}
        assert all(found["what"] for found in report.findings), report.findings
    assert invariants.check(beside.pk).clean


def test_every_rule_is_broken_once() -> None:
    broken = [corruption.rule for corruption in CORRUPTIONS]
    for check in invariants.checks():
        assert any(words in check.rule for words in broken), check.rule
    for words in broken:
        assert any(words in check.rule for check in invariants.checks()), words


def test_every_invariant_has_rules() -> None:
    assert {check.invariant for check in invariants.checks()} == set(invariants.INVARIANTS)


@pytest.mark.django_db
def test_all_violations_are_counted_and_the_first_ones_shown(scripted_model: ScriptedModel) -> None:
    run = State(scripted_model).completed()
    Message.objects.bulk_create(
        Message(thread=run.thread, role="user", status="waiting") for _ in range(invariants.SHOWN + 5)
    )
    report = invariants.check(run.pk)
    assert report.violations["7"] == invariants.SHOWN + 5
    assert len(report.findings) == invariants.SHOWN
    assert not report.clean
    assert "A message waits for its place" in str(report)


@pytest.mark.django_db(transaction=True)
def test_all_rules_look_at_one_moment(scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = State(scripted_model).completed()
    seen: list[str] = []
    # given somebody who breaks a rule after the first look
    sound = invariants.checks()

    def checks() -> tuple[invariants.Check, ...]:
        import psycopg

        with connection.cursor():
            dsn = connection.connection.info.dsn
        with psycopg.connect(dsn) as other:
            other.execute("UPDATE longhaul_runs_run SET last_seq = last_seq + 1 WHERE id = %s", (run.pk,))
        seen.append("broken")
        return sound

    monkeypatch.setattr(invariants, "checks", checks)
    # then the checks that were under way do not see it, and the next ones do
    assert invariants.check().clean
    assert invariants.check().violations["2"] > 0
    assert len(seen) == 2
    with pytest.raises(Exception, match="read-only"), invariants.snapshot() as cursor:
        cursor.execute("DELETE FROM longhaul_runs_event")
    assert not connection.in_atomic_block
    with transaction.atomic():
        assert not invariants.check().clean
