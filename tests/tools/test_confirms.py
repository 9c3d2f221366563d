"""Publishing to a RabbitMQ that is away, blocked, hung or new: the answer is known, and nobody waits long for it."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery._state import get_current_app
from kombu import Connection, pools
from kombu.exceptions import OperationalError

from agents_project.rabbitmq import RabbitMQ
from runs.tasks import advance_run, keep_house
from tests.protocol.rows import wait_until
from threads.ids import new_id
from tools import confirms, messages, task_ids

pytestmark = [
    pytest.mark.needs_rabbitmq,
]
QUEUE = "longhaul.agents"


@pytest.fixture(scope="module")
def node() -> Iterator[RabbitMQ]:
    with RabbitMQ() as node:
        yield node


@pytest.fixture
def app(node: RabbitMQ, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    present = get_current_app()
    monkeypatch.setenv("CELERY_BROKER_URL", node.url)
    monkeypatch.setattr(
        confirms, "PATIENCE", 60.0
    )  # seconds: what waits for an answer in vain is told from what does not
    made = Celery("host")
    made.set_current()
    yield made
    with Connection(node.url) as connection:
        connection.channel().queue_delete(QUEUE)  # type: ignore[attr-defined]
    made.close()
    present.set_current()
    pools.reset()  # they are of the process, and know the queue still


def send() -> None:
    messages.send(advance_run, ["a", 1], queue=QUEUE, task_id=task_ids.new("run", new_id(), 1), shown="agent=tester")


def waiting(app: Any, count: int) -> None:
    """A quorum queue may say a moment later what it has."""
    wait_until(lambda: messages.depth(app, QUEUE) == count)


def refused(within: float = 20.0) -> str:
    """A message that is refused, long before nobody would wait any more; what is said of it."""
    began = time.monotonic()
    with pytest.raises(OperationalError) as caught:
        send()
    assert time.monotonic() - began < within
    return str(caught.value)


def test_a_message_that_was_taken_is_in_the_queue(app: Any) -> None:
    for count in (1, 2, 3):
        send()
        waiting(app, count)
    assert messages.depth(app, "nobody.has.declared.it") == 0
    send()  # what was asked before has not cost the connection
    keep_house.apply_async(queue=QUEUE)  # Celery, on the host's connection, declares it as we did
    waiting(app, 5)
    assert not any("confirm_publish" in key for key in app.connection_for_write().transport_options)


def test_old_connections_that_were_closed_cost_no_message(app: Any, node: RabbitMQ) -> None:
    send()
    node.control("close_all_connections", "test")
    send()
    waiting(app, 2)


def test_a_message_for_a_queue_that_was_deleted_comes_back_and_the_next_declares_it(app: Any) -> None:
    send()
    with Connection(os.environ["CELERY_BROKER_URL"]) as connection:
        connection.channel().queue_delete(QUEUE)  # type: ignore[attr-defined]
    assert "NO_ROUTE" in refused()
    send()
    waiting(app, 1)


def test_a_queue_that_exists_with_other_arguments_is_used_as_it_is(
    app: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(confirms, "_declared_otherwise", set())
    with Connection(os.environ["CELERY_BROKER_URL"]) as connection:
        connection.channel().queue_declare(QUEUE, durable=True, auto_delete=False)  # type: ignore[attr-defined]
    for _ in range(2):
        send()
    waiting(app, 2)
    assert [record.message.count("x-queue-type") for record in caplog.records] == [1]  # told once


def test_a_broker_that_is_short_of_memory_refuses_at_once(app: Any, node: RabbitMQ) -> None:
    send()
    node.control("set_vm_memory_high_watermark", "0.00001")
    try:
        wait_until(lambda: "memory" in node.control("list_connections", "state") or _is_refused(), 20)
        assert "short of memory" in refused()
        assert "short of memory" in refused()
    finally:
        node.control("set_vm_memory_high_watermark", "0.4")
    wait_until(lambda: not _is_refused(), 20)


def _is_refused() -> bool:
    try:
        send()
    except OperationalError:
        return True
    return False


def test_a_broker_that_hangs_is_waited_for_a_bounded_time(
    app: Any, node: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    send()
    os.kill(node.pid, signal.SIGSTOP)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(confirms, "PATIENCE", 0.5)
            assert "timed out" in refused()
            began = time.monotonic()
            patch.setattr(confirms, "CONNECT_PATIENCE", 0.5)
            patch.setattr(messages, "_hang", None)  # a second on
            assert messages.depth(app, QUEUE) is None
            assert time.monotonic() - began < 20  # two tries to connect
    finally:
        os.kill(node.pid, signal.SIGCONT)
    wait_until(lambda: not _is_refused(), 60)


def test_nobody_queues_for_long_behind_those_who_wait_for_a_broker_that_hangs(
    app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirms, "PATIENCE", 0.2)
    pool = confirms._pool(app)
    waiting_for_it = [pool.acquire() for _ in range(pool.limit)]
    assert "taken" in refused()
    for producer in waiting_for_it:
        producer.release()
    send()


def test_a_forked_process_publishes_on_connections_of_its_own(app: Any) -> None:
    """Not of multiprocessing's making: a web server that loads the project before it forks."""
    send()
    pool = confirms._pool(app)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of a fork beside threads
        child = os.fork()
    if child == 0:
        os._exit(int(confirms._pool(app) is pool or _is_refused()))
    assert os.waitpid(child, 0)[1] == 0
    assert confirms._pool(app) is pool
    send()
    waiting(app, 3)


def test_a_broker_that_is_gone_is_given_up_at_once(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    send()
    gone = Celery("away")
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://guest:guest@127.0.0.1:1//")
    gone.set_current()
    refused(within=5)  # kombu by itself tries for 6 s
    assert messages.depth(gone, QUEUE) is None
    app.set_current()
