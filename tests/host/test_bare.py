"""A project that has nothing but the three apps and what they stand on: no REST framework, no admin, no sessions."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS = """
SECRET_KEY = "x"
ALLOWED_HOSTS = ["testserver"]
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "threads", "tools", "runs"]
DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql", "NAME": "none"}}
ROOT_URLCONF = "bare_urls"
USE_TZ = True
"""
URLS = """
from django.urls import include, path
urlpatterns = [path("ai/", include("runs.http.urls"))]
"""
ASK = """
import json
import django
django.setup()
from django.test import Client
client = Client()
print(json.dumps({name: client.get(f"/ai/{name}").status_code for name in
    ["healthz", "api/docs", "api/schema", "api/docs/start.js", "api/agents", "api/nothing"]}))
"""


def test_the_api_needs_no_other_app(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(SETTINGS)
    (tmp_path / "bare_urls.py").write_text(URLS)
    done = subprocess.run(
        [str(programs / "python"), "-W", "error", "-c", ASK],
        cwd=tmp_path,
        env={"DJANGO_SETTINGS_MODULE": "bare", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "healthz": 200,
        "api/docs": 200,
        "api/schema": 200,
        "api/docs/start.js": 200,
        "api/agents": 401,
        "api/nothing": 404,
    }
