"""What the workers of these tests run with: the project, their agents, and short times."""

import json
import os

from agents_project.settings import *  # noqa: F403
from agents_project.settings import INSTALLED_APPS, LOGGING
from agents_project.settings import LONGHAUL as SAID

INSTALLED_APPS = [*INSTALLED_APPS, "tests.workers.app"]
LONGHAUL = {
    **SAID,
    "DRAIN_GRACE_SECONDS": 1,
    "MODEL_SILENCE_SECONDS": 60,
    "PRESENCE_TTL_SECONDS": float(os.environ.get("TESTS_PRESENCE_TTL_SECONDS", "6")),
    "POISON_LIMIT": 3,
    "MODEL_LIMITS": json.loads(os.environ.get("TESTS_MODEL_LIMITS", "{}")),
    "CANCEL_GRACE_SECONDS": 2,
    **json.loads(os.environ.get("TESTS_LONGHAUL", "{}")),
}

LOGGING["handlers"]["console"]["formatter"] = "json"
LOGGING_CONFIG = "threads.logs.configure"  # both as with LOG_FORMAT=json
