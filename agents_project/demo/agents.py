"""The agents of the demo: one that tests a tool, and one that audits an installed package."""

from __future__ import annotations

import os
import time
from typing import Any

from agents_project.demo import audit
from agents_project.demo.models import Ledger
from runs import Agent
from tools import ToolContext, tool

JOB = "Test the test tool with the numbers {first}-{last}, one after another, then give me the total."
AUDIT_JOB = "Audit the installed package {package}, then write a report in Markdown."
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

auditor = Agent(
    name="auditor",
    model=model(),
    instructions=(
        "You audit Python packages that are installed here, by their source alone.\n"
        "First call package_facts and list_modules at once. Then look at the parts that list_modules names, the largest"
        " first: undocumented for each part, and largest_functions and imports for the whole package. Ask for about five"
        " calls at once, for they run in parallel; in each turn say in one sentence what you look at. Twenty parts are"
        " enough.\n"
        "Then write the report, in Markdown and at most 60 lines: what the package is, with its number of modules and"
        " lines; a table of the parts with the most public names without docstrings; the largest functions, with where"
        " they stand; what it imports without declaring it; and three things to do first. Take every number from the"
        " tools' results, and say what was left out. If the package is not installed, say so, with the names that come"
        " close."
    ),
    tools=audit.TOOLS,
    max_steps=30,
    limits={"leg_budget_seconds": 4},
    context={"last_messages": 400},  # all of the results, for the report is written from them
)
