"""Settings of the project: the environment first, embedded servers where it says nothing.

Reading them starts nothing: with DATABASE_URL or REDIS_URL unset they name the sockets of the embedded servers, which
`embedded.ensure()` brings up (manage.py, a worker, asgi.py and the tests call it).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from celery.schedules import crontab
from django.core.exceptions import ImproperlyConfigured

from agents_project import embedded

BASE_DIR = Path(__file__).resolve().parent.parent


def database_from_url(url: str) -> dict[str, Any]:
    """Read `postgresql://user:password@host:port/name?option=value`, as libpq does, as a Django database.

    A socket stands as `?host=/folder` or as a percent-encoded host: `postgresql://user@%2Ffolder/name`. Other options
    go to libpq. Raises ValueError for anything but Postgres.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("postgres", "postgresql"):
        raise ValueError(
            f"DATABASE_URL must begin with postgresql://, for Longhaul needs Postgres; it is {parts.scheme}://"
        )
    options: dict[str, Any] = dict(parse_qsl(parts.query))
    authority = parts.netloc.rpartition("@")[2]
    # A colon inside of [...] belongs to an IPv6 address.
    host, port = authority, ""
    if ":" in authority and not authority.endswith("]"):
        host, _, port = authority.rpartition(":")
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": unquote(parts.path.lstrip("/")) or options.pop("dbname", ""),
        "USER": unquote(parts.username or "") or options.pop("user", ""),
        "PASSWORD": unquote(parts.password or "") or options.pop("password", ""),
        "HOST": options.pop("host", "") or unquote(host).strip("[]"),
        "PORT": options.pop("port", "") or port,
        "OPTIONS": options,
    }


def broker_from_redis(url: str) -> str:
    """Return kombu's form of a redis-py URL: a socket is `redis+socket:///path?virtual_host=0` there."""
    if not url.startswith("unix://"):
        return url
    parts = urlsplit(url)
    return f"redis+socket://{parts.path}?virtual_host={dict(parse_qsl(parts.query)).get('db', '0')}"


def _listed(variable: str) -> list[str]:
    """Read a variable that holds texts with commas between them."""
    return [text.strip() for text in os.environ.get(variable, "").split(",") if text.strip()]


DEBUG = os.environ.get("DJANGO_DEBUG", "") == "1"

_embedded = embedded.urls()
DATABASE_URL = os.environ.get("DATABASE_URL") or _embedded.database_url
REDIS_URL = os.environ.get("REDIS_URL") or _embedded.redis_url
DATABASES = {"default": {**database_from_url(DATABASE_URL), "CONN_MAX_AGE": 0}}

# The one switch of production: people come over HTTPS and nothing else. "proxy": a proxy ends TLS, and always sets
# X-Forwarded-Proto itself. Anybody could set that header where no proxy overwrites it, so it is believed only when told.
_https = os.environ.get("LONGHAUL_HTTPS", "")
if _https not in ("", "0", "1", "proxy"):
    raise ImproperlyConfigured(
        f"LONGHAUL_HTTPS is {_https!r}. It is 1 where web itself speaks TLS, proxy where a proxy before it does, else unset."
    )
HTTPS = _https in ("1", "proxy")

SECRET_KEY = os.environ.get("SECRET_KEY", "")
if not SECRET_KEY:
    # Two machines with keys that each made for itself would refuse one another's sessions, now and then.
    if HTTPS or not (DEBUG or embedded.has_socket(DATABASES["default"]["HOST"])):
        raise ImproperlyConfigured(
            "SECRET_KEY is not set. Give all processes the same: 50 or more random characters, as"
            " `python -c 'import secrets; print(secrets.token_urlsafe(50))'` prints them. Only development, with"
            " DJANGO_DEBUG=1 or on the embedded servers, has one made."
        )
    SECRET_KEY = embedded.secret_key()

# A health check asks from inside, by the machine's own name.
ALLOWED_HOSTS = [*_listed("ALLOWED_HOSTS"), "localhost", "127.0.0.1", "[::1]"]
CSRF_TRUSTED_ORIGINS = _listed("CSRF_TRUSTED_ORIGINS")
SECURE_REFERRER_POLICY = "same-origin"
if HTTPS:
    SECURE_SSL_REDIRECT = SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = True
    SECURE_REDIRECT_EXEMPT = [r"^(healthz|readyz)$"]  # asked over plain HTTP by whoever looks after the container
    SECURE_HSTS_SECONDS = int(os.environ.get("LONGHAUL_HSTS_SECONDS") or 3600)
    SECURE_HSTS_INCLUDE_SUBDOMAINS = SECURE_HSTS_PRELOAD = os.environ.get("LONGHAUL_HSTS_SUBDOMAINS") == "1"
    if not SECURE_HSTS_INCLUDE_SUBDOMAINS:
        # What has a name below this one may be somebody else's, and a browser does not forget for as long as it was told.
        SILENCED_SYSTEM_CHECKS = ["security.W005", "security.W021"]
if _https == "proxy":
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "threads",
    "tools",
    "runs",
    "agents_project.apps.ProjectConfig",
    *(["agents_project.demo"] if (BASE_DIR / "agents_project" / "demo" / "apps.py").exists() else []),
]
MIDDLEWARE = [
    # Not in DEBUG, whose error pages have their scripts and styles in themselves.
    *([] if DEBUG else ["agents_project.headers.for_pages"]),
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "agents_project.urls"
ASGI_APPLICATION = "agents_project.asgi.application"
WSGI_APPLICATION = "agents_project.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
STATIC_URL = "static/"
STATIC_ROOT = Path(os.environ.get("LONGHAUL_STATIC_ROOT") or BASE_DIR / "staticfiles")
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "agents_project.static_storage.NamedByContent"},
}
# After `collectstatic` its folder is served; before it, or with DEBUG, the files are found in the apps, one by one.
WHITENOISE_AUTOREFRESH = WHITENOISE_USE_FINDERS = DEBUG or not STATIC_ROOT.is_dir()
TIME_ZONE = "UTC"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# A prepared call of a function with its arguments sent beside it takes half as long as Django's default, which writes
# them into the text (measured: 52 us against 96). Neither survives a pooler without sessions that knows no prepared
# statements (PgBouncer before 1.21): LONGHAUL_DB_PREPARE=0 there.
if os.environ.get("LONGHAUL_DB_PREPARE") != "0":
    DATABASES["default"]["OPTIONS"] |= {"server_side_binding": True, "prepare_threshold": 5}
# Where DATABASE_URL leads to such a pooler, the address of Postgres itself: a worker that dies is missed at once then.
DIRECT_DATABASE_URL = os.environ.get("DIRECT_DATABASE_URL")
if DIRECT_DATABASE_URL:
    DATABASES["direct"] = {**database_from_url(DIRECT_DATABASE_URL), "TEST": {"MIRROR": "default"}}
# A pooler gives the two reads of one cursor to two sessions.
DATABASES["default"]["DISABLE_SERVER_SIDE_CURSORS"] = bool(
    DIRECT_DATABASE_URL or os.environ.get("LONGHAUL_DB_PREPARE") == "0"
)
# A pool pays where many waiting greenlets or requests share a process (the agents worker, web). In prefork it costs
# more than it saves: Celery closes it after each task.
DB_POOL = os.environ.get("LONGHAUL_DB_POOL") == "1"
if DB_POOL:
    DATABASES["default"]["OPTIONS"]["pool"] = {"min_size": 1, "max_size": 10, "timeout": 10}

CELERY_BROKER_URL = os.environ.get("CELERY_BROKER_URL") or broker_from_redis(REDIS_URL)
# Without a socket timeout a publish to a hung Redis blocks for ever. A gevent worker acknowledges many messages at once,
# each on a connection; one that gets none keeps its place in the worker until the worker ends.
CELERY_BROKER_TRANSPORT_OPTIONS: dict[str, Any] = {}
if CELERY_BROKER_URL.startswith(("redis", "unix", "valkey", "sentinel")):
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "socket_timeout": 10,
        "socket_connect_timeout": 10,
        "socket_keepalive": True,
        "visibility_timeout": 3600,
        "max_connections": 1000,
    }
else:  # RabbitMQ, which has no use for these; Longhaul's messages are confirmed whatever stands here
    CELERY_BROKER_HEARTBEAT = 30  # seconds; a worker whose machine is gone keeps its messages for up to twice as long
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_RESULT_BACKEND = None  # the results are rows; any backend, even an ignored one, costs a third of a task
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TASK_DEFAULT_QUEUE = "longhaul.control"
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
# Flower knows of tasks by these events only; what they cost: `python -m benchmarks.celery_events`.
CELERY_WORKER_SEND_TASK_EVENTS = os.environ.get("LONGHAUL_CELERY_EVENTS") == "1"
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_TIMEZONE = "UTC"
CELERY_BEAT_SCHEDULE = {
    # By the clock and not by an interval: then it comes, however often beat is started anew.
    "longhaul-housekeeping": {
        "task": "longhaul.keep_house",
        "schedule": crontab(minute="17"),
        "options": {"queue": "longhaul.control", "expires": 3600},
    },
}
CELERY_BEAT_SCHEDULER = "celery.beat:Scheduler"  # in memory: a schedule by the clock has nothing to keep in a file
if not DB_POOL:
    CELERY_DB_REUSE_MAX = 1_000_000  # tasks; keeps a prefork child's connection from task to task

# json: an object a line, for machines; line: for people. Both name run, leg and call, and mask secrets: docs/operations.md.
LOG_FORMAT = os.environ.get("LOG_FORMAT") or "line"
if LOG_FORMAT not in ("json", "line"):
    raise ImproperlyConfigured(f"LOG_FORMAT must be json or line; it is {LOG_FORMAT!r}.")
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "json": {"()": "threads.logs.JSONFormatter"},
        "line": {"()": "threads.logs.LineFormatter"},
    },
    "handlers": {
        "console": {"class": "logging.StreamHandler", "formatter": LOG_FORMAT},
        "mail_admins": {"class": "django.utils.log.AdminEmailHandler", "level": "ERROR"},  # to ADMINS, if there are any
    },
    "root": {"handlers": ["console"], "level": os.environ.get("LOG_LEVEL", "WARNING")},
    "loggers": {
        # Handlers of their own would write in a form of their own, what is secret too.
        "django": {"handlers": ["mail_admins"], "level": "INFO"},
        **{name: {"propagate": True} for name in ("django.server", "uvicorn", "celery.task")},
        "multiprocessing": {"handlers": ["console"], "level": "ERROR", "propagate": False},  # the prefork pool's
    },
}
if LOG_FORMAT == "json":
    LOGGING_CONFIG = "threads.logs.configure"  # with Python's warnings
if logging.getLogger("uvicorn.access").handlers:  # uvicorn runs this, and without --no-access-log
    LOGGING["loggers"]["uvicorn.access"] = {"propagate": True}
DEFAULT_EXCEPTION_REPORTER = "threads.redaction.Reporter"

LONGHAUL: dict[str, Any] = {
    "FLOWER_URL": os.environ.get("LONGHAUL_FLOWER_URL") or None,
    "DIRECT_DATABASE": "direct" if DIRECT_DATABASE_URL else None,
}
