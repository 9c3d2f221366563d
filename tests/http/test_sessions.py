"""Signed in with Django's session, or by the host's own classes; and the host's DRF settings, which change nothing else."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import orjson
import pytest
from django.contrib.auth.models import User
from django.test import Client
from rest_framework.authentication import BaseAuthentication
from rest_framework.request import Request
from rest_framework.views import APIView

from runs.agents import Agent
from runs.http.view import of_the_host
from tests.http.conftest import Api
from threads.authentication import create_key
from threads.models import Thread

pytestmark = pytest.mark.django_db


@pytest.fixture
def ann(db: None, settings: Any) -> User:
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # Django's own takes half a second
    return User.objects.create_user("ann", password="a long password")


@pytest.fixture
def browser(ann: User) -> Client:
    """A client with ann's session, whose CSRF tokens are looked at."""
    client = Client(enforce_csrf_checks=True)
    client.force_login(ann)
    return client


def sent(client: Client, method: str, address: str, **headers: str) -> Any:
    return client.generic(method, address, b"{}", "application/json", headers=headers)


def test_a_session_reads_without_a_token(browser: Client) -> None:
    assert browser.get("/api/threads").status_code == 200


def test_a_session_changes_nothing_without_a_token(browser: Client, ann: User) -> None:
    thread = Thread.objects.create(owner=ann)
    for method, address in (
        ("POST", "/api/threads"),
        ("PATCH", f"/api/threads/{thread.pk}"),
        ("DELETE", f"/api/threads/{thread.pk}"),
        ("POST", "/api/runs"),
    ):
        response = sent(browser, method, address)
        assert response.status_code == 403, (method, address)
        assert response.json()["errors"][0]["code"] == "permission_denied"
        assert "CSRF" in response.json()["errors"][0]["detail"]
    assert list(Thread.objects.all()) == [thread]


def test_a_session_changes_with_its_token(browser: Client) -> None:
    token = "x" * 32
    browser.cookies["csrftoken"] = token
    assert sent(browser, "POST", "/api/threads", **{"X-CSRFToken": token}).status_code == 201
    assert sent(browser, "POST", "/api/threads", **{"X-CSRFToken": "y" * 32}).status_code == 403


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=b"])
def test_a_form_is_no_request(browser: Client, kind: str) -> None:
    """Neither its token counts, nor is it read as an empty body."""
    token = "x" * 32
    browser.cookies["csrftoken"] = token
    field = f"csrfmiddlewaretoken={token}"
    if "multipart" in kind:
        field = f'--b\r\nContent-Disposition: form-data; name="csrfmiddlewaretoken"\r\n\r\n{token}\r\n--b--\r\n'
    assert browser.post("/api/threads", field, kind).status_code == 403
    assert browser.post("/api/threads", field, kind, headers={"X-CSRFToken": token}).status_code == 415
    assert not Thread.objects.exists()


def test_a_coroutine_looks_at_the_token_too(browser: Client, ann: User, helper: Agent) -> None:
    run = helper.start("x", owner=ann)
    token = "x" * 32
    browser.cookies["csrftoken"] = token
    assert sent(browser, "POST", f"/api/runs/{run.pk}/stream").status_code == 403
    # Let in, it says that this is WSGI.
    assert sent(browser, "POST", f"/api/runs/{run.pk}/stream", **{"X-CSRFToken": token}).status_code == 501


def test_a_key_needs_no_token_even_beside_a_session(browser: Client, ann: User) -> None:
    bob = User.objects.create_user("bob")
    headers = {"Authorization": f"Bearer {create_key(bob)[1]}"}
    response = sent(browser, "POST", "/api/threads", **headers)
    assert response.status_code == 201
    assert Thread.objects.get(pk=response.json()["id"]).owner == bob


def test_a_wrong_key_is_not_made_good_by_a_session(browser: Client) -> None:
    assert browser.get("/api/threads", headers={"Authorization": "Bearer lh_no"}).status_code == 401


def test_a_session_that_has_ended(browser: Client) -> None:
    browser.logout()
    assert browser.get("/api/threads").status_code == 401


# --- the host's own classes -----------------------------------------------------------------------------------------

PASSWORD = f"Basic {b64encode(b'ann:a long password').decode()}"


class Badge(BaseAuthentication):
    def authenticate(self, request: Request) -> Any:
        badge = request.headers.get("X-Badge")
        return (User.objects.get(username=badge), None) if badge else None


def test_passwords_are_not_let_in_when_the_host_says_nothing(ann: User) -> None:
    """DRF's own default would: BasicAuthentication stands in it."""
    assert of_the_host() == ()
    response = Client().get("/api/threads", headers={"Authorization": PASSWORD})
    assert response.status_code == 401
    assert response["WWW-Authenticate"] == 'Bearer realm="longhaul"'


def test_passwords_are_let_in_where_the_host_says_so(ann: User, settings: Any) -> None:
    settings.REST_FRAMEWORK = {"DEFAULT_AUTHENTICATION_CLASSES": ["rest_framework.authentication.BasicAuthentication"]}
    assert Client().get("/api/threads", headers={"Authorization": PASSWORD}).status_code == 200
    wrong = f"Basic {b64encode(b'ann:no').decode()}"
    assert Client().get("/api/threads", headers={"Authorization": wrong}).status_code == 401


def test_the_hosts_own_class(ann: User, settings: Any, browser: Client) -> None:
    settings.REST_FRAMEWORK = {
        "DEFAULT_AUTHENTICATION_CLASSES": ["rest_framework.authentication.SessionAuthentication", f"{__name__}.Badge"]
    }
    made = Client().post("/api/threads", b"{}", "application/json", headers={"X-Badge": "ann"})
    assert made.status_code == 201
    assert Thread.objects.get().owner == ann
    assert Client().get("/api/threads").status_code == 401
    assert browser.get("/api/threads").status_code == 200
    assert Client().get("/api/threads", headers={"Authorization": f"Bearer {create_key(ann)[1]}"}).status_code == 200


# --- the host's other settings --------------------------------------------------------------------------------------


class Nobody:
    def has_permission(self, request: Any, view: Any) -> bool:
        return False


class Never:
    def allow_request(self, request: Any, view: Any) -> bool:
        return False

    def wait(self) -> float:
        return 1000.0


def handled(error: Exception, context: Any) -> Any:
    raise AssertionError("the host's handler was asked")


HOSTS = {
    "DEFAULT_PERMISSION_CLASSES": [f"{__name__}.Nobody"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.BrowsableAPIRenderer"],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.FormParser"],
    "DEFAULT_VERSIONING_CLASS": "rest_framework.versioning.AcceptHeaderVersioning",
    "ALLOWED_VERSIONS": ["7"],
    "DEFAULT_VERSION": "7",
    "EXCEPTION_HANDLER": f"{__name__}.handled",
    "DEFAULT_PAGINATION_CLASS": "rest_framework.pagination.PageNumberPagination",
    "PAGE_SIZE": 1,
    "DEFAULT_THROTTLE_CLASSES": [f"{__name__}.Never"],
    "DEFAULT_THROTTLE_RATES": {"user": "1/day"},
    "DEFAULT_FILTER_BACKENDS": ["rest_framework.filters.SearchFilter"],
    "DEFAULT_CONTENT_NEGOTIATION_CLASS": "rest_framework.negotiation.BaseContentNegotiation",
    "DEFAULT_METADATA_CLASS": "rest_framework.metadata.SimpleMetadata",
    "DEFAULT_SCHEMA_CLASS": "rest_framework.schemas.openapi.AutoSchema",
    "UNAUTHENTICATED_USER": None,
    "UNAUTHENTICATED_TOKEN": None,
    "URL_FORMAT_OVERRIDE": "format",
    "NON_FIELD_ERRORS_KEY": "all",
    "UNICODE_JSON": False,
    "COERCE_DECIMAL_TO_STRING": False,
    "DATETIME_FORMAT": "%d.%m.",
}


def answers(api: Api, run: str, thread: str) -> list[tuple[Any, ...]]:
    asks: list[tuple[str, str, Any, dict[str, Any]]] = [
        ("get", "/api/threads?limit=1", None, {}),
        ("get", "/api/runs", None, {"Accept": "text/html"}),
        ("get", f"/api/runs/{run}", None, {"Accept": "application/json; version=3"}),
        ("get", f"/api/runs/{run}/wait?timeout_seconds=0", None, {}),
        ("get", "/api/runs?format=api", None, {}),
        ("post", "/api/threads", {"title": 3, "unknown": 1}, {}),
        ("options", "/api/threads", None, {}),
        ("patch", f"/api/threads/{thread}", {"title": "Caf\u00e9"}, {}),
        ("get", f"/api/threads/{run}", None, {}),
        ("get", "/api/threads", None, {"Authorization": "Bearer lh_no"}),
        ("get", "/api/threads", None, {"Authorization": ""}),
        ("get", "/healthz", None, {"Authorization": ""}),
    ]
    found = []
    for method, address, body, headers in asks:
        response = api.call(method, address, body, **headers)
        found.append((method, address, response.status_code, response["Content-Type"], response.content))
    return found


def test_the_hosts_settings_of_drf_change_nothing(
    api: Api, helper: Agent, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = helper.start("x", owner=api.user).cancel()
    helper.start("y", owner=api.user).cancel()
    before = answers(api, str(run.pk), str(run.thread_id))
    assert {status for _, _, status, _, _ in before} == {200, 400, 401, 404, 405}
    settings.REST_FRAMEWORK = HOSTS
    # They are read when a class of a view is made: these stand for a host whose settings were so from the start.
    for attribute, value in (
        ("permission_classes", [Nobody]),
        ("throttle_classes", [Never]),
        ("metadata_class", Never),
    ):
        monkeypatch.setattr(APIView, attribute, value)
    assert answers(api, str(run.pk), str(run.thread_id)) == before
    assert orjson.loads(before[0][-1])["next"]
