"""Processes that this project starts: how one is told from another that got its number, and how none is left behind.

A pid alone proves nothing: the kernel gives it out again. So a process is a pid and the moment it started; what is
recorded with both can be killed later without hitting a stranger.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

_PR_SET_PDEATHSIG = 1
_PROC = Path("/proc")


@dataclass(frozen=True)
class Identity:
    """A process that can be recognised again. `started` is opaque text: equal texts mean the same start."""

    pid: int
    started: str
    command: str

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """Return who runs under `pid` now; None when nobody does (a zombie, dead but not yet reaped, is nobody)."""
        if not _PROC.joinpath("self/stat").exists():  # macOS
            return _identity_by_ps(pid)
        try:
            # The name, in parentheses, may itself contain spaces and parentheses: read from its end.
            fields = _PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()
            command = _PROC.joinpath(str(pid), "cmdline").read_bytes()
        except OSError:
            return None
        if fields[0] in "ZX":
            return None
        return cls(pid, fields[19], os.fsdecode(command.rstrip(b"\0").replace(b"\0", b" ")))

    def alive(self) -> bool:
        """Return whether this very process still runs (a new program in it, by exec, is still this process)."""
        now = Identity.of(self.pid)
        return now is not None and now.started == self.started

    def kill(self, number: signal.Signals) -> None:
        """Send a signal if this very process still runs. Raises PermissionError for another user's process."""
        if self.alive():
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass  # it ended between the look and the kill


def _identity_by_ps(pid: int) -> Identity | None:
    answer = subprocess.run(  # noqa: S603
        ["/bin/ps", "-ww", "-o", "state=,lstart=,command=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split(maxsplit=6)
    if len(answer) < 7 or answer[0].startswith("Z"):
        return None
    return Identity(pid, " ".join(answer[1:6]), answer[6].strip())


def running() -> Iterator[Identity]:
    """Yield every process that this user can see."""
    if _PROC.joinpath("self/stat").exists():
        pids = [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]
    else:
        listing = subprocess.run(["/bin/ps", "-ax", "-o", "pid="], capture_output=True, text=True, check=False)
        pids = [int(word) for word in listing.stdout.split()]
    for pid in pids:
        identity = Identity.of(pid)
        if identity is not None:
            yield identity


def end(
    processes: Sequence[Identity],
    *,
    first: signal.Signals = signal.SIGTERM,
    grace: timedelta = timedelta(seconds=5),
    reap: Mapping[int, subprocess.Popen[bytes]] | None = None,
) -> list[Identity]:
    """Ask the processes to end, kill after `grace` what has not; return what had to be killed.

    `reap` holds our own children by pid, so that they do not stay as zombies.
    """
    for process in processes:
        process.kill(first)
        process.kill(signal.SIGCONT)  # one that was stopped hears nothing else but SIGKILL
    deadline = time.monotonic() + grace.total_seconds()
    left = _wait_gone(processes, deadline, reap or {})
    for process in left:
        process.kill(signal.SIGKILL)
    _wait_gone(left, time.monotonic() + 5, reap or {})
    return left


def _wait_gone(
    processes: Sequence[Identity], deadline: float, reap: Mapping[int, subprocess.Popen[bytes]]
) -> list[Identity]:
    left = list(processes)
    while left:
        for process in left:
            if process.pid in reap:
                reap[process.pid].poll()
        left = [process for process in left if process.alive()]
        if not left or time.monotonic() >= deadline:
            break
        time.sleep(0.01)
    return left


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies. Runs in the child, between fork and exec; Linux only.

    The signal is tied to the thread that forked: start children from a thread that lives as long as they should.
    """
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call above: nobody would send the signal
        os._exit(1)


# Loaded here and not in the child: between fork and exec no lock may be taken that another thread could hold.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Children:
    """The child processes of one supervisor, by name, recorded in a JSON file so that the next start can clean up.

    The file holds `[{"name", "pid", "started", "command"}, ...]` and is replaced as a whole.
    """

    def __init__(self, record: Path) -> None:
        self._record = record
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._identities: dict[str, Identity] = {}

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        output: int | IO[Any] | None = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start `command` in a session of its own, so that Ctrl-C in the terminal reaches only the supervisor.

        `env` is the whole environment (None: ours); `output` takes both stdout and stderr. On Linux the child dies
        with us. Raises OSError when it cannot be started, ValueError when a child of this name still runs.
        """
        if name in self._children and self._children[name].poll() is None:
            raise ValueError(f"{name} is still running; stop it or take another name")
        parent = os.getpid()
        child = subprocess.Popen(  # noqa: S603
            list(command),
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(parent),
        )
        self._children[name] = child
        identity = Identity.of(child.pid)
        if identity is not None:
            # The command as asked for: /proc may still show ours, from before the exec.
            self._identities[name] = Identity(identity.pid, identity.started, " ".join(command))
        self._write()
        return child

    def __getitem__(self, name: str) -> subprocess.Popen[bytes]:
        return self._children[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._children)

    def kill(self, name: str) -> int:
        """SIGKILL the child of this name, wait for its end, forget it; return its pid."""
        child = self._children.pop(name)
        self._identities.pop(name, None)
        child.kill()
        child.wait()
        self._write()
        return child.pid

    def stop_all(self, grace: timedelta = timedelta(seconds=10)) -> list[str]:
        """SIGTERM all, SIGKILL after `grace` what still runs; return the names of those that had to be killed."""
        names = {identity.pid: name for name, identity in self._identities.items()}
        killed = end(
            list(self._identities.values()),
            grace=grace,
            reap={child.pid: child for child in self._children.values()},
        )
        for child in self._children.values():
            child.wait()
        self._children.clear()
        self._identities.clear()
        self._write()
        return [names[identity.pid] for identity in killed]

    def kill_leftovers(self) -> list[Identity]:
        """Kill what an earlier supervisor recorded and left running, and nothing else; return what was killed."""
        try:
            rows = json.loads(self._record.read_text())
            recorded = [Identity(row["pid"], row["started"], row["command"]) for row in rows]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError):
            recorded = []  # half a record: only a crash of the machine leaves one, and that left no process
        leftovers = [identity for identity in recorded if identity.alive()]
        for identity in leftovers:
            identity.kill(signal.SIGKILL)
        _wait_gone(leftovers, time.monotonic() + 5, {})
        self._write()
        return leftovers

    def _write(self) -> None:
        rows = [{"name": name, **asdict(identity)} for name, identity in self._identities.items()]
        draft = self._record.with_name(self._record.name + ".new")
        draft.write_text(json.dumps(rows, indent=1))
        draft.replace(self._record)


def free_port(preferred: int, host: str = "127.0.0.1") -> int:
    """Return `preferred` if nobody listens there, else a port that the system picks; the caller says which it is."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            # As servers do; else a port with connections in TIME_WAIT from the last start would look taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES) or port == 0:
                    raise
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("the system had no free port and did not say so")
