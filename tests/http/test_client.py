"""A client generated from the document runs the quick start against a real server."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest
from django.contrib.auth.models import User

from runs.agents import registry
from runs.http.schema import document
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, call, run_to_end
from tests.http.web import Web
from tests.workers.app.agents import worker_test
from threads.authentication import create_key

pytestmark = [pytest.mark.slow, pytest.mark.django_db(transaction=True)]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The generated package: any warning, as of an operation that was left out, fails."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "openapi.json").write_bytes(orjson.dumps(document()))
    # Its own ruff would write the code prettier, no other.
    (folder / "config.yaml").write_text("literal_enums: true\npost_hooks: []\n")
    made = subprocess.run(
        [sys.executable, "-m", "openapi_python_client", "generate", "--path", "openapi.json", "--meta", "none",
         "--output-path", "longhaul_generated", "--config", "config.yaml", "--fail-on-warning"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    assert "warning" not in (made.stdout + made.stderr).lower()
    sys.path.insert(0, str(folder))
    yield "longhaul_generated"
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "longhaul_generated"]:
        del sys.modules[name]


class Generated:
    """The functions and classes of the generated package, by name."""

    def __init__(self, package: str, client: Any) -> None:
        self.package, self.client = package, client
        self.models: ModuleType = importlib.import_module(f"{package}.models")

    def call(self, tag: str, name: str, *args: Any, **given: Any) -> Any:
        module = importlib.import_module(f"{self.package}.api.{tag}.{name}")
        return module.sync_detailed(*args, client=self.client, **given)


@pytest.fixture
def generated(package: str, web: Web) -> Iterator[Generated]:
    registry.add(worker_test)
    user = User.objects.create_user("ann")
    made = importlib.import_module(f"{package}.client")
    with made.AuthenticatedClient(base_url=web.url, token=create_key(user)[1]) as client:
        yield Generated(package, client)


def test_each_operation_is_in_the_client(package: str) -> None:
    folder = Path(str(importlib.import_module(package).__file__)).parent / "api"
    there = {path.stem for path in folder.rglob("*.py")} - {"__init__"}
    assert there == {said["operationId"] for methods in document()["paths"].values() for said in methods.values()}


def test_the_quick_start(generated: Generated, scripted_model: ScriptedModel) -> None:
    models = generated.models
    scripted_model.say(call("plain", seconds=0), "It is on its way.")

    thread = generated.call("threads", "create_thread", body=models.NewThread(agent="worker_test", title="Order 1042"))
    assert thread.status_code == 201
    assert (thread.parsed.title, thread.parsed.status) == ("Order 1042", None)

    body = models.NewRun(input_="Where is order 1042?", metadata=models.Metadata.from_dict({"order": 1042}))
    started = generated.call("runs", "start_run", thread.parsed.id, body=body, idempotency_key="order-1042")
    again = generated.call("runs", "start_run", thread.parsed.id, body=body, idempotency_key="order-1042")
    assert started.status_code == again.status_code == 202
    run = started.parsed
    assert isinstance(run, models.Run)
    assert isinstance(run.id, UUID)
    assert again.parsed.id == run.id
    assert started.headers["X-Run-Id"] == str(run.id)

    soon = generated.call("runs", "wait_for_run", run.id, timeout_seconds=0.01)
    assert soon.parsed.status in ("queued", "running")
    run_to_end(Run.objects.get(pk=run.id))
    ended = generated.call("runs", "wait_for_run", run.id, timeout_seconds=10.0).parsed
    assert (ended.status, ended.output, ended.steps) == ("completed", "It is on its way.", 2)
    assert ended.finished_at > ended.created_at

    said = generated.call("messages", "list_messages", thread.parsed.id).parsed
    assert [message.role for message in said.results] == ["user", "assistant", "tool", "assistant"]
    assert said.results[-1].content[0]["text"] == "It is on its way."

    log = generated.call("runs", "list_events", run.id).parsed
    assert log.finished
    assert [event.seq for event in log.results] == list(range(1, log.last_seq + 1))
    assert isinstance(log.results[-1], models.RunCompletedEvent)
    assert not [event for event in log.results if isinstance(event, models.OtherEvent)]
    spoken = [event.text for event in log.results if isinstance(event, models.TextDeltaEvent)]
    assert "".join(spoken) == "It is on its way."

    stream = generated.call("runs", "stream_run", run.id, starting_after=log.last_seq - 1)
    assert stream.parsed.startswith(": longhaul\nretry: 1000\n\n")
    assert f"id: {log.last_seq}\nevent: run.completed\n" in stream.parsed

    calls = generated.call("tool_calls", "list_run_tool_calls", run.id).parsed
    assert [(each.name, each.outcome) for each in calls.results] == [("plain", "success")]
    found = generated.call("runs", "list_runs", active=False, status=["completed"], agent=["worker_test"]).parsed
    assert [each.id for each in found.results] == [run.id]


def test_a_run_is_cancelled(generated: Generated) -> None:
    models = generated.models
    body = models.FirstRun(agent="worker_test", input_="Where is it?")
    run = generated.call("runs", "start_run_on_new_thread", body=body).parsed
    cancelled = generated.call("runs", "cancel_run", run.id, body=models.Cancel(reason="not needed any more")).parsed
    assert (cancelled.status, cancelled.stop_reason) == ("cancelled", "cancelled")
    log = generated.call("runs", "list_events", run.id).parsed
    assert isinstance(log.results[-1], models.RunCancelledEvent)


def test_refusals_are_typed(generated: Generated, package: str, web: Web) -> None:
    models = generated.models
    unknown = generated.call("runs", "get_run", uuid4())
    assert unknown.status_code == 404
    assert isinstance(unknown.parsed, models.Error)
    assert unknown.parsed.errors[0].code == "not_found"

    no_agent = generated.call("runs", "start_run_on_new_thread", body=models.FirstRun(agent="nobody", input_="Hello"))
    assert (no_agent.status_code, no_agent.parsed.errors[0].attr) == (400, "agent")

    thread = generated.call("threads", "create_thread", body=models.NewThread(agent="worker_test")).parsed
    nothing = generated.call("runs", "start_run", thread.id, body=models.NewRun())
    assert nothing.status_code in (400, 409)
    assert isinstance(nothing.parsed, models.Error)

    made = importlib.import_module(f"{package}.client")
    with made.AuthenticatedClient(base_url=web.url, token="lh_wrong") as nobody:
        refused = Generated(package, nobody).call("runs", "list_runs")
    assert (refused.status_code, refused.parsed.errors[0].code) == (401, "authentication_failed")
