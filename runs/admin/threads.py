"""Threads in the admin: their words are edited, their runs and messages shown. Deleting one cancels its live runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin import actions
from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse

from runs import access as sight
from runs.admin import parts
from runs.admin.followed import Followed, Section
from runs.models import LIVE, Run
from threads import access, clock
from threads.admin import marks
from threads.admin.listing import Before, Created, by_id, by_owner, choosing, in_window
from threads.exceptions import BadInput
from threads.models import Message, Thread
from threads.transcript import metadata_of

AT_ONCE = 100  # threads that are deleted by one action
RUNS = 20
MESSAGES = 20
COUNTED = 1_000  # rows of a kind that the page before a deletion counts


class ThreadForm(forms.ModelForm):  # type: ignore[type-arg] # Django's ModelForm takes no argument when it runs
    archived = forms.BooleanField(required=False)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if "archived" in self.fields:
            self.fields["archived"].initial = self.instance.archived_at is not None

    def clean_metadata(self) -> Any:
        try:
            return metadata_of(self.cleaned_data["metadata"])
        except BadInput as error:
            raise ValidationError(str(error)) from error


def _archived(rows: QuerySet[Any], value: str) -> QuerySet[Any]:
    return rows.filter(archived_at__isnull=value == "no")


@admin.register(Thread)
class ThreadAdmin(Followed):
    list_display = ("id", "title_", "agent", "owner", "archived_", "created")
    list_select_related = ("owner",)
    list_filter = (choosing("archived", [("no", "No"), ("yes", "Yes")], narrow=_archived), Created, Before)
    search_fields = ("title",)
    search_help_text = "By id or the beginning of it, the owner's username, or a part of the title."
    actions = ("delete_selected",)
    form = ThreadForm
    readonly_fields = ("id", "owner", "agent", "overrides_", "created", "archived_")
    fieldsets = (
        (None, {"fields": ("title", "summary", "metadata", "archived")}),
        ("Its runs get", {"fields": ("agent", "overrides_")}),
        ("Row", {"fields": ("id", "owner", "created", "archived_")}),
    )

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        given: Any = super().get_fieldsets(request, obj)
        if self.has_change_permission(request, obj):
            return given
        # The form's own field, `archived`, cannot be shown read only.
        return ((None, {"fields": ("title", "summary", "metadata_")}), *given[1:])

    def readings(self, rows: QuerySet[Any], term: str) -> Any:
        yield by_id(rows, "pk", term)
        yield by_owner(rows, term)
        yield in_window(rows, title__icontains=term)

    @admin.display(description="title")
    def title_(self, thread: Thread) -> str:
        return thread.title or marks.NOTHING

    @admin.display(description="archived at")
    def archived_(self, thread: Thread) -> str:
        return marks.moment(thread.archived_at)

    @admin.display(description="overrides")
    def overrides_(self, thread: Thread) -> str:
        return marks.pretty(thread.overrides)

    @admin.display(description="metadata")
    def metadata_(self, thread: Thread) -> str:
        return marks.pretty(thread.metadata)

    def sections(self, request: HttpRequest, row: Thread) -> list[Section]:
        found = []
        if self.sees(request, Run):
            found.append(self._runs(request, row))
        if self.sees(request, Message):
            found.append(self._messages(request, row))
        return found

    def _runs(self, request: HttpRequest, thread: Thread) -> Section:
        rows = sight.visible(Run, request.user).filter(thread=thread).order_by("-pk")
        runs = list(rows.defer("output", "error", "overrides", "metadata")[: RUNS + 1])
        shown = [
            {
                "link": marks.link(self.admin_site, Run, run.pk),
                "state": marks.state(run.status),
                "agent": run.agent,
                "origin": run.origin,
                "steps": run.steps,
                "created": marks.moment(run.created_at),
                "took": marks.took(run.created_at, run.finished_at),
            }
            for run in runs[:RUNS]
        ]
        note = f"The latest {RUNS}." if len(runs) > RUNS else ""
        more = marks.list_url(self.admin_site, Run, thread=thread.pk)
        return Section("Runs", "admin/longhaul_threads/thread/runs.html", shown, more, note)

    def _messages(self, request: HttpRequest, thread: Thread) -> Section:
        rows = sight.visible(Message, request.user).filter(thread=thread)
        try:
            last = int(request.GET["messages_to"])
        except (KeyError, ValueError):
            last = 2**62
        placed = list(rows.filter(position__lte=min(last, 2**62)).order_by("-position")[: MESSAGES + 1])
        shown = [parts.shown(self.admin_site, each) for each in reversed(placed[:MESSAGES])]
        older = f"?messages_to={placed[MESSAGES].position}#messages" if len(placed) > MESSAGES else ""
        more = marks.list_url(self.admin_site, Message, thread=thread.pk)
        return Section("Messages", "admin/longhaul_runs/run/messages.html", shown, more, older=older)

    # --- changed

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        allowed = admin.ModelAdmin.has_change_permission(self, request, obj)
        return allowed and (obj is None or access.may(request.user, "change", obj))

    def save_model(self, request: HttpRequest, obj: Thread, form: Any, change: bool) -> None:
        """Write what was changed and nothing else, for others write to the same row."""
        changed = [name for name in form.changed_data if name != "archived"]
        if form.cleaned_data["archived"] != (obj.archived_at is not None):
            obj.archived_at = clock.now() if form.cleaned_data["archived"] else None
            changed.append("archived_at")
        if changed:
            obj.save(update_fields=changed)

    # --- deleted

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        allowed = admin.ModelAdmin.has_delete_permission(self, request, obj)
        return allowed and (obj is None or access.may(request.user, "delete", obj))

    def get_deleted_objects(self, objs: Iterable[Any], request: HttpRequest) -> Any:
        """Tell what goes, counted to COUNTED: Django's own way would load each event of each run."""
        threads = [each for each in objs if access.may(request.user, "delete", each)]
        told = [marks.link(self.admin_site, Thread, each.pk, str(each)) for each in threads]
        ids = [each.pk for each in threads]
        runs = Run.objects.filter(thread_id__in=ids)
        counts = {
            "threads": len(threads),
            "messages": _counted(Message.objects.filter(thread_id__in=ids)),
            "runs, with all that is theirs": _counted(runs),
            "live runs, which are cancelled first": _counted(runs.filter(status__in=LIVE)),
        }
        return told, counts, set(), []

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        for thread in queryset:
            if access.may(request.user, "delete", thread):
                thread.delete()  # not the queryset's: the live runs are cancelled first

    @admin.action(description="Delete the selected threads", permissions=["delete"])
    def delete_selected(self, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        """Django's own action, for AT_ONCE threads: each is deleted with all that hangs on it."""
        ids = list(queryset.values_list("pk", flat=True)[: AT_ONCE + 1])
        if len(ids) > AT_ONCE:
            words = f"At most {AT_ONCE} threads are deleted at once: the first {AT_ONCE} of the selected ones."
            self.message_user(request, words, messages.WARNING)
        chosen = sight.visible(Thread, request.user).filter(pk__in=ids[:AT_ONCE])
        done: HttpResponse | None = actions.delete_selected(self, request, chosen)
        return done


def _counted(rows: QuerySet[Any]) -> str:
    count = rows.values("pk")[: COUNTED + 1].count()
    return f"more than {COUNTED:,}" if count > COUNTED else str(count)
