"""A project that is not Longhaul's: a shop, made from `template/`, in an environment of its own that has the wheel."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psycopg

from agents_project import embedded
from agents_project.processes import die_with_parent
from agents_project.settings import database_from_url
from tests.docs import console
from tests.docs.page import Block, shows, words
from tests.workers.conftest import eventually

TEMPLATE = Path(__file__).parent / "template"
INSIDE = Path(__file__).parent / "inside.py"


def write(folder: Path) -> None:
    """Write the shop's project as it was before it had agents. A `-tpl` keeps other tools from taking it for code here."""
    for path in TEMPLATE.rglob("*.py-tpl"):
        place = folder / path.relative_to(TEMPLATE).with_suffix(".py")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(path.read_text())


@dataclass
class Host:
    """The shop: its folder, the programs of its environment, and what was typed there with what came back."""

    folder: Path
    programs: Path
    shell: dict[str, str]
    transcript: Path
    database_url: str
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    inside: subprocess.Popen[str] | None = None
    commands: dict[str, str] = field(default_factory=dict)  # by name, as they were started
    before: str = ""  # how its Celery was set before Longhaul came

    def run(self, command: str, *, code: int | None = 0, **more: str) -> str:
        """Run a command as its people do; return all that it says. `code` is the exit code that it must have."""
        done = subprocess.run(
            words(command),
            cwd=self.folder,
            env={**self.shell, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )
        with self.transcript.open("a") as told:
            told.write(f"$ {command}\n{done.stdout}\n")
        assert code is None or done.returncode == code, f"$ {command}\n{done.stdout}"
        return done.stdout

    def python(self, source: str) -> str:
        """Run a few lines in the project, all in one process of it; return what they print."""
        if self.inside is None:
            with (self.folder / "inside.log").open("ab") as errors:
                self.inside = subprocess.Popen(
                    ["python", str(INSIDE)],
                    cwd=self.folder,
                    env={**self.shell, "DJANGO_SETTINGS_MODULE": "shop.settings", "PYTHONPATH": str(self.folder)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
        assert self.inside.stdin is not None
        assert self.inside.stdout is not None
        self.inside.stdin.write(json.dumps(source) + "\n")
        self.inside.stdin.flush()
        line = self.inside.stdout.readline()
        assert line, self.log("inside")
        answer = json.loads(line)
        assert "error" not in answer, f"{source}\n{answer['printed']}{answer['error']}"
        printed: str = answer["printed"]
        return printed

    def told(self, source: str) -> Any:
        """Run lines in the project; return the JSON of the last line that they print."""
        return json.loads(self.python(f"import json\n{source}").splitlines()[-1])

    def leave(self) -> None:
        """End the process that `python` talks to; the next call starts one, with the files as they are then."""
        if self.inside is None:
            return
        assert self.inside.stdin is not None
        assert self.inside.stdout is not None
        self.inside.stdin.close()
        self.inside.wait(timeout=30)
        self.inside.stdout.close()
        self.inside = None

    def follow(self, block: Block) -> None:
        """Do what the reader of a page does: write the file, or run the commands and see what is shown."""
        if block.kind == "python":
            path = self.folder / block.file
            path.write_text(path.read_text() + "\n" + block.body if block.adds else block.body)
            with self.transcript.open("a") as told:
                told.write(block.body + "\n")
            return
        for command, expected in block.commands:
            said = self.run(command)
            assert not expected or shows(expected, said), (
                f"{block}: $ {command}\n{said}\n-- the page shows:\n{expected}"
            )

    def start(self, name: str, command: str, **more: str) -> subprocess.Popen[bytes]:
        """Start a worker or a server of the shop; what it says stands in `log(name)`."""
        parent = os.getpid()
        with (self.folder / f"{name}.log").open("ab") as output:
            process = subprocess.Popen(
                words(command),
                cwd=self.folder,
                env={**self.shell, **more},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),
            )
        with self.transcript.open("a") as told:
            told.write(f"$ {command} &\n\n")
        self.started[name] = process
        self.commands[name] = command
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def kill(self, name: str) -> None:
        """Kill a worker with its children, at once."""
        process = self.started.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with self.transcript.open("a") as told:
            told.write(f"$ kill -9 {name}\n\n")

    def end(self, *names: str) -> None:
        """Let processes end in their own way: all of them where none is named."""
        ending = [self.started.pop(name) for name in names or tuple(self.started)]
        for process in ending:
            process.send_signal(signal.SIGTERM)
        for process in ending:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            return connection.execute(query, parameters).fetchall()

    def present(self, *names: str) -> None:
        """Wait until workers are there, by their rows."""

        def there() -> bool:
            for name in names:
                assert self.started[name].poll() is None, self.log(name)
            rows = self.rows("SELECT name FROM longhaul_tools_worker WHERE gone_at IS NULL AND parent_id IS NULL")
            return {name for (name,) in rows} >= {f"{name}@shop" for name in names}

        eventually(there, within=60.0, why=f"{names} present")

    @contextmanager
    def serving(self, name: str, command: str, **more: str) -> Iterator[httpx2.Client]:
        """Serve the project by a command that names `PORT`; yield a client of it."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        process = self.start(name, command.replace("PORT", str(port)), **more)

        def up() -> bool:
            assert process.poll() is None, self.log(name)
            try:
                return httpx2.get(f"{url}/ai/healthz", timeout=5.0).status_code == 200
            except httpx2.TransportError:
                return False

        url = f"http://127.0.0.1:{port}"
        eventually(up, within=60.0, why=f"{name} answers")
        with httpx2.Client(base_url=url, timeout=30.0) as client:
            yield client
        self.end(name)


def elsewhere(url: str, number: int) -> str:
    """Return the address of another database of the session's Redis."""
    return re.sub(r"(db=|virtual_host=|:\d+/)\d+", rf"\g<1>{number}", url)


@contextmanager
def shop(
    folder: Path, programs: Path, transcript: Path, servers: embedded.Servers, *, name: str, **more: str
) -> Iterator[Host]:
    """Write the project, make its two databases on the session's servers; in the end all of it goes."""
    write(folder)
    here = database_from_url(servers.database_url)
    variables = {"PGHOST": "HOST", "PGPORT": "PORT", "PGUSER": "USER", "PGPASSWORD": "PASSWORD"}
    databases = [f"{name}_shop", f"{name}_archive"]
    shell = console.environment(
        **{variable: str(here[key]) for variable, key in variables.items() if here[key]},
        SHOP_DATABASE=databases[0],
        SHOP_ARCHIVE_DATABASE=databases[1],
        SHOP_SECRET_KEY="a key of the shop's that is long enough for the checks, 0123456789 and so on",
        SHOP_BROKER_URL=elsewhere(servers.broker_url, 5),
        SHOP_RESULTS_URL=elsewhere(servers.broker_url, 6),
        REDIS_URL=elsewhere(servers.redis_url, 5),
        OPENAI_API_KEY="none",
        **more,
    )
    shell["PATH"] = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    url = re.sub(r"^(postgres(?:ql)?://[^/]*/)[^?]*", rf"\g<1>{databases[0]}", servers.database_url)
    transcript.unlink(missing_ok=True)
    host = Host(folder, programs, shell, transcript, url)
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        for database in databases:
            connection.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
            connection.execute(f"CREATE DATABASE {database}")
        try:
            yield host
        finally:
            host.leave()
            host.end()
            for database in databases:
                connection.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")


def until(condition: Callable[[], Any], why: str) -> Any:
    return eventually(condition, within=60.0, why=why)  # a slow, busy machine
