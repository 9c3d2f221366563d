"""The benchmarks' settings, with the bare views on the same server."""

from benchmarks.settings import *  # noqa: F403
from benchmarks.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "benchmarks.bare_drf"]
ROOT_URLCONF = "benchmarks.bare_drf.urls"
