"""What the demo's tool does to the world: one row a call."""

from typing import ClassVar

from django.db import models

from threads.clock import Now


class Ledger(models.Model):
    """A call of the test tool that was done. Written in the transaction that settles the call."""

    call_id = models.UUIDField()
    number = models.IntegerField()
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        verbose_name_plural = "ledger"
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["call_id"], name="longhaul_one_ledger_row_a_call"),
        ]

    def __str__(self) -> str:
        return f"{self.number} by {self.call_id}"
