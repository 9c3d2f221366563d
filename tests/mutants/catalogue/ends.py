"""The end of a run, its cancel, and what waits behind it."""

from __future__ import annotations

from tests.mutants.catalogue.places import BAD_INPUT, BUSY_START, CANCEL, HELD, LEGS, LOG, LOST, PUBLISHED, START
from tests.mutants.mutant import Change, Exempt, Group, Mutant, one

_OLDEST = f"{HELD}held_runs_when_the_occupant_ends_then_the_oldest_is_queued_and_its_input_has_a_place"
_CLOSED = f"{CANCEL}open_calls_when_a_run_is_cancelled_then_they_are_settled_and_answered_in_order"

_RELEASE = (
    "    SET status = 'queued', dispatch_seq = dispatch_seq + 1, queued_at = longhaul_now(), publishes = 1,\n"
    "        next_publish_at = longhaul_now() + interval '1 second'\n    WHERE id = v_held"
)

ENDS = Group(
    "End and cancel",
    [
        one(
            "cancel_is_a_flag",
            "Cancel is a transition, not a flag that the leg sees at its next boundary.",
            LEGS,
            "    RETURN longhaul_run_end(p_run, p_status, p_stop_reason, p_error, NULL, p_status, NULL, p_next);\n",
            "    PERFORM longhaul_calls_close(p_run, (SELECT steps FROM longhaul_runs_run WHERE id = p_run));\n"
            "    PERFORM longhaul_run_record(p_run, 'run.cancelling', '{}');\n"
            "    RETURN jsonb_build_object('run', p_run, 'status', p_status);\n",
            f"{CANCEL}any_live_run_when_it_is_cancelled_then_it_has_ended_with_a_higher_epoch",
            f"{CANCEL}a_claim_while_the_run_is_cancelled_then_it_finds_no_row",
            model="cancel_is_a_flag",
        ),
        one(
            "cancel_changes_the_finished",
            "Terminal is final: a cancel of a run that has ended changes nothing.",
            LEGS,
            "    IF (longhaul_run_lock(p_run)).thread_id IS NULL THEN RETURN NULL; END IF;\n    RETURN longhaul_run_end",
            "    RETURN longhaul_run_end",
            f"{CANCEL}a_run_that_has_ended_when_it_is_cancelled_then_nothing_changes",
        ),
        one(
            "lock_takes_the_finished",
            "The lock of a run is that of a live one: who waited for it learns that the run has ended.",
            LOG,
            "    WHERE r.id = p_run AND r.status IN ('held', 'queued', 'running', 'waiting', 'requires_action')\n    FOR NO KEY UPDATE;",
            "    WHERE r.id = p_run\n    FOR NO KEY UPDATE;",
            "tests/protocol/test_lock_order.py::test_given_a_run_that_ended_while_its_lock_was_waited_for_then_the_lock_says_so",
            f"{CANCEL}a_run_that_has_ended_when_it_is_cancelled_then_nothing_changes",
        ),
        one(
            "cancel_keeps_epoch",
            "A cancel raises the epoch.",
            LEGS,
            "        epoch = epoch + CASE WHEN p_status = 'cancelled' THEN 1 ELSE 0 END\n",
            "        epoch = epoch\n",
            f"{CANCEL}any_live_run_when_it_is_cancelled_then_it_has_ended_with_a_higher_epoch",
        ),
        one(
            "cancel_drops_text",
            "A cancel keeps the text that was spoken.",
            LEGS,
            "longhaul_leg_end(p_run, p_leg_reason, p_status = 'cancelled', p_epoch);",
            "longhaul_leg_end(p_run, p_leg_reason, false, p_epoch);",
            f"{CANCEL}text_when_a_run_is_cancelled_then_it_is_kept_as_partial",
        ),
        one(
            "cancel_leaves_calls_open",
            "The end of a run closes its calls.",
            LEGS,
            "    PERFORM longhaul_calls_close(p_run, v_run.steps);\n",
            "",
            _CLOSED,
            model="cancel_leaves_calls_open",
        ),
        one(
            "end_without_join",
            "Whatever closes a step does the same join: each call is answered in the transcript.",
            LEGS,
            "    PERFORM longhaul_calls_join(p_run);\n",
            "",
            _CLOSED,
            f"{CANCEL}a_run_in_mid_fan_out_when_its_deadline_passes_then_it_joins_as_well",
            model="end_without_join",
        ),
        one(
            "joined_twice",
            "A step is joined once.",
            LOG,
            "       OR EXISTS (SELECT 1 FROM longhaul_threads_message WHERE run_id = p_run.id AND step = p_run.steps AND role = 'tool')\n",
            "",
            f"{CANCEL}a_joined_run_when_it_is_cancelled_then_its_calls_are_answered_once",
        ),
        Mutant(
            "terminal_event_not_last",
            "A run ends in one terminal event, and it is the last.",
            [
                Change(
                    LEGS,
                    "    PERFORM longhaul_leg_end(p_run, p_leg_reason, p_status",
                    "    PERFORM longhaul_run_record(p_run, 'run.' || p_status, jsonb_build_object('stop_reason', p_stop_reason), p_epoch);\n"
                    "    PERFORM longhaul_leg_end(p_run, p_leg_reason, p_status",
                ),
                Change(
                    LEGS,
                    "    PERFORM longhaul_run_record(p_run, 'run.' || p_status, jsonb_build_object(\n        'stop_reason'",
                    "    PERFORM (jsonb_build_object(\n        'stop_reason'",
                ),
                Change(
                    LEGS,
                    "jsonb_build_object('next', v_on) END,\n        p_epoch);",
                    "jsonb_build_object('next', v_on) END);",
                ),
            ],
            [f"{CANCEL}text_when_a_run_is_cancelled_then_it_is_kept_as_partial"],
        ),
        one(
            "saved_by_hand_is_stranded",
            "A message saved by hand in the last step gets its place at the run's end.",
            LEGS,
            "        PERFORM longhaul_messages_admit(v_run.thread_id, p_run, true, false);\n",
            "",
            "tests/protocol/test_exits.py::test_given_messages_saved_by_hand_when_the_run_ends_then_they_have_a_place",
        ),
        one(
            "stream_outlives_its_cancel",
            "A stream whose fence is gone is torn down, though its model is silent.",
            "runs/engine.py",
            '                claim.interrupt("lost")\n',
            "                pass\n",
            f"{LOST}a_stream_whose_fence_is_gone_is_torn_down_at_the_next_look",
        ),
    ],
)

BUSY = Group(
    "Busy threads",
    [
        one(
            "end_ignores_inputs",
            "Every end of a run that occupies its thread queues the oldest held one in the same transaction.",
            LEGS,
            "    IF v_run.status <> 'held' THEN\n        SELECT id INTO v_held",
            "    IF false THEN\n        SELECT id INTO v_held",
            f"{_OLDEST}[completed]",
            f"{_OLDEST}[finished]",
            f"{_OLDEST}[cancelled]",
            f"{_OLDEST}[past its deadline]",
            f"{_OLDEST}[poison]",
            f"{HELD}an_occupant_that_no_leg_holds_when_it_is_cancelled_then_it_releases_as_well",
            model="end_ignores_inputs",
        ),
        one(
            "held_end_releases",
            "The end of a held run releases nobody.",
            LEGS,
            "    IF v_run.status <> 'held' THEN\n        SELECT id INTO v_held",
            "    IF true THEN\n        SELECT id INTO v_held",
            f"{HELD}a_held_run_when_it_is_cancelled_then_nothing_is_released_and_its_input_never_had_a_place",
        ),
        one(
            "youngest_held_first",
            "The oldest held run is the next.",
            LEGS,
            "AND status = 'held' ORDER BY created_at, id LIMIT 1",
            "AND status = 'held' ORDER BY created_at DESC, id LIMIT 1",
            f"{_OLDEST}[completed]",
        ),
        one(
            "held_by_the_hosts_clock",
            "The oldest by the database's clock, not by the ids of the hosts.",
            LEGS,
            "AND status = 'held' ORDER BY created_at, id LIMIT 1",
            "AND status = 'held' ORDER BY id LIMIT 1",
            f"{HELD}hosts_whose_clocks_differ_then_the_oldest_is_the_one_accepted_first",
        ),
        one(
            "held_taken_without_its_lock",
            "The held run is locked before it is taken: one that is being cancelled is left out.",
            LEGS,
            "ORDER BY created_at, id LIMIT 1 FOR NO KEY UPDATE;",
            "ORDER BY created_at, id LIMIT 1;",
            f"{HELD}a_held_run_that_is_cancelled_while_the_occupant_ends_then_the_next_one_is_released",
        ),
        one(
            "released_run_is_not_due",
            "A released run is due to be published.",
            LEGS,
            _RELEASE,
            _RELEASE.replace(",\n        next_publish_at = longhaul_now() + interval '1 second'", ""),
            f"{_OLDEST}[completed]",
            f"{HELD}an_occupant_that_no_leg_holds_when_it_is_cancelled_then_it_releases_as_well",
        ),
        one(
            "released_run_keeps_its_dispatch_seq",
            "A release raises the `dispatch_seq`, as everything that queues a run.",
            LEGS,
            _RELEASE,
            _RELEASE.replace(" dispatch_seq = dispatch_seq + 1,", ""),
            f"{_OLDEST}[completed]",
        ),
        one(
            "released_input_has_no_place",
            "The input of a held run gets its place when the run leaves `held`.",
            LEGS,
            "    PERFORM longhaul_messages_admit(v_run.thread_id, v_held, false, true);\n",
            "",
            f"{_OLDEST}[completed]",
        ),
        one(
            "cancelled_input_waits_on",
            "The input of a held run that was cancelled never gets one.",
            LEGS,
            "            UPDATE longhaul_threads_message SET status = 'discarded' WHERE run_id = p_run AND",
            "            UPDATE longhaul_threads_message SET status = status WHERE run_id = p_run AND",
            f"{HELD}a_held_run_when_it_is_cancelled_then_nothing_is_released_and_its_input_never_had_a_place",
        ),
        one(
            "enqueue_without_lock",
            "New input is saved under the lock of the run that occupies the thread: a run that ends meanwhile strands nobody.",
            "runs/admission.py",
            "        occupied = transcript.lock_occupant(thread.pk)\n",
            "        from django.db import connection\n"
            "        with connection.cursor() as cursor:  # a look, no lock; the thread's row keeps two starts apart\n"
            "            cursor.execute('SELECT 1 FROM longhaul_threads_thread WHERE id = %s FOR NO KEY UPDATE', [thread.pk])\n"
            "        occupied = transcript.occupied(thread.pk, False)\n",
            f"{BUSY_START}an_input_that_comes_while_the_occupant_ends_is_not_stranded",
            model="enqueue_without_lock",
        ),
        one(
            "two_starts_on_a_free_thread",
            "On a free thread a start locks the thread's row: of two at once one is held.",
            "threads/transcript.py",
            "            if not Thread.objects.select_for_update(no_key=True).filter(pk=thread_id).exists():",
            "            if not Thread.objects.filter(pk=thread_id).exists():",
            f"{START}starts_at_once_on_one_thread_are_one_live_run_and_held_ones",
        ),
        one(
            "two_runs_occupy_a_thread",
            "One run occupies a thread: a unique index says so.",
            "runs/migrations/0001_initial.py",
            "condition=models.Q(('status__in', ['queued', 'running', 'waiting', 'requires_action'])), fields=('thread',)",
            "condition=models.Q(('status__in', ['nobody'])), fields=('thread',)",
            f"{HELD}an_occupied_thread_when_a_second_run_would_occupy_it_then_postgres_refuses",
        ),
        one(
            "start_overlooks_waiting",
            "A run that waits for its calls, or for a person, occupies its thread.",
            "runs/admission.py",
            "    occupying = Run.objects.filter(thread_id=thread_id, status__in=OCCUPYING)\n",
            "    occupying = Run.objects.filter(thread_id=thread_id, status__in=OCCUPYING[:2])\n",
            f"{BUSY_START}a_run_that_nobody_holds_at_the_moment_occupies_its_thread_all_the_same",
        ),
        one(
            "delete_without_lock",
            "Deleting a thread holds the run that occupies it, or the thread: none starts meanwhile.",
            "threads/models.py",
            "                transcript.lock_occupant(self.pk)\n",
            "                pass\n",
            f"{BAD_INPUT}a_thread_deleted_while_a_run_starts_on_it",
        ),
        one(
            "deleted_run_is_not_cancelled",
            "Deleting a live run cancels it first: its thread is free for the next.",
            "runs/apps.py",
            "        instance.cancel()\n",
            "        pass\n",
            "tests/engine/test_legs.py::test_deleting_the_run_that_occupies_a_thread_frees_it",
        ),
        Mutant(
            "delete_forgets_the_runs",
            "Deleting a thread cancels its live runs first: their legs are told.",
            [
                Change("threads/models.py", "            transcript.vacate(self.pk)\n", ""),
                Change("runs/apps.py", "        instance.cancel()\n", "        pass\n"),
            ],
            [f"{PUBLISHED}deleting_a_thread_tells_the_legs_of_its_runs"],
        ),
        one(
            "busy_reject_enqueues",
            "`reject` is answered with the live run.",
            "runs/admission.py",
            '    if run.busy == "reject":\n',
            "    if False:\n",
            f"{BUSY_START}a_start_that_would_not_wait_is_refused_with_the_live_run",
        ),
        one(
            "held_without_limit",
            "At most `MAX_HELD` runs wait for a thread.",
            "runs/admission.py",
            ".count() >= settings().max_held:",
            ".count() < 0:",
            f"{BUSY_START}a_thread_holds_so_many_runs_and_no_more",
        ),
        one(
            "saved_between_call_and_result",
            "A message saved by hand during a run waits: it never stands between a call and its result.",
            "threads/transcript.py",
            "        if lock_occupant(thread.pk):\n            for message",
            "        if lock_occupant(thread.pk) and False:\n            for message",
            "tests/engine/test_context.py::test_a_message_saved_by_hand_during_a_run_is_shown_at_the_next_boundary",
        ),
    ],
    [
        Exempt(
            "delete_without_vacate",
            "Deleting a thread cancels the held runs, then the occupant, before it deletes any.",
            "Each run that is deleted is cancelled by that: this only keeps one from being released in between.",
            together="delete_forgets_the_runs",
        ),
    ],
)
