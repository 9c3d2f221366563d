"""What docs/operations.md says of logs is what the formatter writes and the code logs."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.docs.page import ROOT
from threads import logs
from threads.logs import JSONFormatter

PAGE = (ROOT / "docs/operations.md").read_text().partition("\n## Logs\n")[2].partition("\n## ")[0]
WORDS = {"status.value": ("completed", "failed"), "what": ("queued", "cancelled", "settled", "retried")}


def line(
    time: str, message: str, name: str = "longhaul.engine", extra: dict[str, Any] | None = None, **ids: Any
) -> str:
    record = logging.LogRecord(name, logging.INFO, "", 0, message, (), None)
    record.created = datetime.fromisoformat(time).replace(tzinfo=UTC).timestamp()
    vars(record).update(extra or {})
    with logs.context(**ids):
        return JSONFormatter().format(record)


def test_the_line_of_the_page_is_what_the_formatter_writes() -> None:
    shown = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)[0]
    said = json.loads(shown)
    ids = {name: said[name] for name in logs.IDS if name in said}
    ids |= {name: UUID(ids[name]) for name in ("run", "tool_call", "thread")}
    extra = {"action": said["action"], "outcome": said["outcome"]}
    assert line(said["time"][:-1], said["message"], said["logger"], extra, **ids) == shown.replace("\n ", "").strip()


def test_one_command_follows_a_run_over_all_workers(tmp_path: Path) -> None:
    block = re.findall(r"```console\n\$ (.*?)\n(.*?)```", PAGE, re.DOTALL)[0]
    command, output = block
    (tmp_path / "logs").mkdir()
    run = UUID("01a1ff94-c3f1-73be-8080-b26abd08feda")
    for text in output.strip().split("\n"):
        time, action, *rest = text.split()  # web has no name of a worker
        more: dict[str, Any] = dict(zip(("worker", "epoch"), rest, strict=False))
        if "epoch" in more:
            more["epoch"] = int(more["epoch"])
        told = line(time[:-1], "x", extra={"action": action}, run=run, **more)
        with (tmp_path / "logs" / f"{more.get('worker', 'web')}.log").open("a") as log:
            log.write(told + "\n" + line(time[:-1], "another's", extra={"action": action}, run=UUID(int=1)) + "\n")
            log.write("\nworker: Warm shutdown (MainProcess)\n")  # past all logging
    if shutil.which("jq") is None:  # then at least its words are those of the lines
        assert {".run", ".action", ".time", ".worker"} <= set(re.findall(r"\.\w+", command))
        return
    done = subprocess.run(
        ["bash", "-c", command], env={"RUN": str(run), "PATH": "/usr/bin:/bin:/usr/local/bin"}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [text.rstrip() for text in done.stdout.splitlines()] == output.strip().split("\n")


def test_the_table_of_actions_is_that_of_the_code() -> None:
    told = set(re.findall(r"`([a-z_.]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE))))
    found = set()
    for app in ("threads", "tools", "runs"):
        for path in (ROOT / app).rglob("*.py"):
            for action in re.findall(r'"action": f?"([^"]+)"', path.read_text()):
                if "{" not in action:
                    found.add(action)
                    continue
                kind, _, word = action.partition(".")
                for each in WORDS[word.strip("{}")]:
                    if (kind == "call") == (each in ("settled", "retried")):
                        found.add(f"{kind}.{each}")
    assert told == found


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_the_python_of_the_page_works(block: str) -> None:
    space: dict[str, Any] = {}
    exec(compile(block, "operations.md", "exec"), space)
    if "LOGGING" in space:
        from logging.config import DictConfigurator

        made = DictConfigurator(space["LOGGING"]).configure_formatter(space["LOGGING"]["formatters"]["json"])
        assert isinstance(made, JSONFormatter)
        from django.utils.module_loading import import_string

        assert import_string(space["LOGGING_CONFIG"]) is logs.configure
        assert import_string(space["DEFAULT_EXCEPTION_REPORTER"])
    else:
        from types import SimpleNamespace

        request = SimpleNamespace(headers={"X-Request-Id": "r-1"})
        assert space["with_request_id"](lambda _: logs.bound()["request_id"])(request) == "r-1"
