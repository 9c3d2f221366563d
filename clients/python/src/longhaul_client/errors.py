"""What can go wrong, by what the caller would do about it.

LonghaulError
  ApiError            the server has answered, and said no: status, code, detail, attr
    BadRequest          400: the request, or a cursor, is not one
    Unauthorized        401: no key, or one that is no longer valid
    Forbidden           403: seen, but not allowed
    NotFound            404: not there, or not yours to see
    Conflict            409: not in this state; `code` says why
    TooManyRequests     429: after all retries
    ServerError         5xx: after all retries
  ConnectionLost      nobody answered for as long as was asked for; `__cause__` is the last reason
  StreamBroken        what comes is not the stream that was promised, again and again
"""

from __future__ import annotations

import json
from typing import Any


class LonghaulError(Exception):
    """Something did not work."""


class ApiError(LonghaulError):
    """The server has refused. `errors` is all that it said; `code`, `detail` and `attr` are of the first.

    `attr` names the field that is wrong, by its path (`limits.max_steps`), or is None. `asked` is `GET /api/runs/...`.
    """

    def __init__(self, status: int, errors: list[dict[str, Any]], asked: str = "") -> None:
        first = errors[0] if errors else {}
        self.status = status
        self.errors = errors
        self.asked = asked
        self.code = str(first.get("code") or "error")
        self.detail = str(first.get("detail") or "")
        self.attr: str | None = first.get("attr")
        super().__init__(status, self.code)

    def __str__(self) -> str:
        what = self.detail if self.attr is None else f"{self.attr}: {self.detail}"
        said = f"{self.status} {self.code}: {what}" if what else f"{self.status} {self.code}"
        return f"{said} ({self.asked})" if self.asked else said


class BadRequest(ApiError):
    """The request, or a cursor in it, is not one that can be answered."""


class Unauthorized(ApiError):
    """There was no key, or one that is not valid, or not any more."""


class Forbidden(ApiError):
    """You may see this, and not do this."""


class NotFound(ApiError):
    """It is not there, or not yours to see."""


class Conflict(ApiError):
    """It is not in a state in which this can be done; `code` says why."""


class TooManyRequests(ApiError):
    """The server asked to come back later, more often than the client may."""


class ServerError(ApiError):
    """The server, or what stands before it, failed more often than the client may ask again."""


class ConnectionLost(LonghaulError):
    """Nobody answered for too long. Nothing is lost with it: go on from the same cursor later."""


class StreamBroken(LonghaulError):
    """What comes is not the stream that was promised, also after new connections: no events, or some missing."""


_BY_STATUS = {400: BadRequest, 401: Unauthorized, 403: Forbidden, 404: NotFound, 409: Conflict, 429: TooManyRequests}


def refusal(status: int, body: bytes, asked: str) -> ApiError:
    """Return the error that an answer stands for. A body that is not ours (a proxy's page) is left out."""
    errors: list[dict[str, Any]] = []
    try:
        told = json.loads(body)
        errors = [each for each in told["errors"] if isinstance(each, dict)]
    except (ValueError, LookupError, TypeError):
        pass
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else ApiError)
    return kind(status, errors, asked)
