"""Agents of one test, known to the registry for that test only."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import User
from django.test import Client

from runs import agents
from runs.pytest_longhaul import ScriptedModel
from tests.runs.scenes import Cast


@pytest.fixture
def cast(scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> Cast:
    """Makes agents on the scripted model, gone after the test."""
    monkeypatch.setattr(agents.registry, "_agents", {**agents.registry.all()})
    return Cast()


@pytest.fixture
def admin_client(db: None) -> Client:
    """Signed in as a superuser. pytest-django's own has a password, which takes half a second to hash."""
    client = Client()
    client.force_login(User.objects.create_superuser("admin"))
    return client
