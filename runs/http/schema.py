"""The OpenAPI document (3.1), from what each operation says of itself, and its pages, which work offline."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from http import HTTPStatus
from inspect import getdoc
from typing import TYPE_CHECKING, Any, TypeVar

from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.openapi import AutoSchema
from drf_spectacular.settings import patched_settings
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from runs.http.view import Operation

Handler = TypeVar("Handler", bound=Callable[..., Any])
STREAM = "text/event-stream"
logger = logging.getLogger("longhaul.http")


class ErrorItem(BaseModel):
    """One thing that is wrong. `attr` names the field by its path (`limits.max_steps`), or is null."""

    code: str
    detail: str
    attr: str | None


class Error(BaseModel):
    """Something that could not be done. Nothing was changed."""

    type: str = Field(description="validation_error, client_error or server_error")
    errors: list[ErrorItem]


SETTINGS = {
    "TITLE": "Longhaul",
    "VERSION": "0.1.0",
    "OAS_VERSION": "3.1.0",
    "DESCRIPTION": "Durable agent runs: threads, messages, runs, their events and tool calls.",
    "COMPONENT_SPLIT_REQUEST": False,
    "SCHEMA_PATH_PREFIX": "",
    "APPEND_COMPONENTS": {},
    "POSTPROCESSING_HOOKS": [],
    "PREPROCESSING_HOOKS": [],
}


def documented(handler: Handler, said: Operation) -> Handler:
    """Tell drf-spectacular what the operation takes and answers; the errors follow from its rule and its forms."""
    summary, _, description = (getdoc(handler) or "").partition("\n\n")
    answers: dict[Any, Any] = {}
    for status, answer in said.answers.items():
        if isinstance(answer, tuple):  # several forms, by content type
            for kind, form in answer:
                answers[(status, kind)] = OpenApiResponse(form, HTTPStatus(status).phrase)
        elif answer is None:
            answers[status] = OpenApiResponse(None, HTTPStatus(status).phrase)
        else:
            answers[(status, "application/json")] = OpenApiResponse(answer, HTTPStatus(status).phrase)
    for status in sorted(_errors(said)):
        answers[(status, "application/json")] = OpenApiResponse(Error, HTTPStatus(status).phrase)
    parameters = parameters_of(said.query) if said.query is not None else []
    if said.creates:
        parameters.append(
            OpenApiParameter(
                "Idempotency-Key",
                {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[!-~]([ -~]*[!-~])?$"},
                OpenApiParameter.HEADER,
                description="The same key with the same body gives the first answer again; with another body 409.",
            )
        )
    handler.kwargs = {"schema": Schema}  # type: ignore[attr-defined] # what spectacular extends; else the host's own
    return extend_schema(
        operation_id=said.name or None,
        summary=summary or None,
        description=description or None,
        parameters=parameters,
        request={"application/json": said.body} if said.body is not None else None,
        responses=answers,
        auth=[] if said.rule.public else None,
    )(handler)


def _errors(said: Operation) -> set[int]:
    found = set(said.raises)
    if not said.rule.public:
        found |= {401, 429}
    if said.rule.of is not None:
        found.add(404)
    if said.rule.verb not in ("", "view"):
        found.add(403)
    found.add(400)
    if said.body is not None:
        found |= {403, 413, 415}  # 403: a session without its CSRF token
    if said.creates:
        found.add(409)
    return found


def parameters_of(form: type[BaseModel]) -> list[OpenApiParameter]:
    """Describe the fields of a query's form."""
    schema = form.model_json_schema()
    found = []
    for name, field in schema.get("properties", {}).items():
        described = {key: value for key, value in field.items() if key not in ("title", "description")}
        alternatives = [each for each in described.pop("anyOf", []) if each != {"type": "null"}]
        if described.get("default", ...) is None:
            described.pop("default")
        if len(alternatives) == 1:
            described |= alternatives[0]
        elif alternatives:
            described["anyOf"] = alternatives
        if "$ref" in described:
            described = _resolved(schema, described)
        many = described.get("type") == "array"
        found.append(
            OpenApiParameter(
                name, described, OpenApiParameter.QUERY, description=field.get("description", ""),
                explode=True if many else None, style="form" if many else None,
                required=name in schema.get("required", []),
            )
        )  # fmt: skip
    return found


def _resolved(schema: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    name = described.pop("$ref").rpartition("/")[2]
    named = {key: value for key, value in schema["$defs"][name].items() if key not in ("title", "description")}
    return {**named, **described}


class Schema(AutoSchema):
    """Describes an operation; its tag is the resource."""

    def get_tags(self) -> list[str]:
        # /api/threads/{id}/messages belongs to messages
        names = [part for part in self.path.split("/") if part and not part.startswith("{") and part != "api"]
        tags = ["threads", "messages", "runs", "tool-calls", "agents", "tools", "usage"]
        known = [name for name in names if name in tags]
        return known[-1:] or ["service"]

    def get_filter_backends(self) -> list[Any]:
        return []

    def _get_paginator(self) -> Any:
        return None


class _ApiKey(OpenApiAuthenticationExtension):
    target_class = "threads.authentication.ApiKeyAuthentication"
    name = "apiKey"

    def get_security_definition(self, auto_schema: AutoSchema) -> dict[str, Any]:
        return {"type": "http", "scheme": "bearer", "bearerFormat": "lh_...", "description": "manage.py create_api_key"}


@cache
def document() -> dict[str, Any]:
    """Return the OpenAPI document. Made once a process: it follows from the code."""
    from runs.http import urls

    with patched_settings(SETTINGS):
        made: dict[str, Any] = SchemaGenerator(patterns=urls.urlpatterns).get_schema(request=None, public=True)
    return deepcopy(made)
