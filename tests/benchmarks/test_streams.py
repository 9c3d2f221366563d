"""The benchmark of streams: that it runs, loses nothing, and would tell if something were lost."""

from __future__ import annotations

import random

import pytest

from benchmarks.chunks import Stamped
from benchmarks.streams_client import Reader
from tests.benchmarks.conftest import Quick


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_quick_form_loses_nothing_over_random_cuts(quick: Quick) -> None:
    found = quick("streams", "--readers", "40", "--runs", "8", "--cut", "random")
    assert (found["lost"], found["doubled"], found["mismatched"], found["violations"]) == (0, 0, 0, 0)
    assert found["cuts"] > 10
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert found["web"]["threads"] < 30
    assert {"web", "postgres", "agents", "valkey", "model", "readers"} <= set(found["cpu"])


def frames(*chunks: str) -> bytes:
    return b"".join(
        b'id: %d\nevent: text.delta\ndata: {"text": "%b"}\n\n' % (seq, text.encode())
        for seq, text in enumerate(chunks, 1)
    )


def test_it_tells_what_is_lost_and_what_comes_twice() -> None:
    def read(*chunks: str) -> tuple[int, int]:
        reader = Reader("run", {}, random.Random(1))
        reader._take(frames(*chunks), 0.0)
        return reader.lost, reader.doubled

    assert read("0@1 1@1 ", "2@1 ") == (0, 0)
    assert read("0@1 ", "2@1 ", "5@1 ") == (3, 0)
    assert read("0@1 1@1 ", "1@1 2@1 ") == (0, 1)


def test_a_chunk_is_stamped_when_it_is_taken() -> None:
    said = Stamped(0.0, 1000.0, 3)
    assert len(list(said)) == 6
    first, again = said[1], said[1]
    assert first != again
    assert [each.text.partition("@")[0] for each in said if hasattr(each, "text")] == ["0", "1", "2"]
