"""The command line that all benchmarks share: --quick, --json, tables for people, what goes wrong in red, Ctrl-C."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rig import RigError

Figures = dict[str, Any]


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, Console], Figures],
    tables: Callable[[Figures], Sequence[Table]],
    arguments: Sequence[str] | None,
    *,
    quick: str,
) -> int:
    """Measure and show: one line of JSON, or tables; progress goes to stderr. Returns what the process exits with.

    `parser` has the benchmark's own options; `quick` says how long its quick form takes.
    """
    begun = time.monotonic()
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of tables")
    given = parser.parse_args(arguments)
    console = Console(stderr=True, log_path=False)
    out = Console()
    if not out.is_terminal:
        out.width = 160  # a pipe has no width; rich would take 80
    try:
        found = measure(given, console)
    except RigError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    if given.json:
        print(json.dumps({**found, "duration_s": round(time.monotonic() - begun, 1)}))
    else:
        for table in tables(found):
            out.print(table)
    return 0
