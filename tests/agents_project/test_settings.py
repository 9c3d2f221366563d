"""URLs from the environment become Django's and Celery's settings."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.test import AsyncClient, Client, override_settings

from agents_project import embedded, headers
from agents_project.settings import broker_from_redis, database_from_url
from tests.docs.page import blocks, code, table


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "postgresql://u:p%40s@db:5433/app",
            {"USER": "u", "PASSWORD": "p@s", "HOST": "db", "PORT": "5433", "NAME": "app"},
        ),
        ("postgres://u@db/app", {"USER": "u", "PASSWORD": "", "HOST": "db", "PORT": "", "NAME": "app"}),
        ("postgresql://u@[::1]:5433/app", {"HOST": "::1", "PORT": "5433"}),
        ("postgresql://u@[::1]/app", {"HOST": "::1", "PORT": ""}),
        ("postgresql://u@/app?host=/run/a b&port=5433", {"HOST": "/run/a b", "PORT": "5433", "OPTIONS": {}}),
        ("postgresql://u@%2Frun%2Fpg:5433/app", {"HOST": "/run/pg", "PORT": "5433"}),
        ("postgresql:///app?sslmode=require", {"HOST": "", "USER": "", "OPTIONS": {"sslmode": "require"}}),
        ("postgresql:///app?user=u&password=p", {"USER": "u", "PASSWORD": "p"}),
    ],
)
def test_a_database_url_is_read_as_libpq_reads_it(url: str, expected: dict[str, object]) -> None:
    assert database_from_url(url).items() >= expected.items()


@pytest.mark.parametrize("url", ["mysql://u@db/app", "sqlite:///a.db", "db.example.com/app"])
def test_a_database_that_is_not_postgres_is_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match=r"needs Postgres"):
        database_from_url(url)


def test_a_redis_socket_becomes_a_broker_url() -> None:
    assert broker_from_redis("unix:///run/valkey.sock?db=3") == "redis+socket:///run/valkey.sock?virtual_host=3"
    assert broker_from_redis("redis://host:6379/1") == "redis://host:6379/1"


@pytest.mark.django_db
def test_the_session_has_real_servers(servers: embedded.Servers) -> None:
    import redis

    assert User.objects.count() == 0
    with redis.Redis.from_url(servers.redis_url) as client:
        assert client.ping()


@pytest.mark.parametrize(
    ("said", "sends"),
    [
        ("1", "True"),
        pytest.param("0", "False", marks=pytest.mark.slow),
        pytest.param("", "False", marks=pytest.mark.slow),
        (None, "False"),
    ],
)
def test_celerys_events_are_on_only_where_the_environment_says_so(said: str | None, sends: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LONGHAUL_CELERY_EVENTS"}
    if said is not None:
        environment["LONGHAUL_CELERY_EVENTS"] = said
    ask = "from agents_project.celery import app; print(app.conf.worker_send_task_events)"

    told = subprocess.run(
        [sys.executable, "-c", ask], cwd=embedded.PROJECT, env=environment, capture_output=True, text=True
    )

    assert (told.stdout.strip(), told.returncode) == (sends, 0), told.stderr


# --- production -----------------------------------------------------------------------------------------------------

OWN = {"DATABASE_URL": "postgresql://app:pw@db.internal/app", "REDIS_URL": "redis://cache.internal:6379/0"}
KEY = "k3y-" + "abcdefghijklmnopqrstuvwxyz" * 2


def settings_under(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any]:
    """Return the settings that a process with this environment has, and nothing else of ours in it."""
    for name in read_from_the_environment() - {"LONGHAUL_PURPOSE"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return {name: value for name, value in runpy.run_path(settings_file).items() if name.isupper()}


settings_file = str(embedded.PROJECT / "agents_project" / "settings.py")


def read_from_the_environment() -> set[str]:
    """Return the variables that the project's code and its Procfile read."""
    asked = re.compile(r'(?:\benviron(?:\.get|\.setdefault)?[(\[]|_listed\()\s*"([A-Z_]+)"')
    found = {
        name for path in (embedded.PROJECT / "agents_project").rglob("*.py") for name in asked.findall(path.read_text())
    }
    found |= set(embedded._VARIABLES.values())
    found |= set(re.findall(r"\$\{([A-Z_]+)", (embedded.PROJECT / "Procfile").read_text()))
    return found - {"PATH"}


def test_every_variable_that_is_read_is_in_the_table() -> None:
    assert {name for row in table("docs/operations.md", "Environment") for name in code(row[0])} == (
        read_from_the_environment()
    )


@pytest.mark.slow
def test_the_production_environment_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given the command as the page shows it
    [block] = [each for each in blocks("docs/operations.md") if "check --deploy" in each.body]
    shown, said = block.body.removeprefix("$ ").replace("\\\n", " ").rsplit("\n", 2)[:2]
    said_variables = dict(re.findall(r"(\w+)=(\S+)", shown))
    arguments = shown.partition("manage.py ")[2].split()
    filled = {**said_variables, **OWN, "SECRET_KEY": KEY}
    assert set(filled) == set(said_variables)

    # When it is run, then it finds nothing
    environment = {"PATH": os.environ["PATH"], **filled}
    done = subprocess.run(
        [sys.executable, "manage.py", *arguments], cwd=embedded.PROJECT, env=environment, capture_output=True, text=True
    )

    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr

    # Then what was silenced is that which names below it are for
    wide = settings_under(monkeypatch, **filled, LONGHAUL_HSTS_SUBDOMAINS="1")
    with web_under({**wide, "SILENCED_SYSTEM_CHECKS": []}):
        assert run_checks(tags=["security"], include_deployment_checks=True) == []
    assert "SILENCED_SYSTEM_CHECKS" not in wide


@pytest.mark.parametrize("environment", [OWN, {"LONGHAUL_HTTPS": "1"}, {"DATABASE_URL": "postgresql:///app"}], ids=str)
def test_a_key_is_asked_for_where_several_machines_might_each_make_one(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"SECRET_KEY is not set.*token_urlsafe"):
        settings_under(monkeypatch, **environment)

    assert settings_under(monkeypatch, **environment, SECRET_KEY=KEY)["SECRET_KEY"] == KEY


def test_development_has_a_key_made(monkeypatch: pytest.MonkeyPatch, servers: embedded.Servers) -> None:
    inherited = {"DATABASE_URL": embedded.urls("another").database_url}  # as a child of `embedded.ensure()` has it

    assert len(settings_under(monkeypatch)["SECRET_KEY"]) >= 50
    assert len(settings_under(monkeypatch, **inherited)["SECRET_KEY"]) >= 50
    assert len(settings_under(monkeypatch, **OWN, DJANGO_DEBUG="1")["SECRET_KEY"]) >= 50


def test_a_switch_that_says_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"LONGHAUL_HTTPS is 'yes'"):
        settings_under(monkeypatch, LONGHAUL_HTTPS="yes", SECRET_KEY=KEY)


def web_under(found: dict[str, Any]) -> override_settings:
    """Have requests answered under those of these settings that are about them."""
    return override_settings(
        **{
            name: value
            for name, value in found.items()
            if name.startswith(("SECURE_", "SECRET_", "SESSION_", "CSRF_", "ALLOWED_", "SILENCED_"))
        }
    )


@pytest.mark.django_db
def test_all_is_sent_to_https_but_what_a_health_check_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings_under(
        monkeypatch, **OWN, SECRET_KEY=KEY, LONGHAUL_HTTPS="proxy", ALLOWED_HOSTS="agents.example.com"
    )
    with web_under(found):
        web = Client()
        for path in ("/healthz", "/readyz"):
            for host in ("127.0.0.1:8000", "localhost", "agents.example.com"):
                assert web.get(path, headers={"host": host}).status_code in (200, 503), path
        for path in ("/admin/login/", "/api/runs", "/healthz/x"):
            sent = web.get(path, headers={"host": "agents.example.com"})
            assert (sent.status_code, sent.headers["location"]) == (301, f"https://agents.example.com{path}")
        assert web.get("/healthz", headers={"host": "evil.example.com"}).status_code == 400

        # The proxy says that its side is HTTPS
        page = web.get("/admin/login/", headers={"host": "agents.example.com", "x-forwarded-proto": "https"})
        assert page.status_code == 200
        assert page.headers["strict-transport-security"] == "max-age=3600"
        assert page.cookies["csrftoken"]["secure"]


@pytest.mark.django_db
def test_the_proxys_word_is_believed_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with web_under(settings_under(monkeypatch, SECRET_KEY=KEY, LONGHAUL_HTTPS="1")):
        web = Client(headers={"host": "localhost"})
        assert web.get("/admin/login/", headers={"x-forwarded-proto": "https"}).status_code == 301
        assert web.get("/admin/login/", secure=True).status_code == 200


@pytest.mark.django_db
def test_development_stays_on_plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    with web_under(settings_under(monkeypatch)):
        page = Client().get("/admin/login/", headers={"host": "127.0.0.1:8000"})

    assert page.status_code == 200
    assert not page.cookies["csrftoken"]["secure"]
    assert "strict-transport-security" not in page.headers


@pytest.mark.django_db
def test_pages_carry_a_policy_and_keep_one_of_their_own() -> None:
    page, docs, data = (Client().get(path) for path in ("/admin/login/", "/api/docs", "/healthz"))

    assert page.headers["content-security-policy"] == headers.POLICY
    assert page.headers["permissions-policy"] == headers.PERMISSIONS
    assert "connect-src" in docs.headers["content-security-policy"]
    assert "content-security-policy" not in data.headers


@pytest.mark.django_db(transaction=True)
async def test_pages_carry_it_under_asgi() -> None:
    page = await AsyncClient().get("/admin/login/")

    assert page.headers["content-security-policy"] == headers.POLICY
