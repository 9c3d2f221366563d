"""What a Celery worker process is to Longhaul, by the queues that it consumes and the pool that it has.

Any worker that runs legs or calls has a presence; one that runs legs has a flusher and a look at its fences; one that consumes
the control queue sweeps. A worker of the host's own queues is left alone.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from celery import signals
from django.db import DatabaseError, InterfaceError, connection

from runs import engine
from runs.agents import registry
from runs.conf import settings
from runs.flusher import Flusher
from runs.prefetch import Prefetch, of_the_host
from runs.sweep import SweepThread
from threads import logs
from tools import presence
from tools.interrupts import Minder
from tools.presence import Holding, Presence

logger = logging.getLogger("longhaul.worker")

RUNS = Holding(
    "run",
    "SELECT id, epoch FROM longhaul_runs_run WHERE holder = %s AND status = 'running'",
    "SELECT longhaul_run_reclaim(%s::uuid, %s::int, %s::uuid, {poison})",
)
DRAIN_LOOK_SECONDS = 0.1
LOOK_SECONDS = 0.5  # how often a process looks whether the fences of its speaking legs stand
ARRIVAL_SECONDS = 10.0  # a task may arrive before its process is present: it waits so long

_process: engine.Process | None = None
_sweep: SweepThread | None = None
_queues: frozenset[str] = frozenset()
_prefork = False
_ready = threading.Event()


def process() -> engine.Process | None:
    """Return what the legs of this process share, once it is present; None in a worker of other queues."""
    if not _runs_legs():
        return None
    _ready.wait(ARRIVAL_SECONDS)
    return _process


@signals.celeryd_init.connect
def prepare(instance: Any, **_: Any) -> None:
    """Before the worker builds its consumer."""
    instance.app.steps["consumer"].add(Prefetch)


@signals.celeryd_after_setup.connect
def recognise(sender: str, instance: Any, **_: Any) -> None:
    """Learn which of our queues this worker consumes, before its pool starts."""
    global _queues, _prefork
    consumed = frozenset(instance.app.amqp.queues.consume_from)
    ours = {settings().agents_queue, settings().tools_queue, settings().control_queue}
    # The registry is asked only where a queue is left to explain, for it imports what the agents import.
    _queues = consumed & (ours if consumed <= ours else ours | registry.queues())
    _prefork = "prefork" in instance.pool_cls.__module__
    if not _queues:
        return
    _take_no_more_than_runs(instance)
    # RabbitMQ closes the channel of a worker that keeps a message for longer than its consumer_timeout. By default the
    # worker would end for that, and take the slow call that it runs along, again and again.
    instance.app.conf.broker_channel_error_retry = True
    logs.everywhere(worker=str(sender))
    pool = instance.pool_cls.__module__.rpartition(".")[2]
    if settings().tools_queue in _queues and not _prefork:
        logger.warning(
            "The pool %r cannot end a tool that does not end by itself: its call is settled at its time, and the tool goes on."
            " Start the tools worker with -P prefork",
            pool,
            extra={"action": "worker.pool"},
        )
    # Calls of the solo pool run in the main thread, as in a prefork child; but nobody would start a worker that was killed.
    minder = Minder(settings().cancel_grace, kills=False) if pool == "solo" else None
    presence.current = Presence(name=str(sender), kind=_kind(), holdings=_holdings(), minder=minder)
    if _prefork:
        # The children name it as their parent, so its row comes before them.
        presence.current.try_tick()


def _take_no_more_than_runs(instance: Any) -> None:
    """Let a worker of our queues alone reserve as many messages as it has places, whatever the host's setting says.

    What it reserves beyond that waits, while another worker has nothing to do. A number given to `--prefetch-multiplier`
    counts, and so does the host's setting for a worker that consumes queues of the host's as well.
    """
    if instance.prefetch_multiplier != instance.app.conf.worker_prefetch_multiplier:
        return
    if of_the_host(instance.app.amqp.queues.consume_from):
        return
    instance.prefetch_multiplier = instance.consumer.prefetch_multiplier = 1
    instance.consumer.initial_prefetch_count = instance.max_concurrency or instance.concurrency


def _runs_legs() -> bool:
    """Whether this worker consumes the agents queue, or one that an agent names for itself."""
    return bool(_queues - {settings().tools_queue, settings().control_queue})


def _kind() -> str:
    if _runs_legs():
        return "agents"
    return "tools" if settings().tools_queue in _queues else "control"


def _holdings() -> tuple[Holding, ...]:
    runs = Holding(RUNS.kind, RUNS.select, RUNS.give_back.format(poison=int(settings().poison_limit)))
    return presence.CALLS, runs


@signals.worker_ready.connect
def arrive(**_: Any) -> None:
    """Be present; then legs may be claimed, and the sweep begins."""
    global _sweep
    if presence.current is None:
        return
    if _runs_legs():
        _warm()  # first: whoever sees this worker present may count on it
    presence.current.start()
    if _runs_legs() and not _prefork:
        _begin_legs(presence.current)
    if settings().control_queue in _queues:
        _sweep = SweepThread()
        _sweep.start()
    _ready.set()
    told = {"action": "worker.ready", "life": presence.current.id}
    logger.info("Worker %s is ready for %s", presence.current.name, ", ".join(sorted(_queues)), extra=told)


def _begin_legs(present: Presence) -> None:
    global _process
    flusher = Flusher(settings().flush_interval)
    flusher.start()
    _process = engine.Process(present, flusher)
    threading.Thread(target=_look_at_fences, args=(_process,), name="longhaul-fences", daemon=True).start()


def _warm() -> None:
    from runs.providers.port import get_provider

    for agent in registry.all().values():
        model = agent.model or settings().default_model
        if model is None:
            continue
        try:
            get_provider(model)[0].warm()
        except Exception:
            logger.warning("The provider of %s could not be warmed", model, exc_info=True)


def _look_at_fences(process: engine.Process) -> None:
    """Stop the legs whose fence is gone, and those that stream on when the grace of a drain is over."""
    looked = 0.0
    while not process.ended:
        time.sleep(DRAIN_LOOK_SECONDS)
        since = process.draining_since
        if since is not None and time.monotonic() - since >= settings().drain_grace.total_seconds():
            process.cut()
        if time.monotonic() - looked < LOOK_SECONDS:
            continue
        looked = time.monotonic()
        try:
            process.look()
        except (DatabaseError, InterfaceError):
            logger.warning("The fences could not be looked at; the writes of the legs carry them")
        finally:
            connection.close()


@signals.worker_process_init.connect
def arrive_in_child(**_: Any) -> None:
    """In a prefork child, after its fork: a life of its own, for which the parent beats."""
    global _process
    parent = presence.current
    if parent is None:
        return
    parent.forget()
    child = parent.child(Minder(settings().cancel_grace, kills=True))
    presence.current = child
    child.start()
    if _runs_legs():
        flusher = Flusher(settings().flush_interval)
        flusher.start()
        _process = engine.Process(child, flusher)
    _ready.set()


@signals.worker_shutting_down.connect
def drain(**_: Any) -> None:
    """SIGTERM: no new claim, streams get their grace, the rest is handed on.

    Runs in a signal handler, under gevent in the hub: it sets flags and starts nothing. A tools worker waits for its tools,
    which can see that it leaves.
    """
    if presence.current is not None:
        presence.current.draining = True
    if _process is not None:
        _process.drain()


@signals.worker_process_shutdown.connect
def leave_child(**_: Any) -> None:
    if presence.current is not None and presence.current.parent is not None:
        presence.current.end()


@signals.worker_shutdown.connect
def leave(**_: Any) -> None:
    """The presence goes last of all."""
    if _sweep is not None:
        _sweep.end()
    if _process is not None:
        _process.ended = True
        if _process.flusher is not None:
            _process.flusher.end()
    if presence.current is not None:
        presence.current.end()
        told = {"action": "worker.left", "life": presence.current.id}
        logger.info("Worker %s has left", presence.current.name, extra=told)
