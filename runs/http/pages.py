"""Lists a page at a time: `{"next", "previous", "results"}`, ordered by id, which rises with time.

A cursor is the place of a row, not an offset: a page neither skips nor repeats while rows are added or taken away.
"""

from __future__ import annotations

from base64 import b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Generic, TypeVar
from uuid import UUID

from django.db.models import Q, QuerySet
from pydantic import BaseModel, Field
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.utils.urls import replace_query_param

from runs.http.errors import BadField
from runs.http.etags import tagged
from runs.http.query import Query, Text

Item = TypeVar("Item")
LARGEST = 200
# Which rows a cursor asks for: those after its place, those from it on, those before it, those up to it.
AFTER, FROM, BEFORE, UNTIL = "afbu"
OTHER_SIDE = {AFTER: UNTIL, FROM: BEFORE, BEFORE: FROM, UNTIL: AFTER}


class Paged(Query):
    """What each list takes."""

    cursor: Annotated[Text | None, Field(description="where to go on: from `next` or `previous`")] = None
    limit: Annotated[int, Field(ge=1, le=LARGEST, description="rows a page")] = 50


class Page(BaseModel, Generic[Item]):
    """One page of a list."""

    next: str | None = Field(description="the address of the next page, or null")
    previous: str | None = Field(description="the address of the page before, or null")
    results: list[Item]


class Places:
    """The order of a list, by a column whose values differ; `read` makes its value of the text in a cursor."""

    def __init__(self, column: str = "id", read: Callable[[str], Any] = UUID, *, descending: bool = False) -> None:
        self.column = column
        self.read = read
        self.descending = descending

    def of(self, row: Any) -> str:
        """Name the row's place, as a cursor carries it."""
        return str(getattr(row, self.column))

    def ordering(self, *, backwards: bool) -> tuple[str, ...]:
        return (f"-{self.column}" if self.descending != backwards else self.column,)

    def beyond(self, place: str, *, backwards: bool, itself: bool) -> Q:
        """Pick the rows on one side of a place. Raises ValueError for a text that is no place."""
        side = "lt" if self.descending != backwards else "gt"
        return Q(**{f"{self.column}__{side}{'e' if itself else ''}": self.read(place)})


def number(text: str) -> int:
    """Read a place that is a number. Raises ValueError."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise ValueError(text)
    return int(text)


BY_ID = Places()
NEWEST_FIRST = Places(descending=True)
BY_NUMBER = Places("number", number)


def paged(
    request: Request, rows: QuerySet[Any], query: Paged, form: Callable[[Iterable[Any]], list[Any]],
    places: Places = NEWEST_FIRST, **more: Any,
) -> Response:  # fmt: skip
    """Answer with the page that was asked for. `form` makes dicts of its rows, all at once. `more` stands beside them."""
    asked, place = None, ""
    if query.cursor is not None:
        asked, place, picked = _read(query.cursor, places)
        rows = rows.filter(picked)
    backwards = asked in (BEFORE, UNTIL)
    found = list(rows.order_by(*places.ordering(backwards=backwards))[: query.limit + 1])
    further = len(found) > query.limit
    found = found[: query.limit]
    if backwards:
        found.reverse()
    following = preceding = None
    if found:
        following = AFTER + places.of(found[-1]) if further or backwards else None
        preceding = BEFORE + places.of(found[0]) if (further if backwards else asked) else None
    elif asked:  # what was there is gone: the way back begins at the cursor's own place
        back = OTHER_SIDE[asked] + place
        following, preceding = (back, None) if backwards else (None, back)
    page = {"next": _link(request, following), "previous": _link(request, preceding), "results": form(found)}
    return tagged(request, {**page, **more})


def _read(cursor: str, places: Places) -> tuple[str, str, Q]:
    """Return what the cursor asks for. Raises BadField for what no page of ours has given out."""
    try:
        text = b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode(
            "ascii"
        )
        asked, place = text[:1], text[1:]
        if asked not in OTHER_SIDE:
            raise ValueError(asked)
        return asked, place, places.beyond(place, backwards=asked in (BEFORE, UNTIL), itself=asked in (FROM, UNTIL))
    except ValueError as error:
        raise BadField("cursor", "This cursor is not one that a list gave. Begin without it.") from error


def _link(request: Request, cursor: str | None) -> str | None:
    if cursor is None:
        return None
    token = urlsafe_b64encode(cursor.encode()).decode().rstrip("=")
    link: str = replace_query_param(request.build_absolute_uri(), "cursor", token)
    return link
