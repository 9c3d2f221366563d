"""The rows and processes of the model. All are values: a move copies the world and replaces what it changes."""

from __future__ import annotations

from typing import NamedTuple

# Runs: held, queued, running, waiting, requires_action; completed, failed, cancelled.
HELD, QUEUED, RUNNING, WAITING, ACTION = "H", "Q", "R", "W", "A"
COMPLETED, FAILED, CANCELLED = "C", "F", "X"
OCCUPYING = frozenset("QRWA")
WAITS = frozenset("WA")
TERMINAL = frozenset("CFX")

# Calls: not made, requested, running, unknown, settled.
UNMADE, REQUESTED, EXECUTING, UNKNOWN, SETTLED = "-", "r", "g", "u", "s"
OPEN = frozenset("rgu")

# linger_until: none, ahead, passed. next_publish_at: none, due, a second after linger_until.
NONE, AHEAD, PASSED = 0, 1, 2
NEVER, DUE, AFTER_LINGER = 0, 1, 2

# A holder that is no process any more: its lock is free; at first its beat still looks fresh. `LEFT` has no row.
JUST_DEAD, DEAD, LEFT = "dead now", "dead", "left"

Holder = int | str | None
# A leg in its process: (where it is, run, epoch, leg). A tool's attempt: (where it is, call, round, attempt).
# Legs: `b` at a boundary, `h` its budget is used, `m` the model speaks, `w` it says nothing any more, `n` its answer is whole, `e` it failed,
# `l` lingers, `g` gives up. Attempts: `x` to be executed, `s` to be settled; `z`, `Z` are of a break.
Job = tuple[str, int, int, int]
# A message: ("run", run, dispatch_seq, 0) or ("call", call, round, attempt).
Message = tuple[str, int, int, int]


class Run(NamedTuple):
    status: str
    epoch: int = 0
    seq: int = 0
    holder: Holder = None
    step: int = 0
    lost: int = 0
    tries: int = 0
    late: bool = False  # not_before is ahead
    pending: bool = False
    legs: tuple[int, ...] = ()  # the open ones, by the epoch of their first claim
    linger: int = NONE
    due: int = NEVER
    joined: bool = True
    ended: bool = False  # its terminal event is written
    bare: bool = False  # claimed after that: its holder lives, though its lock is free
    flagged: bool = False  # only in a break


class Call(NamedTuple):
    """A call of the first run. `kind`: I idempotent, P plain, N idempotent=False, @ atomic, B one that the model got wrong."""

    kind: str
    status: str = UNMADE
    round: int = 0  # the step that made it
    attempt: int = 1
    holder: Holder = None
    effect: int = 0
    outcome: str = ""
    late: bool = False
    bare: bool = False


class Process(NamedTuple):
    """An agents (A) or tools (T) worker. `cut`: what it suffered since its claim: 1 lost its lock, 2 missed a beat."""

    kind: str
    up: str = "up"  # up, stalled, down
    lock: bool = True
    beat: int = 0  # 0 fresh, 1 missed, 2 past the TTL
    draining: bool = False
    taken: bool = False  # its lock was seen free, and what it held then was taken or is about to be
    doomed: bool = False  # the watcher saw it dead, and nothing of it left to take
    closed: bool = False  # its life is over (gone_at), whatever the process thinks
    jobs: tuple[Job, ...] = ()
    cut: int = 0


class Left(NamedTuple):
    """How often what comes from outside may still happen."""

    faults: int = 0
    errors: int = 0  # of the model, or of a tool that may be tried again
    budgets: int = 0
    drains: int = 0
    cancels: int = 0
    starts: int = 0
    deletes: int = 0


Key = tuple[
    tuple[Run, ...], tuple[Call, ...], tuple[Process, ...], frozenset[Message], Left, bool, tuple[int, ...] | None, int
]


class World:
    """Everything there is. Mutable only between its copy and its key."""

    __slots__ = ("bad", "calls", "gone", "left", "messages", "processes", "runs", "saw", "stale")

    def __init__(self, key: Key) -> None:
        (
            self.runs,
            self.calls,
            self.processes,
            self.messages,
            self.left,
            self.gone,  # the thread was deleted
            self.saw,  # only in breaks: what somebody read before the lock
            self.stale,  # only in a break: a call, counted from 1, that a second sweeper believes orphaned
        ) = key
        self.bad = ""

    def key(self) -> Key:
        return (
            self.runs,
            self.calls,
            self.processes,
            self.messages,
            self.left,
            self.gone,
            self.saw,
            self.stale,
        )

    def run(self, number: int, **changes: object) -> None:
        runs = self.runs
        self.runs = (*runs[:number], runs[number]._replace(**changes), *runs[number + 1 :])  # type: ignore[arg-type]

    def call(self, number: int, **changes: object) -> None:
        calls = self.calls
        self.calls = (*calls[:number], calls[number]._replace(**changes), *calls[number + 1 :])  # type: ignore[arg-type]

    def process(self, number: int, **changes: object) -> None:
        all = self.processes
        self.processes = (*all[:number], all[number]._replace(**changes), *all[number + 1 :])  # type: ignore[arg-type]

    def job(self, process: int, old: Job | None, new: Job | None) -> None:
        """Put a job in the place of another in its process; None: there is none."""
        jobs = list(self.processes[process].jobs)
        if old is not None:
            jobs.remove(old)
        if new is not None:
            jobs.append(new)
            jobs.sort()
        self.process(process, jobs=tuple(jobs))

    def holders(self) -> list[Holder]:
        """Who holds each run, then each call."""
        return [*(run.holder for run in self.runs), *(call.holder for call in self.calls)]

    def fail(self, why: str) -> None:
        self.bad = self.bad or why

    def rename(self, names: dict[Holder, Holder]) -> None:
        """Give holders other names, in every row."""
        for number, run in enumerate(self.runs):
            if run.holder in names:
                self.run(number, holder=names[run.holder])
        for number, call in enumerate(self.calls):
            if call.holder in names:
                self.call(number, holder=names[call.holder])


def canonical(world: World) -> None:
    """Fold worlds that differ in names only.

    Epochs, legs and dispatch numbers count from the run's present ones; a message that can match no row any more is gone,
    for whoever gets it does nothing; twin processes are in order; what may still come from outside does not matter
    when everything has ended.
    """
    runs, calls = world.runs, world.calls
    for number, process in enumerate(world.processes):
        if process.kind == "A" and process.jobs:
            jobs = []
            for job in process.jobs:
                at, its_run, epoch, leg = job
                run = runs[its_run]
                jobs.append((at, its_run, int(epoch == run.epoch), int(leg in run.legs)))
            jobs.sort()
            if process.jobs != (folded := tuple(jobs)):
                world.process(number, jobs=folded)
        elif process.cut and not process.jobs and number not in world.holders():
            world.process(number, cut=0)
    if world.messages:
        kept = []
        for message in world.messages:
            if message[0] == "run":
                run = runs[message[1]]
                ahead = message[2] - run.seq
                if ahead > 0 or (ahead == 0 and run.status == QUEUED):
                    kept.append(message if run.seq == 1 else ("run", message[1], ahead + 1, 0))
            else:
                call = calls[message[1]]
                named, present = message[2:], (call.round, call.attempt)
                if named > present or (named == present and call.status == REQUESTED):
                    kept.append(message)
        world.messages = frozenset(kept)
    for number, run in enumerate(runs):
        legs = (1,) * len(run.legs)
        if run.seq and (run.epoch != 1 or run.seq != 1 or run.legs != legs):
            world.run(number, epoch=1, seq=1, legs=legs)
    if not world.left.starts and all(run.ended for run in runs):
        world.left = Left()
    for number in range(len(world.processes) - 1):
        here, there = world.processes[number : number + 2]
        if here.kind == there.kind and _rank(world, number) > _rank(world, number + 1):
            world.processes = (*world.processes[:number], there, here, *world.processes[number + 2 :])
            world.rename({number: number + 1, number + 1: number})


def _rank(world: World, number: int) -> tuple[object, ...]:
    return (world.processes[number], [holder == number for holder in world.holders()])
