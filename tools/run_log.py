"""The port through which a tool call reaches its run. `tools` declares it, `runs` implements it in `AppConfig.ready()`.

Three of DESIGN.md's verbs exist as SQL functions, which the SQL of `tools` calls by name: longhaul_run_lock,
longhaul_run_record, longhaul_calls_changed. No call changes status without the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from tools.hooks import Hooks
from tools.registry import Tool

if TYPE_CHECKING:
    from threads.models import Thread


class RunLog(Protocol):
    def record(self, run_id: UUID, type: str, payload: Mapping[str, Any]) -> bool:
        """Lock the live run and append an event to it. False when it has ended: nothing was written."""

    def announce(self, answer: Mapping[str, Any]) -> None:
        """After the commit: publish and ring what a SQL function's answer says."""

    def run(self, run_id: UUID) -> Any:
        """Return the run's row (for `ctx.run`)."""

    def thread(self, thread_id: UUID) -> Thread: ...

    def live(self, run_id: UUID) -> bool:
        """Return whether the run has not ended."""

    def tool(self, claimed: Mapping[str, Any]) -> Tool:
        """Return the definition that the run of a claimed call means by its name. Raises UnknownTool."""

    def hooks(self, claimed: Mapping[str, Any]) -> Sequence[Hooks]:
        """Return what the agent of a claimed call has around all its calls."""


_installed: RunLog | None = None


def install(run_log: RunLog) -> None:
    global _installed
    _installed = run_log


def current() -> RunLog:
    if _installed is None:
        raise RuntimeError("No app implements tools.run_log.RunLog. Add 'runs' to INSTALLED_APPS.")
    return _installed
