"""What is tried, and how the protocol can be broken.

Bounds: one thread with at most four runs, three calls in a step, two steps with calls, two processes of a kind, two legs at
once in a process, three faults a history. A transaction is one move: lock waits, isolation and lock order are tested on
Postgres (tests/protocol). Time is order only: "ahead" and "passed", never how long. A way to an end is enough: that
workers are started again and that no move waits for ever is taken for granted.

Not modelled: what does not exist yet (approvals, deferred results, children, steer, interrupt, admission under
`max_dispatched`); deltas and the flusher, and the cutting of Postgres itself, which tests/runs and tests/workers try for
real; doubled messages, for a claim that another took leaves no row that a second copy could match; the deadline of a run,
which is a cancel by the sweep; limits; prefork parents that beat for their children.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scenario:
    """Who is there, and how often what comes from outside may happen.

    processes: one letter each, A agents, T tools. calls: the kinds of the first run's calls, made anew in each of its
    `rounds`; later runs of the thread have none. kinds: the faults that may happen (crash, stall, blip, lose, ack, hang),
    `faults` in all, to processes of the kinds in `frail`. sweep False: nothing may need the sweep (but for timers).
    poison: losses in a row that end a run.
    """

    name: str
    processes: str = "AT"
    calls: str = ""
    rounds: int = 1
    linger: bool = True
    faults: int = 0
    kinds: frozenset[str] = frozenset()
    frail: str = "AT"
    errors: int = 0
    budgets: int = 0
    drains: int = 0
    cancels: int = 0
    starts: int = 0
    deletes: int = 0
    poison: int = 9
    sweep: bool = True


@dataclass(frozen=True)
class Break:
    """A rule left out: `says` what the code would do then. `together`: the breaks that are made with it.

    harmless: why every check holds all the same; "" when the search must find a story that ends badly.
    """

    scenario: str
    says: str
    harmless: str = ""
    together: tuple[str, ...] = ()


def of(kinds: str) -> frozenset[str]:
    return frozenset(kinds.split())


QUICK = [
    # legs: fences, reclaim, poison
    Scenario("legs", "AA", faults=1, kinds=of("crash ack lose"), errors=1, cancels=1),
    Scenario("poison", "AA", faults=2, kinds=of("crash stall"), poison=2),
    Scenario("blip", "A", faults=1, kinds=of("blip"), cancels=1),
    Scenario("hang", "A", faults=1, kinds=of("hang"), starts=1, cancels=1, drains=1),
    # calls: claim, settle, join, reclaim, give-back
    Scenario("calls", "ATT", "PN", linger=False, faults=1, kinds=of("crash blip lose ack"), frail="T", cancels=1),
    Scenario("calls_atomic", "ATT", "@", linger=False, faults=2, kinds=of("crash blip"), frail="T"),
    Scenario("calls_closed", "ATT", "PP", linger=False, faults=1, kinds=of("blip"), frail="T"),
    # linger
    Scenario("linger", "AAT", "I", rounds=2, faults=1, kinds=of("crash ack lose"), cancels=1, budgets=1),
    Scenario("linger_stall", "AAT", "I", faults=1, kinds=of("stall"), frail="A"),
    Scenario("linger_bad_calls", "A", "B", rounds=2, budgets=1, drains=1, sweep=False),
    # the held queue
    Scenario("held", "AA", starts=2, cancels=1, faults=1, kinds=of("crash ack lose")),
    Scenario("held_poison", "A", starts=1, faults=1, kinds=of("crash"), poison=1),
    Scenario("held_calls", "AT", "I", starts=1, cancels=1),
    Scenario("held_delete", "A", starts=2, deletes=1, cancels=1, errors=1),
    # drain
    Scenario("drain", "AT", "I", drains=2, errors=1),
    Scenario("drain_killed", "AAT", "N", rounds=1, drains=1, faults=1, kinds=of("crash ack")),
    # without faults nothing needs the sweep
    Scenario("prompt", "AT", "IP", linger=False, errors=1, budgets=1, sweep=False),
    Scenario("prompt_linger", "AT", "I", rounds=2, budgets=1, drains=1, errors=1, sweep=False),
    Scenario("prompt_held", "A", starts=2, cancels=1, drains=1, sweep=False),
]
LARGE = [
    Scenario("large_legs", "AA", faults=2, kinds=of("crash ack lose"), errors=1, cancels=1, drains=1),
    Scenario("large_blip", "AA", faults=1, kinds=of("blip"), errors=1, cancels=1, drains=1),
    Scenario("large_stall", "AA", faults=2, kinds=of("stall ack"), errors=1, cancels=1),
    Scenario("large_poison", "AAT", "I", faults=3, kinds=of("crash ack"), frail="A", poison=3, errors=1),
    Scenario("large_calls", "ATT", "IPN", linger=False, faults=2, kinds=of("crash ack"), frail="T"),
    Scenario(
        "large_calls_blip", "ATT", "PN", linger=False, faults=2, kinds=of("crash blip lose"), frail="T", cancels=1
    ),
    Scenario(
        "large_atomic", "ATT", "@I", linger=False, faults=1, kinds=of("crash stall blip ack"), frail="T", cancels=1
    ),
    Scenario("large_linger", "AAT", "I", rounds=2, faults=2, kinds=of("crash ack lose"), cancels=1, budgets=1),
    Scenario("large_linger_stall", "AAT", "I", faults=1, kinds=of("stall blip"), frail="A", drains=1),
    Scenario("large_linger_calls", "AT", "IN", rounds=2, faults=2, kinds=of("crash ack"), budgets=1, errors=1),
    Scenario("large_held", "AA", starts=3, cancels=2, faults=2, kinds=of("crash ack lose"), deletes=1),
    Scenario("large_drain", "AATT", "IN", drains=2, faults=1, kinds=of("crash ack")),
    Scenario(
        "large_whole", "AAT", "I", rounds=2, starts=1, cancels=1, drains=1, faults=1, kinds=of("crash ack"), errors=1
    ),
    Scenario("large_prompt", "AATT", "IP", rounds=2, drains=1, errors=1, budgets=1, starts=1, cancels=1, sweep=False),
]
SCENARIOS = {scenario.name: scenario for scenario in (*QUICK, *LARGE)}

BREAKS = {
    # -- linger --
    "no_cover": Break(
        "linger", "a join inside linger_until sets no next_publish_at: nothing covers a lingerer that died"
    ),
    "last_look_too_early": Break(
        "prompt_linger",
        "the lingerer takes its last look before linger_until, and its giving up publishes nothing",
        together=("last_look_too_early", "give_up_publishes_nothing"),
    ),
    "no_last_look": Break(
        "linger",
        "the lingerer does not look once more after linger_until",
        harmless="giving up locks the run and publishes what the join had queued; it costs a message",
    ),
    "lingerer_just_goes": Break(
        "prompt_linger",
        "the lingerer looks for the last time before linger_until and ends without giving up",
        together=("lingerer_just_goes", "last_look_too_early"),
    ),
    "lingerer_goes_after_its_last_look": Break(
        "prompt_linger",
        "the lingerer takes its last look after linger_until and ends without giving up",
        harmless="a join after linger_until publishes itself, and the next claim or the end of the run ends the leg; "
        "the log says late that the leg has ended. A drain still gives up",
        together=("lingerer_just_goes",),
    ),
    "give_up_publishes_nothing": Break(
        "prompt_linger", "giving up publishes nothing though the join had queued the run for this leg"
    ),
    "give_up_keeps_linger": Break(
        "prompt_linger", "giving up leaves linger_until ahead: the join rings a leg that is gone"
    ),
    "give_up_whose_leg_it_is": Break(
        "linger",
        "giving up does not ask whether its leg is still the open one",
        harmless="it asks whether the run is running: else it ends the linger of another leg, which finds itself ended "
        "and leaves the run to the message; a step is not lost, its linger is",
    ),
    "give_up_whoever_runs": Break("linger", "giving up ends the open leg even when another task runs it"),
    "lingerer_claims_old_seq": Break(
        "prompt_linger", "the lingerer claims by the dispatch_seq that it knew, which the join has raised"
    ),
    "lingerer_claims_closed_leg": Break("linger", "the lingerer claims though its leg was ended by another claim"),
    "lingerer_claims_too_early": Break("linger", "the lingerer claims while calls are open"),
    "lingerer_claims_while_absent": Break(
        "linger_stall", "a lingerer whose process was stopped claims before it has beaten again"
    ),
    "lingerer_keeps_epoch": Break(
        "linger",
        "the claim of a lingerer does not raise the epoch",
        harmless="nobody else has held the run under that epoch, for a leg that lingers holds no claim",
    ),
    "claim_leaves_lingering_leg": Break("linger", "a claim by another task does not end the leg that lingers"),
    "linger_outlives_claims": Break(
        "prompt_linger",
        "claims leave linger_until as it is",
        harmless="every exit from running writes it anew; until then nobody reads it",
    ),
    "linger_outlives_exits": Break(
        "prompt_linger", "claims and exits leave linger_until as it is: the next join rings a leg that is gone"
    ),
    "join_publishes_too": Break(
        "linger",
        "the join publishes though a leg lingers",
        harmless="the message and the lingerer meet at the claim, one of them finds no row; it costs a message",
    ),
    "bad_calls_join_late": Break("linger_bad_calls", "a step whose calls all came settled is not joined by its commit"),
    # -- the held queue --
    "cancel_releases_none": Break("held", "a cancel leaves the held runs where they are"),
    "poison_releases_none": Break("held_poison", "a failure leaves the held runs where they are"),
    "release_after_commit": Break("held", "whoever ended a run releases the next one in a transaction of its own"),
    "held_end_releases_next": Break("held", "the end of a held run queues the next one too"),
    "release_newest": Break("held", "the newest held run is released"),
    "release_without_due": Break("held", "a released run gets no next_publish_at, and its message is lost"),
    "release_unpublished": Break("prompt_held", "a released run is not published"),
    "start_without_lock": Break("held", "a start looks for the occupant without its lock"),
    "start_overlooks_waiting": Break("held_calls", "a start takes a thread whose run waits for calls for a free one"),
    "delete_without_lock": Break("held_delete", "deleting a thread reads its live runs before it holds the occupant"),
    "delete_forgets_held": Break("held_delete", "deleting a thread cancels the run that occupies it only"),
    "delete_occupant_first": Break(
        "held_delete",
        "deleting a thread cancels the occupant before the held runs",
        harmless="the released run is cancelled in the same transaction; its message finds no row",
    ),
    # -- drain --
    "drain_counts_poison": Break("drain", "a drained leg counts as lost"),
    "drain_counts_try": Break("drain", "a drained leg counts as a try of the model"),
    "drain_releases_presence_first": Break("drain", "a draining worker releases its presence before its legs are over"),
    "drain_forgets_calls": Break("drain", "a draining tools worker leaves in the middle of a call"),
    "drain_drops_whole_answer": Break("drain", "a draining worker hands over though the model's answer is whole"),
    "drain_unpublished": Break("prompt_linger", "a drained run is not published"),
    "drain_waits_for_streams": Break(
        "hang",
        "a draining worker waits for a model that has fallen silent beyond the grace",
        harmless="the run is taken at its leg_deadline, and the leg is stopped; until then the worker does not leave",
    ),
    "drain_drops_messages": Break("prompt_linger", "a draining worker takes a message and does nothing with it"),
    "drain_lingers_on": Break(
        "prompt_linger",
        "a draining worker's legs linger on",
        harmless="they look and give up as ever, and what they claim is handed over; the worker leaves later",
    ),
    # -- what was there before --
    "no_fence_boundary": Break("legs", "opening a turn does not ask for the fence"),
    "no_fence_commit": Break("legs", "the commit of a step does not ask for the fence"),
    "no_fence_requeue": Break("legs", "a hand-over does not ask for the fence"),
    "exit_leaves_pending": Break("legs", "the pending message is ended by the next claim, not by the exit"),
    "no_sweep": Break("held", "nothing publishes a queued run again"),
    "no_give_back": Break("held", "a worker does not give back what it does not know it holds"),
    "no_leg_deadline": Break("hang", "a leg whose model falls silent is not taken from a worker that is present"),
    "poison_counts_claims": Break("poison", "every claim counts toward poison"),
    "claim_while_absent": Break("poison", "a worker claims before it has beaten again"),
    "publish_before_commit": Break("prompt_linger", "a message goes out before the commit of what it names"),
    "settle_without_run_lock": Break("calls", "a settlement looks at the siblings before it locks the run"),
    "no_call_republish": Break("calls", "nothing publishes a requested call again"),
    "reclaim_without_presence": Break("calls", "a running call is taken from a worker that is present"),
    "closed_life_at_once": Break(
        "calls_closed", "what names a life that was closed a moment ago is taken though no beat was missed"
    ),
    "taken_at_every_look": Break(
        "blip", "what a process claims while its lock is gone is taken at every look of the watcher, though it lives"
    ),
    "close_by_an_old_look": Break(
        "poison", "the watcher closes a life that has locked and beaten again since it was seen dead"
    ),
    "non_idempotent_runs_again": Break("calls", "an idempotent=False call of a dead worker runs again"),
    "stale_reclaim": Break(
        "calls_atomic", "a sweep reclaims a call by what it saw earlier, without holder and attempt"
    ),
    "atomic_in_two": Break("calls_atomic", "the effect of an atomic tool is committed before its settlement"),
    "end_leaves_calls_open": Break("calls", "the end of a run leaves its calls open"),
    "end_without_join": Break("calls", "the end of a run leaves its calls unanswered in the transcript"),
    "cancel_is_a_flag": Break("calls", "a cancel is a flag that the next leg sees"),
}
