"""What a run's final answer must be: a JSON schema, checked when it is given, and the reading of an answer by it.

Schemas come from users, answers from models, and both are checked inside the agents worker, where many runs share one thread.
So what a check may cost is bounded before it runs: the size of the schema, its patterns (an engine without backtracking),
how often its parts are applied to the parts of an answer, and its patterns to the characters. Nothing is ever fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

import jsonschema_rs
import orjson

from runs.exceptions import BadInput
from threads import database
from threads.content import plain

LARGEST_SCHEMA = 64 * 1024  # bytes, as JSON
MOST_PATTERNS = 100
LARGEST_PATTERN = 256 * 1024  # bytes, compiled
MOST_EVALUATIONS = 2_000_000  # of a subschema at a place of an answer: measured 0.02 to 0.1 us each
EVALUATIONS_A_PLACE = 50_000
MOST_MATCHING = 8_000_000  # KB of compiled patterns at a character of an answer: measured up to 0.12 us each
PATTERN_SIZES = (4, 16, 64, LARGEST_PATTERN // 1024)  # KB, compiled: a pattern counts as the first that it fits
DEEPEST_ANSWER = 100  # levels
LONGEST_CHAIN = 50  # of schemas that refer to each other for one place
LONGEST_REASON = 500  # characters

DIALECTS = ("draft/2020-12/schema", "draft/2019-09/schema", "draft-07/schema")
# Keywords whose schemas look at the same place of the answer, and those that look at the places below it.
SAME = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependencies")
BELOW = (
    "items",
    "additionalItems",
    "contains",
    "patternProperties",
    "additionalProperties",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
)
PARTED = ("properties", "prefixItems")  # below, and no two of them look at the same place
DEFINED = ("$defs", "definitions")
UNEVALUATED = (
    "unevaluatedItems",
    "unevaluatedProperties",
)  # what else stands beside it is gone through again: measured up to 3 times
LISTED = ("enum", "required")  # gone through one by one
NOT_TAKEN = ("$dynamicRef", "$recursiveRef", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary")

ANYTHING: dict[str, Any] = {}
FENCED = re.compile(r"\A```[a-zA-Z0-9]*[ \t]*\r?\n(.*)\n[ \t]*```\Z", re.DOTALL)


class OutputInvalid(ValueError):
    """An answer does not fit. The message says where and why, for the model and for people."""


class OutputSchema:
    """A checked schema. `schema` is the dict, as the model is asked for it."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema = schema
        self._costs = _Costs(schema)
        try:
            self._validator = jsonschema_rs.validator_for(
                schema,
                validate_formats=True,
                offline=True,
                pattern_options=jsonschema_rs.RegexOptions(size_limit=LARGEST_PATTERN, dfa_size_limit=LARGEST_PATTERN),
            )
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as error:
            where = _where(getattr(error, "instance_path", []))
            raise BadInput(f"output_schema is no JSON schema{where}: {_short(error.message)}") from None

    def read(self, text: str) -> Any:
        """Return the JSON value that an answer is, alone or as a fenced block of code. Raises OutputInvalid."""
        value = _parse(text)
        places, characters, depth = _extent(value)
        try:
            affordable = depth <= DEEPEST_ANSWER and self._costs.affordable(places, characters, depth)
        except RecursionError:
            affordable = False
        if not affordable:
            raise OutputInvalid("it is too large or too deep to be checked by this schema.")
        try:
            self._validator.validate(value)
        except jsonschema_rs.ValidationError as error:
            raise OutputInvalid(f"{_short(error.message)}{_where(error.instance_path)}.") from None
        return value


def check(schema: object) -> str:
    """Return the schema as it is stored: as JSON text, for models write the fields in its order, and jsonb keeps none.

    Raises BadInput that says what is wrong, and where.
    """
    if isinstance(schema, str):  # one that is stored already
        schema = _schema_of(schema)
    if not isinstance(schema, Mapping):
        raise BadInput("output_schema must be a dict: a JSON schema like {'type': 'object', 'properties': {...}}.")
    text = database.dumps(plain(dict(schema), "output_schema"))
    of(text)
    return text


def _schema_of(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def of(text: str) -> OutputSchema:
    """Return the checked schema of its text; each leg asks for it, so it is kept. Raises BadInput."""
    if len(text.encode()) > LARGEST_SCHEMA:
        raise BadInput(f"output_schema has {len(text.encode()):,} bytes as JSON, {LARGEST_SCHEMA:,} are allowed.")
    return _made(text)


@lru_cache(maxsize=64)
def _made(text: str) -> OutputSchema:
    return OutputSchema(orjson.loads(text))


def _parse(text: str) -> Any:
    text = text.strip()
    if not text:
        raise OutputInvalid("it is empty.")
    if fenced := FENCED.match(text):
        text = fenced[1].strip()
    try:
        value = plain(orjson.loads(text), "the answer")  # without what Postgres cannot hold
        database.dumps(value)
    except (orjson.JSONDecodeError, BadInput, TypeError) as error:
        raise OutputInvalid(f"it is not JSON: {_short(str(error))}.") from None
    return value


def _extent(value: Any) -> tuple[int, int, int]:
    """Return how many places and characters a JSON value has, names of properties counted, and how deep it is: 0 for one
    without parts."""
    places, characters, depth, level = 0, 0, -1, [value]
    while level:
        depth += 1
        places += len(level)
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
                places += len(each)
                characters += sum(map(len, each))
            elif isinstance(each, list):
                below += each
            elif isinstance(each, str):
                characters += len(each)
        level = below
    return places, characters, depth


@lru_cache(maxsize=1024)
def _size_of(pattern: str) -> int:
    """Return how many KB a pattern takes compiled, at most: what it costs a character when the engine follows every way."""
    for size in PATTERN_SIZES:
        bounds = jsonschema_rs.RegexOptions(size_limit=size * 1024, dfa_size_limit=size * 1024)
        try:
            jsonschema_rs.validator_for({"pattern": pattern}, pattern_options=bounds)
        except jsonschema_rs.ValidationError:
            continue
        return size
    return PATTERN_SIZES[-1]


class _Cost(NamedTuple):
    """What a place of an answer costs: evaluations of a subschema, and KB of patterns that each character is matched with."""

    evaluations: int
    matching: int

    @classmethod
    def sum(cls, costs: Iterable[_Cost], times: int = 1) -> _Cost:
        evaluations, matching = (sum(each) * times for each in zip(_FREE, *costs, strict=True))
        return cls(min(evaluations, MOST_EVALUATIONS + 1), min(matching, MOST_MATCHING + 1))

    @classmethod
    def most(cls, costs: Iterable[_Cost]) -> _Cost:
        return cls(*map(max, zip(_FREE, *costs, strict=True)))


_FREE = _Cost(0, 0)


class _Costs:
    """How often the parts of a schema are applied to an answer, at most: see `of`. Raises BadInput for what is not taken."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._root = schema
        self._known: dict[tuple[int, int], _Cost] = {}
        self._deep = -1
        self._check()
        try:
            costs = self.of(4)
        except RecursionError:
            raise BadInput("output_schema is nested too deep.") from None
        if costs.evaluations > EVALUATIONS_A_PLACE:
            raise BadInput(
                "output_schema applies too many schemas to one place. Use fewer alternatives, or references."
            )

    def affordable(self, places: int, characters: int, depth: int) -> bool:
        """Return whether an answer of this extent may be checked. Raises RecursionError."""
        cost = self.of(depth)
        return cost.evaluations * places <= MOST_EVALUATIONS and cost.matching * characters <= MOST_MATCHING

    def of(self, depth: int) -> _Cost:
        """Return n and m so that an answer of so many levels, p places and c characters is checked in at most n * p
        evaluations and m * c KB of patterns matched.

        By induction over the levels: what is applied to a place is the same-place closure of its schemas; what that
        applies to one place below is the costliest of `properties` and all of the others. Raises RecursionError.
        """
        for each in range(self._deep + 1, depth + 1):  # from below, so that little is left to each
            self._cost(self._root, each, set())
            self._deep = each
        return self._cost(self._root, depth, set())

    def _cost(self, schema: Any, depth: int, above: set[int]) -> _Cost:
        if not isinstance(schema, dict):
            return _Cost(1, 0)
        key = (id(schema), depth)
        if (known := self._known.get(key)) is not None:
            return known
        if id(schema) in above:
            raise BadInput("output_schema refers to itself for one and the same place, so it would never end.")
        if len(above) == LONGEST_CHAIN:
            raise BadInput("output_schema is nested too deep.")
        above.add(id(schema))
        same = [self._cost(each, depth, above) for keyword in SAME for each in _subschemas(schema, keyword)]
        if "$ref" in schema:
            same.append(self._cost(self._referred(schema["$ref"]), depth, above))
        above.discard(id(schema))
        listed = sum(len(schema[keyword]) for keyword in LISTED if isinstance(schema.get(keyword), list))
        named = schema.get("patternProperties")
        patterns = list(named) if isinstance(named, dict) else []
        if isinstance(schema.get("pattern"), str):
            patterns.append(schema["pattern"])
        costs = [
            _Cost(1 + listed, sum(map(_size_of, patterns))),
            _Cost.sum(same, 4 if any(keyword in schema for keyword in UNEVALUATED) else 1),
        ]
        if depth:
            for keyword in PARTED:
                costs.append(_Cost.most(self._cost(each, depth - 1, set()) for each in _subschemas(schema, keyword)))
            costs += [self._cost(each, depth - 1, set()) for keyword in BELOW for each in _subschemas(schema, keyword)]
        cost = _Cost.sum(costs)
        self._known[key] = cost
        return cost

    def _check(self) -> None:
        """Look at every part once. Raises BadInput for a part that cannot be taken, by its place."""
        dialect = self._root.get("$schema")
        if dialect is not None and not (isinstance(dialect, str) and dialect.rstrip("#").endswith(DIALECTS)):
            raise BadInput("output_schema: $schema must be JSON schema 2020-12, 2019-09 or draft 7.")
        patterns = 0
        seen: set[int] = set()
        left: list[tuple[dict[str, Any], str]] = [(self._root, "output_schema")]
        while left:
            schema, where = left.pop()
            if id(schema) in seen:
                continue
            seen.add(id(schema))
            for keyword in NOT_TAKEN:
                if keyword in schema:
                    raise BadInput(f"{where}: {keyword} is not taken. Refer to '#/$defs/...' by $ref.")
            if "$id" in schema and schema is not self._root:
                raise BadInput(f"{where}: $id is not taken inside a schema. Refer to '#/$defs/...' by $ref.")
            if "$ref" in schema:
                try:
                    left.append((self._referred(schema["$ref"]), f"{where}.$ref"))
                except KeyError:
                    raise BadInput(
                        f"{where}: $ref must refer to a part of the same schema, like '#/$defs/item'; it is"
                        f" {_short(repr(schema['$ref']))}."
                    ) from None
            patterns += "pattern" in schema
            named = schema.get("patternProperties")
            patterns += len(named) if isinstance(named, dict) else 0
            if patterns > MOST_PATTERNS:
                raise BadInput(f"output_schema has more than {MOST_PATTERNS} patterns.")
            for keyword in (*SAME, *BELOW, *PARTED, *DEFINED):
                left += [
                    (each, f"{where}.{keyword}") for each in _subschemas(schema, keyword) if isinstance(each, dict)
                ]

    def _referred(self, reference: object) -> dict[str, Any]:
        """Return the part of the schema that a reference names. Raises KeyError."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise KeyError(reference)
        found: Any = self._root
        for name in unquote(reference[2:]).split("/") if reference != "#" else ():
            name = name.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, dict):
                found = found[name]
            else:
                raise KeyError(reference)
        if isinstance(found, bool):
            return ANYTHING
        if not isinstance(found, dict):
            raise KeyError(reference)
        return found


def _subschemas(schema: dict[str, Any], keyword: str) -> Iterator[Any]:
    """Yield the schemas that stand under a keyword. What is none there is left to the check of the whole."""
    held = schema.get(keyword)
    if isinstance(held, list):
        yield from held
    elif isinstance(held, dict) and keyword in (
        "properties",
        "patternProperties",
        "dependentSchemas",
        "dependencies",
        *DEFINED,
    ):
        yield from held.values()
    elif held is not None:
        yield held


def _where(path: list[str | int]) -> str:
    if not path:
        return ""
    return (
        " at " + "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in path).removeprefix(".")[:200]
    )


def _short(text: str) -> str:
    text = text.strip().rstrip(".")
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."
