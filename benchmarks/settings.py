"""The project's settings, with the app that holds the benchmarks' agents."""

import os

from agents_project.settings import *  # noqa: F403
from agents_project.settings import INSTALLED_APPS, LONGHAUL

INSTALLED_APPS = [*INSTALLED_APPS, "benchmarks.longhaul_app"]
if _flush := os.environ.get("LONGHAUL_BENCH_FLUSH_MS"):  # of the workers that `delta_writes` starts
    LONGHAUL = {**LONGHAUL, "FLUSH_MILLISECONDS": float(_flush)}
