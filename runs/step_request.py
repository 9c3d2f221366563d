"""What the model was sent in a step, rebuilt from the step's row and the messages that it names.

    sent = step_request(run, 12)
    sent.body          # the request's body, byte for byte, where `sent.doubts` is empty
    sent.doubts        # why it may differ: a tool's schema has changed in code, a message was deleted

The row keeps the model, instructions, options and the places of the messages. A tool's schema it keeps as a digest: it is
read from code, and where that has changed since, the request cannot be rebuilt exactly, which `doubts` says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from runs import agents
from runs.context import Hidden, work_of
from runs.exceptions import AgentsError, LonghaulError
from runs.models import Run, Step
from runs.providers.port import ModelRequest, ShowsBody, ToolSpec, get_provider
from threads import database
from tools.exceptions import ToolError


@dataclass(frozen=True, slots=True)
class StepRequest:
    """`messages` are `{"role", "content", "id", "position"}` in the order in which the model was shown them.

    `tools` are those of today's code, under the names that the model was offered; one that is gone has no schema.
    """

    run: Run
    step: Step
    model: str
    instructions: str
    tools: list[ToolSpec]
    gone: list[str]  # names of tools that are no longer in code
    schema_digest: str  # of today's code; the step's own is step.schema_digest
    options: Mapping[str, Any]
    tool_choice: str
    messages: list[dict[str, Any]]
    body: bytes
    doubts: list[str] = field(default_factory=list)


class NoSuchStep(LonghaulError):
    """The run has no such step."""


def step_request(run: Run, number: int) -> StepRequest:
    """Rebuild the request of a committed step. Raises NoSuchStep, UnknownProvider, ProviderError."""
    step = Step.objects.filter(run=run, number=number).first()
    if step is None:
        if not run.steps:
            raise NoSuchStep(f"Run {run.pk} has no committed step yet.")
        raise NoSuchStep(f"Run {run.pk} has no step {number}: it has committed {run.steps}, from 1.")
    doubts: list[str] = []
    tools, gone, digest = _tools(run, step, doubts)
    messages = _messages(step)
    missing = _shown(step.context) - len(messages)
    if missing:
        doubts.append(f"{missing} of the messages that it was shown {'was' if missing == 1 else 'were'} deleted since")
    messages = _without_hidden(run, messages)
    options = step.asked()
    tool_choice = str(options.pop("tool_choice", "auto"))
    parallel = options.pop("parallel_tool_calls", None)
    provider, model = get_provider(step.model)
    request = ModelRequest(
        model=model,
        instructions=step.instructions,
        messages=[
            rendered
            for each in messages
            if (rendered := provider.render({"role": each["role"], "content": each["content"]}))
        ],
        tools=provider.render_tools(tools),
        tool_choice=tool_choice,
        parallel_tool_calls=parallel,
        options=options,
    )
    return StepRequest(
        run=run,
        step=step,
        model=step.model,
        instructions=step.instructions,
        tools=tools,
        gone=gone,
        schema_digest=digest,
        options=options,
        tool_choice=tool_choice,
        messages=messages,
        body=provider.body(request) if isinstance(provider, ShowsBody) else _body(request),
        doubts=doubts,
    )


def _tools(run: Run, step: Step, doubts: list[str]) -> tuple[list[ToolSpec], list[str], str]:
    """Return the tools as code has them now, the names that it has no longer, and the digest of those that are there."""
    try:
        known = agents.get(run.agent).tools_of(run)
    except (AgentsError, ToolError) as error:  # what a function of the agent made
        known = agents.get(run.agent).tools_by_name
        doubts.append(f"its agent could not be asked for its tools: {error}")
    except LonghaulError:
        known = {}
        if step.tool_names:
            doubts.append(f"the agent {run.agent!r} is no longer in code, and its tools cannot be shown")
    there = [known[name] for name in step.tool_names if name in known]
    gone = [name for name in step.tool_names if name not in known]
    digest = hashlib.sha256("".join(tool.digest for tool in there).encode()).hexdigest()
    if known and gone:
        doubts.append(f"these tools are no longer in code: {', '.join(gone)}")
    if digest != step.schema_digest:
        doubts.append(
            "the schemas of its tools have changed in code since: those below are today's"
            f" (digest then {step.schema_digest[:12]}, now {digest[:12]})"
        )
    return [ToolSpec(tool.name, tool.description, tool.parameters, tool.strict) for tool in there], gone, digest


def _messages(step: Step) -> list[dict[str, Any]]:
    """Read the shown messages as a leg reads them: the same decoder, so that the same bytes come out."""
    shown = list(step.shown().values_list("pk", flat=True))
    rows = database.rows_of(
        "SELECT id, position, role, content::text FROM longhaul_threads_message WHERE id = ANY (%s) ORDER BY position",
        (shown,),
    )
    return [
        {"id": str(id), "position": position, "role": role, "content": orjson.loads(content)}
        for id, position, role, content in rows
    ]


def _without_hidden(run: Run, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out the calls that the step was not shown, with their results."""
    hidden = Hidden(lambda: work_of(run.pk))
    shown: list[dict[str, Any]] = []
    for each in messages:
        if each["role"] == "assistant":
            hidden.spoken()
        hidden.shown(each["content"])
    for each in messages:
        content = hidden.shown(each["content"])
        if content or not each["content"]:
            shown.append({**each, "content": content})
    return shown


def _shown(context: Mapping[str, Any]) -> int:
    """Return how many messages the step was shown: the places of a thread have no gaps, but for what was deleted."""
    within = range(int(context["first"]), int(context["last"]) + 1) if context["last"] else range(0)
    skipped = sum(int(last) - int(first) + 1 for first, last in context["skipped"])
    return len(within) - skipped + sum(place not in within for place in context["pinned"])


def _body(request: ModelRequest) -> bytes:
    """Return the request in the port's own words, for a provider that cannot show its body."""
    return orjson.dumps(
        {
            "model": request.model,
            "instructions": request.instructions,
            "messages": [orjson.Fragment(each) for each in request.messages],
            "tools": orjson.Fragment(request.tools) if request.tools else [],
            "tool_choice": request.tool_choice,
            "options": dict(request.options),
        }
    )
