"""What the server of these tests runs with: the project, the tests' agents, and bodies and rates that tests can reach."""

from agents_project.settings import *  # noqa: F403
from agents_project.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.workers.app"]
LONGHAUL = {"API_RATE": None}
