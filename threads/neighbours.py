"""Whether `threads`, `tools` and `runs` are Longhaul's where a host's project says these names.

A project may have a `tools.py` of its own, which comes first on Python's path. Django would take it for the app, and ours in
site-packages would never be asked: so each of the three looks at all of them, before any models are loaded.

Run by its path (`runpy`), and so it imports nothing of ours: the name `threads` may be the one that is taken.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from django.core.exceptions import ImproperlyConfigured

NAMES = ("threads", "tools", "runs")
HOME = Path(__file__).resolve().parents[1]


def check_neighbours() -> None:
    """Raises ImproperlyConfigured that names the file which is imported in place of ours."""
    for name in NAMES:
        ours = HOME / name
        spec = find_spec(name)
        where = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if where == ours / "__init__.py":
            continue
        raise ImproperlyConfigured(
            f"The module {name!r} is {where or 'not found'}, and not Longhaul's, which is {ours}. Longhaul needs the names"
            f" {', '.join(NAMES)} at the top. Rename yours, or move it into a package: shop/{name}.py is no trouble."
        )
