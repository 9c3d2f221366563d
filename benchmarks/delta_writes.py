"""What a row of streamed text costs to write, and what the flush interval makes of it from end to end.

    python -m benchmarks.delta_writes                      both; some 10 minutes
    python -m benchmarks.delta_writes --only batches       the statement by itself
    python -m benchmarks.delta_writes --only intervals     agents workers that flush at different intervals, with readers

First the statement of `runs/flusher.py` (`longhaul_deltas_write`) in batches of 1 to 500 rows, each of another run. Then the
reference load and the hard load of `benchmarks.streams`, through workers that flush every 5 to 100 ms. README.md tells more.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.command import Figures
from benchmarks.cpu import spent
from benchmarks.kept import Kept
from benchmarks.rig import Rig
from benchmarks.streams import BAR_HARD_P99_MS, BAR_P50_MS, BAR_P99_MS, HARD, REFERENCE
from benchmarks.streams_stage import SERVER, Load, Longhaul, Stage
from benchmarks.workers import check_invariants, prepare

if TYPE_CHECKING:
    from runs.flusher import Buffer

SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # rows of a batch
INTERVALS_MS = (5, 10, 15, 25, 50, 100)
FLUSH = "LONGHAUL_BENCH_FLUSH_MS"  # what benchmarks.settings reads
TEXT = "word 12345 "
STOP = timedelta(seconds=60)  # for a worker without runs
PARTS = ("batches", "intervals")


# --- the statement --------------------------------------------------------------------------------------------------------------


def speaking(runs: int) -> list[Buffer]:
    """Start so many runs and let each speak, as its leg does, in this process. Returns their buffers."""
    from django.db import transaction

    from benchmarks.longhaul_app.agents import speaker
    from runs import lifecycle
    from runs.claims import Claim
    from runs.flusher import Buffer
    from threads.ids import new_id
    from tools.models import Worker

    with transaction.atomic():
        started = [speaker.start("Speak.", owner=None) for _ in range(runs)]
    worker = Worker.objects.create(name="agents@bench", kind="agents", host="bench", pid=os.getpid(), lock_key=None)
    buffers = []
    for run in started:
        Worker.objects.filter(pk=worker.pk).update(beat_at=_now())
        answer = lifecycle.claim(
            run.pk, run.dispatch_seq, worker=worker.pk, worker_name=worker.name, task_id="bench", leg=new_id()
        )
        claim = Claim(run.pk, worker.pk)
        claim.epoch = answer["epoch"]
        message = new_id()
        turn = [message, timedelta(hours=1), 0, 100, 1000, 10**9, Decimal(1000)]
        lifecycle.open_turn(run.pk, claim.epoch, worker.pk, turn)
        buffers.append(Buffer(claim, claim.epoch, message))
    return buffers


def _now() -> Any:
    from threads.clock import Now

    return Now()


def write(rig: Rig, buffers: Sequence[Buffer], size: int, seconds: float) -> Figures:
    """Write batches of this size for so long, one after another."""
    from runs.flusher import _write_rows

    for each in buffers[:size]:  # the plan of this size is made
        each.add("text.delta", TEXT)
    _send(buffers[:size], _write_rows)
    before, own = rig.read(), time.process_time()
    begun = time.monotonic()
    batches = place = 0
    while time.monotonic() - begun < seconds:
        batch = [buffers[(place + each) % len(buffers)] for each in range(size)]
        place += size
        for each in batch:
            each.add("text.delta", TEXT)
        _send(batch, _write_rows)
        batches += 1
    took, own = time.monotonic() - begun, time.process_time() - own
    after = rig.read()
    rows = batches * size
    return {
        "size": size, "rows": rows, "rows_per_s": round(rows / took), "batch_ms": round(took / batches * 1000, 2),
        "client_us_per_row": round(own / rows * 1e6, 1),
        "postgres_us_per_row": round(spent(before.cpu, after.cpu)["postgres"] / rows * 1e6, 1),
        "wal_bytes_per_row": round((after.wal_bytes - before.wal_bytes) / rows),
    }  # fmt: skip


def _send(batch: Sequence[Buffer], write_rows: Any) -> None:
    for each in batch:
        each.send()
    states = write_rows(list(batch))
    assert set(states.values()) == {"written"}, states
    for each in batch:
        each.settle(again=False)


def batches(rig: Rig, given: argparse.Namespace, console: Console) -> list[Figures]:
    """Return the medians over the rounds, one a size; sizes take turns."""
    from django.db import connection

    from runs.models import Run

    sizes = [size for size in SIZES if size <= 50] if given.quick else SIZES
    console.log(f"{max(sizes)} runs begin to speak")
    buffers = speaking(max(sizes))
    rig.is_load_generator(connection.connection)
    connection.close()  # the backend that made them counts as the load generator's; the next one is Postgres's
    found: dict[int, list[Figures]] = {size: [] for size in sizes}
    for number in range(1 if given.quick else given.rounds):
        for size in sizes:
            found[size].append(write(rig, buffers, size, 0.3 if given.quick else 2.0))
        console.log(
            f"round {number + 1}: " + ", ".join(f"{s}: {found[s][-1]['rows_per_s']:,}" for s in sizes) + " rows/s"
        )
    for run in Run.objects.filter(status="running"):
        run.cancel()
    return [{name: _middle([each[name] for each in found[size]]) for name in found[size][0]} for size in sizes]


def _middle(values: Sequence[float]) -> float:
    return round(median(values), 2)


# --- from end to end ------------------------------------------------------------------------------------------------------------


def intervals(rig: Rig, stage: Stage, longhaul: Longhaul, given: argparse.Namespace, kept: Kept) -> list[Figures]:
    """Return what the loads cost at each interval: medians over the rounds. Each round takes the intervals in turn."""
    reference, hard = replace(REFERENCE, seconds=10.0), replace(HARD[0], seconds=10.0)
    wanted: Sequence[float] = given.intervals or INTERVALS_MS
    if given.quick:
        reference, hard = Load(50, 10, 5.0, 4.0), Load(5, 5, 100.0, 4.0)
        wanted = wanted[::3]
    loads = {"reference": reference, "hard": hard}
    found: dict[float, dict[str, list[Figures]]] = {ms: {name: [] for name in loads} for ms in wanted}
    for number in range(1 if given.quick else given.rounds):
        for ms in wanted:
            asked = [{**load.asked(), "ms": ms, "round": number} for load in loads.values()]
            if not all(kept.has("interval", each) for each in asked):
                _restart(longhaul, ms)
                stage.carry(longhaul, longhaul.key, Load(5, 2, 5.0, 1.0))  # the new worker's first runs
            for (name, load), question in zip(loads.items(), asked, strict=True):
                figures = kept.get("interval", question, partial(_measured, rig, stage, longhaul, load))
                stage.console.log(
                    f"round {number + 1}, {ms:g} ms, {name}: p50 {figures['p50_ms']}, p99 {figures['p99_ms']} ms,"
                    f" {figures['cpu_us_per_chunk']} us a chunk, {figures['rows_per_chunk']} rows"
                )
                found[ms][name].append(figures)
    return [{"ms": ms, **{name: _summary(rounds) for name, rounds in each.items()}} for ms, each in found.items()]


def _restart(longhaul: Longhaul, ms: float) -> None:
    for name in longhaul.workers.names("agents"):
        longhaul.workers.stop(name, STOP)
    os.environ[FLUSH] = str(ms)
    longhaul.workers.up(agents=1)


def _measured(rig: Rig, stage: Stage, longhaul: Longhaul, load: Load) -> Figures:
    figures = stage.carry(longhaul, longhaul.key, load)
    row = rig.connection.execute(
        "SELECT count(*) FROM longhaul_runs_event WHERE run_id = ANY (%s) AND type = 'text.delta'", [longhaul.ids]
    ).fetchone()
    assert row is not None
    return figures | {"rows_per_chunk": round(row[0] / (load.chunks * load.runs), 3)}


def _summary(rounds: Sequence[Figures]) -> Figures:
    names = ("p50_ms", "p99_ms", "cores", "cpu_us_per_chunk", "rows_per_chunk", "carried_per_s")
    shown: Figures = {name: _middle([each[name] or 0 for each in rounds]) for name in names}
    shown["wrong"] = sum(each["lost"] + each["doubled"] + each["mismatched"] for each in rounds)
    roles = rounds[0]["cpu"]
    shown["cpu"] = {role: round(median(each["cpu"].get(role, 0.0) for each in rounds), 3) for role in roles}
    return shown


def proposed(found: Sequence[Figures]) -> float | None:
    """Return the interval that costs least of those that keep the bars of both loads; None when none does."""
    good = [
        each for each in found
        if each["reference"]["p50_ms"] <= BAR_P50_MS and each["reference"]["p99_ms"] <= BAR_P99_MS
        and each["hard"]["p99_ms"] <= BAR_HARD_P99_MS
    ]  # fmt: skip
    if not good:
        return None
    best = min(good, key=lambda each: each["reference"]["cpu_us_per_chunk"] + each["hard"]["cpu_us_per_chunk"])
    return float(best["ms"])


# --- the command ----------------------------------------------------------------------------------------------------------------


def measure(given: argparse.Namespace, console: Console) -> Figures:
    parts = [given.only] if given.only else list(PARTS)
    kept = Kept(given.keep)
    found: Figures = {}
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # of the web process too, which inherits it
    with Rig(SERVER) as rig:
        prepare(rig)
        if "batches" in parts:  # before there is a worker, which would take the runs
            asked = {"rounds": given.rounds, "quick": given.quick}
            found |= kept.get("batches", asked, lambda: {"batches": batches(rig, given, console)})
        if "intervals" in parts:
            curve = intervals(rig, Stage(rig, console), Longhaul(rig, REFERENCE.runs), given, kept)
            found |= {"intervals": curve, "proposed_ms": proposed(curve)}
        found["violations"] = check_invariants()
    return {"benchmark": "delta_writes", "n": 1 if given.quick else given.rounds, **found}


def tables(found: Figures) -> list[Table]:
    shown = []
    if rows := found.get("batches"):
        table = Table(title=f"one statement a batch, each row of another run; medians of n = {found['n']}")
        for heading in ("rows a batch", "rows/s", "ms a batch", "us a row: client", "Postgres", "bytes of WAL a row"):
            table.add_column(heading, justify="right")
        for each in rows:
            table.add_row(
                f"{each['size']:g}", f"{each['rows_per_s']:,g}", f"{each['batch_ms']:g}", f"{each['client_us_per_row']:g}",
                f"{each['postgres_us_per_row']:g}", f"{each['wal_bytes_per_row']:,g}",
            )  # fmt: skip
        shown.append(table)
    if curve := found.get("intervals"):
        table = Table(title=f"flush intervals; medians of n = {found['n']}; proposed: {found['proposed_ms']} ms")
        for heading in (
            "ms",
            "load",
            "p50 ms",
            "p99 ms",
            "us a chunk",
            "rows a chunk",
            "cores: agents",
            "Postgres",
            "web",
            "wrong",
        ):
            table.add_column(heading, justify="right")
        for each in curve:
            for name in ("reference", "hard"):
                of = each[name]
                table.add_row(
                    f"{each['ms']:g}", name, f"{of['p50_ms']:g}", f"{of['p99_ms']:g}", f"{of['cpu_us_per_chunk']:g}",
                    f"{of['rows_per_chunk']:g}", *(f"{of['cpu'].get(role, 0):.2f}" for role in ("agents", "postgres", "web")),
                    str(of["wrong"]),
                )  # fmt: skip
        shown.append(table)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.delta_writes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=PARTS, help="one of the two parts")
    parser.add_argument("--rounds", type=int, default=3, help="medians are of so many (default 3)")
    parser.add_argument("--intervals", type=float, nargs="+", metavar="MS", help="in place of 5 to 100")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="keep what is measured, and measure none that is there"
    )
    return command.run(parser, measure, tables, arguments, quick="small batches, two intervals, short; under 90 s")


if __name__ == "__main__":
    sys.exit(main())
