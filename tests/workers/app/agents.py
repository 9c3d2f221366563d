"""An agent whose tools leave a trace of each start, one tool a declaration of what may run again."""

import time
from typing import Any

import redis
from django.conf import settings

from agents_project.demo.models import Ledger
from runs import Agent
from tests.workers.app.choice import choice_test
from tests.workers.app.slow import slow_test
from tools import ToolContext, ToolFailed, tool


def _begin(ctx: ToolContext, seconds: float) -> None:
    """Count a start outside of any transaction, then work."""
    redis.Redis.from_url(settings.REDIS_URL).rpush(f"started:{ctx.tool_call.id}", ctx.attempt)
    time.sleep(seconds if ctx.attempt == 1 else 0)


@tool(atomic=True)
def atomic(seconds: float, ctx: ToolContext) -> str:
    """Work, with an effect in the transaction that settles the call."""
    Ledger.objects.create(call_id=ctx.tool_call.id, number=ctx.attempt)
    _begin(ctx, seconds)
    return "done"


@tool(idempotent=True)
def idempotent(seconds: float, ctx: ToolContext) -> str:
    """Work that may run again."""
    _begin(ctx, seconds)
    return "done"


@tool
def plain(seconds: float, ctx: ToolContext) -> str:
    """Work that may run again only when its worker is surely gone."""
    _begin(ctx, seconds)
    return "done"


@tool(idempotent=False)
def once(seconds: float, ctx: ToolContext) -> str:
    """Work that must not start twice."""
    _begin(ctx, seconds)
    return "done"


@tool(idempotent=False, on_unknown="tell_model")
def once_told(seconds: float, ctx: ToolContext) -> str:
    """Work that must not start twice; the model is told when nobody knows whether it is done."""
    _begin(ctx, seconds)
    return "done"


@tool(idempotent=False, on_unknown="fail")
def once_fails(seconds: float, ctx: ToolContext) -> str:
    """Work that must not start twice, and without which nothing goes on."""
    _begin(ctx, seconds)
    return "done"


@tool(idempotent=True)
def tenth_fails(number: int) -> int:
    """Give the number back, unless it ends in 0.

    Args:
        number: the number
    """
    if number % 10 == 0:
        raise ToolFailed(f"{number} ends in 0.")
    return number


@tool(idempotent=True, max_concurrency=2, rate_limit="8/s")
def narrow(seconds: float, ctx: ToolContext) -> str:
    """Work that the other side takes two at a time, and eight a second."""
    _begin(ctx, seconds)
    return "done"


TOOLS: list[Any] = [atomic, idempotent, plain, once, once_told, once_fails, narrow, tenth_fails]
worker_test = Agent(name="worker_test", model="openai:test", instructions="Do as told.", tools=TOOLS)
own_queue_test = Agent(name="own_queue_test", model="openai:test", instructions="Do as told.", queue="own_queue_test")

__all__ = ["choice_test", "own_queue_test", "slow_test", "worker_test"]
