"""A RabbitMQ node of this process's own, for tests and benchmarks: Debian's `rabbitmq-server`, which must be installed.

    python -m agents_project.rabbitmq -- COMMAND      a node up, CELERY_BROKER_URL set, COMMAND run

Its data, its ports, its name and its port mapper (epmd) are its own, so it meets no other node of the machine. All of it
listens on 127.0.0.1 and dies with this process, however that ends. It runs as whoever starts it: the program that Debian
puts on the path insists on a user of its own, so the one behind it is called.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from amqp import Connection
from amqp.exceptions import AMQPError

from agents_project.processes import Children

PROGRAMS = Path("/usr/lib/rabbitmq/bin")
START_TIMEOUT = timedelta(seconds=90)  # 5 to 8 s are usual
_CONFIGURATION = {
    "listeners.tcp.local": "127.0.0.1:{port}",
    "log.console": "false",
    "log.file.level": "info",
    # A small machine's disk is none of our business, and a write-ahead log of 512 MB is more than a test needs.
    "disk_free_limit.absolute": "1MB",
    "raft.wal_max_size_bytes": "32000000",
    "loopback_users.guest": "true",
}
# Schedulers that spin while they wait take a core from whoever shares the machine.
_ERLANG = "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none +sbwtdcpu none +sbwtdio none"


class RabbitMQError(Exception):
    """RabbitMQ cannot run here. On Debian: apt install rabbitmq-server."""

    def __init__(self, detail: str = "") -> None:
        super().__init__(f"{detail}\n{self.__doc__}" if detail else self.__doc__)


def installed() -> bool:
    return (PROGRAMS / "rabbitmq-server").exists() and shutil.which("epmd") is not None


class RabbitMQ:
    """Use as a context manager: entered it is up, left it is gone with its data.

    `configuration` goes into its rabbitmq.conf: `{"consumer_timeout": "2000"}`; `advanced`, Erlang's terms, into its
    advanced.config.
    """

    def __init__(self, configuration: Mapping[str, str] | None = None, advanced: str = "[].") -> None:
        self._configuration = {**_CONFIGURATION, **(configuration or {})}
        self._advanced = advanced

    def __enter__(self) -> RabbitMQ:
        if not installed():
            raise RabbitMQError()
        self.folder = Path(tempfile.mkdtemp(prefix="longhaul-rabbitmq-"))
        self.port, self._dist_port, self._epmd_port = _ports(3)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self._node = f"longhaul{secrets.token_hex(4)}@localhost"
        text = "".join(f"{key} = {value.format(port=self.port)}\n" for key, value in self._configuration.items())
        (self.folder / "rabbitmq.conf").write_text(text)
        (self.folder / "advanced.config").write_text(f"{self._advanced}\n")
        (self.folder / "enabled_plugins").write_text("[].\n")
        (self.folder / "environment").write_text("")
        self._children = Children(self.folder / "children.json")
        try:
            with (self.folder / "epmd.log").open("ab") as log:
                # Ours and in the foreground: the one that a node starts for itself would outlive it.
                self._children.start(
                    "epmd",
                    ["epmd", "-address", "127.0.0.1", "-port", str(self._epmd_port)],
                    env=self._environment(),
                    output=log,
                )
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._children):
            self._children.kill(name)  # nothing of it is kept
        shutil.rmtree(self.folder, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        own = {
            "HOME": self.folder,  # of the cookie
            "ERL_EPMD_PORT": self._epmd_port,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_DIST_PORT": self._dist_port,
            "RABBITMQ_CONF_ENV_FILE": self.folder / "environment",
            "RABBITMQ_CONFIG_FILE": self.folder / "rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": self.folder / "advanced.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": self.folder / "enabled_plugins",
            "RABBITMQ_MNESIA_BASE": self.folder / "mnesia",
            "RABBITMQ_LOG_BASE": self.folder / "log",
            "RABBITMQ_GENERATED_CONFIG_DIR": self.folder / "config",
            "RABBITMQ_PID_FILE": self.folder / "pid",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _ERLANG,
            # Let the script become the node, which else were its child, and would outlive it.
            "RUNNING_UNDER_SYSTEMD": "true",
        }
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_", "ERLANG_"))
        }
        return {**kept, **{name: str(value) for name, value in own.items()}}

    @property
    def pid(self) -> int:
        """Return the process of the node."""
        return self._children["node"].pid

    def start(self) -> None:
        """Start the node and wait until it answers. Its data is that of its last life. Raises RabbitMQError."""
        with (self.folder / "node.log").open("ab") as log:
            self._children.start(
                "node",
                [str(PROGRAMS / "rabbitmq-server")],
                env=self._environment(),
                cwd=self.folder,  # where it leaves its core, should it crash
                output=log,
            )
        until = time.monotonic() + START_TIMEOUT.total_seconds()
        while not self.answers():
            if self._children["node"].poll() is not None or time.monotonic() > until:
                raise RabbitMQError(f"The node did not come up:\n{self._log()}")
            time.sleep(0.05)  # between looks at a condition

    def answers(self) -> bool:
        connection = Connection(
            f"127.0.0.1:{self.port}", "guest", "guest", connect_timeout=5, read_timeout=5, write_timeout=5
        )
        try:
            connection.connect()
            connection.close()
        except (OSError, AMQPError):
            return False
        return True

    def kill(self) -> None:
        """SIGKILL the node. What it has acknowledged is on its disk."""
        self._children.kill("node")

    def control(self, *arguments: str) -> str:
        """Run `rabbitmqctl` with these arguments (it takes a second or two); return what it said. Raises RabbitMQError."""
        done = subprocess.run(  # noqa: S603
            [str(PROGRAMS / "rabbitmqctl"), "--quiet", *arguments],
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RabbitMQError(f"rabbitmqctl {' '.join(arguments)}: {done.stderr or done.stdout}")
        return done.stdout

    def _log(self) -> str:
        texts = [path.read_text(errors="replace") for path in (self.folder / "log").glob("*.log")]
        texts.append((self.folder / "node.log").read_text(errors="replace"))
        return "\n".join(line for text in texts for line in text.splitlines()[-30:])


def _ports(count: int) -> list[int]:
    """Return so many different free ports."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] != ["--"] or len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    with RabbitMQ() as node:
        environment = {**os.environ, "CELERY_BROKER_URL": node.url}
        return subprocess.run(list(arguments[1:]), env=environment, check=False).returncode  # noqa: S603


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
