"""Publishing to RabbitMQ so that the answer is known, in bounded time.

RabbitMQ takes a message without a word, and loses it when it dies before the disk has it: only a confirmation says that it
will be there. kombu asks for confirmations on a whole connection or not at all, so ours are connections of our own (as many as
`broker_pool_limit` allows, opened when they are needed), and the host's publish as they did. Nobody is waited for longer
than PATIENCE: a broker that is short of memory or disk stops listening to those who publish, and would answer when it is not.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from amqp.exceptions import AMQPError, ChannelError, MessageNacked, PreconditionFailed
from celery.local import Proxy
from kombu import pools
from kombu.exceptions import LimitExceeded
from kombu.exceptions import OperationalError as BrokerError

from tools import queues

logger = logging.getLogger("longhaul.tools")

PATIENCE = 5.0  # seconds, for each answer of the broker; it takes milliseconds
CONNECT_PATIENCE = 4.0  # as Celery's own, which it turns off under gevent

# By app: the process that made the pool, and the pool. A forked child must not write into its parent's sockets.
_pools: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()
# Queues that exist in the broker with other arguments than ours.
_declared_otherwise: set[str] = set()


def publish(app: Any, queue: str, send: Callable[..., None]) -> None:
    """Call `send(producer, declare=[...], mandatory=True)`, once more where the connection was an old one that had died.

    A message that was sent on it, and perhaps arrived, is sent twice then, which is harmless. Raises BrokerError when it was not
    confirmed.
    """
    for _ in range(3):  # of an old connection, and of a queue that is declared otherwise
        declare = [] if queue in _declared_otherwise else [queues.named(app, queue)]
        old = False
        try:
            with _taken(_pool(app)) as producer:
                old = producer.connection.connected
                with bounded(producer.connection):
                    send(producer, declare=declare, mandatory=True)
            return
        except BrokerError as error:
            cause = error.__cause__
            if isinstance(cause, PreconditionFailed) and declare:
                _declared_otherwise.add(queue)
                logger.warning("The queue %s exists with other arguments; it is used as it is: %s", queue, cause)
            elif not (old and _was_dead(cause)):
                raise
    raise BrokerError(f"no connection stood long enough to publish to {queue}")


def _was_dead(error: BaseException | None) -> bool:
    """Return whether a new connection may do better at once.

    Not for a message that came back, for its queue was deleted: RabbitMQ (3.10) attaches a worker's consumer to nothing, for
    good, when a quorum queue is there again before the worker has heard that it is gone. The next try declares it, a second on.
    """
    if isinstance(error, ChannelError):
        return False
    return isinstance(error, AMQPError | OSError) and not isinstance(error, TimeoutError)


@contextlib.contextmanager
def connection(app: Any) -> Iterator[Any]:
    """A connection to ask the broker something, in bounded time. Raises BrokerError."""
    with _taken(_pool(app).connections) as acquired, bounded(acquired):
        yield acquired


@contextlib.contextmanager
def bounded(connection: Any) -> Iterator[None]:
    """Wait PATIENCE for each answer in the block. What goes wrong ends the connection, without a goodbye, as BrokerError."""
    try:
        connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
        with connection.connection.transport.having_timeout(PATIENCE):
            yield
    except BaseException as error:
        # A confirmation that comes late would be taken for the next message's.
        connection.collect()
        if isinstance(error, AMQPError | MessageNacked | OSError):
            raise BrokerError(f"{type(error).__name__}: {error}") from error
        raise


def _taken(pool: Any) -> Any:
    """Take one of a pool. Behind those who wait for a broker that hangs nobody queues for longer than they do."""
    try:
        return pool.acquire(block=True, timeout=PATIENCE)
    except LimitExceeded as error:
        raise BrokerError("all connections for publishing are taken, and none came back in time") from error


def _pool(app: Any) -> Any:
    if isinstance(app, Proxy):  # `current_app`, which stands for one app now and for another one then
        app = app._get_current_object()
    pid, pool = _pools.get(app, (0, None))
    if pid != os.getpid():
        app.pool  # noqa: B018 (tells kombu how many connections a pool may have)
        made = app.connection_for_write(
            connect_timeout=CONNECT_PATIENCE, transport_options={"confirm_publish": True, "on_blocked": _refuse}
        )
        for group in (pools.producers, pools.connections) if pid else ():
            with contextlib.suppress(KeyError):  # kombu forgets the parent's only after a fork of multiprocessing's
                del group[made]
        pool = pools.producers[made]
        _pools[app] = (os.getpid(), pool)
    return pool


def _refuse(reason: str) -> None:
    """Called in the middle of a publish, when RabbitMQ says that it will not listen for now."""
    raise BrokerError("RabbitMQ takes no messages for now: it is short of memory or of disk")
