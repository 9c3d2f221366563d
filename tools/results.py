"""What a tool returned, as its call keeps it: JSON that the model reads and, apart from it, what is too large and what is a file.

    keep({"rows": 12, "report": File("report.csv", "text/csv", data)}, call_id)
    Kept(result={"rows": 12, "report": {"type": "file", "number": 1, "name": "report.csv", ...}}, stored=[...], contents=[data])

`result` goes into the call's row, its events and the model's context, so it is never longer than `MAX_RESULT_CHARS`. What
stands apart is a row a content (`tools.models.StoredContent`): number 0 is the whole result, or the file that is all of it;
files within a result count from 1. Nothing above `MAX_RESULT_BYTES` is kept, nor what JSON or Postgres do not know: that is
refused before it is written out, so that a worker's memory is bounded by what the tool itself has made.
"""

from __future__ import annotations

import mimetypes
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from types import GeneratorType
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError, core_schema, from_json, to_json

from tools.schema import own_words, storable_text

if TYPE_CHECKING:
    from tools.models import ToolCall

DEFAULTS = {"MAX_RESULT_CHARS": 20_000, "MAX_RESULT_BYTES": 10_000_000}
LEAST = {"MAX_RESULT_CHARS": 1_000, "MAX_RESULT_BYTES": 1_000}

DEEPEST = 190  # levels: pydantic reads 200 and orjson writes 254, and an answer over HTTP wraps it in some
LONGEST_NAME = 200  # characters of a file's name
JSON, TEXT, ANYTHING = "application/json", "text/plain; charset=utf-8", "application/octet-stream"

UNSHOWN = "Not shown here. It is kept apart, for people and programs."

_TYPE = re.compile(r"[\w.+-]{1,60}/[\w.+-]{1,90}(?:; ?charset=[\w-]{1,30})?", re.ASCII)
_SUSPECT = re.compile(rb"NaN|Infinity|\\u0000|[0-9]{19}")
_OF_TEXT = re.compile(r"text/|application/(?:json|xml|yaml|x-yaml|toml|javascript|sql)\b|.*\+(?:json|xml)\b")


class File:
    """A file or an image that a tool returns, alone or anywhere within its result.

        return File("chart.png", "image/png", png)
        return {"total": 12, "report": File("report.csv", data=text)}  # a str becomes UTF-8

    Without a content type it goes by the name's ending. Raises TypeError when `data` is neither bytes nor text.
    """

    __slots__ = ("content_type", "data", "name")

    def __init__(
        self, name: str, content_type: str | None = None, data: bytes | bytearray | memoryview | str = b""
    ) -> None:
        if not isinstance(data, bytes | bytearray | memoryview | str):
            raise TypeError(f"The data of a file are bytes or text, not {type(data).__name__}.")
        plain = re.split(r"[/\\]", storable_text(str(name)))[-1]
        self.name = "".join(each for each in plain if each.isprintable()).strip()[:LONGEST_NAME] or "file"
        given = content_type or mimetypes.guess_type(self.name)[0] or (TEXT if isinstance(data, str) else ANYTHING)
        self.content_type = given if _TYPE.fullmatch(given) else ANYTHING
        self.data = data.encode("utf-8", "replace") if isinstance(data, str) else bytes(data)

    def __repr__(self) -> str:
        return f"File({self.name!r}, {self.content_type!r}, {len(self.data)} bytes)"

    @property
    def text(self) -> str | None:
        """What it says, if it is a text by its content type and by its bytes; else None."""
        if not _OF_TEXT.match(self.content_type):
            return None
        try:
            return self.data.decode().replace("\0", "\ufffd")
        except UnicodeDecodeError:
            return None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return core_schema.is_instance_schema(cls)  # so that a result's model may have one as a field


@dataclass(frozen=True, slots=True)
class Limits:
    chars: int  # of a result, as the model reads it
    bytes: int  # of a result with its files


@dataclass(frozen=True, slots=True)
class Kept:
    """`stored` describes the contents, in their order: `{"number", "name", "content_type", "size"}`. None: nothing stands apart."""

    result: Any
    stored: list[dict[str, Any]] | None = None
    contents: Sequence[bytes] = field(default=(), repr=False)


class Unkept(TypeError):
    """This result cannot be kept."""


@cache
def limits() -> Limits:
    """Return what `LONGHAUL` says of results. Cached until Django tells that it was changed (in tests)."""
    from django.conf import settings  # here: the module of an agent is read before Django's apps are ready
    from django.core.signals import setting_changed

    setting_changed.connect(_forget, dispatch_uid="longhaul.tools.results")
    given = getattr(settings, "LONGHAUL", None)
    given = given if isinstance(given, Mapping) else {}

    def read(key: str) -> int:
        value = given.get(key)
        return value if type(value) is int and value >= LEAST[key] else DEFAULTS[key]

    return Limits(chars=read("MAX_RESULT_CHARS"), bytes=read("MAX_RESULT_BYTES"))


def _forget(*, setting: str, **_: object) -> None:
    if setting == "LONGHAUL":
        limits.cache_clear()


def keep(value: Any, call_id: UUID | str | None = None) -> Kept:
    """Return what a call keeps of a result. Raises Unkept, whose text the model reads: nothing of a foreign exception is in it.

    Models and dataclasses become objects; dates, Decimals, UUIDs strings; bytes that are UTF-8 text. NaN, infinities, NUL
    characters, halves of surrogate pairs, integers beyond 64 bits, other bytes and what nests too deep are refused, with
    their place.
    """
    if value is None or value is True or value is False:
        return Kept(value)
    most = limits()
    _Weight(most.bytes).of(value, 0)
    files: list[File] = []

    def written(unknown: Any) -> Any:
        if isinstance(unknown, File):
            files.append(unknown)
            return _reference(unknown, 0 if unknown is value else len(files))
        raise PydanticSerializationError(f"Unable to serialize unknown type: {type(unknown)}")

    try:
        text = to_json(value, inf_nan_mode="constants", fallback=written)
    except (PydanticSerializationError, ValueError) as error:
        raise _unkept(value, own_words(error)) from error
    size = len(text) + sum(len(each.data) for each in files)
    if size > most.bytes:
        raise _too_large(most.bytes, f"it is {size:,} bytes")
    try:
        result = from_json(text)
    except ValueError as error:  # a number of thousands of digits
        raise _unkept(value, str(error)) from error
    if _SUSPECT.search(text):
        _refuse_within(value, result)
    if len(text) <= most.chars and not files:  # bytes are never fewer than characters
        return Kept(result)
    return _apart(value, result, text, files, most, call_id)


def _apart(value: Any, result: Any, text: bytes, files: list[File], most: Limits, call_id: UUID | str | None) -> Kept:
    alone = value is files[0] if files else False
    described = [_described(each, 0 if alone else number) for number, each in enumerate(files, 1)]
    contents = [each.data for each in files]
    shown = result if isinstance(result, str) else text.decode()
    if len(shown) > most.chars and not alone:
        whole = File("result.txt", TEXT, result) if isinstance(result, str) else File("result.json", JSON, text)
        described.insert(0, _described(whole, 0))
        contents.insert(0, whole.data)
        return Kept(cut(shown, most.chars, _where(call_id, 0)), described, contents)
    if not files:
        return Kept(result)
    left = most.chars - len(shown)
    for each, told in zip(files, described, strict=True):
        said, reference = each.text, _reference(each, told["number"])
        if said is not None and left > 0:
            excerpt = cut(said, left, _where(call_id, told["number"]))
            _add(result, reference, "text", excerpt)
            left -= len(excerpt)
        else:
            _add(result, reference, "note", UNSHOWN)
    return Kept(result, described, contents)


def cut(text: str, most: int, where: str = "") -> str:
    """Return the text, or its first `most` characters with a note that says how much is missing, and where the whole is."""
    if len(text) <= most:
        return text
    note = f"[Cut: this is the first {most:,} of {len(text):,} characters; {len(text) - most:,} are missing.{where}]"
    return f"{text[:most]}\n\n{note}"


def _where(call_id: UUID | str | None, number: int) -> str:
    path = f"/api/tool-calls/{call_id or '{id}'}/content" + (f"/{number}" if number else "")
    return f" The whole is kept apart, for people and programs: GET {path}"


def _described(file: File, number: int) -> dict[str, Any]:
    return {"number": number, "name": file.name, "content_type": file.content_type, "size": len(file.data)}


def _reference(file: File, number: int) -> dict[str, Any]:
    """Return what stands in a result in the place of a file."""
    return {"type": "file", **_described(file, number)}


def _add(result: Any, reference: dict[str, Any], word: str, text: str) -> None:
    """Put beside the reference of a file what the model reads of it."""
    left = [result]
    while left:
        each = left.pop()
        if each == reference:
            each[word] = text
            return
        if isinstance(each, dict):
            left.extend(each.values())
        elif isinstance(each, list):
            left.extend(each)


def content(call: ToolCall, number: int = 0) -> File:
    """Return a content of a call's result, whole. Raises LookupError when there is none of that number."""
    from tools.models import Outcome, StoredContent

    row = StoredContent.objects.filter(call_id=call.pk, number=number).first()
    if row is not None:
        return File(row.name, row.content_type, bytes(row.content))
    if number or call.outcome != Outcome.SUCCESS or (call.stored and call.stored[0]["number"] == 0):
        raise LookupError(f"Call {call.pk} has no content {number}.")
    if isinstance(call.result, str):
        return File("result.txt", TEXT, call.result)
    return File("result.json", JSON, to_json(call.result))


# --- what is refused


class _Weight:
    """Counts what a value would be written as, roughly and from below, and stops at the limit.

    A few lines of code can hold in little memory what is written as terabytes: one long text a million times.
    """

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def of(self, value: Any, depth: int) -> None:
        if isinstance(value, str | bytes | bytearray):
            self.take(len(value))
        elif isinstance(value, File):
            self.take(len(value.data))
        elif isinstance(value, int):
            self.take(value.bit_length() // 4)
        elif depth > DEEPEST:
            raise Unkept(f"it is nested more than {DEEPEST} levels deep, or holds itself.")
        elif isinstance(value, Mapping):
            self.take(2 * len(value))
            for key, each in value.items():
                self.of(key, depth + 1)
                self.of(each, depth + 1)
        elif isinstance(value, list | tuple | set | frozenset | deque):
            self.take(2 * len(value))
            for each in value:
                self.of(each, depth + 1)
        elif isinstance(value, GeneratorType):
            raise Unkept("it is a generator, which has no end that can be seen. Return a list.")
        elif isinstance(value, BaseModel):
            self.of(value.__dict__, depth + 1)
        elif is_dataclass(value) and not isinstance(value, type):
            self.take(2 * len(fields(value)))
            for each in fields(value):
                self.of(getattr(value, each.name, None), depth + 1)

    def take(self, many: int) -> None:
        self.left -= many
        if self.left < 0:
            raise _too_large(self.most, "it is more")


def _refuse_within(value: Any, result: Any) -> None:
    """Raise Unkept, with its place, for what `jsonb` or those who read it do not know."""
    left: list[tuple[str, Any]] = [("", result)]
    while left:
        place, each = left.pop()
        problem = None
        if isinstance(each, str):
            problem = "a text with a NUL character" if "\0" in each else None
        elif isinstance(each, float):
            problem = None if each - each == 0 else f"{each}, which is no number in JSON"
        elif isinstance(each, int):
            problem = None if -(2**63) <= each < 2**64 else "an integer of more than 64 bits; return it as text"
        elif isinstance(each, list):
            left.extend((f"{place}[{number}]", inner) for number, inner in enumerate(each))
        elif isinstance(each, dict):
            if any("\0" in key for key in each):
                problem = "a key with a NUL character"
            left.extend((f"{place}.{key}" if place else key, inner) for key, inner in each.items())
        if problem:
            raise _unkept(value, f"{place or 'it'} is {problem}"[:500])


def _too_large(most: int, how: str) -> Unkept:
    return Unkept(
        f"it is too large: at most {most:,} bytes are kept of a result with its files, and {how}. Return less."
    )


def _unkept(value: Any, reason: str) -> Unkept:
    hint = "Return plain values (str, int, dict, list), a dataclass or a pydantic model."
    if "utf-8" in reason and "surrogates" not in reason:
        hint = "Return bytes as a tools.File(name, content_type, data)."
    return Unkept(f"{type(value).__name__} cannot be written as JSON: {reason}. {hint}")
