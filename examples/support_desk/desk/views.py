"""Tickets over HTTP. ATOMIC_REQUESTS is on: a ticket and the run that answers it are committed together."""

import json
from typing import Any

from django.contrib.auth.decorators import login_required
from django.contrib.auth.models import User
from django.db import transaction
from django.http import Http404, HttpRequest, JsonResponse
from django.shortcuts import get_object_or_404
from django.views.decorators.http import require_POST

from desk.agents import support
from desk.models import Ticket
from runs import Run
from runs.exceptions import BadInput


def _body(request: HttpRequest) -> dict[str, Any]:
    try:
        body = json.loads(request.body)
    except ValueError:
        body = None
    return body if isinstance(body, dict) else {}


def _told(run: Run, **more: Any) -> dict[str, Any]:
    return {"run": str(run.pk), "status": run.status, "output": run.output, **more}


def _ticket(request: HttpRequest, pk: int) -> Ticket:
    return get_object_or_404(Ticket.objects.select_related("thread"), pk=pk, customer_id=request.user.pk)


@require_POST
@login_required
def open_ticket(request: HttpRequest) -> JsonResponse:
    body = _body(request)
    customer = request.user
    assert isinstance(customer, User)  # login_required has seen to that
    try:
        # A key of the client's own makes a second, identical request harmless.
        run = support.start(body.get("text"), owner=customer, idempotency_key=body.get("key"))
    except BadInput as error:
        return JsonResponse({"error": str(error)}, status=400)
    ticket, _ = Ticket.objects.get_or_create(
        thread=run.thread, defaults={"customer": customer, "subject": body.get("subject", "")}
    )
    return JsonResponse(_told(run, ticket=ticket.pk), status=202)


@login_required
def show_ticket(request: HttpRequest, pk: int) -> JsonResponse:
    thread = _ticket(request, pk).thread
    messages = thread.messages.filter(role__in=["user", "assistant"]).order_by("position")
    runs = thread.runs.order_by("created_at", "id")
    return JsonResponse(
        {
            "messages": [{"role": each.role, "text": each.text} for each in messages if each.text],
            "runs": [_told(run, why=run.why()) for run in runs],
        }
    )


@require_POST
@login_required
def add_message(request: HttpRequest, pk: int) -> JsonResponse:
    """Say more. While the agent answers, it waits for its turn."""
    try:
        run = support.start(_body(request).get("text"), thread=_ticket(request, pk).thread)
    except BadInput as error:
        return JsonResponse({"error": str(error)}, status=400)
    return JsonResponse(_told(run), status=202)


@require_POST
@login_required
def stop(request: HttpRequest, pk: int) -> JsonResponse:
    """Stop the answer that is being made. An answer that waits behind it goes on."""
    run = _ticket(request, pk).thread.runs.exclude(status__in=["held", "completed", "failed", "cancelled"]).first()
    if run is None:
        raise Http404
    return JsonResponse(_told(run.cancel("stopped by the customer")))


@transaction.non_atomic_requests  # Django has no ATOMIC_REQUESTS for async views
@require_POST
async def ask(request: HttpRequest) -> JsonResponse:
    """A question without a ticket, from an async view: `astart` is a transaction of its own."""
    try:
        run = await support.astart(_body(request).get("text"), save="none")
    except BadInput as error:
        return JsonResponse({"error": str(error)}, status=400)
    return JsonResponse(_told(run), status=202)
