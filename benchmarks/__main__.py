"""Run the benchmarks, one after another, each in a process and on servers of its own."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence

MODULES = (
    "step_cost",
    "fan_out",
    "resume",
    "rolling_restart",
    "flat_cost",
    "memory",
    "celery_events",
    "provider",
    "http",
    "streams",
    "delta_writes",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("module", nargs="*", help=f"which ones (default: all of {', '.join(MODULES)})")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: a module ends in one to two minutes")
    parser.add_argument("--json", action="store_true", help="one line of JSON a module instead of tables")
    given = parser.parse_args(arguments)
    unknown = set(given.module) - set(MODULES)
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are: {', '.join(MODULES)}")
    flags = [flag for flag, on in (("--quick", given.quick), ("--json", given.json)) if on]
    # Ctrl-C reaches the module too, which ends what it started; we stay to say how it ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worst = 0
    for module in given.module or MODULES:
        child = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", *flags],
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        signal.signal(signal.SIGTERM, lambda *_, child=child: child.terminate())
        code = child.wait()
        worst = max(worst, abs(code))
        if code in (130, -signal.SIGINT):
            break
    return worst


if __name__ == "__main__":
    sys.exit(main())
