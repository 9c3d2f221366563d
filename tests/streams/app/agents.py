"""An agent that tells long stories, in which tools fail, report, and are tried again."""

from __future__ import annotations

from runs import Agent
from tools import RetryPolicy, ToolContext, tool


@tool(idempotent=True, retry=RetryPolicy(attempts=3, initial_seconds=0.2, jitter=False))
def flaky(number: int, ctx: ToolContext) -> dict[str, int]:
    """Report, and fail at the first attempt if the number is odd."""
    ctx.progress(0.5, f"half of {number}")
    if number % 2 and ctx.attempt == 1:
        raise ConnectionError("the first time it fails")
    ctx.emit({"of": number, "said": "größer"})
    return {"number": number, "attempt": ctx.attempt}


@tool(idempotent=True)
def look(at: str) -> str:
    """Look at something."""
    return f"{at}: seen"


teller = Agent(name="teller", model="openai:test", instructions="Tell.", tools=[flaky, look])
