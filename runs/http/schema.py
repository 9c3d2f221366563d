"""The OpenAPI document (3.1), made of what each operation says of itself: its rule, its forms and its answers.

drf-spectacular walks the URLs and holds the document together; each operation is described here, from its `Operation`.
Neither its settings nor the host's change a word of the document.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from inspect import getdoc
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from django.conf import settings
from django.urls import include, path, reverse
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.openapi import AutoSchema
from drf_spectacular.plumbing import ComponentRegistry, ResolvedComponent
from drf_spectacular.settings import SPECTACULAR_DEFAULTS, patched_settings
from pydantic import BaseModel, Field
from pydantic.json_schema import GenerateJsonSchema
from rest_framework.authentication import SessionAuthentication

from runs.http import examples
from threads.models import Thread

if TYPE_CHECKING:
    from runs.http.view import Operation

JSON = "application/json"
STREAM = "text/event-stream"
Mode = Literal["validation", "serialization"]
Described = dict[str, Any]


class ErrorItem(BaseModel):
    """One thing that is wrong."""

    code: str = Field(description="to program against: `required`, `unknown_field`, `not_found`, `thread_busy`, ...")
    detail: str = Field(description="a sentence to read")
    attr: str | None = Field(description="the field by its path (`limits.max_steps`), or null")


class Error(BaseModel):
    """Something that could not be done. Nothing was changed."""

    type: Literal["validation_error", "client_error", "server_error"]
    errors: list[ErrorItem]


TAGS = {
    "threads": "Conversations: what agent they are with, and what they override of it.",
    "messages": "The entries of a thread. Saving one runs nothing.",
    "runs": "Executions of an agent over a thread: start them, follow them, cancel them, go on after them.",
    "tool-calls": "What models have asked for, and what became of it.",
    "agents": "The agents that this project defines.",
    "tools": "The tools of these agents.",
    "usage": "What model calls have used and cost.",
    "service": "The service itself: alive, ready, this document.",
}
DESCRIPTION = """\
Durable agent runs: kill any process at any moment, the run goes on, and every reader catches up.

Start a run (`POST /api/runs`), then read its events (`/events`), follow them (`/stream`) or wait for its end (`/wait`).

* What you may not see answers 404. What you see but may not do answers 403.
* Times are RFC 3339 UTC, ids are UUIDv7.
* Lists are pages: `{"next", "previous", "results"}`; `next` and `previous` are addresses, or null.
* Errors are `{"type", "errors": [{"code", "detail", "attr"}]}`; after one nothing has changed.
* A field or parameter that is not known is an error that names it.
* `Idempotency-Key` makes a creating POST safe to send again.
* A call of a browser's session that changes something also needs its CSRF token.
"""
KEY = {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[!-~]([ -~]*[!-~])?$"}
FRAMES = """\
Server-sent events, UTF-8. An event of the run is one frame of three lines and an empty one:

    id: 57
    event: text.delta
    data: {"seq": 57, "type": "text.delta", "run": "...", "at": "...", "message": "...", "text": "Hel"}

`data` is an `Event` on one line; `id` is its `seq`, `event` its `type`. Frames come in order, without gaps, and the
stream ends after `run.completed`, `run.failed` or `run.cancelled`. While nothing happens a comment (`: ping`) comes about
every 15 s; with `include_pings` it is a frame `event: ping` with `data: {}`, without an id. A stream that was cut goes on
where it was with the last `id` as `starting_after`, or as the `Last-Event-ID` header, which a browser's EventSource sends
by itself. Cutting a stream cancels nothing. Where a retention setting has removed what follows your cursor, the first frame
is a `resume_gap` without an id, whose `from` and `to` say what is missing; then comes what is there."""
THREAD_FRAMES = """\
Server-sent events, as those of one run, of the thread's runs one after another. The `id` of a frame is `RUN:SEQ`, and so is
the cursor: `after`, or the `Last-Event-ID` header. The stream has no end of its own: when a run is over it waits for the
next."""
THREAD_CURSOR = "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}:[0-9]{1,18}"
HEADERS: Mapping[str, Described] = {
    "Location": {"description": "where what was made stands", "schema": {"type": "string", "format": "uri-reference"}},
    "X-Run-Id": {"description": "the run, before its first event", "schema": {"type": "string", "format": "uuid"}},
    "ETag": {
        "description": "changes whenever the answer does; send it as If-None-Match",
        "schema": {"type": "string"},
    },
    "Retry-After": {"description": "seconds until it may be tried again", "schema": {"type": "string"}},
    "WWW-Authenticate": {"description": "what credentials are taken", "schema": {"type": "string"}},
}
BY_STATUS: Mapping[int, tuple[str, ...]] = {401: ("WWW-Authenticate",), 503: ("Retry-After",), 429: ("Retry-After",)}


def request_headers(said: Operation) -> list[Described]:
    """Describe the headers that the operation reads."""
    found: list[tuple[str, Described, str]] = []
    if said.creates:
        told = "The same key with the same body gives the first answer again; with another body 409."
        found.append(("Idempotency-Key", KEY, told))
    if STREAM in {kind for answer in said.answers.values() if isinstance(answer, tuple) for kind, _ in answer} and (
        said.rule.verb == "view"
    ):
        if follows_thread(said):
            seen = {"type": "string", "pattern": f"^({THREAD_CURSOR})?$"}
            found.append(("Last-Event-ID", seen, "the id of the last frame that you have seen; wins over `after`"))
        else:
            seen = {"type": "string", "pattern": "^[0-9]{0,18}$"}
            found.append(("Last-Event-ID", seen, "the last seq that you have seen; wins over `starting_after`"))
    if 304 in said.answers:
        found.append(("If-None-Match", {"type": "string"}, "the ETag of the last answer: 304 when nothing has changed"))
    return [
        {"in": "header", "name": name, "schema": dict(schema), "description": description}
        for name, schema, description in found
    ]


def errors_of(said: Operation) -> set[int]:
    """Return the statuses with which the operation may refuse, from its rule and its forms."""
    found = {400, 503, *said.raises}
    if not said.rule.public:
        found |= {401, 429}
    if said.rule.of is not None:
        found.add(404)
    if said.rule.verb not in ("", "view"):
        found.add(403)
    if said.body is not None:
        found |= {403, 413, 415}  # 403: a session without its CSRF token
    if said.creates:
        found.add(409)
    return found - set(said.answers)


class Forms(GenerateJsonSchema):
    """JSON schemas of pydantic's models, with a title for none of their fields: it would only say the name again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def form_of(model: type[BaseModel], mode: Mode) -> tuple[Described, dict[str, Described]]:
    """Return the JSON schema of a form, and those of the forms that it names."""
    made = model.model_json_schema(ref_template="#/components/schemas/{model}", mode=mode, schema_generator=Forms)
    named = made.pop("$defs", {})
    if set(made) == {"$ref"}:
        return named.pop(model.__name__), named
    return made, named


def follows_thread(said: Operation) -> bool:
    """Return whether an operation that streams follows a thread, whose frames are those of one run after another."""
    return said.rule.verb == "view" and said.rule.of is Thread


def frame_of(event: Described, *, of_thread: bool) -> Described:
    """Describe one frame of a stream, as a client's parser gives it."""
    id = {"pattern": "^[1-9][0-9]*$", "description": "the event's seq"}
    if of_thread:
        id = {"pattern": f"^{THREAD_CURSOR}$", "description": "RUN:SEQ, the event's run and its seq in that"}
    return {
        "title": "ThreadFrame" if of_thread else "Frame",
        "description": "One frame of an event stream. A ping has neither an id nor anything in its data; a resume_gap has no id.",
        "type": "object",
        "required": ["event", "data"],
        "properties": {
            "id": {"type": "string", **id},
            "event": {"type": "string", "description": "the event's type, or `ping`"},
            "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": event},
        },
        "if": {"required": ["id"]},
        "else": {
            "anyOf": [
                {"properties": {"event": {"const": "ping"}, "data": {"const": "{}", "contentSchema": {}}}},
                {"properties": {"event": {"const": "resume_gap"}}},
            ]
        },
    }


def parameters_of(form: type[BaseModel]) -> list[Described]:
    """Describe the fields of a query's form."""
    schema = form.model_json_schema(schema_generator=Forms)
    found = []
    for name, field in schema.get("properties", {}).items():
        described = {key: value for key, value in field.items() if key != "description"}
        alternatives = [each for each in described.pop("anyOf", []) if each != {"type": "null"}]
        if described.get("default", ...) is None:
            described.pop("default")
        if len(alternatives) == 1:
            described |= alternatives[0]
        elif alternatives:
            described["anyOf"] = alternatives
        parameter = {"in": "query", "name": name, "schema": described}
        if "description" in field:
            parameter["description"] = field["description"]
        if described.get("type") == "array":
            parameter |= {"explode": True, "style": "form"}
        if name in schema.get("required", []):
            parameter["required"] = True
        found.append(parameter)
    return found


class Schema(AutoSchema):
    """Describes an operation of ours, in Longhaul's document and in a host's own."""

    def get_operation(
        self, path: str, path_regex: str, path_prefix: str, method: str, registry: ComponentRegistry
    ) -> Described | None:
        self.registry = registry
        view: Any = self.view
        said: Operation = view.operations()[method.lower()]
        summary, _, description = (getdoc(getattr(view, method.lower())) or "").partition("\n\n")
        described: Described = {"operationId": said.name, "summary": " ".join(summary.split())}
        if description:
            described["description"] = description
        described["tags"] = [tag_of(path)]
        parameters = [self._in_path(name) for name in re.findall(r"{(\w+)}", path)]
        parameters += parameters_of(said.query) if said.query is not None else []
        parameters += request_headers(said)
        if parameters:
            described["parameters"] = parameters
        if said.body is not None:
            described["requestBody"] = self._body(said)
        described["security"] = [] if said.rule.public else self._security(method)
        described["responses"] = self._answers(said)
        return described

    def _in_path(self, name: str) -> Described:
        schema: Described = {"type": "string", "format": "uuid"}
        if name == "number":
            schema = {"type": "integer", "minimum": 0}
        elif name != "id":
            view: Any = self.view
            schema = {"type": "string", "enum": list(view.names)}
        return {"in": "path", "name": name, "required": True, "schema": schema}

    def _body(self, said: Operation) -> Described:
        assert said.body is not None
        content: Described = {"schema": self._form(said.body, "validation")}
        if said.name in examples.REQUESTS:
            content["examples"] = {
                name: {"summary": name, "value": value} for name, value in examples.REQUESTS[said.name].items()
            }
        # Not required where all of its fields may be left out: an empty body counts as {}.
        fields = said.body.model_fields
        required = "root" in fields or any(field.is_required() for field in fields.values())
        return {"content": {JSON: content}, **({"required": True} if required else {})}

    def _answers(self, said: Operation) -> Described:
        found: dict[int, Described] = {}
        for status, answer in said.answers.items():
            answers: Mapping[str, Any] = dict(answer) if isinstance(answer, tuple) else {JSON: answer}
            content = {kind: self._content(said, status, kind, form) for kind, form in answers.items() if form}
            found[status] = {
                "description": HTTPStatus(status).phrase,
                **({"content": content} if content else {}),
                "headers": self._headers(said, status),
            }
        for status in errors_of(said):
            found[status] = self._refusal(said, status)
        for told in found.values():
            if not told.get("headers", True):
                del told["headers"]
        return {str(status): found[status] for status in sorted(found)}

    def _refusal(self, said: Operation, status: int) -> Described:
        name, told, example = examples.REFUSALS[status]
        described: Described = {
            "description": told,
            "content": {JSON: {"schema": self._form(Error, "serialization"), "example": example}},
        }
        headers = self._headers(said, status)
        if headers:
            described["headers"] = headers
        self._register(name, described, "responses")
        return {"$ref": f"#/components/responses/{name}"}

    def _content(self, said: Operation, status: int, kind: str, form: Any) -> Described:
        if kind == STREAM:
            from runs.http.events import Event

            of_thread = follows_thread(said)
            stream, frame = ("ThreadEventStream", "ThreadFrame") if of_thread else ("EventStream", "Frame")
            self._register(stream, {"type": "string", "description": THREAD_FRAMES if of_thread else FRAMES})
            self._register(frame, frame_of(self._form(Event, "serialization"), of_thread=of_thread))
            return {
                "schema": {"$ref": f"#/components/schemas/{stream}"},
                "x-itemSchema": {"$ref": f"#/components/schemas/{frame}"},  # OpenAPI 3.2 has itemSchema
                "example": examples.THREAD_FRAMES if of_thread else examples.FRAMES,
            }
        if isinstance(form, type) and issubclass(form, BaseModel):
            content: Described = {"schema": self._form(form, "serialization")}
        elif form is str:
            content = {"schema": {"type": "string"}}
        elif form is bytes:
            content = {"schema": {"type": "string", "format": "binary"}}
        else:
            content = {"schema": {"type": "object", "additionalProperties": True}}
        if (said.name, status) in examples.ANSWERS:
            content["example"] = examples.ANSWERS[said.name, status]
        return content

    def _headers(self, said: Operation, status: int) -> Described:
        names = [*BY_STATUS.get(status, ())] if status not in said.answers else []
        if status in said.answers and status < 300:
            if status == 202 or (STREAM in self._kinds(said, status) and not follows_thread(said)):
                names += ["Location", "X-Run-Id"]
            elif status == 201 and said.name == "create_thread":
                names.append("Location")
        if 304 in said.answers and status in (200, 304):
            names.append("ETag")
        for name in names:
            self._register(name, {**HEADERS[name], "required": name not in ("Retry-After",)}, "headers")
        return {name: {"$ref": f"#/components/headers/{name}"} for name in names}

    def _kinds(self, said: Operation, status: int) -> list[str]:
        answer = said.answers[status]
        return [kind for kind, _ in answer] if isinstance(answer, tuple) else [JSON]

    def _form(self, model: type[BaseModel], mode: Mode) -> Described:
        made, named = form_of(model, mode)
        self._register(model.__name__, made)
        for name, schema in named.items():
            self._register(name, schema)
        return {"$ref": f"#/components/schemas/{model.__name__}"}

    def _register(self, name: str, schema: Described, kind: str = "schemas") -> None:
        component = ResolvedComponent(name=name, type=kind, object=name, schema=schema)  # type: ignore[no-untyped-call]
        known = self.registry._components.get(component.key)
        if known is None:
            self.registry.register(component)
        elif known.object == name and known.schema != schema:
            raise ValueError(f"Two forms of the API are named {name}.")

    def _security(self, method: str) -> list[Described]:
        """Say whose credentials are taken: ours, and those of the host's classes that drf-spectacular knows."""
        from runs.http.view import of_the_host

        for name, definition in security_schemes().items():
            self._register(name, definition, "securitySchemes")
        found: list[Described] = [{"apiKey": []}]
        found.append({"session": []} if method in ("GET", "HEAD") else {"session": [], "csrf": []})
        for kind in of_the_host():
            extension = OpenApiAuthenticationExtension.get_match(kind())
            if extension is None or issubclass(kind, SessionAuthentication):
                continue
            names = [extension.name] if isinstance(extension.name, str) else extension.name
            definitions = extension.get_security_definition(self)
            for name, definition in zip(
                names, definitions if isinstance(definitions, list) else [definitions], strict=True
            ):
                self._register(name, definition, "securitySchemes")
            required = extension.get_security_requirement(self)
            if required is not None:
                found += required if isinstance(required, list) else [required]
        return found


def security_schemes() -> dict[str, Described]:
    header = settings.CSRF_HEADER_NAME.removeprefix("HTTP_").replace("_", "-")
    return {
        "apiKey": {
            "type": "http", "scheme": "bearer", "bearerFormat": "lh_...",
            "description": "A key of the API: `manage.py create_api_key --user NAME`.",
        },
        "session": {
            "type": "apiKey", "in": "cookie", "name": settings.SESSION_COOKIE_NAME,
            "description": "Whoever is signed in to the site.",
        },
        "csrf": {
            "type": "apiKey", "in": "header", "name": header,
            "description": f"The value of the cookie `{settings.CSRF_COOKIE_NAME}`, beside a session.",
        },
    }  # fmt: skip


def tag_of(path: str) -> str:
    """Name the resource: /api/threads/{id}/messages belongs to messages."""
    found = [part for part in path.split("/") if part in TAGS]
    return found[-1] if found and "/api/" in path else "service"


class _ApiKey(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call] # it registers itself: for a host's own document
    target_class = "threads.authentication.ApiKeyAuthentication"
    name = "apiKey"

    def get_security_definition(self, auto_schema: AutoSchema) -> Described:
        return security_schemes()["apiKey"]


def _version() -> str:
    try:
        return version("django-longhaul")
    except PackageNotFoundError:  # a checkout on the path
        return "0"


@contextmanager
def _our_settings() -> Iterator[None]:
    """Lay ours, and drf-spectacular's defaults, over what the host says."""
    ours = {
        "TITLE": "Longhaul",
        "VERSION": _version(),
        "OAS_VERSION": "3.1.0",
        "DESCRIPTION": DESCRIPTION,
        "SERVERS": [{"url": "/", "description": "this server"}],
        "TAGS": [{"name": name, "description": told} for name, told in TAGS.items()],
        "POSTPROCESSING_HOOKS": [],
        "SORT_OPERATIONS": False,
    }
    defaults = {
        name: value
        for name, value in SPECTACULAR_DEFAULTS.items()
        if not name.startswith("SERVE_") and name != "DEFAULT_GENERATOR_CLASS"
    }
    with _making, patched_settings({**deepcopy(defaults), **ours}):
        yield


_making = Lock()


def prefix() -> str:
    """Return what stands before `api/` where the host has included the URLs: `/`, `/longhaul/`."""
    return reverse("longhaul:schema").removesuffix("api/schema")


@lru_cache(maxsize=4)
def document(under: str = "/") -> dict[str, Any]:
    """Return the OpenAPI document. Made once a process and prefix: it follows from the code."""
    from runs.http import urls

    with _our_settings():
        patterns = [path(under.lstrip("/"), include((urls.urlpatterns, urls.app_name)))]
        made: dict[str, Any] = SchemaGenerator(patterns=patterns).get_schema(request=None, public=True)  # type: ignore[no-untyped-call]
    return made


__all__ = ["JSON", "STREAM", "Error", "Schema", "document", "prefix"]
