"""From a row to its task in Flower, and back."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import override_settings

from runs import flower
from runs.checks import check_keys
from threads.ids import new_id
from tools import task_ids


@pytest.mark.parametrize("base", ["https://flower.example.org", "https://flower.example.org/"])
def test_a_task_has_a_page_where_flower_is(base: str) -> None:
    task_id = task_ids.new("run", new_id(), 1)

    with override_settings(LONGHAUL={"FLOWER_URL": base}):
        assert flower.task_url(task_id) == f"https://flower.example.org/task/{task_id}"
        assert flower.task_url("a/b?c") == "https://flower.example.org/task/a%2Fb%3Fc"
        assert flower.task_url("") is None


def test_without_flower_there_is_no_page() -> None:
    with override_settings(LONGHAUL={}):
        assert flower.task_url(task_ids.new("run", new_id(), 1)) is None


@pytest.mark.parametrize("wrong", ["javascript:alert(1)", "flower.example.org", "", 5])
def test_what_is_no_address_is_an_error_of_the_checks(wrong: Any) -> None:
    with override_settings(LONGHAUL={"FLOWER_URL": wrong}):
        assert [message.id for message in check_keys(None)] == ["longhaul.E002"]
        assert flower.task_url("a") is None


def test_a_task_leads_to_its_row() -> None:
    run = new_id()

    assert flower.row_of(task_ids.new("run", run, 1)) == ("run", run)
    assert flower.row_of(str(new_id())) is None
