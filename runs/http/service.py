"""The service itself: alive, ready, its document and the page that shows it."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, ClassVar

from django.http import Http404, HttpResponse
from django.urls import reverse
from pydantic import BaseModel
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.throttling import BaseThrottle

from runs import health
from runs.http.json import dumps
from runs.http.schema import document, prefix
from runs.http.view import PUBLIC, View, operation

ASSETS = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><title>Longhaul API</title><meta name="viewport" content="width=device-width">
<link rel="icon" href="{base}/favicon-32x32.png"><link rel="stylesheet" href="{base}/swagger-ui.css">
</head>
<body><div id="swagger-ui"></div>
<script src="{base}/swagger-ui-bundle.js"></script><script src="{base}/start.js"></script>
</body>
</html>
"""
START = """window.ui = SwaggerUIBundle({url: %s, dom_id: "#swagger-ui", deepLinking: true, persistAuthorization: false,
  requestInterceptor: function (request) {
    var token = document.cookie.split("; ").find(function (each) { return each.indexOf("csrftoken=") === 0; });
    if (token) request.headers["X-CSRFToken"] = token.split("=")[1];
    return request;
  }});
"""
# Swagger UI writes styles into its elements, and shows pictures that stand in its style sheet.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'"
)


class Alive(BaseModel):
    status: str


class Ready(BaseModel):
    """Whether runs move: the database, the broker, workers of each kind, and the age of the oldest overdue row."""

    ready: bool
    checks: dict[str, Any]


class Health(View):
    throttle_classes: ClassVar[tuple[type[BaseThrottle], ...]] = ()  # type: ignore[misc]

    @operation(PUBLIC, name="healthz", answers={200: Alive})
    def get(self, request: Request) -> Response:
        """Say that this web process is alive. Asks nothing of anybody else."""
        return Response({"status": "alive"})


class Readiness(View):
    throttle_classes: ClassVar[tuple[type[BaseThrottle], ...]] = ()  # type: ignore[misc]

    @operation(PUBLIC, name="readyz", answers={200: Ready, 503: Ready})
    def get(self, request: Request) -> Response:
        """Say whether runs move, and what is missing."""
        found = health.readiness()
        answer = Response(found, 200 if found["ready"] else 503, headers={"Cache-Control": "no-store"})
        # Django logs each 5xx as an error of this process, and a probe asks for it every few seconds: it has its answer.
        answer._has_been_logged = True  # type: ignore[attr-defined]
        return answer


class SchemaDocument(View):
    @operation(PUBLIC, name="schema", answers={200: dict[str, Any]})
    def get(self, request: Request) -> HttpResponse:
        """Return this document: OpenAPI 3.1."""
        return HttpResponse(_document(prefix()), content_type="application/json")


@lru_cache(maxsize=4)
def _document(under: str) -> bytes:
    return dumps(document(under))


class Docs(View):
    @operation(PUBLIC, name="docs", answers={200: (("text/html", str),)})
    def get(self, request: Request) -> HttpResponse:
        """Show the API in a browser. Its files come from here, so it works offline."""
        page = PAGE.format(base=reverse("longhaul:docs"))
        return HttpResponse(page, headers={"Content-Security-Policy": POLICY})


class DocsAsset(View):
    throttle_classes: ClassVar[tuple[type[BaseThrottle], ...]] = ()  # type: ignore[misc]
    names: ClassVar[tuple[str, ...]] = ("start.js", *ASSETS)

    @operation(
        PUBLIC, name="docs_asset", raises=(404,),
        answers={200: (("text/css", str), ("text/javascript", str), ("image/png", bytes))},
    )  # fmt: skip
    def get(self, request: Request, name: str) -> HttpResponse:
        """Return a file of the API's page."""
        if name == "start.js":
            return HttpResponse(START % dumps(reverse("longhaul:schema")).decode(), content_type="text/javascript")
        if name not in ASSETS:
            raise Http404
        return HttpResponse(_asset(name), content_type=ASSETS[name], headers={"Cache-Control": "public, max-age=3600"})


@cache
def _asset(name: str) -> bytes:
    folder = files("drf_spectacular_sidecar") / "static" / "drf_spectacular_sidecar" / "swagger-ui-dist"
    return (folder / name).read_bytes()
