"""A creating request that is sent again is answered as it was the first time.

The key is a row of the transaction that does the work: either both are there, or neither. Who comes second waits for the first
one's commit at the unique index, and then reads its answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from django.db import IntegrityError, transaction
from rest_framework.request import Request

from runs.http.body import Body
from runs.http.errors import BadField, Conflict
from threads.models import IdempotencyKey

LONGEST = 200


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request made: JSON, and where it stands now."""

    status: int
    data: Any
    headers: dict[str, str] = field(default_factory=dict)


def once(request: Request, body: Body, work: Callable[[], Answer]) -> Answer:
    """Do the work, or return what it answered when this key and body came before. Raises Conflict for another body."""
    key = _key(request)
    if key is None:
        return work()
    fingerprint = body.fingerprint(request.method or "", request.path)
    with transaction.atomic():
        row = IdempotencyKey(owner_id=request.user.pk, key=key, fingerprint=fingerprint)
        try:
            with transaction.atomic():
                row.save(force_insert=True)
        except IntegrityError:
            return _again(row)
        answer = work()
        IdempotencyKey.objects.filter(pk=row.pk).update(
            status=answer.status, answer={"data": answer.data, "headers": answer.headers}
        )
        return answer


def _again(row: IdempotencyKey) -> Answer:
    known = IdempotencyKey.objects.filter(owner_id=row.owner_id, key=row.key).first()
    if known is None or known.answer is None:
        raise Conflict("A request with this Idempotency-Key has just failed. Send it again.", "idempotency_conflict")
    if known.fingerprint != row.fingerprint:
        raise Conflict(
            "This Idempotency-Key was used for another request. Use a new key for a new request.",
            "idempotency_conflict",
        )
    assert known.status is not None
    return Answer(known.status, known.answer["data"], known.answer["headers"])


def _key(request: Request) -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return None
    if not 0 < len(key) <= LONGEST or not re.fullmatch(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?", key):
        raise BadField("Idempotency-Key", f"Give 1 to {LONGEST} printable ASCII characters.")
    return key
