"""Lists a page at a time: `{"next", "previous", "results"}`, ordered by id, which rises with time.

The cursor is DRF's: an opaque place, not an offset, so a page neither skips nor repeats while rows are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Generic, TypeVar
from uuid import UUID

from django.db.models import Model, QuerySet
from pydantic import BaseModel, Field
from rest_framework.pagination import Cursor, CursorPagination
from rest_framework.request import Request
from rest_framework.response import Response

from runs.http.errors import BadField
from runs.http.query import Query, Text

Row = TypeVar("Row", bound=Model)
Item = TypeVar("Item")
LARGEST = 200


class Paged(Query):
    """What each list takes."""

    cursor: Annotated[Text | None, Field(description="where to go on: from `next` or `previous`")] = None
    limit: Annotated[int, Field(ge=1, le=LARGEST, description="rows a page")] = 50


class Page(BaseModel, Generic[Item]):
    """One page of a list."""

    next: str | None = Field(description="the address of the next page, or null")
    previous: str | None = Field(description="the address of the page before, or null")
    results: list[Item]


class Pages(CursorPagination):
    """DRF's cursor pagination; what it takes was checked by `Paged`."""

    def __init__(self, ordering: tuple[str, ...], limit: int, place: Callable[[str], Any] = UUID) -> None:
        self.ordering = ordering
        self.page_size = limit
        self.place = place

    def get_page_size(self, request: Request) -> int:
        return self.page_size

    def get_ordering(self, request: Request, queryset: Any, view: Any) -> tuple[str, ...]:
        return self.ordering

    def decode_cursor(self, request: Request) -> Cursor | None:
        """Raises BadField for what no page of ours has given out."""
        wrong = BadField("cursor", "This cursor is not one that a list gave. Begin without it.")
        try:
            cursor: Cursor | None = super().decode_cursor(request)
            if cursor is not None and cursor.position is not None:
                self.place(cursor.position)
        except Exception as error:  # base64, UTF-8, query strings, UUIDs: each has its own
            raise wrong from error
        return cursor


def paged(
    request: Request, rows: QuerySet[Any], query: Paged, form: Callable[[Iterable[Any]], list[Any]], *,
    order: tuple[str, ...] = ("-id",), place: Callable[[str], Any] = UUID,
) -> Response:  # fmt: skip
    """Answer with the page that was asked for. `form` makes dicts of its rows, all at once."""
    pages = Pages(order, query.limit, place)
    found = pages.paginate_queryset(rows, request)
    return Response(
        {"next": pages.get_next_link(), "previous": pages.get_previous_link(), "results": form(found or [])}
    )
