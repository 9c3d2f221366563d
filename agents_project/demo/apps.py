from django.apps import AppConfig


class DemoConfig(AppConfig):
    name = "agents_project.demo"
    label = "longhaul_demo"
    verbose_name = "Longhaul: demo"
    default_auto_field = "django.db.models.BigAutoField"
