"""The servers of a test session: embedded ones, unless DATABASE_URL and REDIS_URL name others.

A pytest plugin and no conftest, for Django's settings are read before any conftest is. Two sessions at once get servers
of their own.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from agents_project import embedded


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, object, object]:
    asked = early_config.known_args_namespace
    if not (asked.help or asked.version):
        if not (os.environ.get("DATABASE_URL") and os.environ.get("REDIS_URL")):
            os.environ["LONGHAUL_PURPOSE"] = embedded.reserve(os.environ.get("LONGHAUL_PURPOSE") or "test")
        embedded.ensure(durable=False)
        # For processes of the tests, whose database is behind a pooler or stands elsewhere.
        os.environ.setdefault("SECRET_KEY", embedded.secret_key())
    return (yield)
