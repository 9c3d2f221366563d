"""How Sphinx builds these pages: `make docs`. They are Markdown, and read as well where they lie."""

import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]

project = "Longhaul"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Longhaul {release}"
html_copy_source = False
html_show_sphinx = False
# Nothing is loaded from outside: the pages are read offline too.
html_theme_options = {"navigation_with_keys": True}
myst_heading_anchors = 3
nitpicky = True

# The pages' order is that of the index's table; what lies outside of docs/ is named, for no page of it is built.
INDEX = (ROOT / "docs" / "index.md").read_text()
PAGES = re.findall(r"^\| \[\w+\.md\]\((\w+)\.md\)", INDEX, flags=re.MULTILINE)


def adapt(app: Sphinx, name: str, source: list[str]) -> None:
    """Make of a page that is read where it lies one that Sphinx builds."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", source[0])
    if name == "index":
        source[0] += "\n```{toctree}\n:hidden:\n" + "\n".join(PAGES) + "\n```\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", adapt)
