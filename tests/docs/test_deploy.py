"""docs/deploy.md: its units start what the Procfile starts, as one machine would; its queries answer; its figures are counted."""

from __future__ import annotations

import asyncio
import configparser
import os
import re
import shlex
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.db import connection
from honcho.environ import parse_procfile  # type: ignore[import-untyped]

from agents_project import embedded
from agents_project.demo import scripts
from agents_project.demo.model_server import ModelServer
from agents_project.processes import free_port
from runs.conf import KEYS
from tests.docs import console
from tests.docs.machine import Machine, servers, until
from tests.docs.page import ROOT, blocks, code, table

PAGE = "docs/deploy.md"
INSTALLED = "/srv/longhaul"
SHARED = "longhaul-.service.d/all.conf"
ENVIRONMENT = "/etc/longhaul.env"

Unit = dict[str, dict[str, str]]


def files() -> dict[str, str]:
    """Return the page's files for systemd, by their path below its folder of units; and the environment."""
    found = {}
    for block in blocks(PAGE):
        if block.kind == "ini":
            path = block.body.partition("\n")[0].removeprefix("# ").removeprefix("/etc/systemd/system/")
            found[path] = block.body
    return found


def unit(name: str) -> Unit:
    """Read a unit with what all of them share."""
    parser = configparser.ConfigParser(interpolation=None, strict=False, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(files()[SHARED])
    parser.read_string(files()[name])
    return {section: dict(parser[section]) for section in parser.sections()}


def units() -> dict[str, Unit]:
    """Return the units of the page, by kind: web, agents, tools, control, beat."""
    names = [name for name in files() if name.endswith(".service")]
    return {re.sub(r"longhaul-(\w+)@?\.service", r"\1", name): unit(name) for name in names}


def command(kind: str, number: int = 1) -> list[str]:
    """Return what systemd starts: its specifiers replaced."""
    line = units()[kind]["Service"]["ExecStart"]
    return shlex.split(line.replace("%%", "\0").replace("%i", str(number)).replace("\0", "%"))


def test_the_units_start_what_the_procfile_starts() -> None:
    lines = parse_procfile((ROOT / "Procfile").read_text()).processes
    for kind, its in units().items():
        procfile = shlex.split(re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", lines[kind].removeprefix("exec ")))
        set_there = []
        if procfile[0] == "env":
            set_there = [word for word in procfile[1:] if re.match(r"[A-Z_]+=", word)]
            procfile = procfile[1 + len(set_there) :]
        started = [word.removeprefix(f"{INSTALLED}/.venv/bin/") for word in command(kind)]
        # Several on one machine have a number; and how many children a tools worker has is for its owner to say.
        started = [re.sub(rf"^{kind}-1@", f"{kind}@", word) for word in started]
        if kind == "tools":
            for words in (started, procfile):
                at = words.index("-c")
                del words[at : at + 2]
        assert started == procfile, kind
        assert its["Service"].get("Environment", "").split() == set_there, kind
    assert set(lines) - set(units()) == {"flower"}


def test_a_worker_has_time_to_drain_and_only_its_main_process_is_told() -> None:
    for kind, its in units().items():
        assert its["Service"]["KillMode"] == "mixed", kind
        assert float(its["Service"]["TimeoutStopSec"]) >= KEYS["DRAIN_GRACE_SECONDS"].default + 30, kind
        assert its["Service"]["Restart"] == "always", kind
        assert its["Unit"]["StartLimitIntervalSec"] == "0", kind


def test_the_environment_is_what_the_settings_read() -> None:
    known = {name for row in table("docs/operations.md", "Environment") for name in code(row[0])}
    names = [line.partition("=")[0] for line in files()[ENVIRONMENT].splitlines() if not line.startswith("#")]
    assert set(names) <= known


@pytest.mark.needs_systemd
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(ROOT)
    for name, body in files().items():
        if name != ENVIRONMENT:
            path = tmp_path / "units" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body.replace(INSTALLED, str(tmp_path / "here")))
    names = [name.replace("@.", "@1.") for name in files() if name.endswith(".service")]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path / 'units'}:"},
        capture_output=True,
        text=True,
        check=False,
    )
    about_ours = [line for line in (done.stdout + done.stderr).splitlines() if "longhaul" in line]
    assert about_ours == []


def test_the_proxy_lets_streams_and_waits_through() -> None:
    [block] = [block for block in blocks(PAGE) if block.kind == "nginx"]
    assert block.body.count("{") == block.body.count("}") == 2
    said = dict(re.findall(r"^\s*(\w+) ([^;{]+);", block.body, flags=re.MULTILINE))
    assert said["proxy_pass"] == "http://127.0.0.1:8000"
    assert "8000" in command("web")
    assert said["proxy_buffering"] == "off"
    longest_wait = re.search(r"timeout_seconds: .*le=(\d+)", (ROOT / "runs/http/streams.py").read_text())
    assert longest_wait
    assert float(said["proxy_read_timeout"].removesuffix("s")) > float(longest_wait[1])
    assert int(said["client_max_body_size"].removesuffix("m")) * 1024**2 >= KEYS["MAX_BODY_BYTES"].default
    assert "proxy_set_header X-Forwarded-Proto $scheme;" in block.body  # whatever the client said


@pytest.mark.django_db
def test_the_queries_of_the_page_answer() -> None:
    statements = [
        statement
        for block in blocks(PAGE)
        if block.kind == "sql"
        for statement in re.sub(r"^--.*\n", "", block.body, flags=re.MULTILINE).split(";")
        if statement.strip()
    ]
    assert len(statements) == 4
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
            assert cursor.fetchall(), statement


# --- for real --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_servers() -> Iterator[embedded.Servers]:
    with servers("test-deploy") as found:
        yield found


def _certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a certificate for localhost that signs itself; return it, and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost",
            "-keyout",
            str(key),
            "-out",
            str(certificate),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@contextmanager
def tls_before(socket_path: str, certificate: Path, key: Path) -> Iterator[int]:
    """Speak TLS on a port of localhost for the server that listens on a unix socket; yield the port."""
    loop = asyncio.new_event_loop()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.num_tickets = 0

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except (OSError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(socket_path)
        with suppress(asyncio.CancelledError):  # at the end of the block
            await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async def listen() -> asyncio.Server:
        return await asyncio.start_server(serve, "localhost", 0, ssl=context, family=2)

    server = loop.run_until_complete(listen())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:

        async def end() -> None:
            server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            loop.stop()

        asyncio.run_coroutine_threadsafe(end(), loop)
        thread.join(10)
        loop.close()


class Units(Machine):
    """Starts the page's units as systemd would: their command, their folder, only their environment."""

    port = 0

    def unit(self, kind: str, number: int = 1) -> None:
        its = units()[kind]["Service"]
        own = dict(word.split("=", 1) for word in its.get("Environment", "").split())
        self.port = self.port or free_port(0)
        here = {f"{INSTALLED}/.venv/bin/": f"{console.BIN}/", "8000": str(self.port)}
        line = command(kind, number)
        for page, local in here.items():
            line = [word.replace(page, local) for word in line]
        self.start(f"{kind}-{number}", line, **own)

    def leave(self, name: str) -> None:
        """End it as KillMode=mixed does."""
        self.stop(name, float(units()[name.partition("-")[0]]["Service"]["TimeoutStopSec"]))

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def most_connections(self, condition: Callable[[], bool]) -> int:
        """Return how many connections all processes together had at most, until the condition comes true."""
        most = 0

        def look() -> bool:
            nonlocal most
            self.ready()
            query = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND backend_type = 'client backend' AND application_name <> 'the test'"
            )
            most = max(most, int(self.one(query)))
            return condition()

        until(look, 90)
        return most


def formula() -> Callable[..., int]:
    """Return the function of the page."""
    names: dict[str, Any] = {"print": lambda *_: None}
    [block] = [block for block in blocks(PAGE) if block.kind == "python"]
    exec(block.body, names)
    found: Callable[..., int] = names["connections"]
    return found


@pytest.mark.slow
@pytest.mark.needs_openssl
@pytest.mark.timeout(400)  # servers, five kinds of processes and their second workers start on a busy machine
def test_the_units_run_the_project_as_one_machine_would(own_servers: embedded.Servers, tmp_path: Path) -> None:
    # Given a role without rights that owns a database, and Redis behind TLS
    with psycopg.connect(own_servers.database_url, autocommit=True) as admin:
        admin.execute("CREATE ROLE plain LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE")
        admin.execute("CREATE DATABASE plain OWNER plain")
    sockets = str(own_servers.folder / "sockets")
    certificate, key = _certificate(tmp_path, "server")
    stranger, _ = _certificate(tmp_path, "stranger")
    with (
        ModelServer(scripts.demo) as model,
        tls_before(f"{sockets}/valkey.sock", certificate, key) as port,
    ):
        given = dict(line.split("=", 1) for line in files()[ENVIRONMENT].splitlines() if not line.startswith("#"))
        here = {
            "DATABASE_URL": f"postgresql://plain@/plain?host={sockets}",
            # The page's own form, with this machine's address
            "REDIS_URL": given["REDIS_URL"]
            .replace(":SECRET@redis.internal:6379", f"localhost:{port}")
            .replace("/etc/ssl/redis-ca.pem", str(certificate)),
            "SECRET_KEY": "a-key-of-the-test-" + "0123456789abcdefghijklmnopqrstuvwxyz",
            "OPENAI_API_KEY": "none",
        }
        assert f"rediss://localhost:{port}/0?ssl_cert_reqs=required" in here["REDIS_URL"]
        assert here.keys() == {name for name, value in given.items() if "SECRET" in value}
        environment = {**given, **here, "OPENAI_BASE_URL": model.url, "LONGHAUL_STATIC_ROOT": str(tmp_path / "static")}
        machine = Units(environment, tmp_path)
        try:
            # The page's first commands
            [first] = [block for block in blocks(PAGE) if block.kind == "console" and block.told.startswith("tried by")]
            console.run(first, ROOT, {**console.environment(), **environment})
            # When the units start, all of it is ready
            for kind in ("agents", "tools", "control", "web", "beat"):
                machine.unit(kind)
            machine.unit("control", 2)
            until(machine.ready, 90)
            # And work is done, with no more connections than the page says
            prompt = "Test the test tool with the numbers 1-8, one after another, then give me the total."
            machine.start_run("tester", prompt, 24)
            most = machine.most_connections(lambda: machine.settled() >= 60)
            assert 15 <= most <= formula()(agents=1, tools=1, children=4, control=2, web=1), most
            # When workers are replaced under the runs, they leave in time and nothing is lost
            for kind in ("agents", "tools"):
                machine.unit(kind, 2)
                until(partial(_both, machine, kind), 60)
                machine.leave(f"{kind}-1")
            machine.leave("control-1")
            until(lambda: machine.unended() == 0, 120)
            query = "SELECT DISTINCT status, output FROM longhaul_runs_run"
            assert machine.rows(query) == [("completed", "The total is 36.")]
            assert "no invariant violated" in machine.manage("check_runs")
            for name in list(machine.processes):
                machine.leave(name)
            # A Redis with another certificate than the one that is trusted is refused; by Celery only if it is told to look
            wrong = here["REDIS_URL"].replace(str(certificate), str(stranger))
            assert _tries(machine, wrong) == ["broker:refused", "bell:refused"]
            bare = here["REDIS_URL"].partition("?")[0]
            assert _tries(machine, bare) == ["broker:connected", "bell:refused"]
        finally:
            machine.end()


REFUSED = """
import django; django.setup()
import redis
from django.conf import settings
from agents_project.celery import app
def tried(what, call):
    try:
        call()
    except Exception as error:
        found = error
        while found is not None and "CERTIFICATE_VERIFY_FAILED" not in str(found):
            found = found.__cause__ or found.__context__
        print(f"{what}:refused" if found is not None else f"{what}:{error!r}")
    else:
        print(f"{what}:connected")
def publish():
    with app.connection_for_write() as connection:
        connection.default_channel.client.ping()
tried("broker", publish)
tried("bell", lambda: redis.Redis.from_url(settings.REDIS_URL).ping())
"""


def _both(machine: Machine, kind: str) -> bool:
    return machine.present(kind) == 2


def _tries(machine: Machine, redis_url: str) -> list[str]:
    shell = {**machine.environment, "DJANGO_SETTINGS_MODULE": "agents_project.settings", "REDIS_URL": redis_url}
    return Machine(shell, machine.folder).run("python", "-c", REFUSED).split()
