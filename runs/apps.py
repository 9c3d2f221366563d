from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from django.apps import AppConfig
from django.db.models.signals import pre_delete

# By its path, for the name `threads` may be that of a module of the host's.
runpy.run_path(str(Path(__file__).resolve().parents[1] / "threads" / "neighbours.py"))["check_neighbours"]()


class RunsConfig(AppConfig):
    name = "runs"
    label = "longhaul_runs"
    verbose_name = "Longhaul: runs"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        # Those that are not used here register themselves; tasks here, for a host may look for its own only.
        from runs import admission, checks, tasks, worker  # noqa: F401
        from runs.run_log import DatabaseRunLog
        from threads import transcript
        from tools import run_log

        run_log.install(DatabaseRunLog())
        transcript.occupied = admission.occupied
        transcript.vacate = admission.vacate
        pre_delete.connect(delete_what_hangs_on_a_run, sender=self.get_model("Run"), dispatch_uid="longhaul.runs")


def delete_what_hangs_on_a_run(instance: Any, **_: Any) -> None:
    """Messages and calls name their run by a plain id, so they are deleted with it here.

    A live run is cancelled first: its leg stops, and its thread is free for the run that waits behind it.
    """
    from runs.models import LIVE
    from threads.models import Message
    from tools.models import ToolCall

    if type(instance).objects.filter(pk=instance.pk, status__in=LIVE).exists():
        instance.cancel()
    ToolCall.objects.filter(run_id=instance.pk).delete()
    Message.objects.filter(run_id=instance.pk).delete()
