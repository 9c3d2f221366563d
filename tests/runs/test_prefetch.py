"""What a worker takes ahead, by the queues that it consumes, and what it says of a mixture that RabbitMQ serves badly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Never

import pytest
from celery import Celery

from runs import Agent, worker
from runs.agents import registry
from runs.prefetch import Prefetch
from tools import tool


@tool(queue="gpu")
def draw(what: str) -> str:
    """Draw it."""
    return what


class Channel:
    """Takes the worker's word for how many messages it wants."""

    def basic_qos(self, size: int, count: int, together: bool) -> None:
        pass


def consumer(*consumed: str) -> Any:
    """Celery's part of a worker that consumes these queues from RabbitMQ."""
    app: Any = Celery("host", set_as_current=False)
    app.finalize()
    app.select_queues(consumed)
    connection = SimpleNamespace(default_channel=Channel())
    return SimpleNamespace(app=app, connection=connection, qos_global=True, initial_prefetch_count=8)


@pytest.fixture
def over_amqp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://guest:guest@127.0.0.1:1//")  # wins over what an app is told


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> None:
    artist = Agent(name="artist", model="openai:x", tools=[draw])
    monkeypatch.setattr(registry, "all", lambda: {"artist": artist})


@pytest.fixture
def no_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Never:
        raise AssertionError("nobody needs them")

    monkeypatch.setattr(registry, "all", refuse)


@pytest.mark.usefixtures("over_amqp", "agents")
def test_a_worker_of_the_hosts_queues_and_ours_says_once_what_that_costs_on_rabbitmq(
    caplog: pytest.LogCaptureFixture,
) -> None:
    step, here = Prefetch(None), consumer("shop", "longhaul.tools")
    step.start(here)
    assert not here.qos_global
    [told] = caplog.messages
    assert "consumes shop beside the quorum queues longhaul.tools" in told
    assert "Run two workers" in told
    assert 'LONGHAUL["QUEUE_TYPE"] = "classic"' in told
    here.qos_global = True  # as after a new connection
    step.start(here)
    assert len(caplog.messages) == 1


@pytest.mark.usefixtures("over_amqp", "agents")
@pytest.mark.parametrize("consumed", [("longhaul.tools", "gpu"), ("longhaul.tools", "longhaul.agents"), ("shop",)])
def test_no_other_worker_says_so(consumed: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    Prefetch(None).start(consumer(*consumed))
    assert caplog.messages == []


@pytest.mark.usefixtures("agents")
@pytest.mark.parametrize("broker", ["amqp", "redis"])
def test_nor_does_one_of_classic_queues(
    broker: str, request: pytest.FixtureRequest, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if broker == "amqp":
        request.getfixturevalue("over_amqp")
        settings.LONGHAUL = {**settings.LONGHAUL, "QUEUE_TYPE": "classic"}
    Prefetch(None).start(consumer("shop", "longhaul.tools"))
    assert caplog.messages == []


def _reserved(*consumed: str) -> int:
    """How many messages a worker of 2 places reserves, that the host's setting lets take 4 for each."""
    app = consumer(*consumed).app
    part = SimpleNamespace(prefetch_multiplier=4, initial_prefetch_count=8)
    instance = SimpleNamespace(app=app, prefetch_multiplier=4, consumer=part, concurrency=2, max_concurrency=None)
    worker._take_no_more_than_runs(instance)
    return part.initial_prefetch_count


@pytest.mark.usefixtures("no_agents")
def test_a_worker_of_our_queues_alone_imports_no_agents_for_that() -> None:
    assert _reserved("longhaul.tools") == 2


@pytest.mark.usefixtures("agents")
def test_a_tools_own_queue_is_ours_and_any_other_the_hosts() -> None:
    assert (_reserved("longhaul.tools", "gpu"), _reserved("longhaul.tools", "shop")) == (2, 8)
