"""What Longhaul's tasks need of Celery, said for each of them: the host's own settings stay as they are, and its own tasks' alone.

A host may limit all tasks to a minute, to ten a second, or give them a class of its own; a leg is bounded by its row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import Task
from celery.backends.base import DisabledBackend

from tools import queues

if TYPE_CHECKING:
    Base = Task[Any, Any]
else:
    Base = Task

# Celery reads "no limit" as "the host's limit". A leg ends by its budget, a tool call by the limits of its own message. No
# more than a day, for a prefork parent keeps the timer of a task that has ended until it is due.
LONGEST_SECONDS = 86_400


class Envelope(Base):
    """The base of a task that carries ids only and is safe twice: `@shared_task(base=Envelope, ...)`."""

    abstract = True
    acks_late = True
    reject_on_worker_lost = True
    # One that raised is not sent again by the broker: the sweep finds its row.
    acks_on_failure_or_timeout = True
    acks_on_failure = True
    acks_on_timeout = True
    max_retries = 0
    serializer = "json"
    rate_limit = "0/s"  # none
    time_limit = LONGEST_SECONDS
    soft_time_limit = LONGEST_SECONDS
    # Results are rows: nothing of these tasks goes to a result backend that the host has for its own.
    ignore_result = True
    store_errors_even_if_ignored = False
    track_started = False

    @classmethod
    def on_bound(cls, app: Any) -> None:
        cls._backend = DisabledBackend(app=app)  # type: ignore[attr-defined]
        queues.install(app)  # for all who send to them by name: beat, the host


ATTRIBUTES = tuple(name for name in vars(Envelope) if not name.startswith("_") and name not in ("abstract", "on_bound"))
