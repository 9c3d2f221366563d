"""The limits of model calls: never exceeded, fair among those that wait, and nobody forgotten."""

from __future__ import annotations

from tests.mutants.catalogue.places import LEGS
from tests.mutants.mutant import Group, one

_MODELS = "runs/sql/0005_models.sql"
_GIVEN = "tests/protocol/test_models.py::test_given_"
_LEG = "tests/engine/test_quotas.py::test_"

LIMITS = Group(
    "Limits of a model's calls",
    [
        one(
            "model_asked_side_by_side",
            "All that ask one model are answered one after another.",
            _MODELS,
            "    PERFORM longhaul_model_lock(v_key);\n    v_now := longhaul_now();  -- after",
            "    v_now := longhaul_now();  -- after",
            f"{_GIVEN}two_that_ask_for_the_last_place_at_once_then_one_is_given_it",
        ),
        one(
            "model_use_is_no_row",
            "A request is a row before it is sent.",
            _MODELS,
            "        PERFORM longhaul_rate_use(jsonb_build_object(v_key, jsonb_build_object("
            "'count', v_requests, 'seconds', v_seconds)), v_now);\n",
            "        NULL;\n",
            f"{_GIVEN}whatever_happens_then_no_minute_sees_more_requests_and_all_are_asked",
        ),
        one(
            "model_leave_without_end",
            "A leg that stood still since it was given leave does not ask any more.",
            "runs/engine.py",
            "            raise LeaveLapsed\n",
            "            pass\n",
            f"{_LEG}a_leg_that_stood_still_does_not_use_its_leave",
        ),
        one(
            "model_place_kept_by_the_dead",
            "A call counts while its message is pending, so whatever ends the turn gives its place back.",
            _MODELS,
            "ON r.id = l.run_id AND r.pending_message_id = l.message_id\n            WHERE l.key = p_key",
            "ON r.id = l.run_id\n            WHERE l.key = p_key",
            f"{_GIVEN}a_call_is_out_when_its_worker_dies_or_it_ends_then_its_place_is_free",
        ),
        one(
            "model_usage_uncorrected",
            "What a call took in fact takes the place of its estimate.",
            _MODELS,
            "        UPDATE longhaul_tools_rateuse SET amount = p_tokens WHERE id = v_use;\n",
            "        NULL;\n",
            f"{_GIVEN}an_estimate_then_what_is_reported_takes_its_place",
            f"{_GIVEN}a_discarded_answer_then_its_usage_counts_as_well",
        ),
        one(
            "model_line_behind_the_parked",
            "A run that waits for its turn is before nobody in its model's line, and no place is kept for it.",
            _MODELS,
            "r.status = 'queued' AND r.turn IS NULL OR r.status = 'running'",
            "r.status = 'queued' OR r.status = 'running'",
            f"{_GIVEN}one_let_go_that_waits_for_its_gate_then_nobody_waits_for_it",
        ),
        one(
            "model_line_sends_the_parked",
            "A model's line lets go none that waits for its turn as a run.",
            _MODELS,
            "            CONTINUE WHEN v_run.turn IS NOT NULL;",
            "            CONTINUE WHEN false;",
            f"{_GIVEN}one_in_the_line_that_waits_for_its_gate_then_it_is_passed_by_and_keeps_its_turn",
        ),
        one(
            "model_larger_than_a_minute_never_sent",
            "A request that is larger than a minute's tokens is sent when none are used.",
            _MODELS,
            "v_tokens := least(v_most, (coalesce",
            "v_tokens := least(1000000000, (coalesce",
            f"{_GIVEN}a_request_that_is_larger_than_a_minute_then_it_goes_when_nothing_is_used",
        ),
        one(
            "model_limited_counts_a_try",
            "Who waits for its model's limits has used up no try.",
            LEGS,
            "model_tries = model_tries + CASE p_reason WHEN 'retry' THEN 1 ELSE 0 END,",
            "model_tries = model_tries + CASE WHEN p_reason IN ('retry', 'limited') THEN 1 ELSE 0 END,",
            f"{_GIVEN}no_room_then_the_run_is_handed_over_without_a_trace_but_its_place",
        ),
        one(
            "model_line_jumped",
            "Who is new comes after those that wait.",
            _MODELS,
            "    WHERE l.key = v_key AND l.message_id IS NULL AND l.run_id <> p_run.id AND v_own.released_at IS NULL\n",
            "    WHERE l.key = v_key AND l.message_id IS NULL AND false\n",
            f"{_GIVEN}a_line_when_somebody_new_asks_then_it_does_not_go_first",
        ),
        one(
            "model_owners_by_age",
            "Owners that wait for one model take turns.",
            _MODELS,
            "coalesce(max(turn) FILTER (WHERE turn_of = v_owner), 0)",
            "coalesce(max(turn), 0)",
            f"{_GIVEN}owners_that_wait_then_they_take_turns_and_priority_comes_first",
        ),
        one(
            "model_priority_starves",
            "No priority starves another.",
            _MODELS,
            "min(priority) < max(priority) AND random() < 0.1",
            "false",
            f"{_GIVEN}those_of_a_high_priority_come_without_end_then_a_low_one_is_asked_all_the_same",
        ),
        one(
            "model_herd",
            "When a pause ends those that wait are let go a few at a time.",
            _MODELS,
            "        v_room := 10;\n",
            "        v_room := 1000;\n",
            f"{_GIVEN}a_pause_ends_then_those_that_wait_are_spread_and_all_get_there",
        ),
        one(
            "model_place_kept_for_ever",
            "Who was let go and does not come holds up nobody for long.",
            _MODELS,
            "l.message_id IS NULL AND l.released_at > v_now - interval '10 seconds'\n",
            "l.message_id IS NULL AND l.released_at IS NOT NULL\n",
            f"{_GIVEN}who_was_let_go_and_never_comes_then_its_place_is_given_on",
        ),
        one(
            "model_gone_holds_up",
            "Who waited and is gone holds up nobody.",
            _MODELS,
            "            IF v_run.status <> 'queued' THEN\n"
            "                DELETE FROM longhaul_runs_leave WHERE run_id = v_next.run_id AND message_id IS NULL;\n"
            "                CONTINUE;\n",
            "            IF v_run.status <> 'queued' THEN\n                EXIT;\n",
            f"{_GIVEN}who_waits_is_gone_then_nobody_waits_for_it",
        ),
        one(
            "model_pause_shortened",
            "A shorter pause ends none that is longer.",
            _MODELS,
            " WHERE p.until < excluded.until;\n",
            ";\n",
            f"{_GIVEN}a_pause_then_nobody_asks_and_a_shorter_one_ends_it_not",
        ),
        one(
            "model_pause_is_private",
            "What a service asks of one run holds for all.",
            "runs/engine.py",
            "            quotas.pause(self.quota, error.retry_after, error.code, self.claim.run_id if again else None)\n",
            "            pass\n",
            f"{_LEG}a_wait_that_is_asked_of_one_run_holds_for_all",
        ),
    ],
)
