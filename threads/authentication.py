"""Keys of the HTTP API: `Authorization: Bearer lh_...`.

A key is 32 random bytes, so its SHA-256 is enough to keep it by; a slow hash guards what people think up.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.contrib.auth.models import AbstractBaseUser
from django.db import transaction
from django.db.models import DateTimeField, ExpressionWrapper, Q
from django.views.decorators.debug import sensitive_variables
from rest_framework.authentication import BaseAuthentication, get_authorization_header
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.request import Request

from threads.clock import Now, now
from threads.models import ApiKey

PREFIX = "lh_"
SHOWN = len(PREFIX) + 6  # characters that stay readable, to tell keys apart
NOTED_EVERY = timedelta(minutes=1)  # last_used_at: a write for each request would cost more than the check
UNNOTED = Q(last_used_at=None) | Q(
    last_used_at__lt=ExpressionWrapper(Now() - NOTED_EVERY, output_field=DateTimeField())
)


@sensitive_variables("key")
def create_key(owner: Any, name: str = "", *, lasts: timedelta | None = None) -> tuple[ApiKey, str]:
    """Make a key. Returns its row and the key itself, which is nowhere else and cannot be shown again."""
    key = PREFIX + secrets.token_urlsafe(32)
    row = ApiKey.objects.create(
        owner=owner,
        name=name,
        prefix=key[:SHOWN],
        digest=digest(key),
        expires_at=None if lasts is None else now() + lasts,
    )
    return row, key


def revoke(key: ApiKey) -> bool:
    """Revoke a key for good. Returns False when it was revoked already."""
    return bool(ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=Now()))


def holds(key: ApiKey) -> bool:
    """Return whether a key that was taken would be taken still: neither revoked nor expired since."""
    return key.pk in holding([key.pk])


def holding(keys: Iterable[UUID]) -> set[UUID]:
    """Return those of the keys that would be taken still."""
    lasts = Q(expires_at=None) | Q(expires_at__gt=Now())
    return set(ApiKey.objects.filter(lasts, pk__in=list(keys), revoked_at=None).values_list("pk", flat=True))


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeyAuthentication(BaseAuthentication):
    """Says whose key a request carries. A bearer token that is not ours is left to the host's own classes."""

    @sensitive_variables("token")  # a report of an error shows what the frames hold
    def authenticate(self, request: Request) -> tuple[AbstractBaseUser, ApiKey] | None:
        scheme, _, token = get_authorization_header(request).decode("latin-1").strip().partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token.startswith(PREFIX):
            return None
        key = self._key(token)
        return key.owner, key

    def _key(self, token: str) -> ApiKey:
        # Every request asks this. The times are compared here, and nothing is sorted: half of the cost was to make the SQL.
        found = ApiKey.objects.filter(digest=digest(token)).select_related("owner").annotate(at=Now())
        key = next(iter(found.order_by()[:1]), None)
        if key is None:
            raise AuthenticationFailed("There is no such key.")
        if key.revoked_at is not None:
            raise AuthenticationFailed("This key was revoked.", code="key_revoked")
        if key.expires_at is not None and key.expires_at <= key.at:
            raise AuthenticationFailed("This key has expired. Make a new one: manage.py create_api_key.", "key_expired")
        if not key.owner.is_active:
            raise AuthenticationFailed("The owner of this key is not active.", code="inactive")
        if key.last_used_at is None or key.last_used_at < key.at - NOTED_EVERY:
            # Not behind a request that notes it too: with ATOMIC_REQUESTS that one holds the row to its end.
            free = ApiKey.objects.select_for_update(skip_locked=True).filter(UNNOTED, pk=key.pk)
            with transaction.atomic():  # one statement, but Django takes no lock without
                ApiKey.objects.filter(pk__in=free.values("pk")).update(last_used_at=Now())
        return key

    def authenticate_header(self, request: Request) -> str:
        return 'Bearer realm="longhaul"'


def signed_in(request: Request) -> bool:
    """Return whether the request is somebody's. DRF can be told to have no user at all in place of an anonymous one."""
    return bool(getattr(request.user, "is_authenticated", False))
