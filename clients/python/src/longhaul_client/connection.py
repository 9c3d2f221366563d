"""What both clients share about their connection: where it leads, who it says it is, how patient it is."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2

from longhaul_client import errors
from longhaul_client.backoff import RETRIED, Backoff, retry_after
from longhaul_client.calls import Call
from longhaul_client.errors import ConnectionLost, LonghaulError
from longhaul_client.following import STALL_SECONDS, Ask

Answer = TypeVar("Answer")
# What becomes of a connection. A body that cannot be unpacked was cut, too.
LOST = (httpx2.TransportError, httpx2.DecodingError)
PATIENT_SECONDS = 60.0  # a call whose server asks for more is told so: it may ask again itself
UNBOUNDED = httpx2.Limits(max_connections=None, max_keepalive_connections=20)  # a stream is a connection


class Bearer(httpx2.Auth):
    """Says the key, and says it to the server alone: it stands in no repr and in no local variable."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "<Bearer>"

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._key}"
        yield request


@dataclass(frozen=True, slots=True)
class Settings:
    """How a client asks. `timeout` is in seconds, of a connection and of an answer's beginning; `retries` are of one call."""

    base_url: httpx2.URL
    auth: Bearer | None
    timeout: float
    stall: float
    retries: int
    give_up_after: float | None
    backoff: Backoff
    headers: Mapping[str, str] = field(repr=False)

    @classmethod
    def of(
        cls,
        base_url: str | None,
        api_key: str | None,
        *,
        timeout: float,
        stall: float = STALL_SECONDS,
        retries: int,
        give_up_after: float | None,
        backoff: Backoff | None,
        headers: Mapping[str, str] | None,
    ) -> Settings:
        base_url = base_url or os.environ.get("LONGHAUL_URL")
        if not base_url:
            raise LonghaulError("Say where the server is: base_url, or LONGHAUL_URL in the environment.")
        url = httpx2.URL(base_url.rstrip("/"))
        if url.scheme not in ("http", "https"):
            raise LonghaulError("base_url begins with https:// or http://.")
        # A file that a key was read from may end with a newline. httpx2 would quote what no header may have.
        key = (api_key if api_key is not None else os.environ.get("LONGHAUL_API_KEY") or "").strip()
        if not (key.isascii() and key.isprintable()):
            raise LonghaulError("The key has characters that no key has.")
        auth = Bearer(key) if key else None
        return cls(url, auth, timeout, stall, retries, give_up_after, backoff or Backoff(), dict(headers or {}))

    def __repr__(self) -> str:
        return f"<Settings {self.base_url!r}>"

    @property
    def where(self) -> str:
        """The address, without what it may say about who asks."""
        return str(self.base_url.copy_with(userinfo=b""))

    def _url(self, path: str) -> httpx2.URL:
        base = self.base_url
        return base.copy_with(raw_path=base.raw_path.rstrip(b"/") + path.encode("ascii"))

    def request(self, http: httpx2.Client | httpx2.AsyncClient, call: Call[Any]) -> httpx2.Request:
        bounds = httpx2.Timeout(self.timeout, read=self.timeout + call.waits)
        return http.build_request(
            call.method, self._url(call.path), params=call.params, content=call.content,
            headers={**self.headers, **call.headers}, timeout=bounds,
        )  # fmt: skip

    def stream(self, http: httpx2.Client | httpx2.AsyncClient, ask: Ask) -> httpx2.Request:
        bounds = httpx2.Timeout(self.timeout, read=self.stall)
        return http.build_request(
            ask.method, self._url(ask.path), params=ask.params, content=ask.content,
            headers={**self.headers, **ask.headers}, timeout=bounds,
        )  # fmt: skip

    @property
    def credentials(self) -> Any:
        """What a request is signed with; without a key, as the caller's own httpx2 client does it."""
        return self.auth if self.auth is not None else httpx2.USE_CLIENT_DEFAULT


class Tries:
    """One call over as many requests as it takes."""

    def __init__(self, call: Call[Answer], settings: Settings) -> None:
        self._call, self._settings = call, settings
        self._failures = 0

    def answered(self, response: httpx2.Response) -> float | None:
        """Return the seconds to wait before the same again, or None when the answer counts. Raises ApiError."""
        status = response.status_code
        if 200 <= status < 300:
            return None
        if status == 404 and self._call.method == "DELETE" and self._failures:
            return None  # the first time it was there
        error = errors.refusal(status, response.content, self._call.asked)
        unlucky = self._call.own_key and error.code == "idempotency_conflict"  # the first one failed a moment ago
        asked = retry_after(response.headers)
        again = self._call.again and self._failures < self._settings.retries and asked <= PATIENT_SECONDS
        if not again or not (status in RETRIED or unlucky):
            raise error
        self._failures += 1
        return self._settings.backoff.delay(self._failures, asked)

    def lost(self, error: Exception) -> float:
        """Return the seconds to wait before the same again. Raises ConnectionLost."""
        if not self._call.again or self._failures >= self._settings.retries:
            raise ConnectionLost(f"{self._call.asked} was not answered: {type(error).__name__}") from error
        self._failures += 1
        return self._settings.backoff.delay(self._failures)


def read(call: Call[Answer], response: httpx2.Response) -> Answer:
    """Return what the answer says. Raises ApiError for what is no answer of ours: a page of something in between."""
    if response.status_code in (204, 404):
        return call.read(None)
    try:
        return call.read(response.json())
    except (ValueError, LookupError, TypeError) as error:
        told = {"code": "not_an_answer", "detail": f"The answer is not Longhaul's ({type(error).__name__})."}
        raise errors.ApiError(response.status_code, [told], call.asked) from error
