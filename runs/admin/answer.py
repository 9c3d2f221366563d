"""Saying in the admin what became of a call whose worker died: a page asks; the answer gets an entry in the admin's log."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse

from runs.models import Run
from threads import access
from threads.exceptions import LonghaulError
from tools.models import CallStatus, ToolCall

if TYPE_CHECKING:
    from django.contrib.admin import ModelAdmin

RESULT, ERROR, AGAIN = "result", "error", "again"


class AnswerForm(forms.Form):
    what = forms.ChoiceField(
        choices=[
            (RESULT, "It took effect: this is its result"),
            (ERROR, "It failed, or must not be tried again: the model reads why"),
            (AGAIN, "It did not take effect: run it again"),
        ],
        widget=forms.RadioSelect,
        label="What happened",
    )
    text = forms.CharField(
        max_length=10_000,
        required=False,
        widget=forms.Textarea(attrs={"rows": 4, "class": "vLargeTextField"}),
        help_text="The result, as JSON or as plain text; or what happened.",
    )

    def clean(self) -> dict[str, Any]:
        given: dict[str, Any] = super().clean() or {}
        if given.get("what") in (ERROR, AGAIN) and not given.get("text", "").strip():
            self.add_error("text", "Say what happened.")
        return given

    def result(self) -> Any:
        text = self.cleaned_data["text"]
        if not text.strip():
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):  # the latter of thousands of brackets
            return text


def allowed(request: HttpRequest, call: ToolCall) -> bool:
    """Return whether the user may answer for the call: the permission, and the policy's word on its run."""
    user: Any = request.user
    if not user.has_perm(access.permission("answer", ToolCall)):
        return False
    run = Run.objects.filter(pk=call.run_id).first()
    return run is not None and access.may(user, "answer", run)


def open_to(request: HttpRequest, call: ToolCall) -> bool:
    return call.status == CallStatus.UNKNOWN and allowed(request, call)


def ask(
    request: HttpRequest, model_admin: ModelAdmin[ToolCall], call: ToolCall, form: AnswerForm, *, back: str
) -> HttpResponse:
    """Return the page that asks."""
    context = {
        **model_admin.admin_site.each_context(request),
        "title": "What became of this call?",
        "opts": model_admin.opts,
        "media": model_admin.media,
        "call": call,
        "form": form,
        "back": back,
    }
    return TemplateResponse(request, "admin/longhaul_tools/toolcall/answer.html", context)


def answer(request: HttpRequest, model_admin: ModelAdmin[ToolCall], call: ToolCall, form: AnswerForm) -> None:
    """Say it, log it, and tell the user what became of it."""
    text = form.cleaned_data["text"]
    try:
        if form.cleaned_data["what"] == RESULT:
            call.succeed(form.result(), by=request.user)
            said = "Settled with a result."
        else:
            again = form.cleaned_data["what"] == AGAIN
            call.fail(text, retryable=again, by=request.user)
            said = f"Runs again: {text}" if again else f"Settled as failed: {text}"
    except LonghaulError as error:  # somebody was first, or it cannot be taken
        model_admin.message_user(request, str(error), messages.WARNING)
    except ToolCall.DoesNotExist:
        model_admin.message_user(request, "The call is not there any more.", messages.WARNING)
    else:
        model_admin.log_change(request, call, said)
        model_admin.message_user(request, said, messages.SUCCESS)
