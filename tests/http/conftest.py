"""Clients of the API, and agents that they may start."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from asgiref.sync import SyncToAsync
from django.contrib.auth.models import User
from django.db import connections
from django.test import Client

from runs import agents
from runs.agents import Agent
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, run_to_end
from tests.http.web import web as web
from threads.authentication import create_key


@pytest.fixture(autouse=True)
def coroutines_connections_end() -> Iterator[None]:
    """Coroutines of a test ask the database in one thread, whose connection would outlive the test's database."""
    yield
    SyncToAsync.single_thread_executor.submit(connections.close_all).result()


@dataclass
class Api:
    """A client with a key. Answers are checked for their status, and come as JSON; a body of bytes is sent as it is."""

    user: User
    key: str

    def __post_init__(self) -> None:
        self.client = Client()

    def call(self, method: str, path: str, body: Any = None, *, status: int | None = None, **headers: str) -> Any:
        given = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body)
        data = {} if method in ("get", "head") else {"data": given, "content_type": "application/json"}
        response = getattr(self.client, method)(
            path, headers={"Authorization": f"Bearer {self.key}", **headers}, **data
        )
        if status is not None:
            assert response.status_code == status, (response.status_code, response.content)
        return response

    def get(self, path: str, status: int | None = 200, **headers: str) -> Any:
        return self.call("get", path, status=status, **headers).json()

    def post(self, path: str, body: Any = None, status: int | None = None, **headers: str) -> Any:
        return self.call("post", path, {} if body is None else body, status=status, **headers).json()

    def patch(self, path: str, body: Any, status: int | None = 200) -> Any:
        return self.call("patch", path, body, status=status).json()

    def delete(self, path: str, status: int = 204) -> Any:
        return self.call("delete", path, status=status)


def refusal(answer: Any) -> tuple[str, Any]:
    """Return the code of an answer's first error, and the field that it names."""
    return answer["errors"][0]["code"], answer["errors"][0]["attr"]


@pytest.fixture
def api_of(db: None) -> Callable[..., Api]:
    """Makes a user with a key: `api_of("ann", is_staff=True)`."""

    def make(name: str, **fields: Any) -> Api:
        user = User.objects.create_user(name, **fields)
        return Api(user, create_key(user)[1])

    return make


@pytest.fixture
def api(api_of: Callable[..., Api]) -> Api:
    return api_of("ann")


@pytest.fixture
def helper(scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> agents.Agent:
    """An agent without tools, named `helper`, on the scripted model."""
    monkeypatch.setattr(agents.registry, "_agents", {**agents.registry.all()})
    return agents.registry.add(agents.Agent(name="helper", model="openai:test"))


@pytest.fixture
def live(api: Api, helper: agents.Agent) -> Run:
    """A run that waits for a worker."""
    return helper.start("Where is it?", owner=api.user)


@pytest.fixture
def ended(api: Api, helper: Agent, scripted_model: ScriptedModel) -> Run:
    """A run that has completed."""
    scripted_model.say("It is on its way.")
    run = helper.start("Where is it?", owner=api.user)
    run_to_end(run)
    return run
