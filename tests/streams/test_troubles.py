"""What befalls a stream that stands: a log that cannot be read, a Postgres that is away, a policy that hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.db import InterfaceError, connection

from runs.agents import Agent
from runs.models import Run
from runs.streams import broadcast, log, outage, questions
from runs.streams.app import OPENING, Application
from runs.streams.questions import Questions
from tests.http.conftest import Api
from tests.streams.inside import ask
from tests.streams.test_app import begun, cancel, record
from threads import clock
from threads.access import Policy
from threads.models import ApiKey

pytestmark = pytest.mark.django_db(transaction=True)

BACKENDS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'longhaul %'"


# --- Postgres -------------------------------------------------------------------------------------------------------


async def test_a_log_that_cannot_be_read_ends_its_streams_and_says_why(
    application: Application, api: Api, live: Run, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    answer, told = await begun(application, api, live)
    monkeypatch.setattr(log, "_LIVE", log._LIVE.replace("e.seq", "e.sequel"))
    await written_until_it_ends(live, told)
    assert answer.ended
    said = next(each for each in caplog.records if "cannot be read" in each.message)
    assert isinstance(said.exc_info[1], psycopg.errors.UndefinedColumn)


async def written_until_it_ends(run: Run, told: Any) -> None:
    """A round that was on its way may have read one event still."""

    async def drain() -> None:
        async for _ in told:
            pass

    rest = asyncio.create_task(drain())
    async with asyncio.timeout(20):
        while not rest.done():
            await record(run, "one")
            await asyncio.wait([rest], timeout=0.01)


@pytest.mark.slow
async def test_history_that_cannot_be_read_ends_its_streams(
    application: Application, api: Api, live: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_PAGES", "SELECT * FROM longhaul_nowhere WHERE %s::uuid[] IS NULL OR %s::bigint[] IS NULL"
                        " OR %s::int[] IS NULL OR %s::text[] IS NULL")  # fmt: skip
    answers = [await ask(application, "GET", f"/api/runs/{live.pk}/stream", api.key) for _ in range(5)]
    assert [await each.whole() for each in answers] == [OPENING] * 5


@pytest.mark.slow
async def test_one_run_that_cannot_be_read_ends_nobody_elses_stream(
    application: Application, api: Api, helper: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [await sync_to_async(helper.start)("Where?", owner=api.user) for _ in range(5)]
    answers = [await begun(application, api, run) for run in runs]
    now = broadcast.here()
    async with asyncio.timeout(20):
        while not all(run.pk in now.tails and now.tails[run.pk].joined for run in runs):
            await asyncio.sleep(0.01)  # between looks at a condition
    bad = runs[3]
    broken = f"SELECT 1 / (w.run <> '{bad.pk}')::int, w.n::int - 1"
    monkeypatch.setattr(log, "_LIVE", log._LIVE.replace("SELECT w.n::int - 1", broken, 1))
    read = log.Log._ask

    async def asks(self: log.Log, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        rows = await read(self, statement, *parameters)
        return [row[1:] for row in rows] if statement == log._LIVE else rows

    monkeypatch.setattr(log.Log, "_ask", asks)
    for run in runs:
        await record(run, "one")
    for run in runs:
        now._make_due(run.pk)  # all in one round
    await written_until_it_ends(bad, answers[3][1])
    for run, (_, told) in zip(runs, answers, strict=True):
        if run is not bad:
            assert (await anext(told)).data["data"] == "one"


@pytest.mark.slow
async def test_connections_that_are_lost_end_nothing(
    application: Application, api: Api, live: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "_PAUSE_SECONDS", 0.05)
    _, told = await begun(application, api, live)
    for number in range(3):
        await sync_to_async(terminate)()
        await record(live, str(number))
        assert (await anext(told)).data["data"] == str(number)
    await cancel(live)
    assert [each async for each in told][-1].event == "run.cancelled"


def terminate() -> None:
    with connection.cursor() as cursor:
        cursor.execute(BACKENDS)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (psycopg.errors.UndefinedColumn(), False), (psycopg.errors.InsufficientPrivilege(), False),
        (psycopg.errors.InvalidTextRepresentation(), False), (psycopg.ProgrammingError("cannot adapt"), False),
        (psycopg.errors.AdminShutdown(), True), (psycopg.errors.TooManyConnections(), True),
        (psycopg.errors.QueryCanceled(), True), (psycopg.errors.LockNotAvailable(), True),
        (psycopg.OperationalError("server closed the connection unexpectedly"), True),
        (ConnectionResetError(), True), (TimeoutError(), True), (ValueError(), False),
    ],
)  # fmt: skip
def test_what_passes(error: Exception, expected: bool) -> None:
    assert outage.passes(error) is expected


# --- the policy -----------------------------------------------------------------------------------------------------


class Hanging(Policy):
    """Answers nobody whose name is Eve, once it began to hang."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.asked = 0

    def visible(self, queryset: Any, user: Any) -> Any:
        if user.username.startswith("eve"):
            self.asked += not self.free.is_set()
            self.free.wait()
        return super().visible(queryset, user)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    policy = Hanging()
    monkeypatch.setattr("threads.access.policy", lambda: policy)
    yield policy
    policy.free.set()


@pytest.mark.slow
async def test_a_policy_that_hangs_for_one_visitor_holds_up_nobody_else(
    application: Application, api_of: Any, live: Run, monkeypatch: pytest.MonkeyPatch, hanging: Hanging
) -> None:
    """A key that is revoked meanwhile ends its stream at once, who is asked about in vain goes at last, others stay."""
    monkeypatch.setattr(broadcast, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(questions, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(questions, "AT_ONCE", 1)
    users = {
        name: await sync_to_async(api_of)(name, is_staff=True, is_superuser=True) for name in ("eve", "eve2", "ben")
    }
    told = {name: (await begun(application, user, live))[1] for name, user in users.items()}
    hanging.free.clear()
    async with asyncio.timeout(20):
        while hanging.asked < 2:
            await asyncio.sleep(0.01)  # between looks at a condition
    await ApiKey.objects.filter(owner=users["eve2"].user).aupdate(revoked_at=clock.Now())
    assert [each async for each in told["eve2"]] == []  # though nobody is gone for want of an answer yet
    now = broadcast.here()
    (ben,) = [each for each in now.readers if each.visitor.user[1] == users["ben"].user.pk]
    checked = ben.checked
    async with asyncio.timeout(20):
        while ben.checked == checked:
            await asyncio.sleep(0.01)  # between looks at a condition
    monkeypatch.setattr(broadcast, "UNCHECKED_SECONDS", 0.5)
    assert [each async for each in told["eve"]] == []
    assert hanging.asked == 2  # a thread for a visitor, however often they are due
    await record(live, "one")
    assert (await anext(told["ben"])).data["data"] == "one"


@pytest.mark.slow
async def test_a_policy_that_hangs_for_all_keeps_no_stream_whose_key_was_revoked(
    application: Application, api_of: Any, live: Run, monkeypatch: pytest.MonkeyPatch, hanging: Hanging
) -> None:
    monkeypatch.setattr(broadcast, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(questions, "ANSWER_SECONDS", 60.0)
    monkeypatch.setattr(questions, "AT_ONCE", 1)
    users = {name: await sync_to_async(api_of)(name, is_staff=True, is_superuser=True) for name in ("eve", "ben")}
    told = {name: (await begun(application, user, live))[1] for name, user in users.items()}
    hanging.free.clear()
    async with asyncio.timeout(20):
        while not hanging.asked:
            await asyncio.sleep(0.01)  # between looks at a condition
    await ApiKey.objects.filter(owner=users["ben"].user).aupdate(revoked_at=clock.Now())
    assert [each async for each in told["ben"]] == []


async def test_questions_of_one_subject_come_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """None for want of an answer is for one that hangs, not for one that is under way."""
    asked, free = Questions(), threading.Event()
    first = asyncio.create_task(asked.ask("ann", free.wait))
    second = asyncio.create_task(asked.ask("ann", lambda: "second"))
    assert await asked.ask("ben", lambda: "ben") == "ben"
    assert not second.done()
    free.set()
    assert (await first, await second) == (True, "second")
    monkeypatch.setattr(questions, "ANSWER_SECONDS", 0.05)
    free.clear()
    assert await asked.ask("ann", free.wait) is None
    assert await asked.ask("ann", lambda: "third") is None
    free.set()
    assert await asked.ask("ben", lambda: "ben") == "ben"


async def test_a_question_that_cannot_be_asked_or_ends_its_thread_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Questions()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", Nobody().start)
        assert await asked.ask("ann", lambda: 1) is None

    def leaves() -> None:
        raise SystemExit

    with pytest.raises(RuntimeError, match="SystemExit"):
        await asked.ask("ann", leaves)
    with monkeypatch.context() as patched:
        patched.setattr(questions, "release", leaves_the_connection)
        assert await asked.ask("ann", lambda: 2) == 2
    assert await asked.ask("ann", lambda: 3) == 3


class Nobody:
    def start(self, *_: Any) -> None:
        raise RuntimeError("can't start new thread")


def leaves_the_connection() -> None:
    raise InterfaceError("connection already closed")
