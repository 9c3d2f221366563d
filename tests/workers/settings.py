"""What the workers of these tests run with: the project, their agents, and short times."""

from agents_project.settings import *  # noqa: F403
from agents_project.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.workers.app"]
LONGHAUL = {"DRAIN_GRACE_SECONDS": 1, "MODEL_SILENCE_SECONDS": 60, "PRESENCE_TTL_SECONDS": 6, "POISON_LIMIT": 3}
