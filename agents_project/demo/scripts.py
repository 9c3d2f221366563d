"""What the model server says. A script decides from the messages of the call alone: a killed leg asks again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from agents_project.demo import report
from agents_project.demo.model_server import Action, ModelCall, Reply, Script, Text, ToolCall

NUMBERS = re.compile(r"(-?\d+)\s*(?:-|to)\s*(-?\d+)")  # "the numbers 1-50"
PACE = re.compile(r"text_seconds=(\d+(?:\.\d+)?)")  # anywhere in the prompt: how long the text of a step takes
PIECES = 6  # chunks that the text of a step comes in
AUDIT = re.compile(r"\baudit\b.*?\bpackage\s+[`'\"]?([A-Za-z0-9_](?:[\w.-]*\w)?)", re.IGNORECASE | re.DOTALL)
AT_ONCE = 5  # calls of one step of an audit
AUDITED = 20  # parts of a package that an audit looks at


def sequential(total: int = 50, text_seconds: float = 0.15) -> Script:
    """Return a script that tests a tool with numbers one after another, then gives the total.

    "Test the test tool with the numbers 1-50, one after another, then give me the total": each step says a little, over
    `text_seconds`, and calls the first tool offered; the last step answers "The total is 1275." The sum is taken of the
    results that the tool messages hold, so that a wrong transcript gives a wrong total. A prompt without a range means
    1 to `total`; "text_seconds=0" in it sets another pace.
    """

    def script(call: ModelCall) -> Reply:
        prompt, results = _asked(call)
        numbers = NUMBERS.search(prompt)
        first, last = (int(numbers[1]), int(numbers[2])) if numbers else (1, total)
        pace = PACE.search(prompt)
        seconds = float(pace[1]) if pace else text_seconds
        number = first + len(results)
        if number > last or not call.tools:
            return [_spoken(f"The total is {_sum(results)}.", seconds)]
        spoken = _spoken(f"Testing {number} of {last}.", seconds)
        return [spoken, ToolCall(call.tools[0], {"number": number})]

    return script


def steps(count: int = 50) -> Script:
    """Return a script of `count` calls of the first tool, one a step, without a word; then "Done." For benchmarks."""

    def script(call: ModelCall) -> Reply:
        _, results = _asked(call)
        if len(results) >= count or not call.tools:
            return [Text("Done.")]
        return [ToolCall(call.tools[0], {"number": len(results) + 1})]

    return script


def parallel(count: int = 5) -> Script:
    """Return a script that calls the first tool `count` times in one step, then gives the total of the results."""

    def script(call: ModelCall) -> Reply:
        _, results = _asked(call)
        if results or not call.tools:
            return [Text(f"The total is {_sum(results)}.")]
        return [ToolCall(call.tools[0], {"number": number}) for number in range(1, count + 1)]

    return script


def echo(call: ModelCall) -> Reply:
    """Say what the user said."""
    prompt, _ = _asked(call)
    return [_spoken(prompt or "You said nothing.", 0.15)]


def audit(text_seconds: float = 0.5, report_seconds: float = 2.5) -> Script:
    """Return a script that audits the package of the prompt with the auditor's tools, then writes a report.

    It asks for the facts and the list of modules, then for about `AT_ONCE` calls a step, over the largest parts of the
    list. What it asks for next, and every number of the report, comes from the results that the messages hold.
    """

    def script(call: ModelCall) -> Reply:
        prompt, _ = _asked(call)
        named = AUDIT.search(prompt)
        package = named[1] if named else ""
        done = _exchanges(call)
        listed = report.result(done, "list_modules")
        facts = [("package_facts", {"package": package}), ("list_modules", {"package": package})]
        if not done and call.tools:
            said = f"I begin with what {package} is, and with its modules."
            return [_spoken(said, text_seconds), *(ToolCall(*each) for each in facts)]
        if listed is None:
            return [_spoken(report.refusal(package, done), text_seconds)]
        parts = [part["name"] for part in listed["parts"]["largest"][:AUDITED]]
        wanted = [(name, {"package": package}) for name in ("largest_functions", "imports")]
        wanted += [("undocumented", {"package": package, "module": part}) for part in parts]
        asked = [(name, arguments) for name, arguments, _ in done]
        left = [each for each in wanted if each not in asked]
        if left and call.tools:
            # The last step takes what one more would only be begun for.
            now = left if len(left) <= AT_ONCE + 2 else left[:AT_ONCE]
            said = report.looking([arguments["module"] for _, arguments in now if "module" in arguments], len(now))
            return [_spoken(said, text_seconds), *(ToolCall(*each) for each in now)]
        return [_spoken(report.write(package, done), report_seconds, pieces=50)]

    return script


def demo(call: ModelCall) -> Reply:
    """Audit a package, or test the tool with a range of numbers, as the prompt asks; echo everything else."""
    prompt, results = _asked(call)
    if AUDIT.search(prompt) and ("list_modules" in call.tools or results):
        return _demo_audit(call)
    if NUMBERS.search(prompt) and (call.tools or results):
        return _demo_job(call)
    return echo(call)


_demo_job = sequential()
_demo_audit = audit()


def saying(*actions: Action) -> Script:
    """Return a script that always gives this reply."""
    return lambda call: actions


def failing(times: int, reply: Sequence[Action], then: Script) -> Script:
    """Return a script that gives `reply` to the server's first `times` calls, then goes on with another script."""
    return lambda call: reply if call.number <= times else then(call)


def faulty(replies: Mapping[int, Sequence[Action]], otherwise: Script) -> Script:
    """Return a script that gives these replies to the server's calls of these numbers (from 1)."""
    return lambda call: replies[call.number] if call.number in replies else otherwise(call)


def _asked(call: ModelCall) -> tuple[str, list[Any]]:
    """Return the last text of the user, and what the tools have answered since."""
    results: list[Any] = []
    for message in reversed(call.messages):
        if message["role"] == "user":
            return _text(message.get("content")), results[::-1]
        if message["role"] == "tool":
            results.append(_value(_text(message.get("content"))))
    return "", results[::-1]


def _exchanges(call: ModelCall) -> list[tuple[str, dict[str, Any], Any]]:
    """Return the calls since the user's last message, in their order: name, arguments, result."""
    asked: dict[str, tuple[str, dict[str, Any]]] = {}
    done: list[tuple[str, dict[str, Any], Any]] = []
    for message in call.messages:
        if message["role"] == "user":
            asked, done = {}, []
        for each in message.get("tool_calls") or []:
            arguments = _value(each["function"]["arguments"])
            asked[each["id"]] = (each["function"]["name"], arguments if isinstance(arguments, dict) else {})
        if message["role"] == "tool" and message["tool_call_id"] in asked:
            done.append((*asked[message["tool_call_id"]], _value(_text(message.get("content")))))
    return done


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _sum(results: Sequence[Any]) -> int | float:
    """Return the sum of the numbers among the results; of an object, its `value` or `result`."""
    total: int | float = 0
    for result in results:
        if isinstance(result, dict):
            result = result.get("value", result.get("result"))
        if isinstance(result, int | float) and not isinstance(result, bool):
            total += result
    return total


def _spoken(text: str, seconds: float, pieces: int = PIECES) -> Text:
    """Return the text in several chunks that take `seconds` in all; in one chunk when they take none."""
    if not seconds:
        return Text(text)
    size = max(2, -(-len(text) // pieces))
    return Text(text, chunk_chars=size, delay=seconds / max(1, -(-len(text) // size) - 1))
