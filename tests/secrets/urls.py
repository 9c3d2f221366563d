"""The project's URLs, and a view that fails with secrets in all that a report of it could show."""

import json
import os

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.urls import path

from agents_project.urls import urlpatterns as of_the_project


def boom(request: HttpRequest) -> HttpResponse:
    planted = json.loads(os.environ["PLANTED"])
    where = f"https://vendor.example/v1?api_key={planted['url']}"  # a local variable that a report may show
    raise RuntimeError(f"{where} and {settings.DATABASE_URL} and {settings.SECRET_KEY}")


urlpatterns = [*of_the_project, path("boom", boom)]
