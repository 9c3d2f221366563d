"""The benchmark of the HTTP API: what its figures mean, that its crowd is one that could be, and that it runs."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks import crowd
from benchmarks.http import CALLS, Results, Sample, chosen, figures, tables
from benchmarks.http_client import Refused, measure
from runs import invariants
from runs.models import LIVE, Event, Run
from tests.benchmarks.conftest import Quick
from threads.models import Message, Thread


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_quick_form_prints_one_line_of_json_with_a_ratio_for_each_call(quick: Quick) -> None:
    found = quick("http", "--runs", "1000", "--only", "start;get run;list runs, staff")
    assert found["runs"] == 1000
    assert found["events"] > 9000
    calls = found["calls"]
    assert list(calls) == ["bare read", "bare insert", "start", "get run", "list runs, staff"]
    assert all(call["per_s"] > 0 < call["p50_ms"] <= call["p95_ms"] for call in calls.values())
    assert all(call["client_share"] < 0.5 for call in calls.values())  # the clients keep up with the server
    assert all("ratio" in calls[name] for name in ("start", "get run", "list runs, staff"))
    assert found["start_to_bare_insert"] == calls["start"]["ratio"]["throughput"]
    # A key is looked up, and a row read or inserted: the yardstick does nothing else.
    assert calls["bare read"]["round_trips"] == calls["bare insert"]["round_trips"] == 2


def test_a_ratio_is_that_of_one_round() -> None:
    def sample(ms: float, cpu: float) -> Sample:
        return Sample([ms / 1000] * 10, ms / 100, {"web": cpu, "postgres": 0.1, "valkey": 0.0}, 0.01, 100)

    bare = [sample(10, 0.1), sample(20, 0.2), sample(40, 0.4)]
    start = [sample(20, 0.3), sample(60, 0.4), sample(80, 0.8)]
    results = {"bare insert": Results(bare, bare), "start": Results(start, start)}
    found = figures(results, {"runs": 1, "events": 2}, {"start": "bare insert", "bare insert": ""})
    assert found["start_to_bare_insert"] == 2.0
    assert found["calls"]["start"]["ratio"] == {"throughput": 2.0, "p50": 2.0, "p95": 2.0, "cpu_web": 2.0, "cpu": 1.8}
    assert found["calls"]["start"]["per_s"] == 16.7
    assert "ratio" not in found["calls"]["bare insert"]
    assert list(tables(found)[0].columns[0].cells) == ["bare insert", "start"]


def test_the_bare_calls_are_measured_with_any_choice() -> None:
    assert [call.name for call in chosen("cancel")] == ["bare read", "bare insert", "cancel"]
    assert chosen("") == list(CALLS)
    with pytest.raises(ValueError, match="no call is named nothing"):
        chosen("nothing")


@pytest.mark.django_db
def test_a_crowd_is_what_runs_would_have_left() -> None:
    made = crowd.fill(1000, owners=20)
    assert Run.objects.count() == made.runs == 1000
    assert Event.objects.count() == made.events > 9000
    assert Message.objects.count() == made.messages > 2000
    assert Thread.objects.count() == made.threads == 50
    assert Run.objects.filter(status__in=LIVE).count() == made.live
    assert set(Run.objects.values_list("status", flat=True)) >= {
        "completed",
        "failed",
        "cancelled",
        "queued",
        "running",
    }
    assert Run.objects.filter(owner__username=crowd.MANY).count() == 100
    report = invariants.check()
    assert report.clean, str(report)


def test_a_client_refuses_what_the_plan_does_not_expect() -> None:
    async def served() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\ngone")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            plan = {"port": port, "connections": 1, "headers": {}, "requests": [["GET", "/", None, {}]], "expect": 200}
            await measure(json.loads(json.dumps(plan)))

    with pytest.raises(ExceptionGroup) as refused:
        asyncio.run(served())
    assert refused.group_contains(Refused, match="404 instead of 200")
