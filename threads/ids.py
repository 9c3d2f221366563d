"""Ids of all rows: UUIDv7, so that they are unguessable and still nearly sorted by time."""

from uuid import UUID

from uuid_utils.compat import uuid7


def new_id() -> UUID:
    """A fresh UUIDv7. Rising within a process; between processes only as their clocks agree."""
    return uuid7()
