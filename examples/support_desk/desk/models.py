"""What the desk knows: orders, what was refunded of them, and the tickets of customers."""

from django.conf import settings
from django.db import models


class Order(models.Model):
    number = models.IntegerField(unique=True)
    customer = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="orders")
    state = models.CharField(max_length=20, default="paid")
    cents = models.IntegerField()

    def __str__(self) -> str:
        return f"order {self.number}"


class Refund(models.Model):
    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="refunds")
    cents = models.IntegerField()

    def __str__(self) -> str:
        return f"{self.cents} cents of {self.order}"


class Ticket(models.Model):
    """One conversation with a customer. Its messages and runs hang on the thread."""

    customer = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="tickets")
    subject = models.CharField(max_length=200)
    thread = models.OneToOneField("longhaul_threads.Thread", on_delete=models.PROTECT, related_name="ticket")
    urgent = models.BooleanField(default=False)

    def __str__(self) -> str:
        return self.subject


class Note(models.Model):
    """What a colleague should read. One a ticket and topic."""

    ticket = models.ForeignKey(Ticket, on_delete=models.CASCADE, related_name="notes")
    topic = models.CharField(max_length=50)
    text = models.TextField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["ticket", "topic"], name="desk_one_note_a_topic")]

    def __str__(self) -> str:
        return f"{self.topic}: {self.text}"
