"""What a container's health check runs: does the process in here do its work?

    python -m agents_project.probe web|flower               it answers over HTTP
    python -m agents_project.probe agents|tools|control     a worker of this kind on this host is present

Exit status 0, or 1 with a line that says why; `docker inspect` shows the line. Neither Django nor Celery is imported: a
check costs a fifth of a second, where `celery inspect ping` takes two and asks every worker.

A worker is present while it beats in Postgres. So all workers are unhealthy while Postgres is away, which is true, and no
reason to restart them: they go on by themselves when it is back.

The time after which a worker counts as silent is that of PRESENCE_TTL_SECONDS by default, 12 s. It is fixed here: the key
stands in Django's settings, which are not read, and has no variable in the environment. A project that raises the key is told
of a silent worker sooner by this check than by the watcher.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
from datetime import timedelta

# Each kind of web server: the variable with its port, the usual one, and the path that asks nobody else.
PAGES = {"web": ("PORT", 8000, "/healthz"), "flower": ("FLOWER_PORT", 5555, "/healthcheck")}
WORKERS = ("agents", "tools", "control")
WAIT = timedelta(seconds=3)  # for any answer; the check as a whole stays below the 10 s that Docker gives it
SILENCE = timedelta(seconds=12)  # PRESENCE_TTL_SECONDS as it is by default: a worker beats every 2 s

# A container's host name is its own, so another replica's worker does not count. A prefork child has a parent, which counts.
_BEATS = """
SELECT extract(epoch FROM min(longhaul_now() - beat_at))::float FROM longhaul_tools_worker
WHERE host = %s AND kind = %s AND parent_id IS NULL AND gone_at IS NULL
"""


class Unhealthy(Exception):
    """The process does not do its work; the text says why."""


def answers(name: str) -> str:
    """Ask the web server of this name for its page. Raises Unhealthy."""
    variable, usual, path = PAGES[name]
    port, patience = int(os.environ.get(variable) or usual), WAIT.total_seconds()
    asked: http.client.HTTPConnection
    if name == "web" and os.environ.get("LONGHAUL_HTTPS") == "1":  # it speaks TLS itself
        import ssl

        context = ssl._create_unverified_context()  # noqa: S323 (its certificate names another host than this one)
        asked = http.client.HTTPSConnection("127.0.0.1", port, timeout=patience, context=context)
    else:
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=patience)
    try:
        asked.request("GET", path)
        status = asked.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise Unhealthy(f"{name} does not answer ({type(error).__name__})") from None
    finally:
        asked.close()
    if status != http.HTTPStatus.OK:
        raise Unhealthy(f"{name} answers {status}")
    return f"{name} answers"


def beats(kind: str) -> str:
    """Look whether a worker of this kind on this host is present. Raises Unhealthy."""
    import psycopg
    import psycopg.errors

    url = os.environ.get("DATABASE_URL")
    if not url:
        raise Unhealthy("DATABASE_URL is not set")
    seconds = int(WAIT.total_seconds())
    try:
        with psycopg.connect(
            url,
            autocommit=True,
            connect_timeout=seconds,
            tcp_user_timeout=seconds * 1000,
            application_name="longhaul probe",
        ) as session:
            [silent] = session.execute(_BEATS, (socket.gethostname(), kind)).fetchone() or [None]
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedFunction):
        raise Unhealthy("the database has no tables of Longhaul's: run migrate") from None
    except psycopg.Error as error:
        raise Unhealthy(f"Postgres does not answer ({type(error).__name__})") from None
    if silent is None:
        raise Unhealthy(f"no {kind} worker is present on {socket.gethostname()}")
    if silent > SILENCE.total_seconds():
        raise Unhealthy(f"the {kind} worker on {socket.gethostname()} is silent since {silent:.0f} s")
    return f"the {kind} worker is present"


def main(arguments: list[str]) -> int:
    [name] = arguments if len(arguments) == 1 else [""]
    if name not in (*PAGES, *WORKERS):
        print(f"usage: python -m agents_project.probe {'|'.join((*PAGES, *WORKERS))}", file=sys.stderr)
        return 2
    try:
        print(answers(name) if name in PAGES else beats(name))
    except Unhealthy as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
