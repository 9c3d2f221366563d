"""An agent whose tool costs nothing, so that what is measured is Longhaul; and one whose workers are killed meanwhile."""

import time
from typing import Any

from runs import Agent
from tools import ToolContext, tool


@tool(idempotent=True)
def take(number: int) -> int:
    """Take a number.

    Args:
        number: the number
    """
    return number


bench = Agent(
    name="bench",
    model="openai:bench",
    instructions="Call the tool until you have enough.",
    tools=[take],
    max_steps=1000,
    context={"last_messages": 200},  # all of it, as the others send
)


def _work(ctx: ToolContext) -> str:
    """Work for so long that the worker is killed meanwhile; the attempt after that is done at once."""
    time.sleep(30 if ctx.attempt == 1 else 0)
    return "done"


@tool(idempotent=True)
def killed_idempotent(ctx: ToolContext) -> str:
    """Work that may run again."""
    return _work(ctx)


@tool(atomic=True)
def killed_atomic(ctx: ToolContext) -> str:
    """Work whose effect is in the transaction that settles the call."""
    return _work(ctx)


@tool
def killed_other(ctx: ToolContext) -> str:
    """Work that may run again only when its worker is surely gone."""
    return _work(ctx)


@tool(idempotent=True)
def look() -> str:
    """Look for a moment."""
    time.sleep(0.05)
    return "seen"


KILLED: list[Any] = [killed_idempotent, killed_atomic, killed_other, look]
killed = Agent(name="killed", model="openai:bench", instructions="Do as told.", tools=KILLED, max_steps=1000)

speaker = Agent(name="speaker", model="openai:bench", instructions="Speak.")

counter = Agent(
    name="counter",
    model="openai:bench",
    instructions="Call the tool until you have enough.",
    tools=[take],
    max_steps=5000,
)
