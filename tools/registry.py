"""`@tool`: a function that agents can call.

There is no list of all tools: an agent names its own, and a run means the tools of its agent.
"""

import hashlib
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, Generic, Literal, TypeAlias, get_args, overload
from uuid import UUID

from typing_extensions import ParamSpec, TypeVar

from tools.context import ToolContext
from tools.exceptions import DuplicateTool, InvalidResult, ToolOptionError, ToolSchemaError
from tools.gates import Rate
from tools.hooks import Hooks, check_hooks
from tools.results import Kept, keep
from tools.retry import RetryPolicy
from tools.schema import Arguments, compile_arguments

P = ParamSpec("P", default=...)
R = TypeVar("R", default=Any)

NeedsApproval: TypeAlias = bool | Callable[[dict[str, Any], ToolContext], bool]

OnUnknown: TypeAlias = Literal["ask", "tell_model", "fail"]
OnDeploy: TypeAlias = Literal["finish", "give_back"]

InContext: TypeAlias = Literal["thread", "run", "step"]

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # what OpenAI's API, and those made after it, take as a function's name


@dataclass(frozen=True, eq=False)
class Tool(Generic[P, R]):
    """A function with all that is needed to offer it to a model and to run what the model asks for.

    Calling it calls the function, so that a tool is tested, and used by other code, like any function. Two tools are
    equal when they are the same object.
    """

    name: str
    description: str
    function: Callable[P, R]
    arguments: Arguments = field(repr=False)
    timeout: timedelta
    retry: RetryPolicy
    idempotent: bool | None
    atomic: bool
    needs_approval: NeedsApproval
    deferred: bool
    queue: str | None
    strict: bool
    on_unknown: OnUnknown = "ask"
    on_deploy: OnDeploy = "finish"
    max_concurrency: int | None = None
    rate: Rate | None = None
    hooks: tuple[Hooks, ...] = ()
    in_context: InContext = "thread"

    def __post_init__(self) -> None:
        # By hand what functools.update_wrapper does, for a frozen object: help(), doctest and inspect see the function.
        for each in ("__module__", "__name__", "__qualname__", "__doc__"):
            object.__setattr__(self, each, getattr(self.function, each))
        object.__setattr__(self, "__wrapped__", self.function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    @property
    def parameters(self) -> dict[str, Any]:
        """The JSON schema of the arguments, as the `parameters` of OpenAI's function tools. Not to be changed."""
        return self.arguments.schema

    @property
    def context_parameter(self) -> str | None:
        """The name of the parameter that wants the ToolContext."""
        return self.arguments.injected

    @property
    def takes_context(self) -> bool:
        return self.arguments.injected is not None

    @cached_property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what a model is told: name, description, schema. The same in every process."""
        told: list[Any] = [self.name, self.description, self.parameters]
        if self.strict:
            told.append("strict")
        return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def validate(self, arguments: Mapping[str, Any] | str | bytes) -> dict[str, Any]:
        """Return the keyword arguments of the function, from JSON text or a decoded object, defaults filled in.

        The context is not among them. Raises InvalidArguments, whose text tells the model what was wrong.
        """
        return self.arguments.validate(self.name, arguments)

    def keep(self, result: Any, call_id: UUID | None = None) -> Kept:
        """Return what the call keeps of a result. Raises InvalidResult, a ToolFailed, when that cannot be."""
        try:
            return keep(result, call_id)
        except TypeError as error:
            raise self.lost(str(error)) from error

    def lost(self, reason: str) -> InvalidResult:
        """Return what the model is told when the tool has run, and its result cannot be kept."""
        if self.atomic:
            told = (
                f"Tool {self.name!r} was rolled back, and nothing was changed, for its result cannot be kept: {reason}"
            )
        else:
            told = f"Tool {self.name!r} ran, and what it does is done, but its result is lost: {reason}"
        return InvalidResult(told)


@overload
def tool(function: Callable[P, R], /) -> Tool[P, R]: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_seconds: float = 60,
    retry: RetryPolicy | None = None,
    idempotent: bool | None = None,
    on_unknown: OnUnknown | None = None,
    on_deploy: OnDeploy = "finish",
    atomic: bool = False,
    needs_approval: NeedsApproval = False,
    deferred: bool = False,
    queue: str | None = None,
    max_concurrency: int | None = None,
    rate_limit: str | None = None,
    strict: bool = False,
    hooks: Sequence[Hooks] = (),
    in_context: InContext = "thread",
) -> Callable[[Callable[P, R]], Tool[P, R]]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_seconds: float = 60,
    retry: RetryPolicy | None = None,
    idempotent: bool | None = None,
    on_unknown: OnUnknown | None = None,
    on_deploy: OnDeploy = "finish",
    atomic: bool = False,
    needs_approval: NeedsApproval = False,
    deferred: bool = False,
    queue: str | None = None,
    max_concurrency: int | None = None,
    rate_limit: str | None = None,
    strict: bool = False,
    hooks: Sequence[Hooks] = (),
    in_context: InContext = "thread",
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a tool of a function: bare, or with options.

    name: what the model calls it; the function's name if not given. Letters, digits, `_`, `-`, at most 64.
    description: what the model reads; the docstring if not given.
    timeout_seconds: one attempt may take so long.
    retry: which failures are tried again, and when; `RetryPolicy()` if not given.
    idempotent: True: may run again at once. None: runs again only after its worker is surely gone, and an effect may
        happen twice. False: starts at most once, so it has no retry (`retry.attempts` is 1 if not given), and is
        `unknown` when its worker dies.
    on_unknown: what becomes of an idempotent=False call whose worker died, for nobody knows whether its effect is there.
        "ask" (if not given): it is `unknown` until a person, or its worker's late result, settles it. "tell_model": it
        has failed, and the model is told why. "fail": its run fails.
    on_deploy: what becomes of a call whose worker is asked to shut down. "finish": the worker waits for it. "give_back": it
        is interrupted by WorkerLeaving and begins again on another worker. A long tool may do the same by `ctx.stopping`.
    atomic: body and settlement are one transaction on Longhaul's database; sync, short, no network. What happens is
        there exactly once, so `idempotent` has nothing to add.
    needs_approval: True, or `(arguments, context) -> bool` (sync): a person decides before it runs.
    deferred: the function only begins something; its result is handed in later, from outside.
    queue: the Celery queue of its calls; the tools queue if not given.
    max_concurrency: so many of its calls run at once, over all workers and runs; the others wait for their turn.
    rate_limit: so many of its calls start in any stretch of a second, minute, hour or day: "10/s", "100/min", "1000/h",
        "5000/d". Each attempt is a start.
    strict: ask the service to hold the model to the schema, which is in OpenAI's strict subset then: see `tools.strict`.
    hooks: what runs before and after each attempt, and when it fails, within the hooks of the agent.
    in_context: how long the model is shown a call with its result: in all later runs of the "thread", in this "run" only,
        or until its next "step" is done.

    Raises ToolSchemaError and ToolOptionError, at import.
    """
    # Annotations that are strings may name what is local to the place of the definition (tools made in a function).
    caller = sys._getframe(1)
    scope = None if caller.f_locals is caller.f_globals else dict(caller.f_locals)
    del caller

    def decorate(function: Callable[..., Any]) -> Tool:
        called = name if name is not None else getattr(function, "__name__", repr(function))
        arguments = compile_arguments(function, called, injected=ToolContext, scope=scope, strict=strict)
        if not NAME.fullmatch(called):
            raise ToolSchemaError(called, "a tool's name has 1 to 64 letters, digits, `_` and `-`. Give it by name=.")
        _check_options(
            called,
            function,
            timeout_seconds=timeout_seconds,
            retry=retry,
            idempotent=idempotent,
            on_unknown=on_unknown,
            on_deploy=on_deploy,
            atomic=atomic,
            needs_approval=needs_approval,
            deferred=deferred,
            queue=queue,
            max_concurrency=max_concurrency,
            rate_limit=rate_limit,
            in_context=in_context,
        )
        check_hooks(f"Tool {called!r}", hooks, atomic=atomic)
        return Tool(
            name=called,
            description=arguments.description if description is None else description,
            function=function,
            arguments=arguments,
            timeout=timedelta(seconds=timeout_seconds),
            retry=retry or RetryPolicy(attempts=1 if idempotent is False else RetryPolicy().attempts),
            idempotent=idempotent,
            atomic=atomic,
            needs_approval=needs_approval,
            deferred=deferred,
            queue=queue,
            strict=strict,
            on_unknown=on_unknown or "ask",
            on_deploy=on_deploy,
            max_concurrency=max_concurrency,
            rate=None if rate_limit is None else Rate.parse(rate_limit),
            hooks=tuple(hooks),
            in_context=in_context,
        )

    return decorate if function is None else decorate(function)


def tools_by_name(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Return the tools by name, in order. Raises DuplicateTool, and TypeError for what is no tool."""
    found: dict[str, Tool] = {}
    for each in tools:
        if not isinstance(each, Tool):
            raise TypeError(f"{each!r} is not a tool. Decorate the function with @tool.")
        if each.name in found:
            first = found[each.name].function
            raise DuplicateTool(
                f"Two tools are named {each.name!r}: {first.__module__}.{first.__qualname__} and"
                f" {each.function.__module__}.{each.function.__qualname__}. Rename one by @tool(name=...)."
            )
        found[each.name] = each
    return found


def tool_names(tools: Iterable[Tool]) -> list[str]:
    """Return the names of the tools, in order. Raises DuplicateTool, and TypeError for what is no tool."""
    return list(tools_by_name(tools))


def _check_options(
    called: str,
    function: Callable[..., Any],
    *,
    timeout_seconds: float,
    retry: RetryPolicy | None,
    idempotent: bool | None,
    on_unknown: str | None,
    on_deploy: str,
    atomic: bool,
    needs_approval: NeedsApproval,
    deferred: bool,
    queue: object,
    max_concurrency: object,
    rate_limit: object,
    in_context: object,
) -> None:
    def refuse(problem: str) -> ToolOptionError:
        return ToolOptionError(f"Tool {called!r}: {problem}")

    if isinstance(timeout_seconds, bool) or not isinstance(timeout_seconds, int | float):
        raise refuse(f"timeout_seconds is a number of seconds; got {timeout_seconds!r}.")
    if not math.isfinite(timeout_seconds) or not 0 < timeout_seconds <= timedelta(days=365).total_seconds():
        raise refuse(f"timeout_seconds must be above 0 and at most a year; got {timeout_seconds!r}.")
    if retry is not None and not isinstance(retry, RetryPolicy):
        raise refuse(f"retry is a RetryPolicy; got {retry!r}.")
    if idempotent not in (True, False, None):
        raise refuse(f"idempotent is True, False or None; got {idempotent!r}.")
    if on_unknown is not None and on_unknown not in get_args(OnUnknown):
        raise refuse(f"on_unknown is one of {', '.join(get_args(OnUnknown))}; got {on_unknown!r}.")
    if on_unknown is not None and idempotent is not False:
        raise refuse("on_unknown says what becomes of a call that must not run twice: give it beside idempotent=False.")
    if on_deploy not in get_args(OnDeploy):
        raise refuse(f"on_deploy is one of {', '.join(get_args(OnDeploy))}; got {on_deploy!r}.")
    if on_deploy == "give_back" and idempotent is False:
        raise refuse("on_deploy='give_back' begins the call again, which idempotent=False forbids. Drop one.")
    if atomic and idempotent is not None:
        raise refuse(
            f"atomic=True excludes idempotent={idempotent}: an atomic effect is there exactly when its settlement is,"
            " however often the body starts. Drop idempotent."
        )
    if atomic and inspect.iscoroutinefunction(function):
        raise refuse("atomic=True runs the body inside a database transaction, so it cannot be `async def`.")
    if atomic and deferred:
        raise refuse("atomic=True settles the call in the body's transaction; a deferred call settles later. Drop one.")
    if idempotent is False and retry is not None and retry.attempts > 1:
        raise refuse(
            f"idempotent=False starts at most once, but its retry has {retry.attempts} attempts. Drop the retry,"
            " or idempotent=False if a second try does no harm."
        )
    if not isinstance(needs_approval, bool):
        _check_predicate(refuse, needs_approval)
    if queue is not None and (not isinstance(queue, str) or not queue.strip()):
        raise refuse(f"queue is the name of a Celery queue; got {queue!r}.")
    if max_concurrency is not None and (
        isinstance(max_concurrency, bool) or not isinstance(max_concurrency, int) or max_concurrency < 1
    ):
        raise refuse(f"max_concurrency is a whole number from 1; got {max_concurrency!r}.")
    if rate_limit is not None:
        try:
            Rate.parse(rate_limit)
        except ValueError as error:
            raise refuse(f"rate_limit: {error}.") from None
    if in_context not in get_args(InContext):
        raise refuse(f"in_context is one of {', '.join(get_args(InContext))}; got {in_context!r}.")


def _check_predicate(refuse: Callable[[str], ToolOptionError], predicate: Callable[..., Any]) -> None:
    if not callable(predicate):
        raise refuse(f"needs_approval is True, False or a function (arguments, context) -> bool; got {predicate!r}.")
    if inspect.iscoroutinefunction(predicate):
        raise refuse("needs_approval is asked in the agents worker, which runs no coroutines; make it a plain def.")
    try:
        inspect.signature(predicate).bind({}, None)
    except TypeError:
        raise refuse("needs_approval must take two arguments, (arguments, context).") from None
    except ValueError:  # a builtin without a signature: it will show when it is called
        return
