"""Claim and fence: who may take a run or a call, and who may write for it."""

from __future__ import annotations

from collections.abc import Iterator

from tests.mutants.catalogue.places import CALLS, CLAIM, DELTAS, FENCE, LEGS, LINGER
from tests.mutants.mutant import Change, Exempt, Group, Mutant, one

CLAIMS = Group(
    "Claim",
    [
        Mutant(
            "claim_without_status",
            "A run is claimed only while it is `queued`: a doubled message matches no row.",
            [
                Change(
                    LEGS, "WHERE id = p_run AND status = 'queued' AND dispatch_seq", "WHERE id = p_run AND dispatch_seq"
                )
            ],
            [f"{CLAIM}a_claimed_run_when_the_message_comes_doubled_then_no_row_matches"],
        ),
        Mutant(
            "claim_any_seq",
            "A claim names the `dispatch_seq` of its message: a late one matches no row.",
            [Change(LEGS, "status = 'queued' AND dispatch_seq = p_dispatch AND", "status = 'queued' AND")],
            [f"{CLAIM}a_run_that_was_queued_anew_when_the_old_message_comes_then_no_row_matches"],
            model="claim_any_seq",
        ),
        Mutant(
            "claim_before_its_time",
            "A run is not claimed before its `not_before`.",
            [
                Change(
                    LEGS,
                    "AND dispatch_seq = p_dispatch AND turn IS NULL AND (not_before IS NULL OR not_before <= v_now)",
                    "AND dispatch_seq = p_dispatch AND turn IS NULL",
                )
            ],
            [f"{CLAIM}a_run_put_off_when_its_message_comes_early_then_no_row_matches"],
        ),
        Mutant(
            "claim_looks_then_writes",
            "The guard of a claim stands in the UPDATE itself: of two at once one gets the run.",
            [
                Change(
                    LEGS,
                    "WHERE id = p_run AND status = 'queued' AND dispatch_seq = p_dispatch AND",
                    "WHERE id = p_run AND EXISTS (SELECT 1 FROM longhaul_runs_run q WHERE q.id = p_run AND q.status = 'queued'"
                    " AND q.dispatch_seq = p_dispatch) AND",
                )
            ],
            [f"{CLAIM}two_workers_that_claim_at_once_then_one_of_them_gets_the_run"],
        ),
        Mutant(
            "run_claim_while_absent",
            "A worker claims a run only while it is present.",
            [
                Change(
                    LEGS,
                    "    IF NOT longhaul_worker_present(p_worker, v_now) THEN RETURN '{\"absent\": true}'; END IF;\n",
                    "",
                )
            ],
            [f"{CLAIM}a_worker_that_is_not_present_when_it_claims_then_it_is_refused"],
            model="claim_while_absent",
        ),
        Mutant(
            "call_claim_while_absent",
            "A worker claims a call only while it is present.",
            [
                Change(
                    CALLS,
                    "    IF NOT longhaul_worker_present(p_worker, v_now) THEN  -- looked at",
                    "    IF false THEN  -- looked at",
                )
            ],
            [
                f"{CLAIM}a_worker_that_is_not_present_when_it_claims_then_it_is_refused",
                f"{CLAIM}a_worker_that_goes_while_its_claim_of_a_call_waits_then_it_is_refused",
            ],
            model="claim_while_absent",
        ),
        one(
            "call_claimed_before_its_lock",
            "The time of a call's claim is that of the lock: the times of a run's events rise with `seq`.",
            "runs/sql/0001_log.sql",
            "    longhaul_run_append.at := longhaul_now();\n",
            "    longhaul_run_append.at := statement_timestamp();\n",
            f"{CLAIM}a_claim_of_a_call_that_waited_for_its_run_then_its_times_are_those_of_the_lock",
        ),
        Mutant(
            "linger_claim_while_absent",
            "A leg that lingered claims only while its worker is present.",
            [
                Change(
                    LEGS,
                    '    IF NOT longhaul_worker_present(p_worker, v_now) THEN RETURN \'{"status": "absent"}\'; END IF;\n',
                    "",
                )
            ],
            [f"{LINGER}a_lingerer_that_is_not_present_when_it_looks_then_it_may_not_claim"],
            model="claim_while_absent",
        ),
        Mutant(
            "presence_without_a_fresh_beat",
            "Present is who has beaten a moment ago: a process that was stopped and woke beats first.",
            [
                Change(
                    CALLS, " AND gone_at IS NULL AND beat_at > p_now - interval '6 seconds');", " AND gone_at IS NULL);"
                )
            ],
            [
                f"{CLAIM}a_worker_that_is_not_present_when_it_claims_then_it_is_refused[its beat is stale]",
                f"{CLAIM}a_worker_that_woke_when_it_has_beaten_again_then_it_may_claim",
            ],
            model="claim_while_absent",
        ),
        Mutant(
            "presence_though_found_gone",
            "A life that was found dead is not present, however fresh its beat.",
            [Change(CALLS, "WHERE id = p_worker AND gone_at IS NULL AND beat_at", "WHERE id = p_worker AND beat_at")],
            [f"{CLAIM}a_worker_that_is_not_present_when_it_claims_then_it_is_refused[it was found gone]"],
        ),
        Mutant(
            "call_claim_without_status",
            "A call is claimed only while it is `requested` or `retrying`, said in the UPDATE itself.",
            [
                Change(
                    CALLS,
                    "WHERE id = p_call AND attempt = p_attempt AND status || '' IN ('requested', 'retrying')\n      AND (not_before",
                    "WHERE id = p_call AND attempt = p_attempt\n      AND (not_before",
                )
            ],
            [f"{CLAIM}two_workers_that_claim_a_call_at_once_then_one_of_them_gets_it"],
        ),
        Mutant(
            "call_claim_any_attempt",
            "A claim of a call names its attempt: a late message matches no row.",
            [
                Change(
                    CALLS,
                    "WHERE id = p_call AND attempt = p_attempt AND status || '' IN ('requested', 'retrying')\n      AND (not_before",
                    "WHERE id = p_call AND status || '' IN ('requested', 'retrying')\n      AND (not_before",
                ),
                Change(CALLS, "IF v_seen.attempt <> p_attempt OR v_seen.status", "IF v_seen.status"),
            ],
            [f"{CLAIM}a_message_of_an_earlier_attempt_or_of_a_deleted_run_then_no_row_matches"],
        ),
        Mutant(
            "call_claim_keeps_its_event",
            "A claim that finds no row takes its event back: the log tells of no claim that was none.",
            [
                Change(
                    CALLS,
                    "        PERFORM longhaul_run_retract(v_run_id);\n        RETURN NULL;",
                    "        RETURN NULL;",
                )
            ],
            [f"{CLAIM}two_workers_that_claim_a_call_at_once_then_one_of_them_gets_it"],
        ),
        Mutant(
            "call_outlives_its_run",
            "A call's time ends no later than its run's deadline.",
            [Change(CALLS, "timeout_at = least(v_now + timeout, v_run.deadline)", "timeout_at = v_now + timeout")],
            [f"{CLAIM}a_run_with_a_deadline_when_its_call_is_claimed_then_the_call_ends_no_later"],
        ),
        Mutant(
            "claims_beside_orphans",
            "A process that runs one call at a time gives back what still names it before it claims.",
            [Change(CALLS, "    IF p_alone THEN\n", "    IF false THEN\n")],
            [f"{CLAIM}a_worker_that_runs_one_call_at_a_time_when_one_names_it_still_then_it_is_told"],
            model="no_disown",
        ),
        Mutant(
            "claim_without_leg_deadline",
            "A claim sets the leg's deadline, past which the run is taken from a process that hangs.",
            [Change(LEGS, "leg_deadline = v_now + p_prepare, linger_until = NULL", "linger_until = NULL")],
            [f"{CLAIM}a_queued_run_when_claimed_then_the_claim_is_its_row"],
        ),
    ],
)

_RUNNING = "epoch = p_epoch AND status = 'running' AND holder = p_worker"
_MISSED = "\n    IF NOT FOUND THEN RETURN NULL; END IF;  -- the fence\n"
_STALE = f"{FENCE}a_fence_that_does_not_match_when_a_leg_writes_then_nothing_changes"
_BOUNDARY = f"{FENCE}a_fence_that_does_not_match_when_a_leg_comes_to_a_boundary_then_nothing_changes"
_LEFT = f"{FENCE}a_run_that_left_its_leg_when_the_leg_writes_then_nothing_changes"
# The fence of each write: what stands after it, which tells one from another; its tests, and their case.
_WRITES = {
    "boundary": (" AND pending_message_id IS NULL\n", _BOUNDARY, "turn_open"),
    "commit": (" AND pending_message_id = p_message\n", _STALE, "step_commit with calls"),
    "retry": (f" FOR NO KEY UPDATE;{_MISSED}    v_now := longhaul_now();", _STALE, "requeue"),
    "finish": (f" FOR NO KEY UPDATE;{_MISSED}    IF p_usage", _STALE, "finish"),
}


def _fences() -> Iterator[Mutant]:
    for name, (after, tests, case) in _WRITES.items():

        def but(fence: str, name: str = name, after: str = after) -> list[Change]:
            # A boundary and a commit ask for their message too: the whole fence goes with it.
            rest = "\n" if not fence and name in ("boundary", "commit") else after
            return [Change(LEGS, f"WHERE id = p_run AND {_RUNNING}{after}", f"WHERE id = p_run{fence}{rest}")]

        yield Mutant(
            f"no_fence_{name}",
            f"A {name} is fenced: a leg that was lost writes nothing.",
            but(""),
            [f"{tests}[its epoch is old-{case}]", f"{tests}[another worker holds it-{case}]"],
            model=f"no_fence_{name}" if name != "finish" else "",
        )
        yield Mutant(
            f"fence_{name}_any_epoch",
            f"The fence of a {name} asks for the epoch.",
            but(" AND status = 'running' AND holder = p_worker"),
            [f"{tests}[its epoch is old-{case}]"],
        )
        yield Mutant(
            f"fence_{name}_any_holder",
            f"The fence of a {name} asks for the holder.",
            but(" AND epoch = p_epoch AND status = 'running'"),
            [f"{tests}[another worker holds it-{case}]"],
        )
        if name != "commit":
            yield Mutant(
                f"fence_{name}_epoch_only",
                f"The fence of a {name} asks for more than the epoch, which does not rise when a leg ends.",
                but(" AND epoch = p_epoch"),
                [f"{_LEFT}[was requeued-{case}]"],
                model="fence_epoch_only",
            )


_FLUSH_FENCE = "ON r.id = c.run AND r.epoch = c.epoch AND r.status = 'running' AND r.holder = p_worker AND r.pending_message_id = c.message\n"
_FLUSH_ROWS = "ON r.id = b.run AND r.epoch = b.epoch AND r.pending_message_id = b.message\n"
_FLUSH_COUNT = "ON k.id = b.run AND k.epoch = b.epoch AND k.pending_message_id = b.message\n"


def _flush(fence: str, rows: str) -> list[Change]:
    """The flusher's fence, and the same where it inserts and counts the rows of those that it has locked."""
    return [
        Change(DELTAS, _FLUSH_FENCE, f"ON r.id = c.run{fence}\n"),
        Change(DELTAS, _FLUSH_ROWS, f"ON r.id = b.run{rows}\n"),
        Change(DELTAS, _FLUSH_COUNT, f"ON k.id = b.run{rows.replace('r.', 'k.')}\n"),
    ]


def _flushes() -> Iterator[Mutant]:
    message = " AND r.pending_message_id = "
    yield Mutant(
        "no_fence_flush",
        "A flush is fenced: deltas of a leg that was lost are not written.",
        _flush("", ""),
        [f"{_STALE}[its epoch is old-deltas_write]", f"{_STALE}[another worker holds it-deltas_write]"],
        model="no_fence_flush",
    )
    yield Mutant(
        "fence_flush_any_epoch",
        "The fence of a flush asks for the epoch.",
        _flush(f" AND r.status = 'running' AND r.holder = p_worker{message}c.message", f"{message}b.message"),
        [f"{_STALE}[its epoch is old-deltas_write]"],
    )
    yield Mutant(
        "fence_flush_any_holder",
        "The fence of a flush asks for the holder.",
        [Change(DELTAS, _FLUSH_FENCE, _FLUSH_FENCE.replace(" AND r.holder = p_worker", ""))],
        [f"{_STALE}[another worker holds it-deltas_write]"],
    )
    yield Mutant(
        "fence_flush_epoch_only",
        "The fence of a flush asks for more than the epoch, which does not rise when a leg ends.",
        _flush(" AND r.epoch = c.epoch", " AND r.epoch = b.epoch"),
        [f"{_LEFT}[was requeued-deltas_write]"],
        model="fence_epoch_only",
    )
    yield Mutant(
        "fence_commit_epoch_only",
        "The fence of a commit asks for more than the epoch, which does not rise when a leg ends.",
        [
            Change(
                LEGS,
                f"WHERE id = p_run AND {_RUNNING} AND pending_message_id = p_message\n",
                "WHERE id = p_run AND epoch = p_epoch\n",
            )
        ],
        [f"{_LEFT}[was requeued-step_commit with calls]"],
        model="fence_epoch_only",
    )


FENCES = Group(
    "Fence",
    [
        *_fences(),
        *_flushes(),
        Mutant(
            "commit_of_another_message",
            "The pending message is part of a commit's fence: a commit that is repeated is refused.",
            [Change(LEGS, "AND holder = p_worker AND pending_message_id = p_message\n", "AND holder = p_worker\n")],
            [
                f"{FENCE}the_fence_holds_but_the_message_is_another_when_a_leg_writes_then_nothing_changes",
                f"{FENCE}a_commit_whose_answer_was_lost_when_it_is_repeated_then_it_is_refused",
            ],
        ),
        Mutant(
            "flush_to_another_message",
            "The pending message is part of the flusher's fence: a delta of a committed step comes too late.",
            _flush(" AND r.epoch = c.epoch AND r.status = 'running' AND r.holder = p_worker", " AND r.epoch = b.epoch"),
            [f"{FENCE}two_steps_under_one_claim_when_a_delta_of_the_first_is_late_then_only_the_second_is_written"],
        ),
        Mutant(
            "turn_opened_twice",
            "A turn is not opened beside a pending one, which would stay pending for ever.",
            [Change(LEGS, "AND holder = p_worker AND pending_message_id IS NULL\n", "AND holder = p_worker\n")],
            ["tests/protocol/test_edges.py::test_given_a_turn_that_is_open_when_another_is_opened_then_it_is_refused"],
        ),
    ],
    [
        Exempt(
            "fence_any_status",
            "A fence asks for `status = 'running'`.",
            "Only a running run has a holder, by a check constraint of the table: the holder says it too.",
            together="fence_retry_epoch_only",
        ),
        Exempt(
            "fence_epoch_only, of a commit or a flush",
            "The fence of a commit and of a flush asks for status and holder.",
            "Both ask for the pending message as well, which only the running run of that very claim has, by another check"
            " constraint. As in the model, where it breaks something only together with `flusher_not_drained`.",
            together="fence_commit_epoch_only`, `fence_flush_epoch_only",
            model="fence_epoch_only",
        ),
    ],
)
