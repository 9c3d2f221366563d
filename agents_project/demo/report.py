"""What the scripted model says of an audit. Every number is taken from the tools' results in the messages.

An exchange is (tool name, arguments, result). A result that is no object is what a tool said when it could not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Exchange = tuple[str, dict[str, Any], Any]

ROWS = 10  # of the table of parts
LARGEST = 5
UNDECLARED = 12


def result(done: Sequence[Exchange], name: str) -> dict[str, Any] | None:
    """Return the last result of this tool, None when it gave none."""
    found = [each for tool, _, each in done if tool == name and isinstance(each, dict) and "error" not in each]
    return found[-1] if found else None


def looking(parts: Sequence[str], calls: int) -> str:
    """Return what is said before a step's calls."""
    if len(parts) < calls:
        return f"Now the largest functions, the imports, and {_many(len(parts), 'part')}: {calls} calls at once."
    return f"Next {', '.join(parts[:2])}{' and more' if len(parts) > 2 else ''}: {calls} calls at once."


def refusal(package: str, done: Sequence[Exchange]) -> str:
    """Return what is said when there is nothing to audit."""
    reasons = [_reason(each) for tool, _, each in done if tool == "list_modules"]
    return f"I cannot audit {package}. {reasons[-1] if reasons else 'There were no results.'}"


def _reason(result: Any) -> str:
    if isinstance(result, dict):
        result = result.get("error", result)
    if isinstance(result, dict):
        result = result.get("message", result)
    return str(result)


def write(package: str, done: Sequence[Exchange]) -> str:
    """Return the report, in Markdown."""
    facts = result(done, "package_facts") or {}
    listed = result(done, "list_modules") or {}
    looked = [each for tool, _, each in done if tool == "undocumented" and isinstance(each, dict) and "public" in each]
    functions, imports = result(done, "largest_functions") or {}, result(done, "imports") or {}
    todo: list[str] = []
    sections = [
        _opening(package, facts, listed),
        _names(looked, listed, todo),
        _functions(functions, todo),
        _imports(imports, facts, todo),
    ]
    if todo:
        sections.append(["## First things to do", "", *(f"{n}. {each}" for n, each in enumerate(todo, 1))])
    return "\n".join(line for section in sections if section for line in [*section, ""]).rstrip()


def _opening(package: str, facts: dict[str, Any], listed: dict[str, Any]) -> list[str]:
    name, version = facts.get("name", package), facts.get("version", "")
    required = facts.get("requirements", {}).get("count", 0)
    extras = facts.get("requirements_of_extras", {}).get("count", 0)
    size = (
        f"{_many(listed.get('modules', 0), 'module')} in {_many(listed.get('parts', {}).get('count', 0), 'part')},"
        f" {_many(listed.get('lines', 0), 'line')} of Python."
    )
    needs = f"It requires {_many(required, 'package')}" + (f"; its extras require {extras:,} more." if extras else ".")
    summary, license = facts.get("summary", ""), facts.get("license", "")
    about = [f"{summary.rstrip('.')}."] if summary else []
    about += [f"License: {license}."] if license else []
    return [f"# Audit of {name} {version}".rstrip(), "", *about, size, needs]


def _names(looked: Sequence[dict[str, Any]], listed: dict[str, Any], todo: list[str]) -> list[str]:
    public, bare = sum(each["public"] for each in looked), sum(each["undocumented"] for each in looked)
    lines = ["## Public names without docstrings", ""]
    lines.append(f"{bare:,} of {public:,} public names have none ({_share(bare, public)}).")
    ranked = sorted((each for each in looked if each["undocumented"]), key=lambda each: -each["undocumented"])
    if ranked:
        lines += ["", "| part | modules | public | without | share |", "|---|--:|--:|--:|--:|"]
        lines += [
            f"| `{each['module']}` | {each['modules']:,} | {each['public']:,} | {each['undocumented']:,}"
            f" | {_share(each['undocumented'], each['public'])} |"
            for each in ranked[:ROWS]
        ]
        worst = ranked[0]
        examples = worst.get("examples") or []
        todo.append(
            f"Document `{worst['module']}`: {worst['undocumented']:,} of its {_many(worst['public'], 'public name')}"
            f" say nothing" + (f", `{_last(examples[0])}` among them." if examples else ".")
        )
    total = listed.get("parts", {}).get("count", 0)
    seen = {each["module"] for each in looked}
    in_sight = sum(part["lines"] for part in listed.get("parts", {}).get("largest", []) if part["name"] in seen)
    if len(looked) < total:
        share = _share(in_sight, listed.get("lines", 0))
        lines += ["", f"Looked at: the {len(looked)} largest of {total:,} parts, {share} of the lines."]
    unread = sum(each.get("unread", {}).get("count", 0) for each in looked)
    if unread:
        lines += ["", f"{_many(unread, 'file')} could not be parsed."]
    return lines


def _functions(found: dict[str, Any], todo: list[str]) -> list[str]:
    largest = found.get("largest") or []
    if not largest:
        return []
    lines = ["## Largest functions", ""]
    lines.append(
        f"{_many(found['functions'], 'function')}; half have at most {_many(found['median_lines'], 'line')},"
        f" {found['over_50_lines']:,} {'has' if found['over_50_lines'] == 1 else 'have'} more than 50."
    )
    lines += ["", "| lines | function | where |", "|--:|---|---|"]
    lines += [f"| {each['lines']:,} | `{_last(each['name'])}` | {each['at']} |" for each in largest[:LARGEST]]
    first = largest[0]
    if first["lines"] > 50:
        todo.append(f"Split `{_last(first['name'])}` ({first['at']}): it has {first['lines']:,} lines.")
    return lines


def _imports(found: dict[str, Any], facts: dict[str, Any], todo: list[str]) -> list[str]:
    if not found:
        return []
    others = found["others"]["listed"]
    lines = ["## Imports", ""]
    lines.append(
        f"{_many(found['standard_library']['count'], 'module')} of the standard library,"
        f" {found['others']['count']:,} of other packages."
    )
    required = [each["name"] for each in others if each["declared"] == "required"]
    if required:
        lines.append(f"Required: {', '.join(required[:UNDECLARED])}.")
    bare = [each for each in others if each["declared"] == "no" and each["unguarded"]]
    if bare:
        lines.append(
            f"Imported at once, not among the requirements: {', '.join(each['name'] for each in bare[:UNDECLARED])}."
        )
        if facts.get("requirements", {}).get("count") or facts.get("requirements_of_extras", {}).get("count"):
            first = bare[0]
            todo.append(
                f"Declare `{first['name']}`, or guard its import: {_many(first['unguarded'], 'module')} import it at once,"
                " and no requirement names it."
            )
    return lines


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "none"


def _last(name: str) -> str:
    """Return the last two names of a dotted one: `Celery.send_task`."""
    return ".".join(name.split(".")[-2:])
