"""`python -m tests.model [--json] [--quick] [SCENARIO or BREAK ...]`: a table; for one break its shortest story."""

from __future__ import annotations

import argparse
import json
import sys

from tests.model.scenarios import BREAKS, QUICK, SCENARIOS
from tests.model.search import Found, search


def told(name: str, scenario: str, found: Found, as_expected: bool, harmless: str) -> dict[str, object]:
    return {
        "name": name,
        "scenario": scenario,
        "states": found.states,
        "seconds": round(found.seconds, 2),
        "verdict": found.wrong or ("all checks hold" if name == scenario else "harmless"),
        "as_expected": as_expected,
        **({"harmless": harmless} if harmless else {}),
        "story": list(found.story),
    }


def of_break(name: str) -> Found:
    broken = BREAKS[name]
    return search(SCENARIOS[broken.scenario], frozenset(broken.together or (name,)))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="scenarios and breaks; all when there is none")
    parser.add_argument("--json", action="store_true", help="one JSON list, with the stories")
    parser.add_argument("--quick", action="store_true", help="without the large scenarios")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in SCENARIOS and name not in BREAKS]:
        parser.error(f"unknown: {', '.join(unknown)}. There are {', '.join([*SCENARIOS, *BREAKS])}")
    scenarios = [scenario.name for scenario in QUICK] if options.quick else list(SCENARIOS)
    rows = []
    for name in options.names or [*scenarios, *BREAKS]:
        if name in SCENARIOS:
            found = search(SCENARIOS[name])
            row = told(name, name, found, not found.wrong, "")
        else:
            found = of_break(name)
            broken = BREAKS[name]
            row = told(name, broken.scenario, found, bool(found.wrong) != bool(broken.harmless), broken.harmless)
        rows.append(row)
        if not options.json:
            mark = "  " if row["as_expected"] else "! "
            line = f"{mark}{name:34} {row['scenario']:18} {found.states:9,} states {found.seconds:7.1f} s  {row['verdict']}"
            print(line, flush=True)
            if len(options.names) == 1 or not row["as_expected"]:
                if name in BREAKS:
                    print(f"\n  What if {BREAKS[name].says}?\n")
                    if BREAKS[name].harmless:
                        print(f"  Harmless: {BREAKS[name].harmless}.")
                for number, what in enumerate(found.story, start=1):
                    print(f"  {number:3}. {what}")
                if found.story:
                    print(f"   => {found.wrong}")
    surprises = [row["name"] for row in rows if not row["as_expected"]]
    if options.json:
        print(json.dumps(rows, indent=2))
    elif len(rows) > 1:
        total = sum(int(str(row["states"])) for row in rows)
        print(f"{total:,} states; not as expected: {', '.join(map(str, surprises)) or 'nothing'}")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
