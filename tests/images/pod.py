"""Processes in a folder as their root, as in a container: the nearest that a machine without an engine comes to one.

A *pod* is a network of its own, in which all names of services lead to one loopback, so that each listens on its usual
port. A *room* is a process in it: chroot into the image's folder, a user and a host name of its own, no capability, no
way to get one, and a root that can only be read. What an engine does beyond that - cgroups, so limits; process numbers of
its own; a process 1; images of servers - is not tried.

Needs Linux and root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000

MISSING = next((name for name in ("unshare", "nsenter", "setpriv", "ip") if shutil.which(name) is None), None)
if MISSING is None and os.geteuid() != 0:
    MISSING = "root"
if MISSING is None and subprocess.run(["unshare", "--mount", "--net", "--uts", "true"], capture_output=True).returncode:
    MISSING = "the right to make namespaces"

# What a base image brings and Python does not: the C library, a shell, certificates. Taken from this machine, read-only.
SYSTEM = ("usr", "opt")
LINKS = ("bin", "sbin", "lib", "lib32", "lib64")
ETC = ("passwd", "group", "shadow", "gshadow", "nsswitch.conf", "resolv.conf", "ssl", "ca-certificates", "login.defs",
       "ld.so.conf", "ld.so.conf.d", "default", "pip.conf", "debian_version", "os-release")  # fmt: skip

# $1 the root, $2 ro or rw, $3 host name, $4 a folder for the cache or "", $5 its place; the rest is the command.
_ENTER = """
set -e
root=$1 mode=$2 host=$3 cache=$4 place=$5
shift 5
hostname "$host"
mount --bind "$root" "$root"
for each in usr opt; do
    if [ -d "/$each" ]; then mount --bind "/$each" "$root/$each"; mount -o remount,bind,ro "$root/$each"; fi
done
mount --bind "$root/.local" "$root/usr/local"
if [ "$mode" = ro ]; then mount -o remount,bind,ro "$root/usr/local"; fi
mount --rbind /proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for each in null zero full random urandom; do
    touch "$root/dev/$each"
    mount --bind "/dev/$each" "$root/dev/$each"
done
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
if [ -n "$cache" ]; then mkdir -p "$root$place"; mount --bind "$cache" "$root$place"; fi
if [ "$mode" = ro ]; then
    mount -o remount,bind,ro "$root"
    mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
fi
exec chroot "$root" "$@"
"""


def make_root(root: Path, python: Path) -> None:
    """Make what `FROM python:...-slim` gives: a root with the Python of this prefix at /usr/local."""
    root.mkdir()
    root.chmod(0o755)
    for name in ("usr", "opt", "proc", "dev", "tmp", "etc", "root", "var", "var/tmp", "run", "home", ".local"):
        (root / name).mkdir(mode=0o755)
    for name in ("tmp", "var/tmp"):
        (root / name).chmod(0o1777)
    for name in LINKS:
        if (there := Path("/", name)).is_symlink():
            (root / name).symlink_to(there.readlink())
    for name in ETC:
        source = Path("/etc", name)
        if source.is_dir():
            shutil.copytree(source, root / "etc" / name, symlinks=True)
        elif source.exists():
            shutil.copy2(source, root / "etc" / name)
    version = "python3." + next(python.glob("bin/python3.*[0-9]")).name.removeprefix("python3.")
    local = root / ".local"
    shutil.copytree(
        python / "lib" / version, local / "lib" / version, symlinks=True,
        ignore=shutil.ignore_patterns("test", "idlelib", "__pycache__", "config-*", "ensurepip", "lib2to3"),
    )  # fmt: skip
    for library in python.glob("lib/libpython3*"):
        shutil.copy2(library, local / "lib", follow_symlinks=False)
    (local / "bin").mkdir()
    shutil.copy2(python / "bin" / version, local / "bin" / version)
    for name in ("python3", "python"):
        (local / "bin" / name).symlink_to(version)
    # The image's pip is a script of its own Python.
    (local / "bin" / "pip").write_text('#!/bin/sh\nexec /usr/local/bin/python -m pip "$@"\n')
    (local / "bin" / "pip").chmod(0o755)
    packages = local / "lib" / version / "site-packages"
    for path in packages.iterdir():
        if not path.name.startswith(("pip", "README")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(root, ["/sbin/ldconfig"], {"PATH": "/usr/bin"}, writable=True)


def clone(source: Path, target: Path) -> None:
    """Copy a tree as links to the same files: what is built here adds files and changes none."""
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, copy_function=os.link)


def _entering(
    root: Path, *, writable: bool = False, host: str = "build", cache: tuple[Path, str] | None = None
) -> list[str]:
    folder, place = cache or ("", "")
    return [
        "unshare", "--mount", "--uts", "/bin/sh", "-c", _ENTER, "room", str(root), "rw" if writable else "ro", host,
        str(folder), place,
    ]  # fmt: skip


def run(
    root: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    writable: bool = False,
    cache: tuple[Path, str] | None = None,
    folder: str = "/",
) -> str:
    """Run a command as root in this root, on the machine's own network; return what it said. A failure is an AssertionError."""
    into = ["/usr/bin/env", "-i", "-C", folder, *[f"{name}={value}" for name, value in environment.items()]]
    done = subprocess.run(
        [*_entering(root, writable=writable, cache=cache), *into, *command],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout[-3000:]}"
    return done.stdout


@dataclass
class Pod:
    """A network of its own; leave it to end all that runs in it."""

    root: Path
    user: int
    environment: Mapping[str, str]
    logs: Path
    folder: str = "/app"
    hosts: Sequence[str] = ()
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Pod:
        # As the engine's DNS does: each service is a host.
        (self.root / "etc" / "hosts").write_text(f"127.0.0.1 localhost {' '.join(self.hosts)}\n")
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], start_new_session=True)
        mine = os.stat("/proc/self/ns/net").st_ino
        while os.stat(f"/proc/{self._holder.pid}/ns/net").st_ino == mine:
            assert self._holder.poll() is None
        subprocess.run([*self.enter, "ip", "link", "set", "lo", "up"], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.inhabitants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes.values():
            process.wait()
        self._holder.kill()
        self._holder.wait()
        self._stack.close()

    @property
    def enter(self) -> list[str]:
        """What puts a command of this machine into the pod's network."""
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net"]

    def inhabitants(self) -> list[int]:
        """Return the numbers of all processes in this network, but for the one that holds it."""
        here = os.stat(f"/proc/{self._holder.pid}/ns/net").st_ino
        found = []
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if name.isdigit() and os.stat(f"/proc/{name}/ns/net").st_ino == here:
                    found.append(int(name))
        return [pid for pid in found if pid != self._holder.pid]

    def inside(self, act: Callable[[], T]) -> T:
        """Do something in a thread that is in the pod's network; return what it returned."""

        def enter() -> T:
            with open(f"/proc/{self._holder.pid}/ns/net") as network:
                assert _LIBC.setns(network.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            return act()

        with ThreadPoolExecutor(1) as executor:  # a thread of its own, which ends: no other work gets into the network
            return executor.submit(enter).result()

    def room(self, host: str, command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
        """Return the command that runs this one in a room."""
        bound = [
            "/usr/bin/setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups", "--no-new-privs",
            "--bounding-set=-all", "--inh-caps=-all",
        ]  # fmt: skip
        into = ["/usr/bin/env", "-i", "-C", self.folder]
        values = {"PATH": "/usr/bin", **self.environment, "HOME": "/tmp", "HOSTNAME": host, **environment}
        into += [f"{name}={value}" for name, value in values.items()]
        return [*self.enter, *_entering(self.root, host=host), *bound, *into, *command]

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a service under the name that is its host's."""
        self.start_plain(name, self.room(name, command, environment))

    def start_plain(self, name: str, command: Sequence[str]) -> None:
        log = self._stack.enter_context(self.log(name).open("ab"))
        self.processes[name] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def ask(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
        """Run a command beside the service of this name, as `docker compose exec` does; return its exit status and output."""
        done = subprocess.run(
            self.room(name, command, environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def stop(self, name: str, number: signal.Signals, seconds: float) -> int:
        """Send a signal to the first process of a service, as an engine does; return its exit status. Raises TimeoutExpired."""
        process = self.processes[name]
        process.send_signal(number)
        return process.wait(seconds)
