"""A call within its hooks: see tools.hooks for what they are, and in which order they are asked."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from django.db import transaction

from tools.context import ToolContext
from tools.exceptions import ApprovalRequired, HookFailed, InvalidArguments, ToolError, WorkerLeaving
from tools.hooks import Hooks, Instead, name_of
from tools.interrupts import Body
from tools.registry import Tool

logger = logging.getLogger("longhaul.tools")

BROKEN_OFF = (SoftTimeLimitExceeded, WorkerLeaving)  # nothing more is begun then


def call_within(
    hooks: Sequence[Hooks], tool: Tool[..., Any], arguments: dict[str, Any], ctx: ToolContext, held: Body
) -> Any:
    """Run the tool's function with what lies around it, and return the result, or raise what it came to.

    `held`: the whole of it, that an interruption ends. Then no other hook is asked.
    """
    call = ctx.tool_call
    entered: list[Hooks] = []
    outcome: Any = None
    error: BaseException | None = None
    with _loop(held, atomic=tool.atomic) as do:
        try:
            for layer in hooks:
                given = None if layer.before is None else do(layer.before, call, dict(arguments), ctx)
                if isinstance(given, Instead):
                    outcome = given.result
                    break
                if given is not None:
                    arguments = _changed(tool, layer, given)
                entered.append(layer)
            else:
                outcome = _body(tool, hooks, arguments, ctx, do)
        except BROKEN_OFF:
            raise
        except (Exception, asyncio.CancelledError) as raised:
            if held.reason is not None:
                raise
            error = raised
        for layer in reversed(entered):
            try:
                if error is None:
                    outcome = _after(tool, layer, arguments, outcome, ctx, do, held)
                elif layer.on_error is not None and not isinstance(error, ApprovalRequired):
                    given = do(layer.on_error, call, dict(arguments), error, ctx)
                    if given is not None:
                        outcome, error = given.result if isinstance(given, Instead) else given, None
            except BROKEN_OFF:
                raise
            except (Exception, asyncio.CancelledError) as raised:
                if held.reason is not None:
                    raise
                error = raised
    if error is not None:
        raise error
    return outcome


def _body(tool: Tool[..., Any], hooks: Sequence[Hooks], arguments: dict[str, Any], ctx: ToolContext, do: Any) -> Any:
    given = arguments if tool.context_parameter is None else {**arguments, tool.context_parameter: ctx}
    # What an atomic body wrote goes with its error, whatever a hook makes of that.
    undone = tool.atomic and any(layer.on_error is not None for layer in hooks)
    with transaction.atomic() if undone else contextlib.nullcontext():
        return do(tool.function, **given)


def _changed(tool: Tool[..., Any], layer: Hooks, given: Any) -> dict[str, Any]:
    """Return the arguments that a hook gave, checked. Raises HookFailed."""
    if not isinstance(given, Mapping):
        logger.warning("The hook %s before %s returned %s", name_of(layer.before), tool.name, type(given).__name__)
        raise HookFailed(f"{tool.name} was not run: a hook before it returned {type(given).__name__}, no arguments.")
    try:
        return tool.validate(given)
    except InvalidArguments as error:
        logger.warning("The hook %s before %s gave bad arguments", name_of(layer.before), tool.name, exc_info=error)
        raise HookFailed(f"{tool.name} was not run: a hook before it gave arguments that it does not take.") from error


def _after(
    tool: Tool[..., Any],
    layer: Hooks,
    arguments: dict[str, Any],
    outcome: Any,
    ctx: ToolContext,
    do: Callable[..., Any],
    held: Body,
) -> Any:
    if layer.after is None:
        return outcome
    try:
        given = do(layer.after, ctx.tool_call, dict(arguments), outcome, ctx)
    except (ToolError, SoftTimeLimitExceeded):
        raise
    except (Exception, asyncio.CancelledError) as error:
        if held.reason is not None:
            raise
        # Never the result as it was: it may be what the hook is there to hide. Nor another attempt: the tool has run.
        logger.warning("The hook %s after %s failed", name_of(layer.after), tool.name, exc_info=error)
        raise HookFailed(
            f"{tool.name} ran, but its result is kept back: a hook after it failed with {type(error).__name__}."
        ) from error
    if given is None:
        return outcome
    return given.result if isinstance(given, Instead) else given


@contextlib.contextmanager
def _loop(held: Body, *, atomic: bool) -> Iterator[Callable[..., Any]]:
    """Yield what calls a function, sync or async. What is async has one loop for all of the call, the rest runs beside it."""
    with contextlib.ExitStack() as stack:
        runner: list[asyncio.Runner] = []

        def do(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            answer = function(*args, **kwargs)
            if not inspect.iscoroutine(answer):
                return answer
            if atomic:
                answer.close()
                raise TypeError("What runs inside the transaction of an atomic call cannot be async.")
            if not runner:
                runner.append(stack.enter_context(asyncio.Runner()))
            return runner[0].run(held.bounded(answer))

        yield do
