"""A RabbitMQ of one's own: it dies with who started it; and the main job over it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from agents_project import embedded
from agents_project.processes import Identity
from agents_project.rabbitmq import RabbitMQ
from tests.protocol.rows import wait_until

pytestmark = [
    pytest.mark.needs_rabbitmq,
]


@pytest.fixture(scope="module")
def node() -> Iterator[RabbitMQ]:
    with RabbitMQ() as node:
        yield node


def test_a_node_is_gone_when_its_starter_was_killed() -> None:
    program = (
        "import time\n"
        "from agents_project.rabbitmq import RabbitMQ\n"
        "with RabbitMQ() as node:\n"
        "    print(node.pid, node.folder, flush=True)\n"
        "    time.sleep(600)\n"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", program], cwd=embedded.PROJECT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert starter.stdout is not None
    pid, folder = starter.stdout.readline().split()
    process = Identity.of(int(pid))
    assert process is not None
    assert "beam" in process.command  # the node itself, and no script before it
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    wait_until(lambda: not process.alive())
    subprocess.run(["rm", "-r", folder], check=True)  # what a killed one cannot do


@pytest.mark.timeout(240)
def test_the_demos_main_job_keeps_its_word_over_rabbitmq(node: RabbitMQ) -> None:
    """50 tool calls, an agents worker and a tools worker killed; what it claims is looked up in the database."""
    purpose = f"demo-rabbitmq-{os.getpid()}"
    foreign = ("DATABASE_URL", "REDIS_URL", "CELERY_BROKER_URL", "OPENAI_BASE_URL", "OPENAI_API_KEY")
    given = {name: value for name, value in os.environ.items() if name not in foreign}
    try:
        done = subprocess.run(
            [sys.executable, "manage.py", "demo", "--once", "--json", "--job", "main"],
            cwd=embedded.PROJECT,
            env={**given, "LONGHAUL_PURPOSE": purpose, "CELERY_BROKER_URL": node.url},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout)
        assert figures["violations"] == 0
        table = node.control("list_queues", "name", "type", "messages")
        assert "longhaul.agents\tquorum\t0" in table  # it was this broker, and nothing is left there
    finally:
        wait_until(lambda: embedded.remove(purpose), 20)
