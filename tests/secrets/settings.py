"""What the processes of this test run with: the project as LOG_FORMAT=json has it, our loggers at DEBUG, and bad manners."""

from agents_project.settings import *  # noqa: F403
from agents_project.settings import INSTALLED_APPS, LOGGING

INSTALLED_APPS = [*INSTALLED_APPS, "tests.secrets.app"]
ROOT_URLCONF = "tests.secrets.urls"
LOGGING["loggers"]["longhaul"] = {"level": "DEBUG"}
LONGHAUL = {"MODEL_TRIES": 2, "PRESENCE_TTL_SECONDS": 6}
