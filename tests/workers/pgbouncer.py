"""PgBouncer in transaction mode, before the Postgres of the tests: Debian's, in a folder of its own, on a unix socket."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

from agents_project.processes import die_with_parent
from tests.programs import PGBOUNCER

PORT = 6432  # the socket's name ends so; nothing listens there but in this folder

CONFIGURATION = """
[databases]
* = {server}

[pgbouncer]
listen_addr =
listen_port = {port}
unix_socket_dir = {folder}
auth_type = any
admin_users = {admin}
pool_mode = transaction
default_pool_size = {size}
max_client_conn = 500
log_connections = 0
log_disconnections = 0
"""


class PgBouncer:
    """One that the test may kill, stop and start again. `server` is how psycopg reaches Postgres."""

    def __init__(self, server: Mapping[str, Any], *, size: int = 8) -> None:
        assert PGBOUNCER is not None
        self.folder = Path(tempfile.mkdtemp(prefix="longhaul-pgbouncer-", dir="/tmp"))  # a socket's path must be short
        self._user = _not_root(str(server.get("host") or ""))
        names = {"host": "host", "port": "port", "user": "user", "password": "password"}
        said = [f"{name}='{server[key]}'" for key, name in names.items() if server.get(key)]
        self._superuser = str(server.get("user") or "postgres")
        text = CONFIGURATION.format(
            server=" ".join(said), port=PORT, folder=self.folder, size=size, admin=self._superuser
        )
        (self.folder / "pgbouncer.ini").write_text(text)
        if self._user is not None:
            for path in (self.folder, self.folder / "pgbouncer.ini"):
                os.chown(path, self._user.pw_uid, self._user.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str) -> str:
        return f"postgresql://{quote(self._superuser)}@/{quote(database)}?host={quote(str(self.folder), safe='')}&port={PORT}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        user = self._user
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(PGBOUNCER), str(self.folder / "pgbouncer.ini")],
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=None if user is None else user.pw_uid,
                group=None if user is None else user.pw_gid,
                extra_groups=None if user is None else [],
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        until = time.monotonic() + 20
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, self.said()
                assert time.monotonic() < until, self.said()
                time.sleep(0.05)  # between two tries

    def admin(self, command: str) -> None:
        """Say this on its console (PAUSE, RESUME), and wait for the answer."""
        with psycopg.connect(self.url("pgbouncer"), autocommit=True) as console:
            answer = console.pgconn.exec_(command.encode())  # the console knows simple queries only
            assert answer.status == psycopg.pq.ExecStatus.COMMAND_OK, answer.error_message

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """With every connection through it. What it leaves behind is its socket."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for left in self.folder.glob(".s.PGSQL.*"):
            left.unlink()

    def end(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
        self.kill()
        shutil.rmtree(self.folder)

    def said(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


def _not_root(host: str) -> pwd.struct_passwd | None:
    """Return whom it runs as: None for us; when we are root, who may enter the folder of Postgres' socket."""
    if os.geteuid() != 0:
        return None
    owner = Path(host).stat().st_uid if host.startswith("/") else 0
    return pwd.getpwuid(owner) if owner else pwd.getpwnam("nobody")
