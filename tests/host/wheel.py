"""The wheel as a release would have it: built from a copy of the files that git knows, so nothing is left in this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.executable).with_name("uv")


def tracked() -> list[Path]:
    """Return the files of a release: those that git knows, or would take, as they are now."""
    asked = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    told = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in told.split("\0") if name and (ROOT / name).is_file()]


def build(folder: Path, kind: str = "wheel") -> Path:
    """Build into the folder, which is new; return the file. `kind`: "wheel" or "sdist"."""
    source = folder / "source"
    for path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    uv("build", f"--{kind}", "--quiet", "--out-dir", str(folder / "dist"), str(source))
    (made,) = (each for each in (folder / "dist").iterdir() if each.suffix in (".whl", ".gz"))
    return made


def uv(*arguments: str) -> None:
    """Run uv as a user would, outside of this project. Raises AssertionError that holds what it said."""
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")}
    done = subprocess.run(
        [str(UV), "--no-config", *arguments], capture_output=True, text=True, env=kept, timeout=600, check=False
    )
    assert done.returncode == 0, f"uv {' '.join(arguments)}\n{done.stdout}{done.stderr}"


def environment(folder: Path, python: Path, *packages: str) -> Path:
    """Make a virtual environment with the packages, by the wheels' own metadata; return its folder of programs."""
    uv("venv", "--quiet", "--no-python-downloads", "--python", str(python), str(folder))
    uv("pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), *packages)
    return folder / "bin"
