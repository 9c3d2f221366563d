"""A JSON schema in OpenAI's strict subset, to which the service can hold a model; and what a model sends by it, read back.

The rules (https://platform.openai.com/docs/guides/structured-outputs, "Supported schemas"): the root is an object, every
object is closed and requires all its properties, what may be absent is a union with null, `anyOf` but not `oneOf` nor `allOf`,
references and recursion, no defaults, few constraints, and bounds on the size of all.

A parameter with a default becomes one that may be null, and null means the default. A constraint that the subset does not
know is left to our own check of the arguments, and told to the model in the description. What the subset cannot express at
all raises ToolSchemaError: open dicts, tuples, `Any`, and a default beside a None that means something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import to_json

from tools.exceptions import ToolSchemaError

MOST_PROPERTIES = 5_000
MOST_LEVELS = 10  # of objects within objects
MOST_CHOICES = 1_000  # values of all enums
LONG_ENUM, MOST_OF_A_LONG_ENUM = 250, 15_000  # values; characters of one that has more
MOST_CHARACTERS = 120_000  # of all names, definitions, enums and constants

_KEPT = frozenset({
    *("type", "properties", "required", "additionalProperties", "items", "anyOf", "enum", "const", "$ref", "$defs"),
    *("description", "pattern", "format", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"),
    *("minItems", "maxItems"),
})  # fmt: skip
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"})
_REFUSED = ("not", "dependentRequired", "dependentSchemas", "if", "then", "else", "patternProperties", "prefixItems")
_TOLD = {
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "uniqueItems": "no two alike",
    "pattern": "matches {}",
}
_OF_A_DECIMAL = "^(?!^[-+.]*$)"  # how pydantic's pattern begins: nothing that a model has to be told
_NULL = {"type": "null"}
_OPTIONAL = "x-optional"  # in the schema that reads back: properties whose null means their default


class Strict:
    """`schema` is what the service is given. `read` takes what comes back."""

    def __init__(self, tool: str, schema: Mapping[str, Any]) -> None:
        """Raises ToolSchemaError where the subset cannot express the schema."""
        self._tool = tool
        self._read = self._closed(dict(schema), "")
        self._read.setdefault("properties", {})
        self._read.setdefault("required", [])
        self.schema: dict[str, Any] = _public(self._read)
        self._check_size()

    def read(self, value: Any) -> Any:
        """Return the arguments without the nulls that mean a default."""
        return self._filled(value, self._read)

    # --- the schema

    def _refuse(self, problem: str, where: str) -> ToolSchemaError:
        return ToolSchemaError(self._tool, f"strict=True {problem}", where or None)

    def _closed(self, node: dict[str, Any], where: str) -> dict[str, Any]:
        for word in _REFUSED:
            if word in node:
                hint = (
                    "no tuple of fixed places. Take a list, a dataclass"
                    if word == "prefixItems"
                    else f"no {word!r}. Take"
                )
                raise self._refuse(f"knows {hint} or a pydantic model.", where)
        if "allOf" in node:
            parts = node.pop("allOf")
            if len(parts) > 1:
                raise self._refuse("knows no schema that is several at once. Take one model that has it all.", where)
            node = {**parts[0], **node}
        if "oneOf" in node:
            node["anyOf"] = node.pop("oneOf")
        if "$ref" in node and len(node.keys() - {"default", "$ref"}):
            node["anyOf"] = [{"$ref": node.pop("$ref")}]  # a reference stands alone
        told = [
            text.format(node[word])
            for word, text in _TOLD.items()
            if word in node and self._leaves(node, word) and not str(node[word]).startswith(_OF_A_DECIMAL)
        ]
        kept = {word: value for word, value in node.items() if word in _KEPT and not self._leaves(node, word)}
        if told:
            kept["description"] = " ".join(filter(None, (kept.get("description"), f"({', '.join(told)})")))
        if kept.keys() & {"properties", "additionalProperties"} or kept.get("type") == "object":
            self._close_object(kept, where)
        if kept.get("type") == "array":
            if not kept.get("items"):
                raise self._refuse("wants a type, and what this list holds may be anything.", where)
            kept["items"] = self._closed(dict(kept["items"]), where)
        if "anyOf" in kept:
            kept["anyOf"] = [self._closed(dict(each), where) for each in kept["anyOf"]]
        if "$defs" in kept:
            kept["$defs"] = {name: self._closed(dict(each), name) for name, each in kept["$defs"].items()}
        if not kept.keys() & {"type", "$ref", "anyOf", "enum", "const"}:
            raise self._refuse("wants a type, and this may be anything.", where)
        return kept

    @staticmethod
    def _leaves(node: Mapping[str, Any], word: str) -> bool:
        """Return whether the subset does not take this constraint."""
        if word == "pattern":
            return "(?" in str(node[word])  # it looks around; pydantic's own, of a Decimal, does too
        if word == "format":
            return node[word] not in _FORMATS
        return word in ("minLength", "maxLength", "uniqueItems")

    def _close_object(self, node: dict[str, Any], where: str) -> None:
        if node.get("additionalProperties", "properties" not in node) is not False:
            raise self._refuse("knows no open dict. Take a pydantic model, or a list of pairs.", where)
        given = node.get("properties", {})
        required = set(node.get("required", ()))
        properties: dict[str, Any] = {}
        optional: list[str] = []
        for name, each in given.items():
            place = f"{where}.{name}" if where else name
            closed = self._closed(dict(each), place)
            if name not in required:
                if not self._may_be_null(closed):
                    closed = _or_null(closed, each)
                    optional.append(name)
                elif each.get("default") is not None:
                    raise self._refuse(
                        "cannot tell a None from a value that is not given. Make None the default.", place
                    )
                else:
                    optional.append(name)  # null is its default, or the function's own sentinel
            properties[name] = closed
        node.update(type="object", properties=properties, required=list(properties), additionalProperties=False)
        if optional:
            node[_OPTIONAL] = optional

    @staticmethod
    def _may_be_null(node: Mapping[str, Any]) -> bool:
        return node.get("type") == "null" or any(each.get("type") == "null" for each in node.get("anyOf", ()))

    # --- its size

    def _check_size(self) -> None:
        properties = choices = characters = 0
        for name, node in _nodes(self.schema):
            properties += len(node.get("properties", ()))
            values = [*node.get("enum", ()), *([node["const"]] if "const" in node else ())]
            choices += len(node.get("enum", ()))
            length = sum(len(str(each)) for each in values)
            if len(values) > LONG_ENUM and length > MOST_OF_A_LONG_ENUM:
                raise self._refuse(
                    f"takes {MOST_OF_A_LONG_ENUM:,} characters of so many choices; it has {length:,}.", name
                )
            characters += length + sum(map(len, (*node.get("properties", ()), *node.get("$defs", ()))))
        for what, many, most in (
            ("properties", properties, MOST_PROPERTIES),
            ("choices", choices, MOST_CHOICES),
            ("characters of names and choices", characters, MOST_CHARACTERS),
            ("levels of objects within objects", self._levels(self.schema, ()), MOST_LEVELS),
        ):
            if many > most:
                raise self._refuse(f"takes at most {most:,} {what}; there are {many:,}.", "")

    def _levels(self, node: Mapping[str, Any], within: tuple[str, ...]) -> int:
        """Count the levels of objects, each reference once on its way: what holds itself has no end."""
        if "$ref" in node:
            name = str(node["$ref"])
            return 0 if name in within else self._levels(self._resolved(self.schema, node), (*within, name))
        inner = [
            *node.get("properties", {}).values(),
            *node.get("anyOf", ()),
            *([node["items"]] if "items" in node else ()),
        ]
        return (node.get("type") == "object") + max((self._levels(each, within) for each in inner), default=0)

    # --- what comes back

    def _resolved(self, root: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
        while "$ref" in node:
            node = root["$defs"][str(node["$ref"]).rpartition("/")[2]] if "$defs" in str(node["$ref"]) else root
        return node

    def _filled(self, value: Any, node: Mapping[str, Any]) -> Any:
        if not isinstance(value, dict | list):
            return value
        node = self._resolved(self._read, node)
        if "anyOf" in node:
            branches = [self._resolved(self._read, each) for each in node["anyOf"]]
            branch = next((each for each in branches if self._fits(value, each)), None)
            return value if branch is None else self._filled(value, branch)
        if isinstance(value, list):
            return [self._filled(each, node["items"]) for each in value] if "items" in node else value
        properties, optional = node.get("properties", {}), node.get(_OPTIONAL, ())
        return {
            name: self._filled(each, properties[name]) if name in properties else each
            for name, each in value.items()
            if each is not None or name not in optional
        }

    def _fits(self, value: Any, branch: Mapping[str, Any]) -> bool:
        if "anyOf" in branch:
            return any(self._fits(value, self._resolved(self._read, each)) for each in branch["anyOf"])
        if isinstance(value, list):
            return branch.get("type") == "array"
        if branch.get("type") != "object" or value.keys() - branch["properties"].keys():
            return False
        for name, each in branch["properties"].items():
            if name not in value and name not in branch.get(_OPTIONAL, ()):
                return False
            if name in value and (
                ("const" in each and value[name] != each["const"]) or value[name] not in each.get("enum", [value[name]])
            ):
                return False
        return True


def _or_null(node: dict[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what may be null too, and says what null means."""
    description = node.pop("description", "")
    if told.get("default") is not None:
        description = f"{description} (null: {to_json(told['default']).decode()})".strip()
    found: dict[str, Any] = {"anyOf": [*(node["anyOf"] if node.keys() == {"anyOf"} else [node]), _NULL]}
    if description:
        found["description"] = description
    return found


def _public(node: Any) -> Any:
    if isinstance(node, list):
        return [_public(each) for each in node]
    if isinstance(node, dict):
        return {word: _public(each) for word, each in node.items() if word != _OPTIONAL}
    return node


def _nodes(node: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield name, node
    for words in ("properties", "$defs"):
        for inner, each in node.get(words, {}).items():
            yield from _nodes(each, inner)
    for each in node.get("anyOf", ()):
        yield from _nodes(each, name)
    if "items" in node:
        yield from _nodes(node["items"], name)
