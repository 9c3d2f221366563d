from django.apps import AppConfig


class SecretsTestConfig(AppConfig):
    name = "tests.secrets.app"
    label = "longhaul_secrets_test"
