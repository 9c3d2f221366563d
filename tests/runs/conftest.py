"""Agents of one test, known to the registry for that test only."""

from __future__ import annotations

import pytest

from runs import agents
from runs.pytest_longhaul import ScriptedModel
from tests.runs.scenes import Cast


@pytest.fixture
def cast(scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> Cast:
    """Makes agents on the scripted model, gone after the test."""
    monkeypatch.setattr(agents.registry, "_agents", {**agents.registry.all()})
    return Cast()
