"""What the model says in the benchmarks: a call of the first tool a step, as often as the prompt says, then a word."""

from __future__ import annotations

import re
from dataclasses import replace

from agents_project.demo import scripts
from agents_project.demo.model_server import ModelCall, Reply, ToolCall

TIMES = re.compile(r"(\d+) times")


def prompt(steps: int) -> str:
    """Return the input that makes `steps` ask for so many calls."""
    return f"Call the tool {steps} times."


def steps(call: ModelCall) -> Reply:
    for message in call.messages:
        times = message["role"] == "user" and TIMES.search(str(message["content"]))
        if times:
            # A service streams the arguments of a call token by token: some four characters a chunk.
            said = scripts.steps(int(times[1]))(call)
            return [replace(each, chunk_chars=4) if isinstance(each, ToolCall) else each for each in said]
    raise ValueError("The prompt does not say how many times, or was cut from the context.")
