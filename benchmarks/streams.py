"""Readers of live runs: does every chunk reach each of them once, how soon, and at what cost?

    python -m benchmarks.streams                              the reference load: 1,000 readers of 200 runs of 5 chunks/s
    python -m benchmarks.streams --cut random                 the same, each reader reset every 5 s on average
    python -m benchmarks.streams --curve                      the rate raised until something saturates, and who
    python -m benchmarks.streams --hard                       20 and 200 streams of 100 tokens/s, a reader each
    python -m benchmarks.streams --peer relay                 beside a relay over Redis streams, by turns
    python -m benchmarks.streams --replay 100000              a finished run of so many events, beside live ones
    python -m benchmarks.streams --storm                      all readers are cut and come back within a second
    python -m benchmarks.streams --all --keep figures.jsonl   all of it; a part that is in the file is not measured again

A model server says numbered chunks, an agents worker writes them, one web process serves all readers, who are a process of
their own and may be cut at random by TCP resets. A chunk's latency is from the moment it was due at the model server to its
reader. README.md tells more.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import bars, command
from benchmarks.bars import Bar
from benchmarks.command import Figures
from benchmarks.kept import Kept
from benchmarks.rig import Rig, RigError
from benchmarks.streams_stage import (
    APART,
    DRAIN,
    RELAYS,
    SERVER,
    WAIT,
    Chunks,
    Load,
    Longhaul,
    Meter,
    Relay,
    Stage,
    first_to_saturate,
    middle,
    percentile_ms,
    until_us,
)
from benchmarks.workers import check_invariants, prepare

CUT_SECONDS = 5.0  # between two cuts of a reader, on average
REFERENCE = Load(1000, 200, 5.0, 30.0)
HARD = (Load(20, 20, 100.0, 30.0), Load(200, 200, 100.0, 20.0))
CARRIED = 0.99  # of what is offered: then it is carried; the rest is on the way when the time is up
KEPT_UP = 0.95  # the same for a step of the curve, which is short
BAR_P50_MS, BAR_P99_MS, BAR_KB = 60, 300, 80
BAR_HARD_P99_MS = 100
BAR_RELAY = 2.0  # times its CPU
BAR_REPLAY, GOAL_REPLAY = 20_000, 50_000  # events/s
BAR_STORM_SECONDS, BAR_STORM_P99_MS = 10, 1000
CURVE_FACTOR = 1.5
CURVE_STEPS = 14
EXPLODED_MS = 1000.0  # p99: readers are seconds behind, and fall back further
REPLAYERS = 100
REPLAY_ROUNDS = 3
STORM_WITHIN = 1.0  # seconds, for all to be cut
STORM_LIVE = 100  # readers that are not cut

# A run that has ended, given so many deltas more: those that it has go, the events behind them move on, and the message is
# what the deltas say.
_LONGER = """
DO $$
DECLARE
    v_run uuid := '{run}';
    v_most bigint := {events};
    v_first longhaul_runs_event;
    v_old bigint;
    v_new bigint;
    v_text text;
BEGIN
    SELECT * INTO v_first FROM longhaul_runs_event WHERE run_id = v_run AND type = 'text.delta' ORDER BY seq LIMIT 1;
    SELECT count(*) INTO v_old FROM longhaul_runs_event WHERE run_id = v_run AND type = 'text.delta';
    SELECT v_most - last_seq + v_old INTO v_new FROM longhaul_runs_run WHERE id = v_run;
    DELETE FROM longhaul_runs_event WHERE run_id = v_run AND type = 'text.delta';
    UPDATE longhaul_runs_event SET seq = seq + v_most WHERE run_id = v_run AND seq > v_first.seq;
    UPDATE longhaul_runs_event SET seq = seq - v_old + v_new - v_most WHERE run_id = v_run AND seq > v_most;
    INSERT INTO longhaul_runs_event (run_id, seq, type, at, epoch, message_id, ordinal, payload)
    SELECT v_run, v_first.seq + n, 'text.delta', v_first.at, v_first.epoch, v_first.message_id, n + 1,
           jsonb_build_object('message', v_first.message_id, 'text', n || '@1+0 ')
    FROM generate_series(0, v_new - 1) AS n;
    SELECT string_agg(n || '@1+0 ', '' ORDER BY n) INTO v_text FROM generate_series(0, v_new - 1) AS n;
    UPDATE longhaul_runs_event SET payload = jsonb_set(payload, '{{content,0,text}}', to_jsonb(v_text))
    WHERE run_id = v_run AND type = 'message.completed' AND payload->>'message' = v_first.message_id::text;
    UPDATE longhaul_threads_message SET content = jsonb_set(content, '{{0,text}}', to_jsonb(v_text)) WHERE id = v_first.message_id;
    UPDATE longhaul_runs_run SET last_seq = v_most WHERE id = v_run;
END $$
"""


@dataclass
class Bench:
    """The parts. Each returns its figures, with its bars."""

    stage: Stage
    longhaul: Longhaul
    kept: Kept
    given: argparse.Namespace
    log: Callable[[str], None]
    _relay: Relay | None = None

    @property
    def key(self) -> str:
        return self.longhaul.key

    @property
    def load(self) -> Load:
        given = self.given
        cut = CUT_SECONDS if given.cut == "random" else None
        return Load(given.readers, given.runs, given.rate, given.seconds, cut)

    def relay(self) -> Relay:
        if self._relay is None:
            self._relay = Relay(self.stage.rig, self.longhaul.workers, self.given.gather_ms)
        return self._relay

    def carry(self, load: Load, form: Longhaul | Relay | None = None, name: str = "carry", **asked: Any) -> Figures:
        form = form or self.longhaul
        if isinstance(form, Relay):
            asked["gather_ms"] = self.given.gather_ms

        def measure() -> Figures:
            self.log(f"{form.name}: {load}, {load.seconds:g} s, cut: {'random' if load.cut else 'none'}")
            found = self.stage.carry(form, self.key, load)
            self.log(
                f"  carried {found['carried_per_s']:,.0f} of {found['offered_per_s']:,.0f} chunks/s, p50 {found['p50_ms']} ms,"
                f" p99 {found['p99_ms']} ms; lost {found['lost']}, doubled {found['doubled']}"
            )
            return found

        return self.kept.get(f"{name} {form.name}", load.asked() | asked, measure)

    # --- the reference load -----------------------------------------------------------------------------------------

    def reference(self) -> Figures:
        found = self.carry(self.load)
        limits = [*sound("", found), Bar("chunk to reader, p50", found["p50_ms"], BAR_P50_MS, "ms")]
        limits.append(Bar("chunk to reader, p99", found["p99_ms"], BAR_P99_MS, "ms"))
        limits.append(Bar("memory a reader over idle", found["kb_per_reader"], BAR_KB, "kB"))
        return found | {"bars": [each.as_dict() for each in limits]}

    # --- the curve --------------------------------------------------------------------------------------------------

    def curve(self) -> Figures:
        """Raise the rate until less is carried than offered, or what is carried comes late."""
        found: Figures = {}
        forms: list[Longhaul | Relay] = [self.longhaul, *([self.relay()] if self.given.peer else [])]
        for form in forms:
            load = replace(self.load, cut=None, seconds=self.given.step_seconds)
            steps: list[Figures] = []
            for _ in range(2 if self.given.quick else CURVE_STEPS):
                steps.append(step := self.carry(load, form, "curve"))
                step["first"] = first_to_saturate(step)
                if (
                    step["carried_per_s"] < KEPT_UP * step["offered_per_s"]
                    or (step["p99_ms"] or math.inf) > EXPLODED_MS
                ):
                    break
                load = load.faster(CURVE_FACTOR)
            last = steps[-1]
            good = [each for each in steps if each["carried_per_s"] >= KEPT_UP * each["offered_per_s"]]
            found[form.name] = {
                "steps": steps,
                "saturated": last is not (good[-1] if good else None) or (last["p99_ms"] or 0) > EXPLODED_MS,
                "most_carried_per_s": max(each["carried_per_s"] for each in steps),
                "first": last["first"],
            }
            self.log(f"  first to saturate: {last['first']}")
        lost = [bar for form in found for each in found[form]["steps"] for bar in sound(f"curve, {form}", each)]
        return found | {"bars": [each.as_dict() for each in worst(lost)]}

    # --- the hard load ----------------------------------------------------------------------------------------------

    def hard(self) -> Figures:
        steady, most = HARD
        if self.given.quick:
            steady, most = replace(steady, seconds=4.0), replace(most, readers=40, runs=40, seconds=4.0)
        found: Figures = {"steady": self.carry(steady), "most": self.carry(most)}
        limits = [
            *sound("20 x 100/s", found["steady"]),
            Bar(
                "20 x 100/s: carried",
                found["steady"]["carried_per_s"],
                CARRIED * steady.offered,
                "chunks/s",
                at_most=False,
            ),
            Bar("20 x 100/s: p99", found["steady"]["p99_ms"], BAR_HARD_P99_MS, "ms"),
            *sound(f"{most.runs} x 100/s", found["most"]),
        ]
        for each in (found["steady"], found["most"]):
            each["first"] = first_to_saturate(each)
            # Who makes the load must be able to: what it said late was not carried late.
            each["honest"] = (each["model_late_p99_ms"] or math.inf) < BAR_HARD_P99_MS
        if self.given.peer:
            found["relay"] = {"steady": self.carry(steady, self.relay()), "most": self.carry(most, self.relay())}
        return found | {"bars": [each.as_dict() for each in limits]}

    # --- the peer ---------------------------------------------------------------------------------------------------

    def peer(self) -> Figures:
        """The same load by turns; a ratio is the median of the rounds' ratios, Longhaul to relay."""
        load = replace(self.load, cut=None)
        rounds = []
        for number in range(1 if self.given.quick else self.given.rounds):
            ours = self.carry(load, name="peer", round=number)
            theirs = self.carry(load, self.relay(), "peer", round=number)
            rounds.append((ours, theirs))
        ratio = {
            name: middle([ours[field] / theirs[field] for ours, theirs in rounds if ours[field] and theirs[field]] or [0])
            for name, field in (
                ("cpu", "cores"), ("rate", "carried_per_s"), ("cpu_a_chunk", "cpu_us_per_chunk"), ("p50", "p50_ms"), ("p99", "p99_ms"),
            )
        }  # fmt: skip
        limits = [
            bar for ours, theirs in rounds for bar in [*sound("peer, longhaul", ours), *sound("peer, relay", theirs)]
        ]
        limits = [*worst(limits), Bar("CPU a chunk, to the relay's", ratio["cpu_a_chunk"] or None, BAR_RELAY, "times")]
        return {
            "n": len(rounds), "gather_ms": self.given.gather_ms, "ratio": ratio,
            "longhaul": [ours for ours, _ in rounds], "relay": [theirs for _, theirs in rounds],
            "bars": [each.as_dict() for each in limits],
        }  # fmt: skip

    # --- replay -----------------------------------------------------------------------------------------------------

    def replay(self) -> Figures:
        events = self.given.replay or 100_000
        load = Load(200, 40, 5.0, 30.0)
        replayers, seconds = REPLAYERS, 15.0
        if self.given.quick:
            events, replayers, seconds = min(events, 5000), 10, 2.0
            load = Load(20, 5, 5.0, 10.0)
        asked = {"events": events, "replayers": replayers, "live": load.asked()}
        return self.kept.get("replay", asked, lambda: self._replay(events, load, replayers, seconds))

    def _replay(self, events: int, load: Load, replayers: int, seconds: float) -> Figures:
        self.log(f"replay of {events:,} events")
        path = self._finished(events)
        chunks = self._events(path) - self._around(path)
        # Every event is looked at, once; the clock is for the others, of whom this process then is no bound.
        checked = self._read_whole(path, chunks, light=False)
        rates = [self._read_whole(path, chunks, light=True) for _ in range(1 if self.given.quick else REPLAY_ROUNDS)]
        alone = median(each["events_per_s"] for each in rates)
        self.log(f"  one reader: {alone:,.0f} events/s; {replayers} at once beside {load}")
        live = self._beside(load, path, replayers, seconds)
        limits = [
            Bar("replay: lost, doubled, mismatched", sum(each["wrong"] for each in [checked, *rates]), 0),
            Bar("replay: events to one reader", round(alone), BAR_REPLAY, "events/s", at_most=False),
            Bar("replay: the same, goal", round(alone), GOAL_REPLAY, "events/s", at_most=False),
            Bar(f"replay: p99 of live readers beside {replayers}", live["meanwhile_p99_ms"], BAR_STORM_P99_MS, "ms"),
            Bar("replay: live readers, lost, doubled, mismatched", live["wrong"], 0),
        ]
        return {
            "events": events, "events_per_s": round(alone), "rounds": rates, "checked": checked, "beside": live,
            "bars": [each.as_dict() for each in limits],
        }  # fmt: skip

    def _finished(self, events: int) -> str:
        """Return the path of a run that has ended after so many events. It was said, and then made longer in its rows."""
        load = Load(1, 1, 100.0, 0.1)
        self.stage.model("hold")
        (path,) = self.longhaul.begin(load)
        self.stage.begin(load)
        self.longhaul.end(whole=True)
        self.stage.rig.connection.execute(_LONGER.format(run=_run_of(path), events=events).encode())
        self.stage.rig.connection.execute("ANALYZE longhaul_runs_event")
        return path

    def _events(self, path: str) -> int:
        return self._number("SELECT last_seq FROM longhaul_runs_run WHERE id = %s", path)

    def _around(self, path: str) -> int:
        return self._number("SELECT count(*) FROM longhaul_runs_event WHERE run_id = %s AND type <> 'text.delta'", path)

    def _number(self, query: str, path: str) -> int:
        row = self.stage.rig.connection.execute(query.encode(), [_run_of(path)]).fetchone()
        assert row is not None
        return int(row[0])

    def _read_whole(self, path: str, chunks: int, *, light: bool) -> Figures:
        with self.stage.readers(
            self.longhaul, self.key, [path], "replay", readers=1, chunks=chunks, light=light
        ) as reader:
            reader.wait("open", WAIT)
            meter = Meter(self.stage.rig, {"readers": [reader]})
            seen = reader.wait("seen", DRAIN)
            cpu, _ = meter.stop()
        ((begun, done, frames),) = seen["whole"]
        return {
            "light": light, "frames": frames, "seconds": round((done - begun) / 1e6, 3),
            "events_per_s": round(frames / ((done - begun) / 1e6)),
            "wrong": seen["lost"] + seen["doubled"] + seen["gaps"] + abs(frames - self._events(path)),
            "cpu": {role: round(share, 3) for role, share in sorted(cpu.items())},
        }  # fmt: skip

    def _beside(self, load: Load, path: str, replayers: int, seconds: float) -> Figures:
        """Let many replay at once beside a live load, for so many seconds or until all have read everything."""
        before = load.seconds / 4
        self.stage.model("hold")
        paths = self.longhaul.begin(load)
        with self.stage.readers(
            self.longhaul, self.key, paths, "live", readers=load.readers, chunks=load.chunks
        ) as live:
            live.wait("open", WAIT)
            at = self.stage.begin(load)
            until_us(at + int(before * 1e6))
            with self.stage.readers(
                self.longhaul, self.key, [path], "replay", readers=replayers, opening=replayers, light=True
            ) as crowd:
                meter = Meter(self.stage.rig, {"readers": [live], "replayers": [crowd]})
                try:
                    seen = crowd.wait("seen", timedelta(seconds=seconds))
                except TimeoutError:
                    crowd.tell({"stop": True})
                    seen = crowd.wait("seen", WAIT)
                cpu, _ = meter.stop()
            told = live.wait("seen", DRAIN)
            chunks = Chunks.read([live.records])
        self.longhaul.end(whole=True)
        begun, ended = seen["begun_us"], seen["ended_us"]
        earlier, meanwhile = chunks.ages(at + 1_000_000, begun), chunks.ages(begun, ended)
        return {
            "replayers": replayers, "live": str(load),
            "replayed_per_s": round(seen["frames"] / ((ended - begun) / 1e6)), "whole": len(seen["whole"]),
            "seconds": round((ended - begun) / 1e6, 1),
            "before_p50_ms": percentile_ms(earlier, 50), "before_p99_ms": percentile_ms(earlier, 99),
            "meanwhile_p50_ms": percentile_ms(meanwhile, 50), "meanwhile_p99_ms": percentile_ms(meanwhile, 99),
            "wrong": wrong(told) + seen["lost"] + seen["doubled"],
            "cpu": {role: round(share, 3) for role, share in sorted(cpu.items())},
        }  # fmt: skip

    # --- a storm ----------------------------------------------------------------------------------------------------

    def storm(self) -> Figures:
        load = replace(self.load, cut=None)
        if not self.given.quick:
            load = replace(load, seconds=max(load.seconds, 30.0))
        return self.kept.get("storm", load.asked(), lambda: self._storm(load))

    def _storm(self, load: Load) -> Figures:
        staying = max(1, load.readers * STORM_LIVE // REFERENCE.readers)
        self.log(f"storm: {load}, and {staying} who stay")
        self.stage.model("hold")
        paths = self.longhaul.begin(load)
        given: dict[str, Any] = {"chunks": load.chunks}
        with (
            self.stage.readers(self.longhaul, self.key, paths, "live", readers=staying, **given) as live,
            self.stage.readers(self.longhaul, self.key, paths, "cut", readers=load.readers, **given) as crowd,
        ):
            live.wait("open", WAIT)
            crowd.wait("open", WAIT)
            at = self.stage.begin(load)
            until_us(at + int(load.seconds / 4 * 1e6))
            meter = Meter(self.stage.rig, {"readers": [live, crowd]})
            crowd.tell({"storm": STORM_WITHIN})
            until_us(at + int((load.seconds / 4 + min(5.0, load.seconds / 2)) * 1e6))
            cpu, _ = meter.stop()
            seen, told = crowd.wait("seen", DRAIN), live.wait("seen", DRAIN)
            chunks = Chunks.read([live.records])
        self.longhaul.end(whole=True)
        moments = seen["storm"]
        if not moments:
            raise RigError("No reader was there to be cut: the runs were over.")
        first, last = min(cut for cut, _ in moments), max(back for _, back in moments)
        times = sorted(back - cut for cut, back in moments)
        caught_up = all(back for _, back in moments)
        until = max(last, first + 1_000_000)
        earlier, meanwhile = chunks.ages(at + 1_000_000, first), chunks.ages(first, until)
        digests: dict[str, set[str]] = {}
        for each in (told, seen):
            for path, found in each["digests"].items():
                digests.setdefault(path, set()).update(found)
        mismatched = sum(len(each) - 1 for each in digests.values())
        lost, doubled = told["lost"] + seen["lost"], told["doubled"] + seen["doubled"]
        seconds = round((last - first) / 1e6, 2) if caught_up else None
        p99 = percentile_ms(meanwhile, 99)
        limits = [
            Bar("storm: lost, doubled, mismatched", lost + doubled + mismatched, 0),
            Bar("storm: until all have caught up", seconds, BAR_STORM_SECONDS, "s"),
            Bar("storm: p99 of live readers meanwhile", p99, BAR_STORM_P99_MS, "ms"),
        ]
        return {
            "readers": load.readers, "runs": load.runs, "rate": load.rate, "cuts": len(moments), "staying": staying,
            "lost": lost, "doubled": doubled, "mismatched": mismatched, "all_caught_up_s": seconds,
            "caught_up_p50_ms": percentile_ms(times, 50), "caught_up_p99_ms": percentile_ms(times, 99),
            "live_before_p99_ms": percentile_ms(earlier, 99), "live_p50_ms": percentile_ms(meanwhile, 50), "live_p99_ms": p99,
            "cpu": {role: round(share, 3) for role, share in sorted(cpu.items())},
            "bars": [each.as_dict() for each in limits],
        }  # fmt: skip


def _run_of(path: str) -> str:
    return path.split("/")[3]


def wrong(seen: Figures) -> int:
    """Return how many faults readers found."""
    mismatched = sum(len(each) - 1 for each in seen["digests"].values())
    return int(seen["lost"] + seen["doubled"] + seen["gaps"] + mismatched)


def sound(name: str, found: Figures) -> list[Bar]:
    before = f"{name}: " if name else ""
    faults = found["lost"] + found["doubled"] + found["mismatched"] + found["gaps"]
    return [Bar(f"{before}lost, doubled, mismatched", faults, 0)]


def worst(limits: Sequence[Bar]) -> list[Bar]:
    """Return one bar of each name: the one with the most."""
    found: dict[str, Bar] = {}
    for each in limits:
        if each.name not in found or (each.value or 0) > (found[each.name].value or 0):
            found[each.name] = each
    return list(found.values())


PARTS = ("reference", "curve", "hard", "peer", "replay", "storm")


def wanted(given: argparse.Namespace) -> list[str]:
    """Return the parts that were asked for; the reference load where none was."""
    if given.all:
        given.peer = given.peer or "relay"
        return list(PARTS)
    asked = {
        "curve": given.curve, "hard": given.hard, "peer": given.peer and not (given.curve or given.hard),
        "replay": given.replay is not None, "storm": given.storm,
    }  # fmt: skip
    return [part for part in PARTS if asked.get(part)] or ["reference"]


def measure(given: argparse.Namespace, console: Console) -> Figures:
    if given.quick:
        given.readers, given.runs, given.seconds = min(given.readers, 100), min(given.runs, 20), min(given.seconds, 6.0)
        given.step_seconds = min(given.step_seconds, 3.0)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # of the web process too, which inherits it
    parts = wanted(given)
    most_runs = max(given.runs, HARD[1].runs if "hard" in parts and not given.quick else 40)
    with Rig(SERVER) as rig:
        prepare(rig)
        stage = Stage(rig, console)
        longhaul = Longhaul(rig, most_runs, given.agents)
        bench = Bench(stage, longhaul, Kept(given.keep), given, console.log)
        console.log("warm-up")
        stage.carry(longhaul, longhaul.key, Load(20, 2, 5.0, 1.0))
        found: Figures = {}
        for part in parts:
            found[part] = getattr(bench, part)()
        violations = check_invariants()
    limits = [bar for part in parts for bar in found[part].pop("bars")]
    limits.append(Bar("violated invariants", violations, 0).as_dict())
    flat = found.pop("reference", {})
    return {"benchmark": "streams", "parts": parts, **flat, **found, "violations": violations, "bars": limits}


# --- tables ---------------------------------------------------------------------------------------------------------------------


def _loads(title: str, loads: Sequence[Figures]) -> Table:
    table = Table(title=title)
    for heading in (
        "form", "readers x runs x rate", "carried/s", "of", "p50 ms", "p99 ms", "lost, doubled, mismatched", "cores",
        "us a chunk", "by process", "apart", "model late p99",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for each in loads:
        roles = (
            RELAYS
            if each["form"] == "relay"
            else tuple(r for r in each["cpu"] if r not in (*APART, "relay", "relay web"))
        )
        table.add_row(
            each["form"], f"{each['readers']} x {each['runs']} x {each['rate']:g}", f"{each['carried_per_s']:,.0f}",
            f"{each['offered_per_s']:,.0f}", str(each["p50_ms"]), str(each["p99_ms"]),
            f"{each['lost']}, {each['doubled']}, {each['mismatched']}", f"{each['cores']:.2f}", str(each["cpu_us_per_chunk"]),
            ", ".join(f"{role} {each['cpu'].get(role, 0):.2f}" for role in roles),
            ", ".join(f"{role} {each['cpu'].get(role, 0):.2f}" for role in APART), f"{each['model_late_p99_ms']} ms",
        )  # fmt: skip
    return table


def _picture(name: str, curve: Figures) -> Table:
    """Draw a curve: a row a step, p99 as a bar on a logarithmic scale from 10 ms to 10 s."""
    table = Table(
        title=f"{name}: first to saturate is {curve['first']}; most carried: {curve['most_carried_per_s']:,.0f} chunks/s"
    )
    for heading in ("offered/s", "carried/s", "p50 ms", "p99 ms"):
        table.add_column(heading, justify="right")
    table.add_column("p99: 10 ms · 100 ms · 1 s · 10 s")
    table.add_column("cores")
    for each in curve["steps"]:
        tens = math.log10(max(each["p99_ms"] or 10, 10) / 10)
        cores = ", ".join(f"{role} {share:.2f}" for role, share in sorted(each["cpu"].items(), key=lambda e: -e[1])[:6])
        table.add_row(
            f"{each['offered_per_s']:,.0f}", f"{each['carried_per_s']:,.0f}", str(each["p50_ms"]), str(each["p99_ms"]),
            "█" * max(1, round(min(tens, 3) * 11)), cores,
        )  # fmt: skip
    return table


def _pairs(title: str, found: Figures, names: Sequence[str]) -> Table:
    table = Table(title=title, show_header=False)
    for name in names:
        value = found[name]
        if isinstance(value, dict):
            value = ", ".join(f"{key} {each:g}" for key, each in value.items())
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    return table


def tables(found: Figures) -> list[Table]:
    shown = []
    if "lost" in found:
        shown.append(_loads("the load, cut: " + found["cut"], [found]))
        shown.append(_pairs("web", found, ["kb_per_reader", "web", "cuts", "deliveries_per_s", "cpu_us_per_delivery"]))
    for name, curve in found.get("curve", {}).items():
        shown.append(_picture(name, curve))
    if hard := found.get("hard"):
        beside = hard.get("relay", {})
        shown.append(_loads("the hard load", [hard["steady"], hard["most"], *beside.values()]))
        shown.append(_pairs("who is first", {k: hard[k]["first"] for k in ("steady", "most")}, ["steady", "most"]))
    if peer := found.get("peer"):
        shown.append(
            _loads(f"beside a relay that gathers {peer['gather_ms']:g} ms", [*peer["longhaul"], *peer["relay"]])
        )
        shown.append(_pairs(f"Longhaul to relay, medians of n = {peer['n']}", peer, ["ratio"]))
    if replay := found.get("replay"):
        shown.append(_pairs(f"replay of {replay['events']:,} events", replay, ["events_per_s"]))
        beside = replay["beside"]
        shown.append(_pairs(f"beside {beside['live']}", beside, [key for key in beside if key != "live"]))
    if storm := found.get("storm"):
        shown.append(_pairs("storm", storm, list(storm)))
    return [*shown, bars.table(found["bars"])]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streams", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readers", type=int, default=REFERENCE.readers)
    parser.add_argument("--runs", type=int, default=REFERENCE.runs)
    parser.add_argument("--rate", type=float, default=REFERENCE.rate, help="chunks a second, of each run")
    parser.add_argument("--seconds", type=float, default=REFERENCE.seconds, help="that each run speaks")
    parser.add_argument("--cut", choices=["none", "random"], default="none", help="reset the readers' connections")
    parser.add_argument(
        "--curve", action="store_true", help="raise the rate to saturation; with --peer, the peer's too"
    )
    parser.add_argument("--step-seconds", type=float, default=10.0, help="of each step of the curve")
    parser.add_argument(
        "--hard", action="store_true", help="20 and 200 streams of 100 tokens/s; with --peer, the peer's too"
    )
    parser.add_argument("--peer", choices=["relay"], help="the same load, by turns, through a relay over Redis streams")
    parser.add_argument("--gather-ms", type=float, default=5.0, help="that the relay gathers; 0: one XADD a chunk")
    parser.add_argument("--rounds", type=int, default=3, help="of --peer")
    parser.add_argument(
        "--replay", type=int, nargs="?", const=100_000, metavar="EVENTS", help="a finished run of so many"
    )
    parser.add_argument("--storm", action="store_true", help="cut all readers within a second")
    parser.add_argument("--agents", type=int, default=1, help="agents workers (default 1)")
    parser.add_argument("--all", action="store_true", help="every part, one after another")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="keep each part's figures, and measure none that is there"
    )
    return command.run(
        parser, measure, tables, arguments, quick="at most 100 readers of 20 runs, short; a minute a part"
    )


if __name__ == "__main__":
    sys.exit(main())
