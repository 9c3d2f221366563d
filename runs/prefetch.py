"""How many messages a worker of ours takes ahead from RabbitMQ: counted for each queue, as quorum queues want it.

Celery counts them over all queues of a worker, which RabbitMQ refuses for a quorum queue (`NOT_IMPLEMENTED ... does not
support global qos`). It would learn of ours only by a sign that changes more than that: see `tools.queues`.

What it costs: RabbitMQ counts for each consumer from its beginning on, and lets nobody raise the number of one that runs, as Celery
does for each task that waits in a worker for its countdown or ETA. Ours never wait so; a host's may.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from celery import bootsteps
from kombu.common import QoS

from runs.conf import settings
from tools.queues import QuorumQueue

logger = logging.getLogger("longhaul.worker")


class Prefetch(bootsteps.StartStopStep):
    """Right after Celery's own step, and before the first message is asked for; after each new connection again."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    warned = False

    def start(self, consumer: Any) -> None:
        consumed = consumer.app.amqp.queues.consume_from
        ours = {name for name, queue in consumed.items() if isinstance(queue, QuorumQueue)}
        if not ours or not consumer.qos_global:
            return
        if not self.warned:
            self._warn(ours, of_the_host(consumed))
        channel = consumer.connection.default_channel
        channel.basic_qos(0, 0, True)  # no limit over all queues
        channel.basic_qos(0, consumer.initial_prefetch_count, False)
        consumer.qos_global = False

        def set_prefetch_count(prefetch_count: int) -> None:
            consumer.task_consumer.qos(prefetch_count=prefetch_count, apply_global=False)

        consumer.qos = QoS(
            set_prefetch_count,
            consumer.initial_prefetch_count,
            max_prefetch=consumer.app.conf.worker_eta_task_limit,
        )

    def _warn(self, ours: set[str], theirs: set[str]) -> None:
        self.warned = True
        if theirs:
            logger.warning(
                "This worker consumes %s beside the quorum queues %s. On RabbitMQ it takes nothing more from %s while as many of"
                " its tasks as the worker prefetches wait for their countdown or ETA. Run two workers, one for each kind of"
                ' queue, or set LONGHAUL["QUEUE_TYPE"] = "classic"',
                *(", ".join(sorted(names)) for names in (theirs, ours, theirs)),
            )


def of_the_host(consumed: Iterable[str]) -> set[str]:
    """Return those of the queues that are neither Longhaul's nor an agent's or a tool's own.

    The registry is asked only where a queue is left to explain, for it imports what the agents import.
    """
    from runs.agents import registry

    others = set(consumed) - {settings().agents_queue, settings().tools_queue, settings().control_queue}
    if others:
        others -= registry.queues()
        others -= {
            tool.queue for agent in registry.all().values() for tool in agent.tools_by_name.values() if tool.queue
        }
    return others
