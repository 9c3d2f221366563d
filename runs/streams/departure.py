"""Hear that the process is to end, early enough to close its streams.

A server waits for the open answers before it tells the application of its end (uvicorn does, and Hypercorn): a stream would
keep it to the last second, and be cut then. So the signal itself is heard, and passed on to who heard it before.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Protocol
from weakref import WeakSet

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Departing(Protocol):
    """What has streams to close."""

    def depart(self) -> None:
        """Close them soon. Called from whatever runs when the signal comes."""


_told: WeakSet[Departing] = WeakSet()
_leaving = False


def leaving() -> bool:
    """Return whether the process was asked to end. A host may take minutes for it: nobody new should begin to read here."""
    return _leaving


def listen(departing: Departing) -> None:
    """Tell it when a signal asks the process to end. It is kept by its own loop only: each that serves streams has one."""
    _told.add(departing)
    hear()


def hear() -> None:
    """Hear the signals from now on.

    Outside of the main thread, where no signal can be heard, this does nothing: the server's own cut ends the streams there.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        before = signal.getsignal(number)
        # None was set by C code, and could not be called. What is ignored ends nothing.
        if before in (None, signal.SIG_IGN) or isinstance(before, _Heard):
            continue
        signal.signal(number, _Heard(before))


class _Heard:
    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        global _leaving
        _leaving = True
        for each in list(_told):
            each.depart()
        if callable(self._before):
            self._before(number, frame)
        elif self._before == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
