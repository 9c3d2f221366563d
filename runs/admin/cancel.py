"""Cancelling runs in the admin: a page asks first, with a reason; each cancelled run gets an entry in the admin's log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse

from runs.models import LIVE, Run
from threads import access

if TYPE_CHECKING:
    from django.contrib.admin import ModelAdmin

AT_ONCE = 100  # runs; each is cancelled in a transaction of its own


class ReasonForm(forms.Form):
    reason = forms.CharField(
        max_length=500,
        required=False,
        widget=forms.TextInput(attrs={"class": "vTextField", "autofocus": True}),
        help_text="The run's error and the log of the admin keep it.",
    )


def allowed(request: HttpRequest, run: Run | None = None) -> bool:
    """Return whether the user may cancel: the permission, and the policy's word on the run."""
    user: Any = request.user
    if not user.has_perm(access.permission("cancel", Run)):
        return False
    return run is None or access.may(user, "cancel", run)


def ask(
    request: HttpRequest,
    model_admin: ModelAdmin[Run],
    runs: Sequence[Run],
    form: ReasonForm,
    *,
    back: str,
    action: str = "",
    unchanged: int = 0,
    more: bool = False,
) -> HttpResponse:
    """Return the page that asks. `action` is that of the list it came from; without one it is a run's own page."""
    context = {
        **model_admin.admin_site.each_context(request),
        "title": f"Cancel {count_of(len(runs))}?" if action else "Cancel this run?",
        "opts": model_admin.opts,
        "media": model_admin.media,
        "runs": runs,
        "form": form,
        "back": back,
        "action": action,
        "checkbox": ACTION_CHECKBOX_NAME,
        "unchanged": unchanged,
        "more": more,
        "at_once": AT_ONCE,
    }
    return TemplateResponse(request, "admin/longhaul_runs/run/cancel.html", context)


def cancel(request: HttpRequest, model_admin: ModelAdmin[Run], runs: Iterable[Run], reason: str) -> None:
    """Cancel each run that is live still, log it, and tell the user what became of them."""
    cancelled, refused = 0, 0
    unchanged: list[Run] = []
    for run in runs:
        if not allowed(request, run):
            refused += 1
        elif _cancel(run, reason):
            cancelled += 1
            model_admin.log_change(request, run, f"Cancelled: {reason}" if reason else "Cancelled.")
        else:
            unchanged.append(run)
    if cancelled:
        model_admin.message_user(request, f"{count_of(cancelled)} cancelled.", messages.SUCCESS)
    if len(unchanged) == 1:
        words = f"Run {unchanged[0].pk} had ended before ({unchanged[0].status}) and is unchanged."
        model_admin.message_user(request, words, messages.WARNING)
    elif unchanged:
        words = f"{count_of(len(unchanged))} had ended before and are unchanged."
        model_admin.message_user(request, words, messages.WARNING)
    if refused:
        model_admin.message_user(request, f"{count_of(refused)} may not be cancelled by you.", messages.ERROR)


def _cancel(run: Run, reason: str) -> bool:
    """Return whether it was we who cancelled it: the row is held from the look to the end."""
    with transaction.atomic():
        live = Run.objects.select_for_update(no_key=True).filter(pk=run.pk, status__in=LIVE).exists()
        run.cancel(reason)
    return live


def count_of(runs: int) -> str:
    return "1 run" if runs == 1 else f"{runs} runs"
