"""Where a view is drawn: lines that fit, and the marks that the terminal knows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.text import Text

WIDTH = 80
_WIDEST = 120
_LOWEST = 16  # lines of a drawing, on however low a terminal
_MARKS = {
    "then": "→", "rule": "─", "done": "━", "to do": "─", "runs": "●", "waits": "○", "good": "✓", "bad": "✗",
}  # fmt: skip
_ASCII = {"then": ">", "rule": "-", "done": "#", "to do": ".", "runs": "*", "waits": ".", "good": "+", "bad": "!"}
_PLAIN = Console(file=io.StringIO(), width=WIDTH)  # to measure by


@dataclass(frozen=True)
class Canvas:
    """Where a view is drawn, in cells and lines, and the marks that its encoding knows."""

    width: int
    height: int
    marks: Mapping[str, str]

    @classmethod
    def of(cls, console: Console, options: ConsoleOptions | None = None) -> Canvas:
        width, ascii_only = (options or console.options).max_width, (options or console.options).ascii_only
        # A line is left free: a drawing as high as the terminal scrolls when it ends.
        return cls(min(width, _WIDEST), max(console.size.height - 1, _LOWEST), _ASCII if ascii_only else _MARKS)

    def line(self, left: Text, right: Text | None = None) -> Text:
        """Return one line that fits: `right` at its end, `left` cut where there is no room for all of it."""
        end = right.cell_len + 2 if right and right.plain else 0
        room = max(self.width - end, 8)
        if left.cell_len > room:
            left.truncate(room - 3)
            left.append("...")
        if not end or right is None:
            return left
        left.append(" " * (self.width - left.cell_len - right.cell_len)).append_text(right)
        left.truncate(self.width)
        return left

    def flow(self, label: str, items: Sequence[Text], between: Text) -> list[Text]:
        """Return the items in as many lines as they need, none broken; the later lines begin below the first item."""
        lines = [Text(label)]
        for number, item in enumerate(items):
            joined = Text() if number == 0 else between.copy()
            joined.append_text(item)
            if lines[-1].cell_len + joined.cell_len > self.width and number:
                lines.append(Text(" " * (len(label) - 1)))
            lines[-1].append_text(joined)
        for line in lines:
            line.truncate(self.width)
        return lines

    def wrapped(self, text: str) -> list[str]:
        """Return the text in lines of the width, broken between words; its own line breaks stay."""
        lines: list[str] = []
        for line in text.splitlines():
            lines += [piece.plain.rstrip() for piece in Text(line).wrap(_PLAIN, self.width)] or [""]
        return lines
