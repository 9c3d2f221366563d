"""Which run is meant: by its id, or by a part of it that no other run has."""

from __future__ import annotations

from collections.abc import Iterable

from django.core.exceptions import ValidationError
from django.core.management import CommandError
from django.db.models import CharField
from django.db.models.functions import Cast

from runs.models import Run

SHOWN = 10
SHORTEST_PART = 4  # characters: less says too little


def run_named(id: str) -> Run:
    """Return the run of this id, or the only one whose id begins or ends so. Raises CommandError, and lists some."""
    part = id.strip().lower()
    if SHORTEST_PART <= len(part) < 36 and set(part) <= set("0123456789abcdef-"):
        written = Run.objects.select_related("thread").annotate(written=Cast("pk", CharField()))
        found = list((written.filter(written__startswith=part) | written.filter(written__endswith=part))[:2])
        if len(found) == 1:
            return found[0]
        if found:
            raise CommandError(f"More than one run's id begins or ends with {id!r}: give more of it.")
    try:
        return Run.objects.select_related("thread").get(pk=id)
    except (Run.DoesNotExist, ValidationError, ValueError):
        latest = Run.objects.order_by("-created_at")[: SHOWN + 1]
        some = [f"{each.pk} {each.agent} {each.status}" for each in latest]
        raise CommandError(f"There is no run {id!r}; there {listed(some, 'manage.py run_agent')}") from None


def listed(some: Iterable[str], otherwise: str) -> str:
    """Return the end of a sentence that says which there are; `otherwise` is the command that makes one."""
    shown = list(some)
    if not shown:
        return f"are none yet ({otherwise})."
    lines = "".join(f"\n  {each}" for each in shown[:SHOWN])
    return f"are:{lines}" + ("\n  ..." if len(shown) > SHOWN else "")
