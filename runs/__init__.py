"""Durable agent runs on Django, Celery and Postgres.

The names below are loaded on first use, so that `import runs` works before Django's apps are ready.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runs.agents import Agent
    from runs.models import Event, Leg, Run, Step
    from runs.streams.app import with_streams

__all__ = ["Agent", "Event", "Leg", "Run", "Step", "with_streams"]

_HOME = {
    "Agent": "runs.agents",
    "Event": "runs.models",
    "Leg": "runs.models",
    "Run": "runs.models",
    "Step": "runs.models",
    "with_streams": "runs.streams.app",
}


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
