"""schemathesis over the whole document, with a real server: no 5xx, no answer that the document does not promise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connections

from runs.agents import registry
from runs.models import TERMINAL, Run
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from tests.http.web import Web
from tests.workers.app.agents import worker_test
from threads.authentication import create_key
from tools.models import ToolCall

HERE = Path(__file__).parent
SEED = 1042
# What a schema cannot say is refused with 400, which is documented: a thread without an agent, a run that cannot be resumed or retried,
# a whole number of more than 64 bits somewhere in metadata.
MEANT = ["2xx", "3xx", "400", "401", "403", "404", "409"]
MEAN = (
    *("start_run", "start_run_on_new_thread", "resume_run", "retry_run", "fork_run"),
    *("create_thread", "update_thread", "save_messages"),
)


@pytest.fixture
def ids(web: Web, scripted_model: ScriptedModel, transactional_db: None) -> dict[str, Any]:
    """A key, and rows of its owner's for each address."""
    registry.add(worker_test)
    user = User.objects.create_user("ann")
    scripted_model.say(call("plain", seconds=0), "It is on its way.")
    run = worker_test.start("Where is it?", owner=user, metadata={"order": 1042})
    run_to_end(run)
    cancelled = worker_test.start("Where is it?", owner=user)
    cancelled.cancel()
    return {
        "key": create_key(user)[1],
        "runs": [str(run.pk), str(cancelled.pk)],
        "threads": [str(run.thread_id)],
        "tool-calls": [str(ToolCall.objects.get().pk)],
    }


@pytest.fixture
def ended_soon(transactional_db: None) -> Iterator[None]:
    """No worker takes the runs that are started: somebody cancels them, so that their streams end."""
    over = threading.Event()

    def cancel() -> None:
        try:
            while not over.wait(0.2):  # between looks
                for run in Run.objects.exclude(status__in=TERMINAL):
                    run.cancel()
        finally:
            connections.close_all()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    yield
    over.set()
    canceller.join()


def config(ids: dict[str, Any], phases: dict[str, Any]) -> str:
    """Return schemathesis' configuration (TOML)."""

    def about(**said: Any) -> str:
        return "[[operations]]\n" + "".join(
            f"{name.replace('_', '-')} = {json.dumps(value)}\n" for name, value in said.items()
        )

    lines = [
        f"seed = {SEED}",
        "workers = 1",
        "continue-on-failure = true",
        "request-timeout = 20",
        "max-stream-events = 100",
        f'[auth.openapi.apiKey]\nbearer = "{ids["key"]}"',
        # NUL is refused, and no pattern in a schema would say so to people better.
        "[generation]\nallow-x00 = false\nmode = \"all\"\nno-shrink = true\ndatabase = \"none\"",
        *(f"[phases.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in said.items()) for name, said in phases.items()),
        *(f"[dictionaries.{name}]\nvalues = {json.dumps(ids[name])}" for name in ("runs", "threads", "tool-calls")),
    ]  # fmt: skip
    for name in ("runs", "threads", "tool-calls"):
        lines.append(
            about(include_path_regex=f"/api/{name}/.id", exclude_method="DELETE")
            + f'parameters = {{ "path.id" = {{ dictionary = "{name}", probability = 0.8 }} }}\n'
        )
    lines.append(
        about(include_operation_id=MEAN)
        + f"checks = {{ positive_data_acceptance = {{ expected-statuses = {json.dumps(MEANT)} }} }}\n"
    )
    # That no worker is present is an answer, no failure.
    lines.append(
        about(include_path="/readyz")
        + 'checks = { not_a_server_error = { expected-statuses = ["2xx", "4xx", "503"] } }\n'
    )
    return "\n".join(lines)


def fuzz(web: Web, ids: dict[str, Any], folder: Path, phases: dict[str, Any], *options: str) -> int:
    """Run schemathesis; return how many requests it has made. Raises AssertionError with all that it says."""
    (folder / "schemathesis.toml").write_text(config(ids, phases))
    report = folder / "report.json"
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(folder / "schemathesis.toml"), "run"]
    ran = subprocess.run(
        [*command, f"{web.url}/api/schema", "--no-color", "--report-json-path", str(report), *options],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.http.fuzz_hooks", "PYTHONPATH": str(HERE.parents[1])},
    )  # fmt: skip
    found = re.search(r"(\d+) generated", ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert found is not None, ran.stdout
    return int(found[1])


@pytest.mark.slow
def test_a_few_of_everything(web: Web, ids: dict[str, Any], ended_soon: None, tmp_path: Path) -> None:
    phases = {"examples": {}, "coverage": {"enabled": False}, "stateful": {"enabled": False}}
    fuzz(web, ids, tmp_path, phases, "--max-examples", "3")
    assert "Traceback" not in web.said()
    assert_invariants()


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_thousands_of_cases(
    web: Web, ids: dict[str, Any], ended_soon: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = {"examples": {}, "coverage": {}, "fuzzing": {}, "stateful": {"max-steps": 5}}
    cases = fuzz(web, ids, tmp_path, phases, "--max-examples", "30")
    with capsys.disabled():
        print(f"\nschemathesis: {cases} cases, seed {SEED}")
    assert cases >= 2000
    assert "Traceback" not in web.said()
    assert_invariants()
