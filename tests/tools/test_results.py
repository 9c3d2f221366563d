"""What is kept of a value, whatever it is: JSON that Postgres stores, or a refusal that says why."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import dataclass
from typing import Any

import pytest
from django.db import DatabaseError, OperationalError, connection
from hypothesis import given
from hypothesis import strategies as st

from threads import database
from tools import File
from tools.results import Unkept, cut, keep

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.text(st.sampled_from("a\0\ud800N"), max_size=3)
    | st.binary(max_size=10)
    | st.decimals()
    | st.builds(File, st.text(max_size=300), data=st.binary(max_size=10) | st.text(max_size=9)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4),
    max_leaves=10,
)


@given(ANYTHING)
def test_whatever_is_returned_is_kept_as_json_or_refused(value: Any) -> None:
    try:
        kept = keep(value)
    except Unkept:
        return
    assert json.loads(database.dumps(kept.result)) == kept.result
    assert "\\u0000" not in json.dumps([kept.result, kept.stored], allow_nan=False).replace("\\\\", "")
    assert [each["size"] for each in kept.stored or ()] == [len(each) for each in kept.contents]
    assert len({each["number"] for each in kept.stored or ()}) == len(kept.contents)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"rows": [{"price": math.nan}]}, "rows[0].price is nan, which is no number in JSON"),
        ([1, -math.inf], "[1] is -inf"),
        ({"a": {"b": "x\0"}}, "a.b is a text with a NUL character"),
        ({"x\0": 1}, "a key with a NUL"),
        ([2**64], "[0] is an integer of more than 64 bits"),
        ({"a": b"\xff"}, "Return bytes as a tools.File"),
        ((n for n in range(3)), "it is a generator"),
    ],
)
def test_a_refusal_says_what_and_where(value: Any, says: str) -> None:
    with pytest.raises(Unkept) as caught:
        keep(value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "value", [["x" * 1_000_000] * 1_000_000, {"a": ["y" * 1_000_000] * 11}], ids=["terabyte", "11 MB"]
)
def test_what_would_be_too_much_is_refused_before_it_is_written(value: Any) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(Unkept, match="too large"):
            keep(value)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content_type", "kept"),
    [
        ("../../etc/passwd", None, ("passwd", "application/octet-stream")),
        ("C:\\files\\chart.PNG", None, ("chart.PNG", "image/png")),
        ("a\r\nSet-Cookie: x.txt", "text/plain\r\nX: y", ("aSet-Cookie: x.txt", "application/octet-stream")),
        ("", "text/html; charset=utf-8", ("file", "text/html; charset=utf-8")),
        ("n" * 500, "image/svg+xml", ("n" * 200, "image/svg+xml")),
    ],
)
def test_a_files_name_and_type_are_taken_as_far_as_they_are_harmless(
    name: str, content_type: str | None, kept: tuple[str, str]
) -> None:
    file = File(name, content_type, b"x")
    assert (file.name, file.content_type) == kept


def test_what_is_no_data_is_refused_where_the_file_is_made() -> None:
    with pytest.raises(TypeError, match="bytes or text, not int"):
        File("x", data=3)  # type: ignore[arg-type]


def test_a_short_text_is_not_cut() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("abcd", 3).startswith("abc\n\n[Cut: this is the first 3 of 4 characters; 1 are missing.")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("statement", "error", "refused"),
    [
        ("SELECT repeat('x', 2000000000)", OperationalError, True),  # too large for Postgres, whenever it is sent
        (r"SELECT '\u0000'::jsonb", DatabaseError, True),
        ("SELECT pg_terminate_backend(pg_backend_pid())", OperationalError, False),  # an outage
    ],
    ids=["too large", "nul", "outage"],
)
def test_what_postgres_will_not_take_is_told_from_an_outage(
    statement: str, error: type[Exception], refused: bool
) -> None:
    with pytest.raises(error) as caught:
        database.rows_of(statement)
    assert database.refused(caught.value) is refused
    connection.close()


@dataclass
class Pair:
    left: Any
    right: Any


def test_few_objects_that_stand_for_very_many_are_refused_soon(settings: Any) -> None:
    settings.LONGHAUL = {**settings.LONGHAUL, "MAX_RESULT_BYTES": 1_000}
    value: Any = None
    for _ in range(100):
        value = Pair(value, value)
    with pytest.raises(Unkept, match="too large"):
        keep(value)
