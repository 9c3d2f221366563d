from django.apps import AppConfig


class StreamsTestConfig(AppConfig):
    name = "tests.streams.app"
    label = "longhaul_streams_test"
