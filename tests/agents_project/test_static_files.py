"""Static files come from the ASGI application itself, with DEBUG off and before collectstatic."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from asgiref.testing import ApplicationCommunicator
from django.core.asgi import get_asgi_application
from django.core.management import call_command
from django.templatetags.static import static
from django.test import Client, override_settings

from agents_project import static_files
from agents_project.embedded import PROJECT, data_folder

CSS = "/static/admin/css/base.css"


async def get(path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    application = static_files.before(get_asgi_application())
    scope = {
        "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"", "http_version": "1.1",
        "headers": [(b"host", b"localhost"), *((name.encode(), value.encode()) for name, value in headers.items())],
    }  # fmt: skip
    speaking = ApplicationCommunicator(application, scope)
    await speaking.send_input({"type": "http.request", "body": b""})
    start: dict[str, Any] = await speaking.receive_output(5)
    body = b""
    while True:
        part = await speaking.receive_output(5)
        body += part.get("body", b"")
        if not part.get("more_body"):
            break
    await speaking.wait(5)
    return start["status"], {name.decode().lower(): value.decode() for name, value in start["headers"]}, body


async def test_the_admins_css_is_there_without_collectstatic() -> None:
    with override_settings(WHITENOISE_USE_FINDERS=True, WHITENOISE_AUTOREFRESH=True):
        status, headers, body = await get(CSS)

    assert (status, headers["content-type"]) == (200, 'text/css; charset="utf-8"')
    assert b"--primary" in body
    assert int(headers["content-length"]) == len(body)


async def test_a_browser_that_has_it_gets_no_body_again() -> None:
    with override_settings(WHITENOISE_USE_FINDERS=True, WHITENOISE_AUTOREFRESH=True):
        _, headers, _ = await get(CSS)
        status, _, body = await get(CSS, **{"if-modified-since": headers["last-modified"]})

    assert (status, body) == (304, b"")


async def test_after_collectstatic_its_folder_is_served(tmp_path: Path) -> None:
    (tmp_path / "own.css").write_text("body {}")

    with override_settings(STATIC_ROOT=tmp_path, WHITENOISE_USE_FINDERS=False, WHITENOISE_AUTOREFRESH=False):
        status, headers, body = await get("/static/own.css")
        missing = await get(CSS)

    assert (status, body) == (200, b"body {}")
    assert "max-age" in headers["cache-control"]
    assert missing[0] == 404


@pytest.mark.slow
def test_files_are_collected_without_servers_and_secrets(tmp_path: Path) -> None:
    bare = {"PATH": os.environ["PATH"], "LONGHAUL_STATIC_ROOT": str(tmp_path / "files"), "LONGHAUL_PURPOSE": "nobodys"}
    for expected in (r"\n\d+ static files copied to", r"\n0 static files copied to"):
        done = subprocess.run(
            [sys.executable, "manage.py", "collectstatic", "--noinput"],
            cwd=PROJECT, env=bare, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert re.match(expected, done.stdout)
    assert (tmp_path / "files" / "staticfiles.json").exists()
    assert not data_folder("nobodys").exists()


def test_what_is_collected_is_served_under_names_of_its_content(tmp_path: Path) -> None:
    with override_settings(STATIC_ROOT=tmp_path):
        call_command("collectstatic", interactive=False, verbosity=0)
    # When a page of the admin is asked for
    with override_settings(STATIC_ROOT=tmp_path, WHITENOISE_USE_FINDERS=False, WHITENOISE_AUTOREFRESH=False):
        page = Client().get("/admin/login/").content.decode()
        links = re.findall(r'(?:href|src)="(/static/[^"]+)"', page)
        own = static("longhaul/admin.css")
        answers = {link: async_to_sync(get)(link, **{"accept-encoding": "gzip"}) for link in [*links, own]}

    # Then its files are there, for ever and small
    assert len(links) > 3
    for link, (status, headers, _) in answers.items():
        assert status == 200, link
        assert re.search(r"\.[0-9a-f]{12}\.\w+$", link), link
        assert "immutable" in headers["cache-control"]
    assert answers[own][1]["content-encoding"] == "gzip"


def test_a_file_that_was_not_collected_keeps_its_own_name(tmp_path: Path) -> None:
    with override_settings(STATIC_ROOT=tmp_path):
        assert static("longhaul/admin.css") == "/static/longhaul/admin.css"


@pytest.mark.parametrize(
    "path", ["/static/../agents_project/settings.py", "/static/%2e%2e/settings.py", "/static/", "/static/nope"]
)
async def test_nothing_else_is_served(path: str) -> None:
    with override_settings(WHITENOISE_USE_FINDERS=True, WHITENOISE_AUTOREFRESH=True):
        assert (await get(path))[0] == 404


@pytest.mark.django_db(transaction=True)
async def test_all_other_paths_are_djangos() -> None:
    status, headers, _ = await get("/admin/")

    assert (status, headers["location"]) == (302, "/admin/login/?next=/admin/")
