"""`make mutants`: apply each mutant to a private copy and see that its tests fail."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.mutants import page
from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant
from tests.mutants.workshop import Verdict, Workshop, WorkshopError

COLOURS = {"killed": "green", "survived": "bold red", "broken": "bold magenta", "stale": "bold yellow"}


def shard_of(mutants: list[Mutant], shard: str) -> list[Mutant]:
    """Return every n-th mutant: `shard` is "i/n", i from 1."""
    i, _, n = shard.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise ValueError(f"--shard must be like 1/4; it is {shard!r}.")
    return mutants[int(i) - 1 :: int(n)]


def judge(mutants: list[Mutant], console: Console, *, shown: bool) -> list[Verdict]:
    verdicts: list[Verdict] = []
    with (
        Workshop() as workshop,
        Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console,
            transient=True,
        ) as progress,
    ):  # fmt: skip
        task = progress.add_task("the unchanged code", total=len(mutants))
        workshop.check_unchanged(mutants)
        for mutant in mutants:
            progress.update(task, description=mutant.name)
            verdict = workshop.judge(mutant)
            verdicts.append(verdict)
            progress.advance(task)
            colour = COLOURS[verdict.verdict]
            progress.print(f"[{colour}]{verdict.verdict:8}[/] {verdict.seconds:5.1f} s  {mutant.name}", highlight=False)
            if shown or verdict.verdict != "killed":
                for line in [f"rule: {mutant.rule}", *verdict.why]:
                    progress.print(f"           {line}", markup=False, highlight=False)
    return verdicts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", metavar="NAME", action="append", help="this mutant (may be given again)")
    parser.add_argument("--shard", metavar="I/N", help="every N-th mutant, beginning with the I-th")
    parser.add_argument("--json", action="store_true", help="the verdicts as JSON on stdout, the progress on stderr")
    parser.add_argument(
        "--verbose", action="store_true", help="what pytest printed, for each mutant that was not killed"
    )
    parser.add_argument("--list", action="store_true", help="print the names, run nothing")
    parser.add_argument("--docs", action="store_true", help="print the tables of docs/durability.md, run nothing")
    given = parser.parse_args(arguments)
    if given.docs:
        print(page.tables(), end="")
        return 0
    mutants = list(MUTANTS)
    if given.only:
        by_name = {mutant.name: mutant for mutant in mutants}
        if unknown := [name for name in given.only if name not in by_name]:
            parser.error(f"there is no mutant {', '.join(unknown)}; --list names them")
        mutants = [by_name[name] for name in given.only]
    if given.shard:
        try:
            mutants = shard_of(mutants, given.shard)
        except ValueError as error:
            parser.error(str(error))
    if given.list:
        print("\n".join(mutant.name for mutant in mutants))
        return 0
    console = Console(stderr=given.json)
    began = time.monotonic()
    try:
        verdicts = judge(mutants, console, shown=bool(given.only))
    except WorkshopError as error:
        console.print(str(error), markup=False, highlight=False)
        return 2
    counts = Counter(verdict.verdict for verdict in verdicts)
    if given.verbose:
        for verdict in verdicts:
            if verdict.verdict != "killed":
                console.print(f"\n--- {verdict.mutant}\n{verdict.output}", markup=False, highlight=False)
    if given.json:
        answer = {
            **{kind: counts[kind] for kind in COLOURS},
            "seconds": round(time.monotonic() - began, 1),
            "mutants": [{k: v for k, v in asdict(verdict).items() if k != "output"} for verdict in verdicts],
        }
        print(json.dumps(answer, indent=2))
    said = ", ".join(f"{counts[kind]} {kind}" for kind in COLOURS if counts[kind])
    console.print(f"{len(verdicts)} mutants: {said}. {time.monotonic() - began:.0f} s", highlight=False)
    return 0 if counts["killed"] == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
