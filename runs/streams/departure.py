"""Hear that the process is to end, early enough to close its streams.

A server waits for the open answers before it tells the application of its end (uvicorn does, and Hypercorn): a stream would
keep it to the last second, and be cut then. So the signal itself is heard, and passed on to who heard it before.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_tell: Callable[[], None] | None = None


def listen(tell: Callable[[], None]) -> None:
    """Call `tell`, from whatever runs, when a signal asks the process to end.

    Called again for each loop that serves streams; the last one is told. Outside of the main thread, where no signal can be
    heard, this does nothing: the server's own cut ends the streams there.
    """
    global _tell
    _tell = tell
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
        if _tell is not None:
            _tell()
        if callable(self._before):
            self._before(number, frame)
        elif self._before == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
