"""The query of a request, checked by its form: a parameter that is not known is named, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, get_origin

from django.http import QueryDict
from pydantic import AfterValidator, BaseModel, ConfigDict

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


def read_query(form: type[Form] | None, given: QueryDict) -> Form | None:
    """Return the query as its form; of a parameter that is given twice the last counts, unless it is a list."""
    if form is None:
        form = Nothing  # type: ignore[assignment]
    assert form is not None
    lists = {name for name, field in form.model_fields.items() if _is_list(field.annotation)}
    plain: dict[str, Any] = {}
    for key in given:
        plain[key] = given.getlist(key) if key in lists else given[key]
    return form.model_validate(plain)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list
