"""ETags: a client that asks again is told 304 when what it has is what it would get."""

from __future__ import annotations

import re
from typing import Any

from django.utils.crypto import salted_hmac
from django.utils.http import parse_etags
from rest_framework.request import Request
from rest_framework.response import Response

from runs.http.json import dumps

# `why` says how long something has lasted ("3 min 5 s"): a run that stands still would never be the same.
TIMES = re.compile(r"\d+(?:\.\d+)? (?:s|min|h|d)\b")


def tagged(request: Request, shown: dict[str, Any]) -> Response:
    """Answer with an ETag over what is shown, but for the times in `why`; 304 when the client has seen it."""
    facts = _timeless(shown)
    if isinstance(shown.get("results"), list):
        facts["results"] = [_timeless(item) for item in shown["results"]]
    etag = f'W/"{salted_hmac("longhaul.etag", dumps(facts)).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    known = [each.removeprefix("W/") for each in parse_etags(request.headers.get("If-None-Match", ""))]
    if "*" in known or etag.removeprefix("W/") in known:
        return Response(status=304, headers=headers)
    return Response(shown, headers=headers)


def _timeless(shown: dict[str, Any]) -> dict[str, Any]:
    return {**shown, "why": TIMES.sub("#", shown["why"])} if isinstance(shown.get("why"), str) else {**shown}
