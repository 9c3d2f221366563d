"""The tables of docs/durability.md, from the list."""

from __future__ import annotations

from tests.docs.written import row
from tests.mutants.catalogue import GROUPS, LATER
from tests.mutants.mutant import Mutant

BEGIN, END = "<!-- mutants: begin -->\n", "<!-- mutants: end -->\n"


def _tests(mutant: Mutant) -> str:
    return "<br>".join(f"`{test.removeprefix('tests/')}`" for test in mutant.tests)


def tables() -> str:
    """Return what stands between the two marks of the page, as Markdown."""
    said = ""
    for group in GROUPS:
        said += f"\n### {group.title}\n\n"
        said += row("rule", "mutant", "removed in", "what fails") + row(*["---"] * 4)
        for mutant in group.mutants:
            name = f"`{mutant.name}`"
            if mutant.model and mutant.model != mutant.name:
                name += f" (model: `{mutant.model}`)"
            said += row(mutant.rule, name, ", ".join(f"`{file}`" for file in mutant.files), _tests(mutant))
    exempt = [each for group in GROUPS for each in group.exempt]
    said += "\n### Exempt\n\nTaken away alone, each of these breaks nothing, for another layer holds the same.\n\n"
    said += row("rule", "name", "why", "both away") + row("---", "---", "---", "---")
    for each in exempt:
        said += row(each.rule, f"`{each.name}`", each.reason, f"`{each.together}`" if each.together else "")
    said += "\n### Later, with their feature\n\nRules, and breaks of the model, that touch what is not there yet.\n\n"
    said += row("break", "rule", "feature") + row("---", "---", "---")
    for later in LATER:
        said += row(f"`{later.model}`", later.rule, later.feature)
    return said + "\n"
