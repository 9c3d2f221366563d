"""Start a run for every ticket whose last word is the customer's and that nobody answers."""

from typing import Any

from django.core.management.base import BaseCommand

from desk.agents import support
from desk.models import Ticket
from runs.exceptions import NothingToDo


class Command(BaseCommand):
    help = __doc__ or ""

    def handle(self, *args: Any, **options: Any) -> None:
        for ticket in Ticket.objects.select_related("thread").order_by("pk"):
            if ticket.thread.runs.exclude(status__in=["completed", "failed", "cancelled"]).exists():
                continue
            try:
                run = support.start(thread=ticket.thread)
            except NothingToDo:
                continue
            self.stdout.write(f"{ticket.pk} {run.pk}")
