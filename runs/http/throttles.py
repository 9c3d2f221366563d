"""How many requests a key (or a signed-in user, or an address) may make: `LONGHAUL["API_RATE"]`, `"600/min"`.

Counted by windows in the host's default cache, with its atomic increment. A cache that is away lets everybody in: nobody
should lose the API because a counter is lost.
"""

from __future__ import annotations

import logging
import re
import time
from datetime import timedelta
from typing import Any

from django.core.cache import cache
from rest_framework.request import Request
from rest_framework.throttling import BaseThrottle

from runs.conf import settings
from threads.models import ApiKey

logger = logging.getLogger("longhaul.http")

PERIODS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "hour": 3600, "d": 86_400, "day": 86_400}


def parse_rate(rate: str) -> tuple[int, timedelta]:
    """Read `"600/min"`, `"10/s"`. Raises ValueError."""
    found = re.fullmatch(r"(\d+)/([a-z]+)", rate)
    if found is None or found[2] not in PERIODS or not int(found[1]):
        raise ValueError(f"A rate is a number a period, like '600/min'; it is {rate!r}.")
    return int(found[1]), timedelta(seconds=PERIODS[found[2]])


class Rate(BaseThrottle):
    """One window's count a client."""

    def allow_request(self, request: Request, view: Any) -> bool:
        rate = settings().api_rate
        if rate is None:
            return True
        most, period = parse_rate(rate)
        seconds = int(period.total_seconds())
        window, into = divmod(time.time(), seconds)
        self._left = seconds - into
        name = f"longhaul.rate.{self._client(request)}.{int(window)}"
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
        if request.user.is_authenticated:
            return f"user.{request.user.pk}"
        return f"address.{self.get_ident(request)}"

    def wait(self) -> float:
        return self._left
