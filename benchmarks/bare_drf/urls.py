"""The project's addresses, and the two bare views beside them, on the same server."""

from django.urls import path

from agents_project import urls
from benchmarks.bare_drf.views import Notes, OneNote

urlpatterns = [
    *urls.urlpatterns,
    path("bare/notes", Notes.as_view()),
    path("bare/notes/<uuid:pk>", OneNote.as_view()),
]
