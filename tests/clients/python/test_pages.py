"""The code of the client's README, and of docs/clients.md, runs as it stands there: here, and where only the wheel is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from agents_project.demo.model_server import ModelCall, Reply, Text
from longhaul_client import Longhaul
from runs.agents import registry
from runs.models import Run
from tests.docs.page import ROOT, text
from tests.host import wheel
from tests.http.conftest import Api
from tests.http.web import serving
from tests.streams.app.agents import teller
from tests.workers.conftest import Redis, kit_over

README = "clients/python/README.md"
PAGES = (README, "docs/clients.md")
EXAMPLE = '"https://agents.example.com", api_key="lh_..."'
SETTINGS = "tests.streams.settings"


class Broker(Redis):
    environment: Mapping[str, str] = {"DJANGO_SETTINGS_MODULE": SETTINGS}


def order_desk(call: ModelCall) -> Reply:
    return [Text("Order 1042 is shipped.", chunk_chars=4, delay=0.01)]


def script(page: str, url: str, key: str) -> str:
    """Return the page's Python as one script, each block on the lines where it stands, at this server and for its agent."""
    content, made = text(page), ""
    for each in re.finditer(r"^```python\n(.*?)^```$", content, re.MULTILINE | re.DOTALL):
        made += "\n" * (content.count("\n", 0, each.start(1)) - made.count("\n")) + each[1]
    assert EXAMPLE in made
    return made.replace(EXAMPLE, f"{url!r}, api_key={key!r}").replace('"support"', '"teller"')


@pytest.fixture
def desk(transactional_db: None, tmp_path: Path) -> Iterator[str]:
    """The address of a server whose workers answer. (The agent of the pages is called another name here.)"""
    registry.add(teller)
    with kit_over(Broker(), tmp_path) as kit, serving(tmp_path, DJANGO_SETTINGS_MODULE=SETTINGS) as web:
        kit.model.script = order_desk
        kit.up(agents=1, control=1)
        yield web.url


def run(python: Path | str, page: str, desk: str, key: str, folder: Path) -> str:
    """Run a page's code by this Python, away from this project."""
    path = folder / "page.py"
    path.write_text(script(page, desk, key))
    alone = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DJANGO_SETTINGS_MODULE")}
    done = subprocess.run(
        [str(python), "-W", "error", str(path)], cwd=folder, env=alone, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.django_db(transaction=True)
def test_the_code_of_the_pages_runs(desk: str, api: Api, tmp_path: Path) -> None:
    for page in PAGES:  # README.md, and "docs/clients.md"
        assert "Order 1042 is shipped." in run(sys.executable, page, desk, api.key, tmp_path)
    assert {each.status for each in Run.objects.all()} == {"completed"}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.django_db(transaction=True)
def test_its_wheel_alone_is_enough(desk: str, api: Api, tmp_path: Path) -> None:
    """What its metadata names is all that it needs, and a checker of types sees its types."""
    source = tmp_path / "source"
    for path in wheel.tracked():
        if path.is_relative_to("clients/python"):
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes((ROOT / path).read_bytes())
    wheel.uv("build", "--wheel", "--quiet", "--out-dir", str(tmp_path / "dist"), str(source / "clients" / "python"))
    (built,) = (tmp_path / "dist").glob("*.whl")
    programs = wheel.environment(tmp_path / "alone", Path(sys.executable), str(built))
    assert "Order 1042 is shipped." in run(programs / "python", README, desk, api.key, tmp_path)
    (tmp_path / "typed.py").write_text(
        "from longhaul_client import Longhaul\nreveal_type(Longhaul('http://x').runs.get('x').status)\n"
    )
    asked = ["-m", "mypy", "--strict", "--python-executable", str(programs / "python"), "typed.py"]
    told = subprocess.run([sys.executable, *asked], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Literal['held'] | Literal['queued']" in told.stdout or "'held', 'queued'" in told.stdout, told.stdout
    assert "Success" in told.stdout


def test_the_readme_names_every_method() -> None:
    with Longhaul("http://nowhere") as client:
        for name in ("runs", "threads", "messages", "tool_calls"):
            (row,) = [
                line
                for line in text(README).splitlines()
                if line.startswith("| `client.") and f"`client.{name}`" in line
            ]
            told = set(re.findall(r"`(\w+)`", row))
            own = {each for each in dir(getattr(client, name)) if not each.startswith("_")}
            assert own <= told
            assert told <= own or name in ("messages", "tool_calls")
