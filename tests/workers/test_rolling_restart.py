"""A deploy: workers are replaced by SIGTERM, one after another, under runs that stream and call tools. None of them notices."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

import pytest

from agents_project.demo.model_server import ModelCall, Reply, Text, ToolCall
from runs import Run, invariants
from runs.models import Event, Leg, Step
from tests.workers.app.agents import worker_test
from tests.workers.conftest import Kit, eventually
from threads.clock import now
from threads.models import Message
from tools.models import ToolAttempt, Worker
from tools.models import ToolCall as CallRow

SENTENCE = " ".join(f"w{n}" for n in range(40))
GRACE = 1.0  # DRAIN_GRACE_SECONDS of these workers
LATEST_EXIT = GRACE + 15.0  # a busy machine takes seconds to end a Python
AWAY = 1.0  # p99 from the end of a drained leg to the run's next one


@dataclass
class Talk:
    """What the model says: a sentence and a call a step, until it has been enough; then a sentence."""

    enough: bool = False

    def __call__(self, call: ModelCall) -> Reply:
        speech = Text(SENTENCE, chunk_chars=8, delay=0.1)  # 1.5 s: longer than the grace, so that some are cut
        return [speech] if self.enough else [speech, ToolCall("idempotent", {"seconds": 0.1})]


@pytest.fixture
def talk(workers: Kit) -> Iterator[Talk]:
    before, talk = workers.model.script, Talk()
    workers.model.script = talk
    yield talk
    workers.model.script = before


@dataclass
class Deploy:
    """Workers that are replaced, and of the old ones: when they were told, their exit codes, the seconds that they took."""

    workers: Kit
    since: dict[str, datetime] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)  # the length of each log at the beginning

    def __post_init__(self) -> None:
        """The workers may have had the deaths of other tests before this deploy: their logs tell of those."""
        self.told = {log.stem: log.stat().st_size for log in self.workers.folder.glob("*.log")}

    def replace(self, **kinds: int) -> None:
        """Bring up so many new workers of each kind, and when they are present tell as many old ones to go."""
        old = [name for kind, count in kinds.items() for name in self.workers.names(kind)[:count]]
        self.workers.up(**{kind: len(self.workers.names(kind)) + count for kind, count in kinds.items()})
        began = time.monotonic()
        for name in old:
            self.since[name] = now()
            # The parent alone, as a supervisor does it: a prefork one tells its children itself.
            self.workers.processes[name].send_signal(signal.SIGTERM)
        for name in old:
            process = self.workers.processes[name]
            eventually(lambda process=process: process.poll() is not None, why=f"{name} ends")  # type: ignore[misc]
            self.codes[name] = process.returncode
            self.seconds[name] = time.monotonic() - began

    def logs(self) -> dict[str, str]:
        logs = {name: (self.workers.folder / f"{name}.log").read_bytes() for name in self.codes}
        return {name: log[self.told.get(name, 0) :].decode(errors="replace") for name, log in logs.items()}


def streaming(count: int) -> list[Run]:
    """Start so many runs, and wait until each has said something."""
    runs = [worker_test.start("talk", limits={"max_steps": 1000}) for _ in range(count)]
    spoken = Event.objects.filter(run__in=runs, type="text.delta").values("run_id").distinct()
    eventually(lambda: spoken.count() == count, why="all runs stream")
    return runs


def ended(runs: list[Run], talk: Talk) -> None:
    talk.enough = True
    live = Run.objects.filter(pk__in=[run.pk for run in runs], finished_at=None)
    eventually(lambda: not live.exists(), within=60, why="all runs end")


def away(runs: list[Run], deploy: Deploy) -> list[float]:
    """Return how long each run waited for its next leg when a replaced worker had ended one, in seconds and in order.

    From the moment that the run was queued: of a leg that was drained that is its end; of one that was done with its step,
    and does not linger in a worker that drains, the end of the step's calls.
    """
    times = []
    for name, since in deploy.since.items():
        for leg in Leg.objects.filter(run__in=runs, worker=f"{name}@test", ended_at__gte=since):
            following = Leg.objects.filter(run_id=leg.run_id, number=leg.number + 1).first()
            if following is None:
                assert leg.reason == "finished", leg.reason
                continue
            queued = Event.objects.filter(run_id=leg.run_id, type="run.queued", at__lte=following.started_at)
            times.append((following.started_at - queued.latest("seq").at).total_seconds())
    return sorted(times)


def assert_that_nobody_noticed(runs: list[Run], deploy: Deploy) -> None:
    """No run failed or lost a step, nothing was lost or tried again, and the old workers left in order."""
    stood = Run.objects.filter(pk__in=[run.pk for run in runs])
    assert Counter(stood.values_list("status", "stop_reason", "lost")) == {("completed", "end_turn", 0): len(runs)}
    assert set(Leg.objects.filter(run__in=runs).values_list("reason", flat=True)) <= {"drained", "tools", "finished"}
    calls = CallRow.objects.filter(run_id__in=[run.pk for run in runs])
    attempts = ToolAttempt.objects.filter(call__in=calls).values_list("number", "outcome")
    assert Counter(attempts) == {(1, "success"): calls.count()}
    # Each step was committed once, with its whole text; its number says that none is missing.
    for run in stood:
        steps = list(Step.objects.filter(run=run).order_by("number").values_list("number", "message_id"))
        assert [number for number, _ in steps] == list(range(1, run.steps + 1))
        said = Message.objects.filter(run_id=run.pk, role="assistant", status="completed").order_by("position")
        assert [(message.pk, message.text) for message in said] == [(message, SENTENCE) for _, message in steps]
        assert calls.filter(run_id=run.pk).count() == run.steps - 1
    discarded = Event.objects.filter(run__in=runs, type="message.discarded")
    assert {event.payload["reason"] for event in discarded} <= {"drained"}
    report = invariants.check()
    assert not any(report.violations.values()), str(report)

    assert set(deploy.codes.values()) == {0}
    assert max(deploy.seconds.values()) < LATEST_EXIT
    assert not Worker.objects.filter(name__in=[f"{name}@test" for name in deploy.codes], gone_at=None).exists()
    for name, log in deploy.logs().items():
        for word in ("ERROR", "CRITICAL", "Traceback"):
            assert word not in log, f"{name}: {log[log.index(word) - 200 :][:2000]}"


def test_a_worker_of_each_kind_that_is_replaced_costs_no_run_anything(workers: Kit, talk: Talk) -> None:
    deploy = Deploy(workers)
    runs = streaming(8)
    deploy.replace(agents=1, tools=1)
    ended(runs, talk)
    times = away(runs, deploy)
    assert times, "the replaced worker held runs"
    assert times[-1] < 5  # the bound of the long form is for many legs, and a machine that does nothing else
    assert_that_nobody_noticed(runs, deploy)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rolling_restart_of_all_workers_under_50_streaming_runs(workers: Kit, talk: Talk) -> None:
    workers.up(agents=2, tools=2, control=1)
    deploy = Deploy(workers)
    runs = streaming(50)
    for kind in ("agents", "tools", "control"):
        for _ in workers.names(kind):
            deploy.replace(**{kind: 1})
    ended(runs, talk)

    assert_that_nobody_noticed(runs, deploy)
    times = away(runs, deploy)
    assert len(times) >= len(runs) / 2  # nearly all, but for those that waited for a tool without a leg at that moment
    p50, p99 = (times[math.ceil(len(times) * part) - 1] for part in (0.5, 0.99))
    print(f"drained leg to the next leg: n {len(times)}, p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms")
    assert p99 < AWAY
