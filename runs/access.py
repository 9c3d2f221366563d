"""What of Longhaul's rows a user may see, for every surface. The policy (`threads.access`) is asked about threads and runs."""

from __future__ import annotations

from typing import Any, TypeVar

from django.db.models import Model, QuerySet

from runs.models import Event, Leg, Run, Step, Usage
from threads import access
from threads.models import Message, Thread
from tools.models import ToolAttempt, ToolCall

Row = TypeVar("Row", bound=Model)

# How a row names the run or the thread that it follows.
FOLLOWS: dict[type[Model], tuple[str, type[Model]]] = {
    Message: ("thread__in", Thread),
    ToolCall: ("run_id__in", Run),
    ToolAttempt: ("call__run_id__in", Run),
    Step: ("run__in", Run),
    Leg: ("run__in", Run),
    Event: ("run__in", Run),
    Usage: ("run__in", Run),
}


def visible(model: type[Row], user: Any) -> QuerySet[Row]:
    """Return the rows of a model that the user may see."""
    rows: QuerySet[Row] = model._default_manager.all()
    if model not in FOLLOWS:
        seen = access.visible(rows, user)
        if len(seen.query.alias_map) <= 1:
            return seen
        # A policy that joins (the owner's teams) may name a row twice. Here it is there once.
        return rows.filter(pk__in=seen.order_by().values("pk"))
    lookup, followed = FOLLOWS[model]
    every = followed._default_manager.all()
    of_these = access.visible(every, user)
    if of_these is every:
        return rows  # all of them: no join is needed to say so
    return rows.filter(**{lookup: of_these.values("pk")})
