"""The tools of the auditor: they read the source of an installed package, and change nothing.

Each result is small, however large the package: lists are cut, and say of how many. Reading twice gives the same, so the
tools are idempotent: a call whose worker died runs again at once.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from typing import Annotated, Any

from pydantic import Field

from agents_project.demo import source
from agents_project.demo.source import NotFound, Package, SourceFile
from tools import ModelRetry, tool

PARTS = 40  # of a package that are listed
EXAMPLES = 6
REQUIREMENTS = 25
OTHERS = 25  # third-party imports that are listed
OWN = 40  # modules of the standard library that are listed

Name = Annotated[str, Field(description="the package's name, as pip or an import statement has it", max_length=200)]
Where = Annotated[
    str,
    Field(
        description=(
            "the part to look at: a module's dotted name, which means all below it too, as list_modules gives it;"
            " empty for the whole package"
        ),
        max_length=400,
    ),
]


@tool(idempotent=True, timeout_seconds=60)
def package_facts(package: Name) -> dict[str, Any]:
    """Say what an installed package is: version, summary, license, size, requirements."""
    found = _find(package)
    always, extras = source.requirements(found)
    return {
        "name": found.name,
        "version": found.version,
        "summary": found.summary[:200],
        "license": found.license[:100],
        "python": found.python,
        "imported_as": list(found.roots[:10]),
        "modules": len(found.files),
        "lines": source.length(found.files),
        "requirements": {"count": len(always), "names": always[:REQUIREMENTS]},
        "requirements_of_extras": {"count": len(extras), "names": extras[:REQUIREMENTS]},
    }


@tool(idempotent=True, timeout_seconds=60)
def list_modules(package: Name) -> dict[str, Any]:
    """List the parts of a package, subpackages and modules, the largest first, with their number of modules and lines."""
    found = _find(package)
    parts = [
        {"name": part.name, "modules": len(part.files), "lines": source.length(part.files)}
        for part in source.parts(found)
    ]
    parts.sort(key=lambda part: (-int(str(part["lines"])), str(part["name"])))
    return {
        "package": found.name,
        "modules": len(found.files),
        "lines": sum(int(str(part["lines"])) for part in parts),
        "parts": {"count": len(parts), "largest": parts[:PARTS]},
    }


@tool(idempotent=True, timeout_seconds=120)
def undocumented(package: Name, module: Where = "") -> dict[str, Any]:
    """Count the public names that have no docstring in a part of a package, with a few examples.

    Public is what `__all__` lists, or where there is none what has no leading underscore; methods of public classes
    too. Overloads, overrides and setters do not count.
    """
    found = _find(package)
    files = _within(found, module)
    outlines = [source.outline(each) for each in files]
    names = [name for outline in outlines for name in outline.public]
    bare = [name for name in names if not name.documented]
    # Examples of what a reader meets first: a class before its methods.
    first = sorted(bare, key=lambda name: (("module", "class", "function", "method").index(name.kind), name.name))
    return {
        "module": module or found.name,
        "modules": len(files),
        "public": len(names),
        "undocumented": len(bare),
        "by_kind": dict(sorted(Counter(name.kind for name in bare).items())),
        "examples": [name.name for name in first if name.kind != "module"][:EXAMPLES],
        **_unread(files, outlines),
    }


@tool(idempotent=True, timeout_seconds=120)
def largest_functions(
    package: Name,
    module: Where = "",
    count: Annotated[int, Field(description="how many to list", ge=1, le=20)] = 6,
) -> dict[str, Any]:
    """List the functions and methods with the most lines, and where they stand."""
    found = _find(package)
    files = _within(found, module)
    outlines = [source.outline(each) for each in files]
    functions = [
        (function, file) for file, outline in zip(files, outlines, strict=True) for function in outline.functions
    ]
    functions.sort(key=lambda pair: (-pair[0].lines, pair[1].module, pair[0].line))
    return {
        "module": module or found.name,
        "functions": len(functions),
        "median_lines": statistics.median_low([each.lines for each, _ in functions]) if functions else 0,
        "over_50_lines": sum(each.lines > 50 for each, _ in functions),
        "largest": [
            {"name": f"{file.module}.{each.name}", "lines": each.lines, "at": f"{file.shown}:{each.line}"}
            for each, file in functions[:count]
        ],
        **_unread(files, outlines),
    }


@tool(idempotent=True, timeout_seconds=120)
def imports(package: Name, module: Where = "") -> dict[str, Any]:
    """List what a package imports: modules of the standard library, and of others, with how these are declared.

    `declared` of another's module is required, extra (only an extra requires it) or no. `modules` is how many import it,
    `unguarded` how many of them do so at once: not within a function, a condition or a `try`.
    """
    found = _find(package)
    files = _within(found, module)
    outlines = [source.outline(each) for each in files]
    using: Counter[str] = Counter()
    bare: Counter[str] = Counter()
    for outline in outlines:
        using.update({each.name for each in outline.imports})
        bare.update({each.name for each in outline.imports if not each.guarded})
    standard = sorted(name for name in using if name in sys.stdlib_module_names)
    others = sorted(name for name in using if name not in sys.stdlib_module_names and name not in found.roots)
    always, extras = source.requirements(found)
    owners = source.importers()
    listed = []
    for name in others:
        known = {source.normal(each) for each in [*owners.get(name, []), name]}
        declared = "required" if known & set(always) else "extra" if known & set(extras) else "no"
        listed.append({"name": name, "declared": declared, "modules": using[name], "unguarded": bare[name]})
    # In front what a reader should know of: imported at once, and declared nowhere.
    listed.sort(key=lambda each: (each["declared"] != "no" or not each["unguarded"], -using[str(each["name"])]))
    return {
        "module": module or found.name,
        "standard_library": {"count": len(standard), "names": standard[:OWN]},
        "others": {"count": len(listed), "listed": listed[:OTHERS]},
        **_unread(files, outlines),
    }


TOOLS = (package_facts, list_modules, undocumented, largest_functions, imports)


def _find(name: str) -> Package:
    try:
        return source.find(name)
    except NotFound as error:
        raise ModelRetry(str(error)) from error


def _within(package: Package, module: str) -> list[SourceFile]:
    files = source.within(package, module.strip())
    if not files:
        close = source.close_modules(package, module)
        hint = f"; there are {', '.join(close)}" if close else "; list_modules says which there are"
        raise ModelRetry(f"{package.name} has no module {module!r}{hint}.")
    return files


def _unread(files: list[SourceFile], outlines: list[source.Outline]) -> dict[str, Any]:
    broken = [file.shown for file, outline in zip(files, outlines, strict=True) if outline.broken]
    return {"unread": {"count": len(broken), "files": broken[:EXAMPLES]}} if broken else {}
