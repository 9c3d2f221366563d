"""Who may see and do what. One policy answers for every surface: the HTTP API, streams, the admin.

`LONGHAUL["ACCESS"]` names another class with the same two methods. It is asked about threads and runs only: a message follows
its thread; a step, leg, event or tool call its run.

    class ByTeam(threads.access.Policy):
        def visible(self, queryset, user):
            return queryset.filter(owner__team=user.team)

        def may(self, user, verb, obj):
            return obj is None or obj.owner_id == user.pk

Verbs of threads: `create`, `change`, `delete`; `save` and `delete_message` of a message in it; `start` of a run on it.
Verbs of runs: `start` (on a new thread), `cancel` (also of one of its calls), `answer` (for an `unknown` call of it), `resume`,
`retry`, `fork`. A policy that raises answers nobody: 500.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from django.conf import settings
from django.core.signals import setting_changed
from django.db.models import Model, QuerySet
from django.utils.module_loading import import_string

Row = TypeVar("Row", bound=Model)

# What staff need for a verb on what is not theirs; any other verb is a permission of the row's own model.
PERMISSIONS: Mapping[str, str] = {
    "save": "longhaul_threads.add_message",
    "delete_message": "longhaul_threads.delete_message",
    "start": "longhaul_runs.add_run",
    "resume": "longhaul_runs.add_run",
    "retry": "longhaul_runs.add_run",
    "fork": "longhaul_runs.add_run",
    "cancel": "longhaul_runs.cancel_run",
    "answer": "longhaul_tools.change_toolcall",
}


class Policy:
    """The default: a row is its owner's; staff see and do what their permissions say, also with what has no owner."""

    def visible(self, queryset: QuerySet[Row], user: Any) -> QuerySet[Row]:
        """Return those rows (threads or runs) of which the user may know that they exist."""
        if not user.is_authenticated:
            return queryset.none()
        if _permitted(user, permission("view", queryset.model)):
            return queryset
        return queryset.filter(owner=user.pk)

    def may(self, user: Any, verb: str, obj: Any) -> bool:
        """Return whether the user may do this to a thread or run that is visible to them; `obj` None is a new one."""
        if not user.is_authenticated:
            return False
        if obj is None or obj.owner_id == user.pk:
            return True
        return _permitted(user, permission(verb, type(obj)))


def _permitted(user: Any, named: str) -> bool:
    """Return whether the user is staff and has the permission; a user model may know neither of them."""
    return bool(getattr(user, "is_staff", False) and hasattr(user, "has_perm") and user.has_perm(named))


def permission(verb: str, model: type[Model]) -> str:
    """Name the permission that staff need: `longhaul_runs.view_run`."""
    return PERMISSIONS.get(verb, f"{model._meta.app_label}.{verb}_{model._meta.model_name}")


@cache
def policy() -> Any:
    """Return the policy that the settings name, or the default one. Raises ImportError."""
    given = getattr(settings, "LONGHAUL", None)
    named = given.get("ACCESS") if isinstance(given, Mapping) else None
    found = import_string(named) if isinstance(named, str) else named
    return (found or Policy)()


def visible(queryset: QuerySet[Row], user: Any) -> QuerySet[Row]:
    """Return those of the threads or runs that the user may see."""
    seen: QuerySet[Row] = policy().visible(queryset, user)
    return seen


def may(user: Any, verb: str, obj: Any = None) -> bool:
    """Return whether the user may do this to a thread or run that they see, or make a new one."""
    return bool(policy().may(user, verb, obj))


def _forget(*, setting: str, **_: object) -> None:
    if setting == "LONGHAUL":
        policy.cache_clear()


setting_changed.connect(_forget, dispatch_uid="longhaul.threads.access")
