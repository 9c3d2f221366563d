"""API keys: made on a page that shows the key this once, revoked by an action. The digest is on no page."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse

from threads import authentication, clock
from threads.admin import marks
from threads.admin.listing import Created, Listed, by_id, by_owner, choosing, in_window
from threads.models import ApiKey


class KeyForm(ModelForm):  # type: ignore[type-arg] # Django's ModelForm takes no argument when it runs
    def clean_expires_at(self) -> Any:
        at = self.cleaned_data["expires_at"]
        if at is not None and at <= clock.now() and "expires_at" in self.changed_data:
            raise ValidationError("This time has passed. To end a key now, revoke it.")
        return at


def _in_state(rows: QuerySet[Any], state: str) -> QuerySet[Any]:
    return rows.exclude(revoked_at=None) if state == "revoked" else rows.filter(revoked_at=None)


@admin.register(ApiKey)
class ApiKeyAdmin(Listed):
    list_display = ("prefix_", "name", "owner", "state", "created", "expires", "used")
    list_select_related = ("owner",)
    list_filter = (choosing("state", [("valid", "Not revoked"), ("revoked", "Revoked")], narrow=_in_state), Created)
    search_fields = ("prefix",)
    search_help_text = "By the beginning of the key or of its id, the owner's username, or a part of its name."
    raw_id_fields = ("owner",)
    actions = ("revoke",)
    form = KeyForm

    def readings(self, rows: QuerySet[Any], term: str) -> Any:
        yield by_id(rows, "pk", term)
        yield by_owner(rows, term)
        yield in_window(rows, prefix=term[: authentication.SHOWN])
        yield in_window(rows, name__icontains=term)

    def get_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        if obj is None:
            return ("owner", "name", "expires_at")
        return ("prefix_", "owner", "name", "expires_at", "state", "created", "revoked", "used")

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return () if obj is None else ("prefix_", "owner", "state", "created", "revoked", "used")

    @admin.display(description="key")
    def prefix_(self, key: ApiKey) -> str:
        return f"{key.prefix}..."

    @admin.display(description="state")
    def state(self, key: ApiKey) -> str:
        if key.revoked_at is not None:
            return marks.state("revoked")
        return marks.state("expires" if key.expires_at else "valid")

    @admin.display(description="created")
    def created(self, key: ApiKey) -> str:
        return marks.moment(key.created_at)

    @admin.display(description="expires")
    def expires(self, key: ApiKey) -> str:
        return marks.moment(key.expires_at)

    @admin.display(description="revoked")
    def revoked(self, key: ApiKey) -> str:
        return marks.moment(key.revoked_at)

    @admin.display(description="last used", empty_value="never")
    def used(self, key: ApiKey) -> str:
        return marks.moment(key.last_used_at) if key.last_used_at else "never"

    # --- made, revoked

    def save_model(self, request: HttpRequest, obj: ApiKey, form: Any, change: bool) -> None:
        if change:
            if form.changed_data:
                obj.save(update_fields=form.changed_data)
            return
        lasts = obj.expires_at - clock.now() if obj.expires_at else None
        made, key = authentication.create_key(obj.owner, obj.name, lasts=lasts)
        obj.__dict__.update(made.__dict__)
        request.longhaul_key = key  # type: ignore[attr-defined] # only this request's answer shows it

    def response_add(self, request: HttpRequest, obj: ApiKey, post_url_continue: str | None = None) -> HttpResponse:
        # No redirect with a message: that would leave the key in a cookie or in the session. The admin lets nothing be cached.
        context = {
            **self.admin_site.each_context(request),
            "title": "The key was made",
            "opts": self.opts,
            "original": obj,
            "key": request.longhaul_key,  # type: ignore[attr-defined]
            "media": self.media,
        }
        return TemplateResponse(request, "admin/longhaul/key_made.html", context)

    @admin.action(description="Revoke the selected keys", permissions=["change"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        chosen = list(queryset.order_by("pk")[:101])
        revoked = 0
        for key in chosen[:100]:
            if authentication.revoke(key):
                revoked += 1
                self.log_change(request, key, "Revoked.")
        unchanged = min(len(chosen), 100) - revoked
        said = f"{revoked} revoked" + (f"; {unchanged} had been revoked before" if unchanged else "") + "."
        if len(chosen) > 100:
            said += " At most 100 are revoked at once: there are more."
        self.message_user(request, said, messages.SUCCESS if revoked else messages.INFO)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return admin.ModelAdmin.has_add_permission(self, request)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return admin.ModelAdmin.has_change_permission(self, request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False  # a revoked key says who had access when
