"""How many requests a key, a user or an address may make."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.cache import cache
from django.test import Client

from runs.http import throttles
from runs.http.throttles import parse_rate
from tests.http.conftest import Api
from threads.authentication import create_key
from threads.models import Thread

pytestmark = pytest.mark.django_db

NOON = 1_795_262_400.0  # a whole number of minutes


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The time by which windows are counted; `moment.now` may be moved."""
    moment = SimpleNamespace(now=NOON + 10)
    monkeypatch.setattr(throttles, "time", SimpleNamespace(time=lambda: moment.now))
    cache.clear()
    return moment


def test_a_key_has_so_many_requests_a_window(api: Api, moment: Any, settings: Any) -> None:
    settings.LONGHAUL = {"API_RATE": "3/min"}
    for _ in range(3):
        api.get("/api/threads")
    refused = api.call("get", "/api/threads", status=429)
    assert refused["Retry-After"] == "50"
    told = refused.json()
    assert told["type"] == "client_error"
    assert told["errors"][0]["code"] == "throttled"
    assert told["errors"][0]["attr"] is None
    api.post("/api/threads", {"title": "x"}, 429)
    assert not Thread.objects.exists()
    api.call("get", "/api/runs/01990000-0000-7000-8000-000000000000/wait", status=429)
    moment.now += 49.9
    assert api.call("get", "/api/threads", status=429)["Retry-After"] == "1"
    moment.now += 0.2
    api.get("/api/threads")


def test_each_key_counts_by_itself_and_a_session_too(api: Api, moment: Any, settings: Any) -> None:
    settings.LONGHAUL = {"API_RATE": "1/min"}
    second = Api(api.user, create_key(api.user)[1])
    browser = Client()
    browser.force_login(api.user)
    other = Client()
    other.force_login(User.objects.create_user("bob"))
    for each in (api, second):
        each.get("/api/threads")
        each.get("/api/threads", 429)
    for client in (browser, other):
        assert [client.get("/api/threads").status_code for _ in range(2)] == [200, 429]


def test_wrong_keys_are_counted_by_their_address(db: None, moment: Any, settings: Any) -> None:
    settings.LONGHAUL = {"API_RATE": "2/min"}

    def status(key: str, address: str) -> int:
        client = Client(REMOTE_ADDR=address)
        return client.get("/api/threads", headers={"Authorization": f"Bearer lh_{key}"}).status_code

    assert [status(f"guess{n}", "192.0.2.1") for n in range(3)] == [401, 401, 429]
    assert Client(REMOTE_ADDR="192.0.2.1").get("/api/threads").status_code == 429
    assert status("guess", "192.0.2.2") == 401
    _, key = create_key(User.objects.create_user("ann"))
    right = Client(REMOTE_ADDR="192.0.2.1")
    assert right.get("/api/threads", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_an_address_may_be_any_text(db: None, moment: Any, settings: Any) -> None:
    settings.LONGHAUL = {"API_RATE": "1/min"}
    headers = {"X-Forwarded-For": "a b\x7f" + "x" * 5000}
    assert [Client().get("/api/docs", headers=headers).status_code for _ in range(2)] == [200, 429]


def test_probes_are_never_refused(db: None, moment: Any, settings: Any) -> None:
    settings.LONGHAUL = {"API_RATE": "1/min"}
    assert [Client().get("/healthz").status_code for _ in range(4)] == [200] * 4


def test_what_creates_has_a_rate_of_its_own(api: Api, moment: Any, settings: Any) -> None:
    settings.LONGHAUL = {"START_RATE": "2/min"}
    thread = api.post("/api/threads", {}, 201)["id"]
    api.post(f"/api/threads/{thread}/messages", {"content": "x"}, 201)
    refused = api.call("post", f"/api/threads/{thread}/messages", {"content": "y"}, status=429)
    assert refused["Retry-After"] == "50"
    api.post("/api/runs", {"agent": "a", "input": "x"}, 429)
    for _ in range(3):
        api.get("/api/threads")
        api.patch(f"/api/threads/{thread}", {"title": "x"})
    second = Api(api.user, create_key(api.user)[1])
    second.post("/api/threads", {}, 201)


def test_nothing_is_counted_without_a_rate(api: Api, moment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttles, "cache", None)
    for _ in range(5):
        api.get("/api/threads")


def test_a_cache_that_is_away_lets_through(
    api: Api, moment: Any, settings: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings.LONGHAUL = {"API_RATE": "1/min"}

    class Away:
        def add(self, *_: Any, **__: Any) -> bool:
            raise ConnectionError("no route to the cache")

    monkeypatch.setattr(throttles, "cache", Away())
    for _ in range(3):
        api.get("/api/threads")
    assert "not counted" in caplog.text


def test_a_count_that_expires_between_lets_through(
    api: Api, moment: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.LONGHAUL = {"API_RATE": "1/min"}
    monkeypatch.setattr(cache, "add", lambda *_, **__: False)
    for _ in range(3):
        api.get("/api/threads")


def test_rates() -> None:
    assert [parse_rate(rate)[1].total_seconds() for rate in ("1/s", "2/min", "3/h", "4/d")] == [1, 60, 3600, 86400]
    assert parse_rate("600/min")[0] == 600
    for wrong in ("0/min", "-1/s", "5", "5/", "/min", "5/month", "5 / min", "٣/min"):
        with pytest.raises(ValueError, match="600/min"):
            parse_rate(wrong)
