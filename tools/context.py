"""What a running tool knows of its run, and can say to it."""

import math
from collections.abc import Callable
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tools.schema import jsonable, storable_text

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser

    from threads.models import Thread
    from tools.models import ToolCall


class ToolContext:
    """Handed to a tool as the parameter that is annotated `ToolContext`, whatever its name.

    A value for one attempt of one call; nothing of it can be assigned. `run`, `thread` and `owner` are read from
    the database at their first use and kept, so a tool that does not ask costs no query. A tool's tests build
    one by hand: only `tool_call` is required.
    """

    __slots__ = (
        "_attempt",
        "_check_cancelled",
        "_check_stopping",
        "_deadline",
        "_emit_data",
        "_idempotency_key",
        "_load_owner",
        "_load_run",
        "_load_thread",
        "_owner_id",
        "_report_progress",
        "_run_id",
        "_thread_id",
        "_tool_call",
    )

    def __init__(
        self,
        *,
        tool_call: "ToolCall",
        attempt: int = 1,
        idempotency_key: str = "",
        deadline: datetime | None = None,
        run_id: UUID | None = None,
        thread_id: UUID | None = None,
        owner_id: Any = None,
        load_run: Callable[[], Any] = lambda: None,
        load_thread: Callable[[], Any] = lambda: None,
        load_owner: Callable[[], Any] = lambda: None,
        report_progress: Callable[[float | None, str], None] = lambda fraction, note: None,
        emit_data: Callable[[Any], None] = lambda data: None,
        check_cancelled: Callable[[], bool] = lambda: False,
        check_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take plain values, and callables for what costs a query or writes.

        `report_progress(fraction, note)` gets a fraction between 0 and 1 or None, and decides how often it writes;
        `emit_data(data)` gets JSON-able data; `check_cancelled()` and `check_stopping()` may be called in a tight loop.
        """
        self._tool_call = tool_call
        self._attempt = attempt
        self._idempotency_key = idempotency_key
        self._deadline = deadline
        self._run_id = run_id
        self._thread_id = thread_id
        self._owner_id = owner_id
        self._load_run = cache(load_run)
        self._load_thread = cache(load_thread)
        self._load_owner = cache(load_owner)
        self._report_progress = report_progress
        self._emit_data = emit_data
        self._check_cancelled = check_cancelled
        self._check_stopping = check_stopping

    def __repr__(self) -> str:
        return f"<ToolContext run={self._run_id} attempt={self._attempt} key={self._idempotency_key!r}>"

    @property
    def tool_call(self) -> "ToolCall":
        return self._tool_call

    @property
    def attempt(self) -> int:
        """Which try at the call this is, from 1."""
        return self._attempt

    @property
    def idempotency_key(self) -> str:
        """The same in every attempt of the call: hand it to services that can recognise a repeated request."""
        return self._idempotency_key

    @property
    def deadline(self) -> datetime | None:
        """When this attempt is cut off."""
        return self._deadline

    @property
    def run_id(self) -> UUID | None:
        return self._run_id

    @property
    def thread_id(self) -> UUID | None:
        return self._thread_id

    @property
    def owner_id(self) -> Any:
        """The primary key of the run's owner; None is the system."""
        return self._owner_id

    @property
    def run(self) -> Any:
        return self._load_run()

    @property
    def thread(self) -> "Thread":
        thread: Thread = self._load_thread()
        return thread

    @property
    def owner(self) -> "AbstractBaseUser | None":
        """The user that the run belongs to; None is the system."""
        owner: AbstractBaseUser | None = self._load_owner()
        return owner

    def progress(self, fraction: float | None = None, note: str = "") -> None:
        """Tell the readers of the run how far the call is: a fraction between 0 and 1 (None: unknown), and a note.

        A fraction outside is taken to the nearest end: a sum of rounded parts must not fail the tool.
        """
        if fraction is not None:
            fraction = float(fraction)
            fraction = None if math.isnan(fraction) else min(max(fraction, 0.0), 1.0)
        self._report_progress(fraction, storable_text(str(note)))

    def emit(self, data: Any) -> None:
        """Put data into the run's event log, for its readers; the model does not see it.

        Raises TypeError when the data cannot be JSON.
        """
        self._emit_data(jsonable(data))

    def is_cancelled(self) -> bool:
        """Return True once the result is no longer wanted: the call is settled, or another attempt has taken over."""
        return self._check_cancelled()

    @property
    def stopping(self) -> bool:
        """True once the worker has been asked to shut down: it waits for its tools, until somebody kills it.

        A long tool that can begin again raises `WorkerLeaving` then; the call is given back and costs no attempt.
        """
        return self._check_stopping()
