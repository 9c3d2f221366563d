"""`Idempotency-Key`: a creating request that is sent again is answered as it was the first time, and makes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection

from runs import agents
from runs.agents import Agent
from runs.http import idempotency
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, run_to_end
from tests.http.conftest import Api
from tests.runs.scenes import Together, rows
from threads.models import IdempotencyKey, Message, Thread

pytestmark = pytest.mark.django_db

KEYED = {"Idempotency-Key": "order-1042"}


@pytest.fixture
def thread(api: Api, helper: Agent) -> str:
    return str(api.post("/api/threads", {"agent": "helper"}, 201)["id"])


@pytest.fixture
def failed(api: Api, thread: str, scripted_model: ScriptedModel) -> str:
    """A run that was cancelled after its first step could have been taken."""
    run = api.post(f"/api/threads/{thread}/runs", {"input": "ended"}, 202)
    api.post(f"/api/runs/{run['id']}/cancel")
    return str(run["id"])


@pytest.fixture
def completed(api: Api, thread: str, scripted_model: ScriptedModel) -> str:
    run = api.post(f"/api/threads/{thread}/runs", {"input": "ended"}, 202)
    scripted_model.say("Done.")
    run_to_end(Run.objects.get(pk=run["id"]))
    return str(run["id"])


def refused(api: Api, path: str, body: Any, status: int, **headers: str) -> str:
    return str(api.post(path, body, status, **headers)["errors"][0]["code"])


CREATING: list[tuple[str, str, Any, Any]] = [
    ("thread", "/api/threads", {"title": "a"}, {"title": "b"}),
    ("thread", "/api/threads/{id}/messages", {"content": "a"}, [{"content": "a"}]),
    ("thread", "/api/threads/{id}/runs", {"input": "a"}, {"input": "b"}),
    ("thread", "/api/runs", {"agent": "helper", "input": "a"}, {"agent": "helper", "input": "a", "priority": 1}),
    ("failed", "/api/runs/{id}/resume", {}, {"input": "go on"}),
    ("completed", "/api/runs/{id}/retry", {}, None),
    ("completed", "/api/runs/{id}/fork", {"after_step": 0}, {"after_step": 0, "overrides": {"instructions": "b"}}),
]


@pytest.mark.parametrize(("kind", "path", "body", "other"), CREATING, ids=[each[1] for each in CREATING])
def test_the_same_request_gives_the_first_answer_again(
    api: Api, request: pytest.FixtureRequest, kind: str, path: str, body: Any, other: Any
) -> None:
    path = path.format(id=request.getfixturevalue(kind))
    first = api.call("post", path, body, status=None, **KEYED)
    assert first.status_code in (201, 202), first.content
    before = rows()
    again = api.call("post", path, body, status=None, **KEYED)
    assert (again.status_code, again.json()) == (first.status_code, first.json())
    for name in ("Location", "X-Run-Id"):
        assert again.get(name) == first.get(name)
    assert rows() == before
    if other is not None:
        assert refused(api, path, other, 409, **KEYED) == "idempotency_conflict"
    assert refused(api, "/api/threads", {"title": "elsewhere"}, 409, **KEYED) == "idempotency_conflict"
    assert rows() == before
    assert IdempotencyKey.objects.count() == 1


def test_every_creating_post_is_tried_here() -> None:
    """A new one without a line in CREATING fails here. The answers of people are tried in test_answers."""
    from runs.http.urls import urlpatterns

    creating = set()
    for pattern in urlpatterns:
        view = getattr(pattern.callback, "view_class", None) or getattr(pattern.callback, "cls", None)
        said = view.operations().get("post") if view is not None else None
        if said is not None and said.creates:
            creating.add(pattern.name)
    answering = {"tool-call-result", "tool-call-error"}
    assert creating - answering == {"threads", "messages", "thread-runs", "runs", "run-resume", "run-retry", "run-fork"}
    assert len(creating - answering) == len(CREATING)


def test_the_first_answer_stays_though_the_run_went_on(api: Api, thread: str, scripted_model: ScriptedModel) -> None:
    first = api.post(f"/api/threads/{thread}/runs", {"input": "a"}, 202, **KEYED)
    scripted_model.say("Done.")
    run_to_end(Run.objects.get(pk=first["id"]))
    assert api.post(f"/api/threads/{thread}/runs", {"input": "a"}, 202, **KEYED) == first
    assert api.get(f"/api/runs/{first['id']}")["status"] == "completed"


def test_a_body_may_be_spaced_and_ordered_as_it_likes(api: Api, thread: str) -> None:
    path = f"/api/threads/{thread}/runs"
    first = api.post(path, b'{"input":"\xc3\xa4","metadata":{"a":1,"b":[1,2]}}', 202, **KEYED)
    again = b'  {\n "metadata": {"b": [1, 2],\t"a": 1}, "input": "\\u00e4" }\n'
    assert api.post(path, again, 202, **KEYED) == first
    assert refused(api, path, {"input": "ä", "metadata": {"a": 1, "b": [2, 1]}}, 409, **KEYED) == "idempotency_conflict"
    assert refused(api, path, {"input": "ä", "metadata": {"a": "1", "b": [1, 2]}}, 409, **KEYED) == (
        "idempotency_conflict"
    )


def test_the_same_body_to_another_place_is_another_request(api: Api, thread: str) -> None:
    api.post(f"/api/threads/{thread}/runs", {"input": "a"}, 202, **KEYED)
    other = api.post("/api/threads", {"agent": "helper"}, 201)["id"]
    assert refused(api, f"/api/threads/{other}/runs", {"input": "a"}, 409, **KEYED) == "idempotency_conflict"
    assert Run.objects.count() == 1


def test_a_request_that_was_refused_keeps_no_key(api: Api, thread: str) -> None:
    path = f"/api/threads/{thread}/runs"
    before = rows()
    for body, status in (({"input": 5}, 400), ({}, 409), ({"input": "a", "agent": "nobody"}, 400)):
        api.post(path, body, status, **KEYED)
    assert rows() == before
    assert not IdempotencyKey.objects.exists()
    api.post(path, {"input": "now it is right"}, 202, **KEYED)


def test_keys_are_each_owners_own(api: Api, api_of: Callable[..., Api], helper: Agent) -> None:
    body = {"agent": "helper", "input": "a"}
    mine = api.post("/api/runs", body, 202, **KEYED)
    theirs = api_of("bob").post("/api/runs", body, 202, **KEYED)
    assert mine["id"] != theirs["id"]
    assert api.post("/api/runs", body, 202, **KEYED) == mine


def test_without_a_key_each_request_counts(api: Api, helper: Agent) -> None:
    for _ in range(2):
        api.post("/api/runs", {"agent": "helper", "input": "a"}, 202)
    assert Run.objects.count() == 2
    assert not IdempotencyKey.objects.exists()


@pytest.mark.parametrize("key", ["", "x" * 201, "a\tb", "ä", "a\x7f"], ids=ascii)
def test_a_key_that_cannot_be_one_is_named(api: Api, helper: Agent, key: str) -> None:
    answer = api.post("/api/runs", {"agent": "helper", "input": "a"}, 400, **{"Idempotency-Key": key})
    assert answer["errors"][0]["attr"] == "Idempotency-Key"
    assert not Run.objects.exists()


@pytest.mark.parametrize("body", [b'{"metadata": {"a": NaN}}', b'{"metadata": {"a": Infinity}}', b'{"a": 1'])
def test_what_is_no_json_is_refused_with_a_key_too(api: Api, body: bytes) -> None:
    assert refused(api, "/api/threads", body, 400, **KEYED) in ("parse_error", "invalid")
    assert not Thread.objects.exists()


def test_numbers_beyond_64_bits_are_refused_with_a_key_too(api: Api) -> None:
    answer = api.post("/api/threads", {"metadata": {"a": 2**80}}, 400, **KEYED)
    assert answer["errors"][0]["attr"] == "metadata"


def test_a_crash_after_the_work_leaves_nothing(api: Api, helper: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is kept in the transaction that does the work: without its answer neither is there."""
    before = rows()

    def die(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the process dies here")

    with monkeypatch.context() as patched:
        patched.setattr("runs.http.runs.run_answer", die)
        api.client.raise_request_exception = False
        answer = api.post("/api/runs", {"agent": "helper", "input": "a"}, 500, **KEYED)
    assert "dies here" not in str(answer)
    assert rows() == before
    assert not IdempotencyKey.objects.exists()
    api.post("/api/runs", {"agent": "helper", "input": "a"}, 202, **KEYED)
    assert Run.objects.count() == 1


# --- at the same time -----------------------------------------------------------------------------------------------


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Holds each request after its work, until another one waits for it in Postgres: they do meet."""

    def waited() -> None:
        from tests.workers.conftest import eventually

        eventually(_somebody_waits)

    real = idempotency.Answer

    def meet(*given: Any, **named: Any) -> Any:
        waited()
        return real(*given, **named)

    monkeypatch.setattr("runs.http.runs.Answer", meet)
    monkeypatch.setattr("runs.http.threads.Answer", meet)
    return waited


def _somebody_waits() -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_stat_clear_snapshot()")  # else one transaction sees one moment of it
        cursor.execute(
            "SELECT EXISTS (SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database() AND query LIKE '%idempotency%')"
        )
        return bool(cursor.fetchone()[0])


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("path", "body"),
    [("/api/threads", {"messages": [{"content": "a"}]}), ("/api/runs", {"agent": "helper", "input": "a"})],
)
def test_two_submits_at_once_make_one_row(api: Api, helper: Agent, slowly: Any, path: str, body: Any) -> None:
    submit = lambda: api.call("post", path, body, status=None, **KEYED)  # noqa: E731
    first, second = Together(submit, submit).join()
    assert first.status_code == second.status_code == (201 if path == "/api/threads" else 202)
    assert first.json() == second.json()
    assert Thread.objects.count() == Message.objects.count() == IdempotencyKey.objects.count() == 1
    assert Run.objects.count() == (0 if path == "/api/threads" else 1)


@pytest.mark.django_db(transaction=True)
def test_two_different_submits_at_once_make_the_first_row_only(api: Api, helper: Agent, slowly: Any) -> None:
    one = lambda: api.call("post", "/api/runs", {"agent": "helper", "input": "one"}, status=None, **KEYED)  # noqa: E731
    two = lambda: api.call("post", "/api/runs", {"agent": "helper", "input": "two"}, status=None, **KEYED)  # noqa: E731
    assert sorted(answer.status_code for answer in Together(one, two).join()) == [202, 409]
    assert Run.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_who_waited_for_one_that_failed_does_the_work(
    api: Api, helper: Agent, slowly: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is rolled back while the second waits at the index: the second's insert then succeeds."""
    died: list[bool] = []
    real = agents.registry.get

    def once_broken(name: str) -> Agent:
        found = real(name)
        if not died:
            died.append(True)
            slowly()
            raise RuntimeError("the process dies here")
        return found

    monkeypatch.setattr("runs.agents.get", once_broken)
    monkeypatch.setattr("runs.http.runs.Answer", idempotency.Answer)
    api.client.raise_request_exception = False
    submit = lambda: api.call("post", "/api/runs", {"agent": "helper", "input": "a"}, status=None, **KEYED)  # noqa: E731
    assert sorted(answer.status_code for answer in Together(submit, submit).join()) == [202, 500]
    assert Run.objects.count() == IdempotencyKey.objects.count() == 1
