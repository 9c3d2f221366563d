"""How many messages a worker of ours takes ahead from RabbitMQ: counted for each queue, as quorum queues want it.

Celery counts them over all queues of a worker, which RabbitMQ refuses for a quorum queue (`NOT_IMPLEMENTED ... does not
support global qos`). It would learn of ours only by a sign that changes more than that: see `tools.queues`.
"""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from kombu.common import QoS

from tools.queues import QuorumQueue


class Prefetch(bootsteps.StartStopStep):
    """Right after Celery's own step, and before the first message is asked for; after each new connection again."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        ours = any(isinstance(queue, QuorumQueue) for queue in consumer.app.amqp.queues.consume_from.values())
        if not ours or not consumer.qos_global:
            return
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
