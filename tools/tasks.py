"""Celery's envelope of an attempt: ids only, safe twice."""

from __future__ import annotations

import logging
import math
from datetime import timedelta
from typing import Any
from uuid import UUID

from celery import shared_task
from django.conf import settings
from kombu.exceptions import OperationalError as BrokerError

from tools import execution, lifecycle, messages, presence, queues, run_log, task_ids
from tools.envelope import Envelope

logger = logging.getLogger("longhaul.tools")

# How long after a tool's own time its child is killed: the soft limit comes first and lets the tool clean up.
GRACE_SECONDS = 5


@shared_task(name="longhaul.execute_call", bind=True, base=Envelope)
def execute_call(self: Any, call_id: str, attempt: int) -> None:
    present = presence.current
    if present is None:
        logger.error(
            "Call %s was sent to a worker that does not consume Longhaul's queues; it is left to the sweep", call_id
        )
        return
    if (self.request.delivery_info or {}).get("redelivered"):
        answer = lifecycle.take_from_absent(UUID(call_id))
        if answer is not None:
            told = {"action": "call.reclaimed", "run": answer.get("run"), "tool_call": call_id, "attempt": attempt}
            logger.warning(
                "Call %s came back from the broker, reclaimed from a worker that is gone", call_id, extra=told
            )
            # It has a message in its hands, so none is sent.
            again = answer.pop("publish_call", None)
            run_log.current().announce(answer)
            attempt = again[1] if again else attempt
    execution.execute(
        UUID(call_id), attempt, presence=present, task_id=self.request.id or "", alone=present.parent is not None
    )


def publish(
    call_id: UUID,
    attempt: int,
    timeout: timedelta,
    queue: str = "",
    tool: str = "",
    run_id: UUID | str = "",
    agent: str = "",
) -> None:
    """Send a call's message, to the tools queue unless its tool names another one. Losing it costs a republish interval.

    `tool`, `run_id` and `agent` are what Flower shows beside the call.
    """
    seconds = math.ceil(timeout.total_seconds())
    try:
        messages.send(
            execute_call,
            [str(call_id), attempt],
            queue=queue or queue_name(),
            task_id=task_ids.new("tool_call", call_id, attempt),
            shown=f"tool={tool} agent={agent} run={run_id} attempt={attempt}",
            soft_time_limit=seconds,
            time_limit=seconds + GRACE_SECONDS,
        )
    except (BrokerError, OSError) as error:
        logger.warning(
            "Call %s waits for the broker to come back: %s", call_id, type(error.__cause__ or error).__name__
        )


def let_out() -> int:
    """Send the calls whose turn it is, and return how many they were. In autocommit.

    Between the commit and a message a death costs a republish interval: the row says when it is due.
    """
    calls = lifecycle.let_out()
    for call in calls:
        publish(call.call_id, call.attempt, call.timeout, call.queue, call.name, call.run_id, call.agent)
    return len(calls)


def queue_name() -> str:
    name: str = getattr(settings, "LONGHAUL", {}).get("TOOLS_QUEUE", queues.DEFAULTS["TOOLS_QUEUE"])
    return name
