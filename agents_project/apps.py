"""The project as an app: what has to happen once in every process that uses Django."""

from django.apps import AppConfig


class ProjectConfig(AppConfig):
    name = "agents_project"
    label = "longhaul_project"

    def ready(self) -> None:
        # Creating the Celery app makes it the current one: `@shared_task` publishes through it, in web processes too.
        from agents_project import celery  # noqa: F401
