"""A leg's hold on a run, inside its process: the fence's values, and how the leg is stopped from outside.

In-process state is keyed by (run, epoch), never by the run alone: after a blip two legs of one run may live in one process.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from runs.exceptions import FenceLost


class Interrupted(BaseException):
    """Thrown into a leg while it waits for the model or for its calls. `reason`: `lost` or `drained`.

    Not an Exception: a client library that catches those on its way must not swallow it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _greenlet() -> Any:
    """Return the greenlet that runs this, under gevent; None elsewhere, where a leg looks for itself."""
    if "gevent.monkey" not in sys.modules or not sys.modules["gevent.monkey"].is_module_patched("threading"):
        return None
    import gevent

    return gevent.getcurrent()


class Claim:
    """One leg's claims on its run, one after another: `epoch` is that of the last."""

    def __init__(self, run_id: UUID, worker: UUID) -> None:
        self.run_id = run_id
        self.worker = worker
        self.epoch = 0
        self.interruption: str | None = None
        self.wake: threading.Event | None = None
        self.turn = 0  # counts the waits for the model
        self._open = False
        self._greenlet = _greenlet()

    @property
    def key(self) -> tuple[UUID, int]:
        return self.run_id, self.epoch

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let `interrupt` reach this leg inside the block, which waits for nothing but the network.

        Outside of it an interruption is kept and raised by `check`: a transaction is never cut.
        """
        self.check()
        self.turn += 1
        self._open = True
        try:
            yield
        finally:
            self._open = False

    @property
    def speaking(self) -> bool:
        """Whether the leg waits for its model at this moment."""
        return self._open

    def check_lost(self) -> None:
        """Raise FenceLost when the claim is known to be gone."""
        if self.interruption == "lost":
            raise FenceLost

    def check(self) -> None:
        """Raise what has come meanwhile: FenceLost, or Interrupted."""
        self.check_lost()
        if self.interruption is not None:
            raise Interrupted(self.interruption)

    def interrupt(self, reason: str) -> None:
        """Stop the leg: `lost` (its fence is gone) or `drained`. Under gevent it wakes at once, else at its next chunk."""
        if self.interruption != "lost":
            self.interruption = reason
        if self.wake is not None:
            self.wake.set()
        if self._greenlet is not None and self._open:
            import gevent

            # From the hub, where the leg is surely not in the middle of anything but its wait.
            gevent.get_hub().loop.run_callback(self._throw)

    def _throw(self) -> None:
        if self._open and not self._greenlet.dead:
            self._open = False
            self._greenlet.throw(Interrupted(self.interruption or "lost"))
