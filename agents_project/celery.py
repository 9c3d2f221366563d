"""The Celery app of the project. Its settings are the CELERY_ ones of `settings.py`; its tasks stand in the apps."""

from __future__ import annotations

import logging
import os
from typing import Any

from celery import Celery
from celery.signals import beat_init, celeryd_init, setup_logging, task_postrun, task_prerun

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "agents_project.settings")

app = Celery("agents_project")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@celeryd_init.connect
@beat_init.connect
def have_servers(**_: Any) -> None:
    """A worker or a beat started by hand, without URLs in its environment, joins the embedded servers or starts them."""
    from agents_project import embedded

    embedded.ensure()


@celeryd_init.connect
def show_no_password(**_: Any) -> None:
    """Answer `celery inspect conf`, and so Flower's page of a worker, without passwords.

    Celery masks the one in `broker_url`, but not under the name that the namespace gives it here, CELERY_BROKER_URL.
    """
    from celery.worker.control import Panel

    from threads.redaction import redact_within

    shown = Panel.data["conf"]
    Panel.data["conf"] = lambda state, **asked: redact_within(shown(state, **asked))


@setup_logging.connect
def leave_logging_alone(loglevel: int | None = None, **_: Any) -> None:
    """Keep to LOGGING: Celery's own handlers write in a form of their own. `-l` may make a process say more than LOG_LEVEL."""
    import django

    django.setup()  # beat comes here before it has read the settings
    root = logging.getLogger()
    if loglevel and loglevel < root.level:
        root.setLevel(loglevel)
    if app.conf.worker_redirect_stdouts:
        app.log.redirect_stdouts(
            app.conf.worker_redirect_stdouts_level
        )  # as Celery does where nobody is connected here


@task_prerun.connect
@task_postrun.connect
def drop_broken_connections(**_: Any) -> None:
    """Close what an outage of Postgres broke.

    CELERY_DB_REUSE_MAX takes the place of both closes that Celery makes around a task, so also of the one that would
    notice a broken connection.
    """
    from django.db import connections

    for connection in connections.all(initialized_only=True):
        if connection.errors_occurred and not connection.in_atomic_block and not connection.is_usable():
            connection.close()
