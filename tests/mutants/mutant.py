"""What a mutant is, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


class Stale(Exception):
    """The text that a mutant changes does not stand in its file exactly once: the code has moved on, the mutant has not."""


@dataclass(frozen=True)
class Change:
    """One edit: `old` stands exactly once in `file` (a path from the project's root) and becomes `new`."""

    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        """Return the text with the change made. Raises Stale."""
        if (count := text.count(self.old)) != 1:
            raise Stale(f"{self.file} has {count} places like {self.old.strip().splitlines()[0]!r}, not one")
        if self.old == self.new:
            raise Stale(f"{self.file}: a change that changes nothing")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Mutant:
    """A rule, the changes that remove it, and the tests that must fail then.

    tests: pytest node ids; one without parameters means that any of its cases fails. model: the break's name in the
    model of the protocol, where it is one of those.
    """

    name: str
    rule: str
    changes: Sequence[Change]
    tests: Sequence[str]
    model: str = ""

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(change.file for change in self.changes))

    def texts(self, root: Path) -> dict[str, str]:
        """Return the text of each file with all changes made, one after another. Raises Stale."""
        texts: dict[str, str] = {}
        for change in self.changes:
            before = texts.get(change.file)
            texts[change.file] = change.apply((root / change.file).read_text() if before is None else before)
        return texts


@dataclass(frozen=True)
class Exempt:
    """A rule whose removal alone breaks nothing, and why. `together`: the mutant that removes what holds it beside."""

    name: str
    rule: str
    reason: str
    together: str = ""
    model: str = ""


@dataclass(frozen=True)
class Later:
    """A rule whose code does not exist yet. `model`: the break's name in the model, or a word for the rule."""

    model: str
    rule: str
    feature: str


@dataclass(frozen=True)
class Group:
    """What stands under one heading in the docs."""

    title: str
    mutants: Sequence[Mutant]
    exempt: Sequence[Exempt] = field(default=())


def one(name: str, rule: str, file: str, old: str, new: str, *tests: str, model: str = "") -> Mutant:
    """Return the mutant of one change, the usual one."""
    return Mutant(name, rule, (Change(file, old, new),), tests, model)
