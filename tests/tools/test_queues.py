"""Our queues on RabbitMQ: known to every app as ours, and to nobody as quorum queues but to the broker."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery
from celery.utils.quorum_queues import detect_quorum_queues
from kombu import Producer, Queue

from tools import queues
from tools.queues import DEFAULTS, QuorumQueue

pytestmark = [pytest.mark.usefixtures("over_amqp")]


@pytest.fixture
def over_amqp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://guest:guest@127.0.0.1:1//")  # wins over what an app is told


def host(**settings: Any) -> Celery:
    """An app of somebody's that has our tasks."""
    app = Celery("host", changes=settings, set_as_current=False)
    app.finalize()
    return app


def test_they_are_ours_in_every_app_and_nobody_consumes_them_for_that() -> None:
    found: Any = host().amqp.queues
    for name in DEFAULTS.values():
        assert isinstance(found[name], QuorumQueue)
    assert list(found.consume_from) == ["celery"]


def test_the_hosts_tasks_are_not_delayed_in_another_way_for_that() -> None:
    assert detect_quorum_queues(host(), "amqp") == (False, "")


def test_a_queue_that_the_host_declares_is_the_hosts() -> None:
    found: Any = host(task_queues=[Queue("shop"), Queue("longhaul.tools", queue_arguments={"x-queue-type": "quorum"})])
    queue = found.amqp.queues["longhaul.tools"]
    assert (type(queue), queue.queue_arguments) == (Queue, {"x-queue-type": "quorum"})
    assert isinstance(found.amqp.queues["longhaul.agents"], QuorumQueue)
    assert set(found.amqp.queues.consume_from) == {"shop", "longhaul.tools"}


def test_queues_that_the_host_names_when_its_tasks_are_bound_already_are_the_hosts() -> None:
    app = Celery("host", set_as_current=False)

    @app.on_after_finalize.connect
    def name(sender: Celery, **_: Any) -> None:
        sender.conf.task_queues = [Queue("shop")]
        sender.conf.task_default_queue = "shop"

    app.finalize()
    found: Any = app
    assert set(found.amqp.queues.consume_from) == {"shop"}
    assert {type(found.amqp.queues[name]) for name in DEFAULTS.values()} == {QuorumQueue}


def test_a_table_that_was_made_before_ours_are_known_gets_them_too() -> None:
    app: Any = Celery("host", set_as_current=False)
    made = app.amqp.queues
    assert "longhaul.tools" not in made
    app.finalize()
    assert type(made["longhaul.tools"]) is QuorumQueue
    assert type(app.amqp.Queues([Queue("shop")])["longhaul.tools"]) is QuorumQueue


@pytest.mark.parametrize("by", ["beat", "worker"])
def test_who_sends_by_name_or_consumes_knows_ours(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app: Any = host()
    if by == "worker":
        app.select_queues(["longhaul.tools", "shop"])  # -Q
        assert {name: type(queue) for name, queue in app.amqp.queues.consume_from.items()} == {
            "longhaul.tools": QuorumQueue,
            "shop": Queue,
        }
        return
    declared: list[Any] = []

    def note(self: Producer, *_: Any, declare: Any = (), **__: Any) -> None:
        declared.extend(declare)

    monkeypatch.setattr(Producer, "publish", note)
    app.send_task("longhaul.sweep", queue="longhaul.control", producer=Producer(app.connection_for_write()))
    assert [(queue.name, type(queue)) for queue in declared] == [("longhaul.control", QuorumQueue)]


def test_a_default_queue_of_our_name_is_ours_where_it_is_consumed_too() -> None:
    found: Any = host(task_default_queue="longhaul.control")
    assert isinstance(found.amqp.queues.consume_from["longhaul.control"], QuorumQueue)


def test_an_app_that_makes_up_no_queues_knows_ours() -> None:
    found: Any = host(task_create_missing_queues=False)
    found.amqp.queues.select(["longhaul.agents", "longhaul.tools"])
    assert {type(queue) for queue in found.amqp.queues.consume_from.values()} == {QuorumQueue}


def test_classic_ones_and_those_of_another_broker_are_left_to_celery(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.LONGHAUL = {"QUEUE_TYPE": "classic"}
    assert type(queues.named(host(), "longhaul.agents")) is Queue
    settings.LONGHAUL = {}
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    assert type(queues.named(host(), "longhaul.agents")) is Queue


def test_a_tools_own_queue_is_declared_as_celery_declares_any() -> None:
    assert type(queues.named(host(), "gpu")) is Queue
