"""What Flower's pages show beyond Flower's own: a link from a task to its run or tool call in the admin."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from tornado.template import Loader, Template

from tools import task_ids

TEMPLATES = Path(__file__).resolve().parent / "flower_templates"
ORIGINAL = "flower/"


def extend(settings: dict[str, Any], admin_url: str) -> None:
    """Add our templates, and what they call, to the settings of Flower's application."""

    def row_url(handler: object, task_id: str) -> str:
        return link(admin_url, task_id)

    settings["template_loader"] = _Loader(settings["template_path"])
    settings["ui_methods"] = {**settings.get("ui_methods", {}), "row_url": row_url}


def link(admin_url: str, task_id: str) -> str:
    """Return the admin's page of the row that this task served; "" for a task that is none of ours, or without an admin."""
    if not admin_url or task_ids.row_of(task_id) is None:
        return ""
    return f"{admin_url.rstrip('/')}/longhaul_runs/run/task/{quote(task_id, safe='')}/"


class _Loader(Loader):
    """Flower's templates, of which some are ours and extend the one that they stand in for by the name `flower/NAME`."""

    def _create_template(self, name: str) -> Template:
        original = name.removeprefix(ORIGINAL)
        ours = TEMPLATES / name
        path = ours if ours.is_file() else Path(self.root, original)
        return Template(path.read_bytes(), name=original, loader=self)
