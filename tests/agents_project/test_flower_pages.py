"""What Flower's pages show beyond Flower's own."""

from __future__ import annotations

from uuid import uuid4

import pytest
from flower.urls import settings as flowers  # type: ignore[import-untyped]

from agents_project import flower_pages
from threads.ids import new_id
from tools import task_ids
from tools.task_ids import Kind


@pytest.mark.parametrize("kind", ["run", "tool_call"])
@pytest.mark.parametrize("admin", ["https://here.example/admin", "https://here.example/admin/"])
def test_a_task_of_ours_leads_to_its_row_in_the_admin(kind: Kind, admin: str) -> None:
    task_id = task_ids.new(kind, new_id(), 1)

    assert flower_pages.link(admin, task_id) == f"https://here.example/admin/longhaul_runs/run/task/{task_id}/"


def test_a_task_of_the_hosts_and_an_admin_that_nobody_named_have_no_link() -> None:
    assert flower_pages.link("https://here.example/admin", str(uuid4())) == ""
    assert flower_pages.link("", task_ids.new("run", new_id(), 1)) == ""


def test_every_template_of_ours_stands_in_for_one_of_flowers_and_the_others_are_flowers() -> None:
    settings = dict(flowers)
    flower_pages.extend(settings, "https://here.example/admin")
    loader = settings["template_loader"]

    ours = {"task.html": "row_url(task.uuid)", "tasks.html": "#tasks-table td.overflow-auto"}
    assert {path.name for path in flower_pages.TEMPLATES.iterdir()} == set(ours)
    for name, addition in ours.items():
        assert addition in loader.load(name).code
        assert addition not in loader.load(f"flower/{name}").code
        # And the rest of the page is Flower's
        assert "page-section" in loader.load(name).code
    assert loader.load("workers.html").code == loader.load("flower/workers.html").code
    assert settings["ui_methods"]["row_url"](None, str(uuid4())) == ""
    assert "template_loader" not in flowers
