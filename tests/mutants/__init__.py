"""Mutants: for each rule of the run protocol a change of the real code that removes it, and the tests that then fail.

    python -m tests.mutants                       all of them (make mutants)
    python -m tests.mutants --only NAME           one, with what its tests said
    python -m tests.mutants --shard 1/4 --json    a quarter of them, for a script
    python -m tests.mutants --docs                the tables of docs/durability.md

`mutant.py` says what a mutant is, `catalogue/` is the list, `workshop.py` breaks a private copy of the project and runs the
tests there, `verdict.py` is the pytest plugin that tells the workshop what became of them. `test_mutants.py` is the quick
check that the list fits the code: `make test` runs it, and never a mutant.
"""
