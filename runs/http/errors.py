"""What a client is told when something cannot be done: `{"type", "errors": [{"code", "detail", "attr"}]}`.

The form is drf-standardized-errors'; what the core raises is translated here, and nothing else says what went wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from django.core.exceptions import ObjectDoesNotExist, RequestDataTooBig, SuspiciousOperation
from django.db import DatabaseError, InterfaceError
from drf_standardized_errors.formatter import ExceptionFormatter
from drf_standardized_errors.handler import ExceptionHandler
from drf_standardized_errors.types import ErrorResponse
from pydantic import ValidationError as Invalid
from rest_framework import status
from rest_framework.exceptions import APIException, ErrorDetail, NotFound, ParseError, ValidationError
from rest_framework.response import Response

from runs.exceptions import (
    IdempotencyConflict,
    InputTooLarge,
    LonghaulError,
    NothingToDo,
    NotLast,
    ThreadBusy,
    UnknownAgent,
)
from threads.exceptions import PartOfAStep, ThreadGone
from tools.exceptions import AlreadySettled, NotAwaited

UNAVAILABLE = 503


class Refused(APIException):
    """Something that was asked for cannot be done."""

    def __init__(self, detail: str, code: str, status_code: int, attr: str | None = None) -> None:
        super().__init__(detail, code)
        self.status_code = status_code
        self.attr = attr


class TooLarge(Refused):
    def __init__(self, detail: str) -> None:
        super().__init__(detail, "too_large", status.HTTP_413_REQUEST_ENTITY_TOO_LARGE)


class Conflict(Refused):
    def __init__(self, detail: str, code: str) -> None:
        super().__init__(detail, code, status.HTTP_409_CONFLICT)


class BadField(ValidationError):
    """One field that cannot be taken: `attr` names it by its path, `limits.max_steps`."""

    def __init__(self, attr: str | None, detail: str, code: str = "invalid") -> None:
        super().__init__({attr: [detail]} if attr else [detail], code)


STATUS: Mapping[type[LonghaulError], int] = {
    InputTooLarge: status.HTTP_413_REQUEST_ENTITY_TOO_LARGE,
    NothingToDo: status.HTTP_409_CONFLICT,
    IdempotencyConflict: status.HTTP_409_CONFLICT,
    NotLast: status.HTTP_409_CONFLICT,
    ThreadBusy: status.HTTP_409_CONFLICT,
    PartOfAStep: status.HTTP_409_CONFLICT,
    AlreadySettled: status.HTTP_409_CONFLICT,
    NotAwaited: status.HTTP_409_CONFLICT,
}


def status_of(error: LonghaulError) -> int:
    """Return the status that the nearest of the error's classes has."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return getattr(error, "status", status.HTTP_400_BAD_REQUEST)


def of_core(error: LonghaulError) -> APIException:
    """Translate what the core raises."""
    answer = status_of(error)
    attr = error.attr or ("agent" if isinstance(error, UnknownAgent) else None)
    if answer == status.HTTP_400_BAD_REQUEST:
        return BadField(attr, str(error), error.code)
    return Refused(str(error), error.code, answer, attr)


def of_pydantic(error: Invalid) -> ValidationError:
    """Translate what a body's or a query's form raises: each field with its path, unknown ones by name."""
    told: dict[str, list[Any]] = {}
    kinds = _unions(error.errors(include_url=False, include_context=False, include_input=False))
    for path, found in kinds:
        message, code = _told(found)
        told.setdefault(path, []).append(ErrorDetail(message, code))
    return ValidationError(told)


def _unions(errors: Iterable[Any]) -> list[tuple[str, Any]]:
    """Name each error's field. Pydantic's path goes on into the alternatives of a union, which a client never wrote."""
    named = []
    for found in errors:
        steps: list[str] = []
        for place, step in enumerate(found["loc"]):
            said = found["type"] == "extra_forbidden" and place == len(found["loc"]) - 1  # by the client
            if isinstance(step, str) and not said and (step[:1] == "[" or (steps and _alternative(step))):
                continue
            steps.append(str(step))
        named.append((".".join(steps) or "non_field_errors", found))
    return named


def _alternative(step: str) -> bool:
    return step in _ALTERNATIVES or "[" in step


_ALTERNATIVES = frozenset({"str", "list", "int", "float", "bool", "dict", "uuid", "nullable"})


def _told(found: Any) -> tuple[str, str]:
    match found["type"]:
        case "extra_forbidden":
            return "There is no such field.", "unknown_field"
        case "missing":
            return "This field is required.", "required"
        case "json_invalid":
            return f"The body is not JSON: {found['msg'].removeprefix('Invalid JSON: ')}.", "parse_error"
        case kind:
            message = found["msg"].removeprefix("Value error, ")
            return message if message.endswith(".") else f"{message}.", "invalid" if "error" in kind else kind


class Handler(ExceptionHandler):
    """Answers an error of any kind; says nothing of what is inside when it is ours."""

    def should_not_handle(self, exc: Exception) -> bool:
        return False

    def convert_known_exceptions(self, exc: Exception) -> Exception:
        if isinstance(exc, ObjectDoesNotExist | ThreadGone):
            return NotFound()  # it was there when the gate looked, and was deleted since
        if isinstance(exc, LonghaulError):
            return of_core(exc)
        if isinstance(exc, Invalid):
            return of_pydantic(exc)
        if isinstance(exc, RequestDataTooBig):
            return TooLarge("The body is larger than this server takes.")
        if isinstance(exc, SuspiciousOperation):
            # More parameters than the host takes, a Host that is none of its own: what Django answers with 400 as well.
            return ParseError("This server does not take such a request.")
        if isinstance(exc, DatabaseError | InterfaceError) and not _reachable(exc):
            return Refused("The database cannot be reached. Try again.", "unavailable", UNAVAILABLE)
        return super().convert_known_exceptions(exc)

    def get_headers(self, exc: APIException) -> dict[str, str]:
        headers = super().get_headers(exc)
        if exc.status_code == UNAVAILABLE:
            headers.setdefault("Retry-After", "1")
        return headers

    def report_exception(self, exc: APIException, response: Response) -> None:
        # What this server cannot do, or does not do now and tells when, is no fault of it.
        if exc.status_code != status.HTTP_501_NOT_IMPLEMENTED and not getattr(exc, "wait", None):
            super().report_exception(exc, response)

    def format_exception(self, exc: APIException) -> dict[str, Any]:
        formatted: dict[str, Any] = Formatter(exc, self.context, self.exc).run()
        return formatted


class Formatter(ExceptionFormatter):
    def format_error_response(self, error_response: ErrorResponse) -> Any:
        formatted = super().format_error_response(error_response)
        attr = getattr(self.exc, "attr", None)
        if attr and formatted["errors"]:
            formatted["errors"][0]["attr"] = attr
        return formatted


def _reachable(error: Exception) -> bool:
    """Return whether the error is about what was asked, not about a database that is away or going down."""
    cause = error.__cause__
    code = getattr(cause, "sqlstate", None)
    return code is not None and not code.startswith(("08", "53", "57"))


def handle(exc: Exception, context: Any) -> Response | None:
    """DRF's exception handler for Longhaul's views."""
    return Handler(exc, context).run()
