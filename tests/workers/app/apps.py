from django.apps import AppConfig


class WorkersTestConfig(AppConfig):
    name = "tests.workers.app"
    label = "longhaul_workers_test"
