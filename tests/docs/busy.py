"""The tables of docs/busy.md, from tests/runs/busy.py. `python -m tests.docs.busy` writes them."""

from __future__ import annotations

from pathlib import Path

from tests.docs.written import exchanged, row
from tests.runs.busy import MODES, STANDS, cells

PAGE = Path(__file__).resolve().parents[2] / "docs" / "busy.md"
BEGIN, END = "<!-- written by `python -m tests.docs.busy`: begin -->\n", "<!-- written: end -->\n"


def tables() -> str:
    """Return what stands between the two marks of the page, as Markdown: a table a mode."""
    said = ""
    for mode in MODES:
        said += f"\n### {mode}\n\n" + row("the live run", "the thread after it", "the live run is", "the answer")
        said += row(*["---"] * 4)
        for cell in (each for each in cells() if each.mode == mode):
            stand = STANDS[cell.stand]
            thread = "<br>".join(f"`{word}`" for word in cell.transcript)
            answer = {"new": f"the new run, `{cell.new}`", "live": "the live run", "409": "409 `thread_busy`"}[
                cell.answer
            ]
            if cell.effects:
                answer += "; " + ", ".join(f"`{name}` {effect}" for name, effect in cell.effects.items())
            now = f"`{cell.live}`" + (f" (`{cell.stop_reason}`)" if cell.stop_reason else "")
            said += row(f"`{stand.status}`: {stand.says}", thread, now, answer)
    return said + "\n"


def written(page: str) -> str:
    """Return the page with its tables as the code says them."""
    return exchanged(page, BEGIN, END, tables())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
