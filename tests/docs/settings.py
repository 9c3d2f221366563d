"""The tables of docs/settings.md, from `runs.conf` and `runs.checks`. `python -m tests.docs.settings` writes them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from runs import checks
from runs.conf import GROUPS, KEYS, Key
from tests.docs.written import exchanged, row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
BEGIN, END = "<!-- written by `python -m tests.docs.settings`: begin -->\n", "<!-- written: end -->\n"
FOR_ALL = {"E001", "E002", "E003"}  # a key that does not exist, a wrong value, no dict: they look at every key

_ID = re.compile(r"longhaul\.([EWI]\d{3})")


def value(key: Key) -> str:
    """Say what a value must be: `a number of seconds, at least 0.1`."""
    if key.form:
        return key.form[1] + (" or None" if key.nullable else "")
    return key.expected + (f", at least {key.least:g}" if key.least is not None else "")


def _ids(node: ast.AST) -> set[str]:
    texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return {id for text in texts for id in _ID.findall(text)}


def _keys(node: ast.AST) -> set[str]:
    """Return the keys that the texts of a piece of code name."""
    texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return {word for text in texts for word in re.findall(r"\w+", text) if word in KEYS}


def named_by(source: str) -> Iterator[tuple[str, str]]:
    """Yield which check names which key, as (id, key).

    A check that has one id names what stands anywhere in its function; of one that has several, only what stands in the
    message or the hint of one finding belongs to that one's id.
    """
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or not (ids := _ids(function) - FOR_ALL):
            continue
        # What a finding is made of, or the whole of a function with one id; its docstring is no part of it.
        places = [function] if len(ids) == 1 else [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        for place in places:
            mine = _ids(place)
            if len(mine) == 1:
                yield from ((id, key) for id in mine for key in _keys(place))


def findings() -> list[tuple[str, str]]:
    """Return the checks, as (id, what it finds), from the two columns of the module's docstring."""
    docstring = inspect.getdoc(checks) or ""
    found = re.findall(r"([EWI]\d{3})  +(.+?)(?=\s{2,}[EWI]\d{3} |\n|$)", docstring)
    return sorted((id, text.strip()) for id, text in found)


def tables() -> str:
    """Return what stands between the two marks of the page, as Markdown."""
    naming: dict[str, set[str]] = {}
    for id, name in named_by(inspect.getsource(checks)):
        naming.setdefault(name, set()).add(id)
    said = ""
    for group, keys in GROUPS.items():
        said += f"\n### {group}\n\n" + row("key", "default", "meaning", "value", "checks") + row(*["---"] * 5)
        for name, key in keys.items():
            ids = ", ".join(sorted(naming.get(name, ())))
            said += row(f"`{name}`", f"`{key.default}`", key.meaning, value(key), ids)
    said += "\n### What the checks find\n\n" + row("id", "what it finds") + row("---", "---")
    return said + "".join(row(f"`longhaul.{id}`", text) for id, text in findings()) + "\n"


def written(page: str) -> str:
    """Return the page with its tables as the code says them."""
    return exchanged(page, BEGIN, END, tables())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
