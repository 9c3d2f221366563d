"""docs/settings.md says what the code says."""

from __future__ import annotations

import inspect
import re

from runs import checks
from runs.conf import GROUPS, KEYS, Key
from tests.docs.page import code, table
from tests.docs.settings import PAGE, findings, named_by, value, written

WRITE = "\n\nThe tables are not what the code says: .venv/bin/python -m tests.docs.settings"


def test_the_page_is_what_the_code_says() -> None:
    page = PAGE.read_text()
    assert written(page) == page, WRITE


def test_every_key_is_told_once_in_one_sentence() -> None:
    told: dict[str, tuple[str, str]] = {}
    for group, keys in GROUPS.items():
        told |= {code(row[0])[0]: (code(row[1])[0], row[2]) for row in table("docs/settings.md", group)}
        assert list(keys) == [code(row[0])[0] for row in table("docs/settings.md", group)], WRITE
    assert told == {name: (str(key.default), key.meaning) for name, key in KEYS.items()}, WRITE
    for name, key in KEYS.items():
        assert key.meaning, name
        assert not key.meaning.endswith("."), name


def test_every_check_is_told() -> None:
    ids = set(re.findall(r'"longhaul\.([EWI]\d{3})"', inspect.getsource(checks)))
    assert ids == {id for id, _ in findings()}


def test_a_check_stands_beside_the_keys_that_it_names() -> None:
    naming = set(named_by(inspect.getsource(checks)))
    assert {("E004", "MODEL_SILENCE_SECONDS"), ("E004", "TOOLS_QUEUE"), ("E006", "PRICES")} <= naming
    assert {("W001", "LEG_BUDGET_SECONDS"), ("W001", "MODEL_TIMEOUT_SECONDS"), ("E009", "DEFAULT_MODEL")} <= naming
    assert ("W004", "LEG_BUDGET_SECONDS") not in naming  # another finding of the same function


def test_what_a_value_must_be_is_told_with_its_bounds() -> None:
    assert value(Key(1, int, "a count", least=1)) == "a whole number, at least 1"
    assert value(Key(None, str, "a rate", nullable=True, form=("x", "a rate like 'x'"))) == "a rate like 'x' or None"
