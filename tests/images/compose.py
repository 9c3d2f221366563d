"""The compose file as an engine sees it once variables are put in and anchors are resolved."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agents_project.embedded import PROJECT

FILE = PROJECT / "docker-compose.yml"
EXAMPLE = PROJECT / ".env.example"
OURS = ("web", "agents", "tools", "control", "beat", "flower")  # the services that are lines of the Procfile

_VARIABLE = re.compile(r"\$\$|\$\{(?P<name>\w+)(?:(?P<kind>:[-?])(?P<rest>[^}]*))?\}")


class Refused(Exception):
    """Compose would not start: a required variable is not set, or is empty."""


def variables(text: str) -> dict[str, set[tuple[str, str]]]:
    """Return each variable of a text with the ways in which it stands there: ("", ""), (":-", default), (":?", message)."""
    found: dict[str, set[tuple[str, str]]] = {}
    for match in _VARIABLE.finditer(text):
        if match["name"]:
            found.setdefault(match["name"], set()).add((match["kind"] or "", match["rest"] or ""))
    return found


def _put_in(text: str, values: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if not match["name"]:
            return "$"
        given = values.get(match["name"], "")
        if not given and match["kind"] == ":?":
            raise Refused(f"{match['name']}: {match['rest']}")
        return given or (match["rest"] if match["kind"] == ":-" else "")

    return _VARIABLE.sub(value, text)


def _interpolated(node: Any, values: Mapping[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _interpolated(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [_interpolated(value, values) for value in node]
    return _put_in(node, values) if isinstance(node, str) else node


def read(values: Mapping[str, str]) -> dict[str, Any]:
    """Return the file with these variables put in. Raises Refused where a required one is missing."""
    read: dict[str, Any] = _interpolated(yaml.safe_load(FILE.read_text()), values)
    return read


def env_file(path: Path) -> dict[str, str]:
    """Read a file of `NAME=value` lines."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def seconds(duration: str) -> float:
    """Read a duration as compose writes it: 3m, 1m30s, 15s."""
    units = {"h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"(\d+)([hms])", duration)
    assert "".join(number + unit for number, unit in parts) == duration, duration
    return float(sum(int(number) * units[unit] for number, unit in parts))


@dataclass(frozen=True)
class Line:
    """A line of the Procfile, as the shell reads it in some environment."""

    words: list[str]
    environment: dict[str, str]  # what it sets itself, by `env NAME=value`


def procfile(environments: Mapping[str, Mapping[str, str]]) -> dict[str, Line]:
    """Return the lines of the Procfile, each read by a shell in the environment of the service of its name."""
    lines = {}
    for text in (PROJECT / "Procfile").read_text().splitlines():
        name, _, line = text.partition(": ")
        said = subprocess.run(
            ["/bin/sh", "-c", f"printf '%s\\n' {line.removeprefix('exec ')}"], env=dict(environments.get(name, {})),
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        words, own = said.stdout.splitlines(), {}
        if words[0] == "env":
            words.pop(0)
            while "=" in words[0]:
                variable, _, value = words.pop(0).partition("=")
                own[variable] = value
        lines[name] = Line(words, own)
    return lines


def command(service: Mapping[str, Any]) -> list[str]:
    given = service["command"]
    return shlex.split(given) if isinstance(given, str) else [str(word) for word in given]
