"""What web processes and workers of these tests run with: those of the workers' tests, and an agent that tells."""

from tests.workers.settings import *  # noqa: F403
from tests.workers.settings import INSTALLED_APPS
from tests.workers.settings import LONGHAUL as SAID

INSTALLED_APPS = [*INSTALLED_APPS, "tests.streams.app"]
LONGHAUL = {**SAID, "API_RATE": None}
