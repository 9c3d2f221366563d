"""What it means that the broker delivers a message again: who had it is gone, or lost its connection to the broker only.

Both kernels' sockets of a killed process close at the same moment, the one to the broker and the one to Postgres, and each
server needs some milliseconds to act on it. Who receives the message again is often there first, and finds the lock of the
dead still held: it looks again for a short time. A lock that is held to the end of it is that of a worker that lives.
"""

from __future__ import annotations

import time
from uuid import UUID

from threads import database

# Seconds between two looks, 150 ms in all. Postgres frees the lock of a killed process in 3 to 30 ms, on a busy machine later.
PAUSES = (0.005, 0.01, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035)


def absent_holder(query: str, id: UUID) -> tuple[int, UUID] | None:
    """Return the number and the holder of a claim whose holder's lock is free, None when there is nothing to take.

    `query` takes the id, and returns (epoch or attempt, holder, whether its lock is held; null where that cannot be told).
    """
    first = None
    for pause in (*PAUSES, None):
        rows = database.rows_of(query, (id,))
        if not rows:
            return None  # it ended, or goes on already
        number, holder, held = rows[0]
        if held is False:
            return number, holder
        if held is None or (first is not None and first != (number, holder)):
            return None  # claimed anew meanwhile: this message says nothing of that claim
        first = (number, holder)
        if pause is not None:
            time.sleep(pause)
    return None
