"""From a function's signature to a JSON schema, and from a model's JSON to the function's arguments.

Everything that cannot be told to a model fails here, when the module of the tool is imported.
"""

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaWarningKind
from pydantic_core import PydanticSerializationError, from_json, to_json

from tools.exceptions import InvalidArguments, Problem, ToolSchemaError
from tools.strict import Strict

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

logger = logging.getLogger(__name__)

MOST_SHOWN_OF_AN_INPUT = 80  # characters: a wrong argument is quoted back to the model, a wrong document is not


@dataclass(frozen=True, slots=True, eq=False)
class Arguments:
    """The parameters of one function, compiled.

    `schema` is the JSON schema of the object that a model sends: no titles, no parameter of an injected type.
    `description` is the docstring without the part that stands in the schema. `injected` names the parameter that
    the caller fills in itself.
    """

    schema: dict[str, Any]
    description: str
    injected: str | None
    names: tuple[str, ...]
    model: type[BaseModel]
    strict: Strict | None = None

    def validate(self, tool: str, arguments: Mapping[str, Any] | str | bytes) -> dict[str, Any]:
        """Return the keyword arguments for the function, defaults filled in. Raises InvalidArguments.

        JSON text and an already decoded object mean the same: both go by the rules for JSON, under which
        a date is a string. Blank text is no arguments, for some services send that for a tool without parameters.
        """
        if isinstance(arguments, str | bytes):
            text: str | bytes = arguments if arguments and not arguments.isspace() else b"{}"
        else:
            try:
                text = to_json(arguments, inf_nan_mode="constants")
            except ValueError as error:
                raise InvalidArguments(tool, [{"path": "", "message": f"not JSON: {error}"}]) from None
        if self.strict is not None:
            text = self._without_nulls(self.strict, text)
        try:
            values = self.model.__pydantic_validator__.validate_json(text)
        except ValidationError as error:
            raise InvalidArguments(tool, self._problems(error)) from None
        return dict(zip(self.names, values.__dict__.values(), strict=True))

    @staticmethod
    def _without_nulls(strict: Strict, text: str | bytes) -> str | bytes:
        try:
            return to_json(strict.read(from_json(text)), inf_nan_mode="constants")
        except ValueError:
            return text  # no JSON: the validator says so

    def _problems(self, error: ValidationError) -> list[Problem]:
        found = error.errors(include_url=False, include_context=False)
        return [{"path": _path(each["loc"]), "message": self._message(each)} for each in found]

    def _message(self, error: "ErrorDetails") -> str:
        where, message = error["loc"], error["msg"]
        match error["type"]:
            case "json_invalid":
                return f"not JSON: {message.removeprefix('Invalid JSON: ')}"
            case "model_type" if not where:
                return "must be one JSON object, with the parameters by name"
            case "missing":
                return "is required"
            case "extra_forbidden" if len(where) == 1:
                return "is no parameter; " + (f"there are: {', '.join(self.names)}" if self.names else "there are none")
            case "extra_forbidden":
                return "is not a known field"
        return f"{message[:1].lower()}{message[1:]}; got {_quote(error['input'])}"


def compile_arguments(
    function: Callable[..., Any],
    tool: str,
    *,
    injected: type | None = None,
    scope: Mapping[str, Any] | None = None,
    strict: bool = False,
) -> Arguments:
    """Read a function's signature, type hints and docstring. Raises ToolSchemaError, naming tool and parameter.

    A parameter annotated with the type `injected` is left out of the schema. `scope` holds the local names around
    the function, for annotations that are strings. With `strict` the schema keeps to the subset that a service
    can hold a model to (`tools.strict`): every parameter required, every object closed, null for a default.
    """
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ToolSchemaError(tool, "it yields. Return the whole result; report what comes before by ctx.emit().")
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise ToolSchemaError(tool, f"a tool is made from a function, not from {function!r}. Write a def around it.")
    if function.__name__ == "<lambda>":
        raise ToolSchemaError(tool, "a lambda has neither a name nor type hints. Write a def.")

    hints: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    injected_name: str | None = None
    for name, parameter in _signature(function, tool).parameters.items():
        _refuse_kind(tool, parameter)
        hint = _resolve(function, tool, parameter, injected, scope)
        if injected is not None and _is_injected(hint, injected):
            if injected_name is not None:
                raise ToolSchemaError(tool, f"{injected_name!r} is the {injected.__name__} already. Drop one.", name)
            injected_name = name
            continue
        _refuse_alias(tool, name, hint, parameter.default)
        hints[name] = hint
        defaults[name] = ... if parameter.default is parameter.empty else parameter.default

    description, described = read_docstring(function)
    for name in described.keys() - hints.keys() - {injected_name}:
        logger.warning("Tool %r describes %r, which is none of its parameters", tool, name)

    model, schema = _build(function, tool, hints, defaults)
    for name, text in described.items():
        if name in hints and text:
            schema["properties"][name].setdefault("description", text)
    schema = _plain(schema)
    if strict:
        closed = Strict(tool, schema)
        return Arguments(closed.schema, description, injected_name, tuple(hints), model, closed)
    return Arguments(schema, description, injected_name, tuple(hints), model)


def jsonable(value: Any) -> Any:
    """Return the value as JSON knows it, and as Postgres can store it. Raises TypeError when that cannot be.

    Models and dataclasses become objects, dates and Decimals strings. So do NaN, the infinities and integers beyond 64
    bits, and a NUL character becomes U+FFFD: neither `jsonb` nor orjson knows all of them, and a result that was paid
    for must not be lost to it. The model reads the text of the TypeError, so that carries nothing of a foreign exception.
    """
    try:
        text = to_json(value, inf_nan_mode="strings")
    except (PydanticSerializationError, ValueError) as error:
        raise _unwritable(value, own_words(error)) from error
    try:
        result = from_json(text)
    except ValueError as error:  # nested too deep, or a number of thousands of digits
        raise _unwritable(value, str(error)) from error
    return _storable(result) if b"\\u0000" in text or _MANY_DIGITS.search(text) else result


_MANY_DIGITS = re.compile(rb"[0-9]{19}")  # as many as the smallest integer beyond 64 bits has

# What pydantic-core says by itself. All else is the text of an exception that a serializer of the user's raised.
_OF_PYDANTIC = re.compile(
    r"(?:Error serializing to JSON: )?(?:\w+: )?"
    r"(Unable to serialize unknown type: <class '[\w.<>]+'>|Circular reference detected \(id repeated\)"
    r"|Maximum serialization depth exceeded|in(?:valid|complete) utf-8 (?:byte )?sequence[ \w]*"
    r"|'utf-8' codec can't encode characters? [\\'\w ]*in position [\d-]+: surrogates not allowed)"
)


def storable_text(text: str) -> str:
    """Return the text without what neither UTF-8 nor `jsonb` can hold: a file's name may have it, and must not fail a call."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def own_words(error: Exception) -> str:
    """Return what pydantic says of a value that cannot be JSON, and of a foreign exception nothing but that there was one."""
    known = _OF_PYDANTIC.fullmatch(str(error))
    return known[1] if known else "a serializer or computed field of its own failed"


def _unwritable(value: Any, reason: str) -> TypeError:
    return TypeError(
        f"{type(value).__name__} cannot be written as JSON: {reason}."
        " Return plain values (str, int, dict, list), a dataclass or a pydantic model."
    )


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, list):
        return [_storable(each) for each in value]
    if isinstance(value, dict):
        return {_storable(key): _storable(each) for key, each in value.items()}
    return value


# --- signature ---


def _signature(function: Callable[..., Any], tool: str) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (NameError, TypeError, ValueError) as error:
        raise ToolSchemaError(tool, f"its signature cannot be read: {error}.") from error


def _refuse_kind(tool: str, parameter: inspect.Parameter) -> None:
    name = parameter.name
    problem = None
    if parameter.kind is parameter.VAR_POSITIONAL:
        problem = f"*{name} has no schema. Take a list, like `{name}: list[str]`."
    elif parameter.kind is parameter.VAR_KEYWORD:
        problem = f"**{name} has no schema. Take a dict, like `{name}: dict[str, str]`."
    elif parameter.kind is parameter.POSITIONAL_ONLY:
        problem = "it is positional-only, but a model gives arguments by name. Drop the `/`."
    elif parameter.annotation is parameter.empty and name in ("self", "cls"):
        problem = "it has no annotation. Make the tool a function outside the class, or decorate the bound method."
    elif parameter.annotation is parameter.empty:
        problem = f"it has no annotation. Annotate it, like `{name}: int`."
    if problem:
        raise ToolSchemaError(tool, problem, name)


def _resolve(
    function: Callable[..., Any],
    tool: str,
    parameter: inspect.Parameter,
    injected: type | None,
    scope: Mapping[str, Any] | None,
) -> Any:
    """Return the parameter's annotation as a type. The return annotation is never evaluated: nothing needs it."""

    def holder() -> None: ...

    holder.__annotations__ = {parameter.name: parameter.annotation}
    known: dict[str, Any] = dict(inspect.unwrap(function).__globals__)
    if injected is not None:
        # Linters move an import that only annotations use under `if TYPE_CHECKING`; this one need not be there.
        known.setdefault(injected.__name__, injected)
    try:
        return get_type_hints(holder, known, dict(scope or {}), include_extras=True)[parameter.name]
    except NameError as error:
        raise ToolSchemaError(
            tool,
            f"the annotation {parameter.annotation!r} names {error.name!r}, which does not exist where the tool is"
            " defined. Import it at the top of the module, not under `if TYPE_CHECKING`.",
            parameter.name,
        ) from error
    except Exception as error:
        raise ToolSchemaError(
            tool, f"the annotation {parameter.annotation!r} cannot be read: {error}.", parameter.name
        ) from error


def _is_injected(hint: Any, injected: type) -> bool:
    """Return True for the type itself, `Annotated[T, ...]` and `T | None`."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return hint is injected or (get_origin(hint) in (Union, UnionType) and injected in get_args(hint))


def _refuse_alias(tool: str, name: str, hint: Any, default: Any) -> None:
    for each in (default, *(get_args(hint)[1:] if get_origin(hint) is Annotated else ())):
        if isinstance(each, FieldInfo) and (each.alias or each.validation_alias):
            raise ToolSchemaError(tool, "an alias has no use here. Name the parameter as the model shall see it.", name)


# --- schema ---


class _Schema(GenerateJsonSchema):
    # A default that is not JSON (a sentinel, say) is the function's own business: the schema just does not show it.
    ignored_warning_kinds: set[JsonSchemaWarningKind] = {"skipped-choice", "non-serializable-default"}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _build(
    function: Callable[..., Any], tool: str, hints: dict[str, Any], defaults: dict[str, Any]
) -> tuple[type[BaseModel], dict[str, Any]]:
    # The fields have names of their own and the parameters' names as aliases: `schema`, `copy`, `_x` are names
    # that a parameter may have and a pydantic field may not.
    fields: dict[str, Any] = {
        f"parameter_{n}": (Annotated[hint, Field(alias=name)], defaults[name])
        for n, (name, hint) in enumerate(hints.items())
    }
    try:
        model: type[BaseModel] = create_model(
            f"{tool}_arguments",
            __config__=ConfigDict(extra="forbid", allow_inf_nan=False),  # JSON has no NaN, and `jsonb` would refuse it
            __module__=function.__module__,
            **fields,
        )
        return model, model.model_json_schema(schema_generator=_Schema)
    except (PydanticUserError, TypeError, ValueError, NameError) as error:
        for name, hint in hints.items():
            _try_alone(tool, name, hint)
        raise ToolSchemaError(tool, f"its parameters cannot become a JSON schema: {_first_line(error)}") from error


def _try_alone(tool: str, name: str, hint: Any) -> None:
    try:
        TypeAdapter(hint).json_schema(schema_generator=_Schema)
    except (PydanticUserError, TypeError, ValueError, NameError) as error:
        raise ToolSchemaError(
            tool,
            f"{_shown(hint)} has no JSON schema. Take what a model can write (a str, an int, an id to look up), a"
            f" dataclass or a pydantic model. Pydantic says: {_first_line(error)}",
            name,
        ) from error


def _plain(schema: Any, *, names: bool = False) -> Any:
    """Return the schema without titles. `names`: this object's keys are the user's names, not words of JSON schema."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, value in schema.items():
        if names:
            result[key] = _plain(value)
        elif key in ("properties", "$defs", "patternProperties", "dependentSchemas"):
            result[key] = _plain(value, names=True)
        elif key in ("default", "const", "enum", "examples"):
            result[key] = value
        elif key != "title":
            result[key] = _plain(value)
    return result


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _path(where: tuple[int | str, ...]) -> str:
    path = ""
    for each in where:
        path += f"[{each}]" if isinstance(each, int) else f".{each}"
    return path.removeprefix(".")


def _quote(value: Any) -> str:
    try:
        text = to_json(value).decode()
    except ValueError:
        text = repr(value)
    return text if len(text) <= MOST_SHOWN_OF_AN_INPUT else f"{text[:MOST_SHOWN_OF_AN_INPUT]}..."


# --- docstring ---

_STYLES = {
    "sphinx": r"^[ \t]*:(param|parameter|arg|argument|key|keyword|returns?|raises?)\b[^:\n]*:",
    "numpy": r"^[ \t]*(other parameters|parameters|returns|raises)[ \t]*\n[ \t]*-{3,}",
    "google": r"^[ \t]*((keyword |other )?(args|arguments|params|parameters)|returns|raises):[ \t]*$",
}


def read_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return what the docstring says of the function, and of each parameter by name.

    Google, NumPy and Sphinx style. What it says of the result stays with the function, what it says of errors goes.
    """
    text = inspect.getdoc(function) or ""
    style = next(
        (style for style, pattern in _STYLES.items() if re.search(pattern, text, re.MULTILINE | re.IGNORECASE)), None
    )
    if style is None:
        return text, {}

    import griffe  # here: it takes 0.1 s, and only tools with such a section need it

    # Detected here and not by griffe: its patterns miss a section in the first or the last line.
    docstring = griffe.Docstring(text)
    match style:
        case "sphinx":
            sections = griffe.parse_sphinx(docstring, warnings=False)
        case "numpy":
            sections = griffe.parse_numpy(docstring, warnings=False)
        case _:
            sections = griffe.parse_google(docstring, warnings=False)
    paragraphs: list[str] = []
    described: dict[str, str] = {}
    for section in sections:
        match section.kind.value:
            case "text":
                paragraphs.append(section.value.strip())
            case "admonition":
                paragraphs.append(f"{section.title}: {section.value.description.strip()}")
            case "parameters" | "other parameters":
                for each in section.value:
                    described[each.name.lstrip("*")] = " ".join(each.description.split())
            case "returns":
                returned = " ".join(" ".join(each.description.split()) for each in section.value).strip()
                if returned:
                    paragraphs.append(f"Returns: {returned}")
    return "\n\n".join(filter(None, paragraphs)), described
