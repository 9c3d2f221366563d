"""What the model says in the benchmarks: a call of the first tool a step, as often as the prompt says, then a word."""

from __future__ import annotations

import re

from agents_project.demo import scripts
from agents_project.demo.model_server import ModelCall, Reply

TIMES = re.compile(r"(\d+) times")


def prompt(steps: int) -> str:
    """Return the input that makes `steps` ask for so many calls."""
    return f"Call the tool {steps} times."


def steps(call: ModelCall) -> Reply:
    for message in call.messages:
        times = message["role"] == "user" and TIMES.search(str(message["content"]))
        if times:
            return scripts.steps(int(times[1]))(call)
    raise ValueError("The prompt does not say how many times, or was cut from the context.")
