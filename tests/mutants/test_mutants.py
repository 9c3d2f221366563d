"""The list fits the code: no mutant is applied here. `make mutants` does that."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.mutants import page
from tests.mutants.__main__ import shard_of
from tests.mutants.catalogue import GROUPS, LATER, MUTANTS
from tests.mutants.mutant import Change, Mutant, Stale
from tests.mutants.workshop import PROJECT

EXEMPT = [each for group in GROUPS for each in group.exempt]
# The breaks of the two lists of the model of the protocol.
SEEDED = {
    "no_fence_commit", "no_fence_flush", "no_fence_boundary", "no_fence_retry", "settle_without_run_lock",
    "publish_before_commit", "reclaim_without_presence", "no_sweep", "atomic_in_two", "rerun_non_idempotent",
    "cancel_leaves_calls_open",
}  # fmt: skip
AS_WRITTEN = {
    "fence_epoch_only", "flusher_not_drained", "flush_retry_blind", "no_disown", "no_tool_republish", "cancel_is_a_flag",
    "end_ignores_inputs", "enqueue_without_lock", "discard_at_claim", "end_without_join", "poison_counts_claims",
    "claim_while_absent", "early_result_refused", "pg_outage_counts", "pg_crash_frees_locks", "stale_reclaim",
    "child_in_two", "child_end_in_two", "inv5_as_written",
}  # fmt: skip


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((PROJECT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def problems(mutant: Mutant) -> Iterator[str]:
    try:
        mutant.texts(PROJECT)
    except Stale as stale:
        yield f"{mutant.name} is stale: {stale}"
    if not mutant.tests:
        yield f"{mutant.name} names no test"
    for test in mutant.tests:
        file, *_, name = test.partition("[")[0].split("::")
        if name not in functions_of(file):
            yield f"{mutant.name}: there is no test {test}"


def test_every_mutant_fits_the_code_and_its_tests_exist() -> None:
    """A change of the code may need its mutant changed with it, or the docs' tables: see below."""
    assert not [problem for mutant in MUTANTS for problem in problems(mutant)]


def test_every_name_is_given_once() -> None:
    names = [mutant.name for mutant in MUTANTS] + [each.name for each in EXEMPT]
    assert len(names) == len(set(names))


def test_every_break_of_the_model_is_a_mutant_or_exempt_or_comes_later() -> None:
    known = {mutant.model for mutant in MUTANTS} | {each.model for each in EXEMPT} | {later.model for later in LATER}
    assert known >= SEEDED | AS_WRITTEN


def test_what_is_exempt_names_the_mutant_that_takes_both_layers_away() -> None:
    names = {mutant.name for mutant in MUTANTS}
    assert {name for each in EXEMPT for name in each.together.split("`, `") if name} <= names


def test_the_tables_of_the_docs_are_those_of_the_list() -> None:
    text = (PROJECT / "docs/durability.md").read_text()
    table = text.partition(page.BEGIN)[2].partition(page.END)[0]
    assert table == page.tables(), "write them anew: python -m tests.mutants --docs"


def test_a_mutant_whose_text_has_changed_is_stale(tmp_path: Path) -> None:
    (tmp_path / "code").write_text("a b b")
    assert Mutant("m", "r", [Change("code", "a", "x"), Change("code", "x b ", "y ")], ["t"]).texts(tmp_path) == {
        "code": "y b"
    }
    for old in ("b", "c"):
        with pytest.raises(Stale):
            Mutant("m", "r", [Change("code", old, "x")], ["t"]).texts(tmp_path)


def test_shards_are_all_mutants_once() -> None:
    mutants = list(MUTANTS)
    parts = [shard_of(mutants, f"{i}/4") for i in (1, 2, 3, 4)]
    assert sorted(mutant.name for part in parts for mutant in part) == sorted(mutant.name for mutant in mutants)
    for wrong in ("0/4", "5/4", "1", "a/b"):
        with pytest.raises(ValueError, match="1/4"):
            shard_of(mutants, wrong)
