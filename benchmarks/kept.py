"""Figures of parts that are done, kept in a file: a benchmark of an hour that was cut goes on with the next part.

One line of JSON a part: its name, what it was asked, what it found.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.command import Figures


class Kept:
    """The parts in a file; without a file every part is measured."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._parts: dict[str, Figures] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    part = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line, cut with the benchmark that wrote it
                self._parts[part["part"]] = part["found"]

    def get(self, name: str, asked: dict[str, Any], measure: Callable[[], Figures]) -> Figures:
        """Return what was found before for the same question, or measure and keep it."""
        part = f"{name} {json.dumps(asked, sort_keys=True)}"
        if part not in self._parts:
            found = self._parts[part] = measure()
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write("\n" if self._cut() else "")
                    file.write(json.dumps({"part": part, "found": found}) + "\n")
        return self._parts[part]

    def has(self, name: str, asked: dict[str, Any]) -> bool:
        return f"{name} {json.dumps(asked, sort_keys=True)}" in self._parts

    def _cut(self) -> bool:
        """Whether the file ends within a line."""
        assert self._path is not None
        return self._path.exists() and self._path.stat().st_size > 0 and not self._path.read_bytes().endswith(b"\n")
