"""The ids of our tasks: whose they are, and that none is there twice."""

from __future__ import annotations

from urllib.parse import quote
from uuid import uuid4

import pytest

from runs.models import Leg
from threads.ids import new_id
from tools import task_ids
from tools.models import ToolAttempt
from tools.task_ids import Kind


@pytest.mark.parametrize("kind", ["run", "tool_call"])
def test_an_id_leads_back_to_its_row(kind: Kind) -> None:
    row = new_id()

    assert task_ids.row_of(task_ids.new(kind, row, 7)) == (kind, row)
    assert task_ids.row_of(task_ids.new(kind, str(row), 7)) == (kind, row)


def test_two_messages_of_one_dispatch_are_two_tasks() -> None:
    row = new_id()

    assert len({task_ids.new("run", row, 3) for _ in range(1000)}) == 1000


def test_the_longest_id_fits_its_columns_and_needs_no_quoting() -> None:
    longest = task_ids.new("tool_call", new_id(), 2**31 - 1)

    assert len(longest) <= 64
    for model in (Leg, ToolAttempt):
        assert len(longest) <= (model._meta.get_field("task_id").max_length or 0)
    assert quote(longest, safe="") == longest


def test_other_ids_are_nobodys() -> None:
    ours = task_ids.new("run", new_id(), 1)

    for other in (
        "",
        str(uuid4()),
        ours[4:],
        f"{ours}0",
        f"{ours}\n",
        ours.upper(),
        f"job{ours[3:]}",
        "run..1.00000000",
    ):
        assert task_ids.row_of(other) is None, other
