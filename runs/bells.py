"""The bell: a Redis publish that wakes readers and lingering legs. It never carries truth.

Who hears it reads rows; who cannot hear it (Redis is away) looks once a second. A reader listens on the run's channel; a
leg that lingers, or speaks, on the leg's: what concerns it is rare, while the run's channel rings for every event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from functools import cache
from typing import Any, Protocol
from uuid import UUID

import redis
from django.conf import settings as django_settings
from redis.exceptions import RedisError

logger = logging.getLogger("longhaul.bells")

_PAUSE_SECONDS = 1.0  # after a failed ring none is tried for so long: rows do not wait for Redis
_away_until = 0.0
# Channels of readers on which nobody listened a moment ago. A reader that has come since has read the rows, and looks once
# a second itself: so long, ringing is for nothing.
_unheard: dict[str, float] = {}
_MOST_UNHEARD = 10_000


_READERS = "longhaul.run."


def run_channel(run_id: UUID | str) -> str:
    return f"{_READERS}{run_id}"


def thread_channel(thread_id: UUID | str) -> str:
    """Return where it rings when a thread gets a run."""
    return f"longhaul.thread.{thread_id}"


def leg_channel(run_id: UUID | str) -> str:
    return f"longhaul.leg.{run_id}"


@cache
def _client() -> redis.Redis | None:
    url = getattr(django_settings, "REDIS_URL", None)
    if not url:
        return None
    options = {} if url.startswith("unix:") else {"socket_keepalive": True}
    return redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2, **options)


def ring(channels: Iterable[str]) -> None:
    """Publish on the channels, after a commit. A Redis that is away costs at most one time-out a second."""
    global _away_until
    client = _client()
    if client is None or time.monotonic() < _away_until:
        return
    now = time.monotonic()
    names = [channel for channel in channels if _unheard.get(channel, 0.0) <= now]
    if not names:
        return
    try:
        if len(names) == 1:
            heard = [client.publish(names[0], b"")]
        else:
            with client.pipeline(transaction=False) as pipeline:
                for channel in names:
                    pipeline.publish(channel, b"")
                heard = pipeline.execute()
        _remember(names, heard, now)
    except (RedisError, OSError) as error:
        _away_until = time.monotonic() + _PAUSE_SECONDS
        logger.warning("The bell does not ring, readers look once a second: %s", type(error).__name__)


def _remember(channels: list[str], heard: list[Any], now: float) -> None:
    if len(_unheard) > _MOST_UNHEARD:
        _unheard.clear()
    for channel, listeners in zip(channels, heard, strict=True):
        if listeners:
            _unheard.pop(channel, None)
        elif channel.startswith(_READERS):  # a leg listens from its begin, so its bell is never spared
            _unheard[channel] = now + _PAUSE_SECONDS


def _pubsub(client: redis.Redis) -> Any:
    return client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]


class Wake(Protocol):
    """What a bell sets, from the ear's thread."""

    def set(self) -> None: ...


class LoopWake:
    """An asyncio.Event that another thread may set."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.event = asyncio.Event()
        self._loop = loop

    def set(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            self._loop.call_soon_threadsafe(self.event.set)


class Ear:
    """One subscription a process, for any number of channels.

    `listen(channel)` yields an Event that is set whenever the channel rings, and whenever the connection was lost;
    `alisten(channel)` one for the running event loop. `add` and `remove` are for a wake of one's own; both may wait for
    Redis, as long as its time-out.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._events: dict[str, set[Wake]] = {}
        self._pubsub: Any = None
        self._stale = False  # a channel may be missing from the subscription
        self._away_until = 0.0
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def listen(self, channel: str) -> Iterator[threading.Event]:
        event = threading.Event()
        self.add(channel, event)
        try:
            yield event
        finally:
            self.remove(channel, event)

    @contextlib.asynccontextmanager
    async def alisten(self, channel: str) -> AsyncIterator[asyncio.Event]:
        loop = asyncio.get_running_loop()
        wake = LoopWake(loop)
        # In a thread, for a Redis that hangs would hold up the loop.
        added = loop.run_in_executor(None, self.add, channel, wake)

        def remove(_: object = None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed, and all that listened on it has gone
                loop.run_in_executor(None, self.remove, channel, wake)

        try:
            # Not for long: who listens looks once a second itself. And not cancelled with its caller, who may have left
            # while it subscribed: it is undone below.
            await asyncio.wait([added], timeout=_PAUSE_SECONDS)
            yield wake.event
        finally:
            # Not awaited: who leaves was perhaps cancelled.
            if added.done():
                remove()
            else:
                added.add_done_callback(remove)

    def add(self, channel: str, wake: Wake) -> None:
        with self._lock:
            first = channel not in self._events
            self._events.setdefault(channel, set()).add(wake)
            if first:
                self._subscribe(channel)

    def remove(self, channel: str, wake: Wake) -> None:
        with self._lock:
            listening = self._events[channel]
            listening.discard(wake)
            if not listening:
                del self._events[channel]
                if self._pubsub is None or time.monotonic() < self._away_until:
                    self._stale = True  # it is given up when Redis is back
                    return
                try:
                    self._pubsub.unsubscribe(channel)
                except (RedisError, OSError):
                    self._away_until = time.monotonic() + _PAUSE_SECONDS
                    self._stale = True

    def _subscribe(self, channel: str) -> None:
        client = _client()
        if client is None:
            return
        try:
            if time.monotonic() < self._away_until:
                self._stale = True
                return  # it has just not answered: hundreds of listeners would each wait for it in turn
            if self._pubsub is None:
                self._pubsub = _pubsub(client)
            self._pubsub.subscribe(channel)
        except (RedisError, OSError):
            self._away_until = time.monotonic() + _PAUSE_SECONDS
            self._stale = True  # the thread subscribes to all when Redis is back
        finally:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._hear, name="longhaul-ear", daemon=True)
                self._thread.start()

    def _hear(self) -> None:
        while True:
            try:
                if self._pubsub is None or self._stale:
                    self._renew()
                heard = self._pubsub.get_message(timeout=5.0)
            except (RedisError, OSError, ValueError, AttributeError):
                self._wake_all()  # what rang meanwhile was not heard
                with self._lock:
                    self._pubsub = None
                time.sleep(_PAUSE_SECONDS)
                continue
            if heard is not None and heard["type"] == "message":
                for event in list(self._events.get(heard["channel"].decode(), ())):
                    event.set()

    def _renew(self) -> None:
        with self._lock:
            client = _client()
            if client is None:
                raise OSError("no Redis")
            made = _pubsub(client)
            channels = list(self._events)
            if channels:
                made.subscribe(*channels)
            self._pubsub, self._stale = made, False

    def _wake_all(self) -> None:
        with self._lock:
            for events in self._events.values():
                for event in events:
                    event.set()


@cache
def ear() -> Ear:
    return Ear()
