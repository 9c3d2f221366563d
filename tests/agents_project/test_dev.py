"""`make dev`: what ends is started again, Ctrl-C leaves nothing, and each process answers."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from django.contrib.auth.models import User
from honcho.printer import Printer  # type: ignore[import-untyped]

from agents_project import dev, embedded
from agents_project.dev import DevError, Stack
from agents_project.processes import Identity
from runs import flower
from tests.processes import of_purpose

LIVES = "import time; print('up', flush=True); time.sleep(600)"


def until(condition: Callable[[], Any], seconds: float = 20, *, stack: Stack | None = None) -> Any:
    """Return the first true answer; meanwhile the stack is attended to."""
    deadline = time.monotonic() + seconds
    while True:
        if stack is not None:
            stack.attend()
        if answer := condition():
            return answer
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


# --- the processes, with a Procfile of a test's own ------------------------------------------------------------------


class Told(io.StringIO):
    """What was printed, without times and names."""

    @property
    def lines(self) -> list[str]:
        return [line.partition("| ")[2] for line in self.getvalue().splitlines()]


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def make_stack(tmp_path: Path, told: Told) -> Callable[..., Stack]:
    def make(*, grace: float = 5, **programs: str) -> Stack:
        lines = []
        for name, source in programs.items():
            script = tmp_path / f"{name}.py"
            script.write_text(source)
            lines.append(f"{name}: exec {shlex.quote(sys.executable)} {script}\n")
        (tmp_path / "Procfile").write_text("".join(lines))
        return Stack(tmp_path / "Procfile", tmp_path / "dev", Printer(told), timedelta(seconds=grace))

    return make


def test_one_that_is_killed_is_said_and_started_again_and_the_others_go_on(
    make_stack: Callable[..., Stack], told: Told
) -> None:
    with make_stack(web=LIVES, agents=LIVES) as stack:
        stack.choose_ports()
        stack.start({})
        until(lambda: told.lines.count("up") == 2, stack=stack)
        stack.programs["agents"].started -= dev.QUICK  # it ran for long
        killed, other = stack.children["agents"].pid, stack.children["web"].pid
        os.kill(killed, signal.SIGKILL)

        until(lambda: told.lines.count("up") == 3, stack=stack)

        assert "agents was killed by SIGKILL; it is started again" in told.lines
        assert stack.children["agents"].pid != killed
        assert stack.children["web"].pid == other
    assert not any(Identity.of(child) for child in (killed, other))


def test_one_that_cannot_start_is_left_down_and_said(
    make_stack: Callable[..., Stack], told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev, "DELAYS", (0.0, 0.0, 0.0))
    with make_stack(web=LIVES, broken="import sys; sys.exit('no such setting')") as stack:
        stack.choose_ports()
        stack.start({})
        until(lambda: any("it is left down" in line for line in told.lines), stack=stack)
        for _ in range(3):
            stack.attend()
        assert told.lines.count("no such setting") == 3
        assert stack.children["web"].poll() is None


def test_a_drain_gets_its_time_and_what_takes_longer_is_killed(make_stack: Callable[..., Stack], told: Told) -> None:
    drains = (
        "import signal, time\n"
        "def drain(*_):\n    time.sleep(0.5)\n    print('handed on', flush=True)\n    raise SystemExit\n"
        "signal.signal(signal.SIGTERM, drain)\nprint('up', flush=True)\ntime.sleep(600)\n"
    )
    deaf = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(600)\n"
    )
    with make_stack(web=LIVES, agents=drains, tools=deaf, grace=2) as stack:
        stack.choose_ports()
        stack.start({})
        until(lambda: told.lines.count("up") == 3, stack=stack)

    assert "handed on" in told.lines
    assert told.lines[-1] == "tools did not end within 2 s and were killed"


def test_a_second_one_of_a_checkout_is_refused_and_told_of_the_first(make_stack: Callable[..., Stack]) -> None:
    with (
        make_stack(web=LIVES),
        pytest.raises(DevError, match=rf"runs already \(process {os.getpid()}"),
        make_stack(web=LIVES),
    ):
        pass
    with make_stack(web=LIVES):
        pass  # the first one has ended


def test_what_a_killed_one_left_is_ended_by_the_next(make_stack: Callable[..., Stack], told: Told) -> None:
    dead = make_stack(web=LIVES)
    child = dead.children.start("agents", [sys.executable, "-c", LIVES])

    with make_stack(web=LIVES):
        assert child.wait(5) == -signal.SIGKILL
    assert told.lines[0] == f"ended what a killed earlier make dev had left running (processes {child.pid})"


def test_a_port_that_is_taken_is_replaced_and_named(
    make_stack: Callable[..., Stack], told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("PORT", str(port))
        with make_stack(web=LIVES) as stack:
            stack.choose_ports()
            chosen = stack.programs["web"].port

    assert chosen not in (None, port)
    assert told.lines == [f"port {port} is taken; web listens on {chosen}"]


def test_a_port_that_is_taken_between_look_and_start_is_replaced_too(
    make_stack: Callable[..., Stack], told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT", "0")  # any
    with make_stack(
        web="import os; print('port', os.environ['PORT'], flush=True); import time; time.sleep(600)"
    ) as stack:
        stack.choose_ports()
        first = stack.programs["web"].port
        assert first is not None
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", first))
            taken.listen()
            stack.start({})
        second = stack.programs["web"].port
        until(lambda: f"port {second}" in told.lines, stack=stack)

    assert second != first
    assert f"port {first} was taken meanwhile; web listens on http://127.0.0.1:{second}" in told.lines


def test_the_password_is_made_once_and_is_ours_alone(tmp_path: Path) -> None:
    made = dev.password(tmp_path)

    assert len(made) >= 16
    assert dev.password(tmp_path) == made
    assert stat.S_IMODE((tmp_path / "password").stat().st_mode) == 0o600
    (tmp_path / "password").unlink()
    assert dev.password(tmp_path) != made


@pytest.mark.django_db(transaction=True)
def test_the_login_is_made_or_mended_and_nobody_elses_is_touched() -> None:
    other = User.objects.create_user("other", password="theirs")
    dev.prepare_database("first")
    User.objects.filter(username="dev").update(is_staff=False)
    dev.prepare_database("second")

    user = User.objects.get(username="dev")
    assert user.check_password("second")
    assert (user.is_staff, user.is_superuser) == (True, True)
    other.refresh_from_db()
    assert other.check_password("theirs")
    assert User.objects.count() == 2


# --- all of it, as a person starts it --------------------------------------------------------------------------------


class Dev:
    """`make dev` on servers of its own, as a person sees it."""

    def __init__(self, purpose: str) -> None:
        foreign = {"DATABASE_URL", "REDIS_URL", "CELERY_BROKER_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL"}
        foreign |= {"LONGHAUL_DEMO_MODEL", "LONGHAUL_CELERY_EVENTS", "FLOWER_BASIC_AUTH", "PORT", "FLOWER_PORT"}
        foreign |= {"UVICORN_HOST", "FLOWER_ADDRESS"}
        self.purpose = purpose
        self.environment = {name: value for name, value in os.environ.items() if name not in foreign}
        self.environment["LONGHAUL_PURPOSE"] = purpose
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agents_project.dev"], cwd=embedded.PROJECT, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def said(self, pattern: str) -> list[str]:
        return [found[1] for line in list(self.lines) if (found := re.search(pattern, line))]

    def await_said(self, pattern: str, count: int = 1, seconds: float = 90) -> str:
        until(lambda: len(self.said(pattern)) >= count or self.process.poll() is not None, seconds)
        assert len(self.said(pattern)) >= count, "".join(self.lines)
        return self.said(pattern)[count - 1]

    @property
    def password(self) -> str:
        return self.await_said(r"login     dev / (\S+)")

    def get(self, url: str, *, login: bool = True) -> tuple[int, str]:
        request = urllib.request.Request(url)
        if login:
            token = base64.b64encode(f"dev:{self.password}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, ""

    def manage(self, *arguments: str) -> str:
        environment = {**self.environment, "OPENAI_API_KEY": "demo", "LONGHAUL_DEMO_MODEL": "openai:demo"}
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments], cwd=embedded.PROJECT, env=environment, check=False,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run_tester(self, last: int) -> str:
        """Run the demo's agent to its end; return the run's id."""
        job = f"Test the test tool with the numbers 1-{last}, one after another, then give me the total."
        told = self.manage("run_agent", "tester", job, "--follow", "--json").splitlines()
        end = json.loads(told[-1])
        assert (end["type"], end["output"]) == ("run.completed", f"The total is {last * (last + 1) // 2}.")
        run: str = end["run"]
        return run

    def processes(self) -> list[Identity]:
        """All that runs with this purpose in this checkout, but for the embedded servers and their keeper."""
        servers = ("embedded keep", "postgres", "valkey")
        return [each for each in of_purpose(self.purpose) if not any(name in each.command for name in servers)]

    def worker(self, kind: str) -> Identity:
        """The parent process of the worker of this kind."""
        record = embedded.data_folder(self.purpose) / "dev" / "children.json"
        [row] = [row for row in json.loads(record.read_text()) if row["name"] == kind]
        return Identity(row["pid"], row["started"], row["command"])

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.wait(40)
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def purpose() -> Iterator[str]:
    name = embedded.reserve("test-dev")
    yield name
    embedded.remove(name, force=True)


@pytest.fixture
def up(purpose: str) -> Iterator[Dev]:
    stack = Dev(purpose)
    try:
        stack.await_said("(everything is up)")
        yield stack
    finally:
        stack.end()


@pytest.mark.slow
@pytest.mark.timeout(300)  # a first start makes a database cluster; seven Pythons share the machine
def test_one_command_brings_all_up_survives_kills_and_ends_without_a_trace(up: Dev) -> None:
    web, flower_url = up.await_said(r"admin     (\S+)/admin/"), up.await_said(r"Flower    (\S+)/")
    assert web.startswith("http://127.0.0.1:")
    assert flower_url.startswith("http://127.0.0.1:")

    # The web answers, with the admin's css, and knows the login that was printed
    assert up.get(f"{web}/admin/login/", login=False)[0] == 200
    assert "--primary" in up.get(f"{web}/static/admin/css/base.css", login=False)[1]

    assert up.get(f"{web}/healthz", login=False)[0] == 200
    assert json.loads(up.get(f"{web}/readyz", login=False)[1])["ready"] is True

    # Flower wants to know who asks
    for path in ("/", "/tasks", "/workers", "/api/tasks", "/api/workers"):
        assert up.get(f"{flower_url}{path}", login=False)[0] == 401, path
        assert up.get(f"{flower_url}{path}")[0] == 200, path

    # An agent runs, and Flower shows which run, agent and tool each task was for
    run = up.run_tester(2)

    def tasks() -> dict[str, Any]:
        listed: dict[str, Any] = json.loads(up.get(f"{flower_url}/api/tasks")[1])
        return {id: task for id, task in listed.items() if run in str(task["args"]) and task["state"] == "SUCCESS"}

    until(lambda: len(tasks()) >= 3)
    for id, task in tasks().items():
        found = flower.row_of(id)
        assert found is not None
        if task["name"] == "longhaul.advance_run":
            assert found == ("run", UUID(run))
            assert task["args"].startswith(f"agent=tester run={run} dispatch=")
        else:
            assert found[0] == "tool_call"
            assert task["args"] == f"tool=test_tool agent=tester run={run} attempt=1"
    # Its page leads to the admin's
    some = next(iter(tasks()))
    page = f"{web}/admin/longhaul_runs/run/task/{some}/"
    assert f'href="{page}"' in up.get(f"{flower_url}/task/{some}")[1]
    assert "id_password" in up.get(page, login=False)[1]  # which is there, behind the admin's login

    # The control worker does what beat asks for
    ask = "from runs.tasks import keep_house; keep_house.apply_async(queue='longhaul.control')"
    up.manage("shell", "-v0", "-c", ask)
    until(lambda: '"longhaul.keep_house"' in up.get(f"{flower_url}/api/tasks?state=SUCCESS")[1])

    # Whoever kills a worker sees it come back, and the next run go through
    for kind in ("agents", "tools"):
        killed = up.worker(kind)
        killed.kill(signal.SIGKILL)
        up.await_said(f"({kind} was killed by SIGKILL; it is started again)")
    up.run_tester(3)

    # Ctrl-C ends all of it
    before = up.processes()
    assert len(before) >= 8  # ourselves not counted: dev, web, three workers, beat, flower, the model
    up.end()
    assert up.said("(everything has ended)")
    assert not up.said("(were killed)")
    assert [each for each in before if each.alive()] == []
    assert up.processes() == []
    assert embedded.status(up.purpose) == {"postgres": None, "valkey": None}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_flower_without_a_login_does_not_start(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLOWER_")}

    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "agents_project", "flower", "--conf=agents_project/flowerconfig.py"],
        cwd=embedded.PROJECT, env=environment, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert ended.returncode != 0
    assert "set FLOWER_BASIC_AUTH=user:password" in ended.stderr
