"""Celery's envelopes of a leg and of the housekeeping: ids only, safe twice."""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

from celery import shared_task
from kombu.exceptions import OperationalError as BrokerError

from runs import admission, agents, engine, housekeeping, worker
from tools import messages, task_ids
from tools.envelope import Envelope

logger = logging.getLogger("longhaul.runs")


@shared_task(name="longhaul.advance_run", bind=True, base=Envelope)
def advance_run(self: Any, run_id: str, dispatch_seq: int) -> None:
    process = worker.process()
    if process is None:
        logger.error(
            "Run %s was sent to a worker that does not consume Longhaul's queues; it is left to the sweep", run_id
        )
        return
    if (self.request.delivery_info or {}).get("redelivered"):
        dispatch_seq = admission.take_from_absent(UUID(run_id)) or dispatch_seq
    engine.advance(UUID(run_id), dispatch_seq, process, task_id=self.request.id or "")


def publish(run_id: UUID, dispatch_seq: int, agent: str = "") -> None:
    """Send a run's message, to the agents queue unless its agent names another one. Losing it costs a republish interval."""
    try:
        messages.send(
            advance_run,
            [str(run_id), dispatch_seq],
            queue=agents.registry.queue_of(agent),
            task_id=task_ids.new("run", run_id, dispatch_seq),
            shown=f"agent={agent} run={run_id} dispatch={dispatch_seq}",
        )
    except (BrokerError, OSError) as error:
        logger.warning("Run %s waits for the broker to come back: %s", run_id, type(error.__cause__ or error).__name__)


@shared_task(name="longhaul.keep_house", ignore_result=True, max_retries=0)
def keep_house() -> None:
    removed = housekeeping.keep_house()
    logger.info("Removed %s", removed, extra={"action": "housekeeping"})
