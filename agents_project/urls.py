"""The project's URLs."""

from django.contrib import admin
from django.urls import URLPattern, URLResolver, include, path

admin.site.site_url = "/api/docs"

urlpatterns: list[URLPattern | URLResolver] = [path("admin/", admin.site.urls), path("", include("runs.http.urls"))]
