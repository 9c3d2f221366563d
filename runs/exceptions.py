"""What can go wrong with a run.

LonghaulError (threads.exceptions)
├── BadInput                    (threads.exceptions) what was given cannot be taken
│   ├── UnknownAgent
│   ├── InputTooLarge
│   ├── NothingToDo             there is nothing that the agent could answer
│   ├── NotLast                 a later run has spoken in the thread
│   └── IdempotencyConflict     the key was used with another body
├── ThreadBusy                  (threads.exceptions)
│   └── TooManyHeld             as many runs wait for the thread as may
└── AgentsError                 two agents of one name, an agents module that fails to import

FenceLost                       a leg's write found its run taken or ended: it writes nothing more
"""

from __future__ import annotations

from threads.exceptions import BadInput, LonghaulError, ThreadBusy

__all__ = [
    "AgentsError",
    "BadInput",
    "FenceLost",
    "IdempotencyConflict",
    "InputTooLarge",
    "LonghaulError",
    "NotLast",
    "NothingToDo",
    "ThreadBusy",
    "TooManyHeld",
    "UnknownAgent",
]


class UnknownAgent(BadInput):
    """There is no agent of that name."""

    code = "unknown_agent"


class InputTooLarge(BadInput):
    """The input is larger than LONGHAUL["MAX_INPUT_CHARS"] allows."""

    code = "too_large"


class NothingToDo(BadInput):
    """The thread ends with a finished answer, so there is nothing to go on from. Give an input."""

    code = "nothing_to_do"


class NotLast(BadInput):
    """A later run has spoken in the thread since. Fork this run instead."""

    code = "not_last"


class IdempotencyConflict(BadInput):
    """This idempotency key was used for another request. Use a new key for a new request."""

    code = "idempotency_conflict"


class TooManyHeld(ThreadBusy):
    """As many runs wait for this thread as LONGHAUL["MAX_HELD"] allows. Try again when some have ended."""


class AgentsError(LonghaulError):
    """The agents of this project cannot be used as they are defined."""

    code = "configuration"


class FenceLost(Exception):
    """A write of a leg matched no row: the run was taken over, cancelled or ended. The leg writes nothing more."""
