"""The quota of a model with two real agents workers: counted where the requests arrive."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents_project.demo.model_server import Headers, ModelCall, Reply, Status, Text
from runs import Run
from tests.workers.app.agents import worker_test
from tests.workers.conftest import Kit, Redis, eventually, kit_over
from tools.models import Pause

pytestmark = pytest.mark.slow

MINUTE = 2.0  # seconds: of these workers; a use counts for 2 s more
REQUESTS = 6


class Service:
    """A service that counts what it is asked, and answers what it is told to."""

    def __init__(self) -> None:
        self.arrived: list[float] = []
        self.refusals: list[dict[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self._lock = threading.Lock()

    def __call__(self, call: ModelCall) -> Reply:
        with self._lock:
            self.arrived.append(time.monotonic())
            if self.refusals:
                return [Status(429, "slow down", self.refusals.pop(0))]
            said = [Headers(self.headers.pop(0))] if self.headers else []
        return [*said, Text("Done.")]

    def worst(self) -> int:
        return max(sum(begin <= each < begin + MINUTE for each in self.arrived) for begin in self.arrived)


@pytest.fixture(scope="module")
def kit(django_db_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    folder: Path = tmp_path_factory.mktemp("workers")
    with kit_over(Redis(), folder) as kit:
        kit.environment |= {
            "TESTS_MODEL_LIMITS": f'{{"openai:test": {{"requests_per_minute": {REQUESTS}}}}}',
            "TESTS_MODEL_MINUTE_SECONDS": str(MINUTE),
        }
        yield kit


@pytest.fixture
def service(workers: Kit) -> Service:
    service = Service()
    workers.model.script = service
    return service


def ended(runs: list[Run]) -> bool:
    found = Run.objects.filter(pk__in=[run.pk for run in runs], status="completed")
    return found.count() == len(runs)


@pytest.mark.parametrize("how", ["refused", "told that nothing is left"])
def test_what_the_service_says_to_one_holds_for_all(workers: Kit, service: Service, how: str) -> None:
    if how == "refused":
        service.refusals.append({"retry-after": "3"})
    else:
        service.headers.append({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "3s"})
    first = worker_test.start("hello")
    eventually(Pause.objects.first, why="it is a row")
    runs = [first, *(worker_test.start(f"hello {n}") for n in range(3))]
    eventually(lambda: ended(runs), why="all were asked")
    told, *others = sorted(service.arrived)
    assert len(others) == (4 if how == "refused" else 3)
    assert min(others) - told >= 3


def test_two_workers_never_ask_more_than_the_quota_allows_whatever_dies(workers: Kit, service: Service) -> None:
    runs = [worker_test.start(f"hello {n}") for n in range(2 * REQUESTS + 2)]
    eventually(lambda: len(service.arrived) >= REQUESTS, why="the first window is used")
    waiting = Run.objects.filter(pk__in=[run.pk for run in runs], status="queued", not_before__isnull=False)
    assert eventually(waiting.first, why="some wait").why().startswith("waits for openai:test: ")
    workers.kill(workers.processes[workers.names("agents")[0]])
    eventually(lambda: ended(runs), why="all were asked")
    assert service.worst() <= REQUESTS
    assert {run.model_tries for run in Run.objects.all()} == {0}
    # Handed over about once each, not asked for again and again.
    assert sum(run.legs for run in Run.objects.all()) < 4 * len(runs)
