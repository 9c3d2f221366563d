"""Tables that code writes into a page, between two marks."""

from __future__ import annotations


def row(*cells: str) -> str:
    """Return one line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def exchanged(page: str, begin: str, end: str, said: str) -> str:
    """Return the page with this between its marks."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + said + end + after
