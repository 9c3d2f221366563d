"""The project's settings, with the app that holds the benchmarks' agents."""

from agents_project.settings import *  # noqa: F403
from agents_project.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "benchmarks.longhaul_app"]
