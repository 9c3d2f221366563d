"""A run that takes some tools, and what is kept of it and its calls. For tests of tools, in this process."""

from __future__ import annotations

from typing import Any

from runs import agents
from runs.models import Event, Run
from runs.pytest_longhaul import CallTool, ScriptedModel, call, run_to_end
from threads.models import Message
from tools import tool
from tools.models import ToolCall
from tools.registry import Tool

SECRET = "postgres://root:hunter2@db"


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def clerk(**options: Any) -> agents.Agent:
    """An agent that can add."""
    return agents.registry.add(agents.Agent(name="clerk", model="scripted:x", tools=[add], **options))


def took(model: ScriptedModel, *tools: Tool, calls: list[CallTool] | None = None, **options: Any) -> Run:
    """A run that called these at once, or else each tool once, and then said `done`. `options` are those of `start`."""
    agent = agents.registry.add(agents.Agent(name="clerk", model="scripted:x", tools=tools))
    model.say([*calls] if calls else [call(each.name) for each in tools], "done")
    run = run_to_end(agent.start("hello", **options))
    assert (run.status, run.output, run.steps) == ("completed", "done", 2), run.why()
    return run


def calls_of(run: Run) -> list[ToolCall]:
    return list(ToolCall.objects.filter(run_id=run.pk).order_by("index"))


def only_call(run: Run) -> ToolCall:
    [made] = calls_of(run)
    return made


def attempts(made: ToolCall) -> list[str]:
    return list(made.attempts.order_by("number").values_list("outcome", flat=True))


def told(run: Run) -> list[dict[str, Any]]:
    """The results as the thread holds them, and so the model reads them, by place."""
    messages = Message.objects.filter(run_id=run.pk, role="tool").order_by("position")
    return [part for message in messages for part in message.content]


def secret_got_out(model: ScriptedModel, run: Run) -> bool:
    """Whether the model was told the secret, or anything of it is kept."""
    requests = [message.decode() for each in model.requests for message in each.messages]
    return any("hunter2" in text for text in [stored(run), *requests])


def stored(run: Run) -> str:
    """All that is kept of a run, as text."""
    rows = [
        *Event.objects.filter(run=run).values_list("payload", flat=True),
        *Message.objects.filter(run_id=run.pk).values_list("content", flat=True),
        *[(made.arguments, made.result, made.error) for made in calls_of(run)],
        *[list(made.attempts.values_list("error", flat=True)) for made in calls_of(run)],
        run.output,
        run.error,
        run.why(),
    ]
    return repr(rows)
