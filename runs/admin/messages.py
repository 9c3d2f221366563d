"""Messages in the admin: read, never edited."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.db.models.fields.json import KeyTextTransform, KeyTransform
from django.db.models.functions import Left
from django.http import HttpRequest
from django.utils.html import format_html_join

from runs.admin import parts
from runs.admin.followed import Followed, is_page
from threads.admin import marks
from threads.admin.listing import Before, Created, belonging, by_id, choosing
from threads.models import Message, MessageStatus, Role


@admin.register(Message)
class MessageAdmin(Followed):
    list_display = ("id", "role", "state", "beginning", "thread_link", "run_link", "step", "created")
    list_select_related = ("thread",)
    list_filter = (
        belonging("thread"),
        belonging("run", "run_id"),
        Before,
        Created,
        choosing("role", Role.choices),
        choosing("status", [(each, each.replace("_", " ")) for each in MessageStatus.values]),
    )
    within = {"thread": ("-position", "-pk"), "run": ("-step", "-pk")}
    search_fields = ("id",)
    search_help_text = (
        "By id of the message, its thread or its run, or the beginning of it. What was said is not searched."
    )
    fields = (
        *("id", "thread_link", "run_link", "step", "role", "state", "content_", "metadata_"),
        *("client_id", "shown", "position", "created"),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows: QuerySet[Any] = super().get_queryset(request).select_related("thread")
        if is_page(request):
            return rows
        # A message may be a megabyte long; a list needs its first words.
        first = Left(KeyTextTransform("text", KeyTransform("0", "content")), 120)
        annotated: QuerySet[Any] = rows.defer("content", "metadata").annotate(first=first)
        return annotated

    def readings(self, rows: QuerySet[Any], term: str) -> Any:
        yield by_id(rows, "pk", term)
        yield by_id(rows, "thread_id", term)
        yield by_id(rows, "run_id", term)

    @admin.display(description="begins")
    def beginning(self, message: Any) -> str:
        return message.first or marks.NOTHING

    @admin.display(description="content")
    def content_(self, message: Message) -> str:
        return format_html_join("", "{}", ((parts.part(self.admin_site, each),) for each in message.content))

    @admin.display(description="metadata")
    def metadata_(self, message: Message) -> str:
        return marks.pretty(message.metadata)
