"""The project's application, which asks after a second in place of half a minute whether readers may still see what they see."""

from agents_project.asgi import application as application
from runs.streams import broadcast

broadcast.CHECK_SECONDS = 1.0
