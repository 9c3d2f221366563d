"""The benchmark of streams: that it runs, loses nothing, and would tell if something were lost."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agents_project.embedded import PROJECT
from agents_project.processes import free_port
from benchmarks.bars import Bar
from benchmarks.kept import Kept
from benchmarks.streams import wanted
from benchmarks.streams_client import CHUNK, Reader
from benchmarks.streams_stage import Chunks, first_to_saturate, percentile_ms
from tests.benchmarks.conftest import Quick

SOUND = ("lost", "doubled", "mismatched", "violations")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_quick_form_loses_nothing_over_random_cuts(quick: Quick) -> None:
    found = quick("streams", "--readers", "40", "--runs", "8", "--cut", "random")
    assert [found[name] for name in SOUND] == [0, 0, 0, 0]
    assert found["cuts"] > 10
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert found["web"]["threads"] < 30
    assert {"web", "postgres", "agents", "valkey", "model", "readers"} <= set(found["cpu"])
    assert found["cores"] == pytest.approx(
        sum(found["cpu"][role] for role in ("web", "agents", "control", "postgres", "valkey")), abs=0.01
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_part_has_a_quick_form(quick: Quick, tmp_path: Path) -> None:
    kept = tmp_path / "figures.jsonl"
    found = quick("streams", "--all", "--readers", "20", "--runs", "5", "--keep", str(kept))
    must = [each for each in found["bars"] if "lost" in each["name"] or "invariants" in each["name"]]
    assert len(must) >= 9
    assert all(each["met"] for each in must), must
    for form in ("longhaul", "relay"):
        assert found["curve"][form]["steps"]
        assert found["curve"][form]["first"]
    assert found["hard"]["steady"]["carried_per_s"] > 0
    assert found["peer"]["ratio"]["cpu_a_chunk"] > 0
    assert found["replay"]["checked"]["frames"] == found["replay"]["events"] == 5000
    assert found["storm"]["cuts"] == 20
    assert found["storm"]["all_caught_up_s"] is not None
    # What is in the file is not measured again: nothing but the warm-up, and the run that shows it.
    again = quick("streams", "--curve", "--readers", "20", "--runs", "5", "--keep", str(kept))
    assert again["curve"]["longhaul"] == found["curve"]["longhaul"]


def frames(*chunks: str) -> bytes:
    return b"".join(
        b'id: %d\nevent: text.delta\ndata: {"text": "%b"}\n\n' % (seq, text.encode())
        for seq, text in enumerate(chunks, 1)
    )


def reader(**plan: Any) -> Reader:
    return Reader("/stream", plan, array("q"))


def test_it_tells_what_is_lost_and_what_comes_twice() -> None:
    def read(*chunks: str) -> tuple[int, int]:
        one = reader()
        one.take(frames(*chunks))
        one.close(4)
        return one.lost, one.doubled

    assert read("0@1+0 1@1+0 ", "2@1+0 3@1+0 ") == (0, 0)
    assert read("0@1+0 ", "2@1+0 ", "3@1+0 ") == (1, 0)
    assert read("0@1+0 1@1+0 ", "1@1+0 2@1+0 ") == (1, 1)
    assert read() == (4, 0)


def test_readers_who_were_told_different_things_have_different_digests() -> None:
    told = [reader() for _ in range(3)]
    told[0].take(frames("0@1+0 ", "1@1+0 "))
    told[1].take(b": ping\n\n" + frames("0@1+0 ") + b": ping\n\n")
    told[1].take(frames("0@1+0 ", "1@1+0 ")[len(frames("0@1+0 ")) :])
    told[2].take(frames("0@1+0 1@1+0 "))
    assert told[0].digest.digest() == told[1].digest.digest() != told[2].digest.digest()


def test_a_light_reader_counts_by_the_seqs_alone() -> None:
    whole = b": longhaul\nretry: 1000\n\n" + frames(*"abcdef")
    one = reader(light=True)
    one.take(whole)
    assert (one.frames, one.lost, one.doubled, one.seq) == (6, 0, 0, 6)
    one.take(frames(*"abcdefgh").split(b"id: 7")[1].join([b"id: 7", b""]))
    assert (one.frames, one.lost, one.doubled) == (8, 0, 0)
    one.take(b"id: 12\nevent: run.completed\ndata: {}\n\n")
    assert (one.lost, one.ended) == (3, True)
    one.take(b"id: 12\nevent: text.delta\ndata: {}\n\n")
    assert one.doubled == 1


def test_a_chunk_is_as_old_as_the_moment_at_which_it_was_due() -> None:
    one = reader()
    now = time.monotonic_ns() // 1000
    one.take(frames(f"0@{now - 50_000}+20000 "))
    one.timely = now + 10**9  # it came back a moment ago
    one.take(frames(f"1@{now - 9_000_000}+0 "))
    chunks = Chunks(one.records[0::3], one.records[1::3], one.records[2::3])
    (age,) = chunks.ages()
    assert 50_000 <= age < 5_000_000
    assert list(chunks.late) == [20_000, 0]
    assert chunks.arrived(now - 1, now + 5_000_000) == 2
    assert percentile_ms([1000, 2000, 3000], 50) == 2.0
    assert percentile_ms([], 50) is None


@pytest.fixture
def metronome() -> Iterator[str]:
    port = free_port(0)
    server = subprocess.Popen([sys.executable, "-m", "benchmarks.metronome", "--port", str(port)], cwd=PROJECT)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 30
    while True:
        try:
            httpx2.get(f"{url}/state")
            break
        except httpx2.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.02)  # until it listens
    yield url
    server.kill()
    server.wait()


@pytest.mark.slow
def test_the_metronome_says_every_chunk_when_it_is_due_also_to_who_does_not_read(metronome: str) -> None:
    def body(prompt: str) -> dict[str, Any]:
        return {"model": "m", "stream": True, "messages": [{"role": "user", "content": prompt}]}

    async def listen() -> list[list[tuple[int, int, int]]]:
        async with httpx2.AsyncClient(timeout=30) as client:

            async def one(count: int, rate: float, begin: Callable[[], bool]) -> list[tuple[int, int, int]]:
                url = f"{metronome}/v1/chat/completions"
                async with client.stream("POST", url, json=body(f"chunks {count} {rate}")) as response:
                    assert response.status_code == 200
                    while not begin():
                        await asyncio.sleep(0.01)  # the head alone has come: the stream waits
                    said = b"".join([part async for part in response.aiter_bytes()])
                assert said.endswith(b"data: [DONE]\n\n")
                return [(int(a), int(b), int(c)) for a, b, c in CHUNK.findall(said)]

            ready = asyncio.Event()
            heard = [asyncio.create_task(one(20, 200, ready.is_set)) for _ in range(3)]
            while (await client.get(f"{metronome}/state")).json()["waiting"] < 3:
                await asyncio.sleep(0.01)  # until all have asked
            await client.get(f"{metronome}/begin")
            while (await client.get(f"{metronome}/state")).json()["said"] < 60:
                await asyncio.sleep(0.01)  # nobody reads yet
            ready.set()
            return list(await asyncio.gather(*heard))

    told = asyncio.run(listen())
    for chunks in told:
        assert [number for number, _, _ in chunks] == list(range(20))
        due = [moment for _, moment, _ in chunks]
        assert all(after - before in (4999, 5000, 5001) for before, after in pairwise(due))
        assert all(late >= 0 for _, _, late in chunks)
    assert len({chunks[0][1] for chunks in told}) == 3  # no two begin together


def test_what_is_kept_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    assert Kept(path).get("part", {"rate": 5}, lambda: {"p50": 1}) == {"p50": 1}
    with path.open("a") as file:
        file.write('{"part": "other')  # cut while it was written
    again = Kept(path)
    assert again.get("part", {"rate": 5}, lambda: {"p50": 2}) == {"p50": 1}
    assert again.get("part", {"rate": 6}, lambda: {"p50": 3}) == {"p50": 3}
    assert Kept(path).get("part", {"rate": 6}, lambda: {"p50": 4}) == {"p50": 3}
    assert [json.loads(line)["found"] for line in path.read_text().splitlines() if line.endswith("}")] == [
        {"p50": 1},
        {"p50": 3},
    ]


def test_who_saturates_first_is_named() -> None:
    def named(others: float = 0.0, **cpu: float) -> str:
        return first_to_saturate({"cpu": cpu, "others_cores": others})

    assert named(web=0.97, agents=0.5).startswith("web")
    assert named(web=0.5, agents=0.6, postgres=0.5, readers=0.4).startswith("the machine")
    assert named(web=0.1, others=1.9).startswith("the machine")
    assert named(web=0.3, agents=0.2).startswith("nobody")


def test_a_bar_is_met_or_missed() -> None:
    assert Bar("p50", 60, 60).met
    assert not Bar("p50", 61, 60).met
    assert Bar("rate", 61, 60, at_most=False).met
    assert not Bar("rate", None, 60, at_most=False).met


def test_the_parts_are_what_was_asked_for() -> None:
    from argparse import Namespace

    nothing: dict[str, Any] = {
        "all": False, "curve": False, "hard": False, "peer": None, "replay": None, "storm": False,
    }  # fmt: skip

    def parts(**given: Any) -> list[str]:
        return wanted(Namespace(**{**nothing, **given}))

    assert parts() == ["reference"]
    assert parts(peer="relay") == ["peer"]
    assert parts(peer="relay", hard=True) == ["hard"]
    assert parts(replay=100, storm=True) == ["replay", "storm"]
    assert parts(all=True) == ["reference", "curve", "hard", "peer", "replay", "storm"]
