"""A content that a tool has returned, as an answer: to be kept, never shown or run by a browser as the site's own."""

from __future__ import annotations

from django.http import HttpResponse
from django.utils.http import content_disposition_header

from tools.results import File


def download(file: File) -> HttpResponse:
    """Return the file as an attachment. What its tool says of its type is passed on, and no browser guesses another one."""
    headers = {
        "Content-Disposition": content_disposition_header(True, file.name) or "attachment",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cache-Control": "private",
    }
    return HttpResponse(file.data, content_type=file.content_type, headers=headers)
