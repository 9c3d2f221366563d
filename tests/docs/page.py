"""A Markdown page as its tests see it: fenced blocks, what stands in comments before them, tables, links.

A comment right before a console block says what becomes of it; without one it is run:

    covered by PATH::TEST        a test runs it
    tried by PATH::TEST          a test takes it from the page and runs it; blocks of other kinds have it too
    covered by .ci/run           so does every change that goes in
    not run: REASON              nothing here can run it
    workers                      Celery workers, that run while the page's other commands do
    in the quickstart's project  run there
    in a shell                   run by one shell with all such blocks of the page, beside `make dev`

`<!-- test` opens Python that no reader sees: it runs between the page's blocks and looks at what they left.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

_BLOCK = re.compile(
    r"^(?:<!-- (?P<told>(?!test\n)[^\n]*) -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)^```$"
    r"|^<!-- test\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of a page. `line` is that of its first line of content; `told` what the comment before it says."""

    page: str
    line: int
    kind: str
    body: str
    told: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str:
        """The file that its first line names, or nothing: `# shop/agents.py`, or with `(add)` to append."""
        found = re.match(r"# ([\w./]+\.\w+)( \(add\))?\n", self.body)
        return found[1] if found else ""

    @property
    def adds(self) -> bool:
        return " (add)" in self.body.partition("\n")[0]

    @property
    def commands(self) -> list[tuple[str, str]]:
        """The commands of a console block, each with the output that is shown for it."""
        parts = re.split(r"^\$ (.+)\n", self.body, flags=re.MULTILINE)
        assert not parts[0], f"{self} begins with output"
        return list(zip(parts[1::2], parts[2::2], strict=True))


def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page in order; those that no reader sees have the kind `test`."""
    content = text(page)
    found = []
    for match in _BLOCK.finditer(content):
        hidden = match["hidden"] is not None
        name = "hidden" if hidden else "body"
        line = content.count("\n", 0, match.start(name)) + 1
        found.append(Block(page, line, "test" if hidden else match["kind"], match[name], match["told"] or ""))
    return found


def table(page: str, heading: str, number: int = 0) -> list[list[str]]:
    """Return the rows of a table below a heading, its own heading left out. Cells are stripped."""
    outside = re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)  # `# path` is no heading there
    section = re.split(rf"^#+ {re.escape(heading)}$", outside, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    lines = tables[number].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def code(cell: str) -> list[str]:
    """Return what stands in backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def shows(expected: str, output: str) -> bool:
    """Return whether the output is the one that is shown: `...` stands for anything, blanks at line ends for nothing."""
    plain = "\n".join(line.rstrip() for line in output.strip().splitlines())
    pattern = ".*".join(re.escape(part.strip("\n")) for part in expected.strip().split("..."))
    return re.fullmatch(rf"\s*{pattern}\s*", plain, flags=re.DOTALL) is not None


def words(command: str) -> list[str]:
    return shlex.split(command)
