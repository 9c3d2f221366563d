"""Text without secrets: for logs, for reports of errors, and for the errors that runs and calls keep in their rows.

Two ways of knowing a secret. Values: what the settings and the environment hold under a name that says so, passwords in
their URLs, and what `hide` was told; but none that is a word of many lines, as "postgres". Forms: keys and tokens of known
looks, passwords in URLs, `password=...`, and the rows that Postgres quotes in its errors. What has neither, as a customer's
secret in a tool's own exception, is not known and stays: call `hide`.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from html import escape
from json import dumps
from typing import Any
from urllib.parse import quote, unquote

from django.conf import settings
from django.core.signals import setting_changed
from django.utils.safestring import SafeString, mark_safe
from django.views.debug import ExceptionReporter

MASK = "[masked]"
SHORTEST = 8  # characters: a shorter password is a word of many lines
# Characters from which a value is masked in the middle of a word too.
SURE = 16
LONG = 20  # characters: a shorter value under a name that may mean something else must look like a key, not like a word

_SECRET_NAME = re.compile(
    r"(?<![A-Z])API(?![A-Z])|AUTH(?!ORS?(?![A-Z]))|TOKEN|(?<!MON)KEY(?!WORD|BOARD)|SECRET|PASS(?:W|P|C|_|$)|SIGNATURE|CREDENTIAL|DSN"
    r"|COOKIE",
    re.I,
)
# Names that say so and hold none: of classes, of files, of numbers.
_PUBLIC_NAME = re.compile(
    r"(?:CLASS(?:ES)?|MODEL|BACKENDS?|VALIDATORS|HASHERS|NAME|PATH|PREFIX|FILE|DIR|RATE|SECONDS|TIMEOUT|AGE|SAMESITE"
    r"|TOKENS|SOCK|TYPES?|ALGORITHM)$|^PASSWORD_RESET",
    re.I,
)
# Names of settings and variables whose values are looked for wherever they stand. Fewer than those of fields that are masked
# in their place: AUTH_MODE=required must not take the word from every line.
_KEPT_NAME = re.compile(
    r"(?:(?<![A-Z])API|AUTH|(?<!MON)KEY|COOKIE|SIGNATURE|DSN)S?_?\d*$|(?:API|ACCESS|PRIVATE|SIGNING|ENCRYPTION)_?KEYS?_"
    r"|TOKEN|SECRET|PASS(?:WORD|WD|PHRASE|CODE)|(?:(?<![A-Z])|DB)PASS(?![A-Z])|CREDENTIAL",
    re.I,
)
_SURE_NAME = re.compile(r"(?:PASS(?:WORD|WD|PHRASE|CODE)?|PWD|SECRET(?:_?KEY)?|TOKEN)S?$", re.I)
_OPEN_NAME = re.compile(
    r"(?:VERSION|REALM|MODE|DOMAIN|CLAIMS?|SCOPES?|HOSTS?|PORT|NAMES?|USER|PATH|URLS?|URI|ENDPOINT|TYPES?|ALGORITHMS?|HEADER|FIELD"
    r"|ISSUER|AUDIENCE|SERIALIZER|VIEW|HANDLER|ENGINE|FORMAT|METHOD|POLICY|PROVIDER|REGION|LENGTH|LIFETIME|EXPIRES?|ENABLED"
    r"|REQUIRED)$",
    re.I,
)
_ITS_USER = re.compile(r"(?:USER|USERNAME|NAME|HOST|DB|DATABASE)$", re.I)
_LIKE_A_KEY = re.compile(r"\d|[a-z].*[A-Z]|[A-Z].*[a-z]", re.S)
_PYTHON_NAME = re.compile(r"[a-z_]{2,}(?:\.[a-z_]{2,}){0,20}\.[A-Za-z_]\w{0,100}")
# Passwords of development, and words of many lines.
_WORDS = frozenset({
    "postgres", "postgresql", "rabbitmq", "longhaul", "password", "passw0rd", "changeme", "database", "development",
    "production", "localhost", "username", "superuser", "administrator", "minioadmin", "required", "disabled", "optional",
})  # fmt: skip
_TEXT_LIMIT = 200_000  # characters that are looked through; what is longer is cut there

# Every repetition is bounded, or fails at once: a log line may be anything, and long.
# A password with a / in it too: http://host:80/path@x has none.
_URL_PASSWORD = re.compile(
    r"([a-z][a-z0-9+.-]{1,20}://[^\s/:@\[\"'<>]{0,200}):((?:[^\s/\"'<>]{1,500}|(?!\d{1,5}/)[^\s@\"'<>]{1,500})(?=@))@",
    re.I,
)
_KNOWN_FORMS = re.compile(
    r"\b(?:"
    r"lh_[A-Za-z0-9_-]{16,}"  # our own
    # Of models and payments: long, with a digit and what no name of a table or an article has.
    r"|[prs]k[-_](?=[\w*.-]{20})(?=[\w*.-]{0,100}\d)(?=[\w*.-]{0,100}(?:[A-Z]|[a-z0-9]{16}|\*{3}))(?=[\w*.-]{0,100}[A-Za-z])"
    r"[A-Za-z0-9_*.-]{20,}"
    r"|gsk_[A-Za-z0-9]{16,}|hf_[A-Za-z0-9]{16,}|AIza[A-Za-z0-9_-]{30,}"
    r"|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|A[KS]IA[A-Z0-9]{16}"
    r"|eyJ[\w-]{10,1000}\.[\w-]{10,4000}\.[\w-]{0,2000}"  # a JWT
    r")"
)
_BEARER = re.compile(
    r"\b(bearer|token)(\s{1,3})(?=\S{0,500}(?:\d|(?-i:[a-z][A-Z])))(?:(?<=bearer.)|(?<=bearer..)|(?<=bearer...)|(?=\S{20}))"
    r"[A-Za-z0-9._~+/*-]{12,}=*",
    re.I | re.S,
)
_BASIC = re.compile(r"\b(basic\s{1,3})([A-Za-z0-9+/]{8,2000}={0,2})", re.I)
_QUOTE = r"(?:\\?[\"']|&quot;|&#(?:x27|39|34);)"
_SAID = re.compile(
    r"((?:api[ _-]?key(?: provided)?|(?:account|access|private|signing|encryption)[_-]?key|secret(?:[_-]?(?:access[_-]?)?key)?"
    r"|passw(?:or)?d|passphrase|pwd|credentials?|signature"
    r"|(?:access|refresh|auth|id|csrf|csrfmiddleware|session)[_-]?token|authorization|sessionid|csrftoken)"
    rf"{_QUOTE}?\s{{0,3}}[:=]\s{{0,3}})"
    # What is quoted is meant to its end, a word to its own.
    rf"(?:(?P<quote>{_QUOTE})(?!\[masked\])(?P<quoted>(?:(?!(?P=quote))(?:\\.|[^\n\\])){{4,500}})(?=(?P=quote))"
    rf"|(?P<open>{_QUOTE}?)(?:(?:bearer|basic|token)\s{{1,3}})?+(?!\[masked\])[^\s\"'\\&,;<>(){{}}\[\]]{{4,}})",
    re.I,
)
_COOKIE = re.compile(
    rf"(\b(?:set-)?cookie{_QUOTE}?\s{{0,3}}[:=]\s{{0,3}}{_QUOTE}?)"
    r"[\w.-]{1,100}=[^\s\"'\\&,;<>]{1,4000}(?:;\s?[\w.-]{1,100}=[^\s\"'\\&,;<>]{0,4000}){0,50}",
    re.I,
)
_PARAMETER = re.compile(r"([?&](?:amp;)?([\w.-]{1,80})=)(?!\[masked\])([^&\s\"'#<>]+)")
# A word of its own in the name, or one of the usual compounds: no author, compass, keyword or monkey.
_PARAMETER_NAME = re.compile(
    r"(?:^|[_.-]|(?-i:(?<=[a-z])(?=[A-Z]))|api|access|account|auth|client|csrf|db|id|private|refresh|secret|security|session|user)"
    r"(?:key|token|secret|pass(?:word|wd|phrase|code)?|pwd|auth|sig|signature|credential)s?(?:$|[_.-]|(?-i:(?=[A-Z])))",
    re.I,
)
_CODE = re.compile(r"(?:^|[_.-])code$", re.I)  # OAuth's is long, and a word
_PRIVATE_KEY = re.compile(r"-----BEGIN ([A-Z ]{0,30}PRIVATE KEY)-----.*?(?:-----END \1-----|\Z)", re.S)
# Postgres quotes rows and values in its errors; they are somebody's words.
_QUOTED_ROW = re.compile(r"^([ \t]{0,20}(?:DETAIL|CONTEXT:  JSON data|QUERY)[:,] {1,3}).+$", re.M)
# What one of the forms must hold: most lines hold none, and cost one look.
_WORTH_A_LOOK = re.compile(
    r"://|lh_|[prs]k[-_]|gsk_|hf_|AIza|gh[oprsu]_|github_pat|glpat|xox|A[KS]IA|eyJ|bearer|basic|token|key|secret|passw|passphr|pwd"
    r"|credential|signature|authorization|cookie|sessionid|[?&](?:amp;)?[\w.-]{0,40}(?:pass|auth|sig|code)",
    re.I,
)

_told: set[str] = set()


def hide(value: str) -> None:
    """Mask this value from now on, in this process: a secret that stands in no setting, as one from a vault."""
    if len(value) >= SHORTEST:
        _told.add(value)
        _values.cache_clear()


def redact(text: str) -> str:
    """Return the text with `[masked]` in the place of each secret that is known by its value or its form. Never raises."""
    try:
        if len(text) > _TEXT_LIMIT:
            text = text[:_TEXT_LIMIT] + "..."
        found = _values(settings.configured)
        if found is not None:
            text = found.sub(MASK, text)
        if "\n" in text:
            text = _QUOTED_ROW.sub(rf"\1{MASK}", text)
        if _WORTH_A_LOOK.search(text) is None:
            return text
        if "PRIVATE KEY-----" in text:
            text = _PRIVATE_KEY.sub(MASK, text)
        if "://" in text:
            text = _URL_PASSWORD.sub(rf"\1:{MASK}@", text)
        if "=" in text:
            text = _PARAMETER.sub(_parameter, text)
        text = _BEARER.sub(rf"\1\2{MASK}", text)
        text = _BASIC.sub(_basic, text)
        text = _COOKIE.sub(rf"\1{MASK}", text)
        text = _KNOWN_FORMS.sub(MASK, text)
        return _SAID.sub(lambda said: f"{said[1]}{said['quote'] or said['open'] or ''}{MASK}", text)
    except Exception:  # what cannot be looked through is not shown
        return MASK


def _parameter(found: re.Match[str]) -> str:
    name = found[2]
    said = _PARAMETER_NAME.search(name) and not _PUBLIC_NAME.search(name)
    return f"{found[1]}{MASK}" if said or (_CODE.search(name) and len(found[3]) >= LONG) else found[0]


def _basic(found: re.Match[str]) -> str:
    """Mask what is a user and a password, and no second word of a name."""
    try:
        decoded = base64.b64decode(found[2], validate=True).decode()
    except ValueError:
        return found[0]
    return f"{found[1]}{MASK}" if ":" in decoded and decoded.isprintable() else found[0]


def redact_within(value: Any) -> Any:
    """Return a JSON value with each text in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redact_within(inner) for key, inner in value.items()}
    return [redact_within(inner) for inner in value] if isinstance(value, list | tuple) else value


def is_secret_name(name: str) -> bool:
    """Return whether a name, of a setting or of a field, says that its value is a secret."""
    return bool(_SECRET_NAME.search(name)) and not _PUBLIC_NAME.search(name)


@cache
def _values(configured: bool) -> re.Pattern[str] | None:
    """Return what finds the secrets that are known by value; None when there are none.

    A server's own lines come before it has loaded Django's settings, and settings may log while they are read: theirs are
    asked for when they are there, and never before.
    """
    known = {*_told, *_of_environment(), *(_of_settings() if configured else ())}
    forms: set[str] = set()
    for value in known:
        forms |= {value, quote(value, safe=""), escape(value), value.encode("unicode_escape").decode()}
        for said in (repr(value)[1:-1], dumps(value)[1:-1], dumps(value, ensure_ascii=False)[1:-1]):
            forms |= {said, said.replace("'", "\\'")}  # the second: within a text that has both kinds of quotes
    sure = [re.escape(form) for form in forms if len(form) >= SURE]
    bounded = [re.escape(form) for form in forms if SHORTEST <= len(form) < SURE]
    # The longest first: of two that begin alike the longer one is meant.
    parts = sorted(sure, key=len, reverse=True)
    if bounded:
        parts.append(rf"(?<!\w)(?:{'|'.join(sorted(bounded, key=len, reverse=True))})(?!\w)")
    return re.compile("|".join(parts)) if parts else None


def _of_environment() -> Iterator[str]:
    yield from _within("", os.environ, 0, meant=False)


def _of_settings() -> Iterator[str]:
    for name in filter(str.isupper, dir(settings)):
        try:
            value = getattr(settings, name)
        except Exception:  # noqa: S112 (a setting that cannot be read holds no secret that could be written)
            continue
        yield from _found(name, value)


def _found(name: str, value: Any, depth: int = 0, *, meant: bool = False) -> Iterator[str]:
    """Yield the secrets of a setting: itself if its name says so, and the passwords of the URLs in it.

    `meant`: what it stands in has a name that says so.
    """
    if isinstance(value, str):
        for before, password in _URL_PASSWORD.findall(value):
            # The name of a user, of a host or of the database is in many lines.
            if password not in re.split(r"[^\w-]+", f"{before} {value.partition(f':{password}@')[2]}"):
                yield from _long_enough(unquote(password))
                yield from _long_enough(password)
        if (meant or _KEPT_NAME.search(name)) and "://" not in value and not _is_public(name, value):
            yield from _long_enough(value)
    elif depth > 5:
        return
    elif isinstance(value, Mapping):
        yield from _within(name, value, depth + 1, meant=meant or _is_kept_name(name))
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _found(name, inner, depth + 1, meant=meant)


def _within(name: str, values: Mapping[Any, Any], depth: int, *, meant: bool) -> Iterator[str]:
    if name.upper().endswith(("SCOPE", "SCOPES")):
        return  # {"read_token": "May read tokens"}
    users = {value for key, value in values.items() if isinstance(value, str) and _ITS_USER.search(str(key))}
    for key, inner in values.items():
        if not (isinstance(inner, str) and inner in users and len(inner) < SURE):
            yield from _found(str(key), inner, depth, meant=meant)


def _is_kept_name(name: str) -> bool:
    return bool(_KEPT_NAME.search(name)) and not _PUBLIC_NAME.search(name) and not _OPEN_NAME.search(name)


def _is_public(name: str, value: str) -> bool:
    """Return whether a setting whose name speaks of a secret holds none: a name of something, a file, a word."""
    if _PUBLIC_NAME.search(name) or _OPEN_NAME.search(name) or _PYTHON_NAME.fullmatch(value):
        return True
    if value.startswith("/") and os.path.exists(value):
        return True
    return len(value) < LONG and not _SURE_NAME.search(name) and not _LIKE_A_KEY.search(value)


def _long_enough(value: str) -> Iterator[str]:
    value = value.strip()
    if len(value) >= SHORTEST and value.lower() not in _WORDS:
        yield value


def _forget(**_: object) -> None:
    _values.cache_clear()


setting_changed.connect(_forget, dispatch_uid="longhaul.threads.redaction")


class Reporter(ExceptionReporter):
    """Django's reports of errors (the page of DEBUG, mails to ADMINS) without secrets.

    Django's own filter goes by the names of settings: a password in DATABASE_URL, or in a local variable, it shows.
    """

    def get_traceback_html(self) -> SafeString:
        return mark_safe(redact_whole(super().get_traceback_html()))  # noqa: S308 (it was safe, and nothing of it grew)

    def get_traceback_text(self) -> SafeString:
        return mark_safe(redact_whole(super().get_traceback_text()))  # noqa: S308


def redact_whole(page: str) -> str:
    """Redact a text of any length, line by line."""
    return "".join(map(redact, _PRIVATE_KEY.sub(MASK, page).splitlines(keepends=True)))
