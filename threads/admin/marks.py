"""How values are written on the pages of the admin. All text is escaped; there is no inline style and no script."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

from django.contrib.admin import AdminSite
from django.db.models import Model
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString

NOTHING = "-"
LINES = 12  # of JSON or text that stand open; what is longer is folded
WIDE = 140  # characters of JSON that stand on one line
LONGEST = 100_000  # characters of one value on a page


def moment(at: datetime | None) -> str:
    """Return a time in the zone of the admin, with that zone: `2026-11-21 15:43:30 UTC`."""
    if at is None:
        return NOTHING
    local = timezone.localtime(at)
    day, hour = local.strftime("%Y-%m-%d"), local.strftime("%H:%M:%S %Z")
    return format_html('<time datetime="{}"><span>{}</span> <span>{}</span></time>', local.isoformat(), day, hour)


def span(time: timedelta | None) -> str:
    """Return a length of time: `0.3 s`, `12.0 s`, `1 min`, `3 min 5 s`, `2 h 5 min`, `4 d 1 h`."""
    if time is None:
        return NOTHING
    seconds = max(time.total_seconds(), 0.0)
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    raise AssertionError(whole)


def took(start: datetime | None, end: datetime | None) -> str:
    return span(end - start) if start and end else NOTHING


def text(value: str) -> SafeString:
    """Return a text as it was written, its line breaks kept; a long one is folded."""
    return _folded(_block("lh-text", value), value)


def pretty(value: Any) -> SafeString:
    """Return JSON, indented; a long one is folded."""
    if value is None or value == {} or value == []:
        return SafeString(NOTHING)
    said = written(value)
    return _folded(_block("lh-json", said), said)


def compact(value: Any) -> SafeString:
    """Return JSON on one line; a long one is folded, and indented in the fold."""
    said = json.dumps(value, ensure_ascii=False, default=str)
    if len(said) <= WIDE:
        return code(said)
    return folded(f"{said[:WIDE]} ... ({len(said):,} characters)", _block("lh-json", written(value)))


def written(value: Any) -> str:
    """Return JSON as text, indented."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def folded(summary: str, content: str) -> SafeString:
    return format_html('<details class="lh-folded"><summary>{}</summary>{}</details>', summary, content)


def schema(value: Any) -> SafeString:
    """Return JSON that most readers do not want to see, folded."""
    return folded("schema", _block("lh-json", written(value)))


def reasoning(value: str) -> SafeString:
    return folded("reasoning", _block("lh-text", value))


def _block(kind: str, said: str) -> SafeString:
    block = format_html('<pre class="{}">{}</pre>', kind, said[:LONGEST])
    if len(said) <= LONGEST:
        return block
    return format_html("{}<p>{} more characters are not shown here.</p>", block, f"{len(said) - LONGEST:,}")


def _folded(block: SafeString, said: str) -> SafeString:
    if said.count("\n", 0, LONGEST) < LINES and len(said) <= 100 * LINES:
        return block
    first = " ".join(said[:200].split())[:80]
    return folded(f"{first} ... ({len(said):,} characters)", block)


def state(word: str, *, title: str = "") -> SafeString:
    """Return the word of a status as text, with a class of that name for the stylesheet."""
    return format_html('<span class="lh-state lh-{}" title="{}">{}</span>', word, title or word, word.replace("_", " "))


def code(words: object) -> SafeString:
    return format_html("<code>{}</code>", words)


def link(site: AdminSite, model: type[Model], pk: object, words: object = None) -> str:
    """Return a link to the page of a row, by its id unless `words` say more; `-` where there is none."""
    if pk is None:
        return NOTHING
    name = f"admin:{model._meta.app_label}_{model._meta.model_name}_change"
    return format_html('<a href="{}">{}</a>', reverse(name, args=(pk,), current_app=site.name), words or pk)


def list_url(site: AdminSite, model: type[Model], **parameters: object) -> str:
    """Return the URL of a list, narrowed by the parameters of its filters."""
    name = f"admin:{model._meta.app_label}_{model._meta.model_name}_changelist"
    query = {key: str(value) for key, value in parameters.items()}
    return reverse(name, current_app=site.name, query=query)


def outside(url: str | None, words: object) -> str:
    """Return a link that leads out of the admin, or the words alone when there is no URL."""
    if not url:
        return format_html("<code>{}</code>", words) if words else NOTHING
    return format_html('<a href="{}" rel="noreferrer"><code>{}</code></a>', url, words)
