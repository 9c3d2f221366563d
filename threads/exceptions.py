"""What can be wrong with what a user asks of a thread, or of a run on it.

LonghaulError
├── BadInput (ValueError)      what was given cannot be taken: it says what to do, and nothing was changed
├── ThreadBusy                 the thread has a live run, and this input does not wait for it
└── PartOfAStep                a tool call or its result: one without the other is no transcript
"""

from __future__ import annotations

from inspect import getdoc
from typing import ClassVar


class LonghaulError(Exception):
    """Something that was asked of Longhaul cannot be done."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (getdoc(type(self)) or "").partition("\n\n")[0])


class BadInput(LonghaulError, ValueError):
    """What was given cannot be taken. Nothing was changed."""

    code = "invalid"


class ThreadBusy(LonghaulError):
    """The thread has a live run."""

    code = "thread_busy"


class PartOfAStep(LonghaulError):
    """This message holds a tool call or its result, and a model takes neither without the other. Delete the thread."""

    code = "part_of_a_step"
