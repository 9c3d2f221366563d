"""Each check of Longhaul's own fires on the setting that it is for, says what to change, and is silent without it."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from celery import Celery, current_app
from django.core.checks import run_checks
from django.db import connections
from kombu import Queue

from agents_project.settings import CELERY_BROKER_TRANSPORT_OPTIONS
from runs import agents, checks
from runs.agents import Agent
from runs.sweep import SWEEP_LOCK
from tests.protocol.rows import wait_until
from tests.runs.scenes import Cast
from threads.clock import Now
from tools import presence, tool
from tools.models import Worker


def found(*, databases: list[str] | None = None) -> dict[str, str]:
    """What the checks say, by id: the message and its hint in one text."""
    messages = [each for each in run_checks(databases=databases) if str(each.id).startswith("longhaul.")]
    assert all(each.hint for each in messages), messages
    return {str(each.id).removeprefix("longhaul."): f"{each.msg} {each.hint}" for each in messages}


@contextmanager
def celery(**settings: Any) -> Iterator[None]:
    before = {name: current_app.conf[name] for name in settings}
    current_app.conf.update(settings)
    with mock.patch.dict(os.environ):
        os.environ.pop("CELERY_BROKER_URL", None)  # to Celery it counts more than what is set
        try:
            yield
        finally:
            current_app.conf.update(before)


def test_the_project_as_it_is_has_nothing_to_say() -> None:
    assert found() == {}


@pytest.mark.parametrize(
    ("value", "id", "words"),
    [
        ("fast", "E003", ["str", "not a dict", "DEFAULT_MODEL"]),
        ({"LEG_BUDGET": 3}, "E001", ["'LEG_BUDGET'", "Did you mean LEG_BUDGET_SECONDS?"]),
        ({"SPEED": 3}, "E001", ["'SPEED'", "The keys are", "LEG_BUDGET_SECONDS"]),
        ({"LEG_BUDGET_SECONDS": "4"}, "E002", ["LEG_BUDGET_SECONDS", "a number of seconds", "'4'", "240"]),
        ({"LEG_BUDGET_SECONDS": 0}, "E002", ["LEG_BUDGET_SECONDS", "at least 0.1"]),
        ({"FLUSH_MILLISECONDS": True}, "E002", ["FLUSH_MILLISECONDS", "a number of milliseconds"]),
        ({"MAX_STEPS": 1.5}, "E002", ["MAX_STEPS", "a whole number"]),
        ({"PRESENCE_TTL_SECONDS": 2}, "E002", ["PRESENCE_TTL_SECONDS", "at least 6"]),
        ({"SESSION_LOCKS": 1}, "E002", ["SESSION_LOCKS", "True, False or None"]),
        ({"TOOLS_QUEUE": ""}, "E002", ["TOOLS_QUEUE", "empty"]),
        ({"PRICES": {"gpt": {"in": 1}}}, "E006", ["'gpt'", "million tokens"]),
        ({"PRICES": {"gpt": {"input": -1}}}, "E006", ["'gpt'"]),
        ({"PRICES": {"gpt": {"input": float("inf")}}}, "E006", ["'gpt'"]),
        ({"PRICES": {"gpt": {"input": True}}}, "E006", ["'gpt'"]),
        ({"PRICES": {"gpt": {}}}, "E006", ["'gpt'"]),
        ({"PRICES": {"gpt": 3}}, "E006", ["'gpt'"]),
        ({"MODEL_LIMITS": {"openai:x": {"requests": 3}}}, "E012", ["'openai:x'", "requests_per_minute"]),
        ({"MODEL_LIMITS": {"openai:x": {"max_concurrency": 0}}}, "E012", ["at least 1"]),
        ({"MODEL_LIMITS": {"openai:x": {"max_concurrency": True}}}, "E012", ["True"]),
        ({"MODEL_LIMITS": {"openai:x": {}}}, "E012", ["not a dict of limits"]),
        ({"MODEL_LIMITS": {"x": {"max_concurrency": 1}}}, "E012", ["'provider:model'"]),
        ({"ACCESS": "runs.no.Such"}, "E007", ["'runs.no.Such'", "policy class"]),
        ({"ACCESS": "runs.conf.settings"}, "E007", ["no class"]),
        ({"ACCESS": "runs.models.Run"}, "E007", ["no method visible and no method may"]),
        ({"ACCESS": dict}, "E007", ["no method visible"]),
        ({"START_RATE": "often"}, "E002", ["START_RATE", "a rate like '20/min'"]),
        ({"MODEL_SILENCE_SECONDS": 700}, "E004", ["MODEL_SILENCE_SECONDS (700)", "MODEL_TIMEOUT_SECONDS (600)"]),
        ({"CONTROL_QUEUE": "q", "TOOLS_QUEUE": "q"}, "E004", ["CONTROL_QUEUE and TOOLS_QUEUE", "'q'"]),
        ({"TOOLS_QUEUE": "q", "AGENTS_QUEUE": "q"}, "E004", ["AGENTS_QUEUE and TOOLS_QUEUE", "'q'"]),
    ],
    ids=str,
)
def test_a_wrong_value_of_the_settings(settings: Any, value: Any, id: str, words: list[str]) -> None:
    settings.LONGHAUL = value
    said = found()
    assert list(said) == [id]
    for word in words:
        assert word in said[id]


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"LEG_BUDGET_SECONDS": 60.5, "MAX_STEPS": 3, "FLUSH_MILLISECONDS": 20},
        {"PRICES": {"gpt": {"input": 0.25, "output": 2}, "free": {"output": 0}}},
        {"ACCESS": "threads.access.Policy"},
        {"START_RATE": "20/min", "API_RATE": "600/h"},
        {"MODEL_SILENCE_SECONDS": 600},
        {"AGENTS_QUEUE": "a", "TOOLS_QUEUE": "b", "CONTROL_QUEUE": "c"},
    ],
    ids=str,
)
def test_a_right_value_of_the_settings(settings: Any, value: Any) -> None:
    settings.LONGHAUL = value
    assert found() == {}


def test_several_wrong_values_are_each_told(settings: Any) -> None:
    settings.LONGHAUL = {"SPEED": 3, "MAX_STEPS": 1.5, "ACCESS": "runs.no.Such"}
    assert sorted(found()) == ["E001", "E002", "E007"]


def test_a_leg_that_outlasts_the_brokers_patience(settings: Any) -> None:
    settings.LONGHAUL = {"LEG_BUDGET_SECONDS": 1201}  # and 600 of the model; half of visibility_timeout is 1800
    said = found()
    assert list(said) == ["W001"]
    for word in ("1801 s", "LEG_BUDGET_SECONDS + MODEL_TIMEOUT_SECONDS", "3600 s", "visibility_timeout", "3602"):
        assert word in said["W001"]
    settings.LONGHAUL = {"LEG_BUDGET_SECONDS": 1200}
    assert found() == {}


def test_an_agent_with_a_budget_of_its_own_counts_too(cast: Cast) -> None:
    cast(name="patient", leg_budget_seconds=1201)
    said = found()
    assert list(said) == ["W001"]
    assert "leg_budget_seconds of agent 'patient'" in said["W001"]


def test_a_tool_that_outlasts_the_brokers_patience(cast: Cast) -> None:
    @tool(timeout_seconds=1796)  # and 5 of grace; half of visibility_timeout is 1800
    def slow() -> str:
        """Take long."""
        return ""

    cast(name="patient", tools=[slow])
    said = found()
    assert list(said) == ["W001"]
    for word in ("the tool 'slow'", "1801 s", "3600 s", "visibility_timeout", "3602", "deferred"):
        assert word in said["W001"]


@pytest.mark.parametrize(
    ("conf", "id", "words"),
    [
        (
            {"broker_transport_options": {**CELERY_BROKER_TRANSPORT_OPTIONS, "socket_timeout": None}},
            "W004",
            ["no time limit", "socket_timeout"],
        ),
        (
            {"broker_transport_options": {**CELERY_BROKER_TRANSPORT_OPTIONS, "max_connections": None}},
            "W004",
            ["has 10 connections", '"max_connections": 1000'],
        ),
        (
            {"broker_transport_options": {**CELERY_BROKER_TRANSPORT_OPTIONS, "visibility_timeout": 60}},
            "W001",
            ["60 s", "visibility_timeout"],
        ),
        ({"accept_content": ["pickle"]}, "E010", ["accept pickle", "CELERY_ACCEPT_CONTENT"]),
        (
            {"task_create_missing_queues": False},
            "E010",
            ["'longhaul.agents'", "'longhaul.tools'", "CELERY_TASK_QUEUES"],
        ),
        ({"task_acks_late": True}, "W005", ["task_acks_late", "leave it out"]),
    ],
    ids=["timeout", "connections", "visibility", "content", "queues", "acks_late"],
)
def test_a_setting_of_celery_that_does_harm(conf: dict[str, Any], id: str, words: list[str]) -> None:
    with celery(**conf):
        said = found()
    assert list(said) == [id]
    for word in words:
        assert word in said[id]
    assert found() == {}


REDIS = ["redis", "rediss", "redis+socket", "sentinel", "valkey", "valkeys"]
AMQP = ["amqp", "amqps", "pyamqp", "librabbitmq"]


@pytest.mark.parametrize("scheme", REDIS)
def test_every_name_of_redis_is_known(scheme: str) -> None:
    url = f"{scheme}://here?ssl_cert_reqs=required"
    with celery(broker_url=url, broker_transport_options={}):
        said = found()
    assert list(said) == ["W004"]
    with celery(broker_url=url, broker_transport_options={"socket_timeout": 9, "max_connections": 100}):
        assert found() == {}


@pytest.mark.parametrize(
    ("query", "use_ssl", "looks"),
    [
        ("", None, False),
        ("", True, False),  # kombu takes it for nothing said
        ("?ssl_cert_reqs=none", None, False),
        ("?ssl_cert_reqs=required", None, True),
        ("?ssl_ca_certs=/ca.pem", None, True),
        ("", {"ssl_cert_reqs": ssl.CERT_REQUIRED}, True),
        ("", {"ssl_cert_reqs": ssl.CERT_NONE}, False),
    ],
)
def test_a_redis_over_tls_whose_certificate_nobody_looks_at(query: str, use_ssl: Any, looks: bool) -> None:
    with celery(broker_url=f"rediss://here:6379/0{query}", broker_use_ssl=use_ssl):
        said = found()
        handed = current_app.connection_for_write().ssl
    assert list(said) == ([] if looks else ["W010"])
    if not looks:
        assert "ssl_cert_reqs=required" in said["W010"]
    # And kombu hands on what the check takes it to
    asked = handed.get("ssl_cert_reqs", "required") if isinstance(handed, dict) else None
    assert (asked not in (None, ssl.CERT_NONE)) is looks


def test_redis_waits_for_an_hour_when_nothing_is_said(settings: Any) -> None:
    with celery(broker_transport_options={"socket_timeout": 9, "max_connections": 100}):
        assert found() == {}
        settings.LONGHAUL = {"LEG_BUDGET_SECONDS": 1201}
        assert "after 3600 s (visibility_timeout)" in found()["W001"]


@pytest.mark.parametrize("scheme", AMQP)
def test_every_name_of_rabbitmq_is_known(settings: Any, scheme: str) -> None:
    settings.LONGHAUL = {"LEG_BUDGET_SECONDS": 301}
    with celery(broker_url=f"{scheme}://here", broker_transport_options={}):
        assert "RabbitMQ's consumer_timeout" in found()["W001"]


def test_a_broker_of_another_kind_is_left_alone(settings: Any) -> None:
    settings.LONGHAUL = {"LEG_BUDGET_SECONDS": 3000}
    with celery(broker_url="memory://", broker_transport_options={}):
        assert found() == {}


def test_of_several_brokers_the_one_that_is_written_to_counts(settings: Any) -> None:
    settings.LONGHAUL = {"LEG_BUDGET_SECONDS": 301}
    with celery(broker_url="memory://", broker_write_url="amqp://", broker_transport_options={}):
        assert "RabbitMQ" in found()["W001"]
    with celery(broker_url=["amqp://here", "amqp://there"], broker_transport_options={}):
        assert "RabbitMQ" in found()["W001"]


@pytest.mark.parametrize("as_dict", [True, False])
def test_queues_that_the_host_has_named_need_not_be_made(as_dict: bool) -> None:
    names = ["shop", "longhaul.agents", "longhaul.tools", "longhaul.control"]
    queues: Any = {name: {} for name in names} if as_dict else [Queue(name) for name in names]
    with celery(task_create_missing_queues=False, task_queues=queues):
        assert found() == {}


def test_what_a_host_says_of_all_its_tasks_is_told_where_it_reaches_ours() -> None:
    app = Celery("host", changes={"task_annotations": {"*": {"time_limit": 60}}}, set_as_current=False)
    with mock.patch.object(checks, "current_app", app):
        told = [each for each in checks.check_tasks(None) if each.id == "longhaul.W003"]
    assert [each.msg for each in told] == [
        "Celery's settings make time_limit of longhaul.advance_run 60.",
        "Celery's settings make time_limit of longhaul.execute_call 60.",
    ]
    assert "CELERY_TASK_ANNOTATIONS" in str(told[0].hint)


@pytest.mark.parametrize(
    "conf",
    [
        {"result_backend": "redis://"},
        {"task_time_limit": 60, "task_soft_time_limit": 30},
        {"task_default_rate_limit": "1/m"},
        {"worker_prefetch_multiplier": 4},
    ],
    ids=str,
)
def test_what_a_host_sets_for_its_own_tasks_is_its_own_affair(conf: dict[str, Any]) -> None:
    with celery(**conf):
        assert found() == {}


def test_rabbitmq_waits_for_half_an_hour(settings: Any) -> None:
    with celery(broker_url="amqp://", broker_transport_options={}):
        assert found() == {}
        settings.LONGHAUL = {"LEG_BUDGET_SECONDS": 301}
        assert "RabbitMQ's consumer_timeout" in found()["W001"]


def test_a_database_that_is_not_postgres(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections["default"], "vendor", "sqlite")
    said = found()
    assert list(said) == ["E005"]
    assert "'default', which is sqlite" in said["E005"]


def test_rows_in_another_database(monkeypatch: pytest.MonkeyPatch) -> None:
    where = lambda model: "other" if model is Worker else "default"  # noqa: E731
    monkeypatch.setattr(checks, "router", SimpleNamespace(db_for_write=where))
    monkeypatch.setattr(checks, "connections", {"default": connections["default"], "other": connections["default"]})
    said = found()
    assert list(said) == ["W002"]
    for word in ("1 of Longhaul's", "longhaul_tools.Worker in 'other'", "DATABASE_ROUTERS"):
        assert word in said["W002"]


def test_times_without_a_zone(settings: Any) -> None:
    settings.USE_TZ = False
    assert "USE_TZ = True" in found()["W007"]


def test_an_agents_module_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"shop.agents": ImportError("No module named 'shap'")}
    monkeypatch.setattr(agents.registry, "broken", lambda: broken)
    said = found()
    assert list(said) == ["E008"]
    for word in ("shop.agents", "ImportError", "'shap'"):
        assert word in said["E008"]


def test_an_agent_without_a_model(cast: Cast, settings: Any) -> None:
    agents.registry.add(Agent(name="mute"))
    assert "'mute'" in found()["E009"]
    settings.LONGHAUL = {"DEFAULT_MODEL": "openai:gpt-5-mini"}
    assert found() == {}


@pytest.mark.parametrize("kind", ["tools", "control"])
def test_an_agent_whose_queue_is_for_others(cast: Cast, kind: str) -> None:
    cast(name="lost", queue=f"longhaul.{kind}")
    assert f"'lost' is 'longhaul.{kind}', the {kind} queue" in found()["E004"]
    cast(name="lost", queue="gpu")
    assert found() == {}


@pytest.mark.django_db
def test_agents_workers_without_a_control_worker() -> None:
    """A gevent worker restores nothing that Redis redelivers, and takes nothing over: without a control worker, nobody does."""
    assert found(databases=["default"]) == {}
    agent = Worker.objects.create(name="a@host", kind="agents", host="host", pid=1, lock_key=1, beat_at=Now())
    assert found() == {}, "it looks into the database only when it is asked to"
    said = found(databases=["default"])
    assert list(said) == ["W006"]
    assert "worker -Q longhaul.control" in said["W006"]
    control = Worker.objects.create(name="c@host", kind="control", host="host", pid=2, lock_key=2, beat_at=Now())
    assert found(databases=["default"]) == {}
    control.delete()
    # A worker of all queues sweeps, too: whoever does holds a lock
    session = presence.connect("sweeps")
    session.execute("SELECT pg_advisory_lock(%s)", (SWEEP_LOCK,))
    assert found(databases=["default"]) == {}
    session.close()
    wait_until(lambda: "W006" in found(databases=["default"]))
    Worker.objects.filter(pk=agent.pk).update(gone_at=Now())
    assert found(databases=["default"]) == {}


@pytest.mark.django_db(transaction=True)
def test_a_pooler_without_sessions(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(**longhaul: Any) -> dict[str, str]:
        settings.LONGHAUL = longhaul
        return found(databases=["default"])

    here = connections["default"].settings_dict
    for alias in ("direct", "elsewhere"):
        monkeypatch.setitem(connections.settings, alias, dict(here))
    assert said() == said(SESSION_LOCKS=True) == {}
    assert "SESSION_LOCKS is False" in said(SESSION_LOCKS=False)["W008"]
    assert "'nowhere', which DATABASES does not have" in said(DIRECT_DATABASE="nowhere")["E004"]
    # What Django lets no test see: tests/workers/test_pooler.py runs the command.
    pooled = {"default"}
    monkeypatch.setattr(checks, "_keeps_sessions", lambda alias: alias not in pooled)
    monkeypatch.setattr(checks, "_place", lambda alias: alias == "elsewhere")
    monkeypatch.setitem(here, "DISABLE_SERVER_SIDE_CURSORS", True)
    for word in ("A pooler", "12 s", '"DIRECT_DATABASE": "direct"', '"SESSION_LOCKS": True'):
        assert word in said()["W008"]
    assert found() == {}, "it looks into the database only when it is asked to"
    assert said(DIRECT_DATABASE="direct") == said(SESSION_LOCKS=True) == {}
    assert "'elsewhere', is another database" in said(DIRECT_DATABASE="elsewhere")["E011"]
    monkeypatch.setitem(here, "DISABLE_SERVER_SIDE_CURSORS", False)
    assert "DISABLE_SERVER_SIDE_CURSORS" in said(DIRECT_DATABASE="direct")["W008"]
    assert said(SESSION_LOCKS=True) == {}
    monkeypatch.setitem(here, "DISABLE_SERVER_SIDE_CURSORS", True)
    pooled.add("direct")
    assert "('direct')" in said(DIRECT_DATABASE="direct")["W008"]


def test_streams_that_keep_a_thread_for_each_reader(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told from the text of asgi.py, which is not run."""
    monkeypatch.syspath_prepend(str(tmp_path))
    home = tmp_path / "hosts_project"
    home.mkdir()
    (home / "__init__.py").touch()
    (home / "urls.py").write_text("from agents_project.urls import urlpatterns as urlpatterns")
    del settings.ASGI_APPLICATION  # startproject makes the file, and no setting
    settings.ROOT_URLCONF = "hosts_project.urls"
    assert found() == {}, "it is served by WSGI alone"
    (home / "asgi.py").write_text("application = get_asgi_application()\nraise SystemExit")
    for word in ("hosts_project.asgi", "a thread for each", "with_streams(get_asgi_application())"):
        assert word in found()["W009"]
    settings.ASGI_APPLICATION = "hosts_project.asgi.application"
    assert list(found()) == ["W009"]
    (home / "asgi.py").write_text("application = with_streams(get_asgi_application())")
    assert found() == {}
    (home / "asgi.py").write_text("application = get_asgi_application()")
    (home / "urls.py").write_text("urlpatterns = []")
    settings.ROOT_URLCONF = "hosts_project.nothing_of_longhauls"
    (home / "nothing_of_longhauls.py").write_text("urlpatterns = []")
    assert found() == {}


@pytest.mark.django_db(transaction=True)
def test_a_database_that_is_not_migrated_yet_is_no_reason_to_warn() -> None:
    """`migrate` itself runs these checks."""
    options = connections["default"].settings_dict["OPTIONS"]
    connections["default"].close()
    connections["default"].settings_dict["OPTIONS"] = {**options, "options": "-c search_path=pg_temp"}
    try:
        assert found(databases=["default"]) == {}
    finally:
        connections["default"].close()
        connections["default"].settings_dict["OPTIONS"] = options
