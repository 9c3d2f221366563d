"""clients/js without a server: its parts and its state by Node's own runner, its types by the compiler."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.js.node import HERE, MODULE, compiler, node

pytestmark = [pytest.mark.slow, pytest.mark.needs_node]


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("*.test.mjs")))
def test_node_runs(name: str) -> None:
    done = node("--test", "--test-reporter=tap", "--test-timeout=60000", str(HERE / name))
    passed = re.search(r"^# pass (\d+)$", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert passed is not None
    assert int(passed[1]) > 0


def test_the_declarations_are_those_of_the_module(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """After a change: `npm ci && npm run types` in clients/js."""
    assert pytestconfig.cache is not None
    tsc = compiler(pytestconfig.cache)
    done = _compile(tsc, "--project", str(MODULE), "--outDir", str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "longhaul.d.ts").read_text() == (MODULE / "longhaul.d.ts").read_text()


def test_a_program_in_typescript_is_checked_against_them(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    assert pytestconfig.cache is not None
    tsc = compiler(pytestconfig.cache)
    package = tmp_path / "node_modules" / "longhaul-client"
    package.mkdir(parents=True)
    for name in ("package.json", "longhaul.js", "longhaul.d.ts"):
        shutil.copy(MODULE / name, package)
    program = (HERE / "consumer.ts").read_text()
    options = ["--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "--types", ""]
    (tmp_path / "package.json").write_text(json.dumps({"type": "module"}))
    good, bad = tmp_path / "consumer.ts", tmp_path / "wrong.ts"
    good.write_text(program)
    done = _compile(tsc, *options, str(good))
    assert done.returncode == 0, done.stdout
    # Each line that the program says is wrong is refused.
    wrong = re.findall(r"^// wrong: (.+)$", program, re.MULTILINE)
    assert wrong
    head = program.partition("// wrong: ")[0]
    for line in wrong:
        bad.write_text(f"{head}\n{line}\n")
        done = _compile(tsc, *options, str(bad))
        assert done.returncode != 0, line
        assert "wrong.ts" in done.stdout, line


def _compile(tsc: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(tsc), *arguments], capture_output=True, text=True, timeout=100, check=False)
