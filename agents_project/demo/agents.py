"""The agent of the demo, and the tool that it tests."""

from __future__ import annotations

import os
import time
from typing import Any

from agents_project.demo.models import Ledger
from runs import Agent
from tools import ToolContext, tool

JOB = "Test the test tool with the numbers {first}-{last}, one after another, then give me the total."
WORK_SECONDS = 0.25  # slow enough that 50 calls need several legs


def model() -> str:
    """Return the model to use: the scripted one, unless the environment names a real service."""
    real = os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL")
    return os.environ.get("LONGHAUL_DEMO_MODEL") or ("openai:gpt-5-mini" if real else "openai:demo")


@tool(atomic=True, timeout_seconds=30)
def test_tool(number: int, ctx: ToolContext) -> dict[str, Any]:
    """Test a number and return its value.

    Args:
        number: the number to test
    """
    Ledger.objects.create(call_id=ctx.tool_call.id, number=number)
    time.sleep(WORK_SECONDS)  # in the open transaction: a worker that dies here leaves no row
    return {"number": number, "value": number}


tester = Agent(
    name="tester",
    model=model(),
    instructions=(
        "You test tools. Call test_tool for each number you are asked for, one call at a time and in order, saying in a"
        " few words what you do. When all are done, answer with the sum of the values that the tool returned."
    ),
    tools=[test_tool],
    max_steps=60,
    limits={"leg_budget_seconds": 4},
    context={"last_messages": 200},  # all of the job is in sight, for its end is a sum over it
)
