"""What no client should send is refused by name, with 4xx, and every row is as it was."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx2
import orjson
import pytest
from django.apps import apps
from django.contrib.auth.models import User
from django.test import Client
from django.urls import URLPattern

from runs.agents import Agent, registry
from runs.http import urls
from runs.http.view import METHODS
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, run_to_end
from tests.http.conftest import Api
from tests.http.web import Web
from tests.runs import scenes
from tests.workers.app.agents import worker_test
from tests.workers.conftest import eventually
from threads import database
from threads.authentication import create_key
from threads.models import Thread
from tools.models import ToolCall

JSON = "application/json"
NONE: Mapping[str, str] = {}
DEEP = b"[" * 100_000 + b"]" * 100_000


def rows() -> dict[str, Any]:
    """All of Longhaul's rows, and how many there are of any other kind: asked in one statement, for it is asked 3,000 times."""
    tables = sorted({model._meta.db_table for model in apps.get_models()})
    counted = database.rows_of(" UNION ALL ".join(f"SELECT '{table}', count(*) FROM \"{table}\"" for table in tables))
    return {**dict(counted), **scenes.rows()}


class Sender:
    """Sends bytes as they are, and wants a refusal that changes nothing."""

    def __init__(self, api: Api) -> None:
        self.api = api
        api.get("/api/usage")  # from now on the key's last use is noted, for a minute

    def send(
        self, method: str, path: str, data: bytes = b"", kind: str = JSON, headers: Mapping[str, str] = NONE
    ) -> Any:
        told = {"Authorization": f"Bearer {self.api.key}", **headers}
        return self.api.client.generic(method.upper(), path, data, content_type=kind, headers=told)

    def refused(
        self, status: int, method: str, path: str, data: bytes = b"", kind: str = JSON, *,
        attr: str | None = None, code: str | None = None, headers: Mapping[str, str] = NONE,
    ) -> Any:  # fmt: skip
        before = rows()
        response = self.send(method, path, data, kind, headers)
        assert response.status_code == status, (response.status_code, response.content[:500])
        assert rows() == before
        told = response.json()
        assert set(told) == {"type", "errors"}
        for error in told["errors"]:
            assert set(error) == {"code", "detail", "attr"}
            assert error["detail"]
        if attr is not None:
            assert attr in {error["attr"] for error in told["errors"]}, told
        if code is not None:
            assert code in {error["code"] for error in told["errors"]}, told
        return response


@pytest.fixture
def sender(api: Api, helper: Agent) -> Sender:
    return Sender(api)


@pytest.fixture
def thread(api: Api, sender: Sender) -> str:
    id: str = api.post("/api/threads", {"agent": "helper"})["id"]
    return id


@pytest.fixture
def run(api: Api, thread: str) -> str:
    id: str = api.post(f"/api/threads/{thread}/runs", {"input": "Where is it?"}, 202)["id"]
    return id


@pytest.fixture
def call(run: str) -> str:
    """A call of the run."""
    made = ToolCall.objects.create(
        run_id=run,
        message_id=uuid4(),
        step=1,
        index=0,
        name="look_up",
        idempotency_key="x",
        timeout=timedelta(minutes=1),
    )
    return str(made.pk)


def operations(method: str | None = None) -> list[tuple[str, str, Any]]:
    """Return (URL, method, what the operation says) of each operation."""
    found = []
    for pattern in urls.urlpatterns:
        assert isinstance(pattern, URLPattern)
        view: Any = pattern.callback.view_class  # type: ignore[attr-defined]
        for each, said in view.operations().items():
            if method in (None, each):
                found.append((f"/{pattern.pattern}".replace("<int:number>", "1"), each, said))
    return found


BODIES = [(path, method, said.body) for path, method, said in operations() if said.body is not None]


@pytest.mark.django_db
class TestBodies:
    @pytest.fixture
    def at(self, thread: str, run: str, call: str) -> Callable[[str], str]:
        def address(path: str) -> str:
            row = run if "/runs/" in path else call if "/tool-calls/" in path else thread
            return path.replace("<row_id:id>", row)

        return address

    @pytest.mark.parametrize(("path", "method", "form"), BODIES, ids=[f"{m} {p}" for p, m, _ in BODIES])
    def test_each_field_refuses_what_is_of_no_type_that_it_takes(
        self, sender: Sender, at: Callable[[str], str], path: str, method: str, form: Any
    ) -> None:
        fields = form.model_fields if "root" not in form.model_fields else ("role", "content", "metadata", "client_id")
        for name in fields:
            if isinstance(fields, tuple) or fields[name].annotation is not Any:
                sender.refused(400, method, at(path), orjson.dumps({name: [[1]]}))

    @pytest.mark.parametrize(("path", "method", "form"), BODIES, ids=[f"{m} {p}" for p, m, _ in BODIES])
    def test_what_is_no_json_object_in_utf8(
        self, sender: Sender, at: Callable[[str], str], path: str, method: str, form: Any
    ) -> None:
        for data in (
            b"no json", b"{", b"{}{}", b"[1]", b'"text"', b"1", b"null", b"\xff\xfe{}", b'{"a": "\xff"}', b"\x00",
            b"\xef\xbb\xbf{}", '{"agent": "x"}'.encode("utf-16"), b'{"title": "\xed\xa0\x80"}', DEEP,
            b'{"metadata": ' + DEEP + b"}", b'{"input": ' + DEEP + b"}", b"{'a': 1}", b"{,}", b'{"a" 1}', b" ",
        ):  # fmt: skip
            sender.refused(400, method, at(path), data)

    @pytest.mark.parametrize(("path", "method", "form"), BODIES, ids=[f"{m} {p}" for p, m, _ in BODIES])
    def test_a_field_that_there_is_not_is_named(
        self, sender: Sender, at: Callable[[str], str], path: str, method: str, form: Any
    ) -> None:
        body = {"content": "Hello"} if "root" in form.model_fields else {}
        if "root" not in form.model_fields:
            body |= {name: "worker_test" for name, field in form.model_fields.items() if field.is_required()}
        told = sender.refused(400, method, at(path), orjson.dumps({**body, "colour": "red", "sizes": [1]})).json()
        assert {error["attr"]: error["code"] for error in told["errors"]} == {
            "colour": "unknown_field",
            "sizes": "unknown_field",
        }

    @pytest.mark.parametrize(("path", "method", "form"), BODIES, ids=[f"{m} {p}" for p, m, _ in BODIES])
    def test_what_is_not_sent_as_json(
        self, sender: Sender, at: Callable[[str], str], path: str, method: str, form: Any
    ) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "x"):
            sender.refused(415, method, at(path), b'{"a": 1}', kind)
        packed = gzip.compress(b"{}")
        sender.refused(415, method, at(path), packed, headers={"Content-Encoding": "gzip"})

    def test_charsets(self, sender: Sender) -> None:
        for kind in ("application/json; charset=utf-8", "application/json;charset=UTF-8", "Application/JSON"):
            answer = sender.send("post", "/api/threads", '{"title": "Bücher"}'.encode(), kind)
            assert (answer.status_code, answer.json()["title"]) == (201, "Bücher")
        sender.refused(415, "post", "/api/threads", b"{}", "application/json; charset=utf-16")

    def test_ten_megabytes(self, sender: Sender, at: Callable[[str], str]) -> None:
        for path, method, _ in BODIES:
            sender.refused(413, method, at(path), b'{"a": "' + b"x" * 10_000_000 + b'"}', code="too_large")

    def test_an_input_larger_than_the_core_takes(self, sender: Sender, thread: str) -> None:
        large = orjson.dumps({"input": "x" * 2_000_000, "busy": "reject"})
        sender.refused(413, "post", f"/api/threads/{thread}/runs", large)

    @pytest.mark.parametrize("text", [r"\ud800", r"\udfff\ud800", r"\ud83d x"])
    def test_texts_that_no_column_can_hold(self, sender: Sender, at: Callable[[str], str], text: str) -> None:
        t = text.encode()
        for path, body in {
            "/api/threads": [
                b'{"title": "%b"}', b'{"summary": "%b"}', b'{"agent": "%b"}', b'{"metadata": {"a": "%b"}}',
                b'{"metadata": {"%b": 1}}', b'{"metadata": {"a": [{"%b": 1}]}}', b'{"instructions": "%b"}',
                b'{"model": "%b"}', b'{"tools": ["%b"]}', b'{"messages": [{"content": "%b"}]}',
                b'{"messages": [{"content": [{"type": "text", "text": "%b"}]}]}', b'{"%b": 1}',
            ],
            "/api/runs": [
                b'{"agent": "%b", "input": "x"}', b'{"agent": "helper", "input": "%b"}',
                b'{"agent": "helper", "input": [{"type": "data", "data": {"%b": 1}}]}',
                b'{"agent": "helper", "input": "x", "metadata": {"%b": 1}}',
                b'{"agent": "helper", "input": "x", "client_id": "%b"}',
                b'{"agent": "helper", "input": "x", "tool_choice": "%b"}',
                b'{"agent": "helper", "input": "x", "output_schema": {"%b": 1}}',
                b'{"agent": "helper", "input": "x", "output_schema": {"title": "%b"}}',
                b'{"agent": "helper", "input": "x", "messages": [{"content": "%b"}]}',
                b'{"agent": "helper", "input": "x", "instructions": "%b"}',
            ],
            "/api/threads/<row_id:id>/messages": [
                b'{"content": "%b"}', b'{"content": "x", "client_id": "%b"}', b'[{"content": "%b"}]',
                b'{"content": "x", "metadata": {"a": "%b"}}', b'{"content": [{"type": "data", "data": "%b"}]}',
            ],
            "/api/runs/<row_id:id>/cancel": [b'{"reason": "%b"}'],
        }.items():  # fmt: skip
            for each in body:
                sender.refused(400, "post", at(path), each.replace(b"%b", t))

    def test_nul_is_taken_out_of_texts_or_refused_and_never_kept(
        self, sender: Sender, at: Callable[[str], str]
    ) -> None:
        nul = {"a\0b": ["c\0d", {"e\0f": "g\0h"}]}
        for path, body in (
            *(("/api/threads", {name: "a\0b"}) for name in ("title", "summary", "agent", "model", "instructions")),
            ("/api/threads", {"tools": ["a\0b"]}),
            ("/api/threads", {"metadata": nul}),
            ("/api/threads", {"messages": [{"content": "a\0b", "metadata": nul, "client_id": "a\0b"}]}),
            ("/api/threads/<row_id:id>/messages", {"content": "a\0b", "metadata": nul, "client_id": "a\0b"}),
            ("/api/threads/<row_id:id>/messages", {"content": [{"type": "data", "data": nul, "x\0": nul}]}),
            *(("/api/runs", {"agent": "helper", "input": "x", name: "a\0b"}) for name in ("instructions", "model",
              "client_id", "tool_choice", "input", "agent")),
            ("/api/runs", {"agent": "helper", "input": "x", "metadata": nul}),
            ("/api/runs", {"agent": "helper", "input": "x", "output_schema": {"title": "a\0b", "properties": nul}}),
            ("/api/runs", {"agent": "helper", "input": [{"type": "text", "text": "a\0b"}]}),
            ("/api/runs/<row_id:id>/resume", {"input": "a\0b"}),
            ("/api/runs/<row_id:id>/cancel", {"reason": "a\0b"}),
        ):  # fmt: skip
            before = rows()
            answer = sender.send("post", at(path), orjson.dumps(body))
            assert b"\\u0000" not in answer.content
            assert "\0" not in repr(scenes.rows())
            if answer.status_code == 400:
                assert rows() == before
            else:
                assert answer.status_code in (200, 201, 202), (body, answer.content)

    @pytest.mark.parametrize("number", ["1e400", "NaN", "Infinity", "-Infinity", "9" * 400, "1" * 5000, "-" + "9" * 30])
    def test_numbers_that_json_or_a_column_cannot_hold(
        self, sender: Sender, at: Callable[[str], str], number: str
    ) -> None:
        for path, body in {
            "/api/threads": [
                '{"metadata": {"a": %s}}', '{"limits": {"max_steps": %s}}', '{"limits": {"max_cost": %s}}',
                '{"limits": {"deadline_seconds": %s}}', '{"context": {"last_messages": %s}}',
                '{"messages": [{"content": [{"type": "data", "data": %s}]}]}',
            ],
            "/api/runs": [
                '{"agent": "helper", "input": "x", "priority": %s}',
                '{"agent": "helper", "input": "x", "metadata": {"a": [%s]}}',
                '{"agent": "helper", "input": [{"type": "data", "data": {"a": %s}}]}',
                '{"agent": "helper", "input": "x", "output_schema": {"maximum": %s}}',
            ],
            "/api/runs/<row_id:id>/fork": ['{"after_step": %s}'],
        }.items():  # fmt: skip
            for each in body:
                for headers in ({}, {"Idempotency-Key": "once"}):
                    sender.refused(400, "post", at(path), (each % number).encode(), headers=headers)

    def test_parts_of_text_without_a_text(self, sender: Sender, thread: str) -> None:
        for part in ({"type": "text"}, {"type": "text", "text": None}, {"type": "reasoning", "text": 5}, {"type": "x"}):
            sender.refused(400, "post", "/api/runs", orjson.dumps({"agent": "helper", "input": [part]}))
            sender.refused(400, "post", f"/api/threads/{thread}/messages", orjson.dumps([{"content": [part]}]))

    def test_whole_numbers_may_be_written_as_json_writes_them(self, sender: Sender) -> None:
        body = {"agent": "helper", "input": "x", "priority": 3.0, "limits": {"max_steps": 5.0}}
        answer = sender.send("post", "/api/runs", orjson.dumps(body)).json()
        assert (answer["priority"], answer["limits"]["max_steps"]) == (3, 5)
        sender.refused(400, "post", "/api/runs", orjson.dumps({**body, "priority": 3.5}), attr="priority")
        sender.refused(400, "post", "/api/runs", orjson.dumps({**body, "limits": {"max_steps": 0}}))
        sender.refused(400, "post", "/api/runs", orjson.dumps({**body, "priority": 40_000}), attr="priority")

    def test_large_numbers_are_read_again(self, sender: Sender, thread: str, scripted_model: ScriptedModel) -> None:
        body = b'{"content": [{"type": "data", "data": 1e30}], "metadata": {"a": 1e25}}'
        assert sender.send("post", f"/api/threads/{thread}/messages", body).status_code == 201
        said = sender.api.get(f"/api/threads/{thread}/messages")["results"][0]
        assert (float(said["content"][0]["data"]), float(said["metadata"]["a"])) == (1e30, 1e25)
        scripted_model.say("It is large.")
        body = b'{"input": [{"type": "text", "text": "How large?"}, {"type": "data", "data": 1e30}], "metadata": {"a": 1e25}}'
        run = sender.send("post", f"/api/threads/{thread}/runs", body, headers={"Idempotency-Key": "once"}).json()["id"]
        run_to_end(Run.objects.get(pk=run))
        assert sender.api.get(f"/api/runs/{run}")["status"] == "completed"
        assert sender.api.get(f"/api/runs/{run}/events")["results"][0]["content"][1]["data"] == 10**30

    def test_of_a_key_that_is_there_twice_the_last_counts(self, sender: Sender) -> None:
        answer = sender.send("post", "/api/threads", b'{"title": "a", "title": "b"}')
        assert answer.json()["title"] == "b"

    def test_ids_that_belong_to_others(self, api_of: Callable[..., Api], sender: Sender, thread: str, run: str) -> None:
        other = api_of("bob")
        theirs = other.post("/api/threads", {"agent": "helper", "messages": [{"content": "Mine."}]}, 201)["id"]
        message = other.get(f"/api/threads/{theirs}/messages")["results"][0]["id"]
        their_run = other.post(f"/api/threads/{theirs}/runs", {}, 202)["id"]
        for there, mine in {theirs: thread, their_run: run, message: message}.items():
            for path, method, said in operations():
                if "<row_id:id>" not in path:
                    continue
                kind = {"Thread": theirs, "Run": their_run, "Message": message}.get(said.rule.of.__name__)
                if kind == there:
                    body = b'{"content": "x"}' if "messages" in path and method == "post" else b"{}"
                    sender.refused(404, method, path.replace("<row_id:id>", there), body if method != "get" else b"")
            assert mine
        sender.refused(400, "post", f"/api/threads/{thread}/runs", orjson.dumps({"message": message}), attr="message")
        sender.refused(400, "post", "/api/runs", orjson.dumps({"agent": "helper", "message": message}), attr="message")
        sender.refused(400, "get", f"/api/threads/{thread}/messages?after={message}", attr="after")
        for path in (f"/api/runs?thread={theirs}", f"/api/tool-calls?run={their_run}"):
            assert sender.send("get", path).json()["results"] == []


@pytest.mark.django_db
class TestAddresses:
    @pytest.mark.parametrize(
        "id", ["0", "x", "%00", "%ff", "%0a", "..", "%ed%a0%80", "1" * 10_000, "{id}", "%7b%7d", str(uuid4()), "%2f"]
    )
    def test_ids_that_are_none(self, sender: Sender, id: str) -> None:
        for path, method, said in operations():
            if "<row_id:id>" in path and not (id == "%2f" or id == ".."):
                body = b'{"content": "x"}' if "messages" in path and method == "post" else b"{}"
                address = path.replace("<row_id:id>", id)
                sender.refused(404, method, address, body if said.body else b"")
        assert sender.send("get", f"/api/docs/{id}").status_code == 404

    @pytest.mark.parametrize(
        "cursor",
        [
            "x",
            "%00",
            "%ff",
            "cD0x",
            "cD0lMDA%3D",
            "bz0xMDAwMDAwMDAwMDAwMA%3D%3D",
            "cj0x",
            "A" * 5000,
            "=",
            "%F0%9F%98%80",
        ],
    )
    def test_cursors_that_no_list_gave(self, sender: Sender, thread: str, run: str, cursor: str) -> None:
        for path, method, said in operations("get"):
            if said.query is not None and "cursor" in said.query.model_fields:
                address = path.replace("<row_id:id>", run if "/runs/" in path else thread)
                sender.refused(400, method, f"{address}?cursor={cursor}", attr="cursor")

    def test_a_cursor_that_was_tampered_with(self, api: Api, sender: Sender) -> None:
        for number in range(3):
            api.post("/api/threads", {"title": str(number)})
        cursor = api.get("/api/threads?limit=1")["next"].partition("cursor=")[2].partition("&")[0]
        for place in range(0, len(cursor), 5):
            other = "A" if cursor[place] != "A" else "B"
            answer = sender.send("get", f"/api/threads?cursor={cursor[:place]}{other}{cursor[place + 1 :]}")
            assert answer.status_code in (200, 400)
        sender.refused(400, "get", f"/api/threads?cursor={cursor[:-9]}", attr="cursor")

    def test_parameters_that_there_are_not_are_named(self, sender: Sender, thread: str, run: str) -> None:
        for path, method, _ in operations("get"):
            if path.startswith("/api/docs/"):
                path = "/api/docs/start.js"
            if "tool-calls/<" not in path:
                address = path.replace("<row_id:id>", run if "/runs/" in path else thread)
                sender.refused(400, method, f"{address}?colour=red", attr="colour")

    @pytest.mark.parametrize(
        "query",
        [
            "limit=0", "limit=-1", "limit=201", "limit=x", "limit=", "limit=1e1", "limit=1_0", "limit=1.0", "limit=%0a5",
            "limit=%D9%A1", "limit=99999999999999999999", "active=maybe", "active=1", "active=yes", "active=", "status=gone",
            "agent=%00", "thread=x", "thread=", "metadata.=1", "metadata=1", "metadata.a=%00", "metadata.%00=1", "%00=1",
        ],
    )  # fmt: skip
    def test_parameters_of_the_wrong_type(self, sender: Sender, query: str) -> None:
        sender.refused(400, "get", f"/api/runs?{query}")

    @pytest.mark.parametrize("value", ["-1", "x", "1e400", "nan", "inf", "301", "", "0x1", "1_0", " 1"])
    def test_times_to_wait(self, sender: Sender, run: str, value: str) -> None:
        sender.refused(400, "get", f"/api/runs/{run}/wait?timeout_seconds={value}", attr="timeout_seconds")

    @pytest.mark.parametrize("value", ["-1", "x", "1.5", str(2**63), str(2**70), "", "3 "])
    def test_places_in_the_log(self, sender: Sender, run: str, value: str) -> None:
        sender.refused(400, "get", f"/api/runs/{run}/events?after={value}", attr="after")
        sender.refused(400, "get", f"/api/runs/{run}/events?after=1000", attr="after")

    @pytest.mark.parametrize("value", ["x", "99999-01-01", "2026-13-01", "", "nan", "1e400"])
    def test_moments(self, sender: Sender, value: str) -> None:
        sender.refused(400, "get", f"/api/usage?since={value}", attr="since")

    def test_methods_that_are_not_allowed(self, sender: Sender, thread: str, run: str) -> None:
        for pattern in urls.urlpatterns:
            assert isinstance(pattern, URLPattern)
            view: Any = pattern.callback.view_class  # type: ignore[attr-defined]
            address = f"/{pattern.pattern}".replace("<str:name>", "start.js").replace("<int:number>", "1")
            address = address.replace("<row_id:id>", run if "/runs/" in address else thread)
            for method in (*METHODS, "options", "trace", "foo"):
                if method not in view.operations():
                    answer = sender.refused(405, method, address, code="method_not_allowed")
                    assert set(answer["Allow"].split(", ")) - {"HEAD"} == {each.upper() for each in view.operations()}

    def test_headers_that_name_another_method_are_passed_over(self, sender: Sender, thread: str) -> None:
        for name in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"):
            assert sender.send("get", f"/api/threads/{thread}", headers={name: "DELETE"}).status_code == 200
            sender.refused(405, "post", f"/api/threads/{thread}", b"{}", headers={name: "DELETE"})

    @pytest.mark.parametrize(
        "key", ["", "a" * 201, "é", "a\nX-Evil: 1", "a\r\nX-Evil: 1", "\x00", " ", "a\x7f", "\udcff"]
    )
    def test_idempotency_keys(self, sender: Sender, key: str) -> None:
        sender.refused(400, "post", "/api/threads", b"{}", attr="Idempotency-Key", headers={"Idempotency-Key": key})

    @pytest.mark.parametrize("seen", ["x", "-1", "1.0", "٣", "1" * 30, "5\r\nX-Evil: 1", "\x00"])
    def test_last_event_ids(self, sender: Sender, run: str, seen: str) -> None:
        answer = sender.send("get", f"/api/runs/{run}/stream", headers={"Last-Event-ID": seen})
        assert answer.status_code in (400, 501)  # this client speaks WSGI
        assert "X-Evil" not in answer

    @pytest.mark.parametrize(
        "credentials",
        [
            "Bearer",
            "Bearer ",
            "Bearer lh_",
            "Bearer lh_\xff",
            "Bearer lh_a b",
            "bearer lh_" + "x" * 10_000,
            "Basic eDp5",
            "x",
        ],
    )
    def test_credentials(self, client: Client, db: None, credentials: str) -> None:
        answer = client.get("/api/threads", headers={"Authorization": credentials})
        assert answer.status_code == 401
        assert answer["WWW-Authenticate"].startswith("Bearer")


@pytest.fixture
def live(web: Web, transactional_db: None) -> Iterator[httpx2.Client]:
    """A client of the real server. Afterwards the server has told of no exception."""
    registry.add(worker_test)
    key = create_key(User.objects.create_user("ann"))[1]
    with httpx2.Client(base_url=web.url, headers={"Authorization": f"Bearer {key}"}, timeout=30) as client:
        assert client.get("/api/usage").status_code == 200
        yield client
        assert client.get("/healthz").status_code == 200
    assert "Traceback" not in web.said()


def request(live: httpx2.Client, line: str, *headers: str) -> bytes:
    told = [
        line + " HTTP/1.1",
        "Host: 127.0.0.1",
        "Connection: close",
        f"Authorization: {live.headers['Authorization']}",
    ]
    return "\r\n".join([*told, *headers, "", ""]).encode("latin-1")


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.slow
class TestOnTheWire:
    POST = "POST /api/threads"

    def test_ten_megabytes_whose_length_nobody_told(self, web: Web, live: httpx2.Client) -> None:
        before = rows()
        piece = b"x" * 65_536
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for _ in range(160)) + b"0\r\n\r\n"
        head = request(live, self.POST, "Content-Type: application/json", "Transfer-Encoding: chunked")
        assert status(web.raw(head + chunks)) == 413
        assert rows() == before

    def test_a_length_that_is_none(self, web: Web, live: httpx2.Client) -> None:
        before = rows()
        for length in ("-1", "x", "1.5", "99999999999999999999999999", "1, 2"):
            answer = web.raw(request(live, self.POST, "Content-Type: application/json", f"Content-Length: {length}") + b"{}",
                             timeout=5) if not length.startswith("9999") else b"HTTP/1.1 413 "  # fmt: skip
            assert 400 <= status(answer) < 500, answer
        assert rows() == before

    def test_a_length_beyond_all_bounds_is_refused_before_it_was_sent(self, web: Web, live: httpx2.Client) -> None:
        head = request(live, self.POST, "Content-Type: application/json", "Content-Length: 2")
        assert status(web.raw(head + b"{}")) == 201

    def test_clients_that_vanish_in_mid_body(self, web: Web, live: httpx2.Client) -> None:
        before = rows()
        head = request(live, self.POST, "Content-Type: application/json", "Content-Length: 1000")
        for sent in (b"", b"{", b'{"title": "half of'):
            web.raw(head + sent, close_early=True)
        head = request(live, self.POST, "Content-Type: application/json", "Transfer-Encoding: chunked")
        for sent in (b"", b"5\r\n{", b"5\r\n{    \r\n"):
            web.raw(head + sent, close_early=True)
        assert live.get("/api/threads").json()["results"] == []
        assert rows() == before

    def test_clients_that_are_slow_hold_nobody_up(self, web: Web, live: httpx2.Client) -> None:
        import socket

        head = request(live, self.POST, "Content-Type: application/json", "Content-Length: 15")
        slow = [socket.create_connection(("127.0.0.1", web.port), timeout=20) for _ in range(60)]
        try:
            for wire in slow:
                wire.sendall(head + b'{"title')
            for _ in range(5):
                assert live.get("/api/threads?limit=1").status_code == 200
            slow[0].sendall(b'": "x"} ')
            assert b" 201 " in slow[0].recv(100)
        finally:
            for wire in slow:
                wire.close()
        eventually(lambda: live.get("/api/threads").status_code == 200)
        assert Thread.objects.count() == 1

    def test_paths_and_headers_as_nobody_writes_them(self, web: Web, live: httpx2.Client) -> None:
        before = rows()
        for line in (
            "GET /api/runs/%00", "GET /api/runs/%ff%fe", "GET /api/runs/%ED%A0%80", "GET /api/runs/..%2f..%2fetc",
            "GET /api/threads?cursor=%00", "GET /api/threads?agent=%ED%A0%80&limit=0", "GET /api/docs/..%2fschema.py",
            "GET //api//threads", "GET /api/runs/\xff", "GET /api/%0d%0aX-Evil:%201", "BREW /api/threads",
        ):  # fmt: skip
            answer = web.raw(request(live, line))
            assert 400 <= status(answer) < 500, (line, answer)
            assert b"X-Evil: 1" not in answer.split(b"\r\n\r\n")[0]
        for header in (
            "Idempotency-Key: \xff\xfe",
            "Idempotency-Key: a\tb",
            "Content-Type: \xff",
            "Content-Encoding: gzip",
        ):
            answer = web.raw(request(live, self.POST, header, "Content-Length: 2") + b"{}")
            assert 400 <= status(answer) < 500, (header, answer)
        assert rows() == before

    def test_last_event_ids_over_asgi(self, web: Web, live: httpx2.Client) -> None:
        run = live.post("/api/runs", json={"agent": "worker_test", "input": "x"}).json()["id"]
        before = rows()
        for seen in ("x", "-1", "1.0", "9" * 30, "\xb2"):
            answer = web.raw(request(live, f"GET /api/runs/{run}/stream", f"Last-Event-ID: {seen}"))
            assert status(answer) == 400, answer
        assert rows() == before

    def test_double_submits_start_one_run(self, live: httpx2.Client) -> None:
        def submit(_: int) -> tuple[int, str]:
            body = {"agent": "worker_test", "input": "Buy it."}
            answer = live.post("/api/runs", json=body, headers={"Idempotency-Key": "order-1042"})
            return answer.status_code, answer.json()["id"]

        with ThreadPoolExecutor(12) as pool:
            answers = set(pool.map(submit, range(24)))
        assert answers == {(202, str(Run.objects.get().pk))}
        before = rows()
        other = live.post(
            "/api/runs", json={"agent": "worker_test", "input": "Sell it."}, headers={"Idempotency-Key": "order-1042"}
        )
        assert (other.status_code, other.json()["errors"][0]["code"]) == (409, "idempotency_conflict")
        assert rows() == before

    def test_a_client_that_leaves_a_stream_cancels_nothing(
        self, web: Web, live: httpx2.Client, scripted_model: ScriptedModel
    ) -> None:
        run = live.post("/api/runs", json={"agent": "worker_test", "input": "x"}).json()["id"]
        with live.stream("GET", f"/api/runs/{run}/stream") as stream:
            assert next(stream.iter_bytes()).startswith(b": longhaul")
        scripted_model.say("It is done.")
        run_to_end(Run.objects.get(pk=run))
        assert live.get(f"/api/runs/{run}").json()["status"] == "completed"
