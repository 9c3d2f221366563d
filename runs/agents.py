"""Agents: named definitions in code, discovered from `agents.py` of each installed app. No rows.

What an agent says is overridden by its thread, that by the run. The nearest wins; lists replace, they never merge.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from functools import cached_property
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from django.apps import apps
from django.db import DatabaseError, InterfaceError
from django.utils.module_loading import module_has_submodule

from runs import output_schema
from runs.conf import settings
from runs.exceptions import AgentsError, BadInput, UnknownAgent
from runs.output_schema import OutputSchema
from runs.providers.port import ToolSpec, UnknownProvider, check_model
from threads.content import clean, plain
from threads.exceptions import within
from tools.gates import Rate
from tools.hooks import Hooks, check_hooks, name_of
from tools.registry import Tool, tools_by_name

if TYPE_CHECKING:
    from runs.models import Run

logger = logging.getLogger("longhaul.agents")

ToolsOf: TypeAlias = "Callable[[Run], Iterable[Tool]]"
Instructions: TypeAlias = "str | Callable[[Run], str]"

# limit -> what it must be, and the most that it may be: what its column, or a date, can hold
LIMITS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "max_steps": ("a whole number from 1", 1_000_000),
        "max_total_tokens": ("a whole number from 1", 10**12),
        "max_cost": ("a number above 0", 10**9),
        "deadline_seconds": ("a number above 0", 10 * 365 * 86_400),
        "leg_budget_seconds": ("a number above 0", 10 * 365 * 86_400),
    }
)
OVERRIDES = (
    "model",
    "instructions",
    "tools",
    "limits",
    "context",
    "tool_choice",
    "parallel_tool_calls",
    "options",
    "output_schema",
)
MERGED = ("limits", "context", "options")  # key by key; anything else is replaced whole
CONTEXT_OPTIONS = ("last_messages", "sources")
TOOL_CHOICES = ("auto", "none", "required")  # or the name of a tool


@dataclass(frozen=True, kw_only=True, eq=False)
class Agent:
    """A named definition. `model` is `provider:name`; without one LONGHAUL["DEFAULT_MODEL"] counts.

    instructions: what the model is told first: a text, or a sync function of the run that returns one.
    tools: what `@tool` made, sync functions of the run that return such tools, or a mix; names must differ.
    max_steps, max_total_tokens, max_cost, deadline_seconds, leg_budget_seconds: its limits, also as one dict `limits`.
    context: `{"last_messages": n}`. options: fields of the model request (temperature, ...).
    output_schema: a JSON schema of the final answer; the run's output is then the value, and no text.
    tool_choice: `auto`, `none`, `required`, or the name of a tool. The last two count for the first step of a run only.
    parallel_tool_calls: whether the model may ask for several calls at once. None: as its service does by itself. False: of
        several only the first is run, and the model is told so.
    hooks: what runs around every call of its tools, and around the hooks of those.
    queue: the Celery queue of its runs; the agents queue if not given.
    max_concurrency: of its runs so many are at work at once, over all workers. One that waits for its tool calls (and whose leg does
    not linger) or for a person is not. rate_limit: so many of its runs start in any such time: "10/min", with s, min, h or d.
    """

    name: str
    model: str | None = None
    instructions: Instructions = ""
    tools: Sequence[Tool | ToolsOf] | ToolsOf = ()
    max_steps: int | None = None
    max_total_tokens: int | None = None
    max_cost: Decimal | float | None = None
    deadline_seconds: float | None = None
    leg_budget_seconds: float | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    tool_choice: str = "auto"
    parallel_tool_calls: bool | None = None
    output_schema: Mapping[str, Any] | None = None
    hooks: Sequence[Hooks] = ()
    queue: str | None = None
    max_concurrency: int | None = None
    rate_limit: str | None = None

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 200:
            raise AgentsError("An agent needs a name of 1 to 200 characters.")
        self._check_dispatch()
        for each in self._sources:
            if not isinstance(each, Tool):
                _check_function(self.name, each)
        _ = self.tools_by_name
        own = {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}
        object.__setattr__(self, "limits", check_limits({**self.limits, **own}))
        check_context(self.context)
        check_parallel(self.parallel_tool_calls)
        check_hooks(f"Agent {self.name!r}", self.hooks, atomic=any(tool.atomic for tool in self.tools_by_name.values()))
        object.__setattr__(self, "hooks", tuple(self.hooks))
        if self.output_schema is not None:
            output_schema.check(self.output_schema)

    def _check_dispatch(self) -> None:
        """Raises AgentsError where queue, max_concurrency or rate_limit are none."""
        said = f"of agent {self.name!r}"
        if self.queue is not None and (not isinstance(self.queue, str) or not self.queue.strip()):
            raise AgentsError(f"queue {said} is the name of a Celery queue; got {self.queue!r}.")
        most = self.max_concurrency
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise AgentsError(f"max_concurrency {said} is a whole number from 1; got {most!r}.")
        if self.rate_limit is not None:
            try:
                Rate.parse(self.rate_limit)
            except ValueError as error:
                raise AgentsError(f"rate_limit {said}: {error}.") from None

    @cached_property
    def _sources(self) -> tuple[Tool | ToolsOf, ...]:
        given: Any = self.tools
        return (given,) if callable(given) else tuple(given)

    @cached_property
    def tools_by_name(self) -> dict[str, Tool]:
        """The tools that every run of this agent may have: all but those of its functions."""
        return tools_by_name(each for each in self._sources if isinstance(each, Tool))

    @cached_property
    def tool_functions(self) -> tuple[ToolsOf, ...]:
        """Those that are asked for the tools of a run, in their order."""
        return tuple(each for each in self._sources if not isinstance(each, Tool))

    def tools_of(self, run: Run) -> dict[str, Tool]:
        """Return the tools that a run may have now, by name; its functions are asked.

        Raises AgentsError, DuplicateTool and ToolOptionError for what a function made, and the database's errors.
        """
        if not self.tool_functions:
            return self.tools_by_name
        found: list[Tool] = []
        for each in self._sources:
            found += [each] if isinstance(each, Tool) else _ask_for_tools(self.name, each, run)
        tools = tools_by_name(dict.fromkeys(found))
        check_hooks(f"Agent {self.name!r}", self.hooks, atomic=any(tool.atomic for tool in tools.values()))
        return tools

    @cached_property
    def schema_text(self) -> str | None:
        """`output_schema` as it is stored where a thread or a run has one of its own."""
        return None if self.output_schema is None else output_schema.check(self.output_schema)

    def start(self, input: str | Sequence[Mapping[str, Any]] | None = None, **options: Any) -> Run:
        """Start a run: a row now, dispatched when the surrounding transaction commits.

        Options as in `runs.admission.start`: owner, thread, message, messages, save, busy, priority, limits, model,
        instructions, tools, tool_choice, parallel_tool_calls, context, options, output_schema, metadata, client_id,
        idempotency_key.
        Raises BadInput and its kind; the database is as before then.
        """
        from runs import admission

        return admission.start(self, input, **options)

    async def astart(self, input: str | Sequence[Mapping[str, Any]] | None = None, **options: Any) -> Run:
        """`start`, from async code."""
        from asgiref.sync import sync_to_async

        return await sync_to_async(self.start)(input, **options)


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a run. None is unlimited."""

    max_steps: int
    max_total_tokens: int | None
    max_cost: Decimal | None
    deadline: timedelta | None
    leg_budget: timedelta


@dataclass(frozen=True)
class Definition:
    """What an agent, its thread and its run say together."""

    agent: str
    model: str
    instructions: Instructions
    tools: dict[str, Tool]
    limits: Limits
    last_messages: int
    tool_choice: str
    options: Mapping[str, Any]
    parallel_tool_calls: bool | None = None
    output_schema: OutputSchema | None = None

    def choice_at(self, step: int, *, last: bool) -> str:
        """Return the `tool_choice` of a step of the run, from 1; `last`: no other step is allowed after it.

        A call is forced in the first step only: forced in every one, the model could never answer.
        """
        if last:
            return "none"
        return "auto" if step > 1 and is_forced(self.tool_choice) else self.tool_choice

    @cached_property
    def specs(self) -> list[ToolSpec]:
        return [ToolSpec(tool.name, tool.description, tool.parameters, tool.strict) for tool in self.tools.values()]

    @cached_property
    def schema_digest(self) -> str:
        """SHA-256 (hex) of all tools that the model is offered."""
        return hashlib.sha256("".join(tool.digest for tool in self.tools.values()).encode()).hexdigest()


def is_forced(tool_choice: str) -> bool:
    """Return whether the model must call a tool: any, or the one that is named."""
    return tool_choice not in ("auto", "none")


def _check_function(agent: str, function: object) -> None:
    """Raises TypeError for what can be asked for no tools."""
    if not callable(function):
        raise TypeError(f"{function!r} is no tool of agent {agent!r}. Decorate the function with @tool.")
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise TypeError(
            f"{name_of(function)} is no tool of agent {agent!r}: decorate it with @tool. A function that returns tools takes"
            " one argument, the run."
        ) from None
    except ValueError:  # a builtin without a signature: it will show when it is called
        pass
    if inspect.iscoroutinefunction(function):
        raise TypeError(
            f"{name_of(function)}, which returns tools for agent {agent!r}, must be a plain def, not async."
        )


def _ask_for_tools(agent: str, function: ToolsOf, run: Run) -> list[Tool]:
    """Return the tools that the function of an agent has for the run. Raises AgentsError."""
    began = time.monotonic()
    try:
        given = function(run)
        found = None if given is None or isinstance(given, str | Mapping) else list(given)
    except (DatabaseError, InterfaceError):
        raise  # no fault of the function's: it is asked again
    except Exception as error:  # it is the user's code
        logger.exception("Run %s: %s, which returns its tools, failed", run.pk, name_of(function))
        # The class only, for the run keeps it: the text of a foreign exception may carry what no reader may see.
        raise AgentsError(
            f"{name_of(function)}, which returns tools for agent {agent!r}, failed ({type(error).__name__})."
            " The worker's log says more."
        ) from error
    if time.monotonic() - began > 1:
        logger.warning("%s took over 1 s to return the tools of agent %s; others waited", name_of(function), agent)
    if found is None or not all(isinstance(each, Tool) for each in found):
        what = (
            type(given).__name__ if found is None else repr(next(each for each in found if not isinstance(each, Tool)))
        )
        raise AgentsError(f"{name_of(function)} must return a list of tools for agent {agent!r}; it returned {what}.")
    return found


def define(
    agent: Agent, *overrides: Mapping[str, Any], offered: Mapping[str, Tool] | None = None, begun: bool = False
) -> Definition:
    """Lay the overrides over the agent, the later ones nearer. Raises BadInput when they do not fit it.

    offered: what `agent.tools_of(run)` gave. None, where no function is asked: names that it may know are believed.
    begun: whether the run has taken a step.
    """
    said: dict[str, Any] = {
        "model": agent.model or settings().default_model,
        "instructions": agent.instructions,
        "tools": None,
        "tool_choice": agent.tool_choice,
        "parallel_tool_calls": agent.parallel_tool_calls,
        "output_schema": agent.schema_text,
    }
    limits: dict[str, Any] = dict(agent.limits)
    context: dict[str, Any] = dict(agent.context)
    options: dict[str, Any] = dict(agent.options)
    for layer in map(check_overrides, overrides):  # a thread's are a column that anybody may have written
        said.update({key: value for key, value in layer.items() if key in said and value is not None})
        limits.update(layer.get("limits") or {})
        context.update(layer.get("context") or {})
        options.update(layer.get("options") or {})
    if not said["model"]:
        raise BadInput(
            f"Agent {agent.name!r} has no model. Give it one, or set LONGHAUL['DEFAULT_MODEL'].", attr="model"
        )
    tools = dict(agent.tools_by_name if offered is None else offered)
    if said["tools"] is not None:
        unknown = [name for name in said["tools"] if name not in tools]
        if unknown and offered is not None and agent.tool_functions:
            logger.warning(
                "Agent %s has no tool %s for this run now; it is not offered", agent.name, ", ".join(unknown)
            )
        elif unknown and not agent.tool_functions:
            raise BadInput(
                f"Agent {agent.name!r} has no tool {unknown[0]!r}; it has: {', '.join(tools) or 'none'}.", attr="tools"
            )
        tools = {name: tools[name] for name in said["tools"] if name in tools}
    choice = said["tool_choice"]
    if begun and is_forced(choice) and agent.tool_functions:
        choice = "auto"  # what was forced in the first step may be offered no more
    believed = agent.tool_functions and offered is None and (said["tools"] is None or choice in said["tools"])
    if not believed and choice not in TOOL_CHOICES and choice not in tools:
        raise BadInput(
            f"tool_choice must be {', '.join(TOOL_CHOICES)} or one of the run's tools; it is {choice!r}.",
            attr="tool_choice",
        )
    seconds = limits.get("deadline_seconds")
    budget = limits.get("leg_budget_seconds")
    cost = limits.get("max_cost")
    return Definition(
        agent=agent.name,
        model=said["model"],
        instructions=said["instructions"],
        tools=tools,
        limits=Limits(
            max_steps=limits.get("max_steps") or settings().max_steps,
            max_total_tokens=limits.get("max_total_tokens"),
            max_cost=None if cost is None else Decimal(str(cost)),
            deadline=None if seconds is None else timedelta(seconds=seconds),
            leg_budget=settings().leg_budget if budget is None else timedelta(seconds=budget),
        ),
        last_messages=context.get("last_messages") or settings().context_messages,
        tool_choice=choice,
        options=options,
        parallel_tool_calls=said["parallel_tool_calls"],
        output_schema=None if said["output_schema"] is None else output_schema.of(said["output_schema"]),
    )


def check_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a thread or run may override, without what is None. Raises BadInput that names the field."""
    said = {key: value for key, value in given.items() if value is not None}
    if unknown := set(said) - set(OVERRIDES):
        raise BadInput(f"{', '.join(sorted(unknown))} cannot be overridden; {', '.join(OVERRIDES)} can.")
    for key in ("model", "instructions", "tool_choice"):
        if key in said:
            if not isinstance(said[key], str):
                raise BadInput(f"{key} must be a string.", attr=key)
            said[key] = clean(said[key])
    if "parallel_tool_calls" in said:
        check_parallel(said["parallel_tool_calls"])
    if "model" in said:
        check_named_model(said["model"])
    if "options" in said:
        if not isinstance(said["options"], Mapping):
            raise BadInput("options must be a dict of fields of the model request, like {'temperature': 0}.")
        said["options"] = plain(dict(said["options"]), "options")
    if "tools" in said:
        if isinstance(said["tools"], str) or not isinstance(said["tools"], Sequence):
            raise BadInput("tools must be a list of names of the agent's tools.", attr="tools")
        names = [tool.name if isinstance(tool, Tool) else tool for tool in said["tools"]]
        if not all(isinstance(name, str) for name in names):
            raise BadInput("tools must be a list of names of the agent's tools.", attr="tools")
        said["tools"] = [clean(name) for name in names]
    if "limits" in said:
        with within("limits"):
            said["limits"] = check_limits(said["limits"])
    if "context" in said:
        with within("context"):
            check_context(said["context"])
        said["context"] = dict(said["context"])
    if "output_schema" in said:
        with within("output_schema"):
            said["output_schema"] = output_schema.check(said["output_schema"])
    return said


def check_named_model(model: str) -> None:
    """Raises BadInput when no provider goes by the model's prefix."""
    try:
        check_model(model)
    except UnknownProvider as error:
        raise BadInput(str(error), attr="model") from error


def check_limits(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Return the limits as plain numbers. Raises BadInput that names the limit."""
    if not isinstance(limits, Mapping):
        raise BadInput(f"limits must be a dict of: {', '.join(LIMITS)}.")
    checked: dict[str, Any] = {}
    for name, value in limits.items():
        if name not in LIMITS:
            raise BadInput(f"There is no limit {name!r}; there are: {', '.join(LIMITS)}.", attr=name)
        if value is None:
            continue
        whole = name in ("max_steps", "max_total_tokens")
        kinds = (int,) if whole else (int, float, Decimal)
        must, most = LIMITS[name]
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= most:
            raise BadInput(f"{name} must be {must} to {most:,}; it is {value!r}.", attr=name)
        checked[name] = float(value) if isinstance(value, Decimal) else value
    return checked


def check_parallel(parallel: object) -> None:
    """Raises BadInput."""
    if parallel is not None and not isinstance(parallel, bool):
        raise BadInput(f"parallel_tool_calls must be True or False; it is {parallel!r}.", attr="parallel_tool_calls")


def check_context(context: Mapping[str, Any]) -> None:
    """Raises BadInput that names the option."""
    if not isinstance(context, Mapping):
        raise BadInput("context must be a dict like {'last_messages': 100}.")
    if context.get("sources") is not None:
        raise BadInput("context['sources'] is not there yet: a run is shown its thread. Leave it out.", attr="sources")
    if unknown := set(context) - set(CONTEXT_OPTIONS):
        raise BadInput(f"There is no context option {sorted(unknown)[0]!r}; there are: {', '.join(CONTEXT_OPTIONS)}.")
    last = context.get("last_messages")
    if last is not None and (isinstance(last, bool) or not isinstance(last, int) or not 1 <= last <= 10_000):
        raise BadInput("last_messages must be a whole number from 1 to 10000.", attr="last_messages")


class Registry:
    """The agents of this project, found once. A module that fails to import is remembered; the others work."""

    def __init__(self) -> None:
        self._agents: dict[str, Agent] = {}
        self._broken: dict[str, Exception] = {}
        self._found = False
        self._lock = threading.RLock()

    def add(self, agent: Agent) -> Agent:
        """Make known an agent that stands in no `agents.py` (in a test, say). One of the same name is replaced."""
        self._agents[agent.name] = agent
        return agent

    def discover(self) -> None:
        with self._lock:
            if self._found:
                return
            for config in apps.get_app_configs():
                # `runs.agents` is this module: definitions stand in the apps of its users.
                if config.name == "runs" or not module_has_submodule(config.module, "agents"):
                    continue
                name = f"{config.name}.agents"
                try:
                    module = import_module(name)
                    for value in list(vars(module).values()):
                        if isinstance(value, Agent):
                            self._take(value, name)
                except Exception as error:
                    self._broken[name] = error
                    logger.exception("The agents of %s cannot be used", name)
            self._found = True

    def _take(self, agent: Agent, module: str) -> None:
        known = self._agents.get(agent.name)
        if known is not None and known is not agent:
            raise AgentsError(f"Two agents are named {agent.name!r}; the second one stands in {module}. Rename one.")
        self._agents[agent.name] = agent

    def get(self, name: str) -> Agent:
        """Return an agent. Raises UnknownAgent that says which there are, and which modules failed to import."""
        self.discover()
        if name in self._agents:
            return self._agents[name]
        told = f"There is no agent {name!r}; there are: {', '.join(sorted(self._agents)) or 'none'}."
        for module, error in self._broken.items():
            told += f" {module} failed to import: {type(error).__name__}: {error}"
        raise UnknownAgent(told)

    def all(self) -> dict[str, Agent]:
        self.discover()
        return dict(sorted(self._agents.items()))

    def queue_of(self, name: str) -> str:
        """Return the queue to which the runs of an agent are sent; of one that is not there any more, the agents queue."""
        self.discover()
        agent = self._agents.get(name)
        return (agent.queue if agent else None) or settings().agents_queue

    def queues(self) -> frozenset[str]:
        """Return the queues of all agents. A worker that consumes one of them runs legs."""
        return frozenset({settings().agents_queue, *(agent.queue for agent in self.all().values() if agent.queue)})

    def broken(self) -> dict[str, Exception]:
        """Return the agents modules that failed to import, and why."""
        self.discover()
        return dict(self._broken)


registry = Registry()
get = registry.get

__all__ = ["Agent", "Definition", "Limits", "Registry", "define", "get", "registry"]
