"""Runs the commands of a page as its reader would: by a shell's words, in a folder, in an environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psycopg

from agents_project.processes import die_with_parent
from tests.docs.page import Block, shows, words

BIN = str(Path(sys.executable).parent)
# Of this test session, and not of a reader's shell.
FOREIGN = (
    "DATABASE_URL", "REDIS_URL", "CELERY_BROKER_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL", "LONGHAUL_DEMO_MODEL",
    "LONGHAUL_PURPOSE", "DJANGO_SETTINGS_MODULE", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "PYTEST_VERSION", "COLUMNS",
)  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a reader's shell, with this environment's programs in front."""
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    return {**kept, "PATH": BIN + os.pathsep + os.environ.get("PATH", ""), **more}


def run(block: Block, folder: Path, shell: Mapping[str, str]) -> None:
    """Run the block's commands one after another; each must succeed, and show what the page shows."""
    for command, expected in block.commands:
        done = subprocess.run(
            words(command), cwd=folder, env=dict(shell), capture_output=True, text=True, timeout=100, check=False
        )
        told = f"{block}: $ {command}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, told
        assert not expected or shows(expected, done.stdout), f"{told}\n-- the page shows:\n{expected}"


def session(blocks: Sequence[Block], folder: Path, shell: Mapping[str, str], *, here: Mapping[str, str]) -> None:
    """Run the blocks' commands by one shell, so that what one sets the next one has; each shows what the page shows.

    `here` says what stands on this machine for what the page says: the port of `make dev`, for one.
    """
    mark = "--- the next command ---"
    expected = []
    script = ["set -e"]
    for block in blocks:
        if block.kind == "python":
            (folder / block.file).write_text(block.body)
            continue
        for command, shown in block.commands:
            for page, local in here.items():
                command = command.replace(page, local)
            script += [command, f"echo '{mark}'"]
            expected.append((block, command, shown))
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        env=dict(shell),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    outputs = done.stdout.split(f"{mark}\n")
    for (block, command, shown), output in zip(expected, outputs, strict=False):
        told = f"{block}: $ {command}\n{output}"
        assert not shown or shows(shown, output), f"{told}\n-- the page shows:\n{shown}\n{done.stderr}"
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def workers(
    block: Block, folder: Path, shell: Mapping[str, str], *, database_url: str, logs_in: Path
) -> Iterator[None]:
    """Run the block's Celery workers; when the body begins, one of each kind is present."""
    logs = [logs_in / f"worker-{number}.log" for number in range(len(block.commands))]
    started: list[subprocess.Popen[bytes]] = []
    parent = os.getpid()
    try:
        for (command, _), log in zip(block.commands, logs, strict=True):
            with log.open("wb") as output:
                started.append(
                    subprocess.Popen(
                        words(command),
                        cwd=folder,
                        env=dict(shell),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        # Else they outlive a killed session, and take the next one's runs: its purpose is the same.
                        preexec_fn=lambda: die_with_parent(parent),
                    )
                )
        _await_present(database_url, started, logs)
        yield
    finally:
        for worker in started:
            worker.send_signal(signal.SIGTERM)
        for worker in started:
            try:
                worker.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()


def _await_present(database_url: str, started: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
    wanted = {"agents", "tools", "control"}
    until = time.monotonic() + 60  # a first start on a slow, busy machine; usual are 3 to 6 s
    with psycopg.connect(database_url, autocommit=True) as connection:
        while True:
            rows = connection.execute("SELECT DISTINCT kind FROM longhaul_tools_worker WHERE gone_at IS NULL")
            if wanted <= {kind for (kind,) in rows}:
                return
            alive = all(worker.poll() is None for worker in started)
            told = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in logs)
            assert alive, f"a worker has ended\n{told}"
            assert time.monotonic() < until, f"not all workers are present\n{told}"
            time.sleep(0.1)
