"""What a model call costs the process that makes it, with 10, 100 and 400 messages in the thread.

Longhaul's provider beside the `openai` package's objects, against the same server, by turns. A third form has as many bytes
as the 400 messages in only 10: where it costs as much, the cost is that of the bytes. README.md tells how it is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.rig import Rig

SCRIPT = "benchmarks.script:word"
COUNTS = (10, 100, 400)  # messages
TEXT = "The order was sent on Monday, and it is to arrive on Friday. " * 4  # 244 characters a message
CALLS = 40  # a turn of a form: some 20 ms of CPU by the kernel's clock would be too few
Call = Callable[[], None]


def conversation(messages: int, text: str = TEXT) -> list[dict[str, Any]]:
    """Return messages as a thread holds them: the user and the model by turns, every fourth pair a tool's call and result."""
    made: list[dict[str, Any]] = []
    while len(made) < messages:
        number = len(made)
        if number % 8 == 6:
            call = f"0199f7a2-7b1c-7000-8000-{number:012d}"
            part = {"type": "tool_call", "tool_call": call, "name": "look_up", "arguments": {"text": text}}
            made.append({"role": "assistant", "content": [part]})
            part = {
                "type": "tool_result",
                "tool_call": call,
                "name": "look_up",
                "outcome": "success",
                "result": {"found": text},
            }
            made.append({"role": "tool", "content": [part]})
        else:
            role = "assistant" if number % 2 else "user"
            made.append({"role": role, "content": [{"type": "text", "text": text}]})
    return made[:messages]


def _of_bytes(messages: int, size: int) -> list[dict[str, Any]]:
    """Return so many messages that are `size` bytes in all once they are rendered, to a few."""
    _, frame = ours(conversation(messages, ""))
    chars = (size - frame) // messages
    return conversation(messages, (TEXT * (chars // len(TEXT) + 1))[:chars])


def ours(messages: Sequence[dict[str, Any]]) -> tuple[Call, int]:
    """Return a call as a leg makes it, whose messages are rendered already, and the bytes of its messages."""
    from runs.providers.openai import OpenAIProvider
    from runs.providers.port import ModelRequest

    provider = OpenAIProvider()
    rendered = [provider.render(message) for message in messages]

    def call() -> None:
        request = ModelRequest(
            model="bench",
            instructions="Answer shortly.",
            messages=list(rendered),
            tools=b"",
            tool_choice="auto",
            options={},
            timeout=timedelta(seconds=60),
            silence=timedelta(seconds=60),
        )
        for _ in provider.stream(request):
            pass

    return call, sum(map(len, rendered))


def theirs(messages: Sequence[dict[str, Any]]) -> Call:
    """Return the same call by the `openai` package: dictionaries in, objects out."""
    from openai import OpenAI

    client = OpenAI(max_retries=0)
    shown: list[Any] = [{"role": "system", "content": "Answer shortly."}, *map(_as_dict, messages)]

    def call() -> None:
        stream = client.chat.completions.create(
            model="bench", messages=list(shown), stream=True, stream_options={"include_usage": True}
        )
        for _ in stream:
            pass

    return call


def _as_dict(message: dict[str, Any]) -> dict[str, Any]:
    from runs.providers.openai import OpenAIProvider

    found: dict[str, Any] = json.loads(OpenAIProvider().render(message))
    return found


def rendering(messages: Sequence[dict[str, Any]]) -> Call:
    """Return what a leg does once, before its first call: it renders all that it was given."""
    from runs.providers.openai import OpenAIProvider

    provider = OpenAIProvider()

    def call() -> None:
        for message in messages:
            provider.render(message)

    return call


def cpu_ms(call: Call, times: int) -> float:
    """Return the CPU milliseconds of this process for one call, over so many."""
    before = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - before) * 1000 / times


def measure(rounds: int, console: Console) -> command.Figures:
    forms: dict[str, tuple[Call, int]] = {}
    sizes: dict[str, int] = {}
    for count in COUNTS:
        messages = conversation(count)
        call, size = ours(messages)
        sizes[str(count)] = size
        forms[f"longhaul {count}"] = (call, CALLS)
        forms[f"openai {count}"] = (theirs(messages), CALLS // 2)
        forms[f"render {count}"] = (rendering(messages), CALLS)
    most, few = COUNTS[-1], COUNTS[0]
    call, sizes["same bytes"] = ours(_of_bytes(few, sizes[str(most)]))
    forms["longhaul same bytes"] = (call, CALLS)
    samples: dict[str, list[float]] = {name: [] for name in forms}
    for call, times in forms.values():
        cpu_ms(call, max(1, times // 4))  # connected, imported, cached
    for number in range(1, rounds + 1):
        for name, (call, times) in forms.items():
            samples[name].append(cpu_ms(call, times))
        console.log(f"{number}: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in samples.items()))

    def middle(name: str) -> float:
        return round(median(samples[name]), 3)

    def ratio(one: str, other: str) -> float:
        return round(median(a / b for a, b in zip(samples[one], samples[other], strict=True)), 3)

    return {
        "benchmark": "provider",
        "n": rounds,
        "messages": {
            str(count): {
                "bytes": sizes[str(count)],
                "longhaul_cpu_ms": middle(f"longhaul {count}"),
                "openai_cpu_ms": middle(f"openai {count}"),
                "ratio": ratio(f"longhaul {count}", f"openai {count}"),
                "rendering_cpu_ms": middle(f"render {count}"),
            }
            for count in COUNTS
        },
        "growth_longhaul": ratio(f"longhaul {most}", f"longhaul {few}"),
        "growth_openai": ratio(f"openai {most}", f"openai {few}"),
        "same_bytes": {
            "messages": few,
            "bytes": sizes["same bytes"],
            "longhaul_cpu_ms": middle("longhaul same bytes"),
            "many_messages_to_few": ratio(f"longhaul {most}", "longhaul same bytes"),
        },
    }


def tables(found: command.Figures) -> list[Table]:
    table = Table(title=f"CPU ms of one model call, by the messages it shows; medians, n = {found['n']}")
    for heading in ("messages", "kB", "Longhaul", "openai objects", "ratio", "once a leg: rendering"):
        table.add_column(heading, justify="right")
    for count, each in found["messages"].items():
        table.add_row(
            count,
            f"{each['bytes'] / 1000:.1f}",
            f"{each['longhaul_cpu_ms']:.2f}",
            f"{each['openai_cpu_ms']:.2f}",
            f"{each['ratio']:.2f}",
            f"{each['rendering_cpu_ms']:.2f}",
        )
    same = found["same_bytes"]
    table.add_row(f"{same['messages']} long ones", f"{same['bytes'] / 1000:.1f}", f"{same['longhaul_cpu_ms']:.2f}")
    return [table]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.provider", description=__doc__)

    def measured(given: argparse.Namespace, console: Console) -> command.Figures:
        with Rig(SCRIPT):
            return measure(3 if given.quick else 15, console)

    return command.run(parser, measured, tables, arguments, quick="fewer repetitions: ends in under 55 s")


if __name__ == "__main__":
    sys.exit(main())
