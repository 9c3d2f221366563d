from django.apps import AppConfig


class BareDrfConfig(AppConfig):
    name = "benchmarks.bare_drf"
    label = "bare_drf"
