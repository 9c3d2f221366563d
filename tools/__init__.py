"""What agents can call, and the calls.

The names below are loaded on first use, so that `import tools` works before Django's apps are ready.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.context import ToolContext
    from tools.exceptions import AlreadySettled, ApprovalRequired, ModelRetry, ToolFailed
    from tools.hooks import Hooks, Instead
    from tools.models import ToolCall
    from tools.registry import Tool, tool
    from tools.results import File
    from tools.retry import RetryPolicy

__all__ = [
    "AlreadySettled",
    "ApprovalRequired",
    "File",
    "Hooks",
    "Instead",
    "ModelRetry",
    "RetryPolicy",
    "Tool",
    "ToolCall",
    "ToolContext",
    "ToolFailed",
    "WorkerLeaving",
    "tool",
]

_HOME = {
    "AlreadySettled": "tools.exceptions",
    "ApprovalRequired": "tools.exceptions",
    "File": "tools.results",
    "Hooks": "tools.hooks",
    "Instead": "tools.hooks",
    "ModelRetry": "tools.exceptions",
    "RetryPolicy": "tools.retry",
    "Tool": "tools.registry",
    "ToolCall": "tools.models",
    "ToolContext": "tools.context",
    "ToolFailed": "tools.exceptions",
    "WorkerLeaving": "tools.exceptions",
    "tool": "tools.registry",
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
