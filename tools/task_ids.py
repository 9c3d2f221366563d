"""The ids of our Celery tasks: each carries the run or the call that it serves.

    run.0199a3f0-6b1c-7cc4-9d2e-3c1f0a5b7e11.3.5f2c9a1e      the run, its dispatch_seq, and a random end
    call.0199a3f0-7d02-7f1a-8b55-90ad3e6c4f20.1.c07be4d2     the tool call, its attempt, and a random end

So a task leads back to its row without an index on task ids. A message that is sent twice is two tasks: hence the end. To
Celery an id is any text; letters, digits, points and hyphens need no quoting in a URL.
"""

from __future__ import annotations

import re
import secrets
from typing import Literal
from uuid import UUID

Kind = Literal["run", "tool_call"]

_WORDS: dict[Kind, str] = {"run": "run", "tool_call": "call"}
_KINDS = {word: kind for kind, word in _WORDS.items()}
_ID = re.compile(r"(run|call)\.([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.[0-9]{1,10}\.[0-9a-f]{8}", re.ASCII)


def new(kind: Kind, row: UUID | str, number: int) -> str:
    """Return a new id, at most 64 characters, of a task for this row; `number` is its dispatch_seq or attempt."""
    return f"{_WORDS[kind]}.{row}.{number}.{secrets.token_hex(4)}"


def row_of(task_id: str) -> tuple[Kind, UUID] | None:
    """Return whose task has this id; None when it is none of ours, as that of a host's own task. Looks nothing up."""
    found = _ID.fullmatch(task_id)
    return (_KINDS[found[1]], UUID(found[2])) if found else None
