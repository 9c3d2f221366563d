"""What is wrong a million times over is refused at the cost of reading it: nobody names a million mistakes."""

from __future__ import annotations

import time

import pytest

from runs.agents import Agent
from runs.http.body import MOST_MISTAKES
from runs.http.forms import MOST_MESSAGES
from tests.http.conftest import Api
from threads.models import Message, Thread

MANY = 300_000
# Seconds. It takes a tenth of this; each mistake told one by one took more than two minutes, on the same machine.
AT_MOST = 20.0
ONES = b"1," * MANY + b"1"
NAMES = b",".join(b'"k%d":1' % each for each in range(MANY))

BODIES = {
    "messages": ("/api/threads", b'{"messages":[%b]}' % ONES),
    "parts": ("/api/runs", b'{"agent":"helper","input":[%b]}' % ONES),
    "tools": ("/api/runs", b'{"agent":"helper","tools":[%b]}' % ONES),
    "parts of a message": ("/api/threads", b'{"messages":[{"content":[%b]}]}' % ONES),
    "fields": ("/api/threads", b"{%b}" % NAMES),
    "fields of limits": ("/api/threads", b'{"limits":{%b}}' % NAMES),
}


@pytest.mark.django_db
@pytest.mark.parametrize("name", BODIES)
def test_a_body_full_of_mistakes_is_refused_at_once(name: str, api: Api, helper: Agent) -> None:
    path, given = BODIES[name]
    begun = time.monotonic()
    answer = api.call("post", path, given, status=400)
    assert time.monotonic() - begun < AT_MOST
    assert len(answer.content) < 10_000


@pytest.mark.django_db
def test_a_list_tells_of_its_first_mistake_by_its_place(api: Api, helper: Agent) -> None:
    given = {"agent": "helper", "input": "Hello", "tools": ["a", 2, 3]}
    [error] = api.post("/api/runs", given, 400)["errors"]
    assert error["attr"] == "tools.1"


@pytest.mark.django_db
def test_a_list_of_messages_tells_of_its_first_mistake(api: Api) -> None:
    thread = api.post("/api/threads", {}, 201)["id"]
    [error] = api.post(f"/api/threads/{thread}/messages", [{"content": "Hi"}, 2, 3], 400)["errors"]
    assert error["attr"] == "1"


@pytest.mark.django_db
def test_mistakes_are_named_up_to_a_number_and_counted_beyond(api: Api) -> None:
    some = {f"k{number}": 1 for number in range(MOST_MISTAKES)}
    named = api.post("/api/threads", some, 400)["errors"]
    assert {error["attr"] for error in named} == set(some)
    [counted] = api.post("/api/threads", {**some, "more": 1}, 400)["errors"]
    assert f"{MOST_MISTAKES + 1:,} mistakes" in counted["detail"]


@pytest.mark.django_db
@pytest.mark.parametrize("path", ["/api/runs", "/api/threads", "/healthz"])
def test_more_parameters_than_the_host_takes_are_a_bad_request(path: str, api: Api) -> None:
    answer = api.get(f"{path}?" + "&".join(["a=1"] * 1001), 400)
    assert answer["type"] == "client_error"


@pytest.mark.django_db
def test_so_many_messages_are_taken_at_once_and_no_more(api: Api, helper: Agent) -> None:
    some = [{"content": "Hi"}] * MOST_MESSAGES
    thread = api.post("/api/threads", {"messages": some}, 201)["id"]
    api.post(f"/api/threads/{thread}/messages", some, 201)
    for path, body, attr in (
        ("/api/threads", {"messages": [*some, *some]}, "messages"),
        ("/api/runs", {"agent": "helper", "messages": [*some, *some]}, "messages"),
        (f"/api/threads/{thread}/messages", [*some, *some], "non_field_errors"),
    ):
        [error] = api.post(path, body, 400)["errors"]
        assert error["attr"] == attr
    assert Message.objects.count() == 2 * MOST_MESSAGES


@pytest.mark.django_db
def test_in_code_any_number_of_messages_is_saved(helper: Agent) -> None:
    many = [{"content": "Hi"}] * 7000  # more parameters than one statement takes
    thread = Thread.objects.create()
    thread.save_many(many)
    helper.start("Hello", thread=thread, messages=many)
    assert thread.messages.count() == 14_001
