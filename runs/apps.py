from django.apps import AppConfig


class RunsConfig(AppConfig):
    name = "runs"
    label = "longhaul_runs"
    verbose_name = "Longhaul: runs"
    default_auto_field = "django.db.models.BigAutoField"
