"""Child processes: none is left behind, and no stranger is hit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from agents_project.processes import Children, Identity, free_port

SLEEP = [sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(60)"]
DEAF = [
    sys.executable, "-S", "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]  # fmt: skip


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    children = Children(tmp_path / "children.json")
    yield children
    children.stop_all(timedelta(0))


def start(children: Children, name: str, command: list[str], tmp_path: Path) -> subprocess.Popen[bytes]:
    """Start a child and wait until its program runs."""
    path = tmp_path / f"{name}.out"
    with path.open("wb") as output:
        child = children.start(name, command, output=output)
    deadline = time.monotonic() + 20
    while path.read_text() != "up\n":
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return child


def test_stop_all_asks_first_and_kills_the_deaf(children: Children, tmp_path: Path) -> None:
    polite = start(children, "polite", SLEEP, tmp_path)
    deaf = start(children, "deaf", DEAF, tmp_path)
    assert children.stop_all(timedelta(seconds=0.3)) == ["deaf"]
    assert (polite.returncode, deaf.returncode) == (-signal.SIGTERM, -signal.SIGKILL)
    assert json.loads((tmp_path / "children.json").read_text()) == []


def test_a_child_has_a_session_of_its_own(children: Children, tmp_path: Path) -> None:
    child = start(children, "child", SLEEP, tmp_path)
    assert os.getsid(child.pid) == child.pid


def test_a_name_is_free_again_when_its_child_has_ended(children: Children, tmp_path: Path) -> None:
    start(children, "worker", SLEEP, tmp_path)
    with pytest.raises(ValueError, match="worker is still running"):
        children.start("worker", SLEEP)
    children.kill("worker")
    assert start(children, "worker", SLEEP, tmp_path).poll() is None


@pytest.mark.needs_linux
def test_children_of_a_killed_supervisor_die_with_it(tmp_path: Path) -> None:
    script = f"""if True:
        import time
        from pathlib import Path
        from agents_project.processes import Children
        child = Children(Path("children.json")).start("child", {SLEEP!r})
        print(child.pid, flush=True)
        time.sleep(60)
    """
    supervisor = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    child = Identity.of(int(supervisor.stdout.readline()))
    assert child is not None
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()
    deadline = time.monotonic() + 10
    while child.alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_leftovers_are_killed_and_strangers_with_their_number_are_not(tmp_path: Path) -> None:
    left, stranger = (subprocess.Popen(SLEEP, stdout=subprocess.DEVNULL) for _ in range(2))
    try:
        rows = []
        for name, process, shift in (("left", left, ""), ("stranger", stranger, "0")):
            identity = Identity.of(process.pid)
            assert identity is not None
            rows.append(
                {"name": name, "pid": process.pid, "started": identity.started + shift, "command": identity.command}
            )
        (tmp_path / "children.json").write_text(json.dumps(rows))

        killed = Children(tmp_path / "children.json").kill_leftovers()
        assert [identity.pid for identity in killed] == [left.pid]
        assert left.wait(10) == -signal.SIGKILL
        assert stranger.poll() is None
        assert Children(tmp_path / "children.json").kill_leftovers() == []
    finally:
        for process in (left, stranger):
            process.kill()
            process.wait()


@pytest.mark.parametrize("text", ["", "{", "[{}]", '{"pid": 1}'])
def test_a_torn_record_is_no_obstacle(tmp_path: Path, text: str) -> None:
    (tmp_path / "children.json").write_text(text)
    assert Children(tmp_path / "children.json").kill_leftovers() == []


def test_a_taken_port_is_replaced() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = free_port(port)
        assert other != port
    assert free_port(port) == port
