"""The body of a request: read once, no larger than is allowed, JSON, checked by its form."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, TypeVar

import orjson
from django.http import HttpRequest, UnreadablePostError
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from rest_framework.exceptions import ParseError, UnsupportedMediaType

from runs.conf import settings
from runs.http.errors import BadField, TooLarge

Form = TypeVar("Form", bound=BaseModel)
MOST_MISTAKES = 100  # that are told one by one


def whole(value: Any) -> Any:
    """JSON knows one kind of number: 3.0 is as whole as 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# After the bounds, `Annotated[int, Field(ge=1), WHOLE]`: else their schema does not tell of them.
WHOLE = BeforeValidator(whole)


class Given(BaseModel):
    """What a client may send: of the right type, and nothing that is not there."""

    model_config = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class Body:
    """The bytes of a body. An empty one counts as `{}`."""

    data: bytes

    @classmethod
    def read(cls, request: HttpRequest) -> Self:
        """Read the body. Raises TooLarge, UnsupportedMediaType, ParseError."""
        most = settings().max_body_bytes
        told = request.META.get("CONTENT_LENGTH") or "0"
        if told.isdigit() and int(told) > most:
            raise TooLarge(_too_large(most))
        try:
            # Not `request.body`: the host's DATA_UPLOAD_MAX_MEMORY_SIZE is about its own forms.
            data = request.read(most + 1)
        except (UnreadablePostError, OSError) as error:
            raise ParseError("The body ended too early.") from error
        if len(data) > most:
            raise TooLarge(_too_large(most))
        if data:
            _readable(request)
        return cls(data or b"{}")

    def form(self, form: type[Form]) -> Form:
        """Return the body as its form. Raises ParseError, pydantic's ValidationError, BadField for too many mistakes."""
        _ = self.value  # pydantic takes NaN, and numbers of any length, which no column does
        try:
            return form.model_validate_json(self.data)
        except ValidationError as error:
            if error.error_count() > MOST_MISTAKES:  # to name a million of them takes minutes
                raise BadField(
                    None, f"There are {error.error_count():,} mistakes in the body, too many to name."
                ) from None
            raise

    @cached_property
    def value(self) -> Any:
        """The body's JSON. Raises ParseError."""
        try:
            return orjson.loads(self.data)
        except orjson.JSONDecodeError as error:
            raise ParseError(f"The body is not JSON: {error}.") from error

    def fingerprint(self, *more: str) -> str:
        """SHA-256 (hex) of what the body says, however it is spaced, and of what else tells two requests apart."""
        found = hashlib.sha256(orjson.dumps(self.value, option=orjson.OPT_SORT_KEYS))
        for each in more:
            found.update(b"\0" + each.encode())
        return found.hexdigest()


def _readable(request: HttpRequest) -> None:
    """Raises UnsupportedMediaType for anything but plain JSON in UTF-8."""
    charset = request.content_params.get("charset", "utf-8") if request.content_params else "utf-8"
    if request.content_type != "application/json" or charset.lower() not in ("utf-8", "utf8"):
        raise UnsupportedMediaType(request.content_type or "none", "Send JSON, with Content-Type: application/json.")
    encoding = request.META.get("HTTP_CONTENT_ENCODING", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType(encoding, "Send the body as it is, without a Content-Encoding.")


def _too_large(most: int) -> str:
    return f"The body is larger than {most:,} bytes (LONGHAUL['MAX_BODY_BYTES'])."


def provided(form: BaseModel) -> dict[str, Any]:
    """Return only what the client said, by field."""
    return {name: getattr(form, name) for name in form.model_fields_set}
