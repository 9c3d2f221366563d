"""Tool calls: settle, join, retry, reclaim, atomic bodies, and the order of the locks."""

from __future__ import annotations

from tests.mutants.catalogue.places import (
    ANSWER,
    CALL_RECLAIM,
    CALLS,
    CANCEL,
    CONTEXT_OF_TOOLS,
    CUT,
    LOCKS,
    LOG,
    LOST,
    SETTLE,
    TIME,
    TOOLS,
)
from tests.mutants.mutant import Change, Exempt, Group, Mutant, one

EXECUTION = "tools/execution.py"
INTERRUPTS = "tools/interrupts.py"
_STALE = f"{SETTLE}a_claim_that_does_not_match_when_it_settles_then_nothing_changes"
_LIVE = "('held', 'queued', 'running', 'waiting', 'requires_action')"
_SETTLE_GUARD = (
    "        WHERE id = p_call AND attempt = p_attempt\n"
    "          AND (status = 'running' AND holder = p_worker OR status = 'unknown')\n"
)
_RETRY_GUARD = "    WHERE id = p_call AND attempt = p_attempt AND status = 'running' AND holder = p_worker\n"
_RECLAIM_GUARD = (
    "    WHERE id = p_call AND attempt = p_attempt AND status = 'running' AND holder = p_holder FOR NO KEY UPDATE;\n"
)

_UNKNOWN = (
    "                   WHEN v_call.idempotent IS FALSE AND p_began"
    " THEN CASE v_call.on_unknown WHEN 'ask' THEN 'unknown' ELSE 'unknown_outcome' END\n"
)

SETTLES = Group(
    "Settle and join",
    [
        one(
            "settle_any_attempt",
            "A settlement names its attempt.",
            CALLS,
            _SETTLE_GUARD,
            _SETTLE_GUARD.replace(" AND attempt = p_attempt", ""),
            f"{_STALE}[an attempt that is not there yet]",
        ),
        one(
            "settle_any_holder",
            "A settlement names its holder.",
            CALLS,
            _SETTLE_GUARD,
            _SETTLE_GUARD.replace(" AND holder = p_worker", ""),
            f"{_STALE}[another holder]",
        ),
        one(
            "settle_twice",
            "A call is settled exactly once.",
            CALLS,
            _SETTLE_GUARD,
            "        WHERE id = p_call AND attempt = p_attempt\n",
            f"{SETTLE}a_settlement_whose_answer_was_lost_when_it_is_repeated_then_it_says_already",
            f"{CALL_RECLAIM}a_call_past_its_time_when_reclaimed_then_it_timed_out",
        ),
        one(
            "late_result_of_an_unknown_call_is_refused",
            "The original's late result settles an `unknown` call.",
            CALLS,
            _SETTLE_GUARD,
            _SETTLE_GUARD.replace(" OR status = 'unknown'", ""),
            f"{SETTLE}an_unknown_call_when_its_late_result_comes_then_it_settles_it",
        ),
        one(
            "repeated_settlement_looks_lost",
            "A settlement is repeated until it is answered: one that took effect says `already`.",
            CALLS,
            "    IF FOUND THEN RETURN '{\"already\": true}'; END IF;\n",
            "",
            f"{SETTLE}a_settlement_whose_answer_was_lost_when_it_is_repeated_then_it_says_already",
            f"{SETTLE}a_run_that_has_gone_on_when_the_settlement_is_repeated_then_it_says_already",
        ),
        one(
            "settle_without_run_lock",
            "A settlement locks the run, and looks at the siblings after that: the last one joins.",
            CALLS,
            "    IF (longhaul_run_lock(v_run_id)).thread_id IS NOT NULL THEN\n",
            f"    IF EXISTS (SELECT 1 FROM longhaul_runs_run WHERE id = v_run_id AND status IN {_LIVE}) THEN\n",
            f"{SETTLE}two_last_settlements_at_once_then_exactly_one_of_them_joins",
            model="settle_without_run_lock",
        ),
        Mutant(
            "settle_after_the_end",
            "A result that comes after its run's end changes nothing.",
            [
                Change(
                    CALLS,
                    "    IF (longhaul_run_lock(v_run_id)).thread_id IS NOT NULL THEN\n",
                    "    PERFORM longhaul_run_lock(v_run_id);\n    IF true THEN\n",
                ),
                Change(CALLS, _SETTLE_GUARD, "        WHERE id = p_call AND attempt = p_attempt\n"),
            ],
            [
                f"{CANCEL}a_settle_while_the_run_is_cancelled_then_it_is_refused",
                f"{CANCEL}open_calls_when_a_run_is_cancelled_then_they_are_settled_and_answered_in_order",
            ],
        ),
        one(
            "settlement_given_up",
            "A settlement that is not answered is repeated: a result is not lost to an outage.",
            EXECUTION,
            "            pause = min(pause * 2, 5.0)\n",
            "            return\n",
            f"{LOST}a_settlement_that_is_not_answered_is_repeated",
        ),
        one(
            "answers_in_any_order",
            "The join appends one message a call, in call order.",
            LOG,
            "v_place + row_number() OVER (ORDER BY c.index),",
            "v_place + row_number() OVER (ORDER BY c.settled_at),",
            f"{SETTLE}calls_settled_in_any_order_then_the_last_joins_them_in_call_order",
        ),
        one(
            "join_before_the_last",
            "A step joins when its last call is settled, not before.",
            LOG,
            "AND step = v_run.steps AND status <> 'settled') THEN\n",
            "AND step = v_run.steps AND status <> 'settled' OFFSET 1) THEN\n",
            f"{SETTLE}calls_settled_in_any_order_then_the_last_joins_them_in_call_order",
        ),
        one(
            "join_keeps_dispatch_seq",
            "The join raises the `dispatch_seq`.",
            LOG,
            "            SET status = 'queued', dispatch_seq = dispatch_seq + 1, queued_at",
            "            SET status = 'queued', queued_at",
            f"{SETTLE}two_last_settlements_at_once_then_exactly_one_of_them_joins",
        ),
        one(
            "one_person_stops_all",
            "The status of a run is a function of its open calls: `requires_action` when every one waits for a person.",
            LOG,
            "        v_works := FOUND;\n",
            "        v_works := FOUND AND NOT EXISTS (SELECT 1 FROM longhaul_tools_toolcall WHERE run_id = p_run"
            " AND step = v_run.steps AND status IN ('awaiting_approval', 'awaiting_result', 'unknown'));\n",
            f"{SETTLE}each_mix_of_open_calls_then_the_status_follows_from_them",
            f"{SETTLE}one_call_waits_for_a_person_when_the_others_are_settled_then_the_run_requires_action",
        ),
        one(
            "nobody_is_asked",
            "A run whose calls all wait for a person says so.",
            LOG,
            "        v_status := CASE WHEN v_works THEN 'waiting' ELSE 'requires_action' END;",
            "        v_status := 'waiting';",
            f"{SETTLE}all_open_calls_wait_for_a_person_then_the_log_says_so_once",
        ),
        one(
            "child_counts_as_a_person",
            "A call that waits for a child run counts as waiting.",
            LOG,
            "status IN ('requested', 'retrying', 'running', 'awaiting_child')\n        ORDER",
            "status IN ('requested', 'retrying', 'running')\n        ORDER",
            f"{SETTLE}each_mix_of_open_calls_then_the_status_follows_from_them[awaiting_child-unknown]",
        ),
    ],
    [
        Exempt(
            "settle_of_a_live_run_only",
            "A settlement asks whether its run is live.",
            "The end of a run settles its calls in the same transaction, and a settled call is not settled again.",
            together="settle_after_the_end",
        ),
    ],
)

ATTEMPTS = Group(
    "Attempts and reclaim of a call",
    [
        one(
            "retry_any_attempt",
            "A retry is guarded as a settlement: by its attempt,",
            CALLS,
            _RETRY_GUARD,
            _RETRY_GUARD.replace(" AND attempt = p_attempt", ""),
            f"{_STALE}[an attempt that is not there yet]",
        ),
        one(
            "retry_any_holder",
            "and by its holder.",
            CALLS,
            _RETRY_GUARD,
            _RETRY_GUARD.replace(" AND holder = p_worker", ""),
            f"{_STALE}[another holder]",
        ),
        one(
            "retry_keeps_attempt",
            "The attempt is raised by whoever makes the call `requested` again.",
            CALLS,
            "    SET status = 'retrying', attempt = attempt + 1, holder = NULL, timeout_at = NULL, error = p_error,",
            "    SET status = 'retrying', holder = NULL, timeout_at = NULL, error = p_error,",
            f"{SETTLE}a_failure_when_its_policy_grants_another_attempt_then_the_call_is_put_off",
        ),
        one(
            "call_claimed_before_its_time",
            "A call is not claimed before its `not_before`.",
            CALLS,
            "\n      AND (not_before IS NULL OR not_before <= v_now)\n",
            "\n",
            f"{SETTLE}a_failure_when_its_policy_grants_another_attempt_then_the_call_is_put_off",
        ),
        one(
            "stale_reclaim",
            "A reclaim names the attempt: a stale look takes nothing from a new holder.",
            CALLS,
            _RECLAIM_GUARD,
            _RECLAIM_GUARD.replace(" AND attempt = p_attempt", "").replace(" AND holder = p_holder", ""),
            f"{CALL_RECLAIM}a_look_that_saw_something_else_when_it_reclaims_then_nothing_is_taken",
            model="stale_reclaim",
        ),
        one(
            "stale_reclaim_any_attempt",
            "The attempt is asked for,",
            CALLS,
            _RECLAIM_GUARD,
            _RECLAIM_GUARD.replace(" AND attempt = p_attempt", ""),
            f"{CALL_RECLAIM}a_call_that_its_holder_has_claimed_again_when_an_old_look_reclaims_then_nothing_is_taken",
            model="stale_reclaim",
        ),
        one(
            "stale_reclaim_any_holder",
            "and the holder.",
            CALLS,
            _RECLAIM_GUARD,
            _RECLAIM_GUARD.replace(" AND holder = p_holder", ""),
            f"{CALL_RECLAIM}a_look_that_saw_something_else_when_it_reclaims_then_nothing_is_taken",
            model="stale_reclaim",
        ),
        one(
            "reclaim_of_the_settled",
            "A settled call is never taken.",
            CALLS,
            _RECLAIM_GUARD,
            "    WHERE id = p_call AND attempt = p_attempt FOR NO KEY UPDATE;\n",
            f"{CALL_RECLAIM}a_call_that_settles_while_it_is_reclaimed_then_whoever_is_first_wins[settle]",
        ),
        one(
            "rerun_non_idempotent",
            "An `idempotent=False` call whose worker died is `unknown`, and never run again.",
            CALLS,
            _UNKNOWN,
            "",
            f"{CALL_RECLAIM}a_call_that_starts_at_most_once_when_its_worker_is_lost_then_it_is_unknown",
            model="rerun_non_idempotent",
        ),
        one(
            "unbegun_is_unknown",
            "Unless its code never began: then it is requested again,",
            CALLS,
            _UNKNOWN,
            _UNKNOWN.replace(" AND p_began", ""),
            f"{CALL_RECLAIM}a_call_that_never_began_when_it_is_given_back_then_it_costs_no_attempt",
        ),
        one(
            "unbegun_costs_an_attempt",
            "and costs no attempt.",
            CALLS,
            "max_attempts = max_attempts + CASE WHEN p_began THEN 0 ELSE 1 END,",
            "max_attempts = max_attempts,",
            f"{CALL_RECLAIM}a_call_that_never_began_when_it_is_given_back_then_it_costs_no_attempt",
        ),
        one(
            "retried_though_it_starts_once",
            "A tool of `idempotent=False` has one attempt, its own failures included.",
            "tools/registry.py",
            "retry=retry or RetryPolicy(attempts=1 if idempotent is False else RetryPolicy().attempts),",
            "retry=retry or RetryPolicy(),",
            f"{TOOLS}what_starts_at_most_once_is_not_tried_again",
        ),
        one(
            "lost_calls_run_for_ever",
            "A lost call without an attempt left has failed.",
            CALLS,
            "                   WHEN v_call.attempt >= v_call.max_attempts AND p_began THEN 'worker_lost'\n",
            "",
            f"{CALL_RECLAIM}no_attempt_left_when_the_worker_is_lost_then_the_call_has_failed",
        ),
        one(
            "reclaim_keeps_attempt",
            "A reclaim raises the attempt.",
            CALLS,
            "        SET status = 'retrying', attempt = attempt + 1, holder = NULL, timeout_at = NULL,\n            max",
            "        SET status = 'retrying', holder = NULL, timeout_at = NULL,\n            max",
            f"{CALL_RECLAIM}a_call_that_may_run_again_when_its_worker_is_lost_then_it_does",
        ),
        one(
            "cut_tool_is_tried_again",
            "A tool that was cut at its time is not tried again.",
            EXECUTION,
            "    if isinstance(error, SoftTimeLimitExceeded):\n",
            "    if False:\n",
            f"{TOOLS}a_tool_that_was_cut_at_its_time_is_not_tried_again",
        ),
        one(
            "settlement_is_interrupted",
            "A signal interrupts the user's code, and nothing that follows it.",
            INTERRUPTS,
            "    if body is None:\n        return  #",
            "    if body is None:\n        raise SoftTimeLimitExceeded  #",
            f"{CUT}code_that_ends_in_time_is_not_interrupted_after_it",
        ),
        one(
            "cleaning_up_is_interrupted",
            "It interrupts it once: what the tool does then is cleaning up.",
            INTERRUPTS,
            "        if self.reason is None:\n            self.reason = reason\n            if self._loop",
            "        if True:\n            self.reason = reason\n            if self._loop",
            f"{CUT}what_cleans_up_is_not_interrupted_again",
        ),
        one(
            "signal_without_a_hearer",
            "No signal is sent when nobody hears it any more.",
            INTERRUPTS,
            "        with _sending:\n            _delivers = False\n",
            "        _delivers = False\n",
            f"{CUT}no_signal_comes_when_nobody_hears_it_any_more",
        ),
        one(
            "transaction_left_open",
            "A call is settled in no transaction that its code has left open.",
            EXECUTION,
            "        database.transactions_kept(),\n",
            "",
            f"{TIME}code_that_is_broken_off_on_its_way_out_of_a_transaction_is_settled_all_the_same[False]",
        ),
        one(
            "given_back_counts",
            "An attempt that was given back is none of those that the policy grants.",
            EXECUTION,
            "tool.retry.delay(tried, error)",
            "tool.retry.delay(claimed.attempt, error)",
            f"{TIME}an_attempt_that_was_given_back_is_none_of_those_that_the_policy_grants",
        ),
        one(
            "another_attempt_is_interrupted",
            "An interruption names the attempt that it means.",
            INTERRUPTS,
            "    elif meant[:2] == (body.call_id, body.attempt):\n",
            "    else:\n",
            f"{CUT}another_thread_interrupts_no_other_attempt",
        ),
        one(
            "wanted_call_is_cut",
            "A call whose late result would settle it is not cut.",
            INTERRUPTS,
            "if each in self._since or not _wanted(to, *each)}",
            "if each in self._since or _wanted(to, *each) is not None}",
            f"{CUT}a_call_is_let_be[nobody knows what became of it]",
        ),
        one(
            "cancelled_call_has_no_grace",
            "A tool has its grace to see by itself that it was cancelled.",
            INTERRUPTS,
            "late = now - since - self.grace.total_seconds()",
            "late = now - since + 1",
            f"{CUT}a_call_is_let_be[it has a grace]",
        ),
        one(
            "kills_its_worker",
            "A process is killed for its call only where it runs nothing else.",
            INTERRUPTS,
            "            if self.kills and late",
            "            if late",
            f"{CUT}what_heeds_nothing_is_killed_where_that_kills_nothing_else[False]",
        ),
        one(
            "once_begins_again_by_itself",
            "A call that must not start twice is not given back by its own tool.",
            EXECUTION,
            "    if isinstance(error, WorkerLeaving) and tool.idempotent is not False:\n",
            "    if isinstance(error, WorkerLeaving):\n",
            f"{TIME}a_tool_that_must_not_start_twice_does_not_begin_again_on_its_own_word",
        ),
        one(
            "cleaning_up_is_tried_again",
            "What a tool raises while it cleans up does not have it tried again.",
            EXECUTION,
            "            if body.reason is None or isinstance(error, (ToolError, SoftTimeLimitExceeded)):\n",
            "            if True:\n",
            f"{TIME}an_async_tool_is_cancelled_at_its_time_and_is_not_tried_again[it raises]",
        ),
        one(
            "key_of_the_attempt",
            "A call has one idempotency key over all its attempts.",
            CALLS,
            "'idempotency_key', v_call.idempotency_key, 'atomic'",
            "'idempotency_key', v_attempt_id, 'atomic'",
            f"{CONTEXT_OF_TOOLS}the_key_of_a_call_is_its_own_and_stays_over_its_attempts",
        ),
        one(
            "plain_tool_in_a_transaction",
            "The code of a plain tool runs with no transaction open.",
            EXECUTION,
            "        result = tool.keep(_call(claimed, tool, arguments), claimed.call_id)\n    # An async",
            "        with transaction.atomic():\n            result = tool.keep(_call(claimed, tool, arguments), claimed.call_id)\n    # An async",
            f"{TOOLS}a_plain_tool_keeps_what_it_wrote_before_it_failed",
        ),
        one(
            "progress_without_a_pace",
            "A call tells of its progress at most once a second.",
            EXECUTION,
            "        if fraction != 1.0 and moment - last[0] < PROGRESS_SECONDS:\n",
            "        if False:\n",
            f"{CONTEXT_OF_TOOLS}progress_is_told_at_most_once_a_second_but_its_end_always",
        ),
        one(
            "tells_after_the_end",
            "A tool tells nothing of a run that has ended.",
            "runs/run_log.py",
            "            if not Run.objects.select_for_update(no_key=True).filter(pk=run_id, status__in=LIVE).exists():\n",
            "            if not Run.objects.select_for_update(no_key=True).filter(pk=run_id).exists():\n",
            f"{CONTEXT_OF_TOOLS}nothing_is_written_to_a_run_that_has_ended",
        ),
        one(
            "tells_after_it_was_taken",
            "An attempt whose call was settled, or taken over, tells nothing more.",
            EXECUTION,
            "(_write(claimed, type, payload) and wanted())",
            "_write(claimed, type, payload)",
            f"{CONTEXT_OF_TOOLS}a_tool_whose_call_was_taken_from_it_learns_so_and_says_nothing_more",
        ),
        Mutant(
            "call_of_an_ended_run_is_claimed",
            "A call of a run that has ended is not claimed.",
            [
                Change(CALLS, " OR v_seen.status NOT IN ('requested', 'retrying') THEN", " THEN"),
                Change(
                    CALLS,
                    "WHERE id = p_call AND attempt = p_attempt AND status || '' IN ('requested', 'retrying')\n      AND (not_before",
                    "WHERE id = p_call AND attempt = p_attempt\n      AND (not_before",
                ),
                Change(
                    LOG,
                    "    WHERE r.id = p_run AND r.status IN ('held', 'queued', 'running', 'waiting', 'requires_action')\n    RETURNING",
                    "    WHERE r.id = p_run\n    RETURNING",
                ),
            ],
            [f"{CANCEL}open_calls_when_a_run_is_cancelled_then_they_are_settled_and_answered_in_order"],
        ),
        one(
            "runs_again_past_its_time",
            "A call past its time settles as `timed_out`, however it declares itself.",
            CALLS,
            "CASE WHEN v_call.timeout_at <= v_now THEN 'timed_out'\n                   WHEN",
            "CASE WHEN",
            f"{CALL_RECLAIM}a_call_past_its_time_when_reclaimed_then_it_timed_out",
        ),
    ],
    [
        Exempt(
            "claim_locks_any_run",
            "The claim of a call locks a live run only.",
            "The end of a run settles its calls in the same transaction, and a settled call is claimed by nobody.",
            together="call_of_an_ended_run_is_claimed",
        ),
    ],
)

_TRY = """            result = tool.keep(_call(claimed, tool, arguments, told), claimed.call_id)
            for type, payload in told:
                _write(claimed, type, payload)
            answer = _settled_within(claimed, tool, result)
            if answer is None:
                raise SettlementLost
"""

ATOMIC = Group(
    "Atomic tools",
    [
        one(
            "atomic_in_two",
            "Body and settlement of an atomic tool are one transaction.",
            EXECUTION,
            _TRY,
            """            result = tool.keep(_call(claimed, tool, arguments, told), claimed.call_id)
        with transaction.atomic():
            for type, payload in told:
                _write(claimed, type, payload)
            answer = _settled_within(claimed, tool, result)
            if answer is None:
                raise SettlementLost
""",
            f"{TOOLS}the_effect_of_an_atomic_tool_is_gone_when_its_run_was_cancelled_meanwhile",
            model="atomic_in_two",
        ),
        one(
            "atomic_half_though_answered",
            "What a failed atomic body wrote goes, though a hook makes a result of its error.",
            "tools/layers.py",
            "    with transaction.atomic() if undone else contextlib.nullcontext():\n",
            "    with contextlib.nullcontext():\n",
            "tests/engine/test_hooks.py::test_what_a_failed_atomic_body_wrote_goes_though_a_hook_answers",
        ),
        one(
            "result_though_its_hook_failed",
            "The result of a call whose `after` failed is not kept.",
            "tools/layers.py",
            "        # Never the result as it was",
            "        return outcome\n        # Never the result as it was",
            "tests/engine/test_hooks.py::test_a_hook_after_that_fails_keeps_the_result_back_and_the_tool_does_not_run_again",
        ),
        one(
            "atomic_without_a_transaction",
            "The rows of a failed atomic attempt are gone.",
            EXECUTION,
            "        with transaction.atomic():\n            # By this name",
            "        if True:\n            # By this name",
            f"{TOOLS}the_rows_of_a_failed_atomic_attempt_are_gone_and_those_of_the_last_are_there_once",
        ),
        one(
            "atomic_effect_though_too_late",
            "An atomic body whose settlement comes too late is rolled back.",
            EXECUTION,
            "            if answer is None:\n                raise SettlementLost\n",
            "            if answer is None:\n                return\n",
            f"{TOOLS}the_effect_of_an_atomic_tool_is_gone_when_its_run_was_cancelled_meanwhile",
        ),
        one(
            "atomic_holds_its_run",
            "An atomic tool takes the run's lock last.",
            EXECUTION,
            "_call(claimed, tool, arguments, told), claimed.call_id)",
            "_call(claimed, tool, arguments), claimed.call_id)",
            f"{CONTEXT_OF_TOOLS}an_atomic_tool_that_speaks_to_readers_does_not_hold_its_run_meanwhile",
        ),
        one(
            "dead_attempts_backend_lives",
            "Before the next attempt the last one's backend is ended.",
            CALLS,
            "    PERFORM pg_terminate_backend(s.pid)\n",
            "    PERFORM s.pid\n",
            f"{CALL_RECLAIM}a_dead_attempts_open_transaction_when_reclaimed_then_its_backend_is_ended",
        ),
        one(
            "backend_ended_behind_the_lock",
            "It is ended before any lock is waited for: from its settlement on it holds the run itself.",
            CALLS,
            "    PERFORM pg_terminate_backend(s.pid)\n",
            "    PERFORM longhaul_run_lock(v_run_id);\n    PERFORM pg_terminate_backend(s.pid)\n",
            f"{CALL_RECLAIM}a_dead_attempt_that_holds_the_run_when_reclaimed_then_nobody_waits_for_it",
        ),
        one(
            "somebody_elses_backend",
            "Only the attempt's own backend is ended, known by its name.",
            CALLS,
            "JOIN pg_stat_activity s ON s.application_name = 'longhaul ' || a.id::text AND s.pid",
            "JOIN pg_stat_activity s ON s.pid = a.backend_pid AND s.pid",
            f"{CALL_RECLAIM}a_backend_that_is_not_the_attempts_any_more_when_reclaimed_then_it_lives[somebody else-True]",
        ),
        one(
            "backend_of_a_plain_tool",
            "And only that of an atomic one.",
            CALLS,
            "AND c.holder = p_holder AND c.atomic;",
            "AND c.holder = p_holder;",
            f"{CALL_RECLAIM}a_backend_that_is_not_the_attempts_any_more_when_reclaimed_then_it_lives[None-False]",
        ),
        one(
            "attempt_without_a_name",
            "An atomic attempt gives its transaction that name.",
            EXECUTION,
            """            database.rows_of("SELECT set_config('application_name', %s, true)", (f"longhaul {claimed.attempt_id}",))\n""",
            "",
            f"{LOST}an_atomic_attempt_is_known_to_postgres_by_its_name",
        ),
    ],
)

_SETTLE_LOCKS = (
    "    IF (longhaul_run_lock(v_run_id)).thread_id IS NOT NULL THEN\n        v_now := longhaul_now();\n        UPDATE"
)
_CALL_LOCK = "    PERFORM 1 FROM longhaul_tools_toolcall WHERE id = p_call FOR NO KEY UPDATE;\n"
_ANSWER_LOCKS = "    IF (longhaul_run_lock(v_run_id)).thread_id IS NULL THEN RETURN NULL; END IF;  -- it has ended, and closed its calls\n"
_RELEASE_LOCKS = _ANSWER_LOCKS.replace("it has ended, and closed its calls", "its run has ended, and closed it")
_CHANGED = f"{LOCKS}a_locked_run_when_a_call_is_changed_then_it_waits_without_the_calls_lock"

_FIRST = "    IF v_call.status = 'settled' THEN RETURN NULL; END IF;  -- somebody was first\n"
_AWAITED = "    IF v_call.status <> ALL (p_from) THEN RETURN jsonb_build_object('refused', v_call.status); END IF;\n"
_UNKNOWN_ONLY = "    IF v_call.status <> 'unknown' THEN RETURN jsonb_build_object('refused', v_call.status); END IF;\n"
_SETTLED_FIRST = f"{ANSWER}a_call_that_somebody_settled_when_a_person_answers_then_nothing_changes"
_RELEASED = f"{ANSWER}a_released_call_when_the_originals_late_result_comes_then_it_changes_nothing"
_REFUSED = f"{ANSWER}a_call_that_waits_for_no_answer_when_a_person_answers_then_it_is_refused_by_name"

ANSWERS = Group(
    "A person's word",
    [
        one(
            "answer_of_the_settled",
            "A settled call takes no answer, and no cancel.",
            CALLS,
            _FIRST + _AWAITED,
            _AWAITED,
            f"{_SETTLED_FIRST}[an answer]",
        ),
        one(
            "answer_of_what_nobody_asked",
            "An answer is for a call that waits for it.",
            CALLS,
            _AWAITED,
            "",
            f"{_REFUSED}[running]",
        ),
        one(
            "answer_after_the_end",
            "Nor does a call whose run has ended.",
            CALLS,
            _ANSWER_LOCKS
            + "    v_now := longhaul_now();\n    SELECT * INTO v_call FROM longhaul_tools_toolcall WHERE id = p_call FOR NO KEY UPDATE;\n"
            + _FIRST
            + _AWAITED,
            "    v_now := longhaul_now();\n    SELECT * INTO v_call FROM longhaul_tools_toolcall WHERE id = p_call FOR NO KEY UPDATE;\n",
            f"{_SETTLED_FIRST}[the end of its run]",
        ),
        one(
            "release_of_what_runs",
            "Only an unknown call is released.",
            CALLS,
            _FIRST + _UNKNOWN_ONLY,
            _FIRST,
            f"{_REFUSED}[running]",
        ),
        one(
            "release_of_the_settled",
            "A settled call is not released.",
            CALLS,
            _FIRST + _UNKNOWN_ONLY,
            _UNKNOWN_ONLY,
            f"{_SETTLED_FIRST}[an answer]",
        ),
        one(
            "released_under_the_old_attempt",
            "A release begins another attempt: what the lost one returns is refused from then on.",
            CALLS,
            "SET status = 'retrying', attempt = attempt + 1, max_attempts = greatest(max_attempts, attempt + 1), error = p_error,",
            "SET status = 'retrying', error = p_error,",
            _RELEASED,
        ),
        one(
            "released_and_lost",
            "The lost attempt is told apart from one that counts, for such a call starts at most once unless a person says so.",
            CALLS,
            "    UPDATE longhaul_tools_toolattempt SET outcome = 'released', error = p_error\n",
            "    UPDATE longhaul_tools_toolattempt SET error = p_error\n",
            _RELEASED,
        ),
        one(
            "cancel_leaves_the_attempt_open",
            "A cancelled call's attempt is closed with it.",
            CALLS,
            "    UPDATE longhaul_tools_toolattempt SET ended_at = v_now, outcome = p_outcome, error = p_error\n"
            "    WHERE call_id = p_call AND ended_at IS NULL;\n",
            "",
            f"{ANSWER}a_running_call_when_it_is_cancelled_then_its_attempt_is_closed_and_its_result_refused",
        ),
        one(
            "nobody_is_told",
            "A tool that asks nobody has failed when its worker is lost, and the model is told.",
            CALLS,
            "CASE v_call.on_unknown WHEN 'ask' THEN 'unknown' ELSE 'unknown_outcome' END",
            "'unknown'",
            f"{ANSWER}a_tool_that_asks_nobody_when_its_worker_is_lost_then_it_is_settled_as_it_chose[tell_model-queued]",
        ),
        one(
            "run_goes_on_without_it",
            "Or its run fails with it.",
            CALLS,
            "        IF v_code = 'unknown_outcome' AND v_call.on_unknown = 'fail' THEN\n",
            "        IF false THEN\n",
            f"{ANSWER}a_tool_that_asks_nobody_when_its_worker_is_lost_then_it_is_settled_as_it_chose[fail-failed]",
        ),
    ],
)

ORDER = Group(
    "Lock order",
    [
        one(
            "settle_locks_the_call_first",
            "Runs are locked before calls: by a settlement,",
            CALLS,
            _SETTLE_LOCKS,
            _CALL_LOCK + _SETTLE_LOCKS,
            f"{_CHANGED}[settle]",
        ),
        one(
            "retry_locks_the_call_first",
            "by a retry,",
            CALLS,
            "    IF (longhaul_run_lock(v_run_id)).thread_id IS NULL THEN RETURN NULL; END IF;\n    v_now := longhaul_now();\n    UPDATE",
            _CALL_LOCK
            + "    IF (longhaul_run_lock(v_run_id)).thread_id IS NULL THEN RETURN NULL; END IF;\n    v_now := longhaul_now();\n    UPDATE",
            f"{_CHANGED}[retry]",
        ),
        one(
            "reclaim_locks_the_call_first",
            "by a reclaim,",
            CALLS,
            "    IF (longhaul_run_lock(v_run_id)).thread_id IS NULL THEN RETURN NULL; END IF;\n    v_now := longhaul_now();\n    SELECT",
            _CALL_LOCK
            + "    IF (longhaul_run_lock(v_run_id)).thread_id IS NULL THEN RETURN NULL; END IF;\n    v_now := longhaul_now();\n    SELECT",
            f"{_CHANGED}[reclaim]",
        ),
        one(
            "answer_locks_the_call_first",
            "by a person's answer,",
            CALLS,
            _ANSWER_LOCKS,
            _CALL_LOCK + _ANSWER_LOCKS,
            f"{_CHANGED}[answer]",
        ),
        one(
            "release_locks_the_call_first",
            "by its release,",
            CALLS,
            _RELEASE_LOCKS,
            _CALL_LOCK + _RELEASE_LOCKS,
            f"{_CHANGED}[release]",
        ),
        one(
            "claim_locks_the_call_first",
            "by a claim,",
            CALLS,
            "    v_run_id := v_seen.run_id;\n",
            _CALL_LOCK + "    v_run_id := v_seen.run_id;\n",
            f"{LOCKS}a_locked_run_when_a_call_is_claimed_then_it_waits_without_the_calls_lock",
        ),
        one(
            "lock_that_is_none",
            "The lock of a run is one.",
            LOG,
            "'requires_action')\n    FOR NO KEY UPDATE;",
            "'requires_action');",
            f"{LOCKS}a_live_run_when_it_is_locked_then_the_lock_holds_and_says_what_it_is",
        ),
        one(
            "lock_stops_foreign_keys",
            "It does not stop the rows that only refer to the run.",
            LOG,
            "'requires_action')\n    FOR NO KEY UPDATE;",
            "'requires_action')\n    FOR UPDATE;",
            f"{LOCKS}a_live_run_when_it_is_locked_then_the_lock_holds_and_says_what_it_is",
        ),
    ],
)
