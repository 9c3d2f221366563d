"""Conversations. The names below are loaded on first use, so that `import threads` works before Django's apps are ready."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from threads.models import Message, Thread

__all__ = ["Message", "Thread"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("threads.models"), name)
