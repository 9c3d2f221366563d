"""The query of a request, checked by its form: a parameter that is not known is named, not ignored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, TypeVar, get_args, get_origin
from uuid import UUID

from django.http import QueryDict
from pydantic import AfterValidator, BaseModel, ConfigDict

from runs.http.errors import BadField

Form = TypeVar("Form", bound=BaseModel)


class Query(BaseModel):
    """What a client may ask: texts that are read as their types, and nothing that is not there."""

    model_config = ConfigDict(extra="forbid")


class Nothing(Query):
    """No parameter at all."""


def storable(text: str) -> str:
    """Refuse what no column can hold. Raises ValueError."""
    if "\x00" in text:
        raise ValueError("NUL is not allowed here.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("This is not UTF-8.") from error
    return text


Text = Annotated[str, AfterValidator(storable)]
# How each kind is written, as the document promises: pydantic alone reads `yes`, `1_0`, ` 1` and timestamps too.
WRITTEN: dict[Any, tuple[re.Pattern[str], str]] = {
    bool: (re.compile("true|false"), "Write true or false."),
    int: (re.compile("-?[0-9]+"), "Write a whole number."),
    float: (re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?"), "Write a number."),
    UUID: (re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"), "Write a UUID."),
    datetime: (
        re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([Tt ][0-9:.]+([Zz]|[-+][0-9]{2}:[0-9]{2})?)?"),
        "Write a time as RFC 3339 does, such as 2026-11-21T12:00:00Z.",
    ),
}


def read_query(form: type[Form] | None, given: QueryDict) -> Form | None:
    """Return the query as its form; of a parameter that is given twice the last counts, unless it is a list."""
    if form is None:
        form = Nothing  # type: ignore[assignment]
    assert form is not None
    lists = {name for name, field in form.model_fields.items() if _is_list(field.annotation)}
    plain: dict[str, Any] = {}
    for key in given:
        plain[key] = given.getlist(key) if key in lists else given[key]
    for key, value in plain.items():
        _written(form, key, value)
    return form.model_validate(plain)


def _written(form: type[BaseModel], key: str, value: Any) -> None:
    """Raises BadField for a value that is not written as its kind is."""
    field = form.model_fields.get(key)
    for kind in _kinds(field.annotation) if field is not None else ():
        if kind in WRITTEN and not WRITTEN[kind][0].fullmatch(value):
            raise BadField(key, WRITTEN[kind][1])


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield what a field may be: the parts of `Annotated[int, ...] | None`."""
    if get_origin(annotation) is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif get_origin(annotation) is not list and get_args(annotation):
        for each in get_args(annotation):
            yield from _kinds(each)
    else:
        yield annotation


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list
