"""URLs from the environment become Django's and Celery's settings."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from django.contrib.auth.models import User

from agents_project import embedded
from agents_project.settings import broker_from_redis, database_from_url


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


@pytest.mark.parametrize(("said", "sends"), [("1", "True"), ("0", "False"), ("", "False"), (None, "False")])
def test_celerys_events_are_on_only_where_the_environment_says_so(said: str | None, sends: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LONGHAUL_CELERY_EVENTS"}
    if said is not None:
        environment["LONGHAUL_CELERY_EVENTS"] = said
    ask = "from agents_project.celery import app; print(app.conf.worker_send_task_events)"

    told = subprocess.run(
        [sys.executable, "-c", ask], cwd=embedded.PROJECT, env=environment, capture_output=True, text=True
    )

    assert (told.stdout.strip(), told.returncode) == (sends, 0), told.stderr
