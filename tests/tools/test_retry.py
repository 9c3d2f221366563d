"""A retry policy is a value: these tests need no clock, no database, no sleep."""

import dataclasses
import doctest
import pickle
import urllib.error
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import format_datetime
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tools.retry
from tools.exceptions import ApprovalRequired, InvalidArguments, ModelRetry, ToolFailed
from tools.retry import RetryPolicy

EVEN = RetryPolicy(attempts=5, initial_seconds=1, factor=2, max_seconds=60, jitter=False)


class Asked(Exception):
    def __init__(self, retry_after: Any) -> None:
        super().__init__()
        self.retry_after = retry_after


def test_the_series_in_the_docstring_is_true() -> None:
    assert doctest.testmod(tools.retry) == doctest.TestResults(failed=0, attempted=2)


def test_the_default_gives_two_waits_and_then_no_further_attempt() -> None:
    policy = RetryPolicy(jitter=False)
    assert [policy.delay(attempt) for attempt in (1, 2, 3)] == [timedelta(seconds=1), timedelta(seconds=2), None]


def test_one_attempt_is_never_followed_by_another() -> None:
    assert RetryPolicy(attempts=1).delay(1) is None


def test_an_attempt_past_the_last_gets_none_too() -> None:
    assert EVEN.delay(99) is None


def test_attempts_count_from_one() -> None:
    with pytest.raises(ValueError, match="counts from 1"):
        EVEN.delay(0)


@given(attempt=st.integers(1, 3000), factor=st.floats(1, 1e6), initial=st.floats(0, 60))
def test_no_wait_is_negative_or_above_the_cap(attempt: int, factor: float, initial: float) -> None:
    policy = RetryPolicy(attempts=5000, initial_seconds=initial, factor=factor, max_seconds=60)
    wait = policy.delay(attempt)
    assert wait is not None
    assert timedelta() <= wait <= timedelta(seconds=60)


def test_jitter_spreads_over_the_whole_wait() -> None:
    policy = RetryPolicy(attempts=5, initial_seconds=8, factor=1)
    waits = [wait.total_seconds() for _ in range(2000) if (wait := policy.delay(1)) is not None]
    # 2,000 even draws from 0..8: each of these fails by chance less often than once in 10**50 times.
    assert len(waits) == 2000
    assert min(waits) < 1 < 3 < sum(waits) / len(waits) < 5 < 7 < max(waits) <= 8


def test_what_is_not_in_retry_on_is_not_retried() -> None:
    policy = dataclasses.replace(EVEN, retry_on=(OSError,))
    assert policy.delay(1, ConnectionError()) == timedelta(seconds=1)
    assert policy.delay(1, ValueError()) is None


def test_give_up_on_wins_over_retry_on() -> None:
    policy = dataclasses.replace(EVEN, retry_on=(OSError,), give_up_on=(FileNotFoundError,))
    assert policy.delay(1, FileNotFoundError()) is None
    assert policy.delay(1, PermissionError()) == timedelta(seconds=1)


def test_by_default_an_exit_of_the_process_is_not_retried() -> None:
    assert EVEN.delay(1, SystemExit()) is None


def test_a_lost_worker_has_no_error_and_is_retried() -> None:
    assert dataclasses.replace(EVEN, retry_on=(OSError,)).delay(1) == timedelta(seconds=1)


@pytest.mark.parametrize("answer", [ModelRetry(), ToolFailed(), ApprovalRequired(), InvalidArguments()])
def test_an_answer_of_the_tool_is_not_an_accident(answer: Exception) -> None:
    assert EVEN.delay(1, answer) is None


@pytest.mark.parametrize("asked", [7, 7.0, timedelta(seconds=7)])
def test_retry_after_takes_the_place_of_the_backoff(asked: Any) -> None:
    jittered = RetryPolicy(attempts=5)
    assert jittered.delay(1, Asked(asked)) == timedelta(seconds=7)


@pytest.mark.parametrize("asked", [3600, 1e300, timedelta(days=400)])
def test_retry_after_is_capped(asked: Any) -> None:
    assert EVEN.delay(1, Asked(asked)) == timedelta(seconds=60)


def test_retry_after_gives_no_attempt_that_there_was_not() -> None:
    assert EVEN.delay(5, Asked(1)) is None
    assert dataclasses.replace(EVEN, give_up_on=(Asked,)).delay(1, Asked(1)) is None


@pytest.mark.parametrize("nonsense", ["7", -1, float("nan"), float("inf"), None, True, timedelta(-1), object()])
def test_a_retry_after_that_says_nothing_usable_is_passed_over(nonsense: Any) -> None:
    assert EVEN.delay(3, Asked(nonsense)) == timedelta(seconds=4)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"attempts": 0}, "attempts counts the first try"),
        ({"attempts": 2.5}, "attempts counts the first try"),
        ({"attempts": True}, "attempts counts the first try"),
        ({"initial_seconds": -1}, "initial_seconds must be"),
        ({"initial_seconds": float("nan")}, "initial_seconds must be"),
        ({"initial_seconds": "1"}, "initial_seconds must be"),
        ({"factor": 0.5}, "factor must be"),
        ({"factor": float("inf")}, "factor must be"),
        ({"max_seconds": timedelta(seconds=5)}, "max_seconds must be"),
        ({"max_seconds": 0.5}, "cannot be below initial_seconds"),
        ({"max_seconds": 1e300}, "longer than any timedelta"),
        ({"jitter": 1}, "jitter is True or False"),
        ({"retry_on": OSError}, r"retry_on must be a tuple .* like \(OSError,\)"),
        ({"retry_on": ("OSError",)}, "retry_on must be a tuple"),
        ({"give_up_on": [OSError]}, "give_up_on must be a tuple"),
    ],
)
def test_a_wrong_policy_is_refused_where_it_is_written(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RetryPolicy(**wrong)


def test_a_policy_is_a_value() -> None:
    assert RetryPolicy(attempts=4) == RetryPolicy(attempts=4)
    assert len({RetryPolicy(), RetryPolicy()}) == 1
    assert pickle.loads(pickle.dumps(EVEN)) == EVEN
    with pytest.raises(dataclasses.FrozenInstanceError):
        EVEN.attempts = 9  # type: ignore[misc]


class Response:
    def __init__(self, headers: Any) -> None:
        self.headers = headers


class Refused(Exception):
    """As the errors of httpx, requests and openai are."""

    def __init__(self, **headers: str) -> None:
        super().__init__()
        self.response = Response({name.replace("_", "-"): value for name, value in headers.items()})


NOON = "Sun, 22 Nov 2026 12:00:00 GMT"
LATER = "Sun, 22 Nov 2026 12:00:07 GMT"


@pytest.mark.parametrize(
    "headers",
    [{"Retry_After": "7"}, {"retry_after": "7.0"}, {"RETRY_AFTER": " 7 "}, {"Retry_After": LATER, "Date": NOON}],
)
def test_a_response_says_when_to_come_again(headers: dict[str, str]) -> None:
    assert EVEN.delay(1, Refused(**headers)) == timedelta(seconds=7)


def test_the_error_of_a_real_client_says_when_to_come_again() -> None:
    request = httpx2.Request("GET", "https://example.org")
    response = httpx2.Response(429, headers={"Retry-After": "7"}, request=request)
    with pytest.raises(httpx2.HTTPStatusError) as raised:
        response.raise_for_status()
    assert EVEN.delay(1, raised.value) == timedelta(seconds=7)
    old = urllib.error.HTTPError("https://example.org", 503, "Busy", Message(), None)
    old.headers["Retry-After"] = "7"
    assert EVEN.delay(1, old) == timedelta(seconds=7)


def test_a_date_without_the_responses_own_counts_from_now() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    wait = EVEN.delay(1, Refused(Retry_After=soon))
    assert wait is not None
    assert timedelta(seconds=20) < wait <= timedelta(seconds=30)


def test_a_date_that_has_passed_is_now() -> None:
    assert EVEN.delay(3, Refused(Retry_After=NOON, Date=LATER)) == timedelta(0)


def test_what_an_error_was_raised_from_says_it_too() -> None:
    error = OSError()
    error.__cause__ = Refused(Retry_After="7")
    assert EVEN.delay(1, error) == timedelta(seconds=7)


class Sly(Exception):
    @property
    def response(self) -> Any:
        raise RuntimeError("streamed")


@pytest.mark.parametrize(
    "error",
    [Refused(Retry_After="soon"), Refused(Retry_After="-1"), Refused(Retry_After="nan"), Refused(), Refused(Retry_After=""), Sly()],
    ids=str,
)  # fmt: skip
def test_a_response_that_says_nothing_usable_is_passed_over(error: Exception) -> None:
    assert EVEN.delay(3, error) == timedelta(seconds=4)
