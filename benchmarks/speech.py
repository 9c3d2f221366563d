"""What the model says where workers are killed or restarted: a sentence of a known text, streamed at a given pace."""

from __future__ import annotations

import os
from pathlib import Path

from agents_project.demo.model_server import ModelCall, Reply, Text, ToolCall

SENTENCE = " ".join(f"word{number}" for number in range(60))
CHUNK_SECONDS = 0.1
# Names a file: when it is there, the runs that call tools say the rest at once and come to their end.
ENOUGH = "LONGHAUL_BENCH_ENOUGH"


def told(call: ModelCall) -> Reply:
    """Do what the last prompt says.

    `tell SECONDS`: stream SENTENCE over so long. `call TOOL STEPS SECONDS`: call the tool in so many steps, each of which
    says SENTENCE first, and end with it.
    """
    place = max(place for place, message in enumerate(call.messages) if message["role"] == "user")
    word, *rest = str(call.messages[place]["content"]).split()
    speech = _spoken(float(rest[-1]))
    if word == "tell":
        return [speech]
    if _enough():
        return [_spoken(0)]
    results = sum(message["role"] == "tool" for message in call.messages[place:])
    return [speech, ToolCall(rest[0])] if results < int(rest[1]) else [speech]


def _spoken(seconds: float) -> Text:
    chunks = round(seconds / CHUNK_SECONDS)
    if not chunks:
        return Text(SENTENCE)
    return Text(SENTENCE, -(-len(SENTENCE) // chunks), CHUNK_SECONDS)


def _enough() -> bool:
    path = os.environ.get(ENOUGH)
    return path is not None and Path(path).exists()
