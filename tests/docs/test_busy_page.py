"""docs/busy.md shows the table that the tests are made from."""

from __future__ import annotations

from tests.docs.busy import PAGE, written


def test_the_page_is_what_the_table_says() -> None:
    page = PAGE.read_text()
    assert written(page) == page, "\n\nThe tables are not what the code says: .venv/bin/python -m tests.docs.busy"
