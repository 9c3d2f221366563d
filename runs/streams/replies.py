"""What work in a thread hands back to the loop that waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


def tried(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return what the work returns, and what it raises: code of the host's that is broken ends no thread and no server."""
    try:
        return work(), None
    except Exception as error:
        return None, error
    except BaseException as error:  # SystemExit
        return None, RuntimeError(repr(error))


def fill(answer: asyncio.Future[Any], found: Any, error: Exception | None) -> None:
    """In the loop: answer who waits, if somebody still does."""
    if answer.done():
        return
    if error is None:
        answer.set_result(found)
    else:
        answer.set_exception(error)
