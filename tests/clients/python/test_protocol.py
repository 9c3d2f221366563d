"""The client's protocol without a connection: frames at every cut, cursors, waits, the fold."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Mapping
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longhaul_client import (
    ApiError,
    AsyncLonghaul,
    Backoff,
    BadRequest,
    Conflict,
    ConnectionLost,
    Event,
    Forbidden,
    Longhaul,
    LonghaulError,
    NotFound,
    ServerError,
    StreamBroken,
    Transcript,
    Unauthorized,
    aio,
    calls,
    sync,
)
from longhaul_client.answers import event, messages
from longhaul_client.backoff import retry_after
from longhaul_client.following import Following, place
from longhaul_client.frames import Frame, Parser, TooLong

RUN, OTHER = "01a1-run", "01a2-run"
STREAM = {"content-type": "text/event-stream", "x-run-id": RUN}
SURE = Backoff(chance=lambda: 1.0)  # the longest wait each time


def frame(seq: int, type: str = "data", run: str = RUN, *, prefix: str = "", **fields: Any) -> bytes:
    data = json.dumps(
        {"seq": seq, "type": type, "run": run, "at": "2026-11-21T19:18:17Z", **fields}, ensure_ascii=False
    )
    return f"id: {prefix}{seq}\nevent: {type}\ndata: {data}\n\n".encode()


def log(count: int = 5) -> list[bytes]:
    words = ["Grüße, ", "世界", " 🚢", " and\\n", "more"]
    said = [frame(n, "text.delta", message="m", text=words[n % 5]) for n in range(2, count)]
    return [frame(1, "message.created", message="m", role="assistant"), *said, frame(count, "run.completed")]


OPENING = b": longhaul\nretry: 1000\n\n"


# --- frames ---------------------------------------------------------------------------------------------------------


def test_frames_are_the_same_wherever_the_bytes_are_cut() -> None:
    whole = OPENING + b"".join(log()) + b": ping\n\n"
    once = Parser().feed(whole)
    assert [each.id for each in once] == ["", "1", "2", "3", "4", "5", ""]
    assert once[-1].comment == "ping"
    for ends in (b"\n", b"\r\n", b"\r"):
        told = whole.replace(b"\n", ends)
        for cut in range(len(told) + 1):
            parser = Parser()
            assert parser.feed(told[:cut]) + parser.feed(told[cut:]) == once


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_frames_are_the_same_in_any_pieces(data: st.DataObject) -> None:
    whole = b"\xef\xbb\xbf" + OPENING + b"".join(log(8))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=40)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    parser = Parser()
    assert [found for piece in pieces for found in parser.feed(piece)] == Parser().feed(whole)
    assert len(Parser().feed(whole)) == 9


def test_half_a_frame_is_none() -> None:
    whole = frame(1)
    for cut in range(len(whole)):
        assert Parser().feed(whole[:cut]) == []


def test_what_the_standard_says_of_fields() -> None:
    told = b"data:a\ndata:  b\nid: 7\nevent:x\nunknown: y\ndata\n\n\n\nid: 8\n\ndata: c\nid: a\0b\n\n"
    assert Parser().feed(told) == [Frame("x", b"a\n b\n", "7"), Frame("message", b"c", "")]


def test_a_frame_without_an_end_is_refused_and_a_long_one_is_not() -> None:
    long = b"data: " + b"x" * 1000
    parser = Parser(most_bytes=2000)
    assert parser.feed(long + b"\n\n" + long) == [Frame("message", b"x" * 1000, "")]
    with pytest.raises(TooLong):
        for _ in range(3):
            parser.feed(b"x" * 500)


# --- following ------------------------------------------------------------------------------------------------------


def opened(following: Following, status: int = 200, headers: Mapping[str, str] = STREAM) -> Following:
    assert following.answered(status, headers)
    return following


def seqs(found: list[Event]) -> list[int | None]:
    return [each.seq for each in found]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_cuts_and_any_overlap_give_each_event_once(data: st.DataObject) -> None:
    """The server sends again from before the cursor, too, as one behind a proxy that drops the cursor would."""
    frames = log(12)
    following = Following(run=RUN)
    found: list[Event] = []
    for cut_at in [*data.draw(st.lists(st.integers(0, 600), max_size=8)), 100_000]:
        back = data.draw(st.integers(0, following.seq))
        opened(following)
        found += following.take((OPENING + b"".join(frames[following.seq - back :]))[:cut_at])
        if following.over:
            break
        following.lost(None)
    assert following.over
    assert seqs(found) == list(range(1, 13))
    assert [each.id for each in found] == [str(n) for n in range(1, 13)]


def test_what_is_asked_says_where_it_stands() -> None:
    following = Following(run=RUN, seq=3)
    ask = following.ask()
    assert (ask.method, ask.path, ask.params) == ("GET", f"/api/runs/{RUN}/stream", (("starting_after", "3"),))
    assert ask.headers["Last-Event-ID"] == "3"
    opened(following).take(frame(4))
    assert following.ask().headers["Last-Event-ID"] == "4"
    assert "Last-Event-ID" not in Following(run=RUN).ask().headers
    thread = Following(thread="t", run=RUN, seq=3)
    assert thread.ask().params == (("after", f"{RUN}:3"),)
    assert Following(thread="t").ask().params == ()


def test_a_run_that_is_started_is_asked_for_with_one_key_until_its_id_is_known() -> None:
    following = Following(start=calls.start("a", "hi", None, {}, stream=True), backoff=SURE)
    first = following.ask()
    assert first.method == "POST"
    assert json.loads(first.content or b"") == {"agent": "a", "input": "hi", "stream": True}
    following.lost(OSError())
    assert following.ask() == first
    assert first.headers["Idempotency-Key"]
    opened(following)
    assert following.ask().path == f"/api/runs/{RUN}/stream"
    following.lost(None)
    assert following.ask().method == "GET"
    other = Following(start=calls.start("a", "hi", None, {}, stream=True)).ask()
    assert other.headers["Idempotency-Key"] != first.headers["Idempotency-Key"]


def test_the_first_of_two_that_has_failed_is_no_conflict_with_a_key_of_our_own() -> None:
    body = json.dumps(
        {"type": "client_error", "errors": [{"code": "idempotency_conflict", "detail": "Again."}]}
    ).encode()
    own = Following(start=calls.start("a", "hi", None, {}, stream=True))
    assert not own.answered(409, {})
    assert isinstance(own.refused(409, {}, body), ApiError)
    theirs = Following(start=calls.start("a", "hi", None, {"idempotency_key": "k"}, stream=True))
    assert not theirs.answered(409, {})
    with pytest.raises(ApiError, match="idempotency_conflict"):
        theirs.refused(409, {}, body)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, ApiError),
        (400, BadRequest),
        (401, Unauthorized),
        (403, Forbidden),
        (404, NotFound),
        (410, ApiError),
        (501, ServerError),
    ],
)
def test_a_refusal_ends_it_for_good(status: int, kind: type[ApiError]) -> None:
    following = Following(run=RUN, seq=9)
    body = {
        "type": "x",
        "errors": [{"code": "invalid", "detail": "The run's last event so far is 7.", "attr": "Last-Event-ID"}],
    }
    assert not following.answered(status, {})
    with pytest.raises(kind) as caught:
        following.refused(status, {}, json.dumps(body).encode())
    error = caught.value
    assert (error.status, error.code, error.attr) == (status, "invalid", "Last-Event-ID")
    assert "The run's last event so far is 7." in str(error)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 522])
def test_a_server_that_cannot_now_is_asked_again(status: int) -> None:
    following = Following(run=RUN, backoff=SURE)
    assert not following.answered(status, {})
    error = following.refused(status, {"retry-after": "3"}, b"<html>Bad gateway</html>")
    assert following.lost(error) == 3.25
    assert following.lost(None) == 0.5, "what was asked once counts once"


def test_waits_grow_and_begin_anew_with_what_comes() -> None:
    following = Following(run=RUN, backoff=SURE)
    assert [following.lost(None) for _ in range(8)] == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    opened(following).take(OPENING)
    assert following.lost(None) == 8.0, "a connection that only opens is no progress"
    opened(following).take(b": ping\n\n")
    assert following.lost(None) == 0.25
    following.lost(None)
    opened(following).take(b"event: ping\ndata: {}\n\n")
    assert following.lost(None) == 0.25
    following.lost(None)
    opened(following).take(frame(1))
    assert following.lost(None) == 0.25


def test_jitter_is_full() -> None:
    waits = [Backoff(chance=random.Random(1).random).delay(5) for _ in range(3)]
    assert all(0.0 < each < 4.0 for each in waits)
    assert Backoff(chance=lambda: 0.0).delay(9) == 0.0
    assert Backoff(chance=lambda: 0.0).delay(9, 2.0) == 2.0


def test_it_gives_up_after_so_long_without_anything() -> None:
    now = [0.0]
    following = Following(run=RUN, backoff=SURE, give_up_after=60.0, clock=lambda: now[0])
    following.lost(OSError("secret"))
    now[0] = 1000.0
    opened(following).take(frame(1))
    following.lost(None)  # an hour with a stream that stood is none without
    now[0] = 1055.0
    following.lost(None)
    now[0] = 1061.0
    with pytest.raises(ConnectionLost, match="run 01a1-run after 1 could not be had for 61 s: OSError") as caught:
        following.lost(OSError("secret"))
    assert "secret" not in str(caught.value)
    forever = Following(run=RUN, give_up_after=None, clock=lambda: now[0])
    for _ in range(50):
        now[0] += 1000
        forever.lost(None)


def test_retry_after_may_be_a_date() -> None:
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    for far in ("Wed, 21 Oct 2999 07:28:00 GMT", "999999", "9" * 400):
        assert retry_after({"retry-after": far}) == 3600.0, "longer than that nobody sleeps"
    assert retry_after({"retry-after": "soon"}) == retry_after({}) == 0.0


def test_a_stream_ends_with_its_run_and_with_204() -> None:
    following = opened(Following(run=RUN))
    assert seqs(following.take(frame(1, "run.failed") + frame(2))) == [1]
    assert following.over
    following = Following(run=RUN, seq=1)
    assert not following.answered(204, {})
    assert following.over


def test_a_folded_event_that_is_known_is_passed_over_and_one_that_goes_on_is_not_a_hole() -> None:
    following = opened(Following(run=RUN, seq=5))
    told = frame(5, "text.delta", from_seq=2, text="x") + frame(9, "text.delta", from_seq=6, text="y") + frame(10)
    assert seqs(following.take(told)) == [9, 10]
    assert following.fault is None


def test_a_range_that_begins_before_the_cursor_is_asked_for_anew() -> None:
    """The server cuts it there. Taken whole, it would show a text twice."""
    following = opened(Following(run=RUN, seq=57, backoff=SURE))
    assert seqs(following.take(frame(90, "text.delta", from_seq=50, text="x"))) == []
    assert isinstance(following.fault, StreamBroken)
    following.lost(following.fault)
    assert following.ask().headers["Last-Event-ID"] == "57"
    assert seqs(opened(following).take(frame(90, "text.delta", from_seq=58, text="y"))) == [90]


def test_a_gap_is_told_and_what_follows_it_is_no_hole() -> None:
    gap = b'event: resume_gap\ndata: {"type":"resume_gap","from":1,"to":40}\n\n'
    following = opened(Following(run=RUN))
    found = following.take(gap + frame(41))
    assert [(each.type, each.seq, each.id) for each in found] == [("resume_gap", None, "40"), ("data", 41, "41")]
    thread = opened(Following(thread="t", run=RUN, seq=2))
    found = thread.take(gap + frame(41, run=OTHER, prefix=f"{OTHER}:"))
    assert [(each.type, each.id) for each in found] == [("resume_gap", f"{RUN}:2"), ("data", f"{OTHER}:41")]
    assert thread.fault is None
    assert seqs(following.take(frame(43))) == []
    assert following.fault is not None, "but a hole behind what follows it is"


def test_events_that_are_missing_are_asked_for_again_and_then_said() -> None:
    following = opened(Following(run=RUN, backoff=SURE))
    assert seqs(following.take(frame(1) + frame(3))) == [1]
    for _ in range(2):
        assert following.fault is not None
        following.lost(following.fault)
        assert following.ask().headers["Last-Event-ID"] == "1"
        opened(following).take(frame(3))
    with pytest.raises(StreamBroken, match="goes on with event 3 after 1"):
        following.lost(following.fault)


@pytest.mark.parametrize(
    "nonsense", [b"data: {\n\n", b'data: {"type": "data"}\n\n', b"data: []\n\n", b"data: \xff\n\n"]
)
def test_what_is_no_event_is_a_connection_lost(nonsense: bytes) -> None:
    following = opened(Following(run=RUN))
    assert seqs(following.take(frame(1) + nonsense + frame(2))) == [1]
    assert following.fault is not None
    assert following.lost(following.fault) >= 0
    assert seqs(opened(following).take(frame(2))) == [2]
    assert following.fault is None


def test_a_page_of_something_in_between_is_no_stream() -> None:
    following = Following(run=RUN)
    for _ in range(2):
        assert not following.answered(200, {"content-type": "text/html"})
        following.lost(following.refused(200, {}, b"<html>"))
    assert not following.answered(200, {"content-type": "text/html"})
    with pytest.raises(StreamBroken, match="no event stream"):
        following.lost(following.refused(200, {}, b"<html>"))


def test_a_thread_goes_from_run_to_run_with_one_cursor() -> None:
    following = opened(Following(thread="t"))
    first = frame(1, prefix=f"{RUN}:") + frame(2, "run.completed", prefix=f"{RUN}:")
    # A payload may name a run of its own: the frame's id says whose event it is.
    second = frame(1, "tool_call.awaiting_child", "a-child", prefix=f"{OTHER}:")
    found = following.take(first + second + second)
    assert [each.id for each in found] == [f"{RUN}:1", f"{RUN}:2", f"{OTHER}:1"]
    assert [each.run for each in found] == [RUN, RUN, OTHER]
    assert not following.over
    assert following.ask().params == (("after", f"{OTHER}:1"),)


def test_cursors() -> None:
    assert place(None) == place("") == place(0) == (None, 0)
    assert place(7) == place("7") == (None, 7)
    assert place(f"{RUN}:7") == (RUN, 7)
    assert place(event({"type": "data", "seq": 3}, RUN, f"{RUN}:3")) == (RUN, 3)
    with pytest.raises(ValueError, match="is no cursor"):
        place("-1")


# --- the fold -------------------------------------------------------------------------------------------------------


def tell(*said: tuple[str, dict[str, Any]], run: str = RUN, first: int = 1) -> list[Event]:
    made = []
    for seq, (type, fields) in enumerate(said, first):
        data = {"seq": seq, "type": type, "run": run, "at": "2026-11-21T19:18:17Z", **fields}
        made.append(event(data, run, str(seq)))
    return made


def delta(text: str, kind: str = "text") -> tuple[str, dict[str, Any]]:
    return f"{kind}.delta", {"message": "m", "text": text}


CREATED: tuple[str, dict[str, Any]] = ("message.created", {"message": "m", "role": "assistant", "step": 1})
CALL = {"tool_call": "c", "name": "look", "message": "m"}


def test_text_grows_and_is_what_was_committed_in_the_end() -> None:
    made = Transcript()
    for each in tell(CREATED, delta("Let me", "reasoning"), delta("Or"), delta("der")):
        assert made.take(each)
        assert not made.take(each), "twice is once"
    [message] = made.messages
    assert (message.status, message.text, message.reasoning) == ("pending", "Order", "Let me")
    assert made.text == "Order"
    parts = [
        {"type": "text", "text": "Order 1042"},
        {"type": "tool_call", "tool_call": "c", "name": "look", "arguments": {}},
    ]
    made.take_all(tell(("message.completed", {"message": "m", "role": "assistant", "content": parts}), first=5))
    assert (message.status, message.content) == ("completed", parts)
    assert made.tool_calls["c"].status == "requested"
    made.take_all(
        tell(("message.completed", {"message": "m", "role": "assistant", "content": parts, "partial": True}), first=6)
    )
    assert message.status == "partial"


def test_a_discarded_message_takes_its_calls_along() -> None:
    made = Transcript().take_all(
        tell(CREATED, delta("Half a"), ("tool_call.created", CALL), ("message.discarded", {"message": "m"}))
    )
    assert (made.messages, made.tool_calls, made.text) == ([], {}, "")


def test_what_the_thread_does_not_show_is_told_so_once() -> None:
    made = Transcript().take_all(
        tell(
            ("message.completed", {"message": "u", "role": "user", "content": [], "shown": False}),
            ("message.created", {"message": "m", "role": "assistant", "step": 1, "shown": False}),
            delta("Hush."),
            (
                "message.completed",
                {"message": "m", "role": "assistant", "content": [{"type": "text", "text": "Hush."}]},
            ),
            ("message.completed", {"message": "v", "role": "user", "content": []}),
        )
    )
    assert {each.id: each.shown for each in made.messages} == {"u": False, "m": False, "v": True}


def test_a_call_is_as_its_last_event_says() -> None:
    made = Transcript()
    told: list[tuple[tuple[str, dict[str, Any]], str]] = [
        (("tool_call.created", {**CALL, "arguments": {"n": 1}}), "requested"),
        (("tool_call.started", {**CALL, "attempt": 1}), "running"),
        (("tool_call.progress", {**CALL, "fraction": 0.5, "note": "half"}), "running"),
        (("tool_call.retrying", {**CALL, "attempt": 1, "error": {"code": "x"}}), "retrying"),
        (("tool_call.something_new", CALL), "retrying"),
        (("tool_call.settled", {**CALL, "outcome": "success", "result": 7, "error": None}), "settled"),
    ]
    for seq, (said, status) in enumerate(told, 1):
        made.take_all(tell(said, first=seq))
        assert made.tool_calls["c"].status == status
    call = made.tool_calls["c"]
    assert (call.arguments, call.fraction, call.note, call.outcome, call.result) == (
        {"n": 1},
        0.5,
        "half",
        "success",
        7,
    )


def test_a_call_holds_nothing_of_the_attempt_before() -> None:
    made = Transcript()
    told: list[tuple[str, dict[str, Any]]] = [
        ("tool_call.created", {**CALL, "arguments": {}}),
        ("tool_call.started", {**CALL, "attempt": 1}),
        ("tool_call.progress", {**CALL, "fraction": 0.5, "note": "half"}),
        ("tool_call.unknown", {**CALL, "attempt": 1}),
        ("tool_call.retrying", {**CALL, "attempt": 2, "error": {"code": "x"}, "by": "ann"}),
    ]
    for seq, said in enumerate(told, 1):
        made.take_all(tell(said, first=seq))
    call = made.tool_calls["c"]
    assert (call.status, call.error, call.by) == ("retrying", {"code": "x"}, "ann")
    made.take_all(tell(("tool_call.settled", {**CALL, "outcome": "cancelled", "result": None}), first=6))
    assert (call.status, call.outcome, call.error, call.by) == ("settled", "cancelled", None, None)
    made.take_all(tell(("tool_call.started", {**CALL, "attempt": 2}), first=7))
    assert (call.attempt, call.fraction, call.note) == (2, None, None)


def test_calls_that_a_cancelled_message_was_about_to_make_come_to_nothing() -> None:
    about: tuple[str, dict[str, Any]] = ("tool_call.arguments_delta", {**CALL, "text": '{"n"'})
    made = Transcript().take_all(tell(CREATED, delta("Let me"), about))
    assert list(made.tool_calls) == ["c"]
    cut = {"message": "m", "role": "assistant", "content": [{"type": "text", "text": "Let me"}], "partial": True}
    made.take_all(tell(("message.completed", cut), first=4))
    assert (made.text, made.tool_calls) == ("Let me", {})


def test_how_the_run_stands() -> None:
    made = Transcript()
    assert not made.is_running
    for type, status in [
        ("run.queued", "queued"), ("run.started", "running"), ("run.waiting", "waiting"), ("leg.started", "running"),
        ("a.new_type", "running"),
    ]:  # fmt: skip
        made.take_all(tell((type, {}), first=made.seq + 1))
        assert made.status == status
        assert made.is_running
    end: tuple[str, dict[str, Any]] = (
        "run.failed",
        {"stop_reason": "error", "output": None, "error": {"code": "x"}, "usage": {"cost": "1"}},
    )
    made.take_all(tell(end, first=made.seq + 1))
    assert (made.status, made.stop_reason, made.error, made.is_running) == ("failed", "error", {"code": "x"}, False)
    made.take_all(tell(("run.queued", {"superseded": "m"}), run=OTHER))
    assert (made.run, made.status, made.error, made.cursor) == (OTHER, "queued", None, f"{OTHER}:1")


def test_a_retry_takes_away_what_it_does_again() -> None:
    made = Transcript().take_all(tell(CREATED, delta("No.")))
    made.take_all(tell(("run.queued", {"superseded": "m"}), run=OTHER))
    assert made.messages == []


def snapshot(*rows: dict[str, Any], seq: int = 3) -> Any:
    usual = {
        "thread": "t",
        "run": RUN,
        "step": 1,
        "metadata": {},
        "client_id": None,
        "created_at": "2026-11-21T19:18:17Z",
    }
    return messages({"results": [{**usual, **row} for row in rows], "next": None, "cursor": {"run": RUN, "seq": seq}})


def test_a_snapshot_and_what_follows_it_make_each_character_once() -> None:
    page = snapshot({"id": "m", "role": "assistant", "status": "pending", "content": [{"type": "text", "text": "Or"}]})
    made = Transcript(page)
    made.take_all(tell(delta("O"), delta("r"), delta("der"), first=2))
    assert made.text == "Order"
    assert page.results[0].text == "Or", "the snapshot stays what it was"
    assert page.cursor == f"{RUN}:3"


def test_a_message_that_waited_gets_its_place_behind_what_was_said_meanwhile() -> None:
    page = snapshot(
        {"id": "w", "role": "user", "status": "waiting", "content": [{"type": "text", "text": "And?"}]},
        {"id": "a", "role": "user", "status": "completed", "content": []},
    )
    made = Transcript(page)
    assert [each.id for each in made.messages] == ["a", "w"]
    made.take_all(tell(CREATED, first=4))
    assert [each.id for each in made.messages] == ["a", "m", "w"]
    made.take_all(tell(("message.completed", {"message": "w", "role": "user", "content": []}), first=5))
    assert [(each.id, each.status) for each in made.messages] == [
        ("a", "completed"),
        ("m", "pending"),
        ("w", "completed"),
    ]


def test_a_stream_from_the_middle_shows_what_it_can() -> None:
    made = Transcript().take_all(tell(delta("der"), first=7))
    assert made.text == "der"
    assert made.seq == 7


def test_what_a_snapshot_lacks_its_thread_does_not_show() -> None:
    """A run with `save="none"` was speaking when the thread was loaded: its message's beginning told that it is not shown."""
    said = {"id": "u", "role": "user", "status": "completed", "content": []}
    whole = {"message": "m", "role": "assistant", "step": 1, "content": [{"type": "text", "text": "Hush."}]}
    new = ("message.completed", {"message": "v", "role": "user", "content": []})
    for page in (snapshot(said), snapshot()):
        for events in ([delta("Hu"), ("message.completed", whole), new], [("message.completed", whole), new]):
            made = Transcript(page).take_all(tell(*events, first=4))
            assert {each.id: each.shown for each in made.messages if each.id != "u"} == {"m": False, "v": True}
    # Nothing is known of what is not at the end of a page, nor without one.
    for made in (Transcript(), Transcript(snapshot({**said, "status": "waiting"}))):
        made.take_all(tell(delta("He"), first=4))
        assert made.messages[0].shown


# --- calls ----------------------------------------------------------------------------------------------------------


class Answers:
    """A server that gives these answers, one after another. An exception is a connection that was lost."""

    def __init__(self, *answers: httpx2.Response | Exception) -> None:
        self.left = list(answers)
        self.asked: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request)
        answer = self.left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self) -> Longhaul:
        http = httpx2.Client(transport=httpx2.MockTransport(self))
        return Longhaul("http://x", http=http, backoff=Backoff(chance=lambda: 0.0), retries=2, timeout=3.0, stall=7.0)


def refused(status: int, code: str = "x") -> httpx2.Response:
    return httpx2.Response(status, json={"type": "x", "errors": [{"code": code, "detail": "No.", "attr": None}]})


def test_what_an_answer_that_was_lost_has_deleted_is_deleted() -> None:
    Answers(httpx2.ReadError("cut"), refused(404)).client().threads.delete("t")
    with pytest.raises(NotFound):
        Answers(refused(404)).client().threads.delete("t")


def test_a_conflict_of_our_own_key_is_asked_again_and_of_theirs_is_told() -> None:
    conflict = "idempotency_conflict"
    own = Answers(refused(409, conflict), refused(409, conflict), httpx2.Response(201, json={"id": "t"}))
    assert own.client().threads.create().id == "t"
    assert len({each.headers["Idempotency-Key"] for each in own.asked}) == 1
    theirs = Answers(refused(409, conflict))
    with pytest.raises(Conflict, match=conflict):
        theirs.client().threads.create(idempotency_key="k")
    assert theirs.asked[0].headers["Idempotency-Key"] == "k"


def test_how_often_and_how_long() -> None:
    for answers in ([httpx2.ReadError("cut")], [refused(503)]):
        with pytest.raises((ConnectionLost, ServerError)):
            Answers(*answers).client().ready()  # what is not well is told, not asked again
    enough = Answers(*[refused(502)] * 4)
    with pytest.raises(ServerError):
        enough.client().runs.get("r")
    assert len(enough.asked) == 3
    long = Answers(*[httpx2.Response(200, json={"id": "r", "status": "queued"})] * 3)
    client = long.client()
    client.runs.get("r")
    client._do(calls.wait_for_run("r", 30.0, "finished"))
    assert [each.extensions["timeout"]["read"] for each in long.asked] == [3.0, 33.0]
    stream = client._settings.stream(client._http, Following(run="r").ask())
    assert (stream.extensions["timeout"]["connect"], stream.extensions["timeout"]["read"]) == (3.0, 7.0)
    cancelled = Answers(httpx2.ReadError("cut"), httpx2.Response(200, json={"id": "r", "status": "cancelled"}))
    cancelled.client().runs.cancel("r")
    assert ["Idempotency-Key" in each.headers for each in cancelled.asked] == [False, False]


def test_a_wait_ends_with_its_time() -> None:
    waiting = calls.Waiting("r", 0.0, "finished")
    assert waiting.next() is not None, "it is asked once in any case"
    assert waiting.next() is None
    forever = calls.Waiting("r", None, "finished")
    for _ in range(3):
        assert forever.next() is not None


# --- the two clients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Longhaul", "Stream", "Conversation", "Runs", "Threads", "MessagesOf", "ToolCalls"])
def test_both_clients_have_the_same_methods_with_the_same_arguments(name: str) -> None:
    def shape(kind: Any) -> dict[str, list[str]]:
        usual = {"__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__"}
        found = {usual.get(name, name): each for name, each in vars(kind).items() if callable(each)}
        return {name: [str(each) for each in inspect.signature(each).parameters] for name, each in found.items()}

    assert shape(getattr(sync, name)) == shape(getattr(aio, f"Async{name}"))


def test_a_key_is_in_no_repr_and_in_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGHAUL_API_KEY", "lh_secret")
    with Longhaul("https://ann:lh_secret@agents.example.com/under/") as client:
        told = [repr(client), repr(client._settings), repr(vars(client._settings.auth) and client._settings.auth)]
        assert "secret" not in "".join(told)
        assert repr(client) == "Longhaul('https://agents.example.com/under')"
        request = client._settings.request(client._http, calls.get_run("x/../y"))
        assert str(request.url).endswith("agents.example.com/under/api/runs/x%2F..%2Fy")
    assert "secret" not in repr(AsyncLonghaul("http://x", api_key="lh_secret"))


def test_a_key_that_no_header_may_have_is_refused_and_not_said() -> None:
    for wrong in ("lh_secret\nlh_secret", "lh_secret\u00e9", "lh_secret\0"):
        with pytest.raises(LonghaulError) as caught:
            Longhaul("http://x", api_key=wrong)
        assert "secret" not in str(caught.value)
    with Longhaul("http://x", api_key="lh_secret\n") as client:
        request = next(client._settings.auth.auth_flow(client._settings.request(client._http, calls.get_run("x"))))  # type: ignore[union-attr]
        assert request.headers["Authorization"] == "Bearer lh_secret", "as a file holds it"


def test_an_address_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGHAUL_URL", raising=False)
    for wrong in (None, "agents.example.com"):
        with pytest.raises(LonghaulError, match="base_url"):
            Longhaul(wrong)
