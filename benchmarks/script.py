"""What the model says in the benchmarks."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from agents_project.demo import scripts
from agents_project.demo.model_server import ModelCall, Reply, Text, ToolCall

TIMES = re.compile(r"(\d+) times")
SECONDS = re.compile(r"(\d+) seconds")
ARGUMENT_CHARS = 4  # a service streams the arguments of a call token by token


def prompt(steps: int) -> str:
    """Return the input that makes `steps` and `count` ask for so many calls."""
    return f"Call the tool {steps} times."


def steps(call: ModelCall) -> Reply:
    """Call the first tool a step, as often as the prompt says, then say a word."""
    said = scripts.steps(int(_asked(call, TIMES)))(call)
    return [replace(each, chunk_chars=ARGUMENT_CHARS) if isinstance(each, ToolCall) else each for each in said]


def count(call: ModelCall) -> Reply:
    """The same for a context that does not show all of the run: the number of a call is one more than its last one's."""
    number = 1
    for message in reversed(call.messages):
        if message["role"] == "assistant":
            number = json.loads(message["tool_calls"][0]["function"]["arguments"])["number"] + 1
            break
    if number > int(_asked(call, TIMES)):
        return [Text("Done.")]
    return [ToolCall(call.tools[0], {"number": number}, chunk_chars=ARGUMENT_CHARS)]


def at_once(call: ModelCall) -> Reply:
    """Call the first tool as often as the prompt says in one step, then say a word."""
    if call.messages[-1]["role"] == "tool":
        return [Text("Done.")]
    return [
        ToolCall(call.tools[0], {"number": number}, chunk_chars=ARGUMENT_CHARS)
        for number in range(1, int(_asked(call, TIMES)) + 1)
    ]


def slow(call: ModelCall) -> Reply:
    """Speak for as many seconds as the prompt says, a chunk of 21 characters a second."""
    seconds = int(_asked(call, SECONDS))
    return [Text("and twenty characters" * seconds, chunk_chars=21, delay=1.0)]


def word(call: ModelCall) -> Reply:
    """Say a few words, whatever was asked."""
    return [Text("It is on its way, and will be there on Friday.", chunk_chars=4)]


def _asked(call: ModelCall, wanted: re.Pattern[str]) -> str:
    for message in call.messages:
        found = message["role"] == "user" and wanted.search(str(message["content"]))
        if found:
            return str(found[1])
    raise ValueError("The prompt does not say how much, or was cut from the context.")
