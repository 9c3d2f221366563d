"""Who may do what when. `moves(world)` yields (what, by whom, next world).

By whom: P the protocol's own (workers, clocks, the watcher's look at what is due), S the sweep, E people and models,
X a fault, Z a stopped process that wakes. Only P and S must lead to an end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from tests.model.rows import (
    AFTER_LINGER,
    AHEAD,
    DEAD,
    DUE,
    EXECUTING,
    JUST_DEAD,
    LEFT,
    OCCUPYING,
    PASSED,
    QUEUED,
    REQUESTED,
    RUNNING,
    WAITS,
    Holder,
    Job,
    Message,
    Process,
    World,
)
from tests.model.rules import Published, Rules

Move = tuple[str, str, World]
Transaction = Callable[[World], Published | None]
PLUS = "+"  # before a job: its messages went out before its commit (a break)


class Moves:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.scenario = rules.scenario
        self.broken = rules.broken

    def of(self, world: World) -> Iterator[Move]:
        """Yield every move of a state."""
        self._world = world
        self._key = world.key()
        faulty = world.left.faults > 0
        self._crash = faulty and "crash" in self.scenario.kinds
        self._ack = faulty and "ack" in self.scenario.kinds
        yield from self._messages()
        for number, process in enumerate(world.processes):
            if process.up == "up":
                if process.kind == "A":
                    yield from self._legs(number, process)
                else:
                    yield from self._attempts(number, process)
                yield from self._give_back(number, process)
                yield from self._shutdown(number, process)
            yield from self._presence(number, process)
        yield from self._clocks()
        if self.scenario.sweep:
            yield from self._sweep()
        yield from self._people()

    # -- forms of a move --

    def _name(self, number: int) -> str:
        process = self._world.processes[number]
        return ("agents" if process.kind == "A" else "tools") + f"-{number}"

    def _copy(self) -> World:
        return World(self._key)

    def _act(self, what: str, who: str, change: Callable[[World], object]) -> Move:
        world = self._copy()
        change(world)
        if who == "X":
            world.left = world.left._replace(faults=world.left.faults - 1)
        return what, who, world

    def _commit(self, what: str, who: str, transaction: Transaction, process: int | None = None) -> Iterator[Move]:
        """A transaction and its messages; then the same with an answer lost, or killed between commit and publish."""
        world = self._copy()
        published = transaction(world)
        world.messages |= frozenset(published or ())
        yield what, who, world
        if process is None or published is None:
            return
        if self._crash and published:
            world = self._copy()
            transaction(world)
            self._kill(world, process)
            world.left = world.left._replace(faults=world.left.faults - 1)
            yield f"{what}, and is killed before it publishes", "X", world

    def _unanswered(self, what: str, transaction: Transaction, process: int, keeps: Job | None) -> Iterator[Move]:
        """The same, and the answer of its COMMIT is lost: the leg ends; a tool's settlement is asked for again (`keeps`)."""
        if not self._ack:
            return
        world = self._copy()
        had = world.processes[process].jobs
        if transaction(world) is None:
            return
        for job in world.processes[process].jobs:
            if job not in had:
                world.job(process, job, None)
                break
        if keeps is not None:
            world.job(process, None, keeps)
        world.left = world.left._replace(faults=world.left.faults - 1)
        yield f"{what}; the answer is lost", "X", world

    def _leg_write(self, what: str, who: str, transaction: Transaction, process: int, job: Job) -> Iterator[Move]:
        """A write of a leg, with its faults."""
        if "publish_before_commit" in self.broken and not job[0].startswith(PLUS):
            world = self._copy()
            published = transaction(world)
            if published:
                early = self._copy()
                early.messages |= frozenset(published)
                early.job(process, job, (PLUS + job[0], *job[1:]))
                yield f"{what}: publishes", who, early
                return
        yield from self._commit(what, who, transaction, process)
        yield from self._unanswered(what, transaction, process, None)

    # -- messages --

    def _messages(self) -> Iterator[Move]:
        world = self._world
        faulty = world.left.faults > 0
        for message in sorted(world.messages):
            kind, number, first, second = message
            name = f"run {number + 1}" if kind == "run" else f"call {number + 1}"
            for index, process in enumerate(world.processes):
                if process.up != "up" or process.kind != ("A" if kind == "run" else "T"):
                    continue
                if process.draining:
                    # What comes before the worker stops consuming is passed on: the message is where it was.
                    if kind == "run" and process.jobs and "drain_drops_messages" in self.broken:
                        yield self._act(
                            f"{self._name(index)} drains and drops the message of {name}", "P", _drop(message)
                        )
                    continue
                if len(process.jobs) >= (2 if kind == "run" else 1):
                    continue
                if process.closed or (process.beat and "claim_while_absent" not in self.broken):
                    continue

                def claim(
                    after: World, index: int = index, message: Message = message, kind: str = kind
                ) -> Published | None:
                    after.messages -= {message}
                    if kind == "run":
                        return self.rules.claim(after, index, message[1], message[2])
                    return self.rules.claim_call(after, index, message[1], message[2], message[3])

                if claim(self._copy()) is None:
                    continue
                what = f"{self._name(index)} claims {name}"
                yield from self._commit(what, "P", claim, index)
                yield from self._unanswered(what, claim, index, None)
            ahead = (
                first > world.runs[number].seq
                if kind == "run"
                else (first, second) > (world.calls[number].round, world.calls[number].attempt)
                or world.calls[number].status != REQUESTED
            )
            if ahead:
                yield self._act(f"the message of {name} finds no row", "P", _drop(message))
            if faulty and "lose" in self.scenario.kinds:
                yield self._act(f"the message of {name} is lost", "X", _drop(message))

    # -- agents workers --

    def _legs(self, number: int, process: Process) -> Iterator[Move]:
        rules, name = self.rules, self._name(number)
        for job in process.jobs:
            at, run_number, epoch, leg = job
            this = f"{name}, run {run_number + 1}:"
            if at.startswith(PLUS):
                plain: Job = (at[1:], run_number, epoch, leg)

                def late(after: World, job: Job = job, plain: Job = plain) -> Published | None:
                    after.job(number, job, plain)
                    write = rules.commit if plain[0] == "n" else None
                    if write is None:
                        reason = "retry" if plain[0] == "e" else "budget" if plain[0] == "h" else "drained"
                        published = rules.requeue(after, number, plain, reason)
                    else:
                        published = write(after, number, plain)
                    return None if published is None else []

                yield from self._commit(f"{this} commits", "P", late)
                continue
            if at == "b":
                if process.draining:
                    yield from self._hand_over(this, number, job, "drained")
                else:
                    yield from self._leg_write(
                        f"{this} opens a turn",
                        "P",
                        partial(rules.open_turn, process=number, job=job),
                        number,
                        job,
                    )
            elif at == "h":
                yield from self._hand_over(this, number, job, "drained" if process.draining else "budget")
            elif at == "m":
                yield self._act(f"{this} the model has spoken", "P", _step(number, job, ("n", run_number, epoch, leg)))
                if self._world.left.errors:
                    yield self._act(f"{this} the model fails", "E", _error(number, job, ("e", run_number, epoch, leg)))
                if self._world.left.faults and "hang" in self.scenario.kinds:
                    yield self._act(
                        f"{this} the model falls silent", "X", _step(number, job, ("w", run_number, epoch, leg))
                    )
                if process.draining:
                    yield from self._hand_over(f"{this} the grace is over,", number, job, "drained")
            elif at == "w":
                if process.draining and "drain_waits_for_streams" not in self.broken:
                    yield from self._hand_over(f"{this} the grace is over,", number, job, "drained")
                if self._world.runs[run_number].epoch != epoch or self._world.runs[run_number].status != RUNNING:
                    yield self._act(f"{this} its fence is gone, it is stopped", "P", _step(number, job, None))
            elif at == "n":
                if process.draining and "drain_drops_whole_answer" in self.broken:
                    yield from self._hand_over(this, number, job, "drained")
                    continue
                yield from self._leg_write(
                    f"{this} commits its step",
                    "P",
                    partial(rules.commit, process=number, job=job),
                    number,
                    job,
                )
            elif at == "e":
                yield from self._hand_over(this, number, job, "retry")
            elif at == "l":
                yield from self._linger(this, number, process, job)
            elif at == "g":
                yield from self._leg_write(
                    f"{this} gives up lingering",
                    "P",
                    partial(rules.give_up, process=number, job=job),
                    number,
                    job,
                )

    def _hand_over(self, this: str, number: int, job: Job, reason: str) -> Iterator[Move]:
        def write(after: World) -> Published | None:
            return self.rules.requeue(after, number, job, reason)

        yield from self._leg_write(f"{this} hands over ({reason})", "P", write, number, job)

    def _linger(self, this: str, number: int, process: Process, job: Job) -> Iterator[Move]:
        _, run_number, epoch, leg = job
        run = self._world.runs[run_number]
        gives_up: Job = ("g", run_number, epoch, leg)
        own = leg in run.legs
        if process.draining and "drain_lingers_on" not in self.broken:
            yield self._act(f"{this} stops lingering, for its worker drains", "P", _step(number, job, gives_up))
        waits = own and run.status in WAITS
        if not waits or "lingerer_claims_too_early" in self.broken:
            choices = [True]
            if self._world.left.budgets and own and run.status == QUEUED:
                choices.append(False)
            for opens in choices:

                def look(after: World, opens: bool = opens) -> Published | None:
                    if not opens:
                        after.left = after.left._replace(budgets=after.left.budgets - 1)
                    return self.rules.look(
                        after, number, job, opens=opens, present=not process.beat and not process.closed
                    )

                what = f"{this} looks" + (" and claims" if own and run.status == QUEUED else ", its leg is over")
                yield from self._commit(what + ("" if opens else ", its budget is used"), "P", look)
                yield from self._unanswered(what, look, number, None)
        over = run.linger != AHEAD or "last_look_too_early" in self.broken
        if over and (waits or (own and "no_last_look" in self.broken)):
            what = f"{this} takes its last look" if waits else f"{this} does not look again"
            if "lingerer_just_goes" in self.broken:
                yield self._act(f"{what} and goes", "P", _step(number, job, None))
            else:
                yield self._act(what, "P", _step(number, job, gives_up))

    # -- tools workers --

    def _attempts(self, number: int, process: Process) -> Iterator[Move]:
        rules, name = self.rules, self._name(number)
        for job in process.jobs:
            at, index, round, attempt = job
            this = f"{name}, call {index + 1}:"
            if at == "x":

                def execute(after: World, job: Job = job) -> None:
                    after.job(number, job, ("s", *job[1:]))
                    rules.executed(after, number, job[1])

                yield self._act(f"{this} the tool runs", "P", execute)
                continue
            if at == "s" and "settle_without_run_lock" in self.broken:
                others = [call for other, call in enumerate(self._world.calls) if other != index]
                last = all(call.status == "s" for call in others)
                yield self._act(
                    f"{this} looks at the siblings",
                    "P",
                    _step(number, job, ("Z" if last else "z", index, round, attempt)),
                )
                continue

            def settle(after: World, job: Job = job) -> Published | None:
                return rules.settle(after, number, job)

            yield from self._commit(f"{this} settles", "P", settle, number)
            yield from self._unanswered(f"{this} settles", settle, number, job)
            if self._world.left.errors and attempt < 2 and self._world.calls[index].kind != "N":

                def retry(after: World, job: Job = job) -> Published | None:
                    after.left = after.left._replace(errors=after.left.errors - 1)
                    return rules.retry_call(after, number, job)

                yield from self._commit(f"{this} fails, to be tried again", "E", retry, number)

    # -- processes --

    def _give_back(self, number: int, process: Process) -> Iterator[Move]:
        """What the register does not know is given back."""
        if "no_give_back" in self.broken or not process.lock:
            return
        for run_number, run in enumerate(self._world.runs):
            if run.status == RUNNING and run.holder == number:
                known = any(job[1] == run_number and job[2] == run.epoch and job[0] not in "lg" for job in process.jobs)
                if not known:
                    yield from self._commit(
                        f"{self._name(number)} gives back run {run_number + 1}",
                        "P",
                        lambda after, run_number=run_number: self.rules.reclaim(after, run_number),  # type: ignore[misc]
                        number,
                    )
        for index, call in enumerate(self._world.calls):
            if call.status == EXECUTING and call.holder == number:
                known = any(job[1:] == (index, call.round, call.attempt) for job in process.jobs)
                if not known:
                    yield from self._commit(
                        f"{self._name(number)} gives back call {index + 1}, whose claim got no answer",
                        "P",
                        lambda after, index=index: self.rules.reclaim_call(after, index, began=False),  # type: ignore[misc]
                        number,
                    )

    def _shutdown(self, number: int, process: Process) -> Iterator[Move]:
        name, left = self._name(number), self._world.left
        if left.drains and not process.draining:

            def term(after: World) -> None:
                after.left = left._replace(drains=left.drains - 1)
                after.process(number, draining=True)

            yield self._act(f"{name} gets SIGTERM", "E", term)
        if not process.draining:
            return
        if not process.jobs:
            yield self._act(f"{name} leaves, its presence last", "P", lambda after: _end(after, number, LEFT))
        elif "drain_releases_presence_first" in self.broken and process.lock:
            yield self._act(f"{name} releases its presence", "P", lambda after: after.process(number, lock=False))
        elif "drain_forgets_calls" in self.broken and process.kind == "T":
            what = f"{name} leaves in the middle of its call"
            yield self._act(what, "P", lambda after: _end(after, number, LEFT))

    def _kill(self, world: World, number: int) -> None:
        _end(world, number, JUST_DEAD if world.processes[number].beat == 0 else DEAD)

    def _presence(self, number: int, process: Process) -> Iterator[Move]:
        name, world = self._name(number), self._world
        holds = bool(process.jobs) or number in world.holders()
        if process.up == "down":
            yield self._act(f"{name} is started again", "P", lambda after: after.process(number, up="up", lock=True))
            return
        leaving = process.draining and "drain_releases_presence_first" in self.broken
        if process.up == "up" and process.closed and not holds:
            # It may begin a new life sooner; what its old one holds stays with that one, which is what matters here.
            yield self._act(
                f"{name} begins a new life",
                "P",
                lambda after: after.process(number, lock=True, beat=0, taken=False, closed=False),
            )
        elif process.up == "up" and (not process.lock or process.beat) and not leaving and not process.closed:
            yield self._act(
                f"{name} locks and beats again",
                "P",
                lambda after: after.process(number, lock=True, beat=0, taken=False),
            )
        mute = process.up == "stalled" or not process.lock or process.closed
        if mute and process.beat < 2 and not leaving:

            def silent(after: World) -> None:
                after.process(number, beat=process.beat + 1, cut=2)

            yield self._act(f"{name} is silent", "P", silent)
        if process.up == "stalled":
            yield self._act(f"{name} wakes", "Z", lambda after: after.process(number, up="up"))
            return
        if not world.left.faults or process.kind not in self.scenario.frail:
            return
        if "crash" in self.scenario.kinds:
            yield self._act(f"{name} is killed", "X", lambda after: self._kill(after, number))
        if not holds:
            return
        others = [
            other for index, other in enumerate(world.processes) if index != number and other.kind == process.kind
        ]
        if "stall" in self.scenario.kinds and any(other.up != "stalled" for other in others):
            yield self._act(f"{name} is stopped", "X", lambda after: after.process(number, up="stalled"))
        if "blip" in self.scenario.kinds and process.lock:
            yield self._act(
                f"{name} loses its presence's connection",
                "X",
                lambda after: after.process(number, lock=False, cut=max(process.cut, 1)),
            )

    # -- clocks, watcher, sweep --

    def _clocks(self) -> Iterator[Move]:
        for number, run in enumerate(self._world.runs):
            if run.linger == AHEAD and not run.ended:
                yield self._act(
                    f"linger_until of run {number + 1} passes",
                    "P",
                    lambda after, number=number: after.run(number, linger=PASSED),  # type: ignore[misc]
                )
            if run.late:

                def due(after: World, number: int = number) -> Published:
                    after.run(number, late=False, due=DUE)
                    return [("run", number, after.runs[number].seq, 0)]

                yield from self._commit(f"run {number + 1} may be tried again: the watcher publishes", "P", due)
        for index, call in enumerate(self._world.calls):
            if call.late:

                def again(after: World, index: int = index) -> Published:
                    after.call(index, late=False)
                    call = after.calls[index]
                    return [("call", index, call.round, call.attempt)]

                yield from self._commit(f"call {index + 1} may be tried again: the watcher publishes", "P", again)
        if JUST_DEAD in self._world.holders():
            names: dict[Holder, Holder] = {JUST_DEAD: DEAD}
            yield self._act("a dead worker misses a beat", "P", lambda after: after.rename(names))

    def _lost(self, holder: Holder) -> tuple[bool, bool]:
        """What the watcher sees of a holder: (its lock is free, a beat is missed too or it is past the TTL)."""
        if isinstance(holder, int):
            process = self._world.processes[holder]
            gone = not process.lock or process.closed or process.beat == 2
            silent = process.beat == 2 or (gone and process.beat > 0)
            return gone, silent or (process.closed and "closed_life_at_once" in self.broken)
        return True, holder != JUST_DEAD

    def _sweep(self) -> Iterator[Move]:
        world, rules = self._world, self.rules
        for number, process in enumerate(world.processes):
            # Two moves: a claim that is under way asks whether its life is open before the watcher closes it.
            dead = process.up != "down" and not process.closed and (not process.lock or process.beat == 2)
            if process.doomed and (dead or "close_by_an_old_look" in self.broken):
                yield self._act(
                    f"the watcher closes the life of {self._name(number)}",
                    "P",
                    lambda after, number=number: after.process(number, doomed=False, closed=True),  # type: ignore[misc]
                )
            elif process.doomed:
                yield self._act(
                    f"the watcher finds {self._name(number)} alive again",
                    "P",
                    lambda after, number=number: after.process(number, doomed=False),  # type: ignore[misc]
                )
            elif dead and number not in world.holders():
                yield self._act(
                    f"the watcher finds {self._name(number)} dead, with nothing to take from it",
                    "P",
                    lambda after, number=number: after.process(number, doomed=True, taken=True),  # type: ignore[misc]
                )
        for number, run in enumerate(world.runs):
            due = run.due == DUE or (run.due == AFTER_LINGER and run.linger != AHEAD)
            if run.status == QUEUED and due and not run.late and "no_sweep" not in self.broken:
                message: Message = ("run", number, run.seq, 0)
                if message not in world.messages:
                    yield self._act(f"the sweep publishes run {number + 1} again", "S", _publish(message))
            if run.status == RUNNING:
                gone, missed = self._lost(run.holder)
                gone = gone and self._takes(run.holder, run.bare, missed)
                # leg_deadline passes when the model is silent, and nowhere else, for it leaves room enough
                silent = any(job[:3] == ("w", number, run.epoch) for process in world.processes for job in process.jobs)
                if gone or (silent and "no_leg_deadline" not in self.broken):

                    def take(after: World, number: int = number) -> Published:
                        holder = after.runs[number].holder
                        self._needless(after, holder)
                        if isinstance(holder, int) and not after.processes[holder].lock:
                            after.process(holder, taken=True)
                        return rules.reclaim(after, number)

                    yield from self._commit(f"the sweep reclaims run {number + 1}", "S", take)
        for index, call in enumerate(world.calls):
            if call.status == REQUESTED and not call.late and "no_call_republish" not in self.broken:
                message = ("call", index, call.round, call.attempt)
                if message not in world.messages:
                    yield self._act(f"the sweep publishes call {index + 1} again", "S", _publish(message))
            if call.status == EXECUTING:
                gone, missed = self._lost(call.holder)
                once = self._takes(call.holder, call.bare, missed)
                if (gone and ((call.kind in "I@" and once) or missed)) or "reclaim_without_presence" in self.broken:
                    if "stale_reclaim" in self.broken:
                        yield self._act(
                            f"a second sweep sees call {index + 1} orphaned",
                            "E",
                            lambda after, index=index: setattr(after, "stale", index + 1),  # type: ignore[misc]
                        )

                    def take_call(after: World, index: int = index) -> Published:
                        holder = after.calls[index].holder
                        if isinstance(holder, int) and not after.processes[holder].lock:
                            after.process(holder, taken=True)
                        return rules.reclaim_call(after, index)

                    yield from self._commit(f"the sweep reclaims call {index + 1}", "S", take_call)
                if world.stale == index + 1:

                    def stale(after: World, index: int = index) -> Published:
                        after.stale = 0
                        return rules.reclaim_call(after, index)

                    yield from self._commit(f"the second sweep reclaims call {index + 1}", "E", stale)

    def _takes(self, holder: Holder, bare: bool, missed: bool) -> bool:
        """What a process claims after its lock was seen free is left to it until a beat is missed, or its life is closed."""
        if not bare or missed or not isinstance(holder, int) or "taken_at_every_look" in self.broken:
            return True
        return self._world.processes[holder].closed or self._world.processes[holder].lock

    def _needless(self, after: World, holder: Holder) -> None:
        if isinstance(holder, int) and after.processes[holder].beat == 2 and after.processes[holder].cut < 2:
            after.fail("5: a worker claimed while it was not present, and the run was taken from it")

    # -- people --

    def _people(self) -> Iterator[Move]:
        world, rules = self._world, self.rules
        if world.gone:
            return
        if world.left.cancels:
            for number, run in enumerate(world.runs):
                if not run.ended and not run.flagged:

                    def cancel(after: World, number: int = number) -> Published:
                        after.left = after.left._replace(cancels=after.left.cancels - 1)
                        return rules.cancel(after, number)

                    yield from self._commit(f"run {number + 1} is cancelled", "E", cancel)
        saw = world.saw
        if world.left.starts:
            occupied = any(run.status in OCCUPYING for run in world.runs)
            if "start_without_lock" in self.broken:
                if saw is None and occupied:
                    yield self._act("somebody starts a run and sees the thread occupied", "E", _see((-1,)))
                elif saw == (-1,):

                    def save(after: World) -> Published:
                        after.saw = None
                        return rules.start(after, True)

                    yield from self._commit("the new run is saved as held", "P", save)
                elif not occupied:
                    yield from self._commit("a run is started on the thread", "E", rules.start)
            else:
                yield from self._commit("a run is started on the thread", "E", rules.start)
        if "release_after_commit" in self.broken and saw is not None and saw[0] >= 0:

            def release(after: World) -> Published:
                after.saw = None
                return rules.release(after)

            yield from self._commit("whoever ended the run releases the next", "P", release)
            if world.left.faults:
                yield self._act("whoever ended the run is killed before it releases the next", "X", _see(None))
        if world.left.deletes:
            if "delete_without_lock" in self.broken:
                if saw is None:
                    live = tuple(number for number, run in enumerate(world.runs) if not run.ended)
                    yield self._act("somebody deletes the thread and looks which runs live", "E", _see((-2, *live)))
                elif saw[0] == -2:
                    seen = saw[1:]
                    yield from self._commit("the thread is deleted", "E", lambda after: rules.delete(after, seen))
            else:
                yield from self._commit("the thread is deleted", "E", rules.delete)


def _end(world: World, number: int, name: Holder) -> None:
    """End a process: what it holds names somebody who is no process any more, and who is started again knows nothing."""
    world.rename({number: name})
    world.process(
        number,
        up="down",
        lock=False,
        beat=0,
        draining=False,
        jobs=(),
        cut=0,
        taken=False,
        doomed=False,
        closed=False,
    )


def _drop(message: Message) -> Callable[[World], None]:
    def drop(after: World) -> None:
        after.messages -= {message}

    return drop


def _publish(message: Message) -> Callable[[World], None]:
    def publish(after: World) -> None:
        after.messages |= {message}

    return publish


def _step(number: int, old: Job, new: Job | None) -> Callable[[World], None]:
    return lambda after: after.job(number, old, new)


def _error(number: int, old: Job, new: Job) -> Callable[[World], None]:
    def fail(after: World) -> None:
        after.left = after.left._replace(errors=after.left.errors - 1)
        after.job(number, old, new)

    return fail


def _see(what: tuple[int, ...] | None) -> Callable[[World], None]:
    def see(after: World) -> None:
        after.saw = what

    return see
