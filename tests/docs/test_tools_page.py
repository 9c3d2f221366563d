"""docs/tools.md shows the table that the tests are made from."""

from __future__ import annotations

from tests.docs.page import code, table
from tests.docs.tools import PAGE, written
from tests.tools.table import EVENTS, RULES, STATUSES
from tools.lifecycle import TRANSITIONS
from tools.models import CallStatus


def test_the_page_is_what_the_table_says() -> None:
    page = PAGE.read_text()
    assert written(page) == page, "\n\nThe tables are not what the code says: .venv/bin/python -m tests.docs.tools"


def test_the_table_has_every_status_and_goes_along_edges_only() -> None:
    assert sorted(STATUSES) == sorted(CallStatus)
    for event, rules in RULES.items():
        for statuses, rule in rules:
            for status in statuses:
                if rule.to not in ("", "deleted", status) and event != "doubled message":
                    assert rule.to in TRANSITIONS[CallStatus(status)], (event, status)


def test_every_event_is_told_with_a_case_for_every_status() -> None:
    for event, told in EVENTS.items():
        rows = table("docs/tools.md", f"{event.capitalize()}: {told}")
        assert {status for row in rows for status in code(row[0])} == set(STATUSES), event
