import os
from datetime import timedelta

from django.apps import AppConfig


class WorkersTestConfig(AppConfig):
    name = "tests.workers.app"
    label = "longhaul_workers_test"

    def ready(self) -> None:
        from runs import quotas

        if seconds := os.environ.get("TESTS_MODEL_MINUTE_SECONDS"):
            quotas.MINUTE = timedelta(seconds=float(seconds))
