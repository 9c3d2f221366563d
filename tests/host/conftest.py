"""The shop, adopted: docs/adopt.md is followed once for each version of Django, in an environment that has the wheel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agents_project import embedded
from agents_project.demo.model_server import ModelCall, ModelServer, Pause, Reply, Text, ToolCall
from tests.docs.page import Block, blocks
from tests.host import wheel
from tests.host.host import Host, shop
from tests.host.interpreters import interpreters

PAGE = "docs/adopt.md"
STEP = "tried by tests/host/conftest.py::adopted"
DJANGO = {"5.2": "django==5.2.*", "6": "django>=6,<7"}


def order_desk(call: ModelCall) -> Reply:
    """Stands in for the service that the shop's agent asks."""
    last = next(place for place in range(len(call.messages) - 1, -1, -1) if call.messages[place]["role"] == "user")
    asked = str(call.messages[last]["content"])
    number = int("".join(filter(str.isdigit, asked)) or "1042")
    if "slowly" in asked:
        return [Text(" ".join(f"w{n:03}" for n in range(130)), chunk_chars=5, delay=0.05), Pause(0.0)]
    if any(message["role"] == "tool" for message in call.messages[last:]):
        if "refund" in asked:
            return [Text(f"Order {number} is refunded.")]
        return [Text(f"Order {number} is shipped.")]
    if "refund" in asked:
        return [ToolCall("refund", {"number": number, "cents": 500})]
    return [ToolCall("look_up_order", {"number": number})]


def python_for(django: str) -> Path:
    """Return the oldest Python for 5.2 and the newest for 6, or skip."""
    found = interpreters()
    if django == "5.2":
        return found[min(found)]
    if max(found) < (3, 12):
        pytest.skip("needs Python 3.12 or newer beside this one, for Django 6")
    return found[max(found)]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def programs(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with Django 5.2."""
    return environment("5.2", built, tmp_path_factory)


def environment(django: str, built: Path, folders: pytest.TempPathFactory) -> Path:
    made = folders.getbasetemp() / f"django-{django}"  # one a session
    if not made.exists():
        wheel.environment(made, python_for(django), DJANGO[django], "uvicorn", str(built))
    return made / "bin"


@pytest.fixture(scope="session", params=list(DJANGO))
def adopted(
    request: pytest.FixtureRequest,
    built: Path,
    servers: embedded.Servers,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Iterator[Host]:
    """The shop after the page, its own worker and Longhaul's three at work, a model behind them."""
    version: str = request.param
    programs = environment(version, built, tmp_path_factory)
    folder = tmp_path_factory.mktemp("host")
    transcript = pytestconfig.cache.mkdir("host") / f"django-{version}.txt"
    name = f"host_{version.replace('.', '_')}"
    with (
        ModelServer(order_desk) as model,
        shop(folder / "shop", programs, transcript, servers, name=name, OPENAI_BASE_URL=model.url) as host,
    ):
        # Given the shop as it was
        host.run("python manage.py migrate")
        host.before = host.python(AS_IT_WAS + CONFIGURATION)
        host.leave()
        # When its people follow the page
        steps = [block for block in blocks(PAGE) if block.told == STEP]
        for block in steps:
            if block.body.startswith("$ celery"):
                _start(host, block)
            else:
                host.follow(block)
        yield host


AS_IT_WAS = """
import io
from django.core.management import call_command
from customers.models import Customer
from orders.models import Order
call_command("migrate", database="archive", stdout=io.StringIO())
Order.objects.create(number=1042, state="shipped")
Customer.objects.create_superuser("boss@shop.example", "pw")
Customer.objects.create_user("ann@shop.example", "pw")
"""
# What the host's own Celery app looks like, with each of its tasks.
CONFIGURATION = """
from shop.celery import app
app.loader.import_default_modules()
for name in sorted(app.conf):
    if "url" not in name and name != "broker_transport_options" and not name.startswith("__"):
        print(name, app.conf[name])
for name, task in sorted(app.tasks.items()):
    if not name.startswith("longhaul."):
        print(name, type(task.backend), {attribute: getattr(task, attribute) for attribute, _ in task.from_config})
"""


def _start(host: Host, block: Block) -> None:
    names = []
    for command, _ in block.commands:
        name = command.rpartition(" -n ")[2].removesuffix("@shop")
        host.start(name, command)
        names.append(name)
    host.start("shop", "celery -A shop worker -c 1 -n shop@shop")
    host.present(*names)
