"""The pages of docs/ make a site without a warning, and it loads nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.page import ROOT

LOADED = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["'](?:https?:)?//[^"']+""")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    pages = {page.stem for page in (tmp_path / "html").glob("*.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= pages
    for page in (tmp_path / "html").rglob("*.html"):
        assert LOADED.findall(page.read_text()) == [], page.name
    # And each is reached from the first
    first = (tmp_path / "html" / "index.html").read_text()
    assert all(f'href="{page.stem}.html"' in first for page in (ROOT / "docs").glob("*.md") if page.stem != "index")
