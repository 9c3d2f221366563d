"""docs/http.md: its table names what is routed; its commands, and the README's, do what they say beside `make dev`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents_project import embedded
from agents_project.processes import free_port
from runs.http import urls
from tests.docs import console
from tests.docs.page import ROOT, blocks, code, table

PAGE = "docs/http.md"


def test_the_calls_are_all_there() -> None:
    told = {code(call)[0] for call, _ in table(PAGE, "The calls")}
    parameter = re.compile(r"<\w+:(\w+)>")
    routed = {
        method.upper() + " /" + parameter.sub(r"{\1}", str(route.pattern))
        for route in urls.urlpatterns
        for method in route.callback.cls.operations()
    }
    assert told == routed


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[dict[str, str]]:
    """`make dev` on servers of its own; the environment of a shell beside it."""
    purpose = embedded.reserve("test-dev")
    port = free_port(0)
    shell = console.environment(LONGHAUL_PURPOSE=purpose, PORT=str(port), FLOWER_PORT=str(free_port(0)))
    log = tmp_path / "dev.log"
    with log.open("wb") as output:
        running = subprocess.Popen(
            [f"{console.BIN}/python", "-m", "agents_project.dev"],
            cwd=ROOT, env=shell, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        _await_ready(port, running, log)
        yield shell
    finally:
        running.send_signal(signal.SIGINT)
        try:
            running.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
        embedded.remove(purpose, force=True)


def _await_ready(port: int, running: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 90  # servers, migrations and six processes start; usual are 15 s
    while True:
        assert running.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.needs_curl
@pytest.mark.timeout(400)
def test_the_commands_beside_make_dev_show_what_the_page_shows(dev: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name != ".git":
            (folder / path.name).symlink_to(path)
    for page in ("README.md", PAGE):
        steps = [block for block in blocks(page) if block.told == "in a shell"]
        assert steps, page
        console.session(steps, folder, dev, here={"http://127.0.0.1:8000": f"http://127.0.0.1:{dev['PORT']}"})
