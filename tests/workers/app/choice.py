"""An agent whose tools are made for each run, and whose calls have hooks around them."""

import time
from typing import Any

import redis
from django.conf import settings

from runs import Agent, Run
from tools import Hooks, Tool, ToolContext, tool
from tools.models import ToolCall


def hold(call: ToolCall, arguments: dict[str, Any], ctx: ToolContext) -> None:
    """Count a start, and work before the tool does."""
    redis.Redis.from_url(settings.REDIS_URL).rpush(f"started:{call.pk}", ctx.attempt)
    time.sleep(arguments["seconds"] if ctx.attempt == 1 else 0)


def mask(call: ToolCall, arguments: dict[str, Any], result: Any, ctx: ToolContext) -> str:
    return str(result).replace("secret", "***")


def made_for(run: Run) -> list[Tool]:
    word = f"secret of {run.pk}"

    @tool(idempotent=False, hooks=[Hooks(before=hold)])
    def look_inside(seconds: float) -> str:
        """Look inside."""
        return word

    return [look_inside]


choice_test = Agent(
    name="choice_test", model="openai:test", tools=made_for, hooks=[Hooks(after=mask)], tool_choice="required"
)
