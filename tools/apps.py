from django.apps import AppConfig


class ToolsConfig(AppConfig):
    name = "tools"
    label = "longhaul_tools"
    verbose_name = "Longhaul: tools"
    default_auto_field = "django.db.models.BigAutoField"
