"""The compose file: valid, the Procfile's commands, nothing secret in it, nothing required that could be forgotten."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest

from agents_project import probe
from agents_project.embedded import PROJECT
from runs.conf import settings
from tests.images import compose
from tests.images.compose import OURS
from tools import presence

REQUIRED = ("SECRET_KEY", "POSTGRES_PASSWORD", "BROKER_PASSWORD", "FLOWER_BASIC_AUTH")
# The images' own documentation names these; no code of ours reads them.
OF_SERVERS = {
    "POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "VALKEYCLI_AUTH", "REDISCLI_AUTH", "RABBITMQ_DEFAULT_USER",
    "RABBITMQ_DEFAULT_PASS",
}  # fmt: skip
OF_THE_HOST = {
    "PORT",
    "FLOWER_PORT",
    "POSTGRES_PASSWORD",
    "BROKER_PASSWORD",
}  # compose itself uses them, or a URL has them


def filled() -> dict[str, str]:
    return {**compose.env_file(compose.EXAMPLE), **{name: f"test-{name.lower()}" for name in REQUIRED}}


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    return compose.read(filled())


def environment(service: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = service.get("environment", {})
    return found


def test_the_file_keeps_to_the_specification() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(compose.FILE)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip

    assert checked.returncode == 0, checked.stdout


def test_each_command_is_the_procfiles_line(stack: dict[str, Any]) -> None:
    services = {name: stack["services"][name] for name in OURS}
    lines = compose.procfile({name: environment(service) for name, service in services.items()})

    assert set(lines) == set(OURS)
    for name, service in services.items():
        assert compose.command(service) == lines[name].words, name
        assert lines[name].environment.items() <= environment(service).items(), name


def test_without_a_secret_it_does_not_start_and_an_empty_one_is_none() -> None:
    for name in REQUIRED:
        for missing in ({**filled(), name: ""}, {key: value for key, value in filled().items() if key != name}):
            with pytest.raises(compose.Refused, match=name):
                compose.read(missing)


def test_the_example_names_each_variable_once_with_the_files_default_and_no_secret() -> None:
    example = compose.env_file(compose.EXAMPLE)
    used = compose.variables(compose.FILE.read_text())

    assert list(example) == list(dict.fromkeys(re.findall(r"^(\w+)=", compose.EXAMPLE.read_text(), re.MULTILINE)))
    assert set(example) == set(used)
    for name, ways in used.items():
        [(kind, rest)] = ways  # one way: a default that differs from place to place would be a trap
        assert kind == (":?" if name in REQUIRED else ":-"), f"{name} could be forgotten unseen"
        assert example[name] == ("" if kind == ":?" else rest), name


def test_each_variable_is_read_by_somebody(stack: dict[str, Any]) -> None:
    code = "".join(
        path.read_text() for folder in ("agents_project", "runs") for path in (PROJECT / folder).rglob("*.py")
    )
    code += (PROJECT / "Procfile").read_text()
    code += "".join(
        f'"{name}"' for name in ("FLOWER_BASIC_AUTH", "FLOWER_ADDRESS", "FLOWER_MAX_TASKS")
    )  # Flower's own way of options

    given = {name for service in stack["services"].values() for name in environment(service)}
    for name in given - OF_SERVERS:
        assert re.search(rf"\b{name}\b", code), f"nobody reads {name}"
    assert set(compose.variables(compose.FILE.read_text())) <= given | OF_THE_HOST


def test_what_the_settings_read_can_be_given(stack: dict[str, Any]) -> None:
    source = (PROJECT / "agents_project" / "settings.py").read_text()
    read = set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", source)) | set(re.findall(r"_listed\(\"(\w+)\"", source))
    given = {name for service in stack["services"].values() for name in environment(service)}

    # Development's; where the image's files are; a pooler's, which stands not in this file
    assert read - given <= {
        "DJANGO_DEBUG",
        "LONGHAUL_STATIC_ROOT",
        "LONGHAUL_DB_PREPARE",
        "DIRECT_DATABASE_URL",
    }


def test_only_who_needs_a_secret_has_it(stack: dict[str, Any]) -> None:
    def have(name: str) -> set[str]:
        return {service for service, said in stack["services"].items() if name in environment(said)}

    assert have("OPENAI_API_KEY") == {"agents"}
    assert have("FLOWER_BASIC_AUTH") == {"flower"}
    assert have("POSTGRES_PASSWORD") == {"postgres"}


def test_each_service_has_its_bounds_comes_back_and_says_how_it_is(stack: dict[str, Any]) -> None:
    unchecked = {"beat", "migrate"}
    for name, service in stack["services"].items():
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        assert service["restart"] == ("on-failure:3" if name == "migrate" else "unless-stopped"), name
        assert service["logging"] == {"driver": "local"}, name
        assert (service["healthcheck"] == {"disable": True}) == (name in unchecked), name
        if name not in unchecked:
            assert compose.seconds(service["healthcheck"]["timeout"]) > 2 * probe.WAIT.total_seconds()
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
    for name in OURS:
        service = stack["services"][name]
        assert (service["read_only"], service["init"], service["cap_drop"]) == (True, True, ["ALL"]), name
        assert service["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}, name
    for name in ("agents", "tools", "control"):
        assert stack["services"][name]["healthcheck"]["test"] == ["CMD", "python", "-m", "agents_project.probe", name]


def test_a_drain_has_its_time(stack: dict[str, Any]) -> None:
    for name in ("agents", "tools", "control"):
        grace = timedelta(seconds=compose.seconds(stack["services"][name]["stop_grace_period"]))
        assert grace > settings().drain_grace + timedelta(seconds=10), name


def test_the_servers_stand_where_no_way_leads_out_or_in(stack: dict[str, Any]) -> None:
    assert stack["networks"]["inside"] == {"internal": True}
    for name in ("postgres", "valkey", "rabbitmq"):
        service = stack["services"][name]
        assert service["networks"] == ["inside"], name
        assert "ports" not in service, name
    assert stack["services"]["rabbitmq"]["profiles"] == ["rabbitmq"]
    assert "noeviction" in stack["services"]["valkey"]["command"]


def test_the_probe_waits_as_long_for_a_beat_as_the_watcher() -> None:
    from runs.conf import KEYS

    assert timedelta(seconds=KEYS["PRESENCE_TTL_SECONDS"].default) == probe.SILENCE
    assert presence.BEAT * 3 < probe.SILENCE
