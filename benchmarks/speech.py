"""What the model says where workers are killed or restarted: a sentence of a known text, streamed at a given pace."""

from __future__ import annotations

from agents_project.demo.model_server import ModelCall, Reply, Text, ToolCall

SENTENCE = " ".join(f"word{number}" for number in range(60))
CHUNK_CHARS = 6


def told(call: ModelCall) -> Reply:
    """Do what the last prompt says.

    `tell SECONDS`: stream SENTENCE over so long. `call TOOL STEPS SECONDS`: call the tool in so many steps, each of which
    says SENTENCE first, and end with it.
    """
    place = max(place for place, message in enumerate(call.messages) if message["role"] == "user")
    word, *rest = str(call.messages[place]["content"]).split()
    speech = Text(SENTENCE, CHUNK_CHARS, float(rest[-1]) * CHUNK_CHARS / len(SENTENCE))
    results = sum(message["role"] == "tool" for message in call.messages[place:])
    if word == "call" and results < int(rest[1]):
        return [speech, ToolCall(rest[0])]
    return [speech]
