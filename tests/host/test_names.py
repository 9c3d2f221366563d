"""What Longhaul adds to a project, by name: each begins so that it meets no other app's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from celery import current_app
from django.apps import apps
from django.conf import global_settings
from django.core.management import get_commands
from django.db import connection
from django.urls import URLPattern, URLResolver, get_resolver

from runs import bells
from tests.docs.page import code, table
from tests.host.wheel import ROOT

APPS = ("threads", "tools", "runs")


@cache
def texts() -> dict[Path, str]:
    return {path.relative_to(ROOT): path.read_text() for app in APPS for path in sorted((ROOT / app).rglob("*.py"))}


@cache
def calls() -> list[tuple[Path, str, ast.Call]]:
    """Return each call in the three packages: the file, what is called, and the call."""
    return [
        (path, ast.unparse(node.func), node)
        for path, text in texts().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
    ]


def strings(*, call: str, keyword: str | None = None) -> dict[str, Path]:
    """Return the first argument, or a keyword, of each call of a name, where it is a plain text."""
    found = {}
    for path, named, node in calls():
        if named == call or named.endswith(f".{call}"):
            given = [each.value for each in node.keywords if each.arg == keyword] if keyword else node.args[:1]
            for value in given:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[value.value] = path
    return found


def test_labels_tables_and_permissions() -> None:
    configs = [apps.get_app_config(f"longhaul_{app}") for app in APPS]
    for config in configs:
        for model in config.get_models(include_auto_created=True):
            assert model._meta.db_table.startswith("longhaul_"), model
            assert model._meta.app_label.startswith("longhaul_"), model
            for field in model._meta.get_fields():
                # What a host's user gets for its relations to ours
                related = getattr(field, "remote_field", None)
                if field.concrete and related is not None and related.model._meta.app_label == "auth":
                    assert str(related.related_name).startswith("longhaul_"), field
            named = [*model._meta.constraints, *model._meta.indexes]
            assert all(each.name.startswith("longhaul_") for each in named), model


@pytest.mark.django_db
def test_what_stands_in_the_database() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prokind = 'f'")
        functions = {name for (name,) in cursor.fetchall()}
        cursor.execute("SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typtype <> 'b'")
        types = {name for (name,) in cursor.fetchall()}
        cursor.execute("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal")
        triggers = {name for (name,) in cursor.fetchall()}
    assert len(functions) > 20
    assert {name for name in functions if not name.startswith("longhaul_")} == set()
    assert {name for name in triggers if not name.startswith("longhaul_")} == set()
    assert {name for name in types if not name.startswith(("longhaul_", "django_", "auth_"))} == set()


def test_urls() -> None:
    def named(patterns: list[URLPattern | URLResolver]) -> Iterator[str]:
        for each in patterns:
            if isinstance(each, URLResolver):
                yield from named(each.url_patterns)
            else:
                assert each.name, each

    ours = [
        each for each in get_resolver().url_patterns if isinstance(each, URLResolver) and each.app_name == "longhaul"
    ]
    assert len(ours) == 1
    assert ours[0].namespace == "longhaul"
    assert list(named(ours[0].url_patterns)) == []


def test_tasks() -> None:
    ours = {name for name, task in current_app.tasks.items() if type(task).__module__.partition(".")[0] in APPS}
    assert {"longhaul.advance_run", "longhaul.execute_call", "longhaul.keep_house"} <= ours
    assert {name for name in ours if not name.startswith("longhaul.")} == set()
    assert all(name.startswith("longhaul.") for name in strings(call="shared_task", keyword="name"))


def test_commands() -> None:
    """Their names are the contract of the page; Django lets an app that stands before ours take one over."""
    documented = {code(row[0])[0].split()[0] for row in table("docs/operations.md", "Commands")}
    ours = {name for name, app in get_commands().items() if app in APPS}
    assert len(ours) > 8
    assert ours <= documented


def test_signals_loggers_threads_and_channels() -> None:
    receivers = strings(call="connect", keyword="dispatch_uid")
    assert receivers
    loggers = strings(call="getLogger")
    assert loggers
    threads = strings(call="Thread", keyword="name")
    assert threads
    for found in (receivers, loggers):
        assert {name: path for name, path in found.items() if not re.match(r"longhaul(\.|$)", name)} == {}
    assert {name: path for name, path in threads.items() if not name.startswith("longhaul-")} == {}
    assert bells.run_channel("x").startswith("longhaul.")
    assert bells.leg_channel("x").startswith("longhaul.")


def test_cache_keys_and_cookies() -> None:
    """The cache is used for rates alone, and no cookie is set."""
    users = {str(path) for path, text in texts().items() if "django.core.cache" in text}
    assert users == {"runs/http/throttles.py"}
    assert 'f"longhaul.rate.' in texts()[Path("runs/http/throttles.py")]
    assert [path for path, text in texts().items() if "set_cookie" in text] == []


def test_locks_of_the_database() -> None:
    """An advisory lock is a number that any app may take: ours are a class of their own, or 64 bits by chance."""
    takers = {str(path) for path, text in texts().items() if re.search(r"pg_(try_)?advisory", text)}
    assert takers <= {"runs/sweep.py", "tools/presence.py", "runs/health.py", "runs/explain.py"}


def test_templates_and_static_files() -> None:
    for app in APPS:
        folders = [ROOT / app / "templates", ROOT / app / "static"]
        for path in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
            assert re.match(r"(templates/admin|static)/longhaul(_\w+)?/", str(path.relative_to(ROOT / app))), path


def test_settings_and_environment() -> None:
    """One dict of settings, beside REDIS_URL; what is read of the environment is a standard's, or ours."""
    read = {
        name
        for text in texts().values()
        for name in re.findall(r"""(?:os\.environ\.get|os\.getenv|environ)[(\[]['"](\w+)['"]""", text)
    }
    standard = {"NO_COLOR", "OPENAI_API_KEY", "OPENAI_BASE_URL", "TERM", "COLUMNS", "PORT"}
    assert {name for name in read - standard if not name.startswith("LONGHAUL_")} == set()
    asked = {
        name.value
        for _, named, node in calls()
        if named == "getattr" and ast.unparse(node.args[0]) in ("settings", "django_settings")
        for name in node.args[1:2]
        if isinstance(name, ast.Constant)
    }
    assert {name for name in asked if not hasattr(global_settings, str(name))} == {
        "LONGHAUL",
        "REDIS_URL",
        "ASGI_APPLICATION",
    }
