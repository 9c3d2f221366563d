"""What a release holds: three packages with all that they read, and nothing of this repository beside them."""

from __future__ import annotations

import re
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest

from tests.host.wheel import ROOT, build, tracked

PACKAGES = {"threads", "tools", "runs"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INFO = f"django_longhaul-{PROJECT['project']['version']}.dist-info"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(built)


def test_its_packages_are_three(wheel: zipfile.ZipFile) -> None:
    tops = {PurePosixPath(name).parts[0] for name in wheel.namelist()}
    assert tops == {*PACKAGES, INFO}


def test_the_page_names_it(built: Path) -> None:
    assert f"pip install dist/{built.name}\n" in (ROOT / "docs/adopt.md").read_text()


def test_it_holds_each_file_of_theirs(wheel: zipfile.ZipFile) -> None:
    ours = {path.as_posix() for path in tracked() if path.parts[0] in PACKAGES}
    inside = {name for name in wheel.namelist() if PurePosixPath(name).parts[0] in PACKAGES}
    assert inside == ours
    # all kinds that the code reads among them
    kinds = {PurePosixPath(name).suffix for name in inside} | {PurePosixPath(name).name for name in inside}
    assert {".py", ".sql", ".html", ".css", "py.typed"} <= kinds
    assert {f"{package}/py.typed" for package in PACKAGES} <= inside


def test_it_holds_no_test_no_demo_no_key(wheel: zipfile.ZipFile) -> None:
    for name in wheel.namelist():
        assert not re.search(r"(^|/)(tests?|demo|conftest|embedded|benchmarks)(/|\.py|$)", name), name
        text = wheel.read(name).decode(errors="replace")
        assert "agents_project" not in re.sub(r"^\s*#.*", "", text, flags=re.MULTILINE) or name.endswith("METADATA"), (
            name
        )


def test_its_metadata_says_what_a_user_needs(wheel: zipfile.ZipFile) -> None:
    told = Parser().parsestr(wheel.read(f"{INFO}/METADATA").decode())
    assert (told["Name"], told["Requires-Python"]) == ("django-longhaul", ">=3.11")

    def name(requirement: str) -> str:
        found = re.match(r"[\w-]+(\[[\w,]+\])?", requirement)
        assert found
        return found[0]

    needed = {name(each) for each in told.get_all("Requires-Dist", [])}
    assert needed == {name(each) for each in PROJECT["project"]["dependencies"]}
    development = {
        name(each) for group in PROJECT["dependency-groups"].values() for each in group if isinstance(each, str)
    }
    assert not needed & development
    assert wheel.read(f"{INFO}/entry_points.txt").decode().split() == [
        "[pytest11]",
        "pytest_longhaul",
        "=",
        "runs.pytest_longhaul",
    ]


def test_a_wheel_of_the_sdist_is_the_same(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    made = build(tmp_path, "sdist")
    with tarfile.open(made) as archive:
        inside = {PurePosixPath(*PurePosixPath(name).parts[1:]).as_posix() for name in archive.getnames()}
    assert {name for name in wheel.namelist() if PurePosixPath(name).parts[0] in PACKAGES} <= inside
    assert {"pyproject.toml", "README.md"} <= inside
