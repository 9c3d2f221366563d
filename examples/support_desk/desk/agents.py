"""The agent that answers tickets, and what it can do. A tool of each kind: see docs/tools.md of Longhaul."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from django.core.mail import send_mail
from django.db import transaction
from django.db.models import Sum
from pydantic import Field

from desk import carrier
from desk.models import Note, Order, Refund, Ticket
from runs import Agent
from tools import ModelRetry, RetryPolicy, ToolContext, ToolFailed, tool

if TYPE_CHECKING:
    from runs import Run


# A model may say anything: a refund of -500 would be a debt.
Cents = Annotated[int, Field(gt=0)]


def order_of(ctx: ToolContext, number: int) -> Order:
    """Return an order of the run's customer. Nobody reads those of others, whatever the model asks for."""
    own = Order.objects.filter(customer_id=ctx.owner_id)
    try:
        return own.get(number=number)
    except Order.DoesNotExist:
        theirs = ", ".join(str(each) for each in own.order_by("number").values_list("number", flat=True))
        raise ModelRetry(f"The customer has no order {number}. There are: {theirs or 'none'}.") from None


@tool(idempotent=True)
def look_up_order(number: int, ctx: ToolContext) -> dict[str, Any]:
    """Find an order of the customer.

    Args:
        number: the order's number, as printed on the invoice
    """
    order = order_of(ctx, number)
    return {"number": order.number, "state": order.state, "cents": order.cents}


@tool(retry=RetryPolicy(attempts=3, initial_seconds=60, max_seconds=600, jitter=False, retry_on=(OSError,)))
def track_parcel(number: int, ctx: ToolContext) -> dict[str, Any]:
    """Ask the carrier where the parcel of an order is.

    Args:
        number: the order's number
    """
    return carrier.where_is(f"desk-{order_of(ctx, number).number}")


@tool(atomic=True)
def refund(number: int, cents: Cents, ctx: ToolContext) -> dict[str, Any]:
    """Refund an order, or a part of it.

    Args:
        number: the order's number
        cents: how much, in cents
    """
    order = order_of(ctx, number)
    Order.objects.select_for_update().get(pk=order.pk)  # two refunds of one order come one after the other
    left = order.cents - (order.refunds.aggregate(sum=Sum("cents"))["sum"] or 0)
    made = Refund.objects.create(order=order, cents=cents)
    if cents > left:
        raise ToolFailed(
            f"Only {left} cents are left to refund."
        )  # takes the row back, for all this is one transaction
    transaction.on_commit(partial(tell_the_books, made.pk))
    return {"refunded": cents, "left": left - cents}


def tell_the_books(pk: int) -> None:
    """A mail to the bookkeeping. Not in the transaction: what was sent cannot be taken back."""
    made = Refund.objects.select_related("order").get(pk=pk)
    send_mail(f"Refund of order {made.order.number}", f"{made.cents} cents", None, ["books@desk.example"])


@tool(idempotent=False)
def send_voucher(cents: Cents, ctx: ToolContext) -> str:
    """Mail the customer a voucher. At most once: a second one would be a gift.

    Args:
        cents: its worth, in cents
    """
    customer = ctx.owner
    address = getattr(customer, "email", "")
    if not address:
        raise ToolFailed("The customer has no mail address.")
    send_mail("Your voucher", f"{cents} cents, code {ctx.idempotency_key}", None, [address])
    return "sent"


@tool
async def leave_note(topic: str, text: str, ctx: ToolContext) -> str:
    """Leave a note for a colleague; an older one on the same topic is replaced.

    Args:
        topic: one word
        text: what the colleague should know
    """
    ticket = await Ticket.objects.aget(thread=ctx.thread)
    _, new = await Note.objects.aupdate_or_create(ticket=ticket, topic=topic, defaults={"text": text})
    return "noted" if new else "replaced"


def instruct(run: "Run") -> str:
    """What the model is told first. Called once a leg."""
    said = "You answer customers of a shop. Look each order up before you speak of it."
    urgent = Ticket.objects.filter(thread_id=run.thread_id, urgent=True).exists()
    return f"{said} The customer is waiting: be short." if urgent else said


support = Agent(
    name="support",
    instructions=instruct,
    tools=[look_up_order, track_parcel, refund, send_voucher, leave_note],
    max_steps=6,
    max_total_tokens=50_000,
    deadline_seconds=3600,
)
