"""Who was let in, and whether they would be let in again. No request is kept for it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.contrib.auth import get_user
from django.db.models import Model
from django.http import HttpRequest
from rest_framework.authentication import SessionAuthentication
from rest_framework.request import Request

from runs.access import visible
from threads.authentication import holds
from threads.models import ApiKey


@dataclass(frozen=True, slots=True)
class Visitor:
    """One user by one credential."""

    user: Any  # the class and key of a row, or what the host takes for a user
    key: UUID | None
    session: tuple[type[Any], str] | None

    @classmethod
    def of(cls, request: Request) -> Visitor:
        """Return who sent a request that was let in."""
        user: Any = request.user
        # Of a session it is a lazy object, whose type is not its class.
        told = (user.__class__, user.pk) if isinstance(user, Model) else user
        session: Any = getattr(request, "session", None)
        by_session = isinstance(request.successful_authenticator, SessionAuthentication)
        return cls(
            user=told,
            key=request.auth.pk if isinstance(request.auth, ApiKey) else None,
            session=(type(session), session.session_key) if by_session else None,
        )

    @property
    def owner(self) -> Hashable:
        """Equal for all streams of one user, by whatever credential."""
        return self.user if isinstance(self.user, tuple) else (type(self.user), str(getattr(self.user, "pk", None)))

    @property
    def same(self) -> Hashable:
        """Equal for two streams of one user by one credential, which can be asked about together."""
        # What the host takes for a user need not be hashable.
        return (self.user if isinstance(self.user, tuple) else id(self.user), self.key, self.session)

    def sees(self, rows: Mapping[type[Model], Iterable[UUID]]) -> set[UUID]:
        """Return those of the rows (runs, threads) that the gate would let them see now, as key, user and rows are."""
        if self.key is not None and not holds(ApiKey(pk=self.key)):
            return set()
        if self.session is not None and not _signed_in(*self.session):
            return set()
        user = self.user
        if isinstance(user, tuple):  # not as it was read: it remembers its permissions
            user = user[0]._default_manager.filter(pk=user[1]).first()
        # What the host takes for a user may know nothing of it.
        if user is None or not getattr(user, "is_active", True):
            return set()
        return {
            id for model, ids in rows.items()
            for id in visible(model, user).filter(pk__in=list(ids)).values_list("pk", flat=True)
        }  # fmt: skip


def _signed_in(kind: type[Any], key: str) -> bool:
    """Return whether the session is one still: no logout, no other password since."""
    again = HttpRequest()
    again.session = kind(key)
    return get_user(again).is_authenticated
