from django.apps import AppConfig


class LonghaulAppConfig(AppConfig):
    name = "benchmarks.longhaul_app"
    label = "longhaul_benchmarks"
