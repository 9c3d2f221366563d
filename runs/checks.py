"""System checks of Longhaul: what a deployment would otherwise learn from a run that sticks.

    E001  a key of LONGHAUL that does not exist        W001  a leg or a call may outlast the broker's patience
    E002  a value of a wrong kind                      W002  Longhaul's rows in another database than `default`
    E003  LONGHAUL is not a dict                       W003  settings of Celery that reach Longhaul's tasks
    E004  values that contradict one another           W004  a broker connection that may hang, or lose what it is given
    E005  a database that is not Postgres              W005  late acknowledgement set for all tasks
    E006  a price that cannot be read                  W006  agents workers, and nobody who sweeps (`--database default`)
    E007  ACCESS names no policy                        W007  USE_TZ is off
    E008  an agents.py that cannot be imported          W008  a pooler without sessions (`--database default`)
    E009  an agent without a model                     W009  streams that keep a thread for each reader
    E010  Celery does not take Longhaul's messages     W010  a broker over TLS that may be anybody
    E011  DIRECT_DATABASE is another database (`--database default`)
    E012  a model's limits that cannot be read

Each has a hint that says what to change.
"""

from __future__ import annotations

import difflib
import importlib.util
import ssl
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from celery import current_app
from django.apps import AppConfig, apps
from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.db import DatabaseError, connections, router
from django.urls import NoReverseMatch, reverse
from django.utils.module_loading import import_string

from runs import quotas
from runs.conf import KEYS, settings
from tools.envelope import ATTRIBUTES, Envelope
from tools.queues import AMQP, broker_url
from tools.queues import transport as transport_of

SECTION = "longhaul"
REDIS = ("redis", "rediss", "sentinel", "valkey", "valkeys")
ACKNOWLEDGED_AT_ONCE = 100  # the least that is worth running a gevent worker for
VISIBILITY_TIMEOUT = timedelta(hours=1)  # of kombu's Redis transport, when nothing is said
CONSUMER_TIMEOUT = timedelta(minutes=30)  # of RabbitMQ, when nothing is said

Configs = Sequence[AppConfig] | None


def _given() -> Mapping[str, Any]:
    given = getattr(django_settings, "LONGHAUL", {})
    return given if isinstance(given, Mapping) else {}


@register(SECTION)
def check_keys(app_configs: Configs, **_: Any) -> list[CheckMessage]:
    """Every key exists, and its value is of the right kind."""
    given = getattr(django_settings, "LONGHAUL", {})
    if not isinstance(given, Mapping):
        return [
            Error(
                f"LONGHAUL is a {type(given).__name__}, not a dict.",
                hint='LONGHAUL = {"DEFAULT_MODEL": "openai:gpt-5-mini"}, or {} for the defaults.',
                id="longhaul.E003",
            )
        ]
    found: list[CheckMessage] = []
    for name, value in given.items():
        if name not in KEYS:
            near = difflib.get_close_matches(str(name).upper(), KEYS, n=1, cutoff=0.6)
            hint = f"Did you mean {near[0]}?" if near else f"The keys are: {', '.join(sorted(KEYS))}."
            found.append(Error(f"LONGHAUL has no key {name!r}.", hint=hint, id="longhaul.E001"))
        elif problem := KEYS[name].problem(value):
            hint = f"Leave it out for the default, {KEYS[name].default!r}."
            found.append(Error(f"LONGHAUL[{name!r}] {problem}.", hint=hint, id="longhaul.E002"))
    limits = _model_limits(given.get("MODEL_LIMITS"))
    return [*found, *_prices(given.get("PRICES")), *limits, *_access(given.get("ACCESS"))]


def _prices(prices: Any) -> Iterator[CheckMessage]:
    if not isinstance(prices, Mapping):
        return  # a wrong type was told above
    for model, price in prices.items():
        known = isinstance(price, Mapping) and set(price) <= {"input", "output"} and price
        if not known or not all(_is_price(each) for each in price.values()):
            yield Error(
                f"LONGHAUL['PRICES'][{model!r}] is not a price: {price!r}.",
                hint='Say what a million tokens cost: {"gpt-5-mini": {"input": 0.25, "output": 2.0}}.',
                id="longhaul.E006",
            )


def _model_limits(limits: Any) -> Iterator[CheckMessage]:
    if not isinstance(limits, Mapping):
        return  # a wrong type was told above
    for model, said in limits.items():
        if not isinstance(model, str) or not all(model.partition(":")[::2]):
            problem = "names no model: write it as 'provider:model', or as a pattern like 'openai:*'"
        elif not isinstance(said, Mapping) or not said:
            problem = f"is not a dict of limits: {said!r}"
        elif wrong := [text for name, value in said.items() if (text := quotas.problem(name, value))]:
            problem = f"is wrong: {wrong[0]}"
        else:
            continue
        yield Error(
            f"LONGHAUL['MODEL_LIMITS'][{model!r}] {problem}.",
            hint='Say what all workers together may do: {"openai:gpt-5-mini": {"requests_per_minute": 500,'
            ' "tokens_per_minute": 200_000, "max_concurrency": 50}}.',
            id="longhaul.E012",
        )


def _is_price(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _access(access: Any) -> Iterator[CheckMessage]:
    if not isinstance(access, str | type) or not access:
        return  # a wrong type was told above
    try:
        found = import_string(access) if isinstance(access, str) else access
    except ImportError as error:
        problem = f"which is no class: {error}"
    else:
        missing = [method for method in ("visible", "may") if not callable(getattr(found, method, None))]
        if not isinstance(found, type):
            problem = f"which is no class: it is a {type(found).__name__}"
        elif missing:
            problem = f"which has no method {' and no method '.join(missing)}"
        else:
            return
    yield Error(
        f"LONGHAUL['ACCESS'] names {access!r}, {problem}.",
        hint="Name a policy class, like threads.access.Policy, by its dotted path, or leave ACCESS out for the default.",
        id="longhaul.E007",
    )


@register(SECTION)
def check_combinations(app_configs: Configs, **_: Any) -> list[CheckMessage]:
    """The values fit one another."""
    now = settings()
    found: list[CheckMessage] = []

    def contradicts(message: str, hint: str) -> None:
        found.append(Error(message, hint=hint, id="longhaul.E004"))

    if now.model_silence > now.model_timeout:
        contradicts(
            f"LONGHAUL: MODEL_SILENCE_SECONDS ({_seconds(now.model_silence)}) is more than MODEL_TIMEOUT_SECONDS"
            f" ({_seconds(now.model_timeout)}), so it never counts.",
            "The silence is the longest pause between two chunks of one model call; the timeout bounds all of it.",
        )
    queues = {"AGENTS_QUEUE": now.agents_queue, "TOOLS_QUEUE": now.tools_queue, "CONTROL_QUEUE": now.control_queue}
    for name, queue in queues.items():
        same = [other for other, its in queues.items() if its == queue and other > name]
        if same:
            contradicts(
                f"LONGHAUL: {name} and {same[0]} are the same queue, {queue!r}.",
                "Give each a queue of its own: tools would run between the streams of a gevent worker.",
            )
    if now.direct_database is not None and now.direct_database not in django_settings.DATABASES:
        contradicts(
            f"LONGHAUL: DIRECT_DATABASE is {now.direct_database!r}, which DATABASES does not have.",
            "Add it there: the settings of `default`, but with the host and port of Postgres itself.",
        )
    return found


@register(SECTION)
def check_broker(app_configs: Configs, **_: Any) -> list[CheckMessage]:
    """A leg ends long before the broker would take its message for lost; Celery keeps no results."""
    conf = current_app.conf
    found: list[CheckMessage] = []
    options = conf.broker_transport_options or {}
    transport = transport_of(current_app)
    limit, key = _patience(transport, options)
    longest, whose = _longest_leg()
    if limit is not None and longest > limit / 2:
        found.append(
            Warning(
                f"A leg may take {_seconds(longest)} s ({whose}), and the broker delivers its message again after"
                f" {_seconds(limit)} s ({key}).",
                hint=f"Raise {key} to at least {_seconds(longest * 2)}, or lower LEG_BUDGET_SECONDS or"
                " MODEL_TIMEOUT_SECONDS: a leg's message is acknowledged at its end, and has to wait in a queue before.",
                id="longhaul.W001",
            )
        )
    call, tool = _longest_call()
    if limit is not None and call > limit / 2:
        found.append(
            Warning(
                f"A call of the tool {tool!r} may take {_seconds(call)} s (its timeout_seconds), and the broker delivers its"
                f" message again after {_seconds(limit)} s ({key}).",
                hint=f"Raise {key} to at least {_seconds(call * 2)}, or let the tool be deferred: give the work to somebody"
                " else, and the result comes from there. The call itself is not disturbed, and does not run twice; on"
                " RabbitMQ its worker loses its connection and all that it had been given comes back.",
                id="longhaul.W001",
            )
        )
    if transport in REDIS and not options.get("socket_timeout"):
        found.append(
            Warning(
                "The connection to Redis has no time limit.",
                hint="Without one a publish to a Redis that hangs blocks for ever: set CELERY_BROKER_TRANSPORT_OPTIONS ="
                ' {"socket_timeout": 10, "socket_connect_timeout": 10, "socket_keepalive": True, ...}.',
                id="longhaul.W004",
            )
        )
    if transport in REDIS and (options.get("max_connections") or 10) < ACKNOWLEDGED_AT_ONCE:
        found.append(
            Warning(
                f"Celery has {options.get('max_connections') or 10} connections to Redis for a worker's acknowledgements.",
                hint="A gevent worker acknowledges many messages at once, each on a connection of its own; a message that"
                " gets none keeps its place in the worker until the worker ends: set CELERY_BROKER_TRANSPORT_OPTIONS ="
                ' {"max_connections": 1000, ...}. They are opened when they are needed.',
                id="longhaul.W004",
            )
        )
    if transport == "rediss" and not _verified(conf):
        found.append(
            Warning(
                "Celery speaks TLS to Redis, and believes whoever answers.",
                hint="kombu asks for no certificate where the URL says nothing of one: add"
                " ?ssl_cert_reqs=required to the broker's URL, and &ssl_ca_certs=/path for a certificate of a house's own.",
                id="longhaul.W010",
            )
        )
    if conf.task_acks_late:
        found.append(
            Warning(
                "Celery acknowledges all tasks late (task_acks_late).",
                hint="Longhaul's tasks say so for themselves. Set for all, every task of yours runs again when its worker"
                " dies: leave it out, unless all of them may run twice.",
                id="longhaul.W005",
            )
        )
    return found


@register(SECTION)
def check_tasks(app_configs: Configs, **_: Any) -> list[CheckMessage]:
    """Celery takes Longhaul's messages, and its tasks are what they say."""
    conf = current_app.conf
    found: list[CheckMessage] = []
    if not {"json", "application/json"} & set(conf.accept_content):
        found.append(
            Error(
                f"Celery's workers accept {', '.join(sorted(conf.accept_content)) or 'nothing'}, and not json.",
                hint='Longhaul\'s messages are JSON: add "json" to CELERY_ACCEPT_CONTENT.',
                id="longhaul.E010",
            )
        )
    now = settings()
    missing = [name for name in (now.agents_queue, now.tools_queue, now.control_queue) if name not in _queues(conf)]
    if not conf.task_create_missing_queues and missing:
        found.append(
            Error(
                f"Celery knows no queue {', '.join(map(repr, missing))}, and makes none that it does not know.",
                hint="Add them to CELERY_TASK_QUEUES, or leave CELERY_TASK_CREATE_MISSING_QUEUES out.",
                id="longhaul.E010",
            )
        )
    for name, (attribute, value) in _annotated():
        found.append(
            Warning(
                f"Celery's settings make {attribute} of {name} {value!r}.",
                hint="A leg is bounded by its run, a tool by its own timeout, and both are safe to run again: let"
                " CELERY_TASK_ANNOTATIONS name your own tasks, and not '*'.",
                id="longhaul.W003",
            )
        )
    return found


def _queues(conf: Any) -> set[str]:
    """Return the names of the queues that the host's settings define: a list of kombu's queues, or a dict by name."""
    defined = conf.task_queues or ()
    return set(defined) if isinstance(defined, Mapping) else {queue.name for queue in defined}


def _annotated() -> Iterator[tuple[str, tuple[str, Any]]]:
    """Yield what the host's settings changed of the tasks that say for themselves what they need."""
    for name, task in sorted(current_app.tasks.items()):
        if isinstance(task, Envelope):
            for attribute in ATTRIBUTES:
                value = getattr(task, attribute)
                if value != getattr(Envelope, attribute):
                    yield name, (attribute, value)


def _patience(transport: str, options: Mapping[str, Any]) -> tuple[timedelta | None, str]:
    """Return how long the broker waits for an acknowledgement, None for unknown, and the setting that says so."""
    if transport in REDIS:
        said = options.get("visibility_timeout")
        return VISIBILITY_TIMEOUT if said is None else timedelta(seconds=float(said)), "visibility_timeout"
    if transport in AMQP:
        return CONSUMER_TIMEOUT, "RabbitMQ's consumer_timeout"
    return None, ""


def _longest_leg() -> tuple[timedelta, str]:
    """Return how long a leg may take, and what says so: an agent may have a longer budget than the settings."""
    from runs.agents import registry

    budget, whose = settings().leg_budget, "LEG_BUDGET_SECONDS"
    for agent in registry.all().values():
        own = timedelta(seconds=agent.limits.get("leg_budget_seconds") or 0)
        if own > budget:
            budget, whose = own, f"leg_budget_seconds of agent {agent.name!r}"
    return budget + settings().model_timeout, f"{whose} + MODEL_TIMEOUT_SECONDS"


def _longest_call() -> tuple[timedelta, str]:
    """Return how long a call may keep its message, and of which tool. The message of a deferred one goes at once."""
    from runs.agents import registry
    from tools.tasks import GRACE_SECONDS

    tools = [tool for agent in registry.all().values() for tool in agent.tools_by_name.values() if not tool.deferred]
    longest = max(((tool.timeout, tool.name) for tool in tools), default=(timedelta(), ""))
    return longest[0] + timedelta(seconds=GRACE_SECONDS), longest[1]


def _verified(conf: Any) -> bool:
    """Return whether the certificate of a Redis over TLS is looked at.

    What is said of TLS, in the URL or in broker_use_ssl, goes to redis-py, which looks unless it is told not to. Where
    nothing is said, kombu tells it not to.
    """
    said = {
        name: value for name, value in parse_qsl(urlsplit(broker_url(current_app)).query) if name.startswith("ssl_")
    }
    if isinstance(conf.broker_use_ssl, Mapping):
        said |= conf.broker_use_ssl
    asked = said.get("ssl_cert_reqs", "required")
    return bool(said) and asked not in ("none", "CERT_NONE", None, ssl.CERT_NONE)


def _seconds(time: timedelta) -> str:
    return f"{time.total_seconds():g}"


@register(SECTION)
def check_databases(app_configs: Configs, **_: Any) -> list[CheckMessage]:
    """Longhaul's rows stand together in Postgres."""
    found: list[CheckMessage] = []
    aliases: dict[str, str] = {}
    for label in ("longhaul_threads", "longhaul_tools", "longhaul_runs"):
        if not apps.is_installed(label.removeprefix("longhaul_")):
            continue
        for model in apps.get_app_config(label).get_models():
            aliases[model._meta.label] = router.db_for_write(model)
    for alias in sorted(set(aliases.values())):
        vendor = connections[alias].vendor
        if vendor != "postgresql":
            found.append(
                Error(
                    f"Longhaul's rows are in the database {alias!r}, which is {vendor}.",
                    hint="Longhaul's transitions are functions in Postgres; no other database has them. Set its ENGINE to"
                    ' "django.db.backends.postgresql".',
                    id="longhaul.E005",
                )
            )
    elsewhere = {label: alias for label, alias in aliases.items() if alias != "default"}
    if elsewhere:
        label, alias = min(elsewhere.items())
        found.append(
            Warning(
                f"A router puts {len(elsewhere)} of Longhaul's {len(aliases)} tables in another database than 'default'"
                f" ({label} in {alias!r}).",
                hint="What joins one transaction ends there: a run started in a transaction of yours may outlive its"
                " rollback, and an atomic tool's effect in 'default' does not commit with its settlement. Longhaul's SQL"
                " functions use 'default'; let DATABASE_ROUTERS leave its apps alone.",
                id="longhaul.W002",
            )
        )
    if not django_settings.USE_TZ:
        found.append(
            Warning(
                "USE_TZ is off.",
                hint="Longhaul compares moments that Postgres gives with a time zone: set USE_TZ = True.",
                id="longhaul.W007",
            )
        )
    return found


@register(SECTION)
def check_streams(app_configs: Configs, **_: Any) -> list[CheckMessage]:
    """Where the API is and an asgi.py, that one has `with_streams`. It is read, not run: who knows what it starts."""
    try:
        reverse("longhaul:runs")
    except (NoReverseMatch, ImportError):
        return []
    named = getattr(django_settings, "ASGI_APPLICATION", None) or ""
    module = str(named).rpartition(".")[0] or f"{django_settings.ROOT_URLCONF.rpartition('.')[0]}.asgi"
    try:
        found = importlib.util.find_spec(module)
        source = Path(found.origin).read_text() if found is not None and found.origin else None
    except (ImportError, OSError, ValueError):
        source = None
    if source is None or "with_streams" in source:
        return []  # a project that speaks WSGI alone streams nothing
    return [
        Warning(
            f"{module} leaves streams to Django's own handler, which keeps a thread for each that is open, and asks the"
            " database for each reader by itself: a hundred readers are a hundred threads.",
            hint="from runs import with_streams; application = with_streams(get_asgi_application()). Where that is done"
            " elsewhere, or only WSGI is served, SILENCED_SYSTEM_CHECKS = ['longhaul.W009'].",
            id="longhaul.W009",
        )
    ]


@register(SECTION)
def check_agents(app_configs: Configs, **_: Any) -> list[CheckMessage]:
    """Every `agents.py` can be imported, and every agent has a model and a queue that is for agents."""
    from runs.agents import registry

    found: list[CheckMessage] = [
        Error(
            f"{module} cannot be imported: {type(error).__name__}: {error}",
            hint="Its agents are unknown until it can; those of other modules work.",
            id="longhaul.E008",
        )
        for module, error in registry.broken().items()
    ]
    found += [
        Error(
            f"The agent {agent.name!r} has no model.",
            hint='Give it one, like Agent(model="openai:gpt-5-mini"), or set LONGHAUL["DEFAULT_MODEL"].',
            id="longhaul.E009",
        )
        for agent in registry.all().values()
        if not (agent.model or settings().default_model)
    ]
    theirs = {settings().tools_queue: "tools", settings().control_queue: "control"}
    found += [
        Error(
            f"The queue of the agent {agent.name!r} is {agent.queue!r}, the {theirs[agent.queue]} queue.",
            hint="Give it another name, or none: legs would run in a worker that has no place for them.",
            id="longhaul.E004",
        )
        for agent in registry.all().values()
        if agent.queue in theirs
    ]
    return found


@register(Tags.database)
def check_workers(app_configs: Configs, databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """Where agents workers are, somebody sweeps. Looks into the database, so it runs with `check --database default`."""
    if "default" not in (databases or ()):
        return []
    from runs import explain
    from threads import clock

    try:
        now = clock.now()
        if not explain.present("agents", now) or explain.swept(now):
            return []
    except DatabaseError:
        return []  # not migrated yet
    return [
        Warning(
            "Agents workers are present, and no control worker is.",
            hint="Nobody sends lost messages again, takes runs over from workers that died, or restores what Redis"
            f" redelivers (a gevent worker never does). Start one: {explain.start('control')}",
            id="longhaul.W006",
        )
    ]


@register(Tags.database)
def check_pooler(app_configs: Configs, databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """A session of Postgres is the process's that opened it. Looks into the database, as the check of the workers does."""
    now = settings()
    direct = now.direct_database or "default"
    aliases = {"default", direct}
    if "default" not in (databases or ()) or not aliases <= set(django_settings.DATABASES):
        return []
    if {connections[alias].vendor for alias in aliases} != {"postgresql"}:
        return []
    try:
        pooled = {alias: not _keeps_sessions(alias) for alias in aliases}
        same = direct == "default" or _place("default") == _place(direct)
    except DatabaseError:
        return []  # it is away, as the other checks of it say
    found: list[CheckMessage] = []
    if not same:
        found.append(
            Error(
                f"LONGHAUL: DIRECT_DATABASE, {direct!r}, is another database than 'default'.",
                hint="It is another way to the same one: workers that show themselves there are seen by nobody here.",
                id="longhaul.E011",
            )
        )
    sessions = not pooled[direct] if now.session_locks is None else now.session_locks
    if not sessions:
        ttl = _seconds(now.presence_ttl)
        between = "A pooler stands between" if pooled[direct] else "LONGHAUL: SESSION_LOCKS is False for"
        found.append(
            Warning(
                f"{between} Longhaul and its Postgres ({direct!r}), so a worker that dies is missed after {ttl} s"
                " (PRESENCE_TTL_SECONDS), not at once.",
                hint="A lock that shows that a worker lives needs a session. Give DATABASES another entry, with the address"
                ' of Postgres itself, and name it: LONGHAUL = {"DIRECT_DATABASE": "direct"}; it costs a connection or two a'
                ' worker process. Of a pooler that keeps sessions say so: LONGHAUL = {"SESSION_LOCKS": True}.',
                id="longhaul.W008",
            )
        )
    if pooled["default"] and now.session_locks is not True:
        database = django_settings.DATABASES["default"]
        if not database.get("DISABLE_SERVER_SIDE_CURSORS"):
            found.append(
                Warning(
                    "Behind a pooler without sessions Django's server-side cursors are lost between two reads.",
                    hint='Set DATABASES["default"]["DISABLE_SERVER_SIDE_CURSORS"] = True.',
                    id="longhaul.W008",
                )
            )
    return found


def _keeps_sessions(alias: str) -> bool:
    from tools.presence import has_session

    connections[alias].ensure_connection()
    with connections[alias].wrap_database_errors:
        return has_session(connections[alias].connection)


def _place(alias: str) -> object:
    """Return what tells a database from others, whatever way leads to it: a replica is another one."""
    with connections[alias].cursor() as cursor:
        cursor.execute(
            "SELECT oid, pg_postmaster_start_time(), pg_is_in_recovery() FROM pg_database WHERE datname = current_database()"
        )
        return cursor.fetchone()
