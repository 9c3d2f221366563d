"""What can be wrong with what a user asks of a thread, or of a run on it.

LonghaulError
├── BadInput (ValueError)      what was given cannot be taken: it says what to do, and nothing was changed
│   └── ThreadGone             the thread was deleted meanwhile
├── ThreadBusy                 the thread has a live run, and this input does not wait for it
└── PartOfAStep                a tool call or its result: one without the other is no transcript
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getdoc
from typing import ClassVar


class LonghaulError(Exception):
    """Something that was asked of Longhaul cannot be done."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str = "", *, attr: str | None = None) -> None:
        """`attr` names what was given by its path, where one thing is to blame: `limits.max_steps`."""
        super().__init__(message or (getdoc(type(self)) or "").partition("\n\n")[0])
        self.attr = attr


class BadInput(LonghaulError, ValueError):
    """What was given cannot be taken. Nothing was changed."""

    code = "invalid"


class ThreadGone(BadInput):
    """There is no such thread any more."""

    code = "not_found"


@contextmanager
def within(attr: str) -> Iterator[None]:
    """Let what is raised inside name what it blames from here: `max_steps` becomes `limits.max_steps`."""
    try:
        yield
    except BadInput as error:
        error.attr = f"{attr}.{error.attr}" if error.attr else attr
        raise


class ThreadBusy(LonghaulError):
    """The thread has a live run."""

    code = "thread_busy"


class PartOfAStep(LonghaulError):
    """This message holds a tool call or its result, and a model takes neither without the other. Delete the thread."""

    code = "part_of_a_step"
