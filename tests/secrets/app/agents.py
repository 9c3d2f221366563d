"""Agents whose tools and instructions fail with secrets in what they raise, print and log."""

import json
import logging
import os
import warnings
from typing import Any

from runs import Agent
from tools import ModelRetry, RetryPolicy, ToolContext, ToolFailed, tool

PLANTED: dict[str, str] = json.loads(os.environ.get("PLANTED", "{}"))
logger = logging.getLogger("shop")


@tool(retry=RetryPolicy(attempts=1))
def fails_with_an_url(note: str) -> str:
    """Fail as `requests` does: the text has the URL with its key."""
    raise ConnectionError(f"Max retries exceeded with url: https://vendor.example/v1/orders?api_key={PLANTED['url']}")


@tool(retry=RetryPolicy(attempts=2, initial_seconds=0.05))
def fails_with_a_cause(note: str) -> str:
    """Fail with a secret in the cause's text."""
    try:
        raise OSError(f"could not connect to mysql://robot:{PLANTED['cause']}@db.example/orders")
    except OSError as error:
        raise ValueError("no orders today") from error


@tool(retry=RetryPolicy(attempts=1))
def fails_with_a_local(note: str) -> str:
    """Fail beside a local variable that is a secret."""
    password = PLANTED["local"]
    return str(len(password) / 0)


@tool(retry=RetryPolicy(attempts=1))
def tells_the_model(note: str) -> str:
    """Fail with a text for the model, in which the vendor's key stands."""
    raise ToolFailed(f"The vendor refused {os.environ['VENDOR_API_KEY']}.")


@tool(retry=RetryPolicy(attempts=1))
def asks_again(note: str) -> str:
    """Ask the model for another way, and show it a header."""
    raise ModelRetry(f"The vendor wants another header than Authorization: Bearer {PLANTED['bearer']}")


@tool(retry=RetryPolicy(attempts=1))
def talks(note: str, ctx: ToolContext) -> str:
    """Print, warn and log a secret; give a private result."""
    dsn = f"postgresql://robot:{PLANTED['printed']}@db.example/orders"
    print(f"connecting to {dsn}")
    warnings.warn(f"{dsn} is slow", stacklevel=1)
    logger.warning("connected to %s", dsn, extra={"password": PLANTED["printed"], "dsn": dsn})
    logger.info("headers", extra={"headers": {"Authorization": f"Bearer {PLANTED['bearer']}"}})
    ctx.progress(0.5, "half")
    return PLANTED["result"]


def instructions(run: Any) -> str:
    raise LookupError(
        f"no instructions at {os.environ['DATABASE_URL']} nor at mysql://robot:{PLANTED['cause']}@db.example/x"
    )


TOOLS: list[Any] = [fails_with_an_url, fails_with_a_cause, fails_with_a_local, tells_the_model, asks_again, talks]
leaky = Agent(name="leaky", model="openai:test", instructions="Do as told.", tools=TOOLS)
lost = Agent(name="lost", model="openai:test", instructions=instructions)
