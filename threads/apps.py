from django.apps import AppConfig


class ThreadsConfig(AppConfig):
    name = "threads"
    label = "longhaul_threads"
    verbose_name = "Longhaul: threads"
    default_auto_field = "django.db.models.BigAutoField"
