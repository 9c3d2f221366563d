import runpy
from pathlib import Path

from django.apps import AppConfig

# By its path, for the name `threads` may be that of a module of the host's.
runpy.run_path(str(Path(__file__).resolve().parents[1] / "threads" / "neighbours.py"))["check_neighbours"]()


class ThreadsConfig(AppConfig):
    name = "threads"
    label = "longhaul_threads"
    verbose_name = "Longhaul: threads"
    default_auto_field = "django.db.models.BigAutoField"
