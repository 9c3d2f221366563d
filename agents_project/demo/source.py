"""The source of an installed package, read as text: nothing of it is imported or run.

    package = find("celery")                 # by the name of its distribution, or by a name that one imports
    [part.name for part in parts(package)]   # its modules, in parts of a size to look at
    outline(package.files[0])                # what stands in one file

Found by the metadata of the environment; parsed with `ast`. What cannot be parsed is counted, and told by its file.
"""

from __future__ import annotations

import ast
import importlib.machinery
import platform
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path, PurePosixPath

LARGEST_FILE = 4 * 1024 * 1024  # bytes; larger ones are tables that a program wrote
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")
_SUGGESTED = 3


class NotFound(Exception):
    """There is no such package in this environment; the text says so, with names that come close."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the package. `module` is its dotted name, that of the folder for an `__init__.py`."""

    module: str
    path: Path
    shown: str  # its path from the folder that packages are installed into

    @property
    def initial(self) -> bool:
        return self.path.name == "__init__.py"


@dataclass(frozen=True)
class Package:
    """What is installed under one name. `version` is that of the distribution; Python's own, for a part of it."""

    name: str
    version: str
    summary: str
    license: str
    python: str  # the versions of Python that it asks for
    requires: tuple[str, ...]  # as its metadata has them
    files: tuple[SourceFile, ...]  # sorted by module
    roots: tuple[str, ...]  # the names that one imports


@dataclass(frozen=True, slots=True)
class Named:
    """A public name. `kind` is module, class, function or method."""

    name: str
    kind: str
    documented: bool


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    line: int
    lines: int


@dataclass(frozen=True, slots=True)
class Import:
    """`name` is the top-level name; `guarded`: in a function, or under a condition or a `try`."""

    name: str
    guarded: bool


@dataclass(frozen=True, slots=True)
class Outline:
    """What stands in a file. `broken` says why it could not be parsed; then only `lines` counts."""

    lines: int
    public: tuple[Named, ...] = ()
    functions: tuple[Function, ...] = ()
    imports: tuple[Import, ...] = ()
    broken: str = ""


@dataclass(frozen=True)
class Part:
    """Some modules of a package that are looked at together: a subpackage, or one module.

    `name` is what `within` takes: a dotted name with all below it, or, ending in `.__init__`, that one file.
    """

    name: str
    files: tuple[SourceFile, ...] = field(repr=False)


# --- finding ---------------------------------------------------------------------------------------------------------


def find(name: str) -> Package:
    """Return the package of this name: a distribution's, or one that is imported. Raises NotFound."""
    name = name.strip()
    if not name:
        raise NotFound("No package is named.")
    distribution = _distribution(name)
    if distribution is None:
        owners = sorted(set(importers().get(name, [])))
        if len(owners) > 1:
            raise NotFound(f"{name} belongs to several packages: name one of {', '.join(owners)}.")
        distribution = _distribution(owners[0]) if owners else None
    package = _of_distribution(distribution) if distribution is not None else _of_path(name)
    if package is None and distribution is not None:  # an editable install: its files stand elsewhere
        package = _of_path(name.replace("-", "_"))
        if package is None:
            raise NotFound(f"{distribution.name} is installed, but has no Python source there that could be read.")
    if package is None:
        raise NotFound(_unknown(name))
    return package


@cache  # it reads the metadata of everything that is installed
def importers() -> Mapping[str, Sequence[str]]:
    """Return for each name that can be imported the distributions that bring it."""
    # What is left of one that was half removed has no name.
    return {name: [each for each in owners if each] for name, owners in metadata.packages_distributions().items()}


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        return None


def _of_distribution(distribution: metadata.Distribution) -> Package | None:
    files = [
        SourceFile(module, Path(str(path.locate())), str(path))
        for path in distribution.files or []
        if (module := _module(path)) is not None
    ]
    files = [each for each in files if each.path.is_file()]
    if not files:
        return None

    def said(key: str) -> list[str]:
        return [str(line).strip() for line in distribution.metadata.get_all(key) or []]

    license = next(iter([*said("License-Expression"), *said("License")]), "")
    if not license or "\n" in license:  # some put the whole text there
        license = ", ".join(line.rpartition(" :: ")[2] for line in said("Classifier") if line.startswith("License"))
    return Package(
        name=distribution.name,
        version=distribution.version,
        summary=next(iter(said("Summary")), ""),
        license=license,
        python=next(iter(said("Requires-Python")), ""),
        requires=tuple(distribution.requires or ()),
        files=tuple(sorted(files, key=lambda each: each.module)),
        roots=tuple(sorted({each.module.partition(".")[0] for each in files})),
    )


def _of_path(name: str) -> Package | None:
    """Return a package that is no distribution's: of Python itself, or on the path. Its own code is not run."""
    if not name.isidentifier():
        return None
    spec = importlib.machinery.PathFinder.find_spec(name)
    if spec is None:
        return None
    files: list[SourceFile] = []
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            shown = PurePosixPath(name, *path.relative_to(folder).parts)
            if (module := _module(shown)) is not None:
                files.append(SourceFile(module, path, str(shown)))
    if not folders and spec.origin is not None and spec.origin.endswith(".py"):
        files.append(SourceFile(name, Path(spec.origin), f"{name}.py"))
    if not files:
        return None
    own = name in sys.stdlib_module_names
    return Package(
        name=name,
        version=platform.python_version() if own else "",
        summary="A part of Python's standard library." if own else "",
        license="",
        python="",
        requires=(),
        files=tuple(sorted(files, key=lambda each: each.module)),
        roots=(name,),
    )


def _module(path: PurePosixPath) -> str | None:
    """Return the dotted name of a file by its path, None for what nobody imports: an editable install brings a finder."""
    if path.suffix != ".py" or path.name.startswith("__editable__"):
        return None
    names = [*path.parts[:-1], path.stem]
    if not all(name.isidentifier() for name in names):
        return None
    return ".".join(names[:-1] if names[-1] == "__init__" and len(names) > 1 else names)


def _unknown(name: str) -> str:
    if name in sys.builtin_module_names:
        return f"{name} is built into Python: there is no source of it to read."
    known: dict[str, str] = {}
    for each in importers():
        known.setdefault(each.lower(), each)
    for distribution in metadata.distributions():
        if distribution.name:
            known[distribution.name.lower()] = distribution.name
    said = f"The package {name!r} is not installed here"
    whole = known.get(name.partition(".")[0].lower())
    if whole is not None and "." in name:
        return f"{said}: name a whole package, as {whole} is."
    close = get_close_matches(name.lower(), known, n=_SUGGESTED, cutoff=0.6)
    if not close:
        return f"{said}. Those that are: {sys.executable} -m pip list."
    return f"{said}. Did you mean {' or '.join(dict.fromkeys(known[each] for each in close))}?"


# --- parts -----------------------------------------------------------------------------------------------------------


def parts(package: Package) -> list[Part]:
    """Return the package's parts: what stands right below the deepest name that all of it shares."""
    return _below("", package.files)


def _below(prefix: str, files: Sequence[SourceFile]) -> list[Part]:
    groups: dict[str, list[SourceFile]] = {}
    for each in files:
        rest = each.module.removeprefix(prefix).lstrip(".") if prefix else each.module
        head = rest.partition(".")[0]
        name = f"{prefix}.{head}".strip(".") if head else f"{prefix}.__init__"
        groups.setdefault(name, []).append(each)
    if len(groups) == 1:
        (name,) = groups
        if len(groups[name]) > 1:
            return _below(name, groups[name])
    return [Part(name, tuple(group)) for name, group in groups.items()]


def within(package: Package, module: str) -> list[SourceFile]:
    """Return the files of a module, with all below it; of the whole package for "". Empty when there is none."""
    if not module:
        return list(package.files)
    if module.endswith(".__init__"):
        return [each for each in package.files if each.initial and each.module == module.removesuffix(".__init__")]
    return [each for each in package.files if each.module == module or each.module.startswith(f"{module}.")]


def close_modules(package: Package, module: str) -> list[str]:
    """Return names of the package's modules that come close to this one."""
    return get_close_matches(module, {each.module for each in package.files}, n=_SUGGESTED, cutoff=0.5)


def length(files: Iterable[SourceFile]) -> int:
    """Return the number of lines of these files."""
    return sum(each.path.read_bytes().count(b"\n") for each in files)


# --- one file --------------------------------------------------------------------------------------------------------


def outline(file: SourceFile) -> Outline:
    """Return what stands in the file."""
    about = file.path.stat()
    return _outline(file, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=4096)  # several tools look at the same files
def _outline(file: SourceFile, changed: int, size: int) -> Outline:
    data = file.path.read_bytes()
    lines = data.count(b"\n")
    if size > LARGEST_FILE:
        return Outline(lines, broken="too large")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the code that is read
            tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Outline(lines, broken=f"{type(error).__name__}: {error}")
    return Outline(lines, tuple(_public(file.module, tree)), tuple(_functions(tree)), tuple(_imports(tree)))


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _public(module: str, tree: ast.Module) -> Iterator[Named]:
    """Yield what users see: names of `__all__` where there is one, else without a leading underscore; methods too."""
    if not module.rpartition(".")[2].startswith("_"):
        yield Named(module, "module", ast.get_docstring(tree) is not None or not tree.body)
    listed = _listed(tree)
    for node in _definitions(tree.body):
        if node.name in listed if listed is not None else not node.name.startswith("_"):
            yield from _named(module, node, "function")


def _named(prefix: str, node: _Definition, kind: str) -> Iterator[Named]:
    name = f"{prefix}.{node.name}"
    documented = ast.get_docstring(node) is not None
    if not isinstance(node, ast.ClassDef):
        yield Named(name, kind, documented)
        return
    yield Named(name, "class", documented)
    for inner in _definitions(node.body):
        if not inner.name.startswith("_"):
            yield from _named(name, inner, "method")


def _definitions(body: Sequence[ast.stmt]) -> Iterator[_Definition]:
    """Yield the definitions of a body, those under `if` and `try` too, each name once.

    Left out is what has its words elsewhere: overloads, overrides, setters and deleters of a property.
    """
    seen: set[str] = set()
    waiting = list(body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.If | ast.Try):
            inner = [*node.body, *node.orelse]
            if isinstance(node, ast.Try):
                inner += [*(each for handler in node.handlers for each in handler.body), *node.finalbody]
            waiting[:0] = inner
        elif isinstance(node, _Definition) and node.name not in seen:
            marks = {_last_name(each) for each in node.decorator_list}
            if not marks & {"overload", "override", "setter", "deleter"}:
                seen.add(node.name)
                yield node


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _listed(tree: ast.Module) -> set[str] | None:
    """Return the names of a literal `__all__`; None without one."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        names = {target.id for target in targets if isinstance(target, ast.Name)}
        if "__all__" in names and isinstance(node.value, ast.List | ast.Tuple):
            texts = [each.value for each in node.value.elts if isinstance(each, ast.Constant)]
            return {each for each in texts if isinstance(each, str)}
    return None


def _functions(tree: ast.Module) -> Iterator[Function]:
    """Yield every function, with its class in front; one inside of another counts for both."""
    waiting: list[tuple[str, ast.AST]] = [("", tree)]
    while waiting:
        prefix, node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _Definition):
                name = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    yield Function(name, child.lineno, (child.end_lineno or child.lineno) - child.lineno + 1)
                waiting.append((f"{name}.", child))
            elif not isinstance(child, ast.expr):
                waiting.append((prefix, child))


# What stands in one of these need not happen when the module is imported, or may fail there unharmed.
_CONDITIONAL = (ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.Try, ast.TryStar, ast.With, ast.Match, ast.While)


def _imports(tree: ast.Module) -> Iterator[Import]:
    """Yield the absolute imports, by their top-level names."""
    waiting: list[tuple[bool, ast.AST]] = [(False, tree)]
    while waiting:
        guarded, node = waiting.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name.partition(".")[0], guarded)
        elif isinstance(node, ast.ImportFrom):
            if not node.level and node.module:
                yield Import(node.module.partition(".")[0], guarded)
        elif not isinstance(node, ast.expr):
            inside = guarded or isinstance(node, _CONDITIONAL)
            waiting += [(inside, child) for child in ast.iter_child_nodes(node)]


# --- requirements ----------------------------------------------------------------------------------------------------


def normal(name: str) -> str:
    """Return a distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(package: Package) -> tuple[list[str], list[str]]:
    """Return the names that the package requires, and those that only an extra of it does; each sorted, once."""
    always, extras = set[str](), set[str]()
    for line in package.requires:
        found = _REQUIREMENT.match(line)
        if found is not None:
            (extras if re.search(r";.*\bextra\s*==", line) else always).add(normal(found[1]))
    return sorted(always), sorted(extras - always)
