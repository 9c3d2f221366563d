"""One plain table. It has no migrations: the benchmark makes it, in a database of its own."""

from __future__ import annotations

from typing import ClassVar

from django.conf import settings
from django.db import models

from threads.ids import new_id


class Note(models.Model):
    """What somebody has sent."""

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE)
    body = models.JSONField()
    created_at = models.DateTimeField(auto_now_add=True)

    objects: ClassVar[models.Manager[Note]] = models.Manager()

    def __str__(self) -> str:
        return str(self.id)
