"""Lists of Django's admin whose cost does not grow with their table.

A list counts and pages through its latest `MOST` rows; a link leads to older ones. A filter with an index (`indexed`) looks
at all rows, any other one at the latest `WINDOW`. A search reads its term in several ways, each by an index or in that
window, and gathers at most `FOUND` ids a way. Nothing sorts a table or counts it, and a parameter that is no filter's is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

from django.contrib import admin
from django.contrib.admin import ShowFacets, SimpleListFilter
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.views.main import ChangeList
from django.contrib.auth import get_user_model
from django.core.paginator import Paginator
from django.db.models import Model, QuerySet
from django.forms import Media
from django.http import HttpRequest
from django.utils.functional import cached_property

from threads import clock

if TYPE_CHECKING:
    ModelAdmin = admin.ModelAdmin[Any]
    Pages = Paginator[Any]
else:
    ModelAdmin = admin.ModelAdmin
    Pages = Paginator

MOST = 2_000  # rows that a list counts and pages through
WINDOW = 10_000  # latest rows that a filter or a search without an index looks at
FOUND = 500  # rows that one way of reading a search term finds
OWNERS = 5  # users whose names begin with a search term


class BoundedPaginator(Pages):
    """Counts to MOST and says whether there is `more`."""

    @cached_property
    def counted(self) -> int:
        rows: Any = self.object_list
        return int(rows.values("pk")[: MOST + 1].count())

    @cached_property
    def count(self) -> int:
        return min(self.counted, MOST)

    @property
    def more(self) -> bool:
        return self.counted > MOST


class Listing(ChangeList):
    """A change list in the one order that its index has. `windowed`: only the latest WINDOW rows were looked at."""

    windowed = False
    older = ""  # the query string of the rows behind the last page

    def get_ordering(self, request: HttpRequest, queryset: QuerySet[Any]) -> list[Any]:
        return list(self.model_admin.get_ordering(request))  # total orders all, each with an index

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> QuerySet[Any]:
        specs: list[Any] = self.get_filters(request)[0]
        if not self.query and any(not each.indexed and each.value() is not None for each in specs):
            narrowed = self.root_queryset
            for each in specs:
                if each.indexed:
                    narrowed = each.queryset(request, narrowed)
            key = order_key(self.model_admin, request)
            floor = narrowed.order_by(f"-{key}").values_list(key, flat=True)[WINDOW : WINDOW + 1].first()
            if floor is not None:
                self.root_queryset = self.root_queryset.filter(**{f"{key}__gt": floor})
                self.windowed = True
        return super().get_queryset(request, exclude_parameters)

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        if self.paginator.more and self.page_num == self.paginator.num_pages:
            key = order_key(self.model_admin, request)
            last = getattr(list(self.result_list)[-1], key)
            if last is not None:
                # Rows of one step stand together: all of its rows come again on the next list, for none must be left out.
                last = last + 1 if key == "step" else last
                self.older = self.get_query_string({"before": last}, remove=["p"])

    @property
    def most(self) -> int:
        return MOST

    @property
    def window(self) -> int:
        return WINDOW


class Listed(ModelAdmin):
    """A bounded list, and pages that change nothing: the protocol owns these rows."""

    within: ClassVar[Mapping[str, Sequence[str]]] = {}  # parameter of a filter -> the order of its index
    paginator = BoundedPaginator
    show_full_result_count = False
    show_facets = ShowFacets.NEVER
    sortable_by = ()
    list_per_page = 50
    list_max_show_all = 0
    ordering = ("-pk",)
    change_list_template = "admin/longhaul/change_list.html"
    change_form_template = "admin/longhaul/change_form.html"

    @property
    def media(self) -> Media:
        return super().media + Media(css={"all": ["longhaul/admin.css"]})

    def get_changelist(self, request: HttpRequest, **_: Any) -> type[ChangeList]:
        return Listing

    def get_ordering(self, request: HttpRequest) -> Any:
        for parameter, order in self.within.items():
            if request.GET.get(parameter):
                return list(order)
        return list(self.ordering)

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest | None = None) -> bool:
        # Any other lookup could read the whole table, or guess at what a column holds.
        return lookup in {getattr(each, "parameter_name", None) for each in self.list_filter}

    def get_search_results(self, request: HttpRequest, queryset: QuerySet[Any], search_term: str) -> Any:
        term = search_term.replace("\x00", "").strip()
        if not term:
            return queryset, False
        found = {pk for ids in self.readings(self.get_queryset(request), term) for pk in ids}
        return queryset.filter(pk__in=found), False

    def readings(self, rows: QuerySet[Any], term: str) -> Iterable[Iterable[Any]]:
        """Yield the ids that each way of reading the term finds among the rows."""
        yield by_id(rows, "pk", term)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


def order_key(model_admin: Any, request: HttpRequest) -> str:
    """Return the column that orders a list."""
    return str(model_admin.get_ordering(request)[0]).lstrip("-")


# --- searching ------------------------------------------------------------------------------------------------------


def id_range(part: str) -> tuple[UUID, UUID] | None:
    """Return the first and the last id that begin so (4 digits or more, with or without hyphens); None for other text."""
    digits = part.replace("-", "").lower()
    if not 4 <= len(digits) <= 32 or not set(digits) <= set("0123456789abcdef"):
        return None
    return UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f"))


def latest(rows: QuerySet[Any], most: int = FOUND) -> list[Any]:
    """Return the ids of the latest rows."""
    return list(rows.order_by("-pk").values_list("pk", flat=True)[:most])


def by_id(rows: QuerySet[Any], column: str, term: str) -> list[Any]:
    """Return the ids of the rows whose (indexed) column is this UUID or begins so."""
    ends = id_range(term)
    if ends is None:
        return []
    exact = ends[0] == ends[1]
    wanted = {column: ends[0]} if exact else {f"{column}__gte": ends[0], f"{column}__lte": ends[1]}
    # In the index's own order, or the planner may walk the primary key for them.
    return list(rows.filter(**wanted).order_by(f"-{column}").values_list("pk", flat=True)[:FOUND])


def in_window(rows: QuerySet[Any], **wanted: Any) -> list[Any]:
    """Return the ids of those among the latest WINDOW rows for which a condition without an index holds."""
    floor = rows.order_by("-pk").values_list("pk", flat=True)[WINDOW : WINDOW + 1].first()
    recent = rows if floor is None else rows.filter(pk__gt=floor)
    return latest(recent.filter(**wanted))


def by_owner(rows: QuerySet[Any], term: str) -> list[Any]:
    """Return the ids of the rows of the user of this name, and of a few whose names begin so."""
    users = get_user_model()._default_manager.all()
    name = get_user_model().USERNAME_FIELD
    exact = list(users.filter(**{name: term}).values_list("pk", flat=True)[:1])
    alike = list(users.filter(**{f"{name}__startswith": term}).values_list("pk", flat=True)[:OWNERS])
    return [pk for owner in dict.fromkeys([*exact, *alike]) for pk in latest(rows.filter(owner_id=owner))]


# --- filters --------------------------------------------------------------------------------------------------------


class Filter(SimpleListFilter):
    """A filter by one parameter. `indexed`: an index finds its rows, so that it may look at all of them."""

    indexed = False

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset


Choices = Sequence[tuple[str, str]]


def choosing(
    field: str,
    choices: Callable[[], Choices] | Choices,
    *,
    words: str = "",
    narrow: Callable[[QuerySet[Any], str], QuerySet[Any]] | None = None,
    by_index: bool = False,
) -> type[Filter]:
    """Return a filter by the value of a column, or by what `narrow` makes of it."""

    class Chosen(Filter):
        title = words or field.replace("_", " ")
        parameter_name = field
        indexed = by_index

        def lookups(self, request: HttpRequest, model_admin: Any) -> Choices:
            return choices() if callable(choices) else choices

        def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
            value = self.value()
            if value is None:
                return queryset
            return narrow(queryset, value) if narrow else queryset.filter(**{field: value})

    return Chosen


class Created(Filter):
    """By age. Ids are UUIDv7 and begin with their time, so the primary key finds the rows."""

    title = "created"
    parameter_name = "created"
    indexed = True
    ages: ClassVar[Mapping[str, tuple[str, timedelta]]] = {
        "hour": ("Past hour", timedelta(hours=1)),
        "day": ("Past 24 hours", timedelta(days=1)),
        "week": ("Past 7 days", timedelta(days=7)),
        "month": ("Past 30 days", timedelta(days=30)),
    }

    def lookups(self, request: HttpRequest, model_admin: Any) -> Choices:
        return [(key, words) for key, (words, _) in self.ages.items()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        age = self.ages.get(self.value() or "")
        if age is None:
            return queryset
        milliseconds = int((clock.now() - age[1]).timestamp() * 1000)
        return queryset.filter(pk__gte=UUID(int=milliseconds << 80))


class _Given(Filter):
    """A filter that a link sets: it shows only while it is set."""

    indexed = True

    def lookups(self, request: HttpRequest, model_admin: Any) -> Choices:
        value = request.GET.get(str(self.parameter_name))
        return [(value, value)] if value else []


def belonging(field: str, column: str = "") -> type[Filter]:
    """Return a filter by the id of the row that these belong to."""

    class Belonging(_Given):
        title = field
        parameter_name = field

        def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
            try:
                return queryset.filter(**{column or field: UUID(self.value() or "")})
            except ValueError as error:
                raise IncorrectLookupParameters(error) from error

    return Belonging


class Before(_Given):
    """The rows behind the last page of a list."""

    title = "older than"
    parameter_name = "before"

    def __init__(self, request: HttpRequest, params: dict[str, Any], model: type[Model], model_admin: Any) -> None:
        super().__init__(request, params, model, model_admin)
        self.key = order_key(model_admin, request)

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        column = queryset.model._meta.pk if self.key == "pk" else queryset.model._meta.get_field(self.key)
        assert column is not None
        try:
            value = column.to_python(self.value())
            return queryset.filter(**{f"{self.key}__lt": value})
        except Exception as error:
            raise IncorrectLookupParameters(error) from error
