"""What an error looks like, of each class of them: `{"type", "errors": [{"code", "detail", "attr"}]}`, and never a 500."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from django.db import connection

from runs.agents import Agent
from runs.models import Run
from tests.http.conftest import Api
from tests.runs.scenes import rows
from threads.models import Thread

pytestmark = pytest.mark.django_db


def told(answer: Any, status: int) -> list[tuple[str, str | None]]:
    """The errors of an answer, after a look at its form."""
    assert answer.status_code == status, answer.content
    assert answer["Content-Type"] == "application/json"
    body = answer.json()
    assert set(body) == {"type", "errors"}
    assert body["type"] == {4: "client_error", 5: "server_error"}[status // 100] or (
        status == 400 and body["type"] == "validation_error"
    )
    for error in body["errors"]:
        assert set(error) == {"code", "detail", "attr"}
        assert isinstance(error["code"], str)
        assert error["detail"].endswith((".", "?"))
    return [(error["code"], error["attr"]) for error in body["errors"]]


def test_each_class_of_errors_has_the_one_form(
    api: Api, helper: Agent, api_of: Callable[..., Api], settings: Any
) -> None:
    thread = api.post("/api/threads", {"agent": "helper"}, 201)
    runs = f"/api/threads/{thread['id']}/runs"
    nobody = Api(api.user, "lh_nobody")
    assert told(nobody.call("get", "/api/runs"), 401) == [("authentication_failed", None)]
    assert told(api.client.get("/api/runs"), 401) == [("not_authenticated", None)]
    assert told(api.call("get", f"/api/runs/{uuid4()}"), 404) == [("not_found", None)]
    assert told(api.call("post", runs, {"input": 5, "color": 1}), 400) == [
        ("string_type", "input"), ("list_type", "input"), ("unknown_field", "color"),
    ]  # fmt: skip
    assert told(api.call("post", runs, {}), 409) == [("nothing_to_do", None)]
    assert told(api.call("put", runs, {}), 405) == [("method_not_allowed", None)]
    settings.LONGHAUL = {"MAX_INPUT_CHARS": 3, "MAX_BODY_BYTES": 1000}
    assert told(api.call("post", runs, {"input": "long"}), 413) == [("too_large", "input")]
    assert told(api.call("post", runs, {"input": "x" * 2000}), 413) == [("too_large", None)]
    assert not Run.objects.exists()


def test_a_method_that_is_not_there_names_those_that_are(api: Api) -> None:
    for method, path, allowed in (
        ("put", "/api/threads", "GET, POST"),
        ("delete", "/api/runs", "GET, POST"),
        ("post", "/api/agents", "GET"),
        ("patch", f"/api/runs/{uuid4()}", "GET"),
    ):
        answer = api.call(method, path, {})
        assert told(answer, 405)
        assert set(allowed.split(", ")) <= set(answer["Allow"].split(", "))
        assert not {"PUT", method.upper()} & set(answer["Allow"].split(", "))


@pytest.mark.parametrize(
    ("body", "attr"),
    [
        (b"{", None),
        (b"nothing", None),
        (b"[]", None),
        (b'"text"', None),
        (b"null", None),
        (b"7", None),
        (b"\xff\xfe{}", None),
        (b'\xef\xbb\xbf{"title": "BOM"}', None),
        (b'{"title": "\xff"}', None),
        (b'{"title": "\\ud800"}', None),
        (b'{"metadata": {"a": NaN}}', None),
        (b'{"metadata": {"a": -Infinity}}', None),
        (b'{"limits": {"max_cost": NaN}}', None),
        (b'{"limits": {"max_steps": 1.5}}', "limits.max_steps"),
        (b'{"limits": {"max_cost": 1e999}}', None),
        (b'{"limits": {"max_steps": 18446744073709551616}}', "limits.max_steps"),
        (b'{"metadata": {"a": 18446744073709551616}}', "metadata"),
        (b'{"metadata": {"a": 1e999}}', None),
        (b'{"metadata": ' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}", None),
        (b'{"title": 5}', "title"),
        (b'{"archive\\u0000d": 5}', None),
        (b'{"title": "a"} {}', None),
    ],
    ids=lambda value: repr(value)[:50],
)
@pytest.mark.parametrize("key", [None, "a-key"])
def test_a_body_that_cannot_be_read_is_refused(api: Api, body: bytes, attr: str | None, key: str | None) -> None:
    before = rows()
    headers = {} if key is None else {"Idempotency-Key": key}
    errors = told(api.call("post", "/api/threads", body, status=None, **headers), 400)
    if attr is not None:
        assert attr in [error[1] for error in errors]
    assert rows() == before


def test_nul_is_cleaned_out_of_texts(api: Api, helper: Agent) -> None:
    body = {
        "title": "a\x00b",
        "summary": "\x00",
        "instructions": "\x00c",
        "metadata": {"d\x00": ["\x00e"]},
        "messages": [{"content": "f\x00", "client_id": "\x00g"}],
    }
    thread = api.post("/api/threads", body, 201)
    assert (thread["title"], thread["summary"], thread["instructions"]) == ("ab", "", "c")
    assert thread["metadata"] == {"d": ["e"]}
    message = api.get(f"/api/threads/{thread['id']}/messages")["results"][0]
    assert (message["content"][0]["text"], message["client_id"]) == ("f", "g")


@pytest.mark.parametrize(
    "path",
    [
        "/api/threads?agent=%00", "/api/threads?agent=%ED%A0%80&limit=0", "/api/runs?metadata.a=%00",
        "/api/threads?%00=1", "/api/runs?thread=%00", "/api/threads?cursor=%00", "/api/threads?archived=%00",
    ],
)  # fmt: skip
def test_a_query_that_no_column_holds_is_refused(api: Api, path: str) -> None:
    assert told(api.call("get", path), 400)


def test_ids_that_are_none_are_not_found(api: Api) -> None:
    for id in ("7", "%00", "%ED%A0%80", "x" * 3000, "..", str(uuid4())[:-1], str(uuid4()) + "0"):
        for path in ("/api/threads/{}", "/api/runs/{}", "/api/runs/{}/events", "/api/tool-calls/{}"):
            assert api.call("get", path.format(id)).status_code == 404


def test_another_content_type_is_refused(api: Api) -> None:
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=a",
        "application/xml",
    ):
        answer = api.client.post(
            "/api/threads", data="{}", content_type=kind, headers={"Authorization": f"Bearer {api.key}"}
        )
        assert told(answer, 415) == [("unsupported_media_type", None)]
    assert not Thread.objects.exists()


@pytest.fixture
def database_away() -> Iterator[None]:
    """New connections find nobody."""
    connection.close()
    there = connection.settings_dict["HOST"]
    connection.settings_dict["HOST"] = "/nowhere"
    yield
    connection.settings_dict["HOST"] = there


@pytest.mark.django_db(transaction=True)
def test_a_database_that_is_away_is_said_so(api: Api, helper: Agent, request: pytest.FixtureRequest) -> None:
    run = api.post("/api/runs", {"agent": "helper", "input": "a"}, 202)
    request.getfixturevalue("database_away")
    api.client.raise_request_exception = False
    for method, path in (
        ("get", f"/api/runs/{run['id']}"),
        ("get", "/api/threads"),
        ("post", "/api/runs"),
        ("post", f"/api/runs/{run['id']}/cancel"),
    ):
        answer = api.call(method, path, {"agent": "helper", "input": "a"} if path == "/api/runs" else None)
        assert told(answer, 503) == [("unavailable", None)]
        assert answer["Retry-After"] == "1"
        assert "nowhere" not in answer.content.decode()


def test_what_breaks_inside_is_not_told(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr("runs.http.answers.threads", die)
    api.client.raise_request_exception = False
    answer = api.call("get", "/api/threads")
    assert answer.status_code == 500
    assert "secret" not in answer.content.decode()
    assert answer.json()["type"] == "server_error"


def test_what_is_deleted_behind_the_gate_is_not_found(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the row and the work it may go: not found, then, and not an error of ours."""
    from runs.http import view

    thread = api.post("/api/threads", {}, 201)
    real = view.View._row

    def gone(*given: Any) -> Any:
        row = real(*given)
        type(row)._base_manager.filter(pk=row.pk).delete()
        return row

    monkeypatch.setattr(view.View, "_row", gone)
    assert told(api.call("get", f"/api/threads/{thread['id']}"), 404) == [("not_found", None)]
    thread = api.post("/api/threads", {}, 201)
    assert told(api.call("patch", f"/api/threads/{thread['id']}", {"title": "a"}), 404) == [("not_found", None)]
    thread = api.post("/api/threads", {}, 201)
    assert api.call("post", f"/api/threads/{thread['id']}/messages", {"content": "a"}).status_code in (400, 404)


def test_a_probe_that_hears_no_is_no_error_of_the_process(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    api.get("/readyz", status=503)  # no worker is present
    assert not [record for record in caplog.records if record.name == "django.request"]
