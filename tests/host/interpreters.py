"""The Pythons of this machine, found without a name that only this machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

MINORS = (11, 12, 13, 14)


@cache
def interpreters() -> dict[tuple[int, int], Path]:
    """Return one interpreter that runs for each version of Python that Longhaul supports."""
    found: dict[tuple[int, int], Path] = {sys.version_info[:2]: Path(sys.executable)}
    for minor in MINORS:
        for candidate in _candidates(f"python3.{minor}"):
            if (3, minor) not in found and _version(candidate) == (3, minor):
                found[3, minor] = candidate
    return found


def _candidates(name: str) -> list[Path]:
    """Those on PATH, and those of pyenv: its shim of a version that is not active says so and ends."""
    on_path = [Path(each) for each in [shutil.which(name)] if each]
    roots = [os.environ.get("PYENV_ROOT"), Path.home() / ".pyenv"]
    roots += [each.parent.parent for each in on_path if each.parent.name == "shims"]
    of_pyenv = [each for root in roots if root for each in Path(root).glob(f"versions/*/bin/{name}")]
    return on_path + sorted(set(of_pyenv))


def _version(python: Path) -> tuple[int, int] | None:
    asked = [str(python), "-c", "import sys; print(*sys.version_info[:2])"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    major, minor = map(int, told.split())
    return major, minor
