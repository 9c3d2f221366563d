"""The way from a row to its task in Flower, and from a task's id to its row. Asks nothing of Flower or of Celery."""

from __future__ import annotations

from typing import Literal
from urllib.parse import quote
from uuid import UUID

from runs.conf import settings
from tools import task_ids


def task_url(task_id: str) -> str | None:
    """Return the page of a task in Flower; None without LONGHAUL["FLOWER_URL"], or without an id.

    Flower knows a task only while it remembers its events: the page may answer 404 for an old one.
    """
    base = settings().flower_url
    if not base or not task_id:
        return None
    return f"{base.rstrip('/')}/task/{quote(task_id, safe='')}"


def row_of(task_id: str) -> tuple[Literal["run", "tool_call"], UUID] | None:
    """Return the run or the tool call that a task served; None for a task that is none of ours. Looks nothing up."""
    return task_ids.row_of(task_id)
