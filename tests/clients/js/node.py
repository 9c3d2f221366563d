"""Node and the TypeScript compiler, for tests that want them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MODULE = ROOT / "clients" / "js"
HERE = Path(__file__).parent


def node(*arguments: str, timeout: float = 100, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Node to its end."""
    return subprocess.run(
        ["node", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def compiler(cache: pytest.Cache) -> Path:
    """Return the `tsc` of the lock file, installed below pytest's cache, for the tree has no node_modules."""
    lock = MODULE / "package-lock.json"
    folder = cache.mkdir(f"tsc-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}")
    tsc = folder / "node_modules" / ".bin" / "tsc"
    if not tsc.exists():
        for name in ("package.json", "package-lock.json"):
            shutil.copy(MODULE / name, folder)
        done = subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-fund", "--no-audit"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return tsc
