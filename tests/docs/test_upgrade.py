"""docs/upgrade.md: a project is upgraded under its runs, in the page's order; what each change does to them is as it says."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agents_project import embedded
from agents_project.demo.model_server import ModelCall, ModelServer, Reply, Text, ToolCall
from tests.docs import console
from tests.docs.machine import Machine, servers, until
from tests.docs.page import ROOT, Block, blocks, table

PAGE = "docs/upgrade.md"
MODELS = """
from django.db import models


class Parcel(models.Model):
    number = models.IntegerField()
"""


def test_the_versions_are_those_of_the_package() -> None:
    said = dict(table(PAGE, "What goes together"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = project["dependencies"]
    assert f"django>={said['Django'].split()[0]}" in needs
    assert any(re.fullmatch(rf"celery\[redis\]>={re.escape(said['Celery'])}[.\d]*,<5\.8", need) for need in needs)
    assert project["requires-python"] == f">={said['Python'].split()[0]}"
    assert f"Postgres {said['Postgres'].split()[0]} or newer" in (ROOT / "docs/quickstart.md").read_text()


@pytest.fixture
def own_servers() -> Iterator[embedded.Servers]:
    with servers("test-upgrade") as found:
        yield found


@dataclass
class Desk:
    """The model. `work` goes on until it has been enough; `use TOOL` calls it once, with what its schema asks for."""

    enough: bool = False
    told: dict[str, list[str]] = field(default_factory=dict)  # the instructions that each prompt came with, in order

    def __call__(self, call: ModelCall) -> Reply:
        prompt = next(str(each["content"]) for each in call.messages if each["role"] == "user")
        self.told.setdefault(prompt, []).append(str(call.messages[0]["content"]))
        results = [str(each["content"]) for each in call.messages if each["role"] == "tool"]
        word, _, rest = prompt.partition(" ")
        if word == "work":
            if self.enough:
                return [Text("I have done enough.")]
            return [Text("One more.", chunk_chars=3, delay=0.4), ToolCall("look_up", {"number": len(results)})]
        if not results:
            [offered] = [each["function"] for each in call.body["tools"] if each["function"]["name"] == rest]
            fitting = {"number": 1, "country": "NZ"}
            return [
                Text("I try."),
                ToolCall(rest, {name: fitting[name] for name in offered["parameters"]["properties"]}),
            ]
        return [Text(f"I read: {results[-1]}")]


def _project(folder: Path, agents: Block, *, model: bool) -> Path:
    """Write the project of a version: its app `desk`, and settings."""
    app = folder / "desk"
    app.mkdir(parents=True)
    (app / "__init__.py").touch()
    (app / "agents.py").write_text(agents.body)
    (folder / "desk_settings.py").write_text(
        "from agents_project.settings import *\nINSTALLED_APPS = [*INSTALLED_APPS, 'desk']\n"
        # Runs that work as long as the test takes
        "LONGHAUL = {'MAX_STEPS': 1000, 'CONTEXT_MESSAGES': 1000}\n"
    )
    if model:
        (app / "models.py").write_text(MODELS)
        (app / "migrations").mkdir()
        (app / "migrations" / "__init__.py").touch()
    return folder


def _version(folder: Path, servers: embedded.Servers, model: ModelServer) -> Machine:
    environment = {
        "DJANGO_SETTINGS_MODULE": "desk_settings",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "DATABASE_URL": servers.database_url,
        "REDIS_URL": servers.redis_url,
        "OPENAI_BASE_URL": model.url,
        "OPENAI_API_KEY": "none",
    }
    return Machine(environment, folder)


def _call(machine: Machine, run: str) -> tuple[Any, ...]:
    """Return (name, outcome, code) of a run's first call."""
    query = "SELECT name, outcome, error->>'code' FROM longhaul_tools_toolcall WHERE run_id = %s ORDER BY step LIMIT 1"
    return machine.rows(query, run)[0]


@pytest.mark.slow
@pytest.mark.timeout(400)  # servers, and two versions of three kinds of workers, start on a busy machine
def test_a_project_is_upgraded_under_its_runs(own_servers: embedded.Servers, tmp_path: Path) -> None:
    first, second = [block for block in blocks(PAGE) if block.kind == "python"]
    commands, active = [block for block in blocks(PAGE) if block.kind == "console"]
    talk = Desk()
    with ModelServer(talk) as model:
        old = _version(_project(tmp_path / "v1", first, model=False), own_servers, model)
        new = _version(_project(tmp_path / "v2", second, model=True), own_servers, model)
        try:
            # Given workers that came before the tables, and wait for them
            for kind, pool in (("tools", "prefork -c 2"), ("agents", "gevent -c 100"), ("control", "threads -c 2")):
                line = f"celery -q -A agents_project worker -Q longhaul.{kind} -P {pool} -n {kind}-1@test"
                old.start(f"{kind}-1", line.split())
            until(lambda: "run manage.py migrate" in old.log("agents-1"), 60, "it says what it waits for")
            old.manage("migrate", "--verbosity", "0")
            until(lambda: all(old.present(kind) == 1 for kind in ("agents", "tools", "control")), 60)
            # And runs under way
            work = [old.start_run("desk", f"work {n}")[0] for n in range(4)]
            [clerk] = old.start_run("clerk", "work as clerk")
            until(lambda: old.settled() >= 10, 60)
            # When the page's commands are run from the new code, the old workers go on
            new.manage("makemigrations", "desk", "--verbosity", "0")
            _run(commands, new)
            done = old.settled()
            until(lambda: old.settled() >= done + 5, 60)
            # A run of an agent that only the new code knows fails on an old worker: web comes last
            [early] = new.start_run("officer", "work early")
            new.await_status(early, "failed")
            assert "unknown_agent" in new.manage("explain_run", early)
            # When calls are open that no worker takes
            old.stop("tools-1")
            waiting = {name: old.start_run("desk", f"use {name}")[0] for name in ("weigh", "price", "look_up")}
            query = (
                "SELECT count(*) FROM longhaul_tools_toolcall WHERE run_id = ANY(%s::uuid[]) AND status = 'requested'"
            )
            until(lambda: old.one(query, list(waiting.values())) == 3, 60)
            # And the new workers come, in the page's order
            for kind in ("tools", "agents", "control"):
                new.worker(kind, 2)
                if f"{kind}-1" in old.processes:
                    old.stop(f"{kind}-1")
            # Then the call of the removed tool, and that without the new parameter, fail, and the model reads it
            for run in waiting.values():
                new.await_status(run, "completed")
            assert _call(new, waiting["weigh"]) == ("weigh", "failed", "unknown_tool")
            assert _call(new, waiting["price"]) == ("price", "failed", "invalid_arguments")
            query = "SELECT output FROM longhaul_runs_run WHERE id = %s"
            assert "There is no tool named 'weigh'" in new.one(query, waiting["weigh"])
            assert "country" in new.one(query, waiting["price"])
            assert new.one(query, waiting["look_up"]) == "I read: shipped by any"
            # And what is new is offered
            for name, result in (("label", "printed"), ("price", "7.00 to NZ")):
                [used] = new.start_run("desk", f"use {name}")
                new.await_status(used, "completed")
                assert new.one(query, used) == f"I read: {result}"
            # And a run that went on all the time has the new instructions
            until(lambda: all("second" in talk.told[f"work {n}"][-1] for n in range(4)), 60)
            assert all("first" in talk.told[f"work {n}"][0] for n in range(4))
            talk.enough = True
            for run in work:
                assert new.await_status(run, "completed", "failed") == "completed"
            # And that of the agent without a name says what the page shows
            new.await_status(clerk, "failed")
            [shown] = [block.body.strip() for block in blocks(PAGE) if block.kind == "text"]
            said = new.manage("explain_run", clerk)
            span = re.compile(r"after \d+ steps?")
            assert span.sub("_", shown) in span.sub("_", said), said
            _run(active, new)
            assert "no invariant violated" in new.manage("check_runs")
            # When the old name is back, it goes on
            source = (tmp_path / "v2/desk/agents.py").read_text()
            (tmp_path / "v2/desk/agents.py").write_text(
                f"{source}clerk = Agent(name='clerk', model='openai:test', tools=[look_up])\n"
            )
            new.worker("agents", 3)
            new.stop("agents-2")
            resumed = new.manage(
                "shell", "--verbosity", "0", "-c",
                f"from runs import Run; print(Run.objects.get(pk='{clerk}').resume().pk)",
            ).strip()  # fmt: skip
            new.await_status(resumed, "completed")
            # And the way back: old workers on the newer tables
            old.worker("agents", 4)
            old.worker("tools", 4)
            new.stop("agents-3")
            new.stop("tools-2")
            [back] = old.start_run("desk", "use weigh")
            old.await_status(back, "completed")
            assert old.one(query, back) == "I read: 2 kg"
            assert "no invariant violated" in old.manage("check_runs")
        finally:
            old.end()
            new.end()


def _run(block: Block, machine: Machine) -> None:
    console.session([block], ROOT, machine.environment, here={})
