"""An agent of one test, known to the registry for that test only."""

from __future__ import annotations

import pytest

from runs import agents


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents.registry, "_agents", {**agents.registry.all()})
