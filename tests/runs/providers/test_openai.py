"""The provider against a real server: every way in which a stream can go well or wrong."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from agents_project.demo.model_server import (
    Action,
    Cut,
    Empty,
    Finish,
    Garbage,
    Headers,
    ModelServer,
    Pause,
    Raw,
    Reasoning,
    Script,
    Silence,
    Status,
    Text,
    ToolCall,
    Usage,
)
from agents_project.demo.scripts import faulty, saying
from runs.providers import (
    Finished,
    ModelEvent,
    ModelRequest,
    ProviderError,
    Rate,
    RatesReported,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolSpec,
    UnknownProvider,
    UsageReported,
    forget_providers,
    get_provider,
    parse_arguments,
    register_provider,
)
from runs.providers.openai import OpenAIProvider

KEY = "sk-a-key-that-nobody-may-see"
CALL = "01998c2e-7d4f-7a10-8000-000000000001"
APART = Pause(0.03)  # long enough that what stands before and after comes in reads of its own


class Service:
    """A model server, a provider that speaks to it, and the question that every test asks."""

    def __init__(self, server: ModelServer, provider: OpenAIProvider) -> None:
        self.server = server
        self.provider = provider

    def says(self, *actions: Action) -> Service:
        self.server.script = saying(*actions)
        return self

    def plays(self, script: Script) -> Service:
        self.server.script = script
        return self

    def request(self, **fields: Any) -> ModelRequest:
        question = self.provider.render({"role": "user", "content": [{"type": "text", "text": "Well?"}]})
        return ModelRequest(**{"model": "m", "instructions": "Be short.", "messages": [question], **fields})

    def stream(self, **fields: Any) -> Iterator[ModelEvent]:
        return self.provider.stream(self.request(**fields))

    def answer(self, **fields: Any) -> list[ModelEvent]:
        return list(self.stream(**fields))

    def failure(self, **fields: Any) -> tuple[ProviderError, list[ModelEvent]]:
        """Return the error that the call ends with, and what was heard before it."""
        heard: list[ModelEvent] = []
        with pytest.raises(ProviderError) as caught:
            for event in self.stream(**fields):
                heard.append(event)
        assert KEY not in str(caught.value)
        return caught.value, heard


@pytest.fixture
def service() -> Iterator[Service]:
    with ModelServer(saying(Text("Hello."))) as server, closing(OpenAIProvider(KEY, server.url)) as provider:
        yield Service(server, provider)


def text_of(events: Sequence[ModelEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def wait_until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


# --- what goes well -------------------------------------------------------------------------------------------------


def test_text_comes_in_the_pieces_in_which_it_was_said(service: Service) -> None:
    events = service.says(Text("Good morning.", chunk_chars=4), Usage(20, 3)).answer()

    assert events == [
        *(TextDelta(piece) for piece in ("Good", " mor", "ning", ".")),
        UsageReported(20, 3),
        Finished("stop"),
    ]


def test_text_is_heard_while_the_model_still_speaks(service: Service) -> None:
    stream = service.says(Text("first"), Silence()).stream()

    assert next(stream) == TextDelta("first")

    stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_told_apart_from_text(service: Service, field: str) -> None:
    events = service.says(Reasoning("Hmm, so.", chunk_chars=4, field=field), Text("Yes.")).answer()

    assert events[:3] == [ReasoningDelta("Hmm,"), ReasoningDelta(" so."), TextDelta("Yes.")]


def test_a_call_comes_with_its_name_from_its_first_piece(service: Service) -> None:
    events = service.says(ToolCall("look_up", {"number": 1042}, chunk_chars=5)).answer()

    pieces = [event for event in events if isinstance(event, ToolCallDelta)]
    assert len(pieces) > 2
    assert {(piece.index, piece.name, piece.provider_id) for piece in pieces} == {(0, "look_up", "call_1_0")}
    assert json.loads("".join(piece.text for piece in pieces)) == {"number": 1042}
    assert events[-1] == Finished("tool_calls")


def test_parallel_calls_are_told_apart_by_their_index(service: Service) -> None:
    events = service.says(
        Text("Both."), ToolCall("first", {"a": "xxxxxx"}, chunk_chars=3), ToolCall("second", {"b": 2}, chunk_chars=3)
    ).answer()

    pieces = [event for event in events if isinstance(event, ToolCallDelta)]
    assert [piece.index for piece in pieces] != sorted(piece.index for piece in pieces)  # they came by turns
    arguments = {name: "".join(p.text for p in pieces if p.name == name) for name in ("first", "second")}
    assert {name: json.loads(text) for name, text in arguments.items()} == {
        "first": {"a": "xxxxxx"},
        "second": {"b": 2},
    }
    assert {(piece.index, piece.name) for piece in pieces} == {(0, "first"), (1, "second")}


def pieces_of_calls(*pieces: dict[str, Any]) -> Raw:
    chunks = [{"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]} for piece in pieces]
    return Raw(b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks))


@pytest.mark.parametrize("index", [{}, {"index": 0}], ids=["no index", "one index for all"])
def test_calls_of_a_service_that_does_not_count_are_told_apart_by_their_ids(
    service: Service, index: dict[str, int]
) -> None:
    calls = pieces_of_calls(
        {**index, "id": "a", "function": {"name": "first", "arguments": "{"}},
        {**index, "function": {"arguments": "}"}},
        {**index, "id": "b", "function": {"name": "second", "arguments": "{}"}},
    )

    events = service.says(calls).answer()

    assert events[:3] == [
        ToolCallDelta(0, "a", "first", "{"),
        ToolCallDelta(0, "a", "first", "}"),
        ToolCallDelta(1, "b", "second", "{}"),
    ]


def test_a_call_whose_pieces_have_an_id_each_is_one_call(service: Service) -> None:
    calls = pieces_of_calls(
        {"index": 0, "id": "a", "function": {"name": "first", "arguments": "{"}},
        {"index": 0, "id": "b", "function": {"arguments": "}"}},
    )

    events = service.says(calls).answer()

    assert [event.index for event in events if isinstance(event, ToolCallDelta)] == [0, 0]


def test_a_call_without_arguments_is_heard(service: Service) -> None:
    events = service.says(ToolCall("look_around", "")).answer()

    assert events[0] == ToolCallDelta(0, "call_1_0", "look_around", "")
    assert parse_arguments("") == {}


def test_a_call_whose_name_comes_late_is_heard_from_there(service: Service) -> None:
    calls = pieces_of_calls(
        {"index": 0, "id": "a", "function": {"arguments": "{"}},
        {"index": 0, "function": {"name": "first", "arguments": "}"}},
    )

    assert service.says(calls).answer()[0] == ToolCallDelta(0, "a", "first", "{}")


def test_a_call_without_a_name_is_a_server_error(service: Service) -> None:
    error, _ = service.says(pieces_of_calls({"index": 0, "id": "a", "function": {"arguments": "{}"}})).failure()

    assert (error.code, "without a name" in error.message) == ("server", True)


def test_usage_tells_cached_and_reasoning_tokens(service: Service) -> None:
    events = service.says(Text("Yes."), Usage(900, 70, cached_tokens=512, reasoning_tokens=64)).answer()

    assert UsageReported(900, 70, cached_tokens=512, reasoning_tokens=64) in events


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_an_answer_that_was_stopped_says_why(service: Service, reason: str) -> None:
    assert service.says(Text("Once upon"), Finish(reason)).answer()[-1] == Finished(reason)  # type: ignore[arg-type]


def test_a_stream_may_end_with_its_reason_and_no_done(service: Service) -> None:
    assert service.says(Text("Yes."), Finish("stop", done=False)).answer()[-1] == Finished("stop")


def test_a_stream_may_end_with_done_and_no_reason(service: Service) -> None:
    assert service.says(Text("Yes."), Finish(None)).answer()[-1] == Finished("stop")


def test_an_answer_that_was_complete_before_the_cut_counts(service: Service) -> None:
    said = b'data: {"choices":[{"delta":{"content":"Yes."},"finish_reason":"stop"}]}\n\n'

    assert service.says(Raw(said), Pause(0.05), Cut()).answer() == [TextDelta("Yes."), Finished("stop")]


# --- how events are written -----------------------------------------------------------------------------------------

CHUNK = '{"choices":[{"delta":{"content":%s}}]}'


def test_a_character_may_be_cut_between_two_reads(service: Service) -> None:
    event = f"data: {CHUNK % json.dumps('Größe 😀', ensure_ascii=False)}\n\n".encode()
    cut = event.index("😀".encode()) + 2

    events = service.says(Raw(event[:cut]), APART, Raw(event[cut:])).answer()

    assert events[0] == TextDelta("Größe 😀")


def test_lines_may_end_with_carriage_returns_also_cut_in_two(service: Service) -> None:
    event = f"data: {CHUNK % json.dumps('Yes.')}\r\n\r\n".encode()

    events = service.says(Raw(event[:-3]), APART, Raw(event[-3:-1]), APART, Raw(event[-1:])).answer()

    assert text_of(events) == "Yes."


def test_data_may_have_several_lines_comments_and_no_space(service: Service) -> None:
    event = b': keep-alive\n\nevent: x\nid: 7\ndata:{"choices":[{"delta":\ndata: {"content":"Yes."}}]}\n\n'

    assert text_of(service.says(Raw(event)).answer()) == "Yes."


def test_text_may_come_as_a_list_of_parts(service: Service) -> None:
    said = json.dumps([{"type": "text", "text": "Yes"}, {"type": "text", "text": "."}])

    assert text_of(service.says(Raw(f"data: {CHUNK % said}\n\n".encode())).answer()) == "Yes."


def test_an_event_without_an_end_is_not_kept(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.providers.openai.LARGEST_EVENT", 1000)

    error, _ = service.says(Raw(b"data: " + b"x" * 2000), Silence()).failure(silence=timedelta(seconds=5))

    assert (error.code, "without an end" in error.message) == ("server", True)


def test_nul_and_halves_of_surrogate_pairs_are_removed(service: Service) -> None:
    said = ("a\\u0000b", "\\ud83d\\ude00", "c\\ud83d")
    events = b"".join(f"data: {CHUNK}\n\n".encode() % f'"{text}"'.encode() for text in said)
    call = ToolCall("look_up", '{"name": "a\x00b"}')

    heard = service.says(Raw(events), call).answer()

    assert text_of(heard) == "ab😀c\ufffd"
    assert "".join(event.text for event in heard if isinstance(event, ToolCallDelta)) == '{"name": "ab"}'


def test_arguments_are_parsed_to_what_postgres_can_hold() -> None:
    assert parse_arguments('{"name": "a\\u0000b", "c\\u0000": ["\\u0000"]}') == {"name": "ab", "c": [""]}
    assert parse_arguments(" ") == {}
    assert parse_arguments('{"number": 1') == '{"number": 1'
    assert parse_arguments("[1]") == "[1]"


# --- what goes wrong before the stream ------------------------------------------------------------------------------


def test_a_refused_connection_is_a_network_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with closing(OpenAIProvider(KEY, f"http://127.0.0.1:{port}/v1")) as provider:
        request = ModelRequest("m", "", [provider.render({"role": "user", "content": []})])
        with pytest.raises(ProviderError, match="could not be reached") as caught:
            list(provider.stream(request))

    assert (caught.value.code, caught.value.retryable) == ("network", True)


def error_body(message: str, code: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


@pytest.mark.parametrize(
    ("status", "body", "code", "retryable"),
    [
        (401, error_body("Incorrect API key provided", "invalid_api_key"), "auth", False),
        (403, error_body("Not your region", None, "permission_error"), "auth", False),
        (402, error_body("Insufficient balance"), "quota", False),
        (429, error_body("Slow down", "rate_limit_exceeded", "requests"), "rate_limited", True),
        (429, error_body("You have run out", "insufficient_quota", "insufficient_quota"), "quota", False),
        (429, error_body("You have run out", None, "insufficient_quota"), "quota", False),
        (400, error_body("Too long", "context_length_exceeded"), "context_overflow", False),
        (400, error_body("This model's maximum context length is 8192 tokens"), "context_overflow", False),
        (400, error_body("Unknown parameter"), "invalid_request", False),
        (404, error_body("No such model", "model_not_found"), "invalid_request", False),
        (422, {"detail": "Field required"}, "invalid_request", False),
        (408, "", "server", True),
        (409, "", "server", True),
        (500, error_body("Sorry", None, "server_error"), "server", True),
        (502, "<html>Bad gateway</html>", "server", True),
        (503, error_body("Busy", None, "server_error"), "overloaded", True),
        (529, error_body("Busy"), "overloaded", True),
    ],
)
def test_a_status_becomes_the_class_of_error(
    service: Service, status: int, body: dict[str, Any] | str, code: str, retryable: bool
) -> None:
    error, heard = service.says(Status(status, body)).failure()

    assert (error.code, error.retryable, heard) == (code, retryable, [])
    assert str(status) in error.message
    assert len(service.server.calls) == 1  # the client's own retries are off


def test_the_words_of_the_service_are_told_but_not_without_end(service: Service) -> None:
    assert "Slow down" in service.says(Status(429, error_body("Slow down"))).failure()[0].message
    assert len(service.says(Status(500, error_body("sorry " * 10_000))).failure()[0].message) < 600
    assert len(service.says(Status(500, "x" * 1_000_000)).failure()[0].message) < 600


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "Retry-After": "7"}, 0.25),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:30 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-3"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "1e300"}, 86_400),
        ({}, None),
    ],
)
def test_the_wait_that_a_service_asks_for_is_heard(
    service: Service, headers: dict[str, str], seconds: float | None
) -> None:
    error, _ = service.says(Status(429, error_body("Slow down"), headers)).failure()

    assert error.retry_after == (None if seconds is None else timedelta(seconds=seconds))


def test_a_wait_until_a_date_counts_from_now_where_the_service_tells_no_time(service: Service) -> None:
    until = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)

    error, _ = service.says(Status(503, "", {"Retry-After": until})).failure()

    assert error.retry_after is not None
    assert timedelta(seconds=20) < error.retry_after <= timedelta(seconds=30)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("20ms", 0.02),
        ("2m59.56s", 179.56),
        ("1h0m30s", 3630),
        ("8m38.4s", 518.4),
        ("24h0m0s", 86_400),
        ("1d2h", 86_400),  # a day at most
        ("55", 55),
        ("0", 0),
        ("-1", None),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("1970-01-01T00:00:00Z", None),
    ],
)
def test_the_times_of_services_are_read(service: Service, said: str, seconds: float | None) -> None:
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": said}

    [rates, *_] = service.says(Headers(headers), Text("Well.")).answer()

    assert isinstance(rates, RatesReported)
    assert rates.requests is not None
    assert rates.requests.reset == (None if seconds is None else timedelta(seconds=seconds))
    assert rates.wait == (timedelta(seconds=seconds) if seconds else None)


def test_a_moment_is_a_time_as_well(service: Service) -> None:
    until = datetime.now(UTC) + timedelta(seconds=30)
    for said in (until.isoformat(), str(int(until.timestamp()))):
        headers = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": said}
        [rates, *_] = service.says(Headers(headers), Text("Well.")).answer()
        assert isinstance(rates, RatesReported)
        assert rates.wait is not None
        assert timedelta(seconds=20) < rates.wait <= timedelta(seconds=30)


@pytest.mark.parametrize(
    ("headers", "rates"),
    [
        (
            {
                "x-ratelimit-limit-requests": "60",
                "x-ratelimit-remaining-requests": "59",
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-limit-tokens": "150000",
                "x-ratelimit-remaining-tokens": "149984",
                "x-ratelimit-reset-tokens": "6m0s",
            },
            RatesReported(Rate(60, 59, timedelta(seconds=1)), Rate(150_000, 149_984, timedelta(minutes=6))),
        ),
        (  # Azure
            {"x-ratelimit-remaining-requests": "79", "x-ratelimit-remaining-tokens": "61353"},
            RatesReported(Rate(None, 79, None), Rate(None, 61_353, None)),
        ),
        (
            {"x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "0"},
            RatesReported(None, Rate(None, None, timedelta())),
        ),
        ({}, None),
    ],
)
def test_what_a_service_says_of_its_rates_comes_first(
    service: Service, headers: dict[str, str], rates: RatesReported | None
) -> None:
    events = service.says(Headers(headers), Text("Well.")).answer()

    assert [event for event in events if isinstance(event, RatesReported)] == ([] if rates is None else [rates])
    assert rates is None or (events[0] == rates and rates.wait is None)


def test_a_refusal_without_retry_after_waits_for_what_is_used_up(service: Service) -> None:
    used = {
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "1h0m0s",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "6m0s",
    }
    error, _ = service.says(Status(429, error_body("Slow down"), used)).failure()
    assert error.retry_after == timedelta(minutes=6)

    error, _ = service.says(Status(429, error_body("Slow down"), {"x-rate-limit-reset-tokens": "55"})).failure()
    assert error.retry_after == timedelta(seconds=55)

    error, _ = service.says(Status(429, error_body("Slow down"), {**used, "retry-after": "2"})).failure()
    assert error.retry_after == timedelta(seconds=2)


def test_a_limit_of_a_minute_is_told_from_one_of_a_day() -> None:
    assert Rate(60, 59, timedelta(seconds=1)).a_minute == 60
    assert Rate(60, 0, timedelta(seconds=60)).a_minute == 60
    assert Rate(200, 199, timedelta(minutes=7, seconds=12)).a_minute is None
    assert Rate(60, 60, timedelta(seconds=1)).a_minute is None, "nothing is used: it cannot be told"
    assert Rate(60, 59, None).a_minute is None


def test_an_answer_that_is_no_stream_says_so(service: Service) -> None:
    page, _ = service.says(Status(200, "<html>Log in</html>", {"content-type": "text/html"})).failure()
    error, _ = service.says(Status(200, error_body("Slow down", "rate_limit_exceeded"))).failure()

    assert (page.code, "in place of a stream" in page.message) == ("server", True)
    assert error.code == "rate_limited"


def test_a_missing_key_and_one_that_no_header_takes_are_said_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for key in ("", "sk-secret\r\nX: y", "sk-sécret"):
        with closing(OpenAIProvider(key)) as provider, pytest.raises(ProviderError) as caught:
            list(provider.stream(ModelRequest("m", "", [])))
        assert caught.value.code == "auth"
        assert "OPENAI_API_KEY" in str(caught.value)
        assert "cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/v1", "127.0.0.1:8000", "http://", "http://a:b", "nonsense", "/v1"])
def test_a_base_url_that_is_no_address_is_the_callers_mistake(url: str) -> None:
    with closing(OpenAIProvider(KEY, url)) as provider, pytest.raises(ProviderError) as caught:
        list(provider.stream(ModelRequest("m", "", [])))

    assert (caught.value.code, caught.value.retryable) == ("invalid_request", False)


# --- what goes wrong in the stream ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_a_text_that_is_cut_is_a_network_error(service: Service, reset: bool) -> None:
    error, heard = service.says(Text("Good mor"), APART, Cut(reset)).failure()

    assert (error.code, error.retryable) == ("network", True)
    assert text_of(heard) == "Good mor"


def test_arguments_that_are_cut_are_a_network_error(service: Service) -> None:
    start = ToolCall("look_up", '{"numb', chunk_chars=3)

    error, heard = service.says(start, APART, Cut()).failure()

    assert error.code == "network"
    assert "".join(event.text for event in heard if isinstance(event, ToolCallDelta)) == '{"numb'


def test_a_stream_that_ends_in_good_form_but_too_early_is_a_network_error(service: Service) -> None:
    error, heard = service.says(Text("Good mor"), Finish(None, done=False)).failure()

    assert (error.code, text_of(heard)) == ("network", "Good mor")


def test_a_connection_that_ends_without_a_word_is_a_network_error(service: Service) -> None:
    assert service.says(Cut()).failure()[0].code == "network"
    assert service.says(Cut(reset=False)).failure()[0].code == "network"


GARBAGE = {
    "cut JSON": '{"choices": [{"delta',
    "HTML": "<html>",
    "a list": "[]",
    "a number": "7",
    "a text": '"text"',
    "too deep": "[" * 100_000,
    "choices": '{"choices": 7}',
    "a choice": '{"choices": [7]}',
    "a content": '{"choices": [{"delta": {"content": {"a": 1}}}]}',
    "a call": '{"choices": [{"delta": {"tool_calls": [1]}}]}',
    "usage": '{"choices": [{"delta": {}}], "usage": 7}',
    "a reason": '{"choices": [{"delta": {}, "finish_reason": [1]}]}',
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_a_server_error(service: Service, garbage: str) -> None:
    error, heard = service.says(Text("Good"), Garbage(garbage), Text(" morning.")).failure()

    assert (error.code, error.retryable, text_of(heard)) == ("server", True, "Good")
    assert len(error.message) < 300


@pytest.mark.parametrize(
    ("document", "code"),
    [
        (error_body("The server had an error", None, "server_error"), "server"),
        (error_body("Busy", None, "overloaded_error"), "overloaded"),
        (error_body("Slow down", "rate_limit_exceeded"), "rate_limited"),
        (error_body("Too long", "context_length_exceeded"), "context_overflow"),
        (error_body("Unknown field"), "invalid_request"),
        ({"error": {"message": "Slow down", "code": 429}}, "rate_limited"),
        ({"error": {"code": 502}}, "server"),
        ({"error": "Something broke"}, "server"),
    ],
)
def test_an_error_in_the_middle_of_a_stream_is_told_by_its_code(
    service: Service, document: dict[str, Any], code: str
) -> None:
    error, heard = service.says(Text("Good"), Garbage(json.dumps(document))).failure()

    assert (error.code, text_of(heard)) == (code, "Good")


def test_usage_of_an_answer_that_failed_is_told(service: Service) -> None:
    usage = Garbage('{"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 2}}')

    _, heard = service.says(Text("Good"), usage, APART, Cut()).failure()

    assert heard[-1] == UsageReported(30, 2)


@pytest.mark.parametrize("before", [(), (Text("Good mor"),)], ids=["from the start", "in the middle"])
def test_silence_ends_the_call(service: Service, before: tuple[Action, ...]) -> None:
    started = time.monotonic()

    error, heard = service.says(*before, Silence()).failure(silence=timedelta(seconds=0.3))

    assert (error.code, error.retryable, "silent for 0.3 s" in error.message) == ("network", True, True)
    assert 0.25 < time.monotonic() - started < 20  # it would be silent for ever
    assert text_of(heard) == "".join(action.text for action in before if isinstance(action, Text))
    wait_until(lambda: service.server.open_streams == 0)


def test_one_who_trickles_is_cut_at_the_total_time(service: Service) -> None:
    started = time.monotonic()

    error, heard = service.says(Text("x" * 2000, chunk_chars=1, delay=0.05)).failure(timeout=timedelta(seconds=0.5))

    assert (error.code, "did not finish within 0.5 s" in error.message) == ("server", True)
    assert 0.45 < time.monotonic() - started < 20  # the whole takes 100 s
    assert 0 < len(heard) < 12


def test_one_who_trickles_and_then_falls_silent_does_not_outlast_the_total_time(service: Service) -> None:
    started = time.monotonic()

    # Two calls on one connection: what bounds the reads must not be the first call's time.
    service.plays(faulty({2: (Text("x" * 4, chunk_chars=1, delay=0.1), Silence())}, saying(Text("Hello."))))
    service.answer(timeout=timedelta(seconds=15))
    error, _ = service.failure(timeout=timedelta(seconds=0.6), silence=timedelta(seconds=0.5))

    assert "did not finish within 0.6 s" in error.message
    assert time.monotonic() - started < 10
    assert text_of(service.answer()) == "Hello."


def test_one_who_never_pauses_is_cut_at_the_total_time(service: Service) -> None:
    stream = service.says(Text("x" * 20_000, chunk_chars=1)).stream(timeout=timedelta(seconds=0.3))
    next(stream)
    time.sleep(0.4)  # what is said meanwhile lies in the socket's buffer, so that no read has to wait

    with pytest.raises(ProviderError, match="did not finish"):
        list(stream)


def test_an_error_that_never_ends_is_told_by_its_status(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.providers.openai.ERROR_BODY", timedelta(seconds=0.2))
    started = time.monotonic()
    head = b"HTTP/1.1 503 Busy\r\nContent-Length: 100000\r\n\r\nwait"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections: list[socket.socket] = []

        def answer() -> None:
            connection = listener.accept()[0]
            connections.append(connection)
            connection.recv(65536)
            connection.sendall(head)

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with closing(OpenAIProvider(KEY, url)) as provider, pytest.raises(ProviderError) as caught:
            list(provider.stream(ModelRequest("m", "", [])))
        thread.join()
        connections[0].close()

    assert caught.value.code == "overloaded"
    assert time.monotonic() - started < 20  # seconds; the rest of it never comes


def test_an_empty_answer_is_a_server_error_and_its_usage_is_told(service: Service) -> None:
    error, heard = service.says(Empty(), Usage(10, 0)).failure()

    assert (error.code, error.retryable) == ("server", True)
    assert "empty answer" in error.message
    assert heard == [UsageReported(10, 0)]


def test_thinking_alone_is_an_empty_answer_but_not_where_it_was_cut_for_its_length(service: Service) -> None:
    assert service.says(Reasoning("Hmm.")).failure()[0].code == "server"
    assert service.says(Reasoning("Hmm."), Finish("length")).answer()[-1] == Finished("length")


# --- connections ----------------------------------------------------------------------------------------------------


def test_closing_the_generator_closes_the_connection(service: Service) -> None:
    stream = service.says(Text("Good"), Silence()).stream()
    next(stream)
    assert service.server.open_streams == 1

    stream.close()  # type: ignore[attr-defined]

    wait_until(lambda: service.server.open_streams == 0)


def test_a_stream_that_nobody_began_costs_nothing(service: Service) -> None:
    service.stream().close()  # type: ignore[attr-defined]

    assert service.server.calls == []


def test_a_connection_is_used_again_after_an_answer_and_after_an_error(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    connect = socket.create_connection

    def count(*arguments: Any, **options: Any) -> socket.socket:
        opened.append(arguments)
        return connect(*arguments, **options)

    monkeypatch.setattr(socket, "create_connection", count)

    service.plays(faulty({2: (Status(429, error_body("Slow down")),)}, saying(Text("Hello."))))
    service.answer()
    service.failure()
    service.answer()

    assert len(opened) == 1


def test_a_broken_connection_does_not_spoil_the_next_call(service: Service) -> None:
    service.plays(faulty({1: (Text("x"), APART, Cut()), 2: (Text("x"), Silence())}, saying(Text("Hello."))))
    service.failure()
    service.failure(silence=timedelta(seconds=0.1))

    assert text_of(service.answer()) == "Hello."


def test_under_gevent_streams_run_side_by_side_and_a_killed_one_is_torn_down(service: Service) -> None:
    """In a process of its own, for gevent's patches cannot be taken off again."""
    code = """
from gevent import monkey
monkey.patch_all()
import sys
import gevent
from runs.providers import ModelRequest, TextDelta
from runs.providers.openai import OpenAIProvider

provider = OpenAIProvider("key", sys.argv[1])
provider.warm()
heard = []

def listen():
    for event in provider.stream(ModelRequest("m", "", [])):
        if isinstance(event, TextDelta):
            heard.append(event.text)

listeners = [gevent.spawn(listen) for _ in range(50)]
while len(heard) < 50:
    gevent.sleep(0.01)
print("all speak", flush=True)
sys.stdin.readline()
gevent.killall(listeners)
print("killed", flush=True)
sys.stdin.readline()
"""
    service.says(Text("first"), Silence())
    command = [sys.executable, "-c", code, service.server.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "all speak\n"
            assert service.server.open_streams == 50

            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "killed\n"
            wait_until(lambda: service.server.open_streams == 0)
        finally:
            process.kill()


def test_a_hundred_answers_stream_at_once(service: Service) -> None:
    service.says(Text("Hello.", chunk_chars=2, delay=0.02))
    heard: list[str] = []

    def listen() -> None:
        heard.append(text_of(service.answer()))

    threads = [threading.Thread(target=listen) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert heard == ["Hello."] * 100
    wait_until(lambda: service.server.open_streams == 0)


# --- secrets --------------------------------------------------------------------------------------------------------


def test_the_key_is_in_no_error_and_no_log(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    replies: list[Sequence[Action]] = [
        [Status(401, error_body(f"Incorrect API key provided: {KEY}"))],
        [Status(500, f"header was: Bearer {KEY}")],
        [Garbage(f"Bearer {KEY}")],
        [Garbage(json.dumps(error_body(f"Bearer {KEY}")))],
    ]
    for reply in replies:
        error, _ = service.says(*reply).failure()
        assert "[key]" in error.message
        while error is not None:
            assert KEY not in repr(error)
            assert not hasattr(error, "request")  # no exception of the client's in the chain: it holds the headers
            error = error.__cause__ or error.__context__  # type: ignore[assignment]
    assert service.server.calls[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in caplog.text


# --- what goes out --------------------------------------------------------------------------------------------------


def sent(service: Service, message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages that the server got for one of ours, the instructions left out."""
    service.answer(messages=[service.provider.render(message)])
    return service.server.calls[-1].messages[1:]


def test_a_request_holds_instructions_messages_tools_and_options(service: Service) -> None:
    schema = {"type": "object", "properties": {"number": {"type": "integer"}}}
    tools = service.provider.render_tools([ToolSpec("look_up", "Find an order.", schema)])

    service.answer(model="gpt-5-mini", tools=tools, options={"temperature": 0.5})

    body = service.server.calls[0].body
    assert body == {
        "model": "gpt-5-mini",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Well?"}],
        "tools": [
            {"type": "function", "function": {"name": "look_up", "description": "Find an order.", "parameters": schema}}
        ],
    }
    assert service.server.calls[0].headers["content-type"] == "application/json"


def test_a_strict_tool_is_asked_for_as_one(service: Service) -> None:
    schema = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    tools = service.provider.render_tools([ToolSpec("look_up", "", schema, strict=True), ToolSpec("add", "", schema)])

    service.answer(tools=tools)

    first, second = (each["function"] for each in service.server.calls[0].body["tools"])
    assert first["strict"] is True
    assert "strict" not in second


@pytest.mark.parametrize(
    ("choice", "field"),
    [
        ("none", "none"),
        ("required", "required"),
        ("look_up", {"type": "function", "function": {"name": "look_up"}}),
    ],
)
def test_the_choice_of_a_tool_goes_out(service: Service, choice: str, field: object) -> None:
    tools = service.provider.render_tools([ToolSpec("look_up", "", {"type": "object"})])

    service.answer(tools=tools, tool_choice=choice)
    service.answer(tool_choice=choice)

    assert service.server.calls[0].body["tool_choice"] == field
    assert "tool_choice" not in service.server.calls[1].body  # refused by services where there are no tools


def test_options_may_not_replace_what_the_request_is(service: Service) -> None:
    error, _ = service.failure(options={"messages": []})
    assert (error.code, "messages" in error.message) == ("invalid_request", True)

    error, _ = service.failure(options={"stop": object()})
    assert error.code == "invalid_request"
    assert service.server.calls == []

    service.answer(options={"stream_options": None})
    assert "stream_options" not in service.server.calls[0].body


@pytest.mark.parametrize("role", ["user", "system"])
def test_texts_files_and_data_of_a_message_go_out_as_text(service: Service, role: str) -> None:
    parts = [
        {"type": "text", "text": "Look:"},
        {"type": "image", "name": "cat.png"},
        {"type": "file", "url": "https://example.org/a.pdf"},
        {"type": "data", "data": {"order": 1042}},
    ]

    assert sent(service, {"role": role, "content": parts}) == [
        {"role": role, "content": 'Look:\n[image: cat.png]\n[file: https://example.org/a.pdf]\n{"order":1042}'}
    ]


def test_an_assistants_text_and_calls_go_out_without_its_reasoning(service: Service) -> None:
    parts = [
        {"type": "reasoning", "text": "Hmm."},
        {"type": "text", "text": "One moment."},
        {"type": "data", "data": {"for": "the interface"}},
        {"type": "tool_call", "tool_call": CALL, "name": "look_up", "arguments": {"number": 1042}},
        {"type": "tool_call", "tool_call": "b", "name": "look_up", "arguments": '{"number": 7}'},
    ]

    assert sent(service, {"role": "assistant", "content": parts}) == [
        {
            "role": "assistant",
            "content": "One moment.",
            "tool_calls": [
                {"id": CALL, "type": "function", "function": {"name": "look_up", "arguments": '{"number":1042}'}},
                {"id": "b", "type": "function", "function": {"name": "look_up", "arguments": '{"number": 7}'}},
            ],
        }
    ]


def test_an_assistant_that_only_called_has_no_content(service: Service) -> None:
    parts = [{"type": "tool_call", "tool_call": CALL, "name": "look_up", "arguments": {}}]

    assert sent(service, {"role": "assistant", "content": parts})[0]["content"] is None


def test_an_assistant_that_said_nothing_is_not_sent(service: Service) -> None:
    assert sent(service, {"role": "assistant", "content": [{"type": "reasoning", "text": "Hmm."}]}) == []


def test_arguments_that_were_no_json_go_out_as_an_object_that_holds_them(service: Service) -> None:
    parts = [
        {"type": "tool_call", "tool_call": CALL, "name": "look_up", "arguments": '{"number": '},
        {"type": "tool_call", "tool_call": CALL, "name": "look_up", "arguments": ""},
    ]

    calls = sent(service, {"role": "assistant", "content": parts})[0]["tool_calls"]

    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"invalid_arguments": '{"number": '}, {}]


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({"result": "Found it."}, "Found it."),
        ({"result": {"number": 1042}}, '{"number":1042}'),
        ({"result": 7}, "7"),
        ({"result": None}, "null"),
        ({"result": 2**70}, str(2**70)),
        (
            {"outcome": "failed", "result": None, "error": {"code": "timed_out", "message": "It took over 30 s."}},
            "The call failed (timed_out): It took over 30 s.",
        ),
        ({"outcome": "failed", "result": "No such order."}, "The call failed: No such order."),
        ({"outcome": "failed", "result": None}, "The call failed: no reason is known."),
        (
            {"outcome": "denied", "result": None, "error": {"message": "Too dear."}},
            "A person denied this call; it did not run. Too dear.",
        ),
        ({"outcome": "cancelled", "result": None}, "This call was cancelled."),
    ],
)
def test_a_result_goes_out_as_what_the_model_can_read(service: Service, fields: dict[str, Any], content: str) -> None:
    part = {"type": "tool_result", "tool_call": CALL, "outcome": "success", **fields}

    assert sent(service, {"role": "tool", "content": [part]}) == [
        {"role": "tool", "tool_call_id": CALL, "content": content}
    ]


def test_two_results_of_one_message_go_out_as_two(service: Service) -> None:
    parts = [
        {"type": "tool_result", "tool_call": "a", "outcome": "success", "result": 1},
        {"type": "tool_result", "tool_call": "b", "outcome": "success", "result": 2},
    ]

    assert [message["tool_call_id"] for message in sent(service, {"role": "tool", "content": parts})] == ["a", "b"]


def test_halves_of_surrogate_pairs_do_not_stop_a_message(service: Service) -> None:
    assert sent(service, {"role": "user", "content": [{"type": "text", "text": "a\ud83d"}]})[0]["content"] == "a\ufffd"


# --- how a provider is found ----------------------------------------------------------------------------------------


@pytest.fixture
def forgotten() -> Iterator[None]:
    forget_providers()
    yield
    forget_providers()


@pytest.mark.usefixtures("forgotten")
def test_a_models_name_finds_its_provider_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelServer(saying(Text("Hello."))) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)  # a service of one's own may want none
        provider, model = get_provider("openai:ft:gpt-5-mini:me")
        provider.warm()
        question = provider.render({"role": "user", "content": [{"type": "text", "text": "Well?"}]})

        assert text_of(list(provider.stream(ModelRequest(model, "", [question])))) == "Hello."
        assert (provider.name, model) == ("openai", "ft:gpt-5-mini:me")
        assert get_provider("openai:other")[0] is provider
        forget_providers()


@pytest.mark.parametrize("name", ["gpt-5-mini", "nobody:gpt", "openai:", ":m", ""])
def test_a_name_without_a_known_provider_says_which_there_are(name: str) -> None:
    with pytest.raises(UnknownProvider, match="'openai:'") as caught:
        get_provider(name)

    assert isinstance(caught.value, ValueError)


@pytest.mark.usefixtures("forgotten")
def test_a_host_can_register_a_provider_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.providers.port._factories", {})
    provider = OpenAIProvider(KEY, "http://127.0.0.1:9/v1")

    register_provider("mine", lambda: provider)

    assert get_provider("mine:m") == (provider, "m")
