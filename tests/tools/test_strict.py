"""Schemas in OpenAI's strict subset: what they look like, what they refuse, and how nulls come back as defaults."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from tools import ToolContext, tool
from tools.exceptions import InvalidArguments, ToolSchemaError
from tools.schema import Arguments, compile_arguments


class Size(Enum):
    LARGE = "l"
    SMALL = "s"


class Line(BaseModel):
    sku: str
    amount: int = 1
    size: Size = Size.SMALL


@dataclass
class Box:
    lines: list[Line] = field(default_factory=list)
    label: str | None = None


class Node(BaseModel):
    name: str
    children: list[Node] = []


class Circle(BaseModel):
    kind: Literal["circle"]
    radius: float = 1.0


class Square(BaseModel):
    kind: Literal["square"]
    side: float = 2.0


class Where(TypedDict):
    city: str


class Pair(NamedTuple):
    left: int
    right: int


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str


def compiled(function: Callable[..., Any]) -> Arguments:
    return compile_arguments(function, "order", injected=ToolContext, strict=True)


def taking(hint: Any) -> Callable[..., Any]:
    def order(value) -> None: ...

    order.__annotations__["value"] = hint
    return order


def nodes(schema: Any, *, names: bool = False) -> list[dict[str, Any]]:
    """Every schema within the schema."""
    if isinstance(schema, list):
        return [each for inner in schema for each in nodes(inner)]
    if not isinstance(schema, dict):
        return []
    inner = [
        each
        for word, value in schema.items()
        if names or word not in ("enum", "const", "required")
        for each in nodes(value, names=not names and word in ("properties", "$defs"))
    ]
    return inner if names else [schema, *inner]


def test_a_signature_in_the_subset() -> None:
    def order(number: int, note: str | None, size: Size = Size.LARGE, *, ctx: ToolContext) -> None:
        """Order.

        Args:
            number: of the invoice
            size: of the parcel
        """

    assert compiled(order).schema == {
        "$defs": {"Size": {"enum": ["l", "s"], "type": "string"}},
        "type": "object",
        "properties": {
            "number": {"type": "integer", "description": "of the invoice"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "size": {
                "anyOf": [{"$ref": "#/$defs/Size"}, {"type": "null"}],
                "description": 'of the parcel (null: "l")',
            },
        },
        "required": ["number", "note", "size"],
        "additionalProperties": False,
    }


def test_no_parameters() -> None:
    def ping() -> None: ...

    assert compiled(ping).schema == {"type": "object", "properties": {}, "required": [], "additionalProperties": False}


KNOWN = {
    *("type", "properties", "required", "additionalProperties", "items", "anyOf", "enum", "const", "$ref", "$defs"),
    *("description", "pattern", "format", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"),
    *("minItems", "maxItems"),
}


@pytest.mark.parametrize(
    "hint",
    [
        *(int, bool, str, float, Decimal, UUID, date, Size, Literal["a", 1], list[int], set[str], frozenset[int]),
        *(Line, Box, Node, Where, Circle | Square, int | str | None, list[Line | None], list[Node] | None),
        Annotated[Circle | Square, Field(discriminator="kind")],
        Annotated[str, Field(min_length=2, max_length=9, pattern="^[a-z]+$", description="a word")],
        Annotated[list[int], Field(min_length=1, max_length=3)],
        Annotated[int, Field(gt=0, le=10, multiple_of=2)],
        Annotated[Line, Field(description="the line")],
    ],
    ids=str,
)
@pytest.mark.parametrize("default", [..., "null"])
def test_all_that_is_told_is_within_the_subset(hint: Any, default: Any) -> None:
    function = taking(hint if default is ... else hint | None)
    for node in nodes(compiled(function).schema):
        assert node.keys() <= KNOWN, node
        if node.get("type") == "object":
            assert node["additionalProperties"] is False
            assert node["required"] == list(node["properties"])
        if "$ref" in node:
            assert node.keys() == {"$ref"}
        assert node.keys() & {"type", "$ref", "anyOf", "enum", "const"}, node


def test_a_constraint_that_the_subset_does_not_know_is_told_in_words_and_checked_by_us() -> None:
    def order(word: Annotated[str, Field(min_length=2, max_length=3)], some: set[int]) -> None: ...

    made = compiled(order)
    assert made.schema["properties"]["word"] == {
        "type": "string",
        "description": "(at least 2 characters, at most 3 characters)",
    }
    assert made.schema["properties"]["some"]["description"] == "(no two alike)"
    with pytest.raises(InvalidArguments, match="word: string should have at least 2 characters"):
        made.validate("order", {"word": "a", "some": []})


@pytest.mark.parametrize(
    ("hint", "where", "says"),
    [
        (dict[str, int], "value", "open dict"),
        (dict, "value", "open dict"),
        (list[dict[str, int]], "value", "open dict"),
        (Open, "Open", "open dict"),
        (Any, "value", "may be anything"),
        (list, "value", "may be anything"),
        (list[Any], "value", "may be anything"),
        (tuple[int, str], "value", "tuple"),
        (Pair, "Pair", "tuple"),
    ],
    ids=str,
)
def test_what_the_subset_cannot_express_is_refused_at_its_place(hint: Any, where: str, says: str) -> None:
    with pytest.raises(ToolSchemaError, match=says) as caught:
        compiled(taking(hint))
    assert caught.value.parameter == where
    assert "strict=True" in str(caught.value)


def test_a_none_beside_another_default_is_refused() -> None:
    def order(limit: int | None = 10) -> None: ...

    with pytest.raises(ToolSchemaError, match="cannot tell a None"):
        compiled(order)


def test_bounds_of_the_subset() -> None:
    def nested(levels: int) -> Any:
        model: Any = int
        for level in range(levels):
            model = type(f"Level{level}", (BaseModel,), {"__annotations__": {"inner": model}, "__module__": __name__})
        return model

    compiled(taking(nested(9)))
    choices = Enum("Choices", {f"c{n}": f"c{n}" for n in range(1001)})  # type: ignore[misc]
    long = Enum("Long", {f"c{n}": f"{n:061}" for n in range(251)})  # type: ignore[misc]
    for hint, says in (
        (nested(10), "at most 10 levels"),
        (choices, "at most 1,000 choices"),
        (long, "15,000 characters of so many choices"),
    ):
        with pytest.raises(ToolSchemaError, match=says):
            compiled(taking(hint))


def test_null_becomes_the_default_wherever_there_is_one() -> None:
    def order(
        line: Line,
        box: Box,
        shape: Circle | Square,
        tree: Node,
        many: list[Line],
        times: int = 3,
        note: str | None = None,
        where: Where | None = None,
    ) -> None: ...

    made = compiled(order)
    sent = {
        "line": {"sku": "a", "amount": None, "size": None},
        "box": {"lines": [{"sku": "b", "amount": 2, "size": "l"}], "label": None},
        "shape": {"kind": "square", "side": None},
        "tree": {"name": "top", "children": [{"name": "leaf", "children": None}]},
        "many": [{"sku": "c", "amount": None, "size": "l"}],
        **{"times": None, "note": None, "where": None},
    }
    expected = {
        "line": Line(sku="a"),
        "box": Box([Line(sku="b", amount=2, size=Size.LARGE)]),
        "shape": Square(kind="square"),
        "tree": Node(name="top", children=[Node(name="leaf")]),
        "many": [Line(sku="c", size=Size.LARGE)],
        **{"times": 3, "note": None, "where": None},
    }
    for arguments in (sent, json.dumps(sent), json.dumps(sent).encode()):
        assert made.validate("order", arguments) == expected
    # What is left out has its default as well: not every service holds its model to the schema.
    assert made.validate("order", {**sent, "box": {}, "line": {"sku": "a"}})["box"] == Box()


def test_a_null_that_means_nothing_is_refused() -> None:
    def order(number: int, times: int = 3) -> None: ...

    with pytest.raises(InvalidArguments) as caught:
        compiled(order).validate("order", '{"number": null, "times": 3}')
    assert [each["path"] for each in caught.value.problems] == ["number"]
    for text in ("{", "[]", "null", '{"number":' + "[" * 100_000):
        with pytest.raises(InvalidArguments):
            compiled(order).validate("order", text)


def test_the_digest_tells_a_strict_tool_from_another() -> None:
    def order(number: int) -> None: ...

    assert tool(strict=True)(order).digest != tool(order).digest
