"""From a signature to a schema: what a model is told, what its answer becomes, and what fails at import.

Annotations are strings in this module, as in many modules of users.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from tools.context import ToolContext
from tools.exceptions import InvalidArguments, ToolSchemaError
from tools.execution import described_error
from tools.schema import compile_arguments, jsonable, read_docstring

if TYPE_CHECKING:
    from fractions import Fraction


class Size(enum.Enum):
    SMALL = "s"
    LARGE = "l"


class Line(BaseModel):
    """One line of an order."""

    sku: str
    amount: int = Field(1, ge=1, description="how many")


class Tree(BaseModel):
    title: str
    children: list[Tree] = []


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


class Place(TypedDict):
    city: str


class Opaque:
    pass


def schema(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    return compile_arguments(function, function.__name__, **options).schema


def validate(function: Callable[..., Any], arguments: Any) -> dict[str, Any]:
    return compile_arguments(function, function.__name__).validate(function.__name__, arguments)


def problems(function: Callable[..., Any], arguments: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidArguments) as caught:
        validate(function, arguments)
    return [(problem["path"], problem["message"]) for problem in caught.value.problems]


def refused(function: Callable[..., Any], **options: Any) -> ToolSchemaError:
    with pytest.raises(ToolSchemaError) as caught:
        compile_arguments(function, "order", **options)
    assert caught.value.tool == "order"
    assert "'order'" in str(caught.value)
    return caught.value


# --- the schema ---


def test_a_small_signature_is_a_closed_object_without_titles() -> None:
    def order(number: int, note: str = "none") -> None: ...

    assert schema(order) == {
        "type": "object",
        "properties": {"number": {"type": "integer"}, "note": {"type": "string", "default": "none"}},
        "required": ["number"],
        "additionalProperties": False,
    }


def test_no_parameters_are_an_empty_closed_object() -> None:
    def ping() -> None: ...

    assert schema(ping) == {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (int, {"type": "integer"}),
        (bool, {"type": "boolean"}),
        (Any, {}),
        (date, {"type": "string", "format": "date"}),
        (datetime, {"type": "string", "format": "date-time"}),
        (timedelta, {"type": "string", "format": "duration"}),
        (UUID, {"type": "string", "format": "uuid"}),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Optional[int], {"anyOf": [{"type": "integer"}, {"type": "null"}]}),  # noqa: UP045
        (int | str, {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (set[str], {"type": "array", "items": {"type": "string"}, "uniqueItems": True}),
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
        (Annotated[int, Field(ge=1, description="many")], {"type": "integer", "minimum": 1, "description": "many"}),
    ],
)
def test_hints_become_json_schema(hint: Any, expected: dict[str, Any]) -> None:
    def order(value) -> None: ...

    order.__annotations__["value"] = hint
    assert schema(order)["properties"]["value"] == expected


def test_a_decimal_is_a_number_or_a_string() -> None:
    def order(amount: Decimal) -> None: ...

    kinds = [each["type"] for each in schema(order)["properties"]["amount"]["anyOf"]]
    assert kinds == ["number", "string"]
    assert validate(order, '{"amount": 12.5}') == validate(order, '{"amount": "12.5"}') == {"amount": Decimal("12.5")}


def test_models_dataclasses_typed_dicts_and_enums() -> None:
    def order(lines: list[Line], at: Point, place: Place, size: Size = Size.SMALL) -> None: ...

    found = schema(order)
    assert found["required"] == ["lines", "at", "place"]
    assert found["properties"]["lines"] == {"type": "array", "items": {"$ref": "#/$defs/Line"}}
    assert found["properties"]["size"] == {"$ref": "#/$defs/Size", "default": "s"}
    assert found["$defs"]["Size"] == {"enum": ["s", "l"], "type": "string"}
    assert found["$defs"]["Line"]["description"] == "One line of an order."
    assert found["$defs"]["Line"]["properties"]["amount"] == {
        "type": "integer",
        "minimum": 1,
        "default": 1,
        "description": "how many",
    }

    given = {"lines": [{"sku": "a"}], "at": {"x": 1}, "place": {"city": "Bonn"}, "size": "l"}
    assert validate(order, given) == {
        "lines": [Line(sku="a", amount=1)],
        "at": Point(1.0),
        "place": {"city": "Bonn"},
        "size": Size.LARGE,
    }


def test_only_titles_of_json_schema_are_taken_out_not_fields_of_that_name() -> None:
    def order(title: str, tree: Tree, value: Literal["title"] = "title") -> None: ...

    found = schema(order)
    assert list(found["properties"]) == ["title", "tree", "value"]
    assert list(found["$defs"]["Tree"]["properties"]) == ["title", "children"]
    assert "title" not in found
    assert "title" not in found["$defs"]["Tree"]


def test_a_parameter_may_have_a_name_that_a_pydantic_field_may_not() -> None:
    def order(schema: int, copy: int, model_config: int, _hidden: int, json: int = 5) -> None: ...

    arguments = {"schema": 1, "copy": 2, "model_config": 3, "_hidden": 4}
    assert validate(order, arguments) == {**arguments, "json": 5}


def test_constraints_in_annotated_and_in_a_field_as_default_are_both_kept() -> None:
    def order(a: Annotated[int, Field(ge=3)] = 5, b: int = Field(7, le=9)) -> None: ...

    assert schema(order)["properties"] == {
        "a": {"type": "integer", "minimum": 3, "default": 5},
        "b": {"type": "integer", "maximum": 9, "default": 7},
    }
    assert validate(order, {}) == {"a": 5, "b": 7}


def test_a_default_that_is_not_json_stays_out_of_the_schema() -> None:
    sentinel = object()

    def order(a: Any = sentinel, b: date = date(2026, 1, 2)) -> None: ...

    assert schema(order)["properties"] == {"a": {}, "b": {"type": "string", "format": "date", "default": "2026-01-02"}}
    assert validate(order, {})["a"] is sentinel


def test_a_mutable_default_is_not_shared_between_calls() -> None:
    def order(tags: list[str] = []) -> None: ...  # noqa: B006

    compiled = compile_arguments(order, "order")
    compiled.validate("order", "{}")["tags"].append("left over")
    assert compiled.validate("order", "{}") == {"tags": []}


def test_string_annotations_see_the_names_around_the_function() -> None:
    class Local(BaseModel):
        x: int

    def order(value: Local) -> None: ...

    assert validate_in(order, {"value": {"x": 1}}, {"Local": Local}) == {"value": Local(x=1)}


def validate_in(function: Callable[..., Any], arguments: Any, scope: dict[str, Any]) -> dict[str, Any]:
    return compile_arguments(function, "order", scope=scope).validate("order", arguments)


def test_the_return_annotation_is_never_evaluated() -> None:
    def order(number: int) -> NoSuchName: ...  # type: ignore[name-defined]  # noqa: F821

    assert list(schema(order)["properties"]) == ["number"]


def test_a_wrapped_function_keeps_its_signature() -> None:
    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return call

    @logged
    def order(number: int) -> None: ...

    assert list(schema(order)["properties"]) == ["number"]


def test_the_injected_parameter_is_left_out_whatever_its_name_and_form() -> None:
    def plain(number: int, ctx: ToolContext) -> None: ...
    def optional(*, whatever: ToolContext | None = None, number: int) -> None: ...
    def annotated(number: int, c: Annotated[ToolContext, "here"]) -> None: ...

    for function, name in ((plain, "ctx"), (optional, "whatever"), (annotated, "c")):
        compiled = compile_arguments(function, "order", injected=ToolContext)
        assert compiled.injected == name
        assert list(compiled.schema["properties"]) == ["number"]
        with pytest.raises(InvalidArguments, match=f"{name}: is no parameter"):
            compiled.validate("order", {"number": 1, name: None})


def test_the_injected_type_need_not_be_imported_at_run_time() -> None:
    namespace: dict[str, Any] = {}
    exec("def order(number: 'int', ctx: 'ToolContext'): ...", namespace)
    assert compile_arguments(namespace["order"], "order", injected=ToolContext).injected == "ctx"


# --- what cannot be a schema ---


def test_a_missing_annotation_is_refused() -> None:
    def order(number: int, note) -> None: ...

    error = refused(order)
    assert error.parameter == "note"
    assert str(error) == "Tool 'order', parameter 'note': it has no annotation. Annotate it, like `note: int`."


def test_a_method_is_told_what_to_do_with_self() -> None:
    class Shop:
        def order(self, number: int) -> None: ...

    error = refused(Shop.order)
    assert error.parameter == "self"
    assert "outside the class" in str(error)
    assert list(schema(Shop().order)["properties"]) == ["number"]


def test_kinds_of_parameters_without_a_name_for_the_model_are_refused() -> None:
    def many(*numbers: int) -> None: ...
    def named(**options: int) -> None: ...
    def placed(number: int, /) -> None: ...

    assert (refused(many).parameter, refused(many).problem[:8]) == ("numbers", "*numbers")
    assert (refused(named).parameter, refused(named).problem[:9]) == ("options", "**options")
    assert refused(placed).parameter == "number"
    assert "positional-only" in str(refused(placed))


@pytest.mark.parametrize("hint", [Opaque, list[Opaque], Opaque | None, Callable[[], int], "Opaque"])
def test_a_type_that_a_model_cannot_write_is_refused(hint: Any) -> None:
    def order(number: int, thing) -> None: ...

    order.__annotations__["thing"] = hint
    error = refused(order)
    assert error.parameter == "thing"
    assert "Take what a model can write" in str(error)


def test_a_name_that_does_not_exist_is_refused() -> None:
    def order(number: int, part: Fraction) -> None: ...

    error = refused(order)
    assert error.parameter == "part"
    assert "names 'Fraction'" in str(error)
    assert "TYPE_CHECKING" in str(error)


def test_a_string_that_is_no_annotation_is_refused() -> None:
    def order(number) -> None: ...

    order.__annotations__["number"] = "a number"
    assert refused(order).parameter == "number"


def test_a_model_with_an_open_end_is_refused() -> None:
    class Half(BaseModel):
        rest: NotYetThere  # type: ignore[name-defined]  # noqa: F821

    def order(half) -> None: ...

    order.__annotations__["half"] = Half
    assert refused(order).parameter == "half"


def test_what_is_not_a_def_is_refused() -> None:
    assert "lambda" in str(refused(lambda: 1))
    assert "Write a def" in str(refused(functools.partial(print, 1)))
    assert "Write a def" in str(refused(Opaque))


def test_a_function_that_yields_is_refused() -> None:
    def some() -> Iterator[int]:
        yield 1

    async def more() -> AsyncIterator[int]:
        yield 1

    assert "it yields" in str(refused(some))
    assert "it yields" in str(refused(more))


def test_an_alias_is_refused() -> None:
    def order(number: Annotated[int, Field(alias="orderNumber")]) -> None: ...
    def other(number: int = Field(alias="orderNumber")) -> None: ...

    assert refused(order).parameter == refused(other).parameter == "number"


def test_two_parameters_for_the_context_are_refused() -> None:
    def order(a: ToolContext, b: ToolContext) -> None: ...

    assert refused(order, injected=ToolContext).parameter == "b"


# --- validation ---


def order(number: int, lines: list[Line] = [], when: date | None = None) -> None:  # noqa: B006
    """Order."""


def test_json_text_and_a_decoded_object_mean_the_same() -> None:
    arguments = {"number": 3, "lines": [{"sku": "a", "amount": 2}], "when": "2026-11-21"}
    expected = {"number": 3, "lines": [Line(sku="a", amount=2)], "when": date(2026, 11, 21)}
    assert validate(order, arguments) == validate(order, json.dumps(arguments)) == expected
    assert validate(order, json.dumps(arguments).encode()) == expected


def test_values_of_python_are_taken_too() -> None:
    def pay(amount: Decimal, when: date, line: Line) -> None: ...

    given = {"amount": Decimal("1.10"), "when": date(2026, 1, 1), "line": Line(sku="a")}
    assert validate(pay, given) == given


@pytest.mark.parametrize("blank", ["", "  \n", "{}", b"", {}])
def test_blank_text_is_no_arguments(blank: Any) -> None:
    def ping(times: int = 1) -> None: ...

    assert validate(ping, blank) == {"times": 1}


@pytest.mark.parametrize(
    "text", ["{", '{"number": 3', "number=3", '{"number": 3} and', "{'number': 3}", '{"number": \x00}']
)
def test_what_is_not_json_is_said_to_be_so(text: str) -> None:
    [(path, message)] = problems(order, text)
    assert path == ""
    assert message.startswith("not JSON: ")


def test_a_document_too_deep_is_refused_not_a_crash() -> None:
    [(_, message)] = problems(order, '{"number":' + "[" * 100_000)
    assert message.startswith("not JSON: ")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"number"', "true"])
def test_json_that_is_no_object_is_said_to_be_so(text: str) -> None:
    assert problems(order, text) == [("", "must be one JSON object, with the parameters by name")]


def test_every_problem_is_named_at_its_place() -> None:
    assert problems(order, {"lines": [{"sku": "a"}, {"amount": 0}], "when": "soon", "colour": 1}) == [
        ("number", "is required"),
        ("lines[1].sku", "is required"),
        ("lines[1].amount", "input should be greater than or equal to 1; got 0"),
        ("when", 'input should be a valid date or datetime, input is too short; got "soon"'),
        ("colour", "is no parameter; there are: number, lines, when"),
    ]


def test_the_text_for_the_model_holds_every_problem() -> None:
    with pytest.raises(InvalidArguments) as caught:
        validate(order, {"number": "many"})
    assert str(caught.value).splitlines() == [
        "The arguments of order are not valid; nothing was done.",
        '- number: input should be a valid integer, unable to parse string as an integer; got "many"',
    ]


def test_the_name_of_an_argument_hides_nothing_of_what_is_wrong_with_it() -> None:
    def open_account(password: str, api_key: int) -> None: ...

    with pytest.raises(InvalidArguments) as caught:
        validate(open_account, {"api_key": "sk-proj-0123456789abcdefABCDEF01"})
    assert described_error(caught.value)["message"].splitlines()[1:] == [
        "- password: is required",
        '- api_key: input should be a valid integer, unable to parse string as an integer; got "[masked]"',
    ]


def test_a_flood_of_problems_is_cut() -> None:
    with pytest.raises(InvalidArguments) as caught:
        validate(order, {"number": "x" * 100_000, "lines": [{}] * 1000})
    text = str(caught.value)
    assert len(caught.value.problems) == 1001
    assert text.splitlines()[-1] == "- and 991 more"
    assert len(text) < 1000


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_know_are_refused(number: str) -> None:
    def pay(amount: float) -> None: ...

    assert problems(pay, f'{{"amount": {number}}}')[0][0] == "amount"
    assert problems(pay, {"amount": float(number)})[0][0] == "amount"


def test_a_mapping_that_is_not_json_is_refused() -> None:
    [(path, message)] = problems(order, {"number": Opaque()})
    assert (path, message[:9]) == ("", "not JSON:")


@given(st.text() | st.binary())
def test_whatever_a_model_sends_is_taken_or_refused(text: str | bytes) -> None:
    try:
        taken = validate(order, text)
    except InvalidArguments:
        return  # the one way to refuse
    assert isinstance(taken["number"], int)


# --- results ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ({"a": [1, 2.5, True, "x", None]}, {"a": [1, 2.5, True, "x", None]}),
        (Decimal("1.10"), "1.10"),
        (datetime(2026, 11, 21, 12, tzinfo=UTC), "2026-11-21T12:00:00Z"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Size.LARGE, "l"),
        (Line(sku="a"), {"sku": "a", "amount": 1}),
        (Point(1.0), {"x": 1.0, "y": 0.0}),
        ((1, 2), [1, 2]),
        ({1: "one"}, {"1": "one"}),
        (2**64 - 1, 2**64 - 1),
        ([10**40, {"wei": -(10**40)}], [str(10**40), {"wei": str(-(10**40))}]),
        (b"bytes", "bytes"),
        ([float("nan"), float("-inf")], ["NaN", "-Infinity"]),
        ({"a\0": ["b\0c", "\\u0000"]}, {"a\ufffd": ["b\ufffdc", "\\u0000"]}),
    ],
)
def test_results_become_json_that_postgres_can_store(value: Any, expected: Any) -> None:
    assert jsonable(value) == expected
    json.dumps(jsonable(value), allow_nan=False)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_what_cannot_be_json_is_named() -> None:
    circle: list[Any] = []
    circle.append(circle)
    for value, reason in (
        (Opaque(), "Unable to serialize unknown type"),
        ({"a": Opaque()}, "Unable to serialize unknown type"),
        (circle, "Circular reference"),
        (b"\xff", "utf-8"),
        ("\ud800", "surrogates"),
        (10**5000, "number out of range"),
        (nested(250), "recursion limit"),
        (nested(300), "Maximum serialization depth"),
    ):
        with pytest.raises(TypeError, match=reason) as caught:
            jsonable(value)
        assert str(caught.value).startswith(f"{type(value).__name__} cannot be written as JSON: ")


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | TEXT,
    lambda some: st.lists(some) | st.dictionaries(TEXT, some),
)


@given(JSON)
def test_what_is_json_already_stays_as_it_is(value: Any) -> None:
    assert jsonable(value) == value


# --- docstrings ---


def google(number: int, note: str) -> str:
    """Find an order.

    Of the current customer only.

    Args:
        number (int): the order's number,
            as printed
        note: why: a word

    Returns:
        the order, or nothing

    Raises:
        ModelRetry: never
    """
    return ""


def numpy(number: int, note: str) -> str:
    """Find an order.

    Of the current customer only.

    Parameters
    ----------
    number : int
        the order's number,
        as printed
    note
        why: a word

    Returns
    -------
    str
        the order, or nothing
    """
    return ""


def sphinx(number: int, note: str) -> str:
    """Find an order.

    Of the current customer only.

    :param number: the order's number,
        as printed
    :param note: why: a word
    :returns: the order, or nothing
    """
    return ""


@pytest.mark.parametrize("function", [google, numpy, sphinx])
def test_the_docstring_describes_function_and_parameters(
    function: Callable[..., Any], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    compiled = compile_arguments(function, "order")
    assert compiled.description == ("Find an order.\n\nOf the current customer only.\n\nReturns: the order, or nothing")
    assert compiled.schema["properties"] == {
        "number": {"type": "integer", "description": "the order's number, as printed"},
        "note": {"type": "string", "description": "why: a word"},
    }
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_a_section_in_the_first_and_only_line_is_found() -> None:
    def order(number: int) -> None:
        """:param number: the number"""

    assert read_docstring(order) == ("", {"number": "the number"})


def test_prose_stays_as_it_is() -> None:
    def order() -> None:
        """Find: an order.

        Note: not all are there.
            Indented.
        """

    assert read_docstring(order) == ("Find: an order.\n\nNote: not all are there.\n    Indented.", {})


def test_a_description_in_the_hint_wins_over_the_docstring() -> None:
    def order(number: Annotated[int, Field(description="from the hint")]) -> None:
        """Find.

        Args:
            number: from the docstring
        """

    assert schema(order)["properties"]["number"]["description"] == "from the hint"


def test_a_description_of_no_parameter_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def order(number: int, ctx: ToolContext) -> None:
        """Find.

        Args:
            numbr: mistyped
            ctx: may be described
        """

    with caplog.at_level(logging.WARNING, "tools"):
        compile_arguments(order, "order", injected=ToolContext)
    assert [record.getMessage() for record in caplog.records] == [
        "Tool 'order' describes 'numbr', which is none of its parameters"
    ]
