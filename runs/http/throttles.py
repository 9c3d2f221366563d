"""How many requests a key (or a signed-in user, or an address) may make: `LONGHAUL["API_RATE"]`, `"600/min"`.

`LONGHAUL["START_RATE"]` bounds those that create something, beside it. Counted by windows in the host's default cache, with
its atomic increment: a cache in the process's memory counts for each process by itself. A cache that is away lets everybody
in: nobody should lose the API because a counter is lost.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from django.core.cache import cache
from rest_framework.request import Request
from rest_framework.throttling import BaseThrottle

from runs.conf import settings
from threads.authentication import signed_in
from threads.models import ApiKey

if TYPE_CHECKING:
    from runs.http.view import View

logger = logging.getLogger("longhaul.http")

PERIODS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}  # seconds


def parse_rate(rate: str) -> tuple[int, timedelta]:
    """Read `"600/min"`, `"10/s"`. Raises ValueError."""
    found = re.fullmatch(r"([1-9]\d*)/(\w+)", rate)
    if found is None or found[2] not in PERIODS:
        raise ValueError(f"A rate is a number a period, like '600/min'; it is {rate!r}.")
    return int(found[1]), timedelta(seconds=PERIODS[found[2]])


class Rate(BaseThrottle):
    """One window's count of a client's requests."""

    scope = "api"
    _left = 1.0  # seconds of the window

    def rate(self, request: Request, view: View) -> str | None:
        """Return the rate that bounds this request, or None."""
        return settings().api_rate

    def allow_request(self, request: Request, view: Any) -> bool:
        rate = self.rate(request, view)
        if rate is None:
            return True
        most, period = parse_rate(rate)
        seconds = int(period.total_seconds())
        window, into = divmod(time.time(), seconds)
        self._left = seconds - into
        name = f"longhaul.rate.{self.scope}.{self._client(request)}.{int(window)}"
        try:
            cache.add(name, 0, timeout=seconds + 1)
            return bool(cache.incr(name) <= most)
        except ValueError:
            return True  # it expired between the two
        except Exception as error:  # each cache backend raises its own
            logger.warning("Requests are not counted, the cache is away: %s", type(error).__name__)
            return True

    def _client(self, request: Request) -> str:
        if isinstance(request.auth, ApiKey):
            return f"key.{request.auth.pk}"
        if signed_in(request):
            return f"user.{request.user.pk}"
        # Digested, for a header may say where it comes from, in more characters than a cache takes for a name.
        return f"address.{hashlib.sha256(str(self.get_ident(request)).encode()).hexdigest()}"

    def wait(self) -> float:
        return self._left


class StartRate(Rate):
    """One window's count of a client's requests that create something: threads, messages, runs."""

    scope = "start"

    def rate(self, request: Request, view: View) -> str | None:
        said = view.operation(request)
        return settings().start_rate if said is not None and said.creates else None
