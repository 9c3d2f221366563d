"""What runs around a call: before it, after it, and when it fails. For guardrails, logs, redaction, budgets.

    def no_large_refunds(call, arguments, ctx):
        if arguments["euros"] > 100:
            raise ToolFailed("More than 100 euros are paid back by a person.")

    @tool(hooks=[Hooks(before=no_large_refunds)])

Hooks are layers. Those of the agent lie around those of the tool, the first of a list around the others: `before` is asked
from the outside to the inside, then the function runs, and `after` or `on_error` is asked from the inside to the outside. A
layer whose `before` raised or answered made the outcome itself: what lies within is not begun, and those around it hear of it.

They run in the tools worker, in each attempt, and are part of it: of an atomic call, in its transaction.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from tools.exceptions import ToolOptionError

if TYPE_CHECKING:
    from tools.context import ToolContext
    from tools.models import ToolCall

Before: TypeAlias = "Callable[[ToolCall, dict[str, Any], ToolContext], Any]"
After: TypeAlias = "Callable[[ToolCall, dict[str, Any], Any, ToolContext], Any]"
OnError: TypeAlias = "Callable[[ToolCall, dict[str, Any], BaseException, ToolContext], Any]"

MOMENTS = {"before": 3, "after": 4, "on_error": 4}  # how many arguments each takes


@dataclass(frozen=True, slots=True)
class Instead:
    """What a hook returns to answer the call itself; None is an answer too."""

    result: Any = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Hooks:
    """One layer around a call. Each is a function, sync or async, or None. What it returns counts, None changes nothing.

    before(call, arguments, ctx): a dict replaces the arguments, and is checked as the model's are; `Instead(x)` answers, and
        the function is not run. What it raises is raised as if the tool had.
    after(call, arguments, result, ctx): anything replaces the result, before it is kept; `Instead(None)` makes it None. What
        it raises is final, for the function has run.
    on_error(call, arguments, error, ctx): anything is the result in place of the error. What it raises is the error from
        now on. It is not asked when the time of the attempt is up.

    `arguments` are those of the function, without the context.
    """

    before: Before | None = None
    after: After | None = None
    on_error: OnError | None = None

    def __post_init__(self) -> None:
        """Raises ToolOptionError for what cannot be called as a hook is."""
        given = {moment: getattr(self, moment) for moment in MOMENTS}
        if not any(given.values()):
            raise ToolOptionError(f"Hooks() needs one of: {', '.join(MOMENTS)}.")
        for moment, function in given.items():
            if function is not None:
                _check(moment, function)

    @property
    def is_async(self) -> bool:
        return any(map(_is_async, (self.before, self.after, self.on_error)))


def _check(moment: str, function: Any) -> None:
    if not callable(function):
        raise ToolOptionError(f"Hooks({moment}=...) is a function; got {function!r}.")
    try:
        inspect.signature(function).bind(*[None] * MOMENTS[moment])
    except TypeError:
        takes = {"before": "call, arguments", "after": "call, arguments, result", "on_error": "call, arguments, error"}
        raise ToolOptionError(f"The hook {name_of(function)} must take ({takes[moment]}, ctx).") from None
    except ValueError:  # a builtin without a signature: it will show when it is called
        return


def _is_async(function: Any) -> bool:
    called = function if inspect.isroutine(function) else getattr(type(function), "__call__", None)  # noqa: B004 (its method)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def check_hooks(whose: str, hooks: object, *, atomic: bool = False) -> None:
    """Raises ToolOptionError for what are no hooks, or none for a call that is atomic. `whose`: "Tool 'refund'"."""
    if not isinstance(hooks, Sequence) or isinstance(hooks, str):
        raise ToolOptionError(f"{whose}: hooks is a list of Hooks(...); got {hooks!r}.")
    for each in hooks:
        if not isinstance(each, Hooks):
            raise ToolOptionError(f"{whose}: hooks is a list of Hooks(...); it holds {each!r}.")
        if atomic and each.is_async:
            raise ToolOptionError(
                f"{whose}: the hooks of a call with atomic=True run inside its transaction, so they cannot be `async def`."
            )


def name_of(function: Any) -> str:
    """Return a function's name with its module, for logs and people."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__name__)
    return f"{module}.{name}" if module else name
