"""What becomes of a log after the end of its run."""

from __future__ import annotations

from tests.mutants.mutant import Group, one

_COMPACTION = "runs/compaction.py"
_TESTS = "tests/runs/test_compaction.py::test_"
_SAME = f"{_TESTS}a_fold_of_the_log_is_the_same_before_and_after"
_CURSORS = f"{_TESTS}every_cursor_gets_what_follows_it"

COMPACTED = Group(
    "Compaction",
    [
        one(
            "compacts_the_live",
            "Only the log of an ended run is compacted.",
            _COMPACTION,
            '_DUE = "FROM longhaul_runs_run WHERE finished_at < %s AND',
            "_DUE = \"FROM longhaul_runs_run WHERE coalesce(finished_at, '2000-01-01') < %s AND",
            f"{_TESTS}a_log_is_compacted_so_long_after_its_runs_end",
        ),
        one(
            "folds_across",
            "A fold of the log gives the same before and after: only deltas that differ in nothing but their text are folded.",
            _COMPACTION,
            " AND lag(type) OVER w = type AND lag(rest) OVER w = rest",
            "",
            _SAME,
            _CURSORS,
        ),
        one(
            "folds_over_others",
            "Only neighbours are folded: a range holds no other event.",
            _COMPACTION,
            "lag(seq) OVER w = seq - 1 AND ",
            "",
            f"{_TESTS}a_folded_event_is_bounded_and_what_is_large_stays",
        ),
        one(
            "counts_bytes",
            "A cursor within a range gets the rest of its text, by characters.",
            _COMPACTION,
            "string_agg(char_length(text)",
            "string_agg(octet_length(text)",
            _CURSORS,
        ),
        one(
            "compacts_unheld",
            "A batch holds the run, and is one transaction.",
            _COMPACTION,
            "                with transaction.atomic():\n",
            "                if True:\n",
            f"{_TESTS}beside_another_one_and_beside_who_deletes_the_thread_it_waits_for_nobody",
        ),
        one(
            "removes_half_a_range",
            "What a retention setting removes ends with a range, not within.",
            "runs/housekeeping.py",
            "            through = seq  # a",
            "            pass  # a",
            f"{_TESTS}what_is_removed_later_goes_as_a_whole",
        ),
    ],
)
