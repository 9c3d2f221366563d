"""The same deaths over RabbitMQ, and what only RabbitMQ does. `make test-rabbitmq`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from amqp.exceptions import NotFound
from celery import Celery
from celery._state import get_current_app
from kombu import Connection

from agents_project.demo.models import Ledger
from agents_project.rabbitmq import RabbitMQ
from runs import Run
from runs.agents import registry
from tests.workers import test_deaths as over_redis
from tests.workers.app.agents import worker_test
from tests.workers.conftest import Kit, eventually, kit_over
from tests.workers.test_deaths import SENTENCE, ended, starts, streaming, working

pytestmark = [
    pytest.mark.needs_rabbitmq,
]
QUEUES = ("longhaul.agents", "longhaul.tools", "longhaul.control")


class Node:
    """A node as the tests' broker."""

    def __init__(self, node: RabbitMQ) -> None:
        self.node = node
        self.environment: Mapping[str, str] = {"CELERY_BROKER_URL": node.url}

    def forget(self) -> None:
        with Connection(self.node.url) as connection:
            for queue in QUEUES:
                with connection.channel() as channel:
                    try:
                        channel.queue_purge(queue)  # type: ignore[attr-defined]
                    except NotFound:
                        pass  # nobody has asked for it yet

    def delete(self) -> None:
        with Connection(self.node.url) as connection:
            for queue in QUEUES:
                with connection.channel() as channel:
                    channel.queue_delete(queue)  # type: ignore[attr-defined]

    def messages(self, queue: str) -> int:
        table = self.node.control("list_queues", "name", "messages")
        return sum(int(count) for name, count in map(str.split, table.splitlines()[1:]) if name == queue)


@pytest.fixture(scope="module")
def kit(django_db_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    with RabbitMQ() as node, kit_over(Node(node), tmp_path_factory.mktemp("workers")) as kit:
        yield kit


@pytest.fixture(autouse=True)
def publishing(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process publishes to RabbitMQ, too."""
    present = get_current_app()
    monkeypatch.setenv("CELERY_BROKER_URL", kit.environment["CELERY_BROKER_URL"])
    app = Celery("over_rabbitmq")
    app.config_from_object("django.conf:settings", namespace="CELERY")
    app.conf.broker_transport_options = {}
    app.set_current()
    yield
    app.close()
    present.set_current()


def node_of(kit: Kit) -> RabbitMQ:
    assert isinstance(kit.broker, Node)
    return kit.broker.node


# What holds over Redis holds here.
test_a_killed_agents_worker_costs_the_run_nothing_but_the_message_it_spoke = (
    over_redis.test_a_killed_agents_worker_costs_the_run_nothing_but_the_message_it_spoke
)
test_a_call_of_a_killed_tools_worker_runs_again_as_it_declares = (
    over_redis.test_a_call_of_a_killed_tools_worker_runs_again_as_it_declares
)
test_a_call_that_must_not_start_twice_is_unknown_when_its_worker_dies = (
    over_redis.test_a_call_that_must_not_start_twice_is_unknown_when_its_worker_dies
)
test_a_killed_prefork_child_costs_its_call_and_no_other = (
    over_redis.test_a_killed_prefork_child_costs_its_call_and_no_other
)
test_losing_every_message_of_the_broker_costs_a_republish_interval = (
    over_redis.test_losing_every_message_of_the_broker_costs_a_republish_interval
)
test_the_late_messages_that_a_worker_finds_when_it_starts_do_nothing_and_are_acknowledged = (
    over_redis.test_the_late_messages_that_a_worker_finds_when_it_starts_do_nothing_and_are_acknowledged
)
test_a_drained_worker_hands_its_streams_on_and_leaves = over_redis.test_a_drained_worker_hands_its_streams_on_and_leaves
test_when_the_sweeping_control_worker_dies_another_goes_on = (
    over_redis.test_when_the_sweeping_control_worker_dies_another_goes_on
)


def kill_and_start(node: RabbitMQ, meanwhile: Callable[[], object] = lambda: None) -> None:
    """SIGKILL the node and start it again, as soon as it has its queues on the disk.

    RabbitMQ (3.10) writes down which quorum queues it has some seconds after they were declared. Killed before, it has their
    messages, and never finds them a leader.
    """
    known = next(node.folder.glob("mnesia/*/quorum/*/names.dets"))
    eventually(lambda: all(queue.encode() in known.read_bytes() for queue in QUEUES), why="the queues are written down")
    node.kill()
    assert not node.answers()
    meanwhile()
    node.start()


def test_our_queues_are_quorum_queues(workers: Kit) -> None:
    assert ended(worker_test.start("call idempotent 0")).output == "It is done."
    table = node_of(workers).control("list_queues", "name", "type")
    found = dict(map(str.split, table.splitlines()[1:]))
    assert {name: found.get(name) for name in QUEUES} == dict.fromkeys(QUEUES, "quorum")


def test_a_killed_broker_that_comes_back_has_kept_its_messages(workers: Kit) -> None:
    """And the workers and this process find it again."""
    node = node_of(workers)
    for name in (*workers.names("agents"), *workers.names("control")):  # nobody takes one, or sends it again
        workers.kill(workers.processes[name])
    queued = [worker_test.start("tell me") for _ in range(5)]
    eventually(lambda: workers.broker.messages("longhaul.agents") == 5, why="the queue has them")
    kill_and_start(node)
    eventually(lambda: workers.broker.messages("longhaul.agents") == 5, why="the queue's leader has its messages")
    workers.up(agents=2)
    for run in queued:
        assert ended(run).output == SENTENCE


def test_runs_outlive_a_broker_that_dies_under_them(workers: Kit) -> None:
    node = node_of(workers)
    run = streaming(worker_test.start("tell me"))
    calling = worker_test.start("call once 3")
    call = working(calling)
    started: list[Run] = []  # their messages are refused; the rows stand
    kill_and_start(node, meanwhile=lambda: started.append(worker_test.start("tell me")))
    for each, output in ((run, SENTENCE), (calling, "It is done."), (started[0], SENTENCE)):
        assert ended(each, 60).output == output
    assert starts(call) == 1
    assert [leg.reason for leg in run.leg_set.all()] == ["finished"]  # a live worker is not robbed


def test_closing_every_connection_to_the_broker_costs_no_run_and_no_second_start(workers: Kit) -> None:
    """Each message comes back as redelivered while its worker lives: nothing is taken from it."""
    telling = streaming(worker_test.start("tell me"))
    calling = worker_test.start("call atomic 4")
    call = working(calling)
    node_of(workers).control("close_all_connections", "test")
    assert ended(telling).output == SENTENCE
    assert ended(calling).output == "It is done."
    assert starts(call) == 1
    assert Ledger.objects.filter(call_id=call.pk).count() == 1
    assert [leg.reason for leg in telling.leg_set.all()] == ["finished"]


def test_deleted_queues_cost_no_run(workers: Kit) -> None:
    assert isinstance(workers.broker, Node)
    run = streaming(worker_test.start("tell me"))
    calling = worker_test.start("call idempotent 1")
    working(calling)
    workers.broker.delete()
    begun = worker_test.start("tell me")
    for each, output in ((run, SENTENCE), (calling, "It is done."), (begun, SENTENCE)):
        assert ended(each, 60).output == output


@pytest.fixture
def impatient(
    django_db_setup: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Kit]:
    """Workers on a node that takes every message back after a second."""
    looks_often = "[{rabbit, [{channel_tick_interval, 500}]}]."  # once a minute, else
    with (
        RabbitMQ({"consumer_timeout": "1000"}, looks_often) as node,
        kit_over(Node(node), tmp_path_factory.mktemp("impatient")) as kit,
    ):
        monkeypatch.setenv("CELERY_BROKER_URL", node.url)
        yield kit


def test_a_call_that_outlasts_rabbitmqs_patience_runs_once_and_to_its_end(
    impatient: Kit, transactional_db: None
) -> None:
    """Its channel is closed under it, and its message goes to another worker, which finds its holder alive."""
    registry.add(worker_test)
    impatient.up(agents=1, tools=2, control=1)
    calling = worker_test.start("call idempotent 6")
    call = working(calling)
    assert ended(calling, 60).output == "It is done."
    assert starts(call) == 1
    logs = [(impatient.folder / f"{name}.log").read_text() for name in impatient.names("tools")]
    assert any("delivery acknowledgement on channel" in log for log in logs)


def test_a_worker_of_the_hosts_queue_and_ours_says_what_that_costs(workers: Kit, tmp_path: Path) -> None:
    log = tmp_path / "mixed.log"
    command = [sys.executable, "-m", "celery", "-A", "agents_project", "worker", "-P", "threads", "-c", "1"]
    with log.open("wb") as out:
        mixed = subprocess.Popen(
            [*command, "-Q", "shop,longhaul.tools,gpu", "-n", "mixed@test"],
            env=workers.environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        told = "consumes gpu, shop beside the quorum queues longhaul.tools"
        eventually(lambda: told in log.read_text(), why="it is told")
    finally:
        workers.kill(mixed)
    assert not any("beside the quorum" in other.read_text() for other in workers.folder.glob("*.log"))
