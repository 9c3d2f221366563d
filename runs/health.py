"""Could a run that is started now be served: the data of /readyz.

Nothing here waits longer than two seconds, whatever hangs, and no probe of a kind begins while one is under way: a storm of
requests costs one look a second. No answer holds an address, a password or the text of an error, which may carry both.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import psycopg
import psycopg.errors
from amqp.exceptions import AMQPError
from celery._state import get_current_app
from django.db import connection
from kombu.exceptions import KombuError

from runs.conf import settings
from runs.sweep import SOMEBODY_SWEEPS, SWEEP_LOCK, SWEPT_WITHIN

logger = logging.getLogger("longhaul.health")

Check = dict[str, Any]  # {"ok": bool, "detail": str} and what a check adds; JSON

WAIT = timedelta(seconds=2)  # for the answer of a server
KEPT = timedelta(seconds=1)  # so long an answer stands for the next one
# A row that is due is moved on within a second. One that is due for longer than this says that nobody moves it.
OVERDUE_LIMIT = timedelta(seconds=30)
KINDS = ("agents", "tools", "control")

_PRESENT = """
SELECT kind, count(*) FROM longhaul_tools_worker
WHERE gone_at IS NULL AND parent_id IS NULL AND beat_at > longhaul_now() - %s GROUP BY kind
"""
# The oldest of: messages to send, runs and calls to take back, runs past their deadline. Each is read from a partial index.
_OVERDUE = """
SELECT greatest(0, extract(epoch FROM longhaul_now() - least(
    (SELECT min(next_publish_at) FROM longhaul_runs_run WHERE status = 'queued'),
    (SELECT min(next_publish_at) FROM longhaul_tools_toolcall WHERE status IN ('requested', 'retrying')),
    (SELECT min(leg_deadline) FROM longhaul_runs_run WHERE status = 'running'),
    (SELECT min(timeout_at) FROM longhaul_tools_toolcall WHERE status = 'running'),
    (SELECT min(deadline) FROM longhaul_runs_run
     WHERE deadline IS NOT NULL AND status IN ('held', 'queued', 'running', 'waiting', 'requires_action'))
)))::float
"""


class Probe:
    """Asks a server in a thread of its own, so that the one who wants to know need not wait for one that hangs."""

    def __init__(self, name: str, ask: Callable[[Any], dict[str, Check]]) -> None:
        self._name = name
        self._ask = ask
        self._changed = threading.Condition()
        self._asking = False
        self._answer: dict[str, Check] | None = None
        self._at = 0.0

    def begin(self) -> None:
        """Ask, unless somebody just did."""
        with self._changed:
            if self._asking or (self._answer is not None and time.monotonic() - self._at < KEPT.total_seconds()):
                return
            self._asking = True
            self._answer = None
        # The current app is that of a thread, so it is looked up in the one that asks.
        threading.Thread(
            target=self._run, args=(get_current_app(),), name=f"longhaul-health-{self._name}", daemon=True
        ).start()

    def _run(self, app: Any) -> None:
        try:
            answer = self._ask(app)
        except Exception as error:
            logger.exception("The %s could not be probed", self._name)
            answer = {self._name: _no(type(error).__name__)}
        with self._changed:
            self._answer, self._at, self._asking = answer, time.monotonic(), False
            self._changed.notify_all()

    def answer(self, until: float) -> dict[str, Check]:
        """Return what was answered before the moment `until` of the monotonic clock."""
        with self._changed:
            self._changed.wait_for(lambda: self._answer is not None, max(0.0, until - time.monotonic()))
            return self._answer or {self._name: _no(f"no answer within {WAIT.total_seconds():g} s")}

    def forget(self) -> None:
        """For tests: let the next one ask anew."""
        with self._changed:
            self._changed.wait_for(lambda: not self._asking, 10)
            self._answer = None


def readiness() -> dict[str, Any]:
    """Return `{"ready": bool, "checks": {name: {"ok": bool, "detail": str, ...}}}` within about two seconds.

    Checks: database, broker; agents, tools, control (with `present`, how many workers); overdue (with `seconds`, by which
    the oldest row is late; None for unknown). `ready` is that all are ok.
    """
    until = time.monotonic() + WAIT.total_seconds()
    for probe in (DATABASE, BROKER):
        probe.begin()
    checks = {**DATABASE.answer(until), **BROKER.answer(until)}
    for kind in KINDS:
        checks.setdefault(kind, {**_no("unknown"), "present": None})
    checks.setdefault("overdue", {**_no("unknown"), "seconds": None})
    return {"ready": all(check["ok"] for check in checks.values()), "checks": checks}


def _yes(detail: str) -> Check:
    return {"ok": True, "detail": detail}


def _no(detail: str) -> Check:
    return {"ok": False, "detail": detail}


def _ask_database(_: Any) -> dict[str, Check]:
    """Look at Postgres over a connection of our own, for the pool may be what is exhausted."""
    parameters = connection.get_connection_params()
    for name in ("cursor_factory", "context", "prepare_threshold", "autocommit"):
        parameters.pop(name, None)
    seconds = int(WAIT.total_seconds())
    bounds: Mapping[str, Any] = {"connect_timeout": seconds, "tcp_user_timeout": seconds * 1000}
    try:
        with psycopg.connect(**{**parameters, **bounds, "application_name": "longhaul health"}) as session:
            session.execute("SELECT set_config('statement_timeout', %s, true)", (f"{seconds * 1000}ms",))
            present = dict(session.execute(_PRESENT, (settings().presence_ttl,)).fetchall())
            [swept] = session.execute(SOMEBODY_SWEEPS, (SWEEP_LOCK, SWEPT_WITHIN)).fetchone() or [False]
            [late] = session.execute(_OVERDUE).fetchone() or [None]
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedFunction, psycopg.errors.UndefinedColumn):
        return {"database": _no("its tables are not those of this version: run migrate")}
    except (psycopg.Error, OSError) as error:
        return {"database": _no(f"away ({type(error).__name__})")}
    return {"database": _yes("answers"), **_workers(present, bool(swept)), "overdue": _lateness(late)}


def _workers(present: Mapping[str, int], swept: bool) -> dict[str, Check]:
    checks = {}
    for kind in KINDS:
        count = present.get(kind, 0)
        if count == 0 and kind == "control" and swept:
            check = _yes("a worker of several kinds sweeps")
        else:
            said = f"{count or 'no'} worker{'' if count == 1 else 's'} present"
            check = _yes(said) if count else _no(said)
        checks[kind] = {**check, "present": count}
    return checks


def _lateness(seconds: float | None) -> Check:
    late = round(seconds or 0.0, 1)
    limit = OVERDUE_LIMIT.total_seconds()
    if late > limit:
        return {**_no(f"the oldest row is late by {late:g} s; {limit:g} s are allowed"), "seconds": late}
    return {**_yes("nothing is late" if late == 0 else f"the oldest row is late by {late:g} s"), "seconds": late}


def _ask_broker(app: Any) -> dict[str, Check]:
    """Connect to the broker, on a connection of our own with short time limits."""
    seconds = WAIT.total_seconds()
    options = dict(app.conf.broker_transport_options or {})
    for name in ("socket_timeout", "socket_connect_timeout"):
        if name in options:
            options[name] = seconds
    made = app.connection_for_write(connect_timeout=seconds, transport_options=options)
    lost: tuple[type[Exception], ...] = (
        KombuError,
        AMQPError,
        OSError,
        *made.connection_errors,
        *made.channel_errors,
    )
    try:
        made.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
        made.default_channel  # noqa: B018 (Redis is asked only now)
    except lost as error:
        return {"broker": _no(f"away ({type(error.__cause__ or error).__name__})")}
    finally:
        made.release()
    return {"broker": _yes("answers")}


DATABASE = Probe("database", _ask_database)
BROKER = Probe("broker", _ask_broker)
