"""Rows that nobody reads any more, removed by the hour. Beat asks for it; without beat they only take room."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from runs.conf import settings
from threads import database

BATCH = 1000  # rows a statement, so that none holds its locks for long
BATCHES = 100  # of each kind a pass; the rest waits for the next one
WORKERS_KEPT = timedelta(days=7)  # after their end, for people who ask what ran where

# An array, for it is made once: a plan may ask `IN (... LIMIT n FOR UPDATE SKIP LOCKED)` again for each row, and take more than n.
# Ids rise with time: the oldest rows are the first of the primary key, so a batch is found without an index of its own.
_KEYS = """
DELETE FROM longhaul_threads_idempotencykey WHERE id = ANY (ARRAY(
    SELECT id FROM longhaul_threads_idempotencykey WHERE created_at < longhaul_now() - %s
    ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED)) RETURNING 1
"""
# A life that was never closed has nobody who sweeps; one that still beats keeps its row whatever its age, and so its children's
# first parent, whose own row may be older than theirs.
_WORKERS = """
DELETE FROM longhaul_tools_worker WHERE id = ANY (ARRAY(
    SELECT w.id FROM longhaul_tools_worker w WHERE greatest(w.beat_at, w.gone_at) < longhaul_now() - %s
      AND NOT EXISTS (SELECT 1 FROM longhaul_tools_worker c WHERE c.parent_id = w.id AND c.gone_at IS NULL)
    ORDER BY w.id LIMIT %s FOR UPDATE SKIP LOCKED)) RETURNING 1
"""


@dataclass(frozen=True, slots=True)
class Removed:
    """How many rows a pass has removed."""

    idempotency_keys: int
    workers: int


def keep_house() -> Removed:
    """Remove idempotency keys past their time, and the rows of workers that ended long ago, in bounded batches."""
    return Removed(
        idempotency_keys=_remove(_KEYS, settings().idempotency_key),
        workers=_remove(_WORKERS, WORKERS_KEPT),
    )


def _remove(statement: str, age: timedelta) -> int:
    removed = 0
    for _ in range(BATCHES):
        count = len(database.rows_of(statement, (age, BATCH)))
        removed += count
        if count < BATCH:
            break
    return removed
