"""Secrets are planted wherever there are any, the processes of the Procfile work and fail with them, and all that they have
written, sent and answered is searched."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import psycopg
import pytest
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.core.management import call_command
from django.db import connection
from honcho.environ import parse_procfile  # type: ignore[import-untyped]

from agents_project import embedded
from agents_project.demo.model_server import ModelCall, ModelServer, Pause, Reply, Silence, Status, Text, ToolCall
from runs.models import TERMINAL, Event, Run
from tests.http import web
from tests.http.web import free_port
from tests.secrets.places import PostgresByTCP, Valkey, columns, command_lines, sessions_of_postgres
from tests.workers.conftest import eventually
from threads.models import ApiKey
from tools.models import ToolCall as Call
from tools.models import Worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# What is never anywhere; then what is its owner's, in rows and in answers to them, and nowhere else.
SECRETS = ("database", "broker", "django", "model", "flower", "vendor", "password", "wrong_password", "wrong_key")
IN_TOOLS = ("url", "cause", "local", "bearer", "printed")
PRIVATE = ("input", "arguments", "result", "query", "body")

ALLOWED = {
    ("session", "django_session.session_key"): "Django finds a session by its key",
    ("input", "longhaul_threads_message.content"): "what a user says is the conversation",
    ("input", "longhaul_runs_event.payload"): "and is told to the readers of the run",
    ("arguments", "longhaul_threads_message.content"): "the model's calls are part of the conversation",
    ("arguments", "longhaul_runs_event.payload"): "and are told to the readers of the run",
    ("arguments", "longhaul_tools_toolcall.arguments"): "what the call is made with",
    ("result", "longhaul_threads_message.content"): "the model reads it there",
    ("result", "longhaul_runs_event.payload"): "and the readers of the run",
    ("result", "longhaul_tools_toolcall.result"): "what the call has given",
}
PAGES_OF_THE_OWNER = ("http /api/", "http /admin/longhaul_")  # of the person who said it, and of people who may see all


def canary(name: str) -> str:
    """A value that is found again wherever it went, whole or within another form: by its core."""
    return f"Canary{name.replace('_', '').title()}{secrets.token_hex(12)}"


class Scene:
    """The processes, and what is to be searched: texts by the place where they stood."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.planted = {name: canary(name) for name in (*SECRETS, *IN_TOOLS, *PRIVATE)}
        self.planted["model"] = f"sk-{self.planted['model']}"
        self.cores = {name: re.findall(r"Canary\w+", value)[0] for name, value in self.planted.items()}
        self.found: dict[str, str] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def script(self, call: ModelCall) -> Reply:
        last = [message for message in call.messages if message["role"] == "user"][-1]["content"]
        key = call.headers.get("authorization", "")
        if any(message["role"] == "tool" for message in call.messages):
            return [Text("done")]
        if "tools" in last:
            note = {"note": self.planted["arguments"]}
            return [ToolCall(name, note) for name in call.tools]
        if "refuse" in last:
            return [
                Status(401, {"error": {"message": f"Incorrect API key provided: {key}", "code": "invalid_api_key"}})
            ]
        if "break" in last:
            return [
                Status(
                    500,
                    f"internal error while handling {key} with https://x.example/?api_key={self.planted['url']}&token={self.planted['cause']}",
                )
            ]
        if "silence" in last:
            return [Text("So far "), Silence()]
        return [Text("hello"), Pause(0.0)]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def keep(self, place: str, text: str) -> None:
        self.found[place] = f"{self.found.get(place, '')}\n{text}"

    def leaks(self) -> list[str]:
        """Return where what was found, that must not be there."""
        found = []
        for name, core in self.cores.items():
            for place, text in self.found.items():
                if core not in text:
                    continue
                if (name, place.removeprefix("row ")) in ALLOWED:
                    continue
                if name in PRIVATE and place.startswith(PAGES_OF_THE_OWNER):
                    continue
                at = text.index(core)
                found.append(f"{name} in {place}: ...{text[max(at - 150, 0) : at + 60]!r}...")
        return found


@contextmanager
def processes(scene: Scene, environment: dict[str, str]) -> Iterator[None]:
    """Every line of the Procfile, as it stands there."""
    lines = parse_procfile((embedded.PROJECT / "Procfile").read_text()).processes
    try:
        for name, line in lines.items():
            with (scene.folder / f"{name}.log").open("wb") as log:
                scene.processes[name] = subprocess.Popen(
                    ["/bin/sh", "-c", line], env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                    cwd=embedded.PROJECT, start_new_session=True,
                )  # fmt: skip
        yield
    finally:
        for process in scene.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        until = time.monotonic() + 15  # seconds: a drain, and the end of a gevent pool
        for process in scene.processes.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def test_secrets_are_in_no_log_row_message_page_or_answer(transactional_db: None, tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    planted = scene.planted
    postgres = PostgresByTCP(os.environ["DATABASE_URL"])
    valkey = Valkey(tmp_path, planted["broker"])
    port, flower_port = free_port(), free_port()
    redis_url = f"redis://:{planted['broker']}@127.0.0.1:{valkey.port}/0"
    # An @ in it: what stands in the URL is not what is sent.
    database_password = f"p@{planted['database']}"
    name = connection.settings_dict["NAME"]
    database_url = f"postgresql://{postgres.user}:{quote(database_password)}@127.0.0.1:{postgres.port}/{name}"
    with ModelServer(scene.script) as model:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "DJANGO_SETTINGS_MODULE": "tests.secrets.settings",
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "CELERY_BROKER_URL": redis_url,
            "SECRET_KEY": f"{planted['django']}-and-more-so-that-it-is-long-enough-for-django",
            "OPENAI_API_KEY": planted["model"],
            "OPENAI_BASE_URL": model.url,
            "VENDOR_API_KEY": planted["vendor"],
            "FLOWER_BASIC_AUTH": f"boss:{planted['flower']}",
            "LONGHAUL_CELERY_EVENTS": "1",
            "LOG_FORMAT": "json",
            "LOG_LEVEL": "INFO",
            "PORT": str(port),
            "FLOWER_PORT": str(flower_port),
            "PGAPPNAME": "tests.secrets",
            "PLANTED": json.dumps({key: planted[key] for key in (*IN_TOOLS, "result")}),
        }
        for variable in ("DIRECT_DATABASE_URL", "LONGHAUL_HTTPS", "DJANGO_DEBUG"):
            environment.pop(variable, None)
        User.objects.create_superuser("boss", password=planted["password"])
        try:
            with processes(scene, environment):
                work_and_fail(scene, postgres, valkey, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{flower_port}")
                scene.keep("valkey MONITOR", valkey.heard())
                scene.keep("command lines", command_lines([each.pid for each in scene.processes.values()]))
            checked = subprocess.run(
                [sys.executable, "manage.py", "check", "--deploy"],
                env=environment, cwd=embedded.PROJECT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            scene.keep("command check", checked.stdout + checked.stderr)
        finally:
            postgres.cut()
            valkey.end()
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as admin:
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND pid <> %s AND backend_type = 'client backend'"
            " AND application_name NOT LIKE %s"  # the server of the whole session serves on
        )
        own = (name, connection.connection.info.backend_pid if connection.connection else 0, f"{web.APPLICATION}.%")
        eventually(lambda: admin.execute(query, own).fetchone() == (0,), why="the processes' connections end")
    for process in scene.processes:
        scene.keep(f"log {process}", scene.log(process))
    for column, value in columns():
        scene.keep(f"row {column}", value)
    out = io.StringIO()
    call_command("list_runs", "--json", stdout=out, stderr=out)
    for run in Run.objects.all():
        call_command("explain_run", str(run.pk), stdout=out, stderr=out)
    scene.keep("commands", out.getvalue())

    # The search finds what is there: what may be in rows is in them, each in its place.
    for allowed, column in ALLOWED:
        assert scene.cores[allowed] in scene.found[f"row {column}"], (allowed, column)
    assert not (leaks := scene.leaks()), "\n".join(leaks)
    assert "[masked]" in scene.found["row longhaul_tools_toolcall.error"]
    # Messages are encoded twice on their way.
    assert "longhaul.advance_run" in scene.found["valkey MONITOR"]
    assert '[["longhaul' in scene.found["valkey MONITOR"] or '{"callbacks"' in scene.found["valkey MONITOR"]

    # And every line of every log is a JSON object, but for the one that Celery writes past all logging when it is told to end.
    strange = [
        f"{process}: {line}"
        for process in scene.processes
        for line in filter(None, scene.log(process).split("\n"))
        if not _is_object(line) and line != "worker: Warm shutdown (MainProcess)"
    ]
    assert strange == []
    for process in ("web", "agents", "tools", "control"):
        assert '"level":"' in scene.log(process), process


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def work_and_fail(scene: Scene, postgres: PostgresByTCP, valkey: Valkey, web: str, flower: str) -> None:
    """Use everything once, well and badly, and keep what was answered."""
    planted = scene.planted
    kinds = ("agents", "tools", "control")

    def all_there() -> bool:
        for name, process in scene.processes.items():
            assert process.poll() is None, f"{name} has ended: {scene.log(name)}"
        there = set(Worker.objects.filter(gone_at=None, parent=None).values_list("kind", flat=True))
        try:
            return there >= set(kinds) and all(
                httpx2.get(url).status_code == 200 for url in (f"{web}/healthz", f"{flower}/healthcheck")
            )
        except httpx2.TransportError:
            return False

    eventually(all_there, within=120, why="every process is there")  # seconds, for a loaded machine
    with ExitStack() as open_ones:
        person, program, stranger = (open_ones.enter_context(httpx2.Client(base_url=web, timeout=20)) for _ in range(3))
        boss = open_ones.enter_context(httpx2.Client(base_url=flower, timeout=30, auth=("boss", planted["flower"])))
        use_and_misuse(scene, person, program, stranger, boss)
        scene.keep("sessions of Postgres", sessions_of_postgres())
        scene.keep("valkey keys", valkey.kept())
        outages(scene, person, program, postgres, valkey)


def ask(scene: Scene, client: httpx2.Client, method: str, url: str, **rest: Any) -> httpx2.Response:
    """Ask, and keep the answer with its headers; a cookie is set in one of them, of course."""
    answer = client.request(method, url, **rest)
    told = {name: value for name, value in answer.headers.items() if name != "set-cookie"}
    whose = "flower" if client.auth is not None else "http"
    scene.keep(f"{whose} {url.partition('?')[0]} {answer.status_code}", f"{told} {answer.text}")
    return answer


def use_and_misuse(
    scene: Scene, person: httpx2.Client, program: httpx2.Client, stranger: httpx2.Client, boss: httpx2.Client
) -> None:
    planted = scene.planted

    # Signing in, badly and well.
    page = ask(scene, person, "GET", "/admin/login/")
    assert page.status_code == 200, page.text
    form = {"username": "boss", "csrfmiddlewaretoken": person.cookies["csrftoken"]}
    ask(scene, person, "POST", "/admin/login/", data={**form, "password": planted["wrong_password"]})
    ask(
        scene,
        person,
        "POST",
        "/admin/login/",
        data={**form, "csrfmiddlewaretoken": "x" * 64, "password": planted["password"]},
    )
    assert (
        ask(
            scene, person, "POST", "/admin/login/?next=/admin/", data={**form, "password": planted["password"]}
        ).status_code
        == 302
    )
    scene.cores |= {"session": person.cookies["sessionid"], "csrf": person.cookies["csrftoken"]}
    assert Session.objects.filter(session_key=scene.cores["session"]).exists()
    out = io.StringIO()
    call_command("create_api_key", "--user", "boss", "--json", stdout=out)
    key = json.loads(out.getvalue())["key"]
    scene.cores["api_key"] = key
    assert ApiKey.objects.filter(prefix=key[:9]).exists()
    program.headers["Authorization"] = f"Bearer {key}"

    # Refusals.
    wrong = {"Authorization": f"Bearer lh_{planted['wrong_key']}"}
    assert ask(scene, stranger, "GET", "/api/runs", headers=wrong).status_code == 401
    basic = {"Authorization": f"Basic {planted['wrong_key']}"}
    assert ask(scene, stranger, "GET", "/api/runs", headers=basic).status_code == 401
    body = json.dumps({"agent": "leaky", "input": planted["body"]})
    assert (
        ask(scene, program, "POST", "/api/runs", content=body, headers={"Content-Type": "text/plain"}).status_code
        == 415
    )
    assert ask(scene, program, "POST", "/api/runs", content=body[:-2]).status_code in (400, 415)
    assert ask(scene, program, "GET", f"/api/runs?search={planted['query']}").status_code == 400
    assert ask(scene, program, "GET", f"/nowhere?search={planted['query']}").status_code == 404
    assert ask(scene, program, "POST", "/boom", data={"text": planted["body"]}).status_code == 403  # CSRF
    assert ask(scene, person, "GET", f"/boom?search={planted['query']}").status_code == 500

    # Runs, that end well and badly.
    def start(text: str, agent: str = "leaky") -> str:
        answer = ask(scene, program, "POST", "/api/runs", json={"agent": agent, "input": f"{text} {planted['input']}"})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    started = {word: start(word) for word in ("tools", "refuse", "break")}
    started["lost"] = start("anything", "lost")
    for word, run in started.items():
        eventually(Run.objects.filter(pk=run, status__in=TERMINAL).exists, why=f"{word} ends")
    statuses = {word: Run.objects.get(pk=run).status for word, run in started.items()}
    assert statuses == {"tools": "completed", "refuse": "failed", "break": "failed", "lost": "failed"}
    codes = {word: (Run.objects.get(pk=run).error or {}).get("code") for word, run in started.items()}
    assert (codes["refuse"], codes["break"]) == ("auth", "server")
    outcomes = dict(Call.objects.filter(run_id=started["tools"]).values_list("name", "outcome"))
    assert outcomes == {"talks": "success", **dict.fromkeys(sorted(set(outcomes) - {"talks"}), "failed")}
    assert len(outcomes) == 6

    # What people read.
    for run in started.values():
        for part in ("", "/events", "/steps", "/legs", "/messages", "/tool-calls"):
            assert ask(scene, program, "GET", f"/api/runs/{run}{part}").status_code == 200
        ask(scene, program, "GET", f"/api/runs/{run}/stream")
        assert ask(scene, person, "GET", f"/admin/longhaul_runs/run/{run}/change/").status_code == 200
    for path in ("/api/agents", "/api/tools", "/api/usage", "/api/schema", "/readyz", "/healthz", "/admin/"):
        assert ask(scene, person, "GET", path).status_code == 200, path
    for path in ("/admin/longhaul_threads/apikey/", "/admin/longhaul_runs/run/", "/admin/longhaul_tools/worker/"):
        ask(scene, person, "GET", path)
    assert stranger.get(f"{boss.base_url}/workers").status_code == 401
    tasks = eventually(lambda: ask(scene, boss, "GET", "/api/tasks").json(), why="Flower knows of tasks")
    assert any("run=" in (task["args"] or "") for task in tasks.values())
    for path in ("/", "/workers", "/tasks", "/broker", "/metrics", "/api/workers?refresh=1"):
        ask(scene, boss, "GET", path)
    for task in tasks:
        ask(scene, boss, "GET", f"/task/{task}")
    for worker in boss.get("/api/workers").json():
        assert ask(scene, boss, "GET", f"/worker/{worker}").status_code == 200


def outages(
    scene: Scene, person: httpx2.Client, program: httpx2.Client, postgres: PostgresByTCP, valkey: Valkey
) -> None:
    """One of Postgres while a leg waits for its model, then one of the broker."""
    begin = {"agent": "leaky", "input": f"silence {scene.planted['input']}"}
    silent = ask(scene, program, "POST", "/api/runs", json=begin).json()["id"]
    eventually(lambda: Event.objects.filter(run_id=silent, type="text.delta").exists(), why="it streams")
    postgres.cut()
    assert ask(scene, program, "GET", "/api/runs").status_code == 503
    assert ask(scene, person, "GET", "/readyz").status_code == 503
    assert ask(scene, person, "GET", "/admin/").status_code in (500, 503)
    eventually(lambda: "Postgres is back" in scene.log("control"), why="the sweep has noticed")
    postgres.mend()
    eventually(lambda: ask(scene, program, "GET", "/api/runs").status_code == 200, why="Postgres is back")
    ask(scene, program, "POST", f"/api/runs/{silent}/cancel")
    scene.keep("valkey MONITOR", valkey.heard())
    valkey.process.terminate()
    valkey.process.wait()
    ask(scene, program, "POST", "/api/runs", json=begin)
    assert ask(scene, person, "GET", "/readyz").status_code == 503
    eventually(lambda: "waits for the broker" in scene.log("web"), why="a message could not be sent")
    eventually(lambda: "onnection to broker lost" in scene.log("agents"), why="the worker has noticed")
