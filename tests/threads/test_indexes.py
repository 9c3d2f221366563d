"""Indexes: those that ours are in Postgres, and none that asks for another app of the host's."""

from __future__ import annotations

import pytest
from django.apps import apps

from threads import database
from threads.indexes import Gin


def gins() -> list[str]:
    models = [model for each in apps.get_app_configs() for model in each.get_models() if "longhaul" in each.label]
    assert not [index for model in models for index in model._meta.indexes if "postgres" in type(index).__module__]
    return [index.name for model in models for index in model._meta.indexes if isinstance(index, Gin)]


@pytest.mark.django_db
def test_a_gin_index_keeps_no_list_of_pending_entries_and_needs_no_app_of_django() -> None:
    made = database.rows_of("SELECT indexname, indexdef FROM pg_indexes WHERE indexdef LIKE '%% USING gin %%'")
    assert {name for name, _ in made} == set(gins()) != set()
    for _, definition in made:
        assert "WITH (fastupdate=off)" in definition
        assert " WHERE " in definition
