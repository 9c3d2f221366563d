"""The OpenAPI document: valid, complete, and the same whatever the host says."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import redirect_stderr
from importlib.metadata import version
from typing import Any

import jsonschema_rs
import orjson
import pytest
from django.test import Client, override_settings
from django.urls import URLPattern, include, path
from drf_spectacular.drainage import GENERATOR_STATS
from drf_spectacular.settings import spectacular_settings
from openapi_spec_validator import OpenAPIV31SpecValidator
from rest_framework.authentication import BaseAuthentication
from rest_framework.request import Request

from runs import agents
from runs.exceptions import LonghaulError
from runs.http import events, examples, forms, schema, urls
from runs.http.errors import status_of
from runs.http.view import METHODS
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, call, run_to_end
from tests.http.conftest import Api
from tools import ModelRetry, tool

urlpatterns = [path("longhaul/", include("runs.http.urls"))]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return schema.document()


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (address, method): said
        for address, methods in document["paths"].items()
        for method, said in methods.items()
        if method != "parameters"
    }


def fits(document: dict[str, Any], name: str, value: Any) -> None:
    """Raises jsonschema_rs.ValidationError when the value is not what the component says."""
    whole = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema_rs.validator_for(whole, validate_formats=True).validate(value)


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()
    assert document["openapi"] == "3.1.0"
    assert document["info"]["version"] == version("django-longhaul")


def test_every_url_and_method_is_in_the_document(document: dict[str, Any]) -> None:
    routed = set()
    for pattern in urls.urlpatterns:
        assert isinstance(pattern, URLPattern)
        address = "/" + re.sub(r"<\w+:(\w+)>", r"{\1}", str(pattern.pattern))
        view: Any = pattern.callback.view_class  # type: ignore[attr-defined]
        routed |= {(address, method) for method in METHODS if hasattr(view, method)}
    assert set(operations(document)) == routed


def test_each_operation_has_a_name_a_summary_a_tag_and_its_refusals(document: dict[str, Any]) -> None:
    names = [said["operationId"] for said in operations(document).values()]
    assert len(set(names)) == len(names)
    tags = {tag["name"] for tag in document["tags"]}
    assert all(tag["description"] for tag in document["tags"])
    for (address, method), said in operations(document).items():
        assert said["summary"].endswith("."), said["operationId"]
        assert set(said["tags"]) <= tags
        assert "400" in said["responses"]
        if said["security"]:
            assert {"401", "429"} <= set(said["responses"])
            assert "WWW-Authenticate" in document["components"]["responses"]["Unauthorized"]["headers"]
        if "{id}" in address:
            assert "404" in said["responses"]
        if method != "get":
            assert "403" in said["responses"]
        if "requestBody" in said:
            assert {"413", "415"} <= set(said["responses"])


def test_making_the_document_warns_of_nothing() -> None:
    said = io.StringIO()
    with warnings.catch_warnings(), redirect_stderr(said):
        warnings.simplefilter("error")
        schema.document.__wrapped__("/")
    assert said.getvalue() == ""
    assert not GENERATOR_STATS


def test_the_hosts_settings_change_nothing_and_come_back(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "TITLE": "Shop",
        "COMPONENT_SPLIT_REQUEST": True,
        "CAMELIZE_NAMES": True,
        "SCHEMA_PATH_PREFIX": "/api",
        "SCHEMA_PATH_PREFIX_TRIM": True,
        "APPEND_PATHS": {"/shop": {}},
        "APPEND_COMPONENTS": {"schemas": {"Shop": {}}},
        "OAS_VERSION": "3.0.3",
        "SERVERS": [{"url": "https://shop.example"}],
        "SECURITY": [{"shop": []}],
    }.items():
        monkeypatch.setattr(spectacular_settings, name, value)
    assert schema.document.__wrapped__("/") == document
    assert spectacular_settings.TITLE == "Shop"


class Tokens(BaseAuthentication):
    """A host's own class, of which drf-spectacular knows nothing."""

    def authenticate(self, request: Request) -> None:
        return None


def test_the_hosts_own_credentials_are_told_where_they_can_be(document: dict[str, Any]) -> None:
    assert document["paths"]["/api/runs"]["get"]["security"] == [{"apiKey": []}, {"session": []}]
    assert document["paths"]["/api/runs"]["post"]["security"] == [{"apiKey": []}, {"session": [], "csrf": []}]
    assert document["paths"]["/healthz"]["get"]["security"] == []
    kinds = ["rest_framework.authentication.BasicAuthentication", f"{__name__}.Tokens"]
    GENERATOR_STATS.reset()
    with override_settings(REST_FRAMEWORK={"DEFAULT_AUTHENTICATION_CLASSES": kinds}):
        made = schema.document.__wrapped__("/")
    assert made["paths"]["/api/runs"]["get"]["security"] == [{"apiKey": []}, {"session": []}, {"basicAuth": []}]
    assert set(made["components"]["securitySchemes"]) == {"apiKey", "session", "csrf", "basicAuth"}
    assert not GENERATOR_STATS


def test_it_is_made_once(client: Client, db: None) -> None:
    client.get("/api/schema")
    made = schema.document.cache_info().misses
    first, second = client.get("/api/schema"), client.get("/api/schema")
    assert schema.document.cache_info().misses == made
    assert first.content == second.content
    assert orjson.loads(first.content)["paths"].keys() == schema.document()["paths"].keys()


@override_settings(ROOT_URLCONF=__name__)
def test_paths_carry_the_prefix_under_which_the_host_has_included_them(client: Client, db: None) -> None:
    made = orjson.loads(client.get("/longhaul/api/schema").content)
    assert "/longhaul/api/runs/{id}/stream" in made["paths"]
    assert not [address for address in made["paths"] if not address.startswith("/longhaul/")]
    assert made["paths"]["/longhaul/api/runs"]["get"]["tags"] == ["runs"]
    page = client.get("/longhaul/api/docs").content.decode()
    assert "/longhaul/api/docs/start.js" in page
    assert b'"/longhaul/api/schema"' in client.get("/longhaul/api/docs/start.js").content


def test_examples_are_what_the_forms_take(document: dict[str, Any]) -> None:
    for (_, _), said in operations(document).items():
        for content in said.get("requestBody", {}).get("content", {}).values():
            for example in content.get("examples", {}).values():
                name = content["schema"]["$ref"].rpartition("/")[2]
                fits(document, name, example["value"])
                getattr(forms, name).model_validate_json(orjson.dumps(example["value"]))
    fits(document, "Run", dict(examples.RUN))
    for _, _, example in examples.REFUSALS.values():
        fits(document, "Error", example)


def test_every_error_of_the_core_has_a_documented_status(document: dict[str, Any]) -> None:
    def kinds(of: type[LonghaulError]) -> set[type[LonghaulError]]:
        return {of, *(kind for each in of.__subclasses__() for kind in kinds(each))}

    documented = {int(status) for said in operations(document).values() for status in said["responses"]}
    for kind in kinds(LonghaulError):
        assert status_of(kind.__new__(kind)) in documented, kind


@tool
def weigh(grams: int) -> str:
    """Weigh something."""
    if grams < 0:
        raise ModelRetry("Nothing weighs less than nothing.")
    return f"{grams} g"


@pytest.mark.django_db
class TestEvents:
    @pytest.fixture
    def runs(self, api: Api, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
        """Runs that completed, failed, were cancelled, held, retried, and called tools."""
        monkeypatch.setattr(agents.registry, "_agents", {**agents.registry.all()})
        agent = agents.registry.add(agents.Agent(name="scale", model="openai:test", tools=[weigh]))
        scripted_model.say(call("weigh", grams=5), call("weigh", grams=-5), call("nothing"), "It is done.", "Again.")
        completed = agent.start("Weigh it.", owner=api.user, client_id="mine")
        run_to_end(completed)
        retried = completed.retry()
        run_to_end(retried)
        failed = agent.start("Weigh it.", owner=api.user, limits={"max_steps": 1}, output_schema={"type": "object"})
        scripted_model.say("no object")
        run_to_end(failed)
        cancelled = agent.start("Weigh it.", owner=api.user)
        held = agent.start("And this.", thread=cancelled.thread)
        cancelled.cancel("not needed")
        held.cancel()
        return [completed, retried, failed, cancelled, held]

    def test_each_event_has_the_fields_of_its_type_and_no_others(
        self, document: dict[str, Any], runs: list[Run], api: Api
    ) -> None:
        seen = set()
        for run in runs:
            log = api.get(f"/api/runs/{run.pk}/events")
            fits(document, "Events", log)
            for event in log["results"]:
                form = events.FORMS[event["type"]]
                assert set(event) <= set(form.model_fields), event
                assert type(events.Event.model_validate(event).root) is form, event
                seen.add(event["type"])
        assert seen >= {
            *("run.held", "run.queued", "run.started", "run.waiting", "run.completed", "run.failed", "run.cancelled"),
            *("leg.started", "leg.ended", "message.created", "message.completed", "text.delta", "usage"),
            *("tool_call.created", "tool_call.arguments_delta", "tool_call.started", "tool_call.settled"),
        }

    def test_a_wrong_event_of_a_known_type_does_not_pass_for_another(self, document: dict[str, Any]) -> None:
        common = {"seq": 1, "run": examples.RUN_ID, "at": "2026-11-21T12:00:00Z"}
        fits(document, "Event", {**common, "type": "text.delta", "message": examples.THREAD_ID, "text": "Hel"})
        fits(document, "Event", {**common, "type": "of.tomorrow", "anything": 1})
        with pytest.raises(jsonschema_rs.ValidationError):
            fits(document, "Event", {**common, "type": "text.delta", "message": examples.THREAD_ID})

    def test_answers_fit_their_forms(self, document: dict[str, Any], runs: list[Run], api: Api) -> None:
        run, thread = runs[0], runs[0].thread_id
        for address, name in {
            "/api/runs": "RunPage",
            f"/api/runs/{run.pk}": "Run",
            f"/api/runs/{run.pk}/steps": "StepPage",
            f"/api/runs/{run.pk}/legs": "LegPage",
            f"/api/runs/{run.pk}/messages": "RunMessagePage",
            f"/api/runs/{run.pk}/tool-calls": "ToolCallPage",
            "/api/threads": "ThreadPage",
            f"/api/threads/{thread}": "Thread",
            f"/api/threads/{thread}/messages": "MessagePage",
            "/api/tool-calls": "ToolCallPage",
            "/api/agents": "Agents",
            "/api/tools": "Tools",
            "/api/usage": "UsageSums",
        }.items():
            answer = api.get(address)
            fits(document, name, answer)
            assert answer.get("results") != [], address
        fits(document, "Error", api.get("/api/runs?limit=0", 400))

    def test_the_table_of_types_is_the_one_of_the_docs(self) -> None:
        from pathlib import Path

        table = (Path(__file__).parents[2] / "docs" / "events.md").read_text().partition("## Types")[2]
        told = {
            name.strip().strip("`")
            for line in table.partition("## Folding")[0].splitlines()
            if line.startswith("| `")
            for name in line.split("|")[1].split(",")
        }
        assert told == {*events.FORMS, "resume_gap"}
