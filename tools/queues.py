"""Longhaul's own queues. On RabbitMQ they are quorum queues, whatever the type of the host's own.

A quorum queue keeps what it has confirmed over a crash of the broker, and hands a dead worker's message to the next one at
once. Celery knows a type for all queues that it makes up, and takes any quorum queue that it sees for a reason to treat
all of a process's tasks differently: no prefetch over all queues, another way of delaying (one that loses a delayed task where
no worker has set it up). The host's tasks are to keep their ways. So a queue of ours says its type to the broker only.

A queue that the host names in `task_queues` is declared as it says there; a tool's own queue as Celery declares any.
"""

from __future__ import annotations

from typing import Any

from django.conf import settings
from kombu import Exchange, Queue

DEFAULTS = {
    "AGENTS_QUEUE": "longhaul.agents",
    "TOOLS_QUEUE": "longhaul.tools",
    "CONTROL_QUEUE": "longhaul.control",
}
QUORUM, CLASSIC = "quorum", "classic"
AMQP = ("amqp", "amqps", "pyamqp", "librabbitmq")


class QuorumQueue(Queue):
    """A quorum queue that shows its type to nobody but the broker."""

    def queue_declare(self, nowait: bool = False, passive: bool = False, channel: Any = None) -> Any:
        # Without arguments of the host's: a priority, which it may have set for all queues, is refused here.
        to: Any = channel or self.channel
        return to.queue_declare(
            queue=self.name,
            passive=passive,
            durable=True,
            exclusive=False,
            auto_delete=False,
            arguments={"x-queue-type": QUORUM},
            nowait=nowait,
        )


def broker_url(app: Any) -> str:
    """Return where the app's messages are sent, the first address of several; "" where nothing is set."""
    url = app.conf.broker_write_url or app.conf.broker_url or ""
    url = url[0] if isinstance(url, list | tuple) and url else url
    return str(url)


def transport(app: Any) -> str:
    """Name what carries the app's messages, as its broker's URL begins: `redis`, `amqp`, ..."""
    return broker_url(app).partition("://")[0].partition("+")[0]


def over_amqp(app: Any) -> bool:
    return transport(app) in AMQP


def named(app: Any, name: str) -> Any:
    """Return the queue of this name as every process is to declare it. Raises KeyError as Celery does for an unknown one."""
    queues = app.amqp.queues
    if not isinstance(queues.get(name), QuorumQueue):
        install(app)
    return queues[name]


def install(app: Any) -> None:
    """Let Celery declare our queues as we do, in this process, whoever asks it to. Nobody consumes them for that.

    Celery makes its table of queues when somebody first asks for it: to send a message, beat as any other, or to consume.
    Ours go in then and no earlier, for until then a host may say what its own are.
    """
    if "queues" in app.amqp.__dict__:
        _add(app, app.amqp.queues)
    if not isinstance(app.amqp.Queues, _WithOurs):
        app.amqp.Queues = _WithOurs(app)


class _WithOurs:
    """In the place of an app's `amqp.Queues`: makes the table as that does, and adds ours."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._make = app.amqp.Queues

    def __call__(self, *args: Any, **options: Any) -> Any:
        queues = self._make(*args, **options)
        _add(self._app, queues)
        return queues


def _add(app: Any, queues: Any) -> None:
    """Does nothing on another broker than RabbitMQ, or for a queue that the host declares itself."""
    given = getattr(settings, "LONGHAUL", {})
    if given.get("QUEUE_TYPE", QUORUM) == CLASSIC or not over_amqp(app):
        return
    for key, default in DEFAULTS.items():
        name = given.get(key, default)
        if name in _declared(app) or isinstance(queues.get(name), QuorumQueue):
            continue
        queue = queues.add(QuorumQueue(name, Exchange(name), name))
        if name in queues.consume_from:  # it is the host's default queue, or was chosen by -Q before
            queues.consume_from[name] = queue


def _declared(app: Any) -> set[str]:
    said = app.conf.task_queues or ()
    return {getattr(queue, "name", queue) for queue in said}
