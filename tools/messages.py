"""A Celery message of one of our tasks, put together by hand.

`apply_async` spends more on a message than the rest of a hand-over costs (measured: 0.86 ms CPU under gevent, 0.51 so), for
it serves cases that ours never have: eta, expiry, chords, callbacks, routes. The message is the one that it would send, by
Celery's protocol 2 (https://docs.celeryq.dev/en/stable/internals/protocol.html), through Celery's own producers. Where
somebody listens to the publishing of tasks (tracing does), or tasks are run eagerly, Celery sends it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import orjson
from amqp.exceptions import AMQPError, ChannelError
from celery import signals
from celery.utils.nodenames import anon_nodename
from kombu.exceptions import OperationalError as BrokerError

from tools import confirms, queues

try:
    from redis.exceptions import RedisError
    from redis.exceptions import TimeoutError as RedisTimeout
except ImportError:  # the broker is another one
    _ALSO_AWAY: tuple[type[Exception], ...] = ()
    _TIMED_OUT: tuple[type[Exception], ...] = (TimeoutError,)
else:
    _ALSO_AWAY = (RedisError,)
    _TIMED_OUT = (TimeoutError, RedisTimeout)

_NO_QUEUE = 404  # of Redis, which keeps no empty list, this is the answer for an empty queue
HANG_SECONDS = 1.0  # a refusal comes in milliseconds: what failed after so long has waited for an answer
QUIET_SECONDS = 1.0  # how often a broker that does not answer is tried
_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def depth(app: Any, queue: str) -> int | None:
    """Return how many messages wait in the broker's queue; None when the broker does not say."""
    if _refused.get():
        return None
    try:
        with _not_after_others(app) as go_on:
            if queues.over_amqp(app):
                # A queue that is not there costs the channel on which it was asked for.
                with confirms.connection(app) as connection, connection.channel() as channel:
                    return _count(channel, queue)
            with app.pool.acquire(block=True) as connection, _or_broker_error(connection):
                go_on()
                _reach(connection)
                return _count(connection.default_channel, queue)
    except (BrokerError, OSError, AMQPError):
        return None


def _count(channel: Any, queue: str) -> int:
    try:
        return int(channel.queue_declare(queue, passive=True).message_count)
    except ChannelError as error:
        if int(error.reply_code or 0) == _NO_QUEUE:
            return 0
        raise


@contextlib.contextmanager
def until_refused() -> Iterator[None]:
    """Within the block, after one message that could not be sent, refuse all others at once.

    A broker that hangs costs its socket timeout, 10 s, for each message: who sends hundreds in a row would stand still.
    """
    before = _refused.set([])
    try:
        yield
    finally:
        _refused.reset(before)


_refused: ContextVar[list[BaseException] | None] = ContextVar("refused", default=None)


class _Hang(NamedTuple):
    """A broker that let somebody of this process wait in vain; times are of the monotonic clock."""

    url: str
    seen: float
    next_try: float


# Shared by threads and greenlets, and only ever replaced whole. Two who probe at once do no harm.
_hang: _Hang | None = None


@contextlib.contextmanager
def _not_after_others(app: Any) -> Iterator[Callable[[], None]]:
    """Ask the broker in the block, or raise OperationalError at once where others have just waited for it in vain.

    The block calls what it is given when it has its turn of the pool. A pool lends ten connections, and each of them costs
    its socket timeout: without this, forty who send at once would stand behind one another for four times 10 s. While
    the broker hangs one a second tries again.
    """
    global _hang
    url = str(app.conf.broker_write_url or app.conf.broker_url)
    began = asked = time.monotonic()
    hang = _hang
    if hang is not None and hang.url == url:
        if began < hang.next_try:
            raise BrokerError(_NOT_TRIED)
        _hang = hang._replace(next_try=began + QUIET_SECONDS)

    def go_on() -> None:
        nonlocal asked
        asked = time.monotonic()
        hang = _hang
        if hang is not None and hang.url == url and hang.seen >= began:
            raise BrokerError(_NOT_TRIED)

    try:
        yield go_on
    except (BrokerError, OSError) as error:
        now = time.monotonic()
        if now - asked > HANG_SECONDS or isinstance(error, _TIMED_OUT) or isinstance(error.__cause__, _TIMED_OUT):
            _hang = _Hang(url, now, now + QUIET_SECONDS)
        raise
    else:
        _hang = None


_NOT_TRIED = "not tried: the broker did not answer a moment ago"


@contextlib.contextmanager
def _or_broker_error(connection: Any) -> Iterator[None]:
    """Raise what the transport raises when the broker goes away as kombu's OperationalError.

    Without `retry` kombu leaves the transport's own errors as they are, and those of Redis are no OSError. All of Redis's
    are meant: one that is out of memory, read only or still loading loses a message as well.
    """
    try:
        yield
    except (BrokerError, OSError, KeyError):  # a KeyError is a mistake, though kombu has it among a lost connection's
        raise
    except (*connection.connection_errors, *connection.channel_errors, *_ALSO_AWAY) as error:
        raise BrokerError(f"{type(error).__name__}: {error}") from error


def _reach(connection: Any) -> None:
    """Be connected, or raise OperationalError at once.

    Left alone, kombu tries for 6 s (measured): the sweep, which must survive the broker, would stand still behind every
    message, and so would the request that starts a run. It tries once more, but not the same broker after one that has
    waited in vain.
    """
    again = None if len(connection.alt) > 1 else _not_after_waiting
    connection.ensure_connection(errback=again, max_retries=1, interval_start=0, interval_step=0)


def _not_after_waiting(error: Exception, _: float) -> None:
    if isinstance(error, _TIMED_OUT):
        raise error


def send(
    task: Any,
    args: list[Any],
    *,
    queue: str,
    task_id: str,
    shown: str,
    soft_time_limit: int | None = None,
    time_limit: int | None = None,
) -> None:
    """Send a message for `task` to the queue. Raises kombu's OperationalError, or OSError, when the broker is away.

    `shown` is what people see in place of the arguments, in Flower and in Celery's logs.
    """
    refused = _refused.get()
    if refused:
        raise BrokerError("not tried: the broker refused the message before") from refused[0]
    try:
        _send(
            task,
            args,
            queue=queue,
            task_id=task_id,
            shown=shown,
            soft_time_limit=soft_time_limit,
            time_limit=time_limit,
        )
    except (BrokerError, OSError) as error:
        if refused is not None:
            refused.append(error)
        raise


def _send(
    task: Any,
    args: list[Any],
    *,
    queue: str,
    task_id: str,
    shown: str,
    soft_time_limit: int | None,
    time_limit: int | None,
) -> None:
    app = task.app
    watched = signals.before_task_publish.receivers or signals.after_task_publish.receivers
    by_celery: dict[str, Any] = {
        "queue": queue,
        "exchange": "",  # said, for a route that the host has for all tasks may name another
        "routing_key": queue,
        "task_id": task_id,
        "argsrepr": shown,
        "soft_time_limit": soft_time_limit,
        "time_limit": time_limit,
        "retry": False,
    }
    if app.conf.task_always_eager:
        task.apply_async(args, **by_celery)
        return
    if watched or app.conf.task_send_sent_event:

        def publish(producer: Any, **how: Any) -> None:
            task.apply_async(args, producer=producer, **by_celery, **how)
    else:
        body = orjson.dumps((args, {}, _EMBED)).decode()
        headers = _headers(task, task_id, shown, [time_limit, soft_time_limit])

        def publish(producer: Any, **how: Any) -> None:
            producer.publish(
                body,
                exchange="",
                routing_key=queue,
                content_type="application/json",
                content_encoding="utf-8",
                retry=False,
                headers=headers,
                correlation_id=task_id,
                reply_to="",
                **how,
            )

    with _not_after_others(app) as go_on:
        if queues.over_amqp(app):
            confirms.publish(app, queue, publish)
            return
        with app.producer_pool.acquire(block=True) as producer, _or_broker_error(producer.connection):
            go_on()
            _reach(producer.connection)
            publish(producer, declare=[app.amqp.queues[queue]])


def _headers(task: Any, task_id: str, shown: str, limits: list[int | None]) -> dict[str, Any]:
    return {
        "lang": "py",
        "task": task.name,
        "id": task_id,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": limits,
        "root_id": task_id,
        "parent_id": None,
        "argsrepr": shown,
        "kwargsrepr": "{}",
        "origin": anon_nodename(),
        "ignore_result": True,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }
