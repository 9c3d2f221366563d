"""A project that has a top-level module of one of our names is told which file is in the way."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.docs.page import blocks, shows

SETTINGS = """
SECRET_KEY = "x"
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", {apps}]
DATABASES = {{"default": {{"ENGINE": "django.db.backends.postgresql", "NAME": "none"}}}}
"""
ORDERS = ('"threads", "tools", "runs"', '"runs", "tools", "threads"')

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def set_up(programs: Path, folder: Path, apps: str = ORDERS[0]) -> subprocess.CompletedProcess[str]:
    (folder / "plain.py").write_text(SETTINGS.format(apps=apps))
    return subprocess.run(
        [str(programs / "python"), "-c", "import django; django.setup(); print('up')"],
        cwd=folder,
        env={"DJANGO_SETTINGS_MODULE": "plain", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("file", "apps"),
    [
        ("tools.py", ORDERS[0]),
        ("tools.py", ORDERS[1]),
        ("runs.py", ORDERS[0]),
        ("runs/__init__.py", ORDERS[1]),
        ("threads.py", ORDERS[0]),
        ("threads/__init__.py", ORDERS[1]),
    ],
)
def test_the_file_that_is_in_the_way_is_named(programs: Path, tmp_path: Path, file: str, apps: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("def saw(): ...\n")
    done = set_up(programs, tmp_path, apps)
    name = file.partition("/")[0].removesuffix(".py")
    last = done.stderr.strip().splitlines()[-1]
    assert "ImproperlyConfigured" in last, done.stderr
    assert f"The module '{name}' is {tmp_path / file}, and not Longhaul's, which is {programs.parent}/" in last
    if file == "tools.py":
        (shown,) = (block.body for block in blocks("docs/adopt.md") if block.kind == "text")
        assert shows(shown.replace("/srv/shop", str(tmp_path)), last)
    assert f"move it into a package: shop/{name}.py is no trouble" in last


@pytest.mark.parametrize("others", [("tools", "runs"), ("threads", "runs"), ("threads", "tools")])
def test_one_of_ours_is_enough_to_notice_two(programs: Path, tmp_path: Path, others: tuple[str, str]) -> None:
    for name in others:
        (tmp_path / f"{name}.py").write_text("")
    done = set_up(programs, tmp_path)
    assert f"is {tmp_path}/{others[0]}.py, and not Longhaul's" in done.stderr


def test_what_is_in_a_package_of_the_host_or_no_package_is_no_trouble(programs: Path, tmp_path: Path) -> None:
    # Given a folder of scripts that no Python imports, and a module inside of an app
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "release.sh").write_text("true\n")
    (tmp_path / "shop").mkdir()
    for name in ("__init__", "tools", "runs", "threads"):
        (tmp_path / "shop" / f"{name}.py").write_text("")
    done = set_up(programs, tmp_path, f'{ORDERS[0]}, "shop"')
    assert done.stdout == "up\n", done.stderr
