"""The table of docs/tools.md, from tests/tools/table.py. `python -m tests.docs.tools` writes it."""

from __future__ import annotations

from pathlib import Path

from tests.docs.written import exchanged, row
from tests.tools.table import EVENTS, KINDS, RULES, STATUSES, Rule

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tools.md"
BEGIN, END = "<!-- written by `python -m tests.docs.tools`: begin -->\n", "<!-- written: end -->\n"


def _short(status: str, rule: Rule) -> str:
    """What a rule does, in a word or two."""
    if rule.to == status == "settled":
        return "-"
    if rule.to:
        return f"{rule.outcome} ({rule.code})" if rule.code and rule.outcome != "cancelled" else rule.outcome or rule.to
    return {"not_awaited": "409", "already_settled": "409"}.get(rule.answer, rule.answer or "-")


def overview() -> str:
    """Every event in every status, in a word each."""
    said = row("", *(status.replace("_", " ") for status in STATUSES)) + row(*["---"] * (len(STATUSES) + 1))
    for event, rules in RULES.items():
        cells = []
        for status in STATUSES:
            found = dict.fromkeys(_short(status, rule) for statuses, rule in rules if status in statuses)
            cells.append(", ".join(found))
        said += row(event, *cells)
    return said


def becomes(rule: Rule) -> str:
    if rule.to == "deleted":
        return "deleted"
    if not rule.to:
        return {"not_awaited": "409", "already_settled": "409"}.get(rule.answer, rule.answer)
    told = rule.outcome + (f", `{rule.code}`" if rule.code else "")
    return f"`{rule.to}`" + (f" ({told})" if told else "")


def writes(rule: Rule) -> str:
    """The events of the call, and how its attempt is closed."""
    told = ", ".join(f"`{event}`" for event in rule.events)
    return told + (f"; attempt `{rule.attempt}`" if rule.attempt else "")


def tables() -> str:
    """Return what stands between the two marks of the page, as Markdown."""
    said = "\n" + overview()
    for event, rules in RULES.items():
        said += f"\n### {event.capitalize()}: {EVENTS[event]}\n\n"
        said += row("status", "where", "what happens", "becomes", "writes") + row(*["---"] * 5)
        for statuses, rule in rules:
            where = ", ".join(KINDS[kind] for kind in rule.kinds) if rule.only else ""
            where = "; ".join(filter(None, (where, rule.case)))
            named = ", ".join(f"`{status}`" for status in statuses)
            said += row(named, where, rule.says, becomes(rule), writes(rule))
    return said + "\n"


def written(page: str) -> str:
    """Return the page with its tables as the code says them."""
    return exchanged(page, BEGIN, END, tables())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
