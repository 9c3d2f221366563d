"""The transactions. Each stands for a function of the real code, changes a copy of the world and returns the messages that
are published after its commit, or None when its guard found no row.

`self.broken` names the rules that are left out; `scenarios.BREAKS` says of each what it stands for.
"""

from __future__ import annotations

from tests.model.rows import (
    ACTION,
    AFTER_LINGER,
    AHEAD,
    CANCELLED,
    COMPLETED,
    DUE,
    EXECUTING,
    FAILED,
    HELD,
    NEVER,
    NONE,
    OCCUPYING,
    OPEN,
    QUEUED,
    REQUESTED,
    RUNNING,
    SETTLED,
    UNKNOWN,
    WAITING,
    WAITS,
    Call,
    Job,
    Left,
    Message,
    Process,
    Run,
    World,
)
from tests.model.scenarios import Scenario

ATTEMPTS = 3
Published = list[Message]


class Rules:
    def __init__(self, scenario: Scenario, broken: frozenset[str] = frozenset()) -> None:
        self.scenario = scenario
        self.broken = broken

    def begin(self) -> World:
        scenario = self.scenario
        first = Run(QUEUED, seq=1, due=DUE)
        left = Left(
            scenario.faults,
            scenario.errors,
            scenario.budgets,
            scenario.drains,
            scenario.cancels,
            scenario.starts,
            scenario.deletes,
        )
        calls = tuple(Call(kind) for kind in scenario.calls)
        processes = tuple(Process(kind) for kind in scenario.processes)
        message: Message = ("run", 0, 1, 0)
        return World(((first,), calls, processes, frozenset([message]), left, False, None, 0))

    # -- what the transactions are made of --

    def record(self, world: World, number: int) -> None:
        """longhaul_run_record: an event of a run."""
        if world.runs[number].ended:
            world.fail("1: an event follows the terminal event")

    def fence(self, world: World, number: int, epoch: int, process: int, write: str) -> bool:
        """id, epoch, status = 'running', holder: the first statement of every write of a leg."""
        run = world.runs[number]
        holds = run.epoch == epoch and run.status == RUNNING and run.holder == process
        if not holds and f"no_fence_{write}" in self.broken:
            if run.status != RUNNING or run.epoch != epoch:
                world.fail(f"3: a leg that had lost its run wrote ({write})")
            return True
        return holds

    def leg_end(self, world: World, number: int) -> None:
        """longhaul_leg_end: nothing pending, no leg open."""
        changes: dict[str, object] = {"legs": ()}
        if "exit_leaves_pending" not in self.broken:
            changes["pending"] = False
        world.run(number, **changes)

    def enqueue(self, world: World, number: int, **changes: object) -> Published:
        """A run becomes queued: dispatch_seq rises, nobody holds it."""
        self.record(world, number)
        seq = world.runs[number].seq + 1
        world.run(number, **{"status": QUEUED, "seq": seq, "holder": None, "due": DUE, **changes})
        return [("run", number, seq, 0)]

    def end(self, world: World, number: int, status: str) -> Published:
        """longhaul_run_end: of whatever cause, for whatever run."""
        was = world.runs[number].status
        self.record(world, number)
        self.leg_end(world, number)
        if number == 0:
            for index, call in enumerate(world.calls):
                if call.status in OPEN and "end_leaves_calls_open" not in self.broken:
                    world.call(index, status=SETTLED, outcome="cancelled", holder=None, late=False)
        changes: dict[str, object] = {"linger": NONE}
        if "linger_outlives_exits" in self.broken:
            changes = {}
        if "end_without_join" not in self.broken:
            changes["joined"] = True
        epoch = world.runs[number].epoch + (status == CANCELLED)
        world.run(
            number,
            status=status,
            epoch=epoch,
            holder=None,
            due=NEVER,
            late=False,
            ended=True,
            flagged=False,
            **changes,
        )
        if was == HELD and "held_end_releases_next" not in self.broken:
            return []
        if status == CANCELLED and "cancel_releases_none" in self.broken:
            return []
        if status == FAILED and "poison_releases_none" in self.broken:
            return []
        if "release_after_commit" in self.broken:
            world.saw = (number,)  # whoever ended it is to release the next one, in a transaction of its own
            return []
        return self.release(world)

    def release(self, world: World) -> Published:
        """The oldest held run of the thread leaves `held`."""
        held = [number for number, run in enumerate(world.runs) if run.status == HELD]
        if not held:
            return []
        number = held[-1] if "release_newest" in self.broken else held[0]
        if "release_without_due" in self.broken:
            self.enqueue(world, number, due=NEVER)
            return []
        published = self.enqueue(world, number)
        return [] if "release_unpublished" in self.broken else published

    def changed(self, world: World) -> Published:
        """longhaul_calls_changed: the status of a run that waits is a function of its calls; the last one joins."""
        run = world.runs[0]
        self.record(world, 0)
        if run.status not in WAITS:
            return []
        statuses = [call.status for call in world.calls if call.status in OPEN]
        if statuses:
            world.run(0, status=ACTION if all(status == UNKNOWN for status in statuses) else WAITING)
            return []
        return self.join(world)

    def join(self, world: World) -> Published:
        lingering = world.runs[0].linger == AHEAD
        due = AFTER_LINGER if lingering else DUE
        if lingering and "no_cover" in self.broken:
            due = NEVER
        published = self.enqueue(world, 0, due=due, joined=True)
        if lingering and "join_publishes_too" not in self.broken:
            return []  # the bell rings for the lingering leg, which looks once a second in any case
        return published

    # -- runs --

    def start(self, world: World, occupied: bool | None = None) -> Published:
        """admission.start: under the lock of the run that occupies the thread, or of the thread."""
        if occupied is None:
            occupied = any(
                run.status in OCCUPYING and not ("start_overlooks_waiting" in self.broken and run.status in WAITS)
                for run in world.runs
            )
        world.left = world.left._replace(starts=world.left.starts - 1)
        number = len(world.runs)
        if occupied:
            world.runs = (*world.runs, Run(HELD))
            return []
        world.runs = (*world.runs, Run(QUEUED, seq=1, due=DUE))
        return [("run", number, 1, 0)]

    def claim(self, world: World, process: int, number: int, seq: int) -> Published | None:
        """longhaul_run_claim: by dispatch_seq, of a present worker. Ends a leg that still lingers."""
        run = world.runs[number]
        if not (run.status == QUEUED and run.seq == seq and not run.late):
            return None
        self.record(world, number)
        leg = run.epoch + 1
        kept = run.legs if "claim_leaves_lingering_leg" in self.broken else ()
        world.run(
            number,
            status=RUNNING,
            epoch=leg,
            holder=process,
            bare=world.processes[process].taken,
            due=NEVER,
            legs=(*kept, leg),
            linger=run.linger if self.broken & {"linger_outlives_claims", "linger_outlives_exits"} else NONE,
            pending=False,
            lost=run.lost + ("poison_counts_claims" in self.broken),
        )
        self.left_alone(world, process)
        world.job(process, None, ("b", number, leg, leg))
        return []

    def left_alone(self, world: World, process: int) -> None:
        """From here on counts what the process suffers: with no other claim in it."""
        if not world.processes[process].jobs:
            world.process(process, cut=int(not world.processes[process].lock))

    def open_turn(self, world: World, process: int, job: Job) -> Published | None:
        """longhaul_turn_open."""
        _, number, epoch, leg = job
        world.job(process, job, None)
        run = world.runs[number]
        if not self.fence(world, number, epoch, process, "boundary") or run.pending:
            return None
        if run.flagged:
            return self.end(world, number, CANCELLED)
        self.begin_turn(world, number)
        world.job(process, None, ("m", number, epoch, leg))
        return []

    def begin_turn(self, world: World, number: int) -> None:
        """longhaul_turn_begin: the pending message is a row before the model is asked."""
        self.record(world, number)
        if not world.runs[number].joined or (number == 0 and any(call.status in OPEN for call in world.calls)):
            world.fail("4: a model turn with unanswered calls")
        world.run(number, pending=True)

    def commit(self, world: World, process: int, job: Job) -> Published | None:
        """longhaul_step_commit: the step, its calls, the next state."""
        _, number, epoch, leg = job
        world.job(process, job, None)
        run = world.runs[number]
        pending = run.pending or "no_fence_commit" in self.broken
        if not self.fence(world, number, epoch, process, "commit") or not pending:
            return None
        if run.flagged:
            return self.end(world, number, CANCELLED)
        self.record(world, number)
        step = run.step + 1
        world.run(number, step=step, lost=0, tries=0, pending=False)
        if number > 0 or not world.calls or step > self.scenario.rounds:
            return self.end(world, number, COMPLETED)
        for index, call in enumerate(world.calls):
            bad = call.kind == "B"
            world.call(
                index,
                status=SETTLED if bad else REQUESTED,
                round=step,
                attempt=1,
                holder=None,
                effect=int(bad),
                outcome="failed" if bad else "",
                late=False,
            )
        lingers = self.scenario.linger and not world.processes[process].draining
        linger = AHEAD if lingers else run.linger if "linger_outlives_exits" in self.broken else NONE
        world.run(number, status=WAITING, holder=None, joined=False, linger=linger, due=NEVER)
        if lingers:
            world.job(process, None, ("l", number, epoch, leg))
        else:
            self.leg_end(world, number)
        if all(call.kind == "B" for call in world.calls) and "bad_calls_join_late" not in self.broken:
            return self.changed(world)
        return [("call", index, step, 1) for index, call in enumerate(world.calls) if call.status == REQUESTED]

    def requeue(self, world: World, process: int, job: Job, reason: str) -> Published | None:
        """longhaul_run_requeue: a leg hands over (`budget`, `drained`) or its model is to be tried again (`retry`)."""
        at, number, epoch, _ = job
        world.job(process, job, None)
        if not self.fence(world, number, epoch, process, "requeue"):
            return None
        run = world.runs[number]
        if run.flagged:
            return self.end(world, number, CANCELLED)
        if at == "n":
            world.fail("drain: an answer that was whole was thrown away")
        self.leg_end(world, number)
        linger = run.linger if "linger_outlives_exits" in self.broken else NONE
        tries = run.tries + (reason == "retry" or (reason == "drained" and "drain_counts_try" in self.broken))
        lost = run.lost + (reason == "drained" and "drain_counts_poison" in self.broken)
        if tries > self.scenario.errors - world.left.errors:
            world.fail("drain: a try of the model was counted that the model did not fail")
        published = self.enqueue(
            world, number, late=reason == "retry", due=NEVER if reason == "retry" else DUE, linger=linger
        )
        world.run(number, tries=tries, lost=lost)
        if reason == "retry" or (reason == "drained" and "drain_unpublished" in self.broken):
            return []
        return published

    def reclaim(self, world: World, number: int) -> Published:
        """longhaul_run_reclaim: of a dead holder, or given back by one that does not know it."""
        self.without_fault(world)
        run = world.runs[number]
        lost = run.lost + ("poison_counts_claims" not in self.broken)
        if lost >= self.scenario.poison:
            world.run(number, lost=lost)
            return self.end(world, number, FAILED)
        self.leg_end(world, number)
        published = self.enqueue(world, number, epoch=run.epoch + 1, linger=NONE)
        world.run(number, lost=lost)
        return published

    def without_fault(self, world: World) -> None:
        if world.left.faults == self.scenario.faults:
            world.fail("5: something was taken from a worker that had no fault")

    def cancel(self, world: World, number: int) -> Published:
        """longhaul_run_cancel: a transition, not a flag."""
        if "cancel_is_a_flag" in self.broken and world.runs[number].status != HELD:
            world.run(number, flagged=True)
            if number == 0:
                for index, call in enumerate(world.calls):
                    if call.status in OPEN:
                        world.call(index, status=SETTLED, outcome="cancelled", holder=None)
            return []
        return self.end(world, number, CANCELLED)

    def delete(self, world: World, seen: tuple[int, ...] | None = None) -> Published:
        """Thread.delete: under the lock of the occupant or of the thread, held runs first; then the rows go."""
        live = [number for number, run in enumerate(world.runs) if not run.ended]
        if seen is not None:
            live = [number for number in live if number in seen]
        held = [number for number in live if world.runs[number].status == HELD]
        if "delete_forgets_held" in self.broken:
            held = []
        occupying = [number for number in live if world.runs[number].status != HELD]
        order = [*occupying, *held] if "delete_occupant_first" in self.broken else [*held, *occupying]
        for number in order:
            self.end(world, number, CANCELLED)
        if not all(run.ended for run in world.runs):
            world.fail("8: a thread was deleted with a run that had not ended: its readers wait for ever")
        world.gone = True
        world.left = world.left._replace(deletes=0, starts=0)
        return []

    # -- lingering --

    def look(self, world: World, process: int, job: Job, *, opens: bool, present: bool) -> Published | None:
        """longhaul_linger_claim: takes the dispatch_seq that it finds. None: this leg is over. Not called while it waits."""
        _, number, epoch, leg = job
        world.job(process, job, None)
        run = world.runs[number]
        if run.status not in (QUEUED, WAITING, ACTION):
            return None
        if leg not in run.legs and "lingerer_claims_closed_leg" not in self.broken:
            return None
        if not present and "lingerer_claims_while_absent" not in self.broken:
            return None
        if "lingerer_claims_old_seq" in self.broken:
            return None  # the join has raised it: the row does not match
        self.left_alone(world, process)
        bare = world.processes[process].taken
        changes: dict[str, object] = {}
        if not self.broken & {"linger_outlives_claims", "linger_outlives_exits"}:
            changes["linger"] = NONE
        epoch = run.epoch + ("lingerer_keeps_epoch" not in self.broken)
        world.run(number, status=RUNNING, epoch=epoch, holder=process, due=NEVER, bare=bare, **changes)
        if opens:
            self.begin_turn(world, number)
        world.job(process, None, ("m" if opens else "h", number, epoch, leg))
        return []

    def give_up(self, world: World, process: int, job: Job) -> Published | None:
        """longhaul_linger_end: locks the run and, if this leg is still the open one, ends it."""
        _, number, _, leg = job
        world.job(process, job, None)
        run = world.runs[number]
        if run.status not in (QUEUED, WAITING, ACTION) and "give_up_whoever_runs" not in self.broken:
            return None
        if leg not in run.legs and not self.broken & {"give_up_whose_leg_it_is", "give_up_whoever_runs"}:
            return None
        if run.ended:
            return None
        self.record(world, number)
        self.leg_end(world, number)
        linger = run.linger if "give_up_keeps_linger" in self.broken else NONE
        queued = run.status == QUEUED
        world.run(number, linger=linger, due=DUE if queued else run.due)
        if queued and "give_up_publishes_nothing" not in self.broken:
            return [("run", number, run.seq, 0)]
        return []

    # -- calls --

    def claim_call(self, world: World, process: int, index: int, round: int, attempt: int) -> Published | None:
        """longhaul_call_claim: by attempt, of a present worker, under the run's lock."""
        call = world.calls[index]
        if (call.status, call.round, call.attempt) != (REQUESTED, round, attempt) or call.late:
            return None
        self.record(world, 0)
        world.call(index, status=EXECUTING, holder=process, bare=world.processes[process].taken)
        world.process(process, cut=int(not world.processes[process].lock))
        world.job(process, None, ("x", index, round, attempt))
        return []

    def settle(self, world: World, process: int, job: Job) -> Published | None:
        """longhaul_call_settle: by attempt; holder and `running`, or `unknown`: then it is the late result."""
        at, index, round, attempt = job
        world.job(process, job, None)
        call = world.calls[index]
        mine = (call.status == EXECUTING and call.holder == process) or call.status == UNKNOWN
        if (call.round, call.attempt) != (round, attempt) or not mine:
            return None  # somebody was faster, or the run has ended
        if world.runs[0].ended:
            world.fail("8: a finished run changed")
        effect = call.effect + (call.kind == "@" and "atomic_in_two" not in self.broken)
        world.call(index, status=SETTLED, outcome="ok", holder=None, effect=effect)
        if at in "zZ":  # the siblings were looked at before the lock
            self.record(world, 0)
            return self.join(world) if at == "Z" else []
        return self.changed(world)

    def retry_call(self, world: World, process: int, job: Job) -> Published | None:
        """longhaul_call_retry: the attempt failed, another one comes later."""
        _, index, round, attempt = job
        world.job(process, job, None)
        call = world.calls[index]
        if (call.status, call.holder, call.round, call.attempt) != (EXECUTING, process, round, attempt):
            return None
        world.call(index, status=REQUESTED, attempt=attempt + 1, holder=None, late=True)
        return self.changed(world)

    def reclaim_call(self, world: World, index: int, *, began: bool = True) -> Published:
        """longhaul_call_reclaim: of a dead holder, or given back; `began` False: its user code never ran."""
        self.without_fault(world)
        call = world.calls[index]
        if began and call.kind == "N" and "non_idempotent_runs_again" not in self.broken:
            world.call(index, status=UNKNOWN, holder=None)
        elif began and call.attempt >= ATTEMPTS:
            world.call(index, status=SETTLED, outcome="failed", holder=None)
        else:
            world.call(index, status=REQUESTED, attempt=call.attempt + 1, holder=None)
            return [*self.changed(world), ("call", index, call.round, call.attempt + 1)]
        return self.changed(world)

    def executed(self, world: World, process: int, index: int) -> None:
        """User code runs. Invariant 5 by what the processes suffered, not by what the rows say."""
        call = world.calls[index]
        for number, other in enumerate(world.processes):
            if number == process or other.kind != "T" or other.up != "up":
                continue
            if any(at in "xs" and job_index == index for at, job_index, _, _ in other.jobs):
                allowed = 1 if call.kind in "I@" else 2
                if max(other.cut, world.processes[process].cut) < allowed:
                    world.fail("5: a call runs twice while its worker is present")
        if call.kind == "@":
            world.call(index, effect=call.effect + ("atomic_in_two" in self.broken))
        else:
            world.call(index, effect=min(call.effect + 1, 2))
